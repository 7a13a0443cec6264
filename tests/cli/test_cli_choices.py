"""Which adapter, and which run, a command line or a file means; and what is missing here for it."""

import json
import shutil
import subprocess
import sys

import pytest

from evsys_bus import Checkpoint, EventBus, LogContext, LoopState, ManifestRow, StepEnd, TrainingBatch
from evsys_bus.config import callback_kinds

PARAMS = {
    "checkpoint_upload": ["url=file://{here}/bucket"],
    "wandb_logger": ["project=digits"],
    "csv_metrics": ["out_path={here}/metrics.csv"],
}
"""What a kind needs to be told."""
CANNOT_FOLLOW = {"early_stopping"}
"""What stops runs."""
KINDS = [kind for kind, origin in callback_kinds().items() if origin.packages and kind not in CANNOT_FOLLOW]


def hidden(*packages):
    """What a process runs first, in which these are not installed."""
    return (
        "import sys, importlib.metadata as m; version = m.version\n"
        f"def of(name):\n if name in {packages!r}: raise m.PackageNotFoundError(name)\n return version(name)\n"
        "m.version = of\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in packages)
    )


def without(*packages, command, cwd):
    """The command in a process in which these packages are not installed."""
    program = f"{hidden(*packages)}\nfrom evsys_bus.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, command)], capture_output=True, text=True, check=False, cwd=cwd
    )


@pytest.fixture
def recorded(tmp_path):
    """A closed journal with a few steps and a checkpoint, of a run below ./runs."""
    experiment = tmp_path / "runs" / "digits"
    run_dir = experiment / "wide-s0"
    (run_dir / "checkpoints").mkdir(parents=True)
    weights = run_dir / "checkpoints" / "weights.bin"
    weights.write_bytes(b"weights")
    (run_dir / "metrics.jsonl").touch()
    ctx = LogContext(experiment, run_key="wide-s0")
    state = LoopState(step=0, num_steps=4, output_dir=run_dir, ctx=ctx)
    with EventBus([], journal=experiment / "journal") as bus:
        for step in range(3):
            bus.publish(StepEnd(state, step, TrainingBatch(), {"loss": 1.0}))
        bus.publish(Checkpoint(state, ManifestRow("step-000002", batch=2, state_path=str(weights))))
    return experiment


