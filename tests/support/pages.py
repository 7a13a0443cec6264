"""Runs the Python snippets of a page of the docs, and the examples, as a reader would."""

import json
import os
import re
import subprocess
import sys
from itertools import zip_longest

_FENCE = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

_RUN_PAGE = """
import ast, asyncio, contextlib, io, json, sys, warnings
import stamina.instrumentation
stamina.instrumentation.set_on_retry_hooks([])  # what it prints of itself has the time in it
space = {"__name__": "__main__"}
warned = []
if sys.argv[1:] == ["--collect-deprecations"]:
    warnings.simplefilter("always", DeprecationWarning)
    warnings.showwarning = lambda message, category, *_: warned.append((category.__name__, str(message)))
for name, source, expected in json.load(sys.stdin):
    code = compile(source, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)  # as a notebook does
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        awaitable = eval(code, space)
        if awaitable is not None:
            asyncio.run(awaitable)
    assert printed.getvalue() == expected, f"{name} printed:\\n{printed.getvalue()}"
print(json.dumps(warned))
"""


def run_without_warnings(cwd, *arguments, **options):
    """Run a Python program that warns of nothing and ends well; return what it printed."""
    finished = subprocess.run(
        [sys.executable, "-W", "error", *map(str, arguments)],
        capture_output=True,
        check=False,
        cwd=cwd,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        encoding="utf-8",
        timeout=18,
        **options,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    return finished.stdout


def snippets(page):
    """Each Python block of a page, with the text block right below it, which is what it prints."""
    text = page.read_text(encoding="utf-8")
    found = list(_FENCE.finditer(text))
    for fence, below in zip_longest(found, found[1:]):
        if fence[1] == "python":
            line = text.count("\n", 0, fence.start()) + 1
            prints = below is not None and below[1] == "text" and below.start() == fence.end() + 1
            yield f"{page.name}:{line}", "\n" * line + fence[2], below[2] if prints else ""


def run_blocks(cwd, blocks, *, collect_deprecations=False):
    """Run the blocks of one page, one after another, and compare what each prints.

    Returns the deprecations as pairs of category and text; any other warning is an error.
    """
    option = ["--collect-deprecations"] if collect_deprecations else []
    printed = run_without_warnings(cwd, "-c", _RUN_PAGE, *option, input=json.dumps(list(blocks)))
    return json.loads(printed)
