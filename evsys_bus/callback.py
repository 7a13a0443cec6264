"""The contract for callback authors: `Callback`, its hooks, and what happens when one raises.

This module contains the contract, its checks, and `dispatch`, which calls one hook on many callbacks. The bus calls
hooks by itself, faster, with the same isolation (`isolate`).
"""

import inspect
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Iterable, Sequence
from contextlib import AsyncContextDecorator, ContextDecorator
from types import FunctionType
from typing import Any, ClassVar, Final, Literal, Self, cast, overload

import msgspec

from evsys_bus.adapter import Adapter, EventInfo, RetryPolicy, Spawner
from evsys_bus.context import (
    ArmResult,
    ContentItem,
    EvalResult,
    ExperimentResult,
    LogContext,
    LoopArtifacts,
    LoopState,
    ManifestRow,
    Prediction,
    RunResult,
    TrainingBatch,
)
from evsys_bus.diagnostics import FaultLog, log
from evsys_bus.errors import (
    AsyncHookError,
    HookError,
    HookSignatureError,
    MisspeltHookError,
    NotACallbackError,
    NotAttachedError,
    closest_word,
)
from evsys_bus.events import Event, declared_events, is_newer


class _CurrentEvent:
    """``self.event``: not a property, so that a class may define an attribute of that name."""

    @overload
    def __get__(self, callback: None, owner: type) -> Self: ...

    @overload
    def __get__(self, callback: "Callback", owner: type) -> EventInfo: ...

    def __get__(self, callback: "Callback | None", owner: type) -> "EventInfo | Self":
        if callback is None:
            return self
        attached = callback.evsys_attached
        info = _current_spawner(callback, "event").current_event() if attached else None
        return EventInfo(time.time()) if info is None else info


