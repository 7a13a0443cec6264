"""The rules that keep the listing readable, as code."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sabotage

import evsys_bus
from support import ROOT
from support.sources import source_trees

PUBLIC = """
    Alert ArmResult BatchResult BatchTooLargeError BenchmarkEval Callback CallbackSpec Checkpoint ConfigUpdate
    Content ContentItem DeliveryError Envelope Environment EpochEnd Eval EvalResult Event EventBus EvsysBusError
    Experiment ExperimentEnd ExperimentResult ExperimentStart GroupStart Health LogContext LoopArtifacts LoopState
    ManifestRow Metrics ParkedError RawRecord Receipt RecordedRun RejectedError RetryLaterError Rewindable Rollout
    Run RunAnnotated RunEnd RunNotFoundError RunResult RunResumer RunStart Sink StepEnd Summary TrainData TrainEnd
    TrainStart TrainingBatch TrainingLoop build_callbacks current_run dispatch follow read read_runs
    register_callback register_sink run
""".split()

WALLS = {  # where `except Exception`, or wider, stands, and what is behind it
    "evsys_bus/callback.py": "hooks",
    "evsys_bus/bus/callback_marks.py": "what callbacks make of their marks; code of what stands in a step",
    "evsys_bus/bus/recorder.py": "code of what stands in a state",
    "evsys_bus/journal/maintenance.py": "a round of upkeep; the next one tries again",
    "evsys_bus/adapter.py": "copying what an adapter was constructed with",
    "evsys_bus/events.py": "the code of a step that is no int",
    "evsys_bus/front/environment.py": "the collection of a part; drivers",
    "evsys_bus/front/media.py": "code of values",
    "evsys_bus/front/output.py": "a program's streams",
    "evsys_bus/front/rows.py": "an interrupt of a publish, raised again",
    "evsys_bus/front/run.py": "the code of a step that is no int; entering, raised again",
    "evsys_bus/bus/event_bus.py": "the steps of the end: the next one follows; entering, raised again",
    "evsys_bus/bus/publisher.py": "an interrupt, raised once all is settled; recording behind a publish",
    "evsys_bus/bus/lifecycle.py": "Ctrl-C while signals are let go, raised again; close and settle_owed of callbacks",
    "evsys_bus/bus/watchdog.py": "its looks; the next ones follow",
    "evsys_bus/tasks/calls.py": "a sink's calls, as a value; the training, and Ctrl-C while one waits, raised again",
    "evsys_bus/tasks/loops.py": "Ctrl-C while a loop is begun; raised again",
    "evsys_bus/tasks/manager.py": "who is told of a task's end",
    "evsys_bus/journal/writer.py": "opening; raised again",
    "evsys_bus/delivery/supervisor.py": "starting a process; its thread; writing what became of it",
    "evsys_bus/bench/dispatch.py": "the reference dispatch, as it is",
    "evsys_bus/bus/delivery_log.py": "what stands in the couriers' log; the program's streams and handlers",
    "evsys_bus/bus/delivery_manager.py": "looks at files and couriers; what cannot be read is unknown",
    "evsys_bus/delivery/status_recorder.py": "files and streams of status records; deliveries continue",
    "evsys_bus/delivery/courier.py": "a receiver: opening it is raised again; taking and marking are tried again",
    "evsys_bus/delivery/callback_receiver.py": "followed hooks",
    "evsys_bus/delivery/process_log.py": "code of what is logged",
    "evsys_bus/testing/conformance_checks.py": "the adapter under test; its tasks",
    "evsys_bus/tasks/daemon_executor.py": "a call on another thread; raised where it is awaited",
    "evsys_bus/diagnostics.py": "handlers and filters of the host's logging",
    "evsys_bus/cli/__init__.py": "the outermost: errors become exit codes",
    "evsys_bus/codec/event_fields.py": "code of values",
    "evsys_bus/codec/normalize.py": "code of values",
    "evsys_bus/codec/encode.py": "code of values",
    "evsys_bus/codec/wire_types.py": "code of a host's handles and state, and in annotations; a stranger's str",
    "evsys_bus/codec/decode.py": "code of the types that values are decoded to",
    "evsys_bus/codec/step_template.py": "code of values",
    "evsys_bus/run_files.py": "the text of a stranger's exception",
    "evsys_bus/training/run_executor.py": "a run of an experiment; benchmarks after training; its close",
    "evsys_bus/training/loop.py": "evaluators; and TrainEnd also when the loop raised",
    "evsys_bus/delivery/courier_pool.py": "building an adapter; a delivery that broke down; writing that down",
    "evsys_bus/config/subscription_builder.py": "a plugin's import, Config and constructor; a stranger's equality",
    "evsys_bus/config/experiment.py": "a recipe's module, its Config and its annotation",
    "evsys_bus/config/registry.py": "a plugin's import",
    "adapters/evsys_adapters/bridges/_base.py": "hooks that a framework calls: no training ends because of them",
    "adapters/evsys_adapters/bridges/_content.py": "an array of a type that nobody has foreseen",
    "adapters/evsys_adapters/common/hook_arguments.py": "the look-up of a stranger",
    "adapters/evsys_adapters/dashboard/server/imports.py": "an import; the next one follows",
    "adapters/evsys_adapters/dashboard/server/ingest.py": "events that cannot be stored; the others are",
    "adapters/evsys_adapters/dashboard/server/live.py": "a round of live views; the next one follows",
    "adapters/evsys_adapters/debug_logger.py": "the repr of a stranger",
    "adapters/evsys_adapters/print_progress.py": "the number of a stranger",
    "adapters/evsys_adapters/common/terminal.py": "the str of a stranger",
}

BREAKAGES = sabotage.breakages()


def test_imports_never_point_up():
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports"))], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_public_names_are_these():
    assert sorted(evsys_bus.__all__) == sorted(PUBLIC)
    for each in evsys_bus.__all__:
        assert getattr(evsys_bus, each).__module__.startswith("evsys_bus.")


def private_names(path: Path) -> set[str]:
    """The private names that a file imports or reads from anything but ``self``; those of os and sys are documented."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in {"self", "cls", "os", "sys"}:
            found.append(node.attr)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found += (getattr(node, "module", None) or "").split(".")
            found += [part for each in node.names for part in each.name.split(".")]
    return {each for each in found if re.match("_[a-z]", each)}


