"""The short form of `changing.py`, in a process of its own for a crash is what it looks for; the long form is its
command.
"""

import subprocess
import sys

from support import TESTS


def test_rows_that_another_thread_changes_while_they_are_published_are_all_on_record(tmp_path):
    command = [sys.executable, "-X", "faulthandler", str(TESTS / "changing.py")]
    rows = 4_000
    done = subprocess.run(
        [*command, "--rows", str(rows), "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=18,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    words = done.stdout.splitlines()[-1].split()
    assert words[:2] == ["rows", f"{rows:,}"]
    assert words[-2:] == ["lost", "0"]
    assert int(words[4].replace(",", "")) > rows // 2  # the other thread was at it
