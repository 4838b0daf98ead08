"""Shared memory, by which processes on one host pass tensors without copies."""