def test_tests_touch_no_private_names():
    found = {path.relative_to(ROOT).as_posix(): private_names(path) for path in (ROOT / "tests").rglob("*.py")}
    assert {path: names for path, names in found.items() if names} == {}


def test_a_file_has_at_most_about_600_lines():
    lengths = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in source_trees()}
    assert {name: length for name, length in lengths.items() if length > 620} == {}


def test_a_file_says_what_it_owns():
    assert [name for name, tree in source_trees().items() if not ast.get_docstring(tree)] == []


def test_tasks_start_in_the_room_for_tasks_only():
    starts = {"create_task", "ensure_future", "gather", "run_coroutine_threadsafe"}
    found = {
        (name, node.func.attr)
        for name, tree in source_trees().items()
        if not (name.startswith("evsys_bus/tasks/") or "/bench/" in name)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in starts
    }
    assert found == set()


def test_the_list_of_walls_is_no_longer_than_it_must_be():
    for each in WALLS:
        assert (
            "except Exception" in (text := (ROOT / each).read_text())
            or "except BaseException" in text
            or "except (Exception" in text
        )


def is_wide(kind: ast.expr | None) -> bool:
    """Whether an except clause for this catches everything."""
    names = {node.id for node in ast.walk(kind) if isinstance(node, ast.Name)} if kind else {"Exception"}
    return bool({"Exception", "BaseException"} & names)


def test_everything_is_caught_at_the_known_walls_only():
    found = {
        (name, node.lineno)
        for name, tree in source_trees().items()
        if name not in WALLS
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and is_wide(node.type)
    }
    assert found == set()


def test_no_file_is_named_after_a_library_or_a_module_of_python():
    taken = set(sys.stdlib_module_names) | {"anyio", "msgspec", "structlog", "uvloop", "click", "rich", "wandb"}
    paths = [Path(name) for name in source_trees() if Path(name).parent.name != "bridges"]
    assert [path for path in paths if path.stem != "__init__" and path.stem in taken - {"signals"}] == []


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda each: each["name"])
def test_a_planned_breakage_finds_its_function_and_its_tests(breakage):
    text = (ROOT / sabotage.source_path_of(breakage["function"])).read_text(encoding="utf-8")
    ast.parse(sabotage.apply_breakage(text, breakage["function"], breakage["body"]))
    named = [each.split("::") for each in breakage["tests"].split() if each.startswith("tests/")]
    assert named
    for file, *test in named:
        tests = (ROOT / file).read_text(encoding="utf-8")
        for each in test:
            assert re.search(rf"^ *(async )?def {re.escape(each.partition('[')[0])}\(", tests, re.MULTILINE), each


def test_planned_breakages_have_names_of_their_own():
    names = [each["name"] for each in BREAKAGES]
    assert len(names) == len(set(names))


def test_nothing_that_git_tracks_names_a_place_outside():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert "uv.lock" not in tracked
    for each in tracked:
        path = ROOT / each
        if path.is_file() and path.suffix in {".py", ".md", ".toml", ".yaml", ""} and path != Path(__file__):
            text = path.read_text(encoding="utf-8", errors="replace")
            assert "../shared" not in text, each
            assert "/work/" not in text, each
