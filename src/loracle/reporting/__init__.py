"""The report of a run: its data, the page and the tables."""
