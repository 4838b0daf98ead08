"""One request of a caller: its checks, its admission, its parts and its answer."""
