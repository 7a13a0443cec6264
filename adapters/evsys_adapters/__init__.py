"""The callbacks that ship with evsys-bus, each in a file of its own, loaded when it is first asked for."""