class Callback(Adapter):
    """Hooks of a training run, all sync and all no-ops: override the ones you need.

    Hooks run inside ``publish``, on the publishing thread, in the order in which the callbacks were given. Exceptions
    are logged and isolated. Store the state of a run under its key (``state.run_key``, or ``ctx.run_key`` in hooks
    that take a context), never directly on the instance: several runs may train at the same time.

    Use `spawn` for async work. A bare ``asyncio.create_task`` in a hook works too if an event loop is running: the bus
    adopts the task, logs its exception, and waits for it at the end.

    Example:
        >>> class Loss(Callback):
        ...     def on_step_end(self, state, step_idx, batch, metrics):
        ...         print(step_idx, metrics["loss"])
        >>> dispatch([Loss()], "on_step_end", None, 3, None, {"loss": 0.5})
        3 0.5
    """

    placement: ClassVar[Literal["inline", "follow"]] = "inline"
    """Where it runs unless its spec sets it: in ``publish``, with live objects, or off the loop, from the journal. Set
    ``callback.placement = "inline"`` to change it for one object."""
    stops_runs: ClassVar[bool] = False
    """Whether it may stop the run; if so, it cannot be followed."""
    marks_inline: ClassVar[bool] = True
    """Whether a bus with a journal records the marks of an inline callback that has `mark` and `rewind`. False if the
    marks are positions in files: a courier delivers again what a rewind truncates, but nothing is repeated inline."""
    delivery: ClassVar[type | None] = None
    """Its delivery half, if it has one: a `Sink` class, constructed with the same arguments and delivered to by a
    courier. The callback itself then runs inline and does no I/O. With ``placement = "inline"``, the bus delivers to
    the half in a task on the program's own event loop."""

    event = _CurrentEvent()
    """Time, stream and sequence of the event of the running hook: when it was published, however late a followed
    callback gets it. Outside a hook, and without a bus, the time is now."""

    evsys_subscription: Any = None
    """How it is delivered to; set by `build_callbacks`."""
    evsys_attached: ClassVar[tuple[Spawner, ...]] = ()
    """The open buses that hold it, or its courier; set by them on the instance."""
    evsys_left_open: ClassVar[bool] = False
    """Whether a bus that called its hooks was left while another one held it, which then closes it."""

    def on_experiment_start(self, ctx: LogContext) -> None:
        """Fires once at the start of an experiment, before any arm. Write ``ctx.ids["experiment_id"]`` here."""

    def on_group_start(self, ctx: LogContext, group_name: str) -> None:
        """Fires when a new group of runs is needed. Write ``ctx.ids[f"group:{group_name}"]`` here."""

    def on_run_start(self, ctx: LogContext) -> None:
        """Fires per run, before training; ``ctx.run_config`` is set. Write ``ctx.ids["run_id"]`` here."""

    def on_train_start(self, state: LoopState) -> None:
        """Fires once before the first step; ``state.step`` is that step."""

    def on_step_end(self, state: LoopState, step_idx: int, batch: TrainingBatch, metrics: dict[str, Any]) -> None:
        """Fires after every step's metrics row is written; keys added to ``metrics`` reach later callbacks."""

    def on_checkpoint(self, state: LoopState, row: ManifestRow) -> None:
        """Fires after each checkpoint's manifest row is recorded."""

    def on_eval(self, state: LoopState, step_idx: int, eval_name: str, metrics: dict[str, Any]) -> None:
        """Fires per evaluator after each in-loop eval."""

    def on_benchmark_eval(
        self, ctx: LogContext, eval_result: EvalResult, predictions: list[Prediction], *, step: int | None = None
    ) -> None:
        """Fires per benchmark scored: in-loop (``step`` = the train step) or after training (``step=None``)."""

    def on_train_end(self, state: LoopState, artifacts: LoopArtifacts) -> None:
        """Fires once after the loop, the final checkpoint's save included; also when it raised (``state.error``)."""

    def on_run_end(self, ctx: LogContext, run_result: RunResult, arm: ArmResult) -> None:
        """Fires per run, after eval, before the run is marked completed."""

    def on_experiment_end(self, ctx: LogContext, result: ExperimentResult) -> None:
        """Fires once at the end of the experiment."""

    # Hooks since 0.2. A callback that uses one of these names otherwise goes on working: its method is not called.

    def on_metrics(self, state: LoopState, step_idx: int, metrics: dict[str, Any]) -> None:
        """Fires for each part of a step's row, as it is logged; the whole row follows with `on_step_end`."""

    def on_epoch_end(self, state: LoopState, epoch: int, metrics: dict[str, Any]) -> None:
        """Fires after each pass over the data."""

    def on_rollout(
        self, state: LoopState, step_idx: int, rollouts: list[Any], rollout_items: Sequence[Any] = ()
    ) -> None:
        """Fires after a step has sampled trajectories."""

    def on_train_data(self, ctx: LogContext, rows: list[Any]) -> None:
        """Fires once per run with the examples as they are rendered for training."""

    def on_environment(self, ctx: LogContext, facts: dict[str, Any]) -> None:
        """Fires once per start of a run, with the commit, command line, packages, host and GPUs."""

    def on_config_update(self, ctx: LogContext, config: dict[str, Any]) -> None:
        """Fires when keys of the run's configuration were added or changed; ``config`` has only these."""

    def on_summary(self, ctx: LogContext, values: dict[str, Any]) -> None:
        """Fires when values that describe the run as a whole were set; ``values`` has only these."""

    def on_content(self, state: LoopState, step_idx: int | None, item: ContentItem) -> None:
        """Fires after a text, picture, table, file or the like was stored in the run's directory."""

    def on_alert(self, ctx: LogContext, title: str, text: str, level: str) -> None:
        """Fires for something that a person should see; ``level`` is ``info``, ``warning`` or ``error``."""

    def spawn(
        self,
        fn: Callable[..., Coroutine[Any, Any, object]],
        /,
        *args: Any,
        name: str | None = None,
        timeout: float | None = None,
        retry: RetryPolicy | None = None,
        lane: str | None = None,
        background: bool = False,
    ) -> bool:
        """Run ``fn(*args)`` beside the loop; the bus owns the task, logs its failure and waits for it at the end.

        In a followed callback, the event counts as delivered once the task has ended.

        Args:
            fn: A coroutine function. Pass the function and its arguments, not a coroutine.
            name: The task's name in receipts and logs; default: the function's name.
            timeout: Seconds over all attempts, after which the task is cancelled and counted as failed.
            retry: A policy object, called as ``await retry(fn, *args)``; see `SinkRetrier`.
            lane: Tasks of the same lane run one after another, in order.
            background: For a task that runs until it is cancelled, such as a watcher: nothing waits for it, and it is
                cancelled at the end, after `close`.

        Returns:
            False if it was refused because too many tasks wait already: logged, and counted in ``health()``.

        Raises:
            NotAttachedError: The callback was not given to a bus, or the bus is closed.
            SpawnError: ``fn`` is not a coroutine function.
        """
        bus = _current_spawner(self, "spawn")
        owner = callback_name(self)
        return bus.spawn(
            fn, *args, name=name, timeout=timeout, retry=retry, lane=lane, owner=owner, background=background
        )

    def close(self) -> None:
        """Flush and release what the hooks opened. Not a hook: called once by each bus or courier that called hooks.

        It is called after the last hook and the last task, or when the callback is removed; on any thread, and within
        the deadline of the shutdown. Of several open buses that share the callback, the last one calls it. A hook that
        is called later must reopen what it needs.
        """

    def report_owed(self, events: int, why: str | None = None, fix: str | None = None) -> None:
        """Report how many delivered events the destination has not confirmed; see `Adapter.report_owed`."""
        for each in self.evsys_attached:
            each.report_owed(self, events, why, fix)

    def publish(self, event: Event) -> None:
        """Record an event, such as a result of one of the callback's tasks.

        In a followed callback it is recorded in the couriers' own stream of the journal, which adapters are not given,
        except for `RunAnnotated`. Inline it is an ordinary event, with its hooks.

        Raises:
            NotAttachedError: The callback was not given to a bus, or the bus is closed.
        """
        _current_spawner(self, "publish").publish(event)


