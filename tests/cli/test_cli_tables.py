"""Tables and texts on terminals of several widths."""

import pytest

from evsys_bus.cli.output.formatting import format_columns, format_facts, format_table, wrap

ROWS = [
    ["metric", "rows", "first", "last", "least", "at step", "greatest", "at step"],
    ["loss", "300 (2 NaN)", "2.302", "0.1214", "0.1102", "12,280", "2.41", "3"],
    ["eval/accuracy", "3", "0.91", "0.97", "0.91", "99", "0.97", "299"],
]
TEXT = "wide is best: test/score 0.915 over 2 seeds, ahead of low (0.5182). Runs are not comparable."


def test_a_table_that_fits_or_goes_to_no_terminal_is_in_columns():
    assert format_table(ROWS) == format_columns(ROWS) == format_table(ROWS, 200)


@pytest.mark.parametrize("width", [30, 45, 60])
def test_a_table_that_is_too_wide_has_its_rows_below_each_other_and_loses_nothing(width):
    lines = format_table(ROWS, width)
    assert max(map(len, lines)) <= width
    assert [line for line in lines if not line.startswith(" ")] == ["metric loss", "metric eval/accuracy"]
    text = "   ".join(line.strip() for line in lines)
    for row in ROWS[1:]:
        for head, cell in zip(ROWS[0], row, strict=True):
            assert f"{head} {cell}" in text


@pytest.mark.parametrize("width", [40, 60])
def test_a_text_that_is_too_long_goes_on_below_itself_at_a_word(width):
    lines = format_facts([["status", "completed"], ["conclusion", TEXT], ["data", "runs/sweep"]], width)
    assert max(map(len, lines)) <= width
    begin = len("conclusion   ")
    assert " ".join(line[begin:] for line in lines[1:-1]) == TEXT
    assert lines[-1] == "data         runs/sweep"


def test_paths_and_commands_stay_whole():
    path = "/a/folder/with/a/name/that/is/longer/than/the/terminal/is-wide"
    command = f"deliver what is pending: evsys-bus sync {path}"
    assert format_facts([["data", path]], 40) == [f"data   {path}"]
    assert wrap(command, 40) == ["deliver what is pending:", f"  evsys-bus sync {path}"]


def test_a_cell_that_is_too_long_for_a_line_goes_on_at_a_word():
    lines = format_table([["run", "evaluation"], ["low", TEXT]], 40)
    assert max(map(len, lines)) <= 40
    assert " ".join(line.strip() for line in lines[1:]) == f"low  {TEXT}"


@pytest.mark.parametrize("width", range(20, 70))
def test_a_mean_stays_with_its_deviation_and_a_sign_with_its_number(width):
    text = "low is best: test/score 0.39 ± 0 over 2 seeds, ahead of high (0.39 ± 0.02), and must be an integer >= 1"
    lines = wrap(text, width)
    for part in ("0.39 ± 0 ", "(0.39 ± 0.02),", ">= 1"):
        assert any(part.strip() in line for line in lines)
    assert " ".join(line.strip() for line in lines) == text
