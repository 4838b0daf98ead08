"""The coordinator: it admits requests, watches nodes and replays what was lost."""
