"""`read_document`, `Document.where` and ``--set``: values, their places, and what is refused, in full text."""

import contextlib
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evsys_bus.config import Document, read_document, with_overrides
from evsys_bus.config.spec import join_path, split_path
from evsys_bus.config.yaml_nodes import MAX_DEPTH, MAX_NODES, compose
from evsys_bus.errors import ConfigError, ConfigErrors, DocumentError

SWEEP = """\
# a comment
name: sweep
run: {lr: 1e-3, on: yes, day: 2024-01-01}
runs:
  wide: &wide
    hidden: 64
  deep:
    <<: *wide
    layers: 0x10
callbacks:
  - kind: print_progress
    params: {every: 5}
note: >
  folded
  text
"""


def document(tmp_path: Path, text: str | bytes = SWEEP) -> Document:
    file = tmp_path / "sweep.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_document(file)


def refused(tmp_path: Path, text: str | bytes) -> str:
    with pytest.raises(DocumentError) as caught:
        document(tmp_path, text)
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_values_are_those_of_yaml_1_2(tmp_path):
    assert document(tmp_path).value == {
        "name": "sweep",
        "run": {"lr": 0.001, "on": "yes", "day": "2024-01-01"},
        "runs": {"wide": {"hidden": 64}, "deep": {"layers": 16, "hidden": 64}},
        "callbacks": [{"kind": "print_progress", "params": {"every": 5}}],
        "note": "folded text\n",
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("-.inf", float("-inf")),
        ("1_000", 1000),
        ("-0b11", -3),
        ("0o17", 15),
        ("~", None),
        ("", None),
        ("True", True),
        ("off", "off"),
        ("'1'", "1"),
        ('"\\ud83d\\ude00"', "\U0001f600"),
        ("12:30", "12:30"),
        ("=", "="),
    ],
)
def test_a_scalar_is_read_as(text, value):
    assert compose(text, "x").to_builtins() == value


def test_json_with_tabs_is_read_too(tmp_path):
    assert document(tmp_path, '{\n\t"a": [1, "\\/", null],\r\n\t"b": {"c": true}}').value == {
        "a": [1, "/", None],
        "b": {"c": True},
    }


def test_an_explicit_key_wins_over_a_merged_one_and_an_earlier_merge_over_a_later():
    text = "a: &a {x: 1, y: 1}\nb: &b {x: 2, z: 2}\nc: {y: 3, <<: [*a, *b]}"
    assert compose(text, "x").to_builtins()["c"] == {"x": 1, "y": 3, "z": 2}


def test_each_value_is_a_value_of_its_own(tmp_path):
    read = document(tmp_path, "a: &a {x: [1]}\nb: *a")
    first = read.value
    first["a"]["x"].append(2)
    assert first["b"] == read.value["a"] == {"x": [1]}


@pytest.mark.parametrize(
    ("path", "key", "place"),
    [
        ("$.callbacks[0].kind", False, (11, 11, 14)),
        ("$.callbacks[0].kind", True, (11, 5, 4)),
        ("$.callbacks[0].params", False, (12, 5, 6)),
        ("$.callbacks[0].params.every", False, (12, 21, 1)),
        ("$.callbacks[0].params.evry", False, (12, 5, 6)),  # the nearest existing parent
        ("$.callbacks[0]", False, (11, 5, 4)),
        ("$.callbacks[7].kind", False, (10, 1, 9)),
        ("$.callbacks[0].params[...]", False, (12, 5, 6)),
        ("$.run.lr", False, (3, 11, 4)),
        ("$.runs.deep.hidden", False, (6, 13, 2)),  # where it was merged from
        ("$.note", False, (13, 7, 1)),
        ("$.nothing", False, (2, 1, 4)),
        ("$", False, (2, 1, 4)),
    ],
)
def test_every_place_is_known(tmp_path, path, key, place):
    where = document(tmp_path).where(path, key=key)
    assert (where.line, where.column, where.width) == place
    assert where.path == path
    assert where.text == SWEEP.splitlines()[place[0] - 1]


