"""A node: the process that executes one stage."""
