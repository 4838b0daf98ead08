"""Deployment files for other orchestrators."""
