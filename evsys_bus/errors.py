"""The error tree: what went wrong, where, and what to do next.

    EvsysBusError
    ├── ConfigError (ValueError)             a spec, a params dict or a file contains something that cannot be built
    │   ├── UnknownKindError     EB101       no adapter is registered under this kind
    │   ├── UnknownParamError    EB102       the adapter has no such parameter
    │   ├── WrongParamError      EB103       a parameter has the wrong type or lies out of range
    │   ├── BadSpecError         EB104       not a {kind, params} at all
    │   ├── DuplicateKindError   EB105       the kind is registered already
    │   ├── BrokenAdapterError   EB106       the adapter is known but cannot be loaded or constructed
    │   ├── DocumentError        EB107       an experiment that cannot be read, or whose parts are inconsistent
    │   └── ConfigErrors                     several of the above, found in one pass
    ├── HookError (TypeError)                a hook that could never be called, found when the callback is added
    │   ├── AsyncHookError       EB201       ``async def`` where hooks are sync
    │   ├── HookSignatureError   EB202       the hook cannot take its event's arguments
    │   ├── MisspeltHookError    EB203       the method's name is nearly that of a hook
    │   ├── NotACallbackError    EB204       the object has no hook at all
    │   └── SinkMethodError      EB205       a method of a sink, or ``mark`` or ``rewind``, that could never be called
    ├── EventError (TypeError)   EB301       what was published or declared is not an event
    ├── BusError (RuntimeError)
    │   ├── BusNotOpenError      EB501       the bus was not entered yet, or is closed
    │   ├── ForkedBusError       EB502       the bus belongs to the parent process
    │   ├── SettingError (ValueError) EB507  a setting of the bus is out of range
    │   ├── PublishLoopError     EB503       hooks publish inside hooks without end
    │   └── NotAttachedError     EB504       ``spawn`` on a callback that is on no open bus
    ├── SpawnError (TypeError)   EB505       ``spawn`` was given something that is not a coroutine function
    ├── DetachedError (AttributeError) EB506 a live attribute of a detached object was accessed
    ├── CodecError (ValueError)  EB601       bytes that are not an envelope
    ├── JournalError (OSError)
    │   ├── JournalOpenError     EB801       the journal's directory cannot be written
    │   ├── UnrecordedError      EB802       the disk refused an event, and the journal is configured to raise
    │   ├── JournalVersionError  EB803       written by a newer version
    │   ├── JournalClosedError   EB804       an append before the journal was opened, or after it was closed
    │   ├── JournalInUseError    EB805       a live process is writing what was to be changed
    │   └── RunNotFoundError (FileNotFoundError) EB806 no recorded run in a folder, or several
    ├── DeliveryError                        raised by a sink to decide what happens to the batch
    │   ├── RetryLaterError      EB901       not now: the destination is busy or away
    │   ├── ParkedError          EB902       not until a person fixes it: the destination refuses our credentials
    │   ├── RejectedError        EB903       never: the destination refuses these events
    │   └── BatchTooLargeError   EB904       not so many at once
    ├── CourierBusyError (RuntimeError) EB905 another process delivers to the adapter
    ├── DashboardError (RuntimeError) EB907  the dashboard could not be started, reached or stopped
    └── TrainingError (RuntimeError) EB701   the reference loop was given something it cannot train with

Every error has a ``code``, the location ``where`` it was found (if that is in a config) and the ``fix``. This module
defines their text; printing and colours are up to the command line.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from evsys_bus.location import Location


class EvsysBusError(Exception):
    """The base class of all errors.

    ``str(error)`` is what users see: code and message, location, reason, and the exact fix.
    """

    code: ClassVar[str] = "EB000"

    def __init__(self, what: str, *, fix: str, where: Location | None = None, why: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix
        self.where = where
        self.why = why

    def __str__(self) -> str:
        lines = [f"error[{self.code}]: {self.what}"]
        if self.where is not None:
            lines.append(str(self.where))
        if self.why is not None:
            lines.append(f"why: {self.why}")
        lines.append(f"fix: {self.fix}")
        return "\n".join(lines)


class ConfigError(EvsysBusError, ValueError):
    """A spec, a params dict or a file contains something that cannot be built."""


class UnknownKindError(ConfigError):
    """No adapter is registered under this kind."""

    code = "EB101"


class UnknownParamError(ConfigError):
    """The adapter has no such parameter."""

    code = "EB102"


class WrongParamError(ConfigError):
    """A parameter has the wrong type or lies out of range."""

    code = "EB103"


class BadSpecError(ConfigError):
    """The value is not a ``{kind, params}`` at all."""

    code = "EB104"


class DuplicateKindError(ConfigError):
    """The kind is registered already."""

    code = "EB105"


class BrokenAdapterError(ConfigError):
    """The adapter is known but cannot be loaded or constructed; the cause is chained."""

    code = "EB106"


class DocumentError(ConfigError):
    """An experiment cannot be read, names a recipe that does not exist, or is inconsistent."""

    code = "EB107"


class ConfigErrors(ConfigError):  # noqa: N818 # several errors, as the name shows
    """Several config errors, found in one pass, in the order of the file."""

    def __init__(self, errors: Sequence[ConfigError]) -> None:
        super().__init__(f"{len(errors)} config errors", fix="see each of them")
        self.errors = tuple(errors)

    def __str__(self) -> str:
        return "\n\n".join(str(error) for error in self.errors)


class HookError(EvsysBusError, TypeError):
    """A hook that could never be called."""


class AsyncHookError(HookError):
    """``async def`` where hooks are sync."""

    code = "EB201"


class HookSignatureError(HookError):
    """The hook cannot take its event's arguments."""

    code = "EB202"


