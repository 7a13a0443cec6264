"""What a program prints goes where it went, and into a file: whole lines, redacted, bounded, and never at its cost."""

import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from evsys_bus.front.output import OutputCapture, write_error
from support.files import small_file_system

KEY = "sk-aB3dE6gH9jK2mN5pQ8sT1vW4xZ7"


class Streams:
    """Ordinary text streams in place of those of the tests."""

    def __init__(self) -> None:
        self.stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
        self.stderr = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)

    @property
    def printed(self) -> str:
        return self.stdout.buffer.getvalue().decode()

    @property
    def printed_to_stderr(self) -> str:
        return self.stderr.buffer.getvalue().decode()


@contextlib.contextmanager
def ordinary_streams() -> Iterator[Streams]:
    streams, replaced = Streams(), (sys.stdout, sys.stderr)
    sys.stdout, sys.stderr = streams.stdout, streams.stderr
    try:
        yield streams
    finally:
        sys.stdout, sys.stderr = replaced


@contextlib.contextmanager
def captured(folder: Path, **options: int) -> Iterator[tuple[Streams, OutputCapture]]:
    with ordinary_streams() as streams:
        capture = OutputCapture(folder / "output.log", **options)
        assert capture.start()
        try:
            yield streams, capture
        finally:
            capture.stop()


def text_of(capture: OutputCapture) -> str:
    return capture.path.read_text(encoding="utf-8")


