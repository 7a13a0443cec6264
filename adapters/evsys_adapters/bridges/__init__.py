"""Bridges from training frameworks to the bus, one module per framework.

Each module imports its framework; this package imports none of them. All share `evsys_adapters.bridges._base`.
"""
