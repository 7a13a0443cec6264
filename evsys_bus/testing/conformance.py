"""`conformance`: checks whether an adapter fulfils its contract, as one test that needs no plugin of pytest.

This module has the checks of every adapter; `evsys_bus.testing.conformance_checks` has those of callbacks and sinks,
`evsys_bus.testing.timeline` the events.
"""

import asyncio
import contextvars
import inspect
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeAlias

from evsys_bus.callback import Callback
from evsys_bus.sink import Sink
from evsys_bus.testing.conformance_checks import (
    AdapterFactory,
    CallbackConformance,
    Contents,
    Failures,
    SinkConformance,
    empty_folder,
    read_visible_files,
)

FactoryWithFixtures: TypeAlias = Callable[..., Callback | Sink]
"""Constructs the adapter, given a folder that it should write into, and fixtures by name."""


def conformance(
    make: FactoryWithFixtures,
    *,
    follow: bool = True,
    contents: Callable[..., Mapping[str, Any]] = read_visible_files,
    delivery: FactoryWithFixtures | None = None,
) -> Callable[..., None]:
    """Return a test of the adapter; assign it to a name that begins with ``test``.

    It checks that nothing happens before the first hook or `open`; every hook with full, minimal and detached objects;
    metrics that are not numbers; late and repeated steps; two runs at once; start events that a courier repeats; the
    same files from live objects and from a record; and, with ``mark`` and ``rewind``, the same files after a crash. For
    a sink, and for the delivery half of a callback: the same events in batches, once and again, reopening after
    closing, and the return value of `write`; a raw sink is given records, one of which is not an envelope.

    The files of a callback are compared byte by byte, except for hidden files. If equal rows may be stored as different
    bytes, as in a database, ``contents`` returns what to compare.

    Parameters of ``make``, ``contents`` and ``delivery`` after the folder, if they have no default, are fixtures:
    pytest passes their values to the test, and the test passes them on, the same for every construction.

    Inside a running event loop, as in an async test, the test runs on a thread of its own, and the loop waits for it.
    If the adapter needs something that runs on that loop, such as a server, leave the loop free:
    ``await asyncio.to_thread(conformance(make))``.

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
        >>> from evsys_bus.testing import RecordingCallback, RecordingSink
        >>> test_my_callback = conformance(lambda folder: RecordingCallback())
        >>> test_my_callback()

        With a fixture ``server``, of which pytest passes the value, as here by hand:

        >>> class Posts(RecordingSink):
        ...     def __init__(self, url: str) -> None:
        ...         super().__init__()
        ...         self.url = url
        >>> test_my_sink = conformance(lambda folder, server: Posts(server))
        >>> test_my_sink(server="http://127.0.0.1:8000")

        In an async test:

        >>> async def test_in_a_loop():
        ...     conformance(lambda folder: RecordingSink())()
        ...     await asyncio.to_thread(conformance(lambda folder: RecordingSink()))
        >>> asyncio.run(test_in_a_loop())
    """
    functions = [each for each in (make, contents, delivery) if each is not None]
    names = dict.fromkeys(name for each in functions for name in _fixture_names(each))
    signature = inspect.Signature([inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names])

    def test(**fixtures: object) -> None:
        signature.bind(**fixtures)
        check = partial(
            _check_adapter,
            _pass_fixtures(make, fixtures),
            _pass_fixtures(contents, fixtures),
            None if delivery is None else _pass_fixtures(delivery, fixtures),
            follow=follow,
        )
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            check()
            return
        with ThreadPoolExecutor(1, "evsys-bus:conformance") as executor:
            executor.submit(contextvars.copy_context().run, check).result()

    test.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess] - read by inspect, and so by pytest
    return test


def _fixture_names(function: Callable[..., object]) -> list[str]:
    """Return the parameters after the folder that have no default."""
    try:
        parameters = [*inspect.signature(function).parameters.values()][1:]
    except (TypeError, ValueError):  # implemented in C, without a signature
        return []
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [each.name for each in parameters if each.kind in by_name and each.default is each.empty]


def _pass_fixtures(function: Callable[..., Any], fixtures: Mapping[str, object]) -> Callable[..., Any]:
    return partial(function, **{name: fixtures[name] for name in _fixture_names(function)})


def _check_adapter(make: AdapterFactory, contents: Contents, delivery: AdapterFactory | None, *, follow: bool) -> None:
    failures = Failures()
    adapter = _check_construction(make, failures)
    if isinstance(adapter, Sink):
        SinkConformance(make, failures).run()
    elif adapter is not None:
        CallbackConformance(make, contents, failures).run(follow=follow and not getattr(adapter, "delivery", None))
        delivery_class: type | None = getattr(adapter, "delivery", None)
        if delivery is not None:
            SinkConformance(delivery, failures, "its delivery half: ").run()
        elif delivery_class is not None:
            fix = f"conformance(make, delivery=lambda folder: {delivery_class.__name__}(...))"
            failures.add(f"its delivery half is tried as well; give a function that makes it: {fix}")
    sentences = failures.sentences()
    if sentences:
        name = "the adapter" if adapter is None else type(adapter).__name__
        raise AssertionError("\n".join([f"{name} does not conform:", *sentences]))


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
