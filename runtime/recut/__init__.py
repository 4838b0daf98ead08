"""Changing the plan of a pipeline while it serves: two plans run side by side, and requests enter the newer one."""