def test_the_caret_stands_under_the_token(tmp_path):
    where = document(tmp_path).where("$.callbacks[0].params.every")
    assert str(where).replace(f"{tmp_path}/", "") == (
        " --> sweep.yaml:12:21   $.callbacks[0].params.every\n"
        "   |\n"
        "12 |     params: {every: 5}\n"
        "   |                     ^"
    )


def test_a_path_is_split_as_it_was_joined():
    parts = ("callbacks", 1, "a.b", 'with "quotes"', "=", "", "...", "lr-1e-3")
    assert split_path(join_path("$", *parts)) == parts


# what is refused


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DocumentError) as caught:
        read_document(tmp_path / "none.yaml")
    assert str(caught.value) == (
        "error[EB107]: the file cannot be read\n"
        f" --> {tmp_path}/none.yaml   $\n"
        "why: No such file or directory\n"
        "fix: give the path of an experiment file that you may read"
    )


@pytest.mark.parametrize(
    ("path", "why"), [(".", "Is a directory"), ("sweep.yaml/x", "Not a directory"), ("\0", "null")]
)
def test_a_path_that_is_no_file(tmp_path, path, why):
    document(tmp_path)
    with pytest.raises(DocumentError) as caught:
        read_document(f"{tmp_path}/{path}")
    assert why in str(caught.value.why)


def test_a_file_that_is_not_utf_8(tmp_path):
    assert refused(tmp_path, b"a: 1\nb: \xff") == (
        "error[EB107]: the file is not UTF-8: byte 0xFF\n"
        " --> sweep.yaml:2:4   $\n  |\n2 | b: \n  |    ^\n"
        "fix: save it as UTF-8"
    )


def test_a_file_that_is_not_yaml(tmp_path):
    assert refused(tmp_path, "name: x\nruns: [1,\n  2\nseeds: 3\n") == (
        "error[EB107]: this is not YAML: expected ',' or ']', but got ':'\n"
        " --> sweep.yaml:4:6   $\n  |\n4 | seeds: 3\n  |      ^\n"
        "why: while parsing a flow sequence that begins in line 2\n"
        'fix: check the indentation and the brackets; put quotes around text with ": " or " #" in it'
    )


def test_a_tab_in_the_indentation(tmp_path):
    assert refused(tmp_path, "run:\n\tlr: 1\n") == (
        "error[EB107]: this is not YAML: found character '\\t' that cannot start any token\n"
        " --> sweep.yaml:2:1   $\n  |\n2 |  lr: 1\n  | ^\n"
        "why: while scanning for the next token\n"
        "fix: indent with spaces"
    )


def test_a_key_that_stands_twice(tmp_path):
    assert refused(tmp_path, "run:\n  lr: 1\n  x: 2\n  lr: 3\n") == (
        'error[EB107]: the key "lr" is twice in one mapping: lines 2 and 4\n'
        " --> sweep.yaml:4:3   $.run.lr\n  |\n4 |   lr: 3\n  |   ^^\n"
        "fix: remove one of them, or rename it"
    )


def test_a_tag(tmp_path):
    assert refused(tmp_path, "run: !!python/object/apply:os.system [echo]\n") == (
        "error[EB107]: tags are refused: 'tag:yaml.org,2002:python/object/apply:os.system'\n"
        " --> sweep.yaml:1:6   $.run\n  |\n"
        "1 | run: !!python/object/apply:os.system [echo]\n"
        "  |      " + "^" * 33 + "\n"
        "fix: remove the tag: text, numbers, true, false, null, lists and mappings need none"
    )


def test_a_second_document(tmp_path):
    assert refused(tmp_path, "a: 1\n---\nb: 2\n") == (
        "error[EB107]: a second document begins here, and only one is read\n"
        " --> sweep.yaml:2:1   $\n  |\n2 | ---\n  | ^^^\n"
        'fix: remove the "---" and what follows it, or put it in another file'
    )


