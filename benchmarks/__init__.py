"""Benchmarks: each file in a folder answers one question, and prints the command that repeats it; see __main__.py."""
