"""What the log says of trouble that repeats."""

import logging
import subprocess
import sys
import textwrap

import pytest

from evsys_bus.diagnostics import MAX_KINDS, MAX_SHAPES, FaultLog, current_adapter, log, message_shape


@pytest.fixture
def faults(caplog):
    caplog.set_level(logging.WARNING, logger="evsys_bus")
    return FaultLog(clock=lambda: 5.0)


def said(caplog):
    return [(str(each.exc_info[1]) if each.exc_info else None, vars(each)["count"]) for each in caplog.records]


def test_a_second_error_of_another_type_or_text_is_logged_within_the_same_second(faults, caplog):
    for error in (KeyError("lr"), KeyError("lr"), OSError("lr"), OSError("no route"), KeyError("lr")):
        faults.warn("hook.failed", "on_eval", error=error)
    assert said(caplog) == [("'lr'", 1), ("lr", 1), ("no route", 1)]
    caplog.clear()
    faults.flush()
    assert said(caplog) == [(None, 3)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("row 17 of 90 is bad", "row 18 of 91 is bad"),
        ("<object at 0x7f31aa0>", "<object at 0x7f31bb8>"),
        ("loss is -1.5e-07", "loss is 2.25"),
        ("run 5e3f77ab-0c11 is gone", "run 99aa0012-7e55 is gone"),
    ],
)
def test_numbers_and_addresses_make_no_new_kind(faults, caplog, one, other):
    faults.warn("hook.failed", "on_eval", error=ValueError(one))
    faults.warn("hook.failed", "on_eval", error=ValueError(other))
    assert said(caplog) == [(one, 1)]


def test_kinds_are_bounded_and_none_is_lost_from_the_count(faults, caplog):
    words = ["".join(chr(97 + int(digit)) for digit in f"{number:05}") for number in range(MAX_KINDS + 500)]
    for word in words:
        faults.warn("one", "key", error=ValueError(word))
        faults.warn("many", word, error=ValueError("same"))
    assert len(caplog.records) <= MAX_KINDS + 2
    faults.flush()
    ones = [vars(each)["count"] for each in caplog.records if vars(each)["event"] == "one"]
    assert ones[:MAX_SHAPES] == [1] * MAX_SHAPES
    assert ones[-1] == len(words) - MAX_SHAPES


def test_an_error_that_cannot_be_shown_is_logged_all_the_same(faults, caplog):
    class ShyError(Exception):
        def __str__(self):
            raise RuntimeError("no words")

    assert message_shape(ShyError()) == ""
    faults.warn("hook.failed", "on_eval", error=ShyError())
    assert [vars(each)["count"] for each in caplog.records] == [1]


def test_lines_of_a_courier_name_its_adapter(caplog):
    token = current_adapter.set("plots")
    try:
        log().warning("plot.skipped", why="empty")
        log().warning("plot.skipped", adapter="another")
    finally:
        current_adapter.reset(token)
    log().warning("plot.skipped")
    assert [vars(each).get("adapter") for each in caplog.records] == ["plots", "another", None]


def test_no_line_and_no_traceback_controls_the_terminal(faults, caplog):
    evil = "\x1b[2J\x9b2J\u202e"
    faults.warn("hook.failed", "on_eval", hook=evil, error=ValueError(evil))
    assert not {"\x1b", "\x9b", "\u202e"} & set(caplog.text)
    assert "ValueError: \\x1b[2J\\x9b2J\\u202e" in caplog.text


BARE = "sys.stdout = type('Out', (), {'write': lambda self, text: None, 'flush': lambda self: None})()"
"""A stream that cannot be asked whether it is a terminal."""


@pytest.mark.parametrize("out", ["sys.stdout.close()", "sys.stdout = None", BARE])
def test_a_program_that_has_closed_its_standard_output_can_enter_a_bus(tmp_path, out):
    program = f"""
        import sys
        {out}
        given = sys.stdout
        from evsys_bus import EventBus, LoopState, StepEnd, build_callbacks
        printing = build_callbacks([{{"kind": "print_progress"}}, {{"kind": "local_logger"}}])
        with EventBus(printing) as bus:
            bus.publish(StepEnd(LoopState(0, 1, {str(tmp_path)!r}), 0, None, {{"loss": 0.5}}))
        assert sys.stdout is given
        assert not [each for each in bus.health().hooks if each.failures]
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "Traceback" not in done.stderr
    assert "0.5" in (tmp_path / "logs/training/metrics.jsonl").read_text()


def _run_program(code: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


PROGRAM = """
    import logging, logging.config
    from evsys_bus import Callback, EventBus, LoopState, StepEnd, TrainingBatch

    class Raises(Callback):
        def on_step_end(self, *args): raise ValueError("a bug")

    {before}
    with EventBus([Raises()]) as bus:
        bus.publish(StepEnd(LoopState(0, 1, "r"), 0, TrainingBatch(), {{}}))
        {within}
        bus.publish(StepEnd(LoopState(1, 1, "r"), 1, TrainingBatch(), {{}}))
"""
CONFIG = (
    'logging.config.dictConfig({"version": 1, "handlers": {"h": {"class": "logging.StreamHandler"}}, '
    '"root": {"handlers": ["h"]}})'
)


@pytest.mark.parametrize("where", ["before", "within"])
def test_warnings_are_shown_after_a_logging_configuration_that_disables_existing_loggers(where):
    program = {"before": "pass", "within": "pass"}
    program[where] = CONFIG
    shown = _run_program(PROGRAM.format(**program))
    assert "hook.failed" in shown.rpartition("logging.enabled")[2]
    if where == "within":
        assert shown.count("logging.enabled") == shown.count("disable_existing_loggers=False") == 1


def test_a_program_silences_the_logger_by_its_level():
    silent = f'{CONFIG}; logging.getLogger("evsys_bus").setLevel(logging.CRITICAL)'
    assert _run_program(PROGRAM.format(before=silent, within="pass")) == ""
