"""Plant each one-line breakage of sabotage.toml in a copy of the tree, and see the tests that guard it go red.

usage: uv run python tests/sabotage.py [WORD …]     only breakages whose name holds one of the words

A breakage that no test notices is a promise without a guard; one whose text is not found any more is out of date.
"""

import concurrent.futures
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import tomllib

ROOT = pathlib.Path(__file__).parent.parent
IGNORED = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "runs", "dist")


def verdict(breakage: dict[str, str]) -> str:
    """What happened: "caught", or what is wrong."""
    with tempfile.TemporaryDirectory() as directory:
        tree = pathlib.Path(directory, "tree")
        shutil.copytree(ROOT, tree, ignore=IGNORED, symlinks=True)
        path = tree / breakage["file"]
        text = path.read_text(encoding="utf-8")
        if text.count(breakage["find"]) != 1:
            return f"OUT OF DATE: {text.count(breakage['find'])} places in {breakage['file']} read {breakage['find']!r}"
        path.write_text(text.replace(breakage["find"], breakage["put"]), encoding="utf-8")
        # The copy comes first on the path, before the installed project.
        environment = os.environ | {"PYTHONPATH": f"{tree}{os.pathsep}{tree / 'adapters'}"}
        tests = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            *breakage["tests"].split(),
        ]
        try:
            done = subprocess.run(
                tests, cwd=tree, env=environment, capture_output=True, text=True, timeout=300, check=False
            )
        except subprocess.TimeoutExpired:
            return "caught (it hangs)"
        if done.returncode == 1:
            return "caught"
        return "NOT NOTICED" if done.returncode == 0 else f"BROKEN RUN\n{done.stdout}{done.stderr}"


def main() -> int:
    """Run them, two at a time; the exit code is the number that went wrong."""
    breakages = tomllib.loads((ROOT / "tests" / "sabotage.toml").read_text(encoding="utf-8"))["breakage"]
    words = sys.argv[1:]
    chosen = [each for each in breakages if not words or any(word in each["name"] for word in words)]
    wrong = 0
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for breakage, outcome in zip(chosen, pool.map(verdict, chosen), strict=True):
            wrong += not outcome.startswith("caught")
            print(f"{outcome:20s} {breakage['name']}", flush=True)
    print(f"{len(chosen) - wrong} of {len(chosen)} caught")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
