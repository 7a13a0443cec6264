"""Encode steps, and parts of their rows, with byte templates: what does not change from step to step is encoded once.

    {"stream", "seq", "time", "run", "rank", "event": {"type", "state": {"step", …}, "step_idx",    the template
                                                       "batch",                                     usually a constant
                                                       "metrics"}, "replaced"}                      encoded each time

In the first part only four numbers change while the other fields of the state stay the same, for a `LoopState` as for
a host's own state. A template is cut out of the output of the general encoder, so it cannot differ from that, except
that its numbers always have the widest encoding. A state that changes with every step is left to the general encoder.
"""

import functools
import struct
from collections.abc import Callable
from pathlib import PurePath
from types import SimpleNamespace
from typing import Any, Final, NamedTuple, cast

import msgspec

from evsys_bus.codec.event_fields import Reasons, copy_handle, copy_row, log_replaced
from evsys_bus.codec.redact import Redaction, redact
from evsys_bus.codec.scalars import MAX_ITEMS, NUMBERS, SCALARS, NeedsNormalizing, are_known_keys
from evsys_bus.codec.wire_types import ABSENT, CONTAINERS, custom_field_names, custom_field_value, is_pinned_path
from evsys_bus.context import DetachedLoopState, LoopState, TrainingBatch
from evsys_bus.events import Metrics, StepEnd, event_tag


class StateMatcher(NamedTuple):
    """The values of a state that must stay the same for a template to fit."""

    build_test: Callable[[Any], Callable[[Any], bool]]
    """Given ``expected``, returns the function that tests whether a state still has these values."""
    expected: tuple[Any, ...]
    custom_fields: tuple[str, ...] = ()
    """The custom fields that are encoded; their values may change."""
    excluded_fields: tuple[str, ...] = ()
    """The custom fields with texts and containers that are not encoded, because of their size or content."""


def matcher_for(state: Any) -> StateMatcher | None:
    """Return the values of a state that must stay the same; None if they cannot be compared, such as mutable values.

    Custom fields may change; of live objects only the type is compared.
    """
    if state is None:
        return NO_STATE
    kind: Any = type(state)  # pyright: ignore[reportUnknownVariableType] - untyped
    if issubclass(kind, dict | DetachedLoopState):
        return None
    tests = _TestBuilder()
    tests.add("type(state) is {}", kind)
    ctx = getattr(state, "ctx", None)
    if ctx is None:
        tests.add("getattr(state, 'ctx', None) is {}", None)
    if not tests.add_fields(state, "state", _compared_fields(state)) or (
        ctx is not None and not tests.add_fields(ctx, "state.ctx", _COMPARED_CONTEXT_FIELDS)
    ):
        return None
    custom_fields, excluded_fields = ([], []) if kind is LoopState else _test_custom_fields(state, tests)
    return StateMatcher(
        _compile(tuple(tests.tests)), tuple(tests.expected), tuple(custom_fields), tuple(excluded_fields)
    )


_COMPARED_FIELDS: Final = ("num_steps", "output_dir", "stop_requested", "stop_reason", "error")
_COMPARED_CONTEXT_FIELDS: Final = ("run_key", "output_dir")


def _compared_fields(state: object) -> tuple[str, ...]:
    """Return the fields that must stay the same; a state without a directory may name its run itself."""
    return _COMPARED_FIELDS if hasattr(state, "output_dir") else (*_COMPARED_FIELDS, "run_key")


class _TestBuilder:
    """Collects the tests of a state and the expected values."""

    def __init__(self) -> None:
        self.tests: list[str] = []
        self.expected: list[object] = []

    def add(self, test: str, value: object) -> None:
        """Add a test, in which ``{}`` is a placeholder for the value."""
        self.tests.append(test.replace("{}", f"v{len(self.expected)}"))
        self.expected.append(value)

    def add_fields(self, source: object, expression: str, names: tuple[str, ...]) -> bool:
        """Add tests that these attributes stay the same; False if one of them is mutable."""
        for name in names:
            value = getattr(source, name, ABSENT)
            attribute = f"{expression}.{name}"
            if name == "output_dir" and not (_is_absolute(value) or is_pinned_path(value)):
                return False
            if isinstance(value, PurePath):
                self.add(f"({attribute} is {{}} or str({attribute}) == str({{}}))", value)
            elif type(value) in SCALARS:
                self.add(f"({attribute} is {{}} or (type({attribute}) is type({{}}) and {attribute} == {{}}))", value)
            elif value is not ABSENT:
                return False
        return True


