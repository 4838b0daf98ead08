"""Metrics, traces and the figures behind the page."""
