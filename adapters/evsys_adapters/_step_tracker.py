"""`StepTracker`: the training progress of a run, for adapters that cut rows of steps that are run again."""

import msgspec


class MatchProgress(
    msgspec.Struct, omit_defaults=True, rename={"existing": "stood", "pointer": "passed", "unconfirmed": "doubtful"}
):
    """Progress of matching delivered rows with those in a file; see `evsys_adapters._row_matcher`."""

    existing: int
    """Rows in the file when matching began."""
    pointer: int = 0
    """Index of the row behind the last matched one."""
    appended: int = 0
    """Rows appended behind them since."""
    unconfirmed: int = 0
    """How many of the appended rows, the first ones, came before the last start."""


class StepTracker(
    msgspec.Struct,
    omit_defaults=True,
    rename={
        "has_started": "begun",
        "first_step": "first",
        "largest_step": "largest",
        "position_unknown": "unplaced",
        "match_progress": "walk",
        "pending_start": "pending",
    },
):
    """Training progress of a run; distinguishes a repeated start event from a new start."""

    has_started: bool = False
    """Whether a training has started, so that rows of steps to be run again are cut already."""
    first_step: int | None = None
    """The first step of the training; None outside of one."""
    largest_step: int | None = None
    """The largest step since."""
    rewound: bool = False
    """Whether there was no event of the run since it was rewound."""
    position_unknown: bool = False
    """Whether only a repeated start is known: rows that follow may be in the file."""
    match_progress: MatchProgress | None = None
    """Progress of the matching, once the first row was delivered."""
    pending_start: int | None = None
    """The step of a start during the matching: the next row decides whether it was applied already."""

    @property
    def is_matching(self) -> bool:
        """Whether rows that follow may be in the file."""
        return self.position_unknown or self.match_progress is not None

    def resume(self) -> None:
        """The run's start event is repeated before later events; nothing in the output is void.

        If the output was not rewound, the following rows are matched with those in it.
        """
        if not self.rewound or not self.has_started:
            self.position_unknown = True
        self.has_started, self.rewound = True, False

    def continued(self) -> None:
        """The run's start is given again, and it is known what was written: nothing of it is void."""
        self.has_started, self.rewound = True, False

    def start_training(self, first_step: int) -> bool:
        """Training starts at this step; rows from it on are void. Returns True."""
        self.position_unknown = False
        self.pending_start = None
        self._set_start(first_step)
        return True

    def start_pending(self, first_step: int) -> None:
        """Training starts at this step; it is not known yet whether that was applied already."""
        self.pending_start = first_step if self.pending_start is None else min(self.pending_start, first_step)
        self._set_start(first_step)

    def record_step(self, step: int) -> bool:
        """Record a step; returns True if it is the first of a training."""
        is_first = not self.has_started
        self.has_started, self.rewound = True, False
        if self.largest_step is None or step > self.largest_step:
            self.largest_step = step
        return is_first

    def end_training(self) -> None:
        self.first_step = self.largest_step = None
        self.rewound = False

    def _set_start(self, first_step: int) -> None:
        self.has_started, self.rewound = True, False
        self.first_step, self.largest_step = first_step, None
