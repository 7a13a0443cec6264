"""The benchmarks that need more than the package installs: ``python -m benchmarks``."""
