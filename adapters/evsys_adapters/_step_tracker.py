"""`StepTracker`: how far a run's training has got, for adapters that cut what is run again."""

import msgspec


class Walk(msgspec.Struct, omit_defaults=True):
    """How far a walk has got; see `evsys_adapters._walk`."""

    stood: int
    """How many rows were in the file when it began."""
    passed: int = 0
    """How many of them are in front of the pointer."""
    appended: int = 0
    """How many rows were added behind them since."""
    doubtful: int = 0
    """How many of those, the first ones, came before the last start."""


class StepTracker(msgspec.Struct, omit_defaults=True):
    """How far a run's training has got; tells a start that is told again from one that begins anew."""

    begun: bool = False
    """Whether rows have come, or are to come: what is run again has been cut."""
    first: int | None = None
    """The step at which training started; None while there is none."""
    largest: int | None = None
    """The largest step since."""
    rewound: bool = False
    """Nothing was heard of the run since it was rewound."""
    unplaced: bool = False
    """The run is known from an introduction only: rows that come may be in what was written before."""
    walk: Walk | None = None
    """The walk over what was written before, once its first row has come."""
    pending: int | None = None
    """The step of a start that came meanwhile: the next row decides whether it was carried out already."""

    @property
    def walks(self) -> bool:
        """Whether rows that come may be in what was written before."""
        return self.unplaced or self.walk is not None

    def introduced(self) -> None:
        """The run's start is given again, because events go on behind it: nothing that was written is void.

        Where the output was not rewound, nobody knows how much of it comes again; the next row tells.
        """
        if not self.rewound or not self.begun:
            self.unplaced = True
        self.begun, self.rewound = True, False

    def continued(self) -> None:
        """The run's start is given again, and it is known what was written: nothing of it is void."""
        self.begun, self.rewound = True, False

    def starts(self, first_step: int) -> bool:
        """Training starts at this step: what was written of it and of later ones is void. True."""
        self.unplaced = False
        self.pending = None
        self._begins(first_step)
        return True

    def starts_pending(self, first_step: int) -> None:
        """Training starts at this step; whether that was carried out already is not known yet."""
        self.pending = first_step if self.pending is None else min(self.pending, first_step)
        self._begins(first_step)

    def steps(self, step: int) -> bool:
        """A step was seen; True if it is the first sign of a training."""
        news = not self.begun
        self.begun, self.rewound = True, False
        if self.largest is None or step > self.largest:
            self.largest = step
        return news

    def ends(self) -> None:
        """The training has ended."""
        self.first = self.largest = None
        self.rewound = False

    def _begins(self, first_step: int) -> None:
        self.begun, self.rewound = True, False
        self.first, self.largest = first_step, None
