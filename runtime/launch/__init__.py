"""Launchers: processes of this host (``local``), or on the hosts of a Ray cluster (``ray``)."""
