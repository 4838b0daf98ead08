"""Run a node: ``python -m runtime.node``, as the launcher starts it."""

import sys

from runtime.node.serve import main

sys.exit(main())
