"""Run a node: ``python -m runtime.node``, as the launcher starts it."""

import sys

from runtime.node.process import main

sys.exit(main())
