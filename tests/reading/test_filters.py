"""The filter language: what matches, and what each mistake is reported as."""

from typing import ClassVar

import pytest

from evsys_bus.filters import parse_filter, parse_number


class Run:
    texts = ("sweep/low-s0", "Baseline", "first try", "ppo")
    fields: ClassVar = {
        "lr": 3e-4,
        "optimizer.lr": 1,
        "state": "failed",
        "arm": "Baseline",
        "tags": ["ppo", "night"],
        "seed": 0,
        "age": 5400.0,
        "val/acc": 0.5,
        "best loss": 0.25,
        "loss": float("nan"),
        "note": "",
        "flag": True,
    }

    def field(self, name):
        return self.fields.get(name)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "low",
        "BASELINE",
        '"first try"',
        "/low-s\\d$/",
        "/sweep/low/",
        "lr>1e-4 lr<=3e-4 lr=0.0003",
        "optimizer.lr:1",
        "state:failed",
        "state=FAILED",
        "state:f*",
        "arm:baseline",
        "tags:night",
        "seed:0 seed<1",
        "age>1h age<2h age>=90m",
        "val/acc>0.4",
        '"best loss"<0.3',
        'note:""',
        "flag:true",
        "-state:completed",
        "-/high/ -high",
        "state!=completed nothing!=1",
        "  low   ppo ",
    ],
)
def test_these_match(text):
    assert parse_filter(text).matches(Run())


@pytest.mark.parametrize(
    "text",
    [
        "high",
        "low high",
        "/LOW/",
        "lr>1e-3",
        "state:fail",
        "arm:base",
        "nothing>0",
        "nothing:1",
        "loss>0",
        "loss<=0",
        "-low",
        "state!=failed",
        "arm>1",
        "flag>0",
        "try-first",
    ],
)
def test_these_do_not(text):
    assert not parse_filter(text).matches(Run())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/low", "no closing slash"),
        ("/(/", "no regular expression"),
        ('"low', "no closing quote"),
        ("lr>", "lr> has no value"),
        (">3", "begins with a sign"),
        ("lr>fast", "compares with no number"),
        ('lo"w', "quote or a sign inside a word"),
        ("lr!3", "quote or a sign inside a word"),
    ],
)
def test_a_mistake_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_filter(text)


@pytest.mark.parametrize(
    ("text", "number"), [("1e-4", 1e-4), ("-2", -2), ("1_000", 1000), ("2h", 7200), (".5", 0.5), ("inf", float("inf"))]
)
def test_numbers_and_durations(text, number):
    assert parse_number(text) == number


@pytest.mark.parametrize("text", ["", "x", "1x", "1 2", "--1"])
def test_what_is_no_number(text):
    assert parse_number(text) is None
