"""Shared memory between processes on one host."""
