"""The run folder and all that reads one."""