def run_program(source: str, path: Path, **options) -> subprocess.CompletedProcess[str]:
    head = "import os, sys\nfrom pathlib import Path\nfrom evsys_bus.front.output import OutputCapture\n"
    head += f"capture = OutputCapture(Path({str(path)!r}))\ncapture.start()\n"
    command = [sys.executable, "-c", head + textwrap.dedent(source)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(command, text=True, check=False, **streams)


def test_what_is_printed_goes_where_it_went_and_into_the_file(tmp_path):
    with captured(tmp_path) as (streams, capture):
        print("to stdout", 1)
        print("grüße", file=sys.stderr)
        sys.stdout.writelines(["a\n", "b\n"])
        assert text_of(capture) == "to stdout 1\ngrüße\na\nb\n"  # at once: each line is in the file when it is ended
        assert streams.printed == "to stdout 1\na\nb\n"
        assert streams.printed_to_stderr == "grüße\n"
        print("unfinished", end="")
        assert "unfinished" not in text_of(capture)
        capture.stop()
        assert text_of(capture).endswith("unfinished\n")
        print("\nafterwards")
        assert "afterwards" not in text_of(capture)
        assert streams.printed.endswith("unfinished\nafterwards\n")


def test_the_streams_stay_what_they_were(tmp_path):
    with captured(tmp_path) as (streams, capture):
        assert sys.stdout is streams.stdout
        assert isinstance(sys.stdout, io.TextIOWrapper)
        assert sys.stdout.encoding == "utf-8"
        assert not sys.stdout.isatty()
        with pytest.raises(io.UnsupportedOperation):
            sys.stdout.fileno()  # as without a capture: there is none
        sys.stdout.buffer.write(b"bytes\n")
        sys.stdout.flush()
        assert streams.printed == "bytes\n"
        assert sys.stdout.write("four") == 4
        with pytest.raises(TypeError):
            sys.stdout.write(b"bytes")
        capture.stop()
        assert "write" not in vars(sys.stdout)


def test_a_terminal_stays_one(tmp_path):
    import pty

    parent, child = pty.openpty()
    source = "print(sys.stdout.isatty(), sys.stdout.fileno(), os.get_terminal_size(sys.stdout.fileno()).columns >= 0)"
    run_program(source, tmp_path / "output.log", stdout=child)
    os.close(child)
    assert os.read(parent, 1000).decode().strip() == "True 1 True"
    os.close(parent)
    assert (tmp_path / "output.log").read_text() == "True 1 True\n"


def test_no_credential_reaches_the_file(tmp_path):
    with captured(tmp_path) as (_, capture):
        print(f"using {KEY}")
        print("api_key=hunter2", end="2hunter\n")  # in two writes
        print("-----BEGIN RSA PRIVATE KEY-----\nMIIEabc\nMIIEdef==\n-----END RSA PRIVATE KEY-----\nafter")
        print("before -----BEGIN PRIVATE KEY-----\nMIIEabc\nno key line: it goes on")
        assert text_of(capture).splitlines() == [
            *("using <redacted>", "api_key=<redacted>", "<redacted>", "after", "before <redacted>"),
            "no key line: it goes on",
        ]


def test_a_progress_bar_leaves_its_last_state_only(tmp_path):
    with captured(tmp_path) as (streams, capture):
        for percent in range(101):
            print(f"\r{percent:3}%", end="", file=sys.stderr)
            print(f"step {percent}") if percent % 50 == 0 else None
        print(file=sys.stderr)
        print("10%\r20%\r\n30%\r", end="")
        print("40%\r\nend")
        assert text_of(capture).splitlines() == ["step 0", "step 50", "step 100", "100%", "20%", "40%", "end"]
        assert streams.printed_to_stderr.count("\r") == 101


def test_colors_and_movements_of_the_cursor_are_left_out(tmp_path):
    with captured(tmp_path) as (streams, capture):
        print("\x1b[1;31mred\x1b[0m \x1b]0;title\x07plain\x1b[A\x1b[2K")
        assert text_of(capture) == "red plain\n"
        assert "\x1b[1;31mred" in streams.printed


def test_a_text_that_is_no_valid_unicode_is_escaped(tmp_path):
    with ordinary_streams():
        sys.stdout.reconfigure(errors="backslashreplace")
        capture = OutputCapture(tmp_path / "output.log")
        capture.start()
        print("a\udc80b")
        capture.stop()
        assert text_of(capture) == "a\\udc80b\n"


def test_logging_that_was_configured_before_is_captured(tmp_path):
    with ordinary_streams():
        handler = logging.StreamHandler(sys.stderr)
        logger = logging.getLogger("of the program")
        logger.addHandler(handler)
        capture = OutputCapture(tmp_path / "output.log")
        capture.start()
        logger.warning("a warning")
        capture.stop()
        logger.removeHandler(handler)
        assert text_of(capture) == "a warning\n"


def test_threads_do_not_mix_their_lines(tmp_path):
    with captured(tmp_path) as (_, capture):

        def work(name: str) -> None:
            for index in range(300):
                print(name * 20, index)

        threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        capture.stop()
        lines = text_of(capture).splitlines()
        assert sorted(lines) == sorted(f"{name * 20} {index}" for name in "abcd" for index in range(300))
        for name in "abcd":  # and keep their order
            own = [line for line in lines if line[0] == name]
            assert own == [f"{name * 20} {index}" for index in range(300)]


def test_only_the_outermost_capture_copies(tmp_path):
    with captured(tmp_path) as (_, capture):
        inner = OutputCapture(tmp_path / "inner.log")
        assert not inner.start()
        print("once")
        inner.stop()
        print("twice")
        assert not (tmp_path / "inner.log").exists()
        assert text_of(capture) == "once\ntwice\n"
        capture.stop()
        assert inner.start()  # now it is the outermost one
        print("inner")
        inner.stop()
        assert text_of(inner) == "inner\n"


@pytest.mark.parametrize("stream", [None, io.StringIO(), object()])
def test_a_stream_that_is_no_ordinary_one_is_left_alone(monkeypatch, tmp_path, stream):
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    capture = OutputCapture(tmp_path / "output.log")
    assert not capture.start()
    assert not capture.is_active
    assert sys.stdout is stream
    capture.stop()


def test_code_that_replaces_a_stream_is_not_disturbed(tmp_path):
    with captured(tmp_path) as (_, capture):
        with contextlib.redirect_stdout(io.StringIO()) as elsewhere:
            print("elsewhere")
        print("here")
        replaced = sys.stdout = io.StringIO()
        capture.stop()
        assert sys.stdout is replaced
        assert elsewhere.getvalue() == "elsewhere\n"
        assert text_of(capture) == "here\n"


def test_code_that_replaced_the_method_meanwhile_is_not_disturbed(tmp_path):
    with captured(tmp_path) as (streams, capture):
        ours, seen = sys.stdout.write, []

        def theirs(text: str) -> int:
            seen.append(text)
            return ours(text)

        sys.stdout.write = theirs
        print("a")
        capture.stop()
        print("b")
        assert sys.stdout.write is theirs
        assert seen == ["a", "\n", "b", "\n"]
        assert streams.printed == "a\nb\n"
        assert text_of(capture) == "a\n"


def test_it_works_within_the_capture_of_pytest(capsys, tmp_path):
    capture = OutputCapture(tmp_path / "output.log")
    assert capture.start() is isinstance(sys.stdout, io.TextIOWrapper)
    print("captured by both")
    capture.stop()
    assert capsys.readouterr().out == "captured by both\n"


def test_a_long_output_has_its_beginning_and_its_end(tmp_path):
    with ordinary_streams():
        capture = OutputCapture(tmp_path / "output.log", max_bytes=100_000)
        capture.start()
        for index in range(50_000):
            print(f"line {index:06d}")
            if index % 1000 == 0:
                assert capture.path.stat().st_size <= 100_000
        capture.stop()
        lines = text_of(capture).splitlines()
        assert capture.path.stat().st_size <= 100_000
        assert (lines[0], lines[-1]) == ("line 000000", "line 049999")
        (marker,) = [line for line in lines if "left out" in line]
        before, after = lines[: lines.index(marker) - 1], lines[lines.index(marker) + 1 :]
        assert before == [f"line {index:06d}" for index in range(len(before))]
        assert after == [f"line {index:06d}" for index in range(50_000 - len(after), 50_000)]
        assert min(len(before), len(after)) * 12 > 20_000
        left_out = (50_000 - len(before) - len(after)) * 12
        assert left_out <= int(marker.split()[0][1:]) <= left_out + 10_000  # with the marks of before


def test_one_print_larger_than_the_file_may_be_is_bounded(tmp_path):
    with ordinary_streams():
        capture = OutputCapture(tmp_path / "output.log", max_bytes=10_000)
        capture.start()
        print("x" * 3_000_000 + "ü" * 100_000)
        print("short")
        capture.stop()
        assert capture.path.stat().st_size <= 10_000
        text = capture.path.read_text(encoding="utf-8", errors="strict")
        assert text.startswith("xxx")
        assert "left out" in text
        assert text.endswith("ü\nshort\n")


def test_text_without_line_ends_does_not_grow_in_memory(tmp_path):
    with ordinary_streams():
        capture = OutputCapture(tmp_path / "output.log")
        capture.start()
        started = time.thread_time()
        for _ in range(300):
            print("." * 10_000, end="")
        for _ in range(20_000):
            print(".", end="")
        assert time.thread_time() - started < 2
        assert capture.path.stat().st_size >= 2_000_000
        capture.stop()
        assert text_of(capture).count(".") == 3_020_000


def test_a_resumed_run_appends(tmp_path):
    with ordinary_streams():
        for word in ("first", "second"):
            capture = OutputCapture(tmp_path / "output.log")
            capture.start()
            print(word)
            capture.stop()
        assert text_of(capture) == "first\nsecond\n"


def test_what_was_printed_before_a_kill_is_in_the_file(tmp_path):
    done = run_program(
        """
        for index in range(1000):
            print("line", index)
        os.kill(os.getpid(), 9)
    """,
        tmp_path / "output.log",
    )
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "output.log").read_text().splitlines() == [f"line {index}" for index in range(1000)]