def test_a_top_level_that_is_no_mapping(tmp_path):
    assert refused(tmp_path, "- a\n") == (
        "error[EB107]: an experiment file must hold a mapping, not a list\n"
        " --> sweep.yaml:1:1   $\n  |\n1 | - a\n  | ^\n"
        'fix: begin it with a line like "name: my-experiment"'
    )


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "a mapping, not nothing"),
        ("# only a comment", "a mapping, not nothing"),
        ("a: *b", 'anchored as "&b"'),
        ("a: &a [*a]", 'anchored as "&a"'),
        ("a: {<<: 3}", '"<<" merges mappings'),
        ("? [1]\n: 2", "a key must be text"),
        ("a: 99999999999999999999", "no number that can be held"),
        (f"a: {'9' * 5000}", "no number that can be held"),
        ("%YAML 1.1\n---\na: yes", "only YAML 1.2 is read"),
        ('a: "\\ud800"', "half a character"),
        ("a: \x07", "U+0007"),
        ("a: 'x", "this is not YAML"),
        ('a: "\\UFFFFFFFF"', "this is not YAML"),
    ],
)
def test_refused(tmp_path, text, what):
    assert what in refused(tmp_path, text)


# bombs


def laughs(count: int) -> str:
    lines = ["l0: &l0 [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]"]
    lines += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, count)]
    return "\n".join(lines)


def merges(count: int) -> str:
    lines = ["m0: &m0 {" + ", ".join(f"k{n}: [1, 2, 3, 4, 5, 6, 7, 8, 9]" for n in range(1000)) + "}"]
    return "\n".join([*lines, *(f"m{n}: {{<<: *m0}}" for n in range(1, count))])


@pytest.mark.parametrize(
    ("bomb", "what"),
    [
        (laughs(40), f"more than {MAX_NODES:,} values"),
        (merges(40), f"more than {MAX_NODES:,} values"),
        pytest.param("a: [" + "1," * 500_000 + "]", f"more than {MAX_NODES:,} values", marks=pytest.mark.long),
        ("a: " + "[" * 200_000, f"more than {MAX_DEPTH} lists"),
        ("- " * 200_000, f"more than {MAX_DEPTH} lists"),
        ("a0: &a0 []\n" + "\n".join(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 99)), f"more than {MAX_DEPTH} lists"),
        ("a: " + "x" * 10_000_000, "larger than 1,048,576 bytes"),
        ("x" * 1_000_000, "not text"),
    ],
    ids=["laughs", "merges", "wide", "deep", "deep_block", "deep_aliases", "huge", "long_line"],
)
def test_a_bomb_ends_soon_in_a_short_error(tmp_path, bomb, what):
    began = time.thread_time()  # what else the machine does is not the bomb's
    error = refused(tmp_path, bomb)
    assert what in error
    assert len(error) < 1000
    assert time.thread_time() - began < 15


def test_a_device_without_an_end_is_not_read_to_its_end():
    with pytest.raises(DocumentError, match="larger than"):
        read_document("/dev/zero")


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_any_text_is_a_value_or_a_document_error(text):
    with_text_or_error(text)


YAML_PIECES = (
    *(
        "a",
        "b: ",
        "- ",
        "? ",
        ": ",
        "[",
        "]",
        "{",
        "}",
        ",",
        "&a ",
        "*a",
        "<<: ",
        "!!str ",
        "!x ",
        '"',
        "'",
        "|\n",
        ">-\n",
    ),
    *(
        "\n",
        "\n  ",
        "\n    ",
        "\t",
        "---\n",
        "...\n",
        "%YAML 1.2\n",
        "%TAG ! x\n",
        "# c",
        "\\u",
        "\\x41",
        "1e3",
        "~",
        "0x",
    ),
    *("\ufeff", "\x85", "\u2028", "\r", "0_", "+_", ".", "-", "=", "@", "`"),
)


@given(st.lists(st.sampled_from(YAML_PIECES), max_size=25).map("".join))
@settings(max_examples=400, deadline=None)
def test_any_pieces_of_yaml_are_a_value_or_a_document_error(text):
    with_text_or_error(text)


