"""Stages: extracting them from a model, running them in a chain, verifying them, and merging them."""