def _test_custom_fields(state: object, tests: _TestBuilder) -> tuple[list[str], list[str]]:
    """Return the encoded custom fields and the excluded ones; add tests of the type for live objects."""
    custom_fields: list[str] = []
    excluded_fields: list[str] = []
    instance = getattr(state, "__dict__", None)
    if type(instance) is dict:
        tests.add("len(state.__dict__) == {}", len(cast("dict[Any, Any]", instance)))
    for name in custom_field_names(state):
        value = getattr(state, name, ABSENT)
        kind: Any = type(value)  # pyright: ignore[reportUnknownVariableType] - untyped
        if custom_field_value(value, name) is not ABSENT:
            custom_fields.append(name)
        elif kind in CONTAINERS or kind in SCALARS:
            excluded_fields.append(name)
        else:
            tests.add(f"type(getattr(state, {name!r}, ABSENT)) is {{}}", kind)
    return custom_fields, excluded_fields


def _is_absolute(path: Any) -> bool:
    return path is ABSENT or (isinstance(path, PurePath) and path.is_absolute()) or str(path).startswith("/")


def read_custom_fields(state: object, matcher: StateMatcher) -> dict[str, Any]:
    """Copy the custom fields of a state that are encoded.

    Raises:
        NeedsNormalizing: They are not the same fields as when the template was built.
        AttributeError: A field is missing.
    """
    values: dict[str, Any] = {}
    for name in matcher.custom_fields:
        value = getattr(state, name)
        kind: Any = type(value)  # pyright: ignore[reportUnknownVariableType] - untyped
        if kind is not float and kind is not bool and value is not None:
            value = custom_field_value(value, name)
            if value is ABSENT:
                raise NeedsNormalizing
        values[name] = value
    for name in matcher.excluded_fields:
        if custom_field_value(getattr(state, name), name) is not ABSENT:
            raise NeedsNormalizing
    return values


def placeholder_state(state: Any, matcher: StateMatcher, step: int, custom_value: int) -> SimpleNamespace:
    """Return an object with the values of a state, without live objects, and placeholders for what may change."""
    parts: dict[str, Any] = dict.fromkeys(() if type(state) is LoopState else custom_field_names(state), _LIVE_OBJECT)
    parts |= dict.fromkeys(matcher.custom_fields, custom_value)
    for name in _compared_fields(state):
        value = getattr(state, name, ABSENT)
        if value is not ABSENT:
            parts[name] = value
    ctx = getattr(state, "ctx", None)
    if ctx is not None:
        parts["ctx"] = SimpleNamespace(
            **{name: getattr(ctx, name) for name in _COMPARED_CONTEXT_FIELDS if hasattr(ctx, name)}
        )
    return SimpleNamespace(step=step, **parts)


_LIVE_OBJECT: Final = object()


def _is_none(_: object) -> Callable[[object], bool]:
    return lambda state: state is None


NO_STATE: Final = StateMatcher(_is_none, ())
"""For steps that are published without a state."""


@functools.lru_cache(maxsize=256)
def _compile(tests: tuple[str, ...]) -> Callable[[Any], Callable[[Any], bool]]:
    # Generated code, like the constructors of dataclasses: a loop over the names would take three times as long.
    names = ", ".join(f"v{number}" for number in range(len(tests)))
    source = f"""def test(held):
    ({names},) = held
    def fits(state):
        try:
            return {" and ".join(tests)}
        except AttributeError:
            return False
    return fits
"""
    namespace: dict[str, Any] = {"ABSENT": ABSENT}
    exec(source, namespace)  # noqa: S102 - made of identifiers
    return namespace["test"]


EncodeStep = Callable[[Any, int, float], bytes]
"""Encodes an event with its sequence number and time."""

MAX_TEMPLATES: Final = 64
"""Templates in memory; runs that publish alternately have one each."""


class RunContextNeeded(Exception):  # noqa: N818 - control flow, not an error
    """This event is the first recorded one of its run, and has to include the whole context of the run."""


