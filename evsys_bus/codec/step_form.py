"""The record of a step as a form: what stays from step to step is encoded once, and a step fills in its numbers.

Of the bytes of a StepEnd nearly all are the same each time: names, stream, run, the state's folder and horizon. What is
left to encode are four numbers and the metrics:

    …, "seq": 17, "time": 1.7e9, …, "state": {"step": 16, …}, "step_idx": 16, "batch": {}, "metrics": {…}

A form is cut out of what the ordinary encoder makes of such a step, so it cannot differ from that; only its numbers are
as wide as any may be. A step with anything besides (a stop, an error, a batch with metrics of its own) goes the
ordinary way.
"""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from evsys_bus.codec.flat import are_keys, flat
from evsys_bus.context import LogContext, LoopState, TrainingBatch
from evsys_bus.events import StepEnd

EncodeStep = Callable[[StepEnd, int, float], bytes]
"""Given the event, its sequence and its time."""

MOST_FORMS: Final = 64
"""Runs that publish by turns have one each."""

MOST_METRICS: Final = 1_000
"""More take so much room that there may not be enough: the ordinary way stands that, and this one does not."""

_pack_into: Final = msgspec.msgpack.Encoder().encode_into
# Numbers as no step has them, each as wide as msgpack has any.
_SEQUENCE: Final = 0xFEED_0000_0000_0001
_TIME: Final = -1.2345678901234567e-300
_STEP: Final = -0x7EED_0000_0000_0002
_INDEX: Final = -0x7EED_0000_0000_0003
_PLACES: Final = (
    struct.pack(">Q", _SEQUENCE),
    struct.pack(">d", _TIME),
    struct.pack(">q", _STEP),
    struct.pack(">q", _INDEX),
)
_NO_METRICS: Final = b"\x80"
_NO_CONTEXT: Final = object()


class _Form(NamedTuple):
    """What stands around the numbers, and what puts them together."""

    fill: Callable[..., bytes]
    a: bytes
    b: bytes
    c: bytes
    d: bytes
    e: bytes


def step_encoder(ordinary: EncodeStep, most_bytes: int) -> EncodeStep:
    """What encodes the steps of one stream, one at a time.

    Args:
        ordinary: Encodes any; asked for each form, and for the steps that fit none.
        most_bytes: What is longer may hold something that has to be cut: that is for the ordinary way.
    """
    forms = _Forms(ordinary)
    packed = bytearray()
    # Those of the last step, and its form. Compared by identity: it is the run's state that holds them, all along.
    num_steps: object = None
    output_dir: object = None
    run_key: object = None
    loss_fn: object = None
    form: _Form | None = None

    def encode_step(event: StepEnd, seq: int, time: float) -> bytes:
        nonlocal num_steps, output_dir, run_key, loss_fn, form
        try:
            state, batch, index = event.state, event.batch, event.step_idx
            step, ctx = state.step, state.ctx
            if (
                type(state) is not LoopState
                or type(batch) is not TrainingBatch
                or type(step) is not int
                or type(index) is not int
                or state.stop_requested is not False
                or state.stop_reason is not None
                or state.error is not None
                or batch.loss_fn_config is not None
                or batch.metrics
                or len(event.metrics) > MOST_METRICS
            ):
                return ordinary(event, seq, time)
            run = _NO_CONTEXT if ctx is None else ctx.run_key
            if (
                state.output_dir is not output_dir
                or state.num_steps is not num_steps
                or run is not run_key
                or batch.loss_fn is not loss_fn
            ):
                form = None  # first, in case of a Ctrl-C in between
                num_steps, output_dir, run_key, loss_fn = key = (state.num_steps, state.output_dir, run, batch.loss_fn)
                form = forms.of(key)
            if form is None:
                return ordinary(event, seq, time)
            metrics = {**event.metrics}
            try:
                total = sum(metrics.values())
            except TypeError:
                total = None
            if type(total) is not float or not are_keys(metrics):
                metrics = flat(metrics)
            fill, a, b, c, d, e = form
            _pack_into(metrics, packed)
            data = fill(a, seq, b, time, c, step, d, index, e) + packed
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # the ordinary way tells what it is
            return ordinary(event, seq, time)
        return data if len(data) <= most_bytes else ordinary(event, seq, time)

    return encode_step


class _Forms:
    """One for each horizon, folder, run and loss."""

    def __init__(self, ordinary: EncodeStep) -> None:
        self._ordinary = ordinary
        self._known: dict[object, _Form | None] = {}

    def of(self, key: tuple[object, object, object, object]) -> _Form | None:
        """The form; None where there is none for such a step."""
        typed: tuple[object, ...] = (type(key[0]), *key)  # 1 is not True
        if typed not in self._known:
            if len(self._known) == MOST_FORMS:
                self._known.clear()
            self._known[typed] = self._cut(*key)
        return self._known[typed]

    def _cut(self, num_steps: object, output_dir: object, run_key: object, loss_fn: object) -> _Form | None:
        ctx: LogContext | None = None
        # What is of another type may be another value tomorrow.
        if type(num_steps) is not int or not isinstance(output_dir, Path):
            return None
        if loss_fn is not None and type(loss_fn) is not str:
            return None
        if run_key is not _NO_CONTEXT:
            if run_key is not None and type(run_key) is not str:
                return None
            ctx = LogContext(output_dir.parent, run_key=run_key)
        state = LoopState(_STEP, num_steps, output_dir, ctx=ctx)
        data = self._ordinary(StepEnd(state, _INDEX, TrainingBatch(loss_fn=loss_fn), {}), _SEQUENCE, _TIME)
        parts: list[bytes] = []
        for place in _PLACES:
            if data.count(place) != 1 or not data.endswith(_NO_METRICS):
                return None
            part, _, data = data.partition(place)
            parts.append(part)
        parts.append(data.removesuffix(_NO_METRICS))
        fill = struct.Struct(">{}sQ{}sd{}sq{}sq{}s".format(*map(len, parts))).pack
        return _Form(fill, *parts)
