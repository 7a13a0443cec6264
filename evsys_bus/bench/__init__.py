"""Benchmarks of evsys-bus on this machine, next to the alternatives: ``evsys-bus bench``.

One file per suite (`dispatch`, `imports`, `costs`, `journal`, `kills`, `growth`, ...). `question` defines what a suite
is, `harness` does the timing, `report` and `plot` format the results. Targets compare ratios within one interleaved
run, because absolute times depend on the machine and the moment.
"""
