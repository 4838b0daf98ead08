"""The models that are served: versions, the repository, counters and metadata."""
