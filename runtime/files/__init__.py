"""Stage files: served to nodes on other hosts, fetched, checked and cached."""
