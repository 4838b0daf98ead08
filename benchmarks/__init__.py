"""Benchmarks: each file in a folder answers one question, and prints how it was found; see __main__.py."""