def _current_spawner(callback: Callback, method: str) -> Spawner:
    """Return what the callback is attached to; of several, the one that called it."""
    attached = callback.evsys_attached
    if not attached:
        raise NotAttachedError(
            f"{type(callback).__name__}.{method}() needs an open bus",
            fix=f"give the callback to an EventBus (or a TrainingLoop) and {method} from inside a hook",
        )
    if len(attached) == 1:
        return attached[0]
    return next((each for each in attached if each.publishes_here()), attached[-1])


def attach(callback: object, bus: Spawner) -> None:
    """Attach the callback to a bus, for its tasks and events."""
    if isinstance(callback, Callback):
        _set_attached(callback, (*_other_spawners(callback, bus), bus))


def detach(callback: object, bus: Spawner) -> None:
    """Detach the callback from a bus."""
    if isinstance(callback, Callback):
        _set_attached(callback, _other_spawners(callback, bus))


def _other_spawners(callback: Callback, bus: Spawner) -> tuple[Spawner, ...]:
    return tuple(each for each in callback.evsys_attached if each is not bus)


def _set_attached(callback: Callback, attached: tuple[Spawner, ...]) -> None:
    object.__setattr__(callback, "evsys_attached", attached)  # a callback may be a frozen dataclass


def callback_name(callback: object) -> str:
    """Return the name of a callback in logs, health and receipts: from its spec, or that of its class."""
    name = get_attribute(callback, "spec_name")
    return name if isinstance(name, str) and name else type(callback).__name__


