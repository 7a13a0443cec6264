"""`StepTracker`: the training progress of a run, for adapters that cut rows of steps that are run again."""

import msgspec


class Walk(msgspec.Struct, omit_defaults=True):
    """Progress of matching delivered rows with those in a file; see `evsys_adapters._walk`."""

    stood: int
    """Rows in the file when matching began."""
    passed: int = 0
    """Index of the row behind the last matched one."""
    appended: int = 0
    """Rows appended behind them since."""
    doubtful: int = 0
    """How many of the appended rows, the first ones, came before the last start."""


class StepTracker(msgspec.Struct, omit_defaults=True):
    """Training progress of a run; distinguishes a repeated start event from a new start."""

    begun: bool = False
    """Whether a training has started, so that rows of steps to be run again are cut already."""
    first: int | None = None
    """The first step of the training; None outside of one."""
    largest: int | None = None
    """The largest step since."""
    rewound: bool = False
    """Whether there was no event of the run since it was rewound."""
    unplaced: bool = False
    """Whether only a repeated start is known: rows that follow may be in the file."""
    walk: Walk | None = None
    """Progress of the matching, once the first row was delivered."""
    pending: int | None = None
    """The step of a start during the matching: the next row decides whether it was applied already."""

    @property
    def walks(self) -> bool:
        """Whether rows that follow may be in the file."""
        return self.unplaced or self.walk is not None

    def introduced(self) -> None:
        """The run's start event is repeated before later events; nothing in the output is void.

        If the output was not rewound, the following rows are matched with those in it.
        """
        if not self.rewound or not self.begun:
            self.unplaced = True
        self.begun, self.rewound = True, False

    def continued(self) -> None:
        """The run's start is given again, and it is known what was written: nothing of it is void."""
        self.begun, self.rewound = True, False

    def starts(self, first_step: int) -> bool:
        """Training starts at this step; rows from it on are void. Returns True."""
        self.unplaced = False
        self.pending = None
        self._begins(first_step)
        return True

    def starts_pending(self, first_step: int) -> None:
        """Training starts at this step; it is not known yet whether that was applied already."""
        self.pending = first_step if self.pending is None else min(self.pending, first_step)
        self._begins(first_step)

    def steps(self, step: int) -> bool:
        """Record a step; returns True if it is the first of a training."""
        news = not self.begun
        self.begun, self.rewound = True, False
        if self.largest is None or step > self.largest:
            self.largest = step
        return news

    def ends(self) -> None:
        self.first = self.largest = None
        self.rewound = False

    def _begins(self, first_step: int) -> None:
        self.begun, self.rewound = True, False
        self.first, self.largest = first_step, None
