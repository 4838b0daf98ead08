"""Load balancing: which replica takes a request next."""
