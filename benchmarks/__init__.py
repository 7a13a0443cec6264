"""Benchmarks that need packages beyond the dependencies of evsys-bus: ``python -m benchmarks``."""
