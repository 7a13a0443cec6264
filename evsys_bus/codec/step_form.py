"""Encode steps with byte templates: what does not change from step to step is encoded once.

    {"stream", "seq", "time", "run", "rank", "event": {"type", "state": {"step", …}, "step_idx",    the template
                                                       "batch",                                     usually a constant
                                                       "metrics"}, "replaced"}                      encoded each time

In the first part only four numbers change while the other fields of the state stay the same, for a `LoopState` as for
a host's own state. A template is cut out of the output of the general encoder, so it cannot differ from that, except
that its numbers always have the widest encoding. A state that changes with every step goes through the general encoder.
"""

import struct
from collections.abc import Callable
from typing import Any, Final, NamedTuple, cast

import msgspec

from evsys_bus.codec.fields import Reasons, copy_handle, copy_row
from evsys_bus.codec.flat import MOST_ITEMS, are_keys
from evsys_bus.codec.step_watch import Watch, own_fields, stand_in_for, watched
from evsys_bus.context import TrainingBatch
from evsys_bus.events import StepEnd

EncodeStep = Callable[[StepEnd, int, float], bytes]
"""Encodes an event with its sequence number and time."""

MOST_FORMS: Final = 64
"""Templates in memory; runs that publish alternately have one each."""


class IntroductionNeeded(Exception):  # noqa: N818 - control flow, not an error
    """This event is the first recorded one of its run, and has to include the whole context of the run."""


class _Form(NamedTuple):
    """The bytes around the numbers, the functions that join them, and the states that the template fits."""

    watch: Watch
    fits: Callable[[Any], bool]
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
_SEQUENCE: Final = 0xFEED_0000_0000_0001
_TIME: Final = -1.2345678901234567e-300
_STEP: Final = -0x7EED_0000_0000_0002
_INDEX: Final = -0x7EED_0000_0000_0003
_OWN: Final = -0x7EED_0000_0000_0004
_PLACES: Final = (
    struct.pack(">Q", _SEQUENCE),
    struct.pack(">d", _TIME),
    struct.pack(">q", _STEP),
    struct.pack(">q", _INDEX),
)
_NO_BATCH: Final = b"\xa5batch\xc0\xa7metrics"
_PLAIN_BATCH: Final = b"\xa5batch\x80\xa7metrics"
_BETWEEN: Final = len(_NO_BATCH)
_NOTHING: Final = _NO_BATCH + b"\x80"
_SIX_ENTRIES: Final = b"\x86"
_SEVEN_ENTRIES: Final = b"\x87"
_REPLACED: Final = b"\xa8replaced"


def step_encoder(  # noqa: C901, PLR0915 - the returned function must be a single frame, for speed
    ordinary: EncodeStep, most_bytes: int, introduces: Callable[[object], bool] | None = None
) -> EncodeStep:
    """Return a function that encodes the steps of one stream, one at a time.

    Args:
        ordinary: The general encoder, for building templates and for steps that fit none.
        most_bytes: A longer record may hold values that have to be cut, so it goes to the general encoder.
        introduces: Whether the context of a state's run is not recorded yet; then `IntroductionNeeded` is raised.
    """
    forms = _Forms(ordinary)
    packed = bytearray()
    form: _Form | None = None
    fits: Callable[[Any], bool] = _fits_none  # form.fits
    mixed = 0  # the next rows that are not tried as rows of floats

    def encode_step(event: StepEnd, seq: int, time: float) -> bytes:  # noqa: C901, PLR0912, PLR0915 - calls are slow
        nonlocal form, fits, mixed
        try:
            state: Any = event.state  # a program may have published None, here and in the next line
            batch: Any = event.batch
            index, metrics = event.step_idx, event.metrics
            if not fits(state):
                form, fits = None, _fits_none  # reset first, in case of a Ctrl-C in between
                found = forms.recent.get(id(state))  # runs that publish alternately
                if found is None or not found.fits(state):
                    if introduces is not None and introduces(state):
                        raise IntroductionNeeded  # noqa: TRY301 - calls are slow
                    found = forms.of(state)
                form = found
                if found is not None:
                    fits = found.fits
            step = 0 if state is None else state.step
            if form is None or type(index) is not int or type(step) is bool:
                return ordinary(event, seq, time)
            reasons: Reasons | None = None
            # Nearly all rows of metrics hold only floats, which one call of sum confirms.
            own: Any = None
            if mixed:
                mixed -= 1
            elif type(metrics) is dict and len(metrics) <= MOST_ITEMS:
                own = {**metrics}
                try:
                    total = sum(own.values())
                except TypeError:
                    total = None
                if type(total) is not float or not are_keys(own):
                    own, mixed = None, _LOOKS_EVERY
            if own is None:
                own = copy_row(metrics, reasons := {}, "metrics")
            watch, _, fill, a, b, c, d, fill_index, e = form
            between, tail, whole = _NO_BATCH, packed, False
            if batch is None:
                _pack_into(own, packed)
            elif type(batch) is TrainingBatch and batch.loss_fn is batch.loss_fn_config is None and not batch.metrics:
                between = _PLAIN_BATCH
                _pack_into(own, packed)
            else:
                tail, whole = _tail(batch, own, reasons := reasons or {}), True
            if reasons:
                a = _SEVEN_ENTRIES + a[1:]
                tail = tail + _REPLACED
                _pack_into(reasons, tail, len(tail))
            if fill_index is None:
                if watch[3]:  # excluded fields must still be excluded
                    own_fields(state, watch)
                data = fill(a, seq, b, time, c, step, d, index, between)
            else:
                fields = bytearray()
                _pack_into(own_fields(state, watch), fields)
                data = fill(a, seq, b, time, c, step, d) + fields + fill_index(e, index, between)
            data = (data[:-_BETWEEN] if whole else data) + tail
        except (KeyboardInterrupt, SystemExit, IntroductionNeeded):
            raise
        except BaseException:  # the general encoder handles any value
            return ordinary(event, seq, time)
        return data if len(data) <= most_bytes else ordinary(event, seq, time)

    return encode_step


