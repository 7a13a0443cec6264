"""The dashboard: one process with an embedded database, which receives events and shows experiments in a browser."""