def params(kind, tmp_path):
    sets = [each.format(here=tmp_path) for each in PARAMS.get(kind, [])]
    return [word for each in sets for word in ("--set", each)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_can_be_replayed_into_every_kind_of_adapter(evsys_bus, tmp_path, recorded, kind):
    code, out, err = evsys_bus("replay", recorded, "--to", kind, *params(kind, tmp_path), "--dry-run", "--json")
    assert code == 0, err
    assert json.loads(out)["adapter"] == kind


def test_a_run_followed_and_replayed_into_checkpoint_upload_has_its_checkpoints_there(evsys_bus, tmp_path, recorded):
    for number, command in enumerate(("follow", "replay")):
        bucket = tmp_path / f"bucket-{number}"
        code, out, err = evsys_bus(command, recorded, "--to", "checkpoint_upload", "--set", f"url=file://{bucket}")
        assert code == 0, err
        assert "sent 4" in out
        assert (bucket / "wide-s0" / "step-000002" / "manifest.json").is_file()


@pytest.fixture
def uploaded(evsys_bus, tmp_path, recorded):
    """Where the checkpoint of the run is, besides."""
    url = f"file://{tmp_path}/bucket"
    assert evsys_bus("follow", recorded, "--to", "checkpoint_upload", "--set", f"url={url}")[0] == 0
    return url


@pytest.mark.parametrize("asked", ["digits/wide-s0", "wide-s0", "runs/digits/wide-s0"])
def test_fetch_puts_a_run_that_is_named_into_its_own_folder(evsys_bus, tmp_path, uploaded, asked):
    code, out, err = evsys_bus("fetch", asked)
    assert code == 0, err
    assert [str(each) for each in (tmp_path / "runs").iterdir()] == [f"{tmp_path}/runs/digits"]
    assert (tmp_path / out.strip()).read_bytes() == b"weights"
    assert (tmp_path / out.strip()).is_relative_to(tmp_path / "runs/digits/wide-s0/fetched")


@pytest.mark.parametrize("asked", ["runs/digits", "runs/digits/journal"])
def test_fetch_of_a_journal_with_one_run_means_that_run(evsys_bus, tmp_path, uploaded, asked):
    code, out, err = evsys_bus("fetch", asked)
    assert code == 0, err
    assert (tmp_path / out.strip()).is_relative_to(tmp_path / "runs/digits/wide-s0/fetched")


def test_fetch_on_a_new_machine_puts_a_run_where_its_name_says(evsys_bus, tmp_path, uploaded):
    shutil.rmtree(tmp_path / "runs")
    code, _, err = evsys_bus("fetch", "digits/wide-s0", "--from", uploaded)
    assert code == 0, err
    assert (tmp_path / "runs/digits/wide-s0/fetched").is_dir()
    assert [each.name for each in (tmp_path / "runs").iterdir()] == ["digits"]


def test_fetch_of_an_experiment_names_its_runs(evsys_bus, recorded, uploaded):
    page = {"name": "digits", "status": "completed", "runs": {"wide-s0": {"arm": "wide", "seed": 0}}}
    (recorded / "experiment.json").write_text(json.dumps(page))
    code, _, err = evsys_bus("fetch", "digits")
    assert code == 2
    assert "digits is an experiment; name a run: digits/wide-s0" in err


RECIPE = "def recipe(params, run):\n    raise NotImplementedError\n"
S3 = "{kind: checkpoint_upload, params: {url: s3://bucket/x}}"


@pytest.fixture
def check(tmp_path):
    """``check`` of a file with these callbacks where some packages are not installed."""
    (tmp_path / "toy_recipe.py").write_text(RECIPE)

    def command(*callbacks, lacking=()):
        head = "name: x\nrecipe: toy_recipe:recipe\nruns: {a: {}}\ncallbacks:\n"
        (tmp_path / "x.yaml").write_text(head + "".join(f"  - {each}\n" for each in callbacks))
        return without(*lacking, command=["check", "x.yaml"], cwd=tmp_path)

    return command


def test_check_tells_everything_that_is_missing_for_adapters_in_one_pass(check):
    wandb = "{kind: wandb_logger, params: {project: digits, entiti: me}}"
    prune = "{kind: checkpoint_prune, params: {url: s3://bucket/x}}"
    done = check(wandb, S3, prune, lacking=["wandb", "aiobotocore"])
    assert done.returncode == 3
    assert done.stderr.endswith("\n4 errors\n")
    assert done.stderr.count("error[EB106]") == 3
    assert '"wandb_logger" has no param "entiti"' in done.stderr
    assert "x.yaml:5:12   $.callbacks[0].kind" in done.stderr
    assert "x.yaml:6:31   $.callbacks[1].params" in done.stderr
    assert 'fix: pip install "evsys-bus[wandb]"   or: uv add "evsys-bus[wandb]"' in done.stderr
    assert done.stderr.count('fix: pip install "evsys-bus[s3]"   or: uv add "evsys-bus[s3]"') == 2
    assert check(S3, "{kind: wandb_logger, params: {project: digits}}").returncode == 0


@pytest.mark.parametrize("kind", ["checkpoint_upload", "checkpoint_prune"])
@pytest.mark.parametrize("url", ["gs://bucket/x", "s3:///x", "file://host/x", "S4://bucket"])
def test_check_refuses_a_url_that_names_no_object_store(check, kind, url):
    done = check(f"{{kind: {kind}, params: {{url: '{url}'}}}}")
    assert done.returncode == 2, done
    assert "error[EB103]" in done.stderr
    assert "$.callbacks[0].params.url" in done.stderr


def test_adapters_marks_a_kind_whose_extra_is_missing_and_how_to_install_it(tmp_path):
    done = without("wandb", command=["adapters"], cwd=tmp_path)
    lines = done.stdout.splitlines()
    [at] = [index for index, line in enumerate(lines) if line.startswith("wandb_logger")]
    assert lines[at + 1].strip() == (
        '! not installed: wandb   pip install "evsys-bus[wandb]"   or: uv add "evsys-bus[wandb]"'
    )
    assert done.stdout.count("not installed") == 1
    rows = [
        json.loads(line)
        for line in without("wandb", command=["adapters", "--json"], cwd=tmp_path).stdout.split("\n")
        if line
    ]
    assert [row["kind"] for row in rows if row.get("missing")] == ["wandb_logger"]


def test_the_help_of_adapters_loads_no_more_than_that_of_any_other_command(tmp_path):
    heavy = {"msgspec", "evsys_bus.config", "evsys_bus.errors"}
    program = f"import atexit, sys; atexit.register(lambda: print({heavy} & set(sys.modules)))\n"
    program += "from evsys_bus.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "adapters", "--help"], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1] == "set()"
