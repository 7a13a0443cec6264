"""Couriers: they deliver the events of a journal to callbacks and sinks, off the event loop, during the run or later.

The journal directory is the only interface between the process that publishes and those that deliver: cursors, status
files and dead letters are stored beside the streams, so every reader gets the same picture.
"""
