"""Load balancing: the load boards of processes, the policies, and the router that applies them."""