def test_a_forked_child_does_not_write_to_the_file(tmp_path):
    done = run_program(
        """
        print("before")
        print("unfinished ", end="")
        pid = os.fork()
        if pid == 0:
            print("of the child")
            capture.stop()
            sys.stdout.flush()
            inner = OutputCapture(Path(sys.argv[0] or ".").resolve() / "child.log")
            assert inner.start()
            print("of the child's own run")
            inner.stop()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        print("after")
        capture.stop()
    """,
        tmp_path / "output.log",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "output.log").read_text() == "before\nunfinished after\n"
    assert "of the child\n" in done.stdout


def test_a_full_disk_costs_no_print_and_is_said_once(tmp_path, caplog):
    with ordinary_streams() as streams:
        with small_file_system(tmp_path / "disk", "64k") as disk:
            capture = OutputCapture(disk / "output.log")
            capture.start()
            for index in range(5000):
                print(f"line {index:06d} {'x' * 50}")
            assert capture.lost_bytes > 100_000
            size = capture.path.stat().st_size
            assert size > 10_000
            assert text_of(capture).endswith("x\n")  # no half line
            with (disk / "output.log").open("r+b") as file:
                file.truncate(64 * 100)
            print("room again")
            capture.stop()
            assert "bytes of output could not be written here]\nroom again\n" in text_of(capture)
        assert streams.printed.count("\n") == 5001
        assert caplog.text.count("output.not_written") == 1


def test_a_missing_folder_or_a_directory_in_its_place_costs_no_print(tmp_path, caplog):
    with ordinary_streams() as streams:
        (tmp_path / "directory").mkdir()
        for path in (tmp_path / "missing" / "output.log", tmp_path / "directory"):
            capture = OutputCapture(path)
            capture.start()
            print("printed")
            capture.stop()
            assert capture.lost_bytes == len("printed\n")
        assert streams.printed == "printed\n" * 2
        assert not (tmp_path / "missing").exists()


def test_a_closed_terminal_raises_as_before_and_the_file_has_the_line(tmp_path):
    with captured(tmp_path) as (_, capture):
        sys.stdout.close()
        with pytest.raises(ValueError, match="closed"):
            print("into the void")
        capture.stop()
        assert text_of(capture).startswith("into the void")


def test_a_handler_of_a_signal_may_print(tmp_path):
    with ordinary_streams():
        capture = OutputCapture(tmp_path / "output.log")
        before = signal.signal(signal.SIGALRM, lambda *_: print("of the handler"))
        capture.start()
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        for index in range(3000):
            sys.stdout.write(f"line {index}\n")
        signal.setitimer(signal.ITIMER_REAL, 0)
        capture.stop()
        signal.signal(signal.SIGALRM, before)
        lines = text_of(capture).splitlines()
        assert [line for line in lines if line.startswith("line")] == [f"line {index}" for index in range(3000)]
        assert "of the handler" in lines


def test_a_line_costs_little(tmp_path):
    with ordinary_streams():
        capture = OutputCapture(tmp_path / "output.log")
        capture.start()
        seconds = []
        for _ in range(5):
            started = time.thread_time()
            for index in range(1000):
                print("step", index, "loss", 0.123)
            seconds.append((time.thread_time() - started) / 1000)
        capture.stop()
        assert min(seconds) < 100e-6


def test_the_traceback_of_a_failed_run_is_written_without_credentials(tmp_path):
    try:
        raise RuntimeError(f"refused {KEY}")
    except RuntimeError as error:
        path = write_error(tmp_path, error)
    assert path == tmp_path / "error.txt"
    text = path.read_text()
    assert "RuntimeError: refused <redacted>" in text
    assert "test_output.py" in text
