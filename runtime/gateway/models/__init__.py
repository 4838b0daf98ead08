"""The models that are served: the repository, their versions and metadata."""
