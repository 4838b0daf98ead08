"""Stages: cutting them out of a model, checking them, and putting them back together."""
