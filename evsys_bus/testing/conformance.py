"""`conformance`: whether an adapter keeps its side of the contract, as one test that needs no fixtures and no plugin.

It owns what is asked of every adapter; `callback_trial` and `sink_trial` own the rest, `timeline` what is tried.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from evsys_bus.callback import Callback
from evsys_bus.sink import Sink
from evsys_bus.testing.callback_trial import CallbackTrial
from evsys_bus.testing.findings import Findings
from evsys_bus.testing.folders import Contents, empty_folder, files_in
from evsys_bus.testing.sink_trial import SinkTrial

Make: TypeAlias = Callable[[Path], Callback | Sink]
"""Makes the adapter; what it writes belongs into the folder."""


def conformance(
    make: Make, *, follow: bool = True, contents: Contents = files_in, delivery: Make | None = None
) -> Callable[[], None]:
    """A test of the adapter: give it a name that begins with ``test``.

    Tried is: nothing happens before the first hook or `open`; every hook with full, minimal and detached objects;
    metrics that are no numbers; late and repeated steps; two runs at once; start events that a courier tells again; the
    same files from live objects and from a record; and, with ``mark`` and ``rewind``, the same files after a crash. For
    a sink, and for the delivery half of a callback: the same events in batches, once and again, opening after closing,
    and what `write` returns.

    What a callback wrote is compared file by file and byte by byte, but for hidden files. Where the same rows may well
    be other bytes, as in a database, ``contents`` says what to compare.

    Args:
        make: Called many times, each time with another empty folder, mostly outside an event loop. A sink needs a
            destination that is there.
        follow: Whether the adapter may be followed; False for one that needs live objects. Of one with two halves the
            first never is.
        contents: What the adapter wrote into a folder: texts, lists or other values that can be compared, by name.
            Those in whose names ``wide`` or ``narrow`` stands are taken for that run's own, and have to be the same
            where it runs alone. It is called where nothing was written, too.
        delivery: Makes the delivery half, for a callback that has one; `make` makes the inline half.

    Raises:
        AssertionError: From the test; one sentence for every cause, with how often it showed.

    Example:
        >>> from evsys_bus.testing import RecordingCallback
        >>> test_my_adapter = conformance(lambda folder: RecordingCallback())
        >>> test_my_adapter()
    """

    def test() -> None:
        findings = Findings()
        adapter = _constructed_quietly(make, findings)
        if isinstance(adapter, Sink):
            SinkTrial(make, findings).run()
        elif adapter is not None:
            CallbackTrial(make, contents, findings).run(follow=follow and not getattr(adapter, "delivery", None))
            _try_half(adapter, delivery, findings)
        sentences = findings.sentences()
        if sentences:
            name = "the adapter" if adapter is None else type(adapter).__name__
            raise AssertionError("\n".join([f"{name} does not conform:", *sentences]))

    return test


def _constructed_quietly(make: Make, findings: Findings) -> Callback | Sink | None:
    """The adapter, if it can be constructed at all; doing something there is noted too."""
    with empty_folder() as folder:
        threads = threading.active_count()
        made: list[Callback | Sink] = []
        if not findings.met("it can be constructed outside an event loop", lambda: made.append(make(folder))):
            return None
        if any(folder.iterdir()):
            findings.note("it touches no file when it is constructed; there was one in the folder")
        if threading.active_count() > threads:
            findings.note("it starts no thread when it is constructed; there was one more")
    return made[0]


def _try_half(adapter: Callback, delivery: Make | None, findings: Findings) -> None:
    half: type | None = getattr(adapter, "delivery", None)
    if delivery is not None:
        SinkTrial(delivery, findings, "its delivery half: ").run()
    elif half is not None:
        fix = f"conformance(make, delivery=lambda folder: {half.__name__}(...))"
        findings.note(f"its delivery half is tried as well; say how it is made: {fix}")