def with_text_or_error(text: str) -> None:
    with contextlib.suppress(DocumentError):
        compose(text, "x.yaml").to_builtins()
    with contextlib.suppress(ConfigError):
        with_overrides(Document(compose("a: {b: [1]}", "x.yaml")), [text, f"a.b={text}"])


# --set


def test_values_of_the_command_line_take_the_place_of_those_in_the_file(tmp_path):
    read = document(tmp_path)
    said = ["run.lr=1e-4", "runs.wide.hidden=8", "callbacks[0].params.every=2", "run.new=[a, {b: 1}]", "seeds=[1]"]
    value = with_overrides(read, [*said, 'runs["wide"].x=', "metadata.note=a=b", "run.new[1].b=2"]).value
    assert value["run"] == {"lr": 0.0001, "on": "yes", "day": "2024-01-01", "new": ["a", {"b": 2}]}
    assert value["runs"] == {"wide": {"hidden": 8, "x": None}, "deep": {"layers": 16, "hidden": 64}}
    assert value["callbacks"] == [{"kind": "print_progress", "params": {"every": 2}}]
    assert (value["seeds"], value["metadata"]) == ([1], {"note": "a=b"})
    assert read.value["run"]["lr"] == 0.001, "the document itself is left as it was"


def test_a_value_of_the_command_line_says_so(tmp_path):
    changed = with_overrides(document(tmp_path), ["run.lr=abc", "runs.wide={hidden: x}"])
    assert str(changed.where("$.run.lr")) == " --> --set run.lr=abc   $.run.lr"
    assert str(changed.where("$.runs.wide.hidden")) == " --> --set runs.wide={hidden: x}   $.runs.wide.hidden"
    assert changed.where("$.run.on").line == 3


NOWHERE = {
    "runs.wdie.hidden=3": ['"runs" has no "wdie"', "$.runs.wdie", 'did you mean "wide"?'],
    "name.x=3": ['"name" is text, not a mapping', "$.name.x", "set it as a whole"],
    "callbacks[4].kind=x": [
        '"callbacks" has 1 items',
        "$.callbacks[4]",
        "they are counted from 0, the first is callbacks[0]",
    ],
    "callbacks.kind=x": [
        '"callbacks" is a list, not a mapping',
        "$.callbacks.kind",
        'write "callbacks[0]" for its first item',
    ],
    "run[0]=x": ['"run" is a mapping, not a list', "$.run[0]", "its keys: lr, on, day"],
    "run.lr": [
        "this is not path=value",
        "$",
        "write it like --set run.lr=1e-3, --set callbacks[0].params.every=5 or --set 'runs[\"a.b\"].hidden=64'",
    ],
}


@pytest.mark.parametrize("said", NOWHERE)
def test_a_setting_that_leads_nowhere(tmp_path, said):
    with pytest.raises(DocumentError) as caught:
        with_overrides(document(tmp_path), [said])
    what, path, fix = NOWHERE[said]
    assert str(caught.value) == f"error[EB107]: {what}\n --> --set {said}   {path}\nfix: {fix}"


def test_a_setting_that_is_not_yaml(tmp_path):
    with pytest.raises(DocumentError) as caught:
        with_overrides(document(tmp_path), ["run.lr=[1"])
    assert str(caught.value) == (
        "error[EB107]: this is not YAML: expected ',' or ']', but got '<stream end>'\n --> --set run.lr=[1   $\n"
        "why: while parsing a flow sequence\n"
        'fix: check the indentation and the brackets; put quotes around text with ": " or " #" in it'
    )


def test_all_settings_that_are_wrong_are_told_at_once(tmp_path):
    with pytest.raises(ConfigErrors) as caught:
        with_overrides(document(tmp_path), ["nope", "run.lr=1", "name.x=1"])
    assert len(caught.value.errors) == 2


@pytest.mark.parametrize("text", ["1e400", "-12e345", "9.9E+999"])
def test_a_number_that_is_too_large_is_an_error_and_not_infinity(text):
    with pytest.raises(DocumentError, match="no number that can be held"):
        compose(f"lr: {text}", "sweep.yaml")
    assert Document(compose("lr: -.inf", "sweep.yaml")).value == {"lr": float("-inf")}
