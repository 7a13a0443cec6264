import json
import threading
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evsys_bus.codec import json_line
from evsys_bus.codec.scalars import MAX_KEY_CHARS

SCALARS = st.none() | st.booleans() | st.floats() | st.integers(-(2**53), 2**53) | st.text()
NAMES = st.text().filter(lambda name: name not in ("replaced", "nonfinite"))


def strict(line):
    """As a browser reads it: NaN is no JSON."""
    return json.loads(line, parse_constant=pytest.fail)


@given(st.dictionaries(NAMES, SCALARS))
def test_a_row_of_scalars_reads_back_as_it_was_and_says_which_numbers_were_no_numbers(row):
    read = strict(json_line(row))
    flags = read.pop("nonfinite", {})
    assert b"\n" not in json_line(row)
    assert set(flags.values()) <= {"nan", "inf", "-inf"}
    restored = {name: float(flags[name]) if name in flags else value for name, value in read.items()}
    assert str(restored) == str(row)


def test_numpy_scalars_are_numbers():
    row = {"a": np.float64(0.5), "b": np.float32(0.25), "c": np.int64(3), "d": np.array(1.5)}
    assert json_line(row) == b'{"a":0.5,"b":0.25,"c":3,"d":1.5}'


def test_nan_is_found_in_numpy_and_in_nested_values_too():
    read = strict(json_line({"a": np.float32("nan"), "b": {"c": [1.0, float("inf")]}, "d": None}))
    assert read == {"a": None, "b": {"c": [1.0, None]}, "d": None, "nonfinite": {"a": "nan", "b.c[1]": "inf"}}


def test_one_bad_value_does_not_cost_the_row():
    read = strict(json_line({"loss": 0.5, "lock": threading.Lock(), "big": 2**70, "sad": "\udc80", 3: "x"}))
    assert read["loss"] == 0.5
    assert read["3"] == "x"
    assert set(read["replaced"]) == {"lock", "big", "sad"}


def test_a_value_that_raises_what_it_likes_does_not_cost_the_row():
    class Rebel(BaseException):
        pass

    class Rebellious:
        def item(self):
            raise Rebel

    assert strict(json_line({"loss": 0.5, "bad": Rebellious()}))["loss"] == 0.5


def test_a_row_with_keys_of_our_names_keeps_its_own():
    row = {"nonfinite": 1, "replaced": 2, "loss": float("nan"), "lock": threading.Lock()}
    read = strict(json_line(row))
    assert (read["nonfinite"], read["replaced"]) == (1, 2)


@pytest.mark.parametrize("row", [None, 5, [1], "text", object()])
def test_what_is_no_row_still_gives_a_line(row):
    assert "row" in strict(json_line(row))


def test_any_mapping_is_a_row():
    assert json_line(MappingProxyType({"a": 1})) == b'{"a":1}'


def test_a_long_name_is_the_same_whether_its_row_is_plain_or_not():
    name = "n" * (MAX_KEY_CHARS + 1)
    alone, beside = strict(json_line({name: 1.0})), strict(json_line({name: 1.0, "x": [1]}))
    assert next(iter(alone)) == next(iter(beside)) != name
