"""Files that loggers write for each run: who owns them, which events they contain, and their formats."""
