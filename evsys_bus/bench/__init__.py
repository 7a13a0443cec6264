"""How fast it is, asked on the machine in front of you and beside the alternatives: ``evsys-bus bench``.

One file per question (`dispatch`, `imports`, `costs`, `journal`, `kills`, `growth`); `question` says what a question
is, `harness` times contenders fairly, `report` and `plot` show what came out. Everything is judged by ratios within one
interleaved run: absolute times belong to a machine and a moment.
"""
