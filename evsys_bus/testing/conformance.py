"""`conformance`: checks whether an adapter fulfils its contract, as one test that needs no fixtures and no plugin.

This module has the checks of every adapter; `callback_trial` and `sink_trial` have the others, `timeline` the events.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from evsys_bus.callback import Callback
from evsys_bus.sink import Sink
from evsys_bus.testing.conformance_callback import CallbackConformance
from evsys_bus.testing.conformance_sink import SinkConformance
from evsys_bus.testing.failures import Failures
from evsys_bus.testing.folders import Contents, empty_folder, files_in

AdapterFactory: TypeAlias = Callable[[Path], Callback | Sink]
"""Constructs the adapter, which should write into the folder."""


def conformance(
    make: AdapterFactory, *, follow: bool = True, contents: Contents = files_in, delivery: AdapterFactory | None = None
) -> Callable[[], None]:
    """Return a test of the adapter; assign it to a name that begins with ``test``.

    It checks that nothing happens before the first hook or `open`; every hook with full, minimal and detached objects;
    metrics that are not numbers; late and repeated steps; two runs at once; start events that a courier repeats; the
    same files from live objects and from a record; and, with ``mark`` and ``rewind``, the same files after a crash. For
    a sink, and for the delivery half of a callback: the same events in batches, once and again, reopening after
    closing, and the return value of `write`.

    The files of a callback are compared byte by byte, except for hidden files. If equal rows may be stored as different
    bytes, as in a database, ``contents`` returns what to compare.

    Args:
        make: Constructs the adapter. Called many times, each time with another empty folder, mostly outside an event
            loop. The destination of a sink must be available.
        follow: Whether the adapter may be followed; False if it needs live objects. The inline half of a callback
            with a delivery half never is.
        contents: Returns what the adapter wrote into a folder: texts, lists or other comparable values, by name. Names
            that contain ``wide`` or ``narrow`` are taken to belong to that run, and their values must be the same if
            the run is alone. Also called if nothing was written.
        delivery: Constructs the delivery half of a callback that has one; `make` constructs the inline half.

    Raises:
        AssertionError: From the test; one sentence for each cause, with the number of occurrences.

    Example:
        >>> from evsys_bus.testing import RecordingCallback
        >>> test_my_adapter = conformance(lambda folder: RecordingCallback())
        >>> test_my_adapter()
    """

    def test() -> None:
        failures = Failures()
        adapter = _check_construction(make, failures)
        if isinstance(adapter, Sink):
            SinkConformance(make, failures).run()
        elif adapter is not None:
            CallbackConformance(make, contents, failures).run(follow=follow and not getattr(adapter, "delivery", None))
            _check_delivery_half(adapter, delivery, failures)
        sentences = failures.sentences()
        if sentences:
            name = "the adapter" if adapter is None else type(adapter).__name__
            raise AssertionError("\n".join([f"{name} does not conform:", *sentences]))

    return test


def _check_construction(make: AdapterFactory, failures: Failures) -> Callback | Sink | None:
    """Return the adapter, if it can be constructed at all; side effects of that are noted too."""
    with empty_folder() as folder:
        threads = threading.active_count()
        adapters: list[Callback | Sink] = []
        if not failures.check("it can be constructed outside an event loop", lambda: adapters.append(make(folder))):
            return None
        if any(folder.iterdir()):
            failures.add("it touches no file when it is constructed; there was one in the folder")
        if threading.active_count() > threads:
            failures.add("it starts no thread when it is constructed; there was one more")
    return adapters[0]


def _check_delivery_half(adapter: Callback, delivery: AdapterFactory | None, failures: Failures) -> None:
    delivery_class: type | None = getattr(adapter, "delivery", None)
    if delivery is not None:
        SinkConformance(delivery, failures, "its delivery half: ").run()
    elif delivery_class is not None:
        fix = f"conformance(make, delivery=lambda folder: {delivery_class.__name__}(...))"
        failures.add(f"its delivery half is tried as well; say how it is made: {fix}")