class _StepTemplate(NamedTuple):
    """The bytes around the numbers, the functions that join them, and the states that the template fits."""

    matcher: StateMatcher
    matches: Callable[[Any], bool]
    """Whether the template fits a state."""
    fill: Callable[..., bytes]
    a: bytes
    b: bytes
    c: bytes
    d: bytes
    fill_index: Callable[[bytes, int, bytes], bytes] | None = None
    """Writes the step index after the custom fields of the state; without custom fields, ``fill`` writes it."""
    e: bytes = b""


_pack_into: Final = msgspec.msgpack.Encoder().encode_into
# Placeholders that no real step contains, each with the widest msgpack encoding.
_SEQ_PLACEHOLDER: Final = 0xFEED_0000_0000_0001
_TIME_PLACEHOLDER: Final = -1.2345678901234567e-300
_STEP_PLACEHOLDER: Final = -0x7EED_0000_0000_0002
_INDEX_PLACEHOLDER: Final = -0x7EED_0000_0000_0003
_CUSTOM_PLACEHOLDER: Final = -0x7EED_0000_0000_0004
_PLACEHOLDERS: Final = (
    struct.pack(">Q", _SEQ_PLACEHOLDER),
    struct.pack(">d", _TIME_PLACEHOLDER),
    struct.pack(">q", _STEP_PLACEHOLDER),
    struct.pack(">q", _INDEX_PLACEHOLDER),
)
_METRICS_KEY: Final = b"\xa7metrics"
_NO_BATCH: Final = b"\xa5batch\xc0" + _METRICS_KEY
_EMPTY_BATCH: Final = b"\xa5batch\x80\xa7metrics"
_BATCH_BYTES: Final = len(_NO_BATCH)
_SIX_ENTRIES: Final = b"\x86"
_SEVEN_ENTRIES: Final = b"\x87"
_REPLACED_KEY: Final = b"\xa8replaced"


class LastPart:
    """The last part of a row that was encoded and its metrics as bytes; a row of one part is made of these.

    Shared by the encoders of a stream, which are called one at a time.
    """

    __slots__ = ("packed", "row")

    def __init__(self) -> None:
        self.row: dict[str, Any] | None = None
        """Floats only. None if it is unknown."""
        self.packed: Final = bytearray()


