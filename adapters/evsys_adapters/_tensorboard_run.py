"""`TensorBoardRun`: one run, as scalars and texts on their way to its event file."""

from collections.abc import Mapping
from typing import Any

from evsys_adapters._experiment_pages import hypothesis_of
from evsys_adapters._logged_values import Table, config_of, json_of, markdown, split, text_of
from evsys_adapters._record_file import RecordLog
from evsys_adapters._run_logger import LoggedRun
from evsys_adapters._run_notes import RunNotes
from evsys_adapters._tensorboard_events import Events
from evsys_bus.context import LogContext


class TensorBoardRun(LoggedRun[RunNotes]):
    """A run, by the name of its folder."""

    def __init__(self, name: str, log: RecordLog, events: Events, notes: RunNotes) -> None:
        super().__init__(log, notes)
        self.name = name
        self.result: object = None
        self.arm: object = None
        self._events = events

    def describe(self, ctx: LogContext | None) -> None:
        """Write down configuration and hypothesis, once."""
        config = config_of(ctx)
        if self.notes.described or not config:
            return
        self.notes.described = True
        hypothesis = hypothesis_of(getattr(ctx, "config", None))
        if hypothesis:
            self.tell(None, "hypothesis", hypothesis)
        self.tell(None, "config", _as_code(config))

    def tell(self, step: int | None, tag: str, text: str) -> None:
        """Write a text; one without a step stands at the last."""
        at = self.notes.last if step is None else step
        self.log.add(self._events.text(at or 0, tag, text))

    def _write(self, stream: str, step: int, values: Mapping[str, Any]) -> None:
        numbers, texts = split(values)
        if numbers:
            self.log.add(self._events.scalars(step, {f"{stream}/{key}": value for key, value in numbers.items()}))
        for key, text in texts.items():
            self.tell(step, f"{stream}/{key}", text)

    def _conclude(self, head: str, values: Mapping[str, Any]) -> None:
        """Drawn at the last step, never at 0."""
        if self.notes.last is None:
            values = {key: text_of(value) for key, value in values.items()}
        self._write(head, self.notes.last or 0, values)

    def _show(self, step: int | None, head: str, what: str, shown: Table | object) -> None:
        self.tell(step, f"{head}/{what}", markdown(shown) if isinstance(shown, Table) else _as_code(shown))

    def _void(self, first_step: int) -> None:
        self.log.add(self._events.restart(first_step))

    def _tidy(self) -> None:
        tidied = self._events.tidied(self.log.records())
        self._void(0)  # appended, for whoever is reading the file
        for each in tidied:
            self.log.add(each)


def _as_code(value: object) -> str:
    return f"```json\n{json_of(value)}\n```"
