"""Run a node: ``python -m runtime.node``, as the launcher starts it."""

import sys

from runtime.background import come_forward_at_the_end_of

if "--background" in sys.argv:
    come_forward_at_the_end_of(0)  # before the other modules are read, which takes long at idle priority

from runtime.node.serve import main

sys.exit(main())
