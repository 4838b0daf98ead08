"""Launchers: they start nodes as processes on this host (``local``) or on the hosts of a Ray cluster (``ray``)."""
