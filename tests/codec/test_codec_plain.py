import argparse
import collections
import dataclasses
import datetime as dt
import decimal
import enum
import math
import re
import threading
import types
import zoneinfo
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import msgspec
import numpy as np
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evsys_bus import LogContext, LoopState
from evsys_bus.codec import to_builtins
from evsys_bus.codec.scalars import MAX_DEPTH, MAX_KEY_CHARS, MAX_REASONS, MAX_TEXT_CHARS
from support.foreign_values import Interrupt, Raising, RaisingAttributes, RaisingClass

PLAIN = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


class Tensor:
    """Has what torch's has; torch itself would take a minute to install."""

    def __init__(self, *values, dtype="torch.float32"):
        self.values, self.shape, self.dtype = values, (len(values),), dtype

    def item(self):
        (value,) = self.values
        return value

    def __float__(self):
        raise AssertionError("item() is the one way that waits for the device once")


class RaisingBaseException:
    def item(self):
        raise Interrupt

    def __repr__(self):
        raise Interrupt


class Endless:
    def item(self):
        return Endless()


class RaisingMapping(collections.abc.Mapping):
    def __getitem__(self, key):
        raise KeyError(key)

    def __len__(self):
        raise RuntimeError("no length")

    def __iter__(self):
        raise RuntimeError("no keys")


class Color(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


@dataclasses.dataclass
class Point:
    x: float
    y: "Point | None" = None


class Pair(NamedTuple):
    left: int
    right: int


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")
    lr: float
    where: Path = Path("/data")


class Settings(msgspec.Struct, rename="camel", tag=True):
    batch_size: int


class Optimizer:
    """As attrs marks its classes; it is not among the test dependencies."""

    __attrs_attrs__ = (types.SimpleNamespace(name="lr"),)

    def __init__(self, lr):
        self.lr = lr


class Stamp(dt.datetime):
    """A subclass, as pandas has one."""


def plain(value):
    """The copy of a value that can be carried as it is."""
    copy, replaced = to_builtins(value)
    assert replaced == {}
    msgspec.msgpack.encode(copy)
    return copy


@given(PLAIN)
def test_plain_data_comes_back_equal_with_nothing_replaced(value):
    assert plain(value) == value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float64(0.5), 0.5),
        (np.float32(0.5), 0.5),
        (np.int64(7), 7),
        (np.bool_(True), True),
        (np.str_("x"), "x"),
        (np.array(2.5), 2.5),
        (np.array([[3]]), 3),
        (np.array([]), []),
        (np.array([0.25, math.inf]), [0.25, math.inf]),
        (np.array([[1, 2], [3, 4]], dtype=np.int8), [[1, 2], [3, 4]]),
        (np.longdouble(1.5), 1.5),
        (np.datetime64("2024-05-01"), "2024-05-01"),
        (Tensor(0.25), 0.25),
        (Color.RED, "red"),
        (Level.HIGH, 3),
        (Path("/data/x"), "/data/x"),
        (PurePosixPath("a/b"), "a/b"),
        (Point(1.0, Point(2.0)), {"x": 1.0, "y": {"x": 2.0, "y": None}}),
        (Pair(1, 2), {"left": 1, "right": 2}),
        (Model(lr=0.1, seed=3), {"lr": 0.1, "where": "/data", "seed": 3}),
        (Settings(batch_size=8), {"type": "Settings", "batchSize": 8}),
        (Optimizer(0.1), {"lr": 0.1}),
        (types.SimpleNamespace(lr=0.1), {"lr": 0.1}),
        (argparse.Namespace(lr=0.1), {"lr": 0.1}),
        (types.MappingProxyType({"a": 1}), {"a": 1}),
        (collections.OrderedDict(a=1), {"a": 1}),
        (collections.deque([1, 2]), [1, 2]),
        (range(3), [0, 1, 2]),
        ((1, {2}), [1, [2]]),
        (frozenset({1}), [1]),
        ({"a": 1}.keys(), ["a"]),
        (bytearray(b"ab"), b"ab"),
        (memoryview(b"ab"), b"ab"),
        ({1: "a", None: "b", Color.RED: "c", (1, 2): "d"}, {"1": "a", "None": "b", "red": "c", "(1, 2)": "d"}),
        ({"é\u202e\x00": "\u202e\x00"}, {"é\u202e\x00": "\u202e\x00"}),
        (-0.0, -0.0),
        (2**64 - 1, 2**64 - 1),
    ],
    ids=lambda each: re.sub(" at 0x[0-9a-f]+", "", repr(each)),  # the same in every worker
)
def test_foreign_values_become_plain_ones_silently(value, expected):
    copy = plain(value)
    assert copy == expected
    assert type(copy) is type(expected)