def get_attribute(callback: object, name: str) -> Any:
    """Return the attribute, or None if there is none or the lookup raises."""
    try:
        return getattr(callback, name, None)
    except Exception:  # a foreign __getattr__ or property
        return None


def dispatch(callbacks: Iterable[object] | None, hook: str, *args: Any, **kwargs: Any) -> None:
    """Call one hook on every callback, in order; an exception is logged at WARNING and the next callback is called.

    Callbacks without that hook are skipped. KeyboardInterrupt and SystemExit are raised after the remaining callbacks
    ran. Hooks run inline, whatever their class declares: there is no bus, and so no journal, no tasks and no delivery;
    a callback that needs them is logged once.

    Raises:
        NotACallbackError: An item is a spec or a class.
    """
    callbacks = list(callbacks or ())
    for callback in callbacks:
        _check_instance(callback)
    exit_error: BaseException | None = None
    for callback in callbacks:
        if get_attribute(callback, "delivery") is not None:
            _warn_not_delivered(callback)
        try:
            function = getattr(callback, hook, None)
            if callable(function):
                check_return_value(callback, hook, function(*args, **kwargs))
        except BaseException as error:
            exit_error = isolate(callback, hook, error) or exit_error
    if exit_error is not None:
        raise exit_error


def _check_instance(callback: object) -> None:
    """Refuse what is given in place of a callback and has no hook at all.

    Raises:
        NotACallbackError: It is a class, a name or a spec.
    """
    if isinstance(callback, type):
        raise NotACallbackError(
            f"{callback.__name__} is a class; a bus calls the hooks of an instance",
            fix=f"give {callback.__name__}(...)",
        )
    is_spec = isinstance(callback, msgspec.Struct) and hasattr(callback, "kind") and hasattr(callback, "params")
    hooks = (each.hook for each in declared_events().values())
    if isinstance(callback, dict | str) or (is_spec and not any(hasattr(callback, each) for each in hooks)):
        raise _no_hook(cast("object", callback))


def _no_hook(callback: object) -> NotACallbackError:
    return NotACallbackError(
        f"a {type(callback).__name__} has no hook, so nothing would ever be called",
        fix="give an object with hooks (see Callback); a spec is built first: build_callbacks([spec])",
    )


def _warn_not_delivered(callback: object) -> None:
    """Log once that a delivery half receives nothing without a bus."""
    if isinstance(callback, Callback) and not callback.evsys_attached and not get_attribute(callback, "evsys_warned"):
        object.__setattr__(callback, "evsys_warned", True)
        delivery_class = get_attribute(get_attribute(callback, "delivery"), "__name__")
        fix = "give it to an EventBus (or a TrainingLoop), which delivers to it"
        log().warning("dispatch.not_delivered", callback=callback_name(callback), half=delivery_class, fix=fix)


def can_return_value(method: Callable[..., object]) -> bool:
    """Return whether a hook may return a value other than None, and so needs `check_return_value`."""
    function = getattr(method, "__func__", method)
    if not isinstance(function, FunctionType) or function.__code__.co_flags & _GENERATOR_OR_ASYNC:
        return True
    import dis  # `inspect` has imported it

    previous: Any = ...
    for instruction in dis.get_instructions(function):
        if instruction.opname == "RETURN_CONST" and instruction.argval is not None:
            return True
        if instruction.opname == "RETURN_VALUE" and previous is not None:
            return True
        previous = instruction.argval if instruction.opname == "LOAD_CONST" else ...
    return False


def check_return_value(callback: object, hook: str, value: object) -> None:
    """Check the return value of a hook; a future or task is fine, because it runs by itself.

    Raises:
        AsyncHookError: It is a coroutine or a generator, which would never run.
    """
    kind = type(value)
    if value is None or not issubclass(kind, _UNSTARTED):
        return
    import asyncio  # loaded already if there is an awaitable

    if asyncio.isfuture(value):
        return
    if issubclass(kind, Coroutine):
        cast("Coroutine[Any, Any, Any]", value).close()  # avoids the warning "was never awaited"
    raise AsyncHookError(
        f"{type(callback).__name__}.{hook} returned a {kind.__name__}, and nothing runs it",
        why="hooks are sync: the loop never waits for a callback",
        fix="start it inside the hook: self.spawn(coroutine_function, *args); a decorator must call what it wraps",
    )