def _tail(batch: object, own: Any, reasons: Reasons) -> bytearray:
    """Encode the batch and the metrics."""
    tail = bytearray()
    _pack_into({"batch": copy_handle(batch, TrainingBatch, "batch", reasons), "metrics": own}, tail)
    del tail[0]  # the map header
    return tail


def _fits_none(_: object) -> bool:
    return False


class _Forms:
    """Templates, one for each combination of a run's horizon, directory and key and the other fields of its state."""

    def __init__(self, ordinary: EncodeStep) -> None:
        self.recent: dict[int, _Form] = {}
        """By ``id`` of the state; another state may have the same id by now, so check that the template fits."""
        self._ordinary = ordinary
        self._known: dict[object, _Form | None] = {}
        self._seen: set[object] = set()
        self._misses: dict[type, int] = {}

    def of(self, state: Any) -> _Form | None:
        """Return the template for a state; None if there is none, or none yet.

        A template is built at the second request. A type of state that cannot be compared is tried only now and then.
        """
        kind: Any = type(state)  # pyright: ignore[reportUnknownVariableType] - untyped
        misses = self._misses.get(kind, 0)
        if misses >= _PATIENCE and misses % _LOOKS_EVERY:
            self._misses[kind] = misses + 1
            return None
        watch = watched(state)
        form = None if watch is None else self._of(watch, state)
        self._misses[kind] = misses + 1 if watch is None else 0
        if form is not None:
            if len(self.recent) >= MOST_FORMS:
                self.recent.clear()
            self.recent[id(state)] = form
        return form

    def _of(self, watch: Watch, state: object) -> _Form | None:
        key = (watch, tuple(map(type, watch.held)))  # 1 is not True
        if key in self._known:
            return self._known[key]
        if key not in self._seen:
            if len(self._seen) >= MOST_FORMS:
                self._seen.clear()
            self._seen.add(key)
            return None
        if len(self._known) >= MOST_FORMS:
            self._known.clear()
        form = self._known[key] = self._cut(state, watch)
        return form

    def _cut(self, state: Any, watch: Watch) -> _Form | None:
        stand_in: Any = (
            None if state is None else stand_in_for(state, watch, _STEP, _OWN)
        )  # it has the attributes of a state
        data = self._ordinary(StepEnd(stand_in, _INDEX, cast("TrainingBatch", None), {}), _SEQUENCE, _TIME)
        places = [*_PLACES] if state is not None else [*_PLACES[:2], _PLACES[3]]
        if watch.own:
            places.insert(3, msgspec.msgpack.encode(dict.fromkeys(watch.own, _OWN)))
        parts: list[bytes] = []
        rest = data.removesuffix(_NOTHING)
        for place in places:
            if rest.count(place) != 1:
                return None
            part, _, rest = rest.partition(place)
            parts.append(part)
        if rest or not data.startswith(_SIX_ENTRIES) or not data.endswith(_NOTHING):
            return None
        sizes = [*map(len, parts)]
        if state is None:
            a, b, c = parts
            return _Form(watch, watch.test(watch.held), _without_step(sizes), a, b, c, b"")
        if not watch.own:
            a, b, c, d = parts
            return _Form(
                watch,
                watch.test(watch.held),
                struct.Struct(">{}sQ{}sd{}sq{}sq{}s".format(*sizes, _BETWEEN)).pack,
                a,
                b,
                c,
                d,
            )
        a, b, c, d, e = parts
        fill_index = struct.Struct(f">{len(e)}sq{_BETWEEN}s").pack
        return _Form(
            watch,
            watch.test(watch.held),
            struct.Struct(">{}sQ{}sd{}sq{}s".format(*sizes[:4])).pack,
            a,
            b,
            c,
            d,
            fill_index,
            e,
        )


def _without_step(sizes: list[int]) -> Callable[..., bytes]:
    pack = struct.Struct(">{}sQ{}sd{}sq{}s".format(*sizes, _BETWEEN)).pack

    def fill(a: bytes, seq: int, b: bytes, time: float, c: bytes, _: int, __: bytes, index: int, last: bytes) -> bytes:
        return pack(a, seq, b, time, c, index, last)

    return fill


_PATIENCE: Final = 4
_LOOKS_EVERY: Final = 64
