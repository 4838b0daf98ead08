"""Measures links and models on this and on other hosts, for ``onnxsplit cluster measure``."""