def isolate(callback: object, hook: str, error: BaseException, faults: FaultLog | None = None) -> BaseException | None:
    """Handle an exception of a hook: log it at WARNING, with the names of callback and hook.

    Returns the error if it must be raised after the remaining hooks ran (KeyboardInterrupt and SystemExit), else None.
    ``asyncio.CancelledError`` is handled too: sync code cannot be cancelled, so a hook that raises it has a bug.
    """
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return error
    facts: dict[str, Any] = {"callback": callback_name(callback), "hook": hook}
    if type(error) is RuntimeError and "no running event loop" in str(error):
        facts["fix"] = "no event loop runs in this hook's thread: use self.spawn(coroutine_function, *args)"
    if faults is None:
        log().warning("hook.failed", **facts, exc_info=error)
    else:
        faults.warn("hook.failed", (id(callback), hook), error=error, **facts)
    return None


def find_hook(callback: object, event_type: type[Event]) -> Callable[..., object] | None:
    """Return the callback's own method for this event, or None if it has none or only the inherited no-op."""
    method = get_attribute(callback, event_type.hook)
    inherited = getattr(Callback, event_type.hook, None)
    if not callable(method) or (inherited is not None and getattr(method, "__func__", None) is inherited):
        return None
    if is_newer(event_type) and _hook_error(callback, method, event_type) is not None:
        return None  # an older callback's own method of that name
    return method


_PLACEHOLDER: Final = object()
_UNSTARTED: Final = (Awaitable, Generator, AsyncGenerator, ContextDecorator, AsyncContextDecorator)
"""What a call may return without having run a line; the last two are what `contextlib.contextmanager` returns."""
_GENERATOR_OR_ASYNC: Final = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


def check_hooks(callback: object) -> None:
    """Check a callback's hooks when it is added, so that a mistake shows in second 1 and not after the first epoch.

    Unknown methods called ``on_…`` are logged once and ignored, so that callbacks written for older or newer versions
    still run.

    Raises:
        AsyncHookError: A hook, or `Callback.close`, is ``async def``.
        HookSignatureError: A hook cannot take its event's arguments.
        MisspeltHookError: A method's name is nearly that of a hook.
        NotACallbackError: It has no hook at all: a spec, a class, a plain function.
    """
    _check_instance(callback)
    names = [each for each in dir(callback) if each.startswith("on")]
    if not isinstance(callback, Callback) and not any(callable(get_attribute(callback, each)) for each in names):
        raise _no_hook(callback)
    events = {event.hook: event for event in declared_events().values()}
    owner = type(callback).__name__
    if isinstance(callback, Callback) and not _is_inherited_from_foreign_class(callback, "close"):
        fix = "write `def close(self)`; what must be awaited belongs into a task: self.spawn(...) in a hook"
        _check_sync(owner, "close", callback.close, fix)
    for hook in sorted(names):
        method = get_attribute(callback, hook)
        event = events.get(hook)
        if event is not None:
            error = _hook_error(callback, method, event)
            if error is not None and not is_newer(event):
                raise error
            if error is not None:
                log().warning("callback.hook_not_called", callback=owner, hook=hook, why=error.what, fix=error.fix)
            continue
        if not callable(method):
            continue
        closest = _closest_hook(hook, events)
        is_mistake = closest is not None and not is_newer(events[closest])
        if is_mistake and not _is_inherited_from_foreign_class(callback, hook):
            raise MisspeltHookError(
                f"{owner}.{hook} is not a hook, so it would never be called",
                fix=f'did you mean "{closest}"? If it is not meant as a hook, choose a name that is further from it',
            )
        if hook.startswith("on_"):
            suggestion = {} if closest is None else {"nearly": closest}
            log().warning("callback.unknown_hook", callback=owner, hook=hook, **suggestion, known=", ".join(events))