def step_encoder(  # noqa: C901, PLR0915 - the returned function must be a single frame, for speed
    encode_any: EncodeStep,
    max_bytes: int,
    needs_context: Callable[[object], bool] | None = None,
    redaction: Redaction = Redaction(),  # noqa: B008 - it is frozen
    event_type: type[StepEnd | Metrics] = StepEnd,
    last_part: LastPart | None = None,
) -> EncodeStep:
    """Return a function that encodes the steps of one stream, or the parts of their rows, one at a time.

    Args:
        encode_any: The general encoder, for building templates and for steps that fit none.
        max_bytes: A longer record may hold values that have to be cut, so it goes to the general encoder.
        needs_context: Whether the context of a state's run is not recorded yet; then `RunContextNeeded` is raised.
        redaction: See `evsys_bus.codec.encode`.
        event_type: What is encoded.
        last_part: Given to the encoders of rows and of parts of one stream.
    """
    templates = _StepTemplates(encode_any, event_type)
    has_batch = event_type is StepEnd
    no_batch = _NO_BATCH if has_batch else _METRICS_KEY
    tag = event_tag(event_type)
    last_part = LastPart() if last_part is None else last_part
    packed_row = bytearray() if has_batch else last_part.packed
    template: _StepTemplate | None = None
    matches: Callable[[Any], bool] = _matches_nothing
    rows_to_skip = 0  # the next rows that are not tried as rows of floats

    def encode_step(event: Any, seq: int, time: float) -> bytes:  # noqa: C901, PLR0912, PLR0915 - calls are slow
        nonlocal template, matches, rows_to_skip
        try:
            state: Any = event.state  # a program may have published None, here and in the next line
            batch: Any = event.batch if has_batch else None
            index: Any = event.step_idx
            metrics: dict[str, Any] = event.metrics
            if not matches(state):
                template, matches = None, _matches_nothing  # reset first, in case of a Ctrl-C in between
                found = templates.recent.get(id(state))  # runs that publish alternately
                if found is None or not found.matches(state):
                    if needs_context is not None and needs_context(state):
                        raise RunContextNeeded  # noqa: TRY301 - calls are slow
                    found = templates.find(state)
                template = found
                if found is not None:
                    matches = found.matches
            step = 0 if state is None else state.step
            if template is None or type(index) is not int or type(step) is bool:
                return encode_any(event, seq, time)
            reasons: Reasons | None = None
            # Nearly all rows of metrics hold only floats, which one call of sum confirms.
            row: Any = None
            if rows_to_skip:
                rows_to_skip -= 1
            elif type(metrics) is dict and len(metrics) <= MAX_ITEMS:
                row = last_part.row
                if row is None or metrics != row or not has_batch:  # 1 may be recorded as 1.0
                    row = {**metrics}
                    try:
                        total = sum(row.values())
                    except TypeError:
                        total = None
                    if type(total) is not float or not are_known_keys(row):
                        row, rows_to_skip = None, _RETRY_EVERY
            if row is None:
                row = copy_row(metrics, reasons := {}, "metrics")
                if type(row) is not dict:
                    return encode_any(event, seq, time)
                kinds = map(type, row.values())  # pyright: ignore[reportUnknownArgumentType] - untyped
                if not NUMBERS.issuperset(kinds):  # its keys are no credentials
                    reasons |= redact(row, redaction, "metrics")
            matcher, _, fill, a, b, c, d, fill_index, e = template
            batch_bytes, tail, tail_has_batch = no_batch, packed_row, False
            if not has_batch:
                last_part.row = None
                _pack_into(row, packed_row)
                last_part.row = row if reasons is None else None
            elif batch is not None and not (
                type(batch) is TrainingBatch and batch.loss_fn is batch.loss_fn_config is None and not batch.metrics
            ):
                tail, tail_has_batch = _encode_tail(batch, row, reasons := reasons or {}, redaction), True
            else:
                batch_bytes = no_batch if batch is None else _EMPTY_BATCH
                if row is last_part.row:
                    tail = last_part.packed
                else:
                    _pack_into(row, packed_row)
            if reasons:
                log_replaced(tag, reasons)
                a = _SEVEN_ENTRIES + a[1:]
                tail = tail + _REPLACED_KEY
                _pack_into(reasons, tail, len(tail))
            if fill_index is None:
                if matcher[3]:  # excluded fields must still be excluded
                    read_custom_fields(state, matcher)
                data = fill(a, seq, b, time, c, step, d, index, batch_bytes)
            else:
                fields = bytearray()
                _pack_into(read_custom_fields(state, matcher), fields)
                data = fill(a, seq, b, time, c, step, d) + fields + fill_index(e, index, batch_bytes)
            data = (data[:-_BATCH_BYTES] if tail_has_batch else data) + tail
        except (KeyboardInterrupt, SystemExit, RunContextNeeded):
            raise
        except BaseException:  # the general encoder handles any value
            return encode_any(event, seq, time)
        return data if len(data) <= max_bytes else encode_any(event, seq, time)

    return encode_step


def _encode_tail(batch: object, row: Any, reasons: Reasons, redaction: Redaction) -> bytearray:
    """Encode the batch and the metrics."""
    tail = bytearray()
    plain = copy_handle(batch, TrainingBatch, "batch", reasons)
    if plain:
        reasons |= redact(plain, redaction, "batch")
    _pack_into({"batch": plain, "metrics": row}, tail)
    del tail[0]  # the map header
    return tail


def _matches_nothing(_: object) -> bool:
    return False


