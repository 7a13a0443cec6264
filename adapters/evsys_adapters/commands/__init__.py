"""Commands of ``evsys-bus`` that come with the adapters, by the entry-point group ``evsys_bus.commands``."""