def _disabled_error(callback: object, hook: str) -> HookError | None:
    """Return the error of a hook that cannot be called, unless it is None: that disables an inherited one."""
    cause = None
    try:
        value = getattr(callback, hook)
        why = f"it is a {type(value).__name__}"
    except Exception as error:  # a property of the callback
        value, cause = callback, error
        why = f"reading it raised {type(error).__name__}: {error}"
    if value is None:
        return None
    error = HookSignatureError(
        f"{type(callback).__name__}.{hook} is not a method, so it would never be called",
        why=why,
        fix=f"write `def {hook}(self, ...)`; None disables an inherited hook",
    )
    error.__cause__ = cause
    return error


def _check_sync(owner: str, hook: str, method: Callable[..., object], fix: str) -> None:
    if inspect.isgeneratorfunction(method):
        raise AsyncHookError(
            f"{owner}.{hook} has a `yield` in it, so calling it would run none of its lines",
            why="a function with a `yield` is a generator: it runs only when iterated over, and nothing does that",
            fix="take the `yield` out, or move it into a function that the hook calls",
        )
    if inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method):
        raise AsyncHookError(
            f"{owner}.{hook} is async, but hooks are sync",
            why="the loop never waits for a callback, so nothing would await it",
            fix=fix,
        )


def _hook_error(callback: object, method: Any, event: type[Event]) -> HookError | None:
    """Return the error of an attribute that has the name of the event's hook and cannot be called as such."""
    owner, hook = type(callback).__name__, event.hook
    if not callable(method):
        return _disabled_error(callback, hook) if isinstance(callback, Callback) else None
    if getattr(method, "__func__", None) is getattr(Callback, hook, ...):
        return None  # the inherited no-op
    fix = f"write `def {hook}(...)` and start the async part inside it: self.spawn(coroutine_function, *args)"
    try:
        _check_sync(owner, hook, method, fix)
    except AsyncHookError as error:
        return error
    positional = [name for name in event.__struct_fields__ if name not in event.keywords]
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):
        return None  # a callable written in C may have no signature
    try:
        signature.bind(*(_PLACEHOLDER for _ in positional), **dict.fromkeys(event.keywords, _PLACEHOLDER))
    except TypeError as error:
        keyword_arguments = [
            f"{field.name}=..." for field in msgspec.structs.fields(event) if field.name in event.keywords
        ]
        arguments = ", ".join([*positional, *(["*", *keyword_arguments] if keyword_arguments else [])])
        return HookSignatureError(
            f"{owner}.{hook}{signature} cannot be called with the event's arguments",
            why=str(error),
            fix=f"write `def {hook}(self, {arguments})`; the names of positional arguments are free, *args works too",
        )
    return None


def _is_inherited_from_foreign_class(callback: object, method: str) -> bool:
    """Return whether a foreign base class defines the method, as in a class that serves two trainers."""
    defining_class = next((each for each in type(callback).__mro__ if method in vars(each)), None)
    return defining_class not in {None, type(callback)} and not issubclass(defining_class or object, Callback)


def _closest_hook(name: str, hooks: Iterable[str]) -> str | None:
    """Return the hook that ``name`` was probably meant to be, if any."""
    hook_by_plain_name = {hook.replace("_", ""): hook for hook in hooks}
    plain_name = name.lower().replace("_", "").replace("begin", "start")
    if plain_name in hook_by_plain_name:
        return hook_by_plain_name[plain_name]
    return closest_word(name, hook_by_plain_name.values(), min_similarity=0.85) if name.startswith("on_") else None