class _StepTemplates:
    """Templates, one for each combination of a run's horizon, directory and key and the other fields of its state."""

    def __init__(self, encode_any: EncodeStep, event_type: type[StepEnd | Metrics]) -> None:
        self.recent: dict[int, _StepTemplate] = {}
        """By ``id`` of the state; another state may have the same id by now, so check that the template fits."""
        self._encode_any = encode_any
        self._event_type = event_type
        self._by_key: dict[object, _StepTemplate | None] = {}
        self._seen: set[object] = set()
        self._misses: dict[type, int] = {}

    def find(self, state: Any) -> _StepTemplate | None:
        """Return the template for a state; None if there is none, or none yet.

        A template is built at the second request. A type of state that cannot be compared is tried only now and then.
        """
        kind: Any = type(state)  # pyright: ignore[reportUnknownVariableType] - untyped
        misses = self._misses.get(kind, 0)
        if misses >= _MAX_MISSES and misses % _RETRY_EVERY:
            self._misses[kind] = misses + 1
            return None
        matcher = matcher_for(state)
        template = None if matcher is None else self._find_or_build(matcher, state)
        self._misses[kind] = misses + 1 if matcher is None else 0
        if template is not None:
            if len(self.recent) >= MAX_TEMPLATES:
                self.recent.clear()
            self.recent[id(state)] = template
        return template

    def _find_or_build(self, matcher: StateMatcher, state: object) -> _StepTemplate | None:
        key = (matcher, tuple(map(type, matcher.expected)))  # 1 is not True
        if key in self._by_key:
            return self._by_key[key]
        if key not in self._seen:
            if len(self._seen) >= MAX_TEMPLATES:
                self._seen.clear()
            self._seen.add(key)
            return None
        if len(self._by_key) >= MAX_TEMPLATES:
            self._by_key.clear()
        template = self._by_key[key] = self._build(state, matcher)
        return template

    def _build(self, state: Any, matcher: StateMatcher) -> _StepTemplate | None:
        placeholder: Any = (
            None if state is None else placeholder_state(state, matcher, _STEP_PLACEHOLDER, _CUSTOM_PLACEHOLDER)
        )  # it has the attributes of a state
        row_key = _NO_BATCH if self._event_type is StepEnd else _METRICS_KEY
        data = self._encode_any(
            StepEnd(placeholder, _INDEX_PLACEHOLDER, cast("TrainingBatch", None), {})
            if self._event_type is StepEnd
            else Metrics(placeholder, _INDEX_PLACEHOLDER, {}),
            _SEQ_PLACEHOLDER,
            _TIME_PLACEHOLDER,
        )
        empty_row, key_bytes = row_key + b"\x80", len(row_key)
        placeholders = [*_PLACEHOLDERS] if state is not None else [*_PLACEHOLDERS[:2], _PLACEHOLDERS[3]]
        if matcher.custom_fields:
            placeholders.insert(3, msgspec.msgpack.encode(dict.fromkeys(matcher.custom_fields, _CUSTOM_PLACEHOLDER)))
        parts: list[bytes] = []
        rest = data.removesuffix(empty_row)
        for marker in placeholders:
            if rest.count(marker) != 1:
                return None
            part, _, rest = rest.partition(marker)
            parts.append(part)
        if rest or not data.startswith(_SIX_ENTRIES) or not data.endswith(empty_row):
            return None
        sizes = [*map(len, parts)]
        if state is None:
            a, b, c = parts
            return _StepTemplate(
                matcher, matcher.build_test(matcher.expected), _pack_without_step(sizes, key_bytes), a, b, c, b""
            )
        if not matcher.custom_fields:
            a, b, c, d = parts
            return _StepTemplate(
                matcher,
                matcher.build_test(matcher.expected),
                struct.Struct(">{}sQ{}sd{}sq{}sq{}s".format(*sizes, key_bytes)).pack,
                a,
                b,
                c,
                d,
            )
        a, b, c, d, e = parts
        fill_index = struct.Struct(f">{len(e)}sq{key_bytes}s").pack
        return _StepTemplate(
            matcher,
            matcher.build_test(matcher.expected),
            struct.Struct(">{}sQ{}sd{}sq{}s".format(*sizes[:4])).pack,
            a,
            b,
            c,
            d,
            fill_index,
            e,
        )


def _pack_without_step(sizes: list[int], key_bytes: int) -> Callable[..., bytes]:
    pack = struct.Struct(">{}sQ{}sd{}sq{}s".format(*sizes, key_bytes)).pack

    def fill(a: bytes, seq: int, b: bytes, time: float, c: bytes, _: int, __: bytes, index: int, last: bytes) -> bytes:
        return pack(a, seq, b, time, c, index, last)

    return fill


_MAX_MISSES: Final = 4
_RETRY_EVERY: Final = 64