def test_floats_that_are_no_numbers_stay_floats():
    assert math.isnan(plain(np.float64("nan")))
    assert plain({"a": float("-inf")}) == {"a": float("-inf")}


def test_a_moment_in_any_time_zone_keeps_its_instant():
    moment = dt.datetime(2024, 5, 1, 12, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"))
    assert plain(moment) == moment
    assert plain(moment).tzinfo is dt.UTC
    assert plain(Stamp(2024, 5, 1)) == "2024-05-01T00:00:00"


def test_a_handle_anywhere_becomes_its_scalars_and_never_its_live_parts(tmp_path):
    live = Raising()
    ctx = LogContext(tmp_path, run_key="a", store=live, extras={"self": None})
    ctx.extras["self"] = ctx
    state = LoopState(3, 10, tmp_path / "a", backend=live, error=ValueError("bad"), ctx=ctx)
    copy, replaced = to_builtins({"deep": [state], "ctx": ctx})
    assert copy["deep"][0] == {
        "step": 3,
        "num_steps": 10,
        "output_dir": str(tmp_path / "a"),
        "error": "ValueError: bad",
        "run": "a",
    }
    assert "store" not in copy["ctx"]
    assert replaced == {"ctx.extras.self": "it contains itself"}


@pytest.mark.parametrize(
    ("value", "stand_in", "why"),
    [
        (2**70, float(2**70), "beyond 64 bits"),
        (-(2**63) - 1, float(-(2**63) - 1), "beyond 64 bits"),
        (10**5000, "<integer of 16610 bits>", "beyond 64 bits"),
        ("a\udc80b", "a\\udc80b", "surrogates"),
        (np.zeros((20, 30), dtype=np.float32), "ndarray(shape=(20, 30), dtype=float32)", "600 values"),
        (Tensor(1.0, 2.0), "Tensor(shape=(2,), dtype=torch.float32)", "2 values"),
        (1j, "1j", "a complex"),
        (np.complex64(1j), None, "a complex64 cannot be recorded"),
        (decimal.Decimal("0.5"), 0.5, "a Decimal"),
        (print, "builtins.print", "cannot be recorded"),
        (Point, f"{__name__}.Point", "cannot be recorded"),
        (Raising(), "<Raising>", "ValueError when it was read"),
        (RaisingAttributes(), "<RaisingAttributes>", "cannot be recorded"),
        (RaisingBaseException(), "<RaisingBaseException>", "Interrupt when it was read"),
        (RaisingMapping(), None, "when it was read"),
        (Endless(), None, "a Endless cannot be recorded"),
        (RaisingClass(), None, "a RaisingClass cannot be recorded"),
        (threading.Lock(), None, "a lock cannot be recorded"),
        (iter([1]), None, "a list_iterator cannot be recorded"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_that_cannot_travel_is_replaced_with_a_reason_and_its_neighbours_stay(value, stand_in, why):
    copy, replaced = to_builtins({"loss": 0.5, "bad": [value], "acc": np.float32(0.25)}, "metrics")
    assert copy["loss"] == 0.5
    assert copy["acc"] == 0.25
    assert list(replaced) == ["metrics.bad[0]"]
    assert why in replaced["metrics.bad[0]"]
    if stand_in is not None:
        assert copy["bad"] == [stand_in]
    msgspec.msgpack.encode(copy)
    msgspec.json.encode(copy)


@pytest.mark.parametrize("leave", [KeyboardInterrupt, SystemExit])
def test_only_the_wish_to_leave_the_program_is_passed_on(leave):
    class Leaving:
        def item(self):
            raise leave

    with pytest.raises(leave):
        to_builtins({"a": Leaving()})


def test_keys_that_raise_or_collide_keep_their_values():
    class Key:
        def __str__(self):
            raise RuntimeError("no text")

    copy, replaced = to_builtins({1: "a", "1": "b", Key(): "c", "\udc80": "d"})
    assert copy == {"1": "a", "1#2": "b", "<Key>": "c", "\\udc80": "d"}
    assert set(replaced) == {"1#2", "<Key>"}


def test_a_circular_value_is_cut_where_it_returns_and_a_shared_one_is_not():
    shared = [1]
    ring = {"once": shared, "twice": shared}
    ring["ring"] = [ring]
    copy, replaced = to_builtins(ring)
    assert copy == {"once": [1], "twice": [1], "ring": ["<dict>"]}
    assert replaced == {"ring[0]": "it contains itself"}


@pytest.mark.parametrize("wrap", [lambda inner: [inner], lambda inner: {"a": inner}, lambda inner: Point(0.0, inner)])
def test_a_depth_bomb_is_cut_at_the_bound(wrap):
    bomb = 1.0
    for _ in range(5000):
        bomb = wrap(bomb)
    copy, replaced = to_builtins(bomb)
    assert list(replaced.values()) == [f"nested deeper than {MAX_DEPTH} levels"]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(copy)) == copy


def test_lists_that_share_each_other_exponentially_are_bounded():
    bomb = [1.0]
    for _ in range(30):
        bomb = [bomb, bomb]
    copy, replaced = to_builtins(bomb, max_bytes=100_000)
    assert len(msgspec.msgpack.encode(copy)) < 100_000
    assert any("too large" in why for why in replaced.values())


def test_of_very_many_reasons_the_first_are_told_and_the_others_counted():
    copy, replaced = to_builtins([print] * 1000)
    assert copy == ["builtins.print"] * 1000
    assert len(replaced) == MAX_REASONS + 1
    assert replaced["…"] == "and 900 more"


def test_long_texts_and_names_are_cut_and_long_names_stay_distinct_and_stable():
    row = {"n" * 1_000_000 + "1": 1.0, "n" * 1_000_000 + "2": 2.0, "text": "é" * 1_000_000, "raw": b"x" * 1_000_000}
    copy, replaced = to_builtins(row)
    first, second, text, raw = copy
    assert (copy[first], copy[second]) == (1.0, 2.0)
    assert len(first) == len(second) == MAX_KEY_CHARS
    assert first != second
    assert list(to_builtins(row)[0]) == [first, second, text, raw]
    assert len(copy["text"]) == MAX_TEXT_CHARS
    assert len(copy["raw"]) == MAX_TEXT_CHARS
    assert "1000000 characters" in replaced["text"]


def test_numbers_are_kept_when_a_neighbour_uses_up_all_the_room():
    row = {"long": [0.5] * 1_000_000, "texts": ["x" * 1000] * 1000, "loss": np.float64(0.5), "step": 3}
    copy, replaced = to_builtins(row, max_bytes=50_000)
    assert (copy["loss"], copy["step"]) == (0.5, 3)
    assert 1000 < len(copy["long"]) < 5000
    assert len(msgspec.msgpack.encode(copy)) <= 50_000
    assert "of 1000000 items" in replaced["long"]


def test_a_hundred_thousand_metrics_travel_whole():
    row = {f"layer_{n}/norm": n / 7 for n in range(100_000)}
    assert plain(row) == row


def test_an_endless_sequence_is_read_only_as_far_as_there_is_room():
    copy, _ = to_builtins(range(10**12), max_bytes=1000)
    assert copy == list(range(len(copy)))
    assert len(copy) <= 100


def test_a_mapping_that_changes_while_it_is_read_is_read_again():
    class Busy(collections.UserDict):
        reads = 0

        def items(self):
            Busy.reads += 1
            if Busy.reads < 3:
                raise RuntimeError("dictionary changed size during iteration")
            return super().items()

    assert plain(Busy(a=1)) == {"a": 1}


def test_the_copy_does_not_change_with_the_original():
    original = {"a": [1, {"b": 2}], "c": {1}}
    copy = plain(original)
    original["a"][1]["b"] = 3
    original["a"].append(4)
    assert copy == {"a": [1, {"b": 2}], "c": [1]}
