"""Benchmarks of evsys-bus on this machine, next to the alternatives: ``evsys-bus bench``.

One file per suite (`dispatch`, `imports`, `costs`, `journal`, `couriers`, `kills`, `memory_growth`, ...). `suite`
defines what a suite is and does the timing, `report` formats and draws the results. Targets compare ratios within one
interleaved run, because absolute times depend on the machine and the moment.
"""
