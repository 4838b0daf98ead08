"""Decoders: finds the caches of a model, proves how they behave, and prepares the graph for steps."""
