"""Measuring other hosts and the links between them."""
