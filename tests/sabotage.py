"""Apply each breakage of sabotage.toml to a copy of the tree, and check that the tests of the promise fail.

usage: uv run python tests/sabotage.py [WORD ...]     only breakages whose name or function contains one of the words

A breakage replaces the body of one function. The new body may call the original function as ``original(...)``, without
``self`` in a method. A breakage that no test catches is a promise without a test.
"""

import ast
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import tomllib

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE_ROOTS = {"evsys_bus": ".", "evsys_adapters": "adapters"}
"""The directory that contains each package, relative to the tree."""
IGNORED = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "runs", "dist")
TIMEOUT_SECONDS = 120

Function = ast.FunctionDef | ast.AsyncFunctionDef


def breakages() -> list[dict[str, str]]:
    """Return all breakages."""
    return tomllib.loads((ROOT / "tests" / "sabotage.toml").read_text(encoding="utf-8"))["breakage"]


def source_path_of(function: str) -> pathlib.Path:
    """Return the file of a function such as ``evsys_bus.delivery.courier:Courier.run``, relative to the tree."""
    module = function.partition(":")[0]
    path = pathlib.Path(PACKAGE_ROOTS[module.partition(".")[0]], *module.split("."))
    return path / "__init__.py" if (ROOT / path).is_dir() else path.with_suffix(".py")


def find_function(tree: ast.Module, function: str) -> tuple[Function, bool]:
    """Return the definition of the function, and whether it is a method.

    Raises:
        LookupError: There is no such function.
    """
    *classes, name = function.partition(":")[2].split(".")
    scope: ast.Module | ast.ClassDef = tree
    for each in classes:
        scope = next((node for node in scope.body if isinstance(node, ast.ClassDef) and node.name == each), tree)
        if scope is tree:
            raise LookupError(f"there is no class {each} in {function}")
    for node in scope.body:
        if isinstance(node, Function) and node.name == name:
            return node, bool(classes)
    raise LookupError(f"there is no function {function}")


class _OriginalCalls(ast.NodeTransformer):
    """Makes ``original`` refer to the original function."""

    def __init__(self, original_name: str, owner: str | None) -> None:
        self.original_name, self.receiver = original_name, owner
        self.used = False

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id != "original":
            return node
        self.used = True
        if self.receiver is None:
            return ast.Name(self.original_name)
        return ast.Attribute(ast.Name(self.receiver), self.original_name)


def apply_breakage(text: str, function: str, body: str) -> str:
    """Return the source with the body of the function replaced.

    Raises:
        LookupError: There is no such function.
        SyntaxError: The body is not valid Python.
    """
    tree = ast.parse(text)
    node, is_method = find_function(tree, function)
    lines = text.splitlines(keepends=True)
    first = min([node.lineno, *(each.lineno for each in node.decorator_list)]) - 1
    original_source = "".join(lines[first : node.end_lineno])
    original_name = f"_original_{node.name.strip('_')}"
    receiver = node.args.args[0].arg if is_method and node.args.args else None
    original = _OriginalCalls(original_name, receiver)
    # Parsed in a function, because it may contain `return` and `await`.
    [wrapped] = ast.parse("async def body():\n" + textwrap.indent(body, "    ")).body
    assert isinstance(wrapped, ast.AsyncFunctionDef)
    node.body = [original.visit(each) for each in wrapped.body]
    after = textwrap.indent(ast.unparse(ast.fix_missing_locations(node)), " " * node.col_offset) + "\n"
    if original.used:
        after += "\n" + re.sub(rf"\bdef {node.name}\b", f"def {original_name}", original_source, count=1)
    return "".join([*lines[:first], after, *lines[node.end_lineno :]])


def run_breakage(breakage: dict[str, str]) -> tuple[bool, str]:
    """Return whether its tests caught it, and the first failed test, or what went wrong."""
    with tempfile.TemporaryDirectory() as directory:
        tree = pathlib.Path(directory, "tree")
        shutil.copytree(ROOT, tree, ignore=IGNORED, symlinks=True)
        path = tree / source_path_of(breakage["function"])
        try:
            path.write_text(
                apply_breakage(path.read_text(encoding="utf-8"), breakage["function"], breakage["body"]),
                encoding="utf-8",
            )
        except (LookupError, OSError, SyntaxError) as error:
            return False, f"OUT OF DATE: {error}"
        # The copy is first on the path, before the installed project.
        environment = os.environ | {"PYTHONPATH": f"{tree}{os.pathsep}{tree / 'adapters'}"}
        tests = "-m pytest -q -x -n 0 -p no:cacheprovider --tb=line".split()
        command = [sys.executable, *tests, "-m", "", *breakage["tests"].split()]  # long ones too
        try:
            done = subprocess.run(
                command, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return True, "it hangs"
    if done.returncode == 0:
        return False, "NOT CAUGHT"
    failed = re.search(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    if failed is not None:
        return True, failed[1]
    # If a test hangs in a thread, pytest-timeout ends the whole process.
    hangs = "Timeout" in done.stdout + done.stderr
    return hangs, "it hangs" if hangs else f"BROKEN RUN\n{done.stdout}{done.stderr}"


def main() -> int:
    """Run the breakages one at a time; the exit code is 1 if one was not caught."""
    words = sys.argv[1:]
    selected = [
        each for each in breakages() if not words or any(word in each["name"] + each["function"] for word in words)
    ]
    caught = 0
    for breakage in selected:
        started = time.monotonic()
        is_caught, what = run_breakage(breakage)
        caught += is_caught
        state = "caught" if is_caught else "MISSED"
        print(f"{state}  {time.monotonic() - started:5.1f} s  {breakage['name']}\n        {what}", flush=True)
    print(f"{caught} of {len(selected)} caught")
    return int(caught < len(selected))


if __name__ == "__main__":
    sys.exit(main())
