"""Couriers: they carry a journal to callbacks and sinks, off the loop, now or on another day.

The journal's directory is the whole interface between the process that publishes and those that deliver: cursors,
states and dead letters stand beside the streams, so all who look agree.
"""
