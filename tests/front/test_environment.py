"""The environment of a run is recorded without credentials, and no repository can run code or block it."""

import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from evsys_bus.front.environment import MAX_DIFF_BYTES, collect_environment

KEY = "sk-aB3dE6gH9jK2mN5pQ8sT1vW4xZ7"


def git(folder: Path, *arguments: str) -> str:
    settings = ["-c", "user.name=A", "-c", "user.email=a@example.com", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", *settings, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "train.py").write_text("lr = 1\n")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def install(folder: Path, name: str, source: str) -> Path:
    """Write a program of the shell."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{source}\n")
    path.chmod(0o755)
    return path


def test_what_is_known_of_a_process_and_its_machine_is_recorded():
    facts = collect_environment()
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["executable"] == sys.executable
    assert facts["pid"] == os.getpid()
    assert facts["host"] == socket.gethostname()
    assert facts["cpu_count"] == os.cpu_count()
    assert facts["memory_bytes"] > 1 << 20
    assert facts["packages"]["msgspec"]
    assert facts["working_directory"] == str(Path.cwd())
    json.dumps(facts)


def test_a_clean_repository(repository):
    git(repository, "remote", "add", "origin", "https://ann:hunter2@example.com/ann/project.git?token=abc")
    facts = collect_environment(folder=repository, timeout=10)
    assert facts["git"] == {
        "folder": str(repository),
        "commit": git(repository, "rev-parse", "HEAD"),
        "branch": "main",
        "dirty": False,
        "remote": "https://example.com/ann/project.git",
    }
    assert "diff" not in facts


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("git@github.com:ann/project.git", "git@github.com:ann/project.git"),
        ("ssh://git@example.com:22/p", "ssh://example.com:22/p"),
        (f"https://{KEY}@example.com/p", "https://example.com/p"),
        ("https://a:b@c@example.com/p", "https://example.com/p"),
        ("/srv/git/project", "/srv/git/project"),
    ],
)
def test_the_url_of_a_remote_has_no_credentials(repository, url, shown):
    git(repository, "config", "remote.upstream.url", url)
    assert collect_environment(folder=repository, timeout=10)["git"]["remote"] == shown


def test_what_differs_from_the_commit_is_returned_without_credentials(repository):
    (repository / "train.py").write_text(f"lr = 2\napi_key = '{KEY}'\n")
    facts = collect_environment(folder=repository / "", timeout=10)
    assert facts["git"]["dirty"] is True
    assert "-lr = 1\n+lr = 2\n" in facts["diff"]
    assert KEY not in facts["diff"]
    assert "diff_truncated" not in facts["git"]


def test_a_private_key_in_a_diff_is_redacted_as_a_whole(repository):
    lines = "".join(f"{index:04d}aBcDeFgHiJkLmNoPqRsTuVwXyZ\n" for index in range(1000))
    (repository / "train.py").write_text(
        f"-----BEGIN RSA PRIVATE KEY-----\n{lines}-----END RSA PRIVATE KEY-----\nend\n"
    )
    diff = collect_environment(folder=repository, timeout=10)["diff"]
    assert "aBcDeFgH" not in diff
    assert diff.endswith("\n+end\n")


def test_a_long_diff_is_bounded_and_has_whole_lines(repository):
    (repository / "train.py").write_text("".join(f"line {index}\n" for index in range(100_000)))
    facts = collect_environment(folder=repository, timeout=10)
    assert facts["git"]["diff_truncated"] is True
    assert MAX_DIFF_BYTES - 100 < len(facts["diff"]) <= MAX_DIFF_BYTES
    assert facts["diff"].endswith("\n")
    assert facts["diff"].splitlines()[-1].startswith("+line ")


def test_a_detached_head_has_no_branch_and_a_new_repository_no_commit(repository, tmp_path):
    git(repository, "checkout", "-q", "--detach")
    assert "branch" not in collect_environment(folder=repository, timeout=10)["git"]
    new = tmp_path / "new"
    new.mkdir()
    git(new, "init", "-q")
    assert collect_environment(folder=new, timeout=10)["git"] == {"folder": str(new)}


def test_the_index_is_not_written(repository):
    index = repository / ".git" / "index"
    os.utime(repository / "train.py", (1, 1))  # so that git would refresh it
    before = index.read_bytes()
    collect_environment(folder=repository, timeout=10)
    assert index.read_bytes() == before


@pytest.mark.parametrize(
    ("setting", "attribute"),
    [
        ("core.fsmonitor", ""),
        ("filter.evil.clean", "filter=evil"),
        ("filter.evil.process", "filter=evil"),
        ("diff.evil.textconv", "diff=evil"),
        ("diff.evil.command", "diff=evil"),
        ("diff.external", ""),
    ],
)
@pytest.mark.parametrize("place", ["repository", "submodule"])
def test_no_setting_of_a_repository_runs_code(repository, tmp_path, setting, attribute, place):
    marker = tmp_path / "it ran"
    program = install(tmp_path, "attack.sh", f"touch {shlex.quote(str(marker))}; cat")
    attacked = repository
    if place == "submodule":
        attacked = repository / "inner"
        git(repository, "init", "-q", "inner")
        (attacked / "train.py").write_text("lr = 1\n")
        git(attacked, "add", ".")
        git(attacked, "commit", "-q", "-m", "inner")
        git(repository, "add", "inner")
        git(repository, "commit", "-q", "-m", "with inner")
    git(attacked, "config", setting, str(program))
    if attribute:
        (attacked / ".gitattributes").write_text(f"* {attribute}\n")
    (repository / "train.py").write_text("lr = 3\n")
    (attacked / "train.py").write_text("lr = 3\n")
    subprocess.run(["git", "diff", "HEAD"], cwd=repository, capture_output=True, check=False)
    assert marker.exists() or place == "submodule"  # git itself runs it
    marker.unlink(missing_ok=True)
    facts = collect_environment(folder=repository, timeout=10)
    assert not marker.exists()
    assert facts["git"]["dirty"] is True
    assert "+lr = 3" in facts["diff"]


def test_a_filter_that_cannot_be_turned_off_costs_the_diff_only(repository, tmp_path):
    marker = tmp_path / "it ran"
    program = install(tmp_path, "attack.sh", f"touch {shlex.quote(str(marker))}; cat")
    git(repository, "config", "filter.a=b.clean", str(program))
    (repository / ".gitattributes").write_text("* filter=a=b\n")
    (repository / "train.py").write_text("lr = 3\n")
    facts = collect_environment(folder=repository, timeout=10)
    assert facts["git"]["commit"]
    assert "diff" in facts["missing"]
    assert not marker.exists()


def test_variables_of_git_do_not_lead_elsewhere(repository, tmp_path, monkeypatch):
    marker = tmp_path / "it ran"
    program = install(tmp_path, "attack.sh", f"touch {shlex.quote(str(marker))}")
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", str(program))
    monkeypatch.setenv("GIT_DIR", "/nonexistent")
    (repository / "train.py").write_text("lr = 3\n")
    assert collect_environment(folder=repository, timeout=10)["git"]["dirty"] is True
    assert not marker.exists()


def test_a_repository_of_another_user_or_a_broken_one_is_left_alone(repository):
    (repository / ".git" / "config").write_text("[core\nbroken")
    assert "git" not in collect_environment(folder=repository, timeout=10)
    (repository / ".git" / "config").write_text("[core]\n\trepositoryformatversion = 0\n")
    if os.geteuid() == 0:
        for path in (repository, repository / ".git"):
            os.chown(path, 12345, 12345)
        assert "git" not in collect_environment(folder=repository, timeout=10)


def test_a_folder_outside_of_a_repository_or_none_at_all_has_no_git(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        facts = collect_environment(folder=folder)
        assert "git" not in facts
        assert "missing" not in facts


def test_programs_that_never_answer_are_killed_in_time(repository, tmp_path, monkeypatch):
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("git", "nvidia-smi"):
        install(programs, name, f"echo $$ >> {shlex.quote(str(tmp_path / 'pids'))}; sleep 1000 & sleep 1000")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    started = time.monotonic()
    facts = collect_environment(folder=repository, timeout=1.0)
    assert time.monotonic() - started < 5
    assert facts["missing"]["gpus"] == "nvidia-smi did not answer"
    assert facts["packages"]
    killed = (tmp_path / "pids").read_text().split()
    assert len(killed) >= 2
    rows: list[list[str]] = []  # state, parent, process group
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            rows.append(path.read_text().rpartition(")")[2].split())
    assert [row for row in rows if row[2] in killed and row[0] != "Z"] == []


def test_a_program_that_prints_without_end_is_cut(repository, tmp_path, monkeypatch):
    programs = tmp_path / "programs"
    programs.mkdir()
    install(programs, "nvidia-smi", "yes 'A GPU, GPU-1, 81559, 550.1'")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    assert "gpus" not in collect_environment(folder=repository, timeout=10)


def test_gpus_are_listed(tmp_path, monkeypatch):
    install(tmp_path, "nvidia-smi", "echo 'NVIDIA H100, GPU-1, 81559, 550.1'; echo 'NVIDIA H100, GPU-2, [N/A], 550.1'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert collect_environment(folder=tmp_path, timeout=10)["gpus"] == [
        {"name": "NVIDIA H100", "uuid": "GPU-1", "memory_mib": 81559, "driver": "550.1"},
        {"name": "NVIDIA H100", "uuid": "GPU-2", "memory_mib": None, "driver": "550.1"},
    ]


def test_the_ids_of_schedulers_are_recorded_and_no_other_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("POD_NAME", f"pod {KEY}")
    monkeypatch.setenv("MY_API_KEY", "hunter22hunter22")
    facts = collect_environment(folder=tmp_path)
    assert facts["ids"]["SLURM_JOB_ID"] == "4711"
    assert (facts["ids"]["RANK"], facts["ids"]["WORLD_SIZE"]) == ("3", "8")
    assert KEY not in repr(facts)
    assert "hunter22" not in repr(facts)


def test_the_command_line_is_redacted(tmp_path):
    source = "import json; from evsys_bus.front.environment import collect_environment as c; print(json.dumps(c()))"
    arguments = ["--api-key", "hunter22hunter", f"--url=https://a:{KEY}@example.com", "--lr", "0.1", "x" * 100_000]
    command = [sys.executable, "-c", source, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    shown = json.loads(done.stdout)["command"]
    assert shown[0] == sys.executable
    assert shown[3:] == [
        *("--api-key", "<redacted>", "--url=https://a:<redacted>@example.com", "--lr", "0.1", "<100000 characters>")
    ]


def test_a_working_directory_that_was_removed_costs_nothing_else(tmp_path):
    folder = tmp_path / "gone"
    folder.mkdir()
    source = (
        "import os, json\nfrom evsys_bus.front.environment import collect_environment as c\nos.rmdir(os.getcwd())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{source}print(json.dumps(c()))"],
        check=True,
        capture_output=True,
        text=True,
        cwd=folder,
    )
    facts = json.loads(done.stdout)
    assert facts["packages"]
    assert "working_directory" not in facts


def longest_pause() -> float:
    """How long this thread could not run while another one collected the environment."""
    facts = []
    thread = threading.Thread(target=lambda: facts.append(collect_environment()))
    longest, last = 0.0, time.perf_counter()
    thread.start()
    while thread.is_alive():
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    assert facts
    return longest


def test_other_threads_go_on_while_it_is_collected():
    assert min(longest_pause() for _ in range(3)) < 0.2  # generous: other programs pause this one too


def test_its_import_loads_no_large_module():
    source = """
import sys
from evsys_bus import EventBus, TrainingLoop
before = set(sys.modules)
import evsys_bus.front.environment
assert not {"subprocess", "importlib.metadata", "platform"} & set(sys.modules) - before
"""
    subprocess.run([sys.executable, "-c", source], check=True)