class MisspeltHookError(HookError):
    """The method's name is nearly that of a hook."""

    code = "EB203"


class NotACallbackError(HookError):
    """The object has no hook at all."""

    code = "EB204"


class SinkMethodError(HookError):
    """A method of a sink that a courier could never call; or ``mark`` without ``rewind``, or the reverse."""

    code = "EB205"


class EventError(EvsysBusError, TypeError):
    """What was published or declared is not an event."""

    code = "EB301"


class BusError(EvsysBusError, RuntimeError):
    """The bus cannot do this in the state it is in."""


class BusNotOpenError(BusError):
    """The bus was not entered yet, or is closed."""

    code = "EB501"


class ForkedBusError(BusError):
    """The bus belongs to the parent process."""

    code = "EB502"


class SettingError(BusError, ValueError):
    """A setting of the bus is out of range."""

    code = "EB507"


class PublishLoopError(BusError):
    """Hooks publish inside hooks without end."""

    code = "EB503"


class NotAttachedError(BusError):
    """``spawn`` was called on a callback that is on no open bus."""

    code = "EB504"


class SpawnError(EvsysBusError, TypeError):
    """``spawn`` was given something that is not a coroutine function."""

    code = "EB505"


class DetachedError(EvsysBusError, AttributeError):
    """A live attribute of a detached object was accessed.

    It is an ``AttributeError``, so ``getattr(state, "backend", None)`` returns the default.
    """

    code = "EB506"


class CodecError(EvsysBusError, ValueError):
    """The bytes are not an envelope."""

    code = "EB601"


class JournalError(EvsysBusError, OSError):
    """The journal cannot be opened, written or read."""


class JournalOpenError(JournalError):
    """The journal's directory cannot be written."""

    code = "EB801"


class UnrecordedError(JournalError):
    """The disk refused an event, and the journal is configured to raise."""

    code = "EB802"


class JournalVersionError(JournalError):
    """The journal was written by a newer version."""

    code = "EB803"


class JournalClosedError(JournalError):
    """An append before the journal was opened, or after it was closed."""

    code = "EB804"


class JournalInUseError(JournalError):
    """A live process is writing what was to be changed."""

    code = "EB805"


class RunNotFoundError(JournalError, FileNotFoundError):
    """There is no recorded run in a folder, or there are several where one is to be read."""

    code = "EB806"


class DeliveryError(EvsysBusError):
    """Raised by a sink to decide what happens to the batch; ``fix`` is shown to people who look at the adapter."""

    def __init__(self, what: str, *, fix: str = "evsys-bus status shows how the delivery continues") -> None:
        super().__init__(what, fix=fix)


class RetryLaterError(DeliveryError):
    """Not now: the destination is busy or away. Retried without end, after ``after_seconds`` if given.

    With ``waiting``, nothing is wrong: the sink waits for other work, such as an upload. The state of the delivery is
    then ``waiting`` instead of ``retrying``, and nothing is logged.
    """

    code = "EB901"

    def __init__(self, what: str, *, after_seconds: float | None = None, waiting: bool = False) -> None:
        super().__init__(what)
        self.after_seconds = after_seconds
        self.waiting = waiting


class ParkedError(DeliveryError):
    """Not until a person fixes it, such as a wrong key: the adapter is parked, and retried once a minute."""

    code = "EB902"


class RejectedError(DeliveryError):
    """Never: these events become dead letters, and the others of the batch are delivered."""

    code = "EB903"

    def __init__(self, reasons: Mapping[int, str]) -> None:
        """Give the reason for each rejected index of the batch."""
        super().__init__(f"{len(reasons)} events were rejected: {'; '.join(sorted(set(reasons.values()))[:3])}")
        self.reasons = dict(reasons)


class BatchTooLargeError(DeliveryError):
    """Not so many at once: the batch is halved; one event that is too large by itself becomes a dead letter."""

    code = "EB904"


class CourierBusyError(EvsysBusError, RuntimeError):
    """Another process delivers to this adapter from this journal."""

    code = "EB905"


class UntrustedFileError(EvsysBusError, PermissionError):
    """A file that another user wrote, or may write, names code to import or files to write."""

    code = "EB906"


class DashboardError(EvsysBusError, RuntimeError):
    """The dashboard could not be started, reached or stopped, or cannot import a journal."""

    code = "EB907"


class TrainingError(EvsysBusError, RuntimeError):
    """The reference loop was given something it cannot train with."""

    code = "EB701"


def closest_word(word: str, known: Iterable[str], *, min_similarity: float = 0.6) -> str | None:
    """Return the known word of which this one may be a misspelling, or None; equal words have the similarity 1."""
    import difflib  # only when something went wrong

    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=min_similarity)), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``did you mean "x"?``, the known words if none is close, or an empty string if there are none."""
    words = sorted(known)
    near = closest_word(word, words)
    if near is not None:
        return f'did you mean "{near}"?'
    return f"known: {', '.join(words)}" if words else ""
