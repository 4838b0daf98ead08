"""Planning: from a model and a target to a plan."""
