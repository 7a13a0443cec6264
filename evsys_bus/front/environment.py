"""Where and with what a run was started: code, command, packages, machine, GPUs, and the ids that schedulers give.

Everything is imported where it is used, since the module is imported with the front door. No shell is started, and git
is run so that nothing in a repository's configuration can run code.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from evsys_bus.codec.redact import redact, redact_text

if TYPE_CHECKING:
    import subprocess

MAX_DIFF_BYTES: Final = 256 * 1024
MAX_PACKAGES: Final = 2000
_MAX_TEXT_CHARS: Final = 1024
_MAX_ARGUMENTS: Final = 1000
_MAX_ARGUMENT_CHARS: Final = 16 * 1024
_MAX_SMALL_FILE_BYTES: Final = 4096
_MAX_FILTER_SETTINGS: Final = 400
_NO_LIMIT_BYTES: Final = 1 << 60
"""A limit of memory above this is none."""
_PIECE_CHARS: Final = 16 * 1024
_KILL_SECONDS: Final = 0.2

_ID_VARIABLES: Final = (
    "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK NODE_RANK MASTER_ADDR MASTER_PORT "
    "TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE PMI_RANK PMI_SIZE "
    "SLURM_JOB_ID SLURM_JOB_NAME SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID SLURM_STEP_ID SLURM_PROCID SLURM_LOCALID "
    "SLURM_NODEID SLURM_NNODES SLURM_NTASKS SLURM_JOB_PARTITION SLURM_JOB_NODELIST SLURM_CLUSTER_NAME "
    "SLURM_RESTART_COUNT SLURMD_NODENAME PBS_JOBID LSB_JOBID AWS_BATCH_JOB_ID AWS_BATCH_JOB_ARRAY_INDEX "
    "TRAINING_JOB_NAME CLOUD_ML_JOB_ID POD_NAME POD_NAMESPACE POD_UID NODE_NAME JOB_COMPLETION_INDEX RAY_JOB_ID "
    "RAY_NODE_ID RAY_WORKER_ID RAY_CLUSTER_NAME CUDA_VISIBLE_DEVICES"
)
"""Variables that schedulers and launchers set. No others are read: any may hold a credential."""

_GIT_SETTINGS: Final = {
    "core.fsmonitor": "false",  # a program that git asks for changed files
    "core.hooksPath": os.devnull,
    "core.untrackedCache": "false",
    "diff.autoRefreshIndex": "false",  # the index is the user's
    "safe.bareRepository": "explicit",  # a folder in a repository may look like one, with a configuration of its own
    "protocol.allow": "never",  # missing objects are fetched from the servers in the configuration
}
_GIT_VARIABLES: Final = {
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_ALLOW_PROTOCOL": "none",
    "LC_ALL": "C",
}
_PASSED_GIT_VARIABLES: Final = {
    "GIT_CEILING_DIRECTORIES",
    "GIT_CONFIG_GLOBAL",
    "GIT_CONFIG_SYSTEM",
    "GIT_CONFIG_NOSYSTEM",
}
_GIT_DIFF: Final = (
    *("diff", "HEAD", "--no-ext-diff", "--no-textconv", "--no-color", "--no-renames"),
    "--ignore-submodules=all",  # git would run itself in each, without these settings
)


def collect_environment(*, timeout: float = 2.0, folder: Path | None = None) -> dict[str, Any]:
    """Return what is known of the environment of this process. Never raises; credentials are redacted.

    It waits for other programs, so call it on a thread that nothing waits for.

    Args:
        timeout: Seconds after which no further part is started, and started programs are killed.
        folder: A folder in the git repository of the code. Default: that of the main script, else the current one.

    Returns:
        ``command`` (arguments), ``python``, ``executable``, ``working_directory``, ``packages`` (name -> version),
        ``host``, ``pid``, ``platform``, ``cpu_count``, ``cpu_usable``, ``memory_bytes``, ``memory_limit_bytes``,
        ``gpus``, ``ids`` (of schedulers and launchers), ``container`` and ``git`` (``commit``, ``branch``,
        ``dirty`` if a tracked file differs, ``remote``, ``folder``), as far as they are known. ``missing`` has the
        parts that could not be read -> why.
        ``diff`` is what differs from the commit, at most 256 KB of whole lines: for a local file, and not to be
        recorded. ``git.diff_truncated`` is true if it is longer.
    """
    deadline = time.monotonic() + timeout
    facts: dict[str, Any] = {}
    missing: dict[str, str] = {}
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "process": _process_facts,
        "machine": _machine_facts,
        "ids": _scheduler_facts,
        "container": _container_facts,
        "packages": lambda: _package_facts(deadline),
        "gpus": lambda: _gpu_facts(time.monotonic() + (deadline - time.monotonic()) / 2),
        "git": lambda: _git_facts(folder, deadline),
    }
    for name, read in parts.items():
        if time.monotonic() >= deadline:
            missing[name] = f"not read within {timeout:g} s"
            continue
        try:
            found = read()
            missing |= found.pop("missing", {})
            facts |= found
        except Exception as error:  # isolated: one part costs none of the others
            missing[name] = _clean(f"{type(error).__name__}: {error}")
    if missing:
        facts["missing"] = missing
    return facts


def _process_facts() -> dict[str, Any]:
    arguments = [
        each if len(each) <= _MAX_ARGUMENT_CHARS else f"<{len(each)} characters>"
        for each in sys.orig_argv[:_MAX_ARGUMENTS]
    ]
    redact({"command": arguments})
    facts: dict[str, Any] = {
        "command": [_escape(each) for each in arguments],
        "python": sys.version.split()[0],
        "executable": _clean(sys.executable),
        "pid": os.getpid(),
    }
    try:
        facts["working_directory"] = _clean(str(Path.cwd()))
    except OSError:  # it was removed
        pass
    return facts


def _machine_facts() -> dict[str, Any]:
    import platform

    facts: dict[str, Any] = {
        "host": _clean(platform.node()),
        "platform": _clean(platform.platform()),
        "cpu_count": os.cpu_count(),
    }
    if hasattr(os, "sched_getaffinity"):
        facts["cpu_usable"] = len(os.sched_getaffinity(0))
    try:
        facts["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):  # not known on this system
        pass
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = _read_small(path)
        if limit.isdecimal() and int(limit) < _NO_LIMIT_BYTES:
            facts["memory_limit_bytes"] = int(limit)
    return facts


def _scheduler_facts() -> dict[str, Any]:
    ids = {name: _clean(value) for name in _ID_VARIABLES.split() if (value := os.environ.get(name))}
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        ids.setdefault("POD_NAME", _clean(os.environ.get("HOSTNAME", "")))
        ids.setdefault("POD_NAMESPACE", _clean(_read_small("/var/run/secrets/kubernetes.io/serviceaccount/namespace")))
    ray: Any = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        context: Any = ray.get_runtime_context()
        ids["RAY_JOB_ID"] = _clean(str(context.get_job_id()))
        ids["RAY_NODE_ID"] = _clean(str(context.get_node_id()))
    return {"ids": {name: value for name, value in ids.items() if value}}


def _container_facts() -> dict[str, Any]:
    hints = {
        "kubernetes": "KUBERNETES_SERVICE_HOST" in os.environ,
        "apptainer": bool(os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER")),
        "docker": Path("/.dockerenv").exists(),
        "podman": Path("/run/.containerenv").exists(),
    }
    cgroup = _read_small("/proc/1/cgroup")
    hints |= {name: True for name in ("docker", "kubepods", "containerd", "lxc") if name in cgroup}
    found = next((name for name, is_there in hints.items() if is_there), _clean(os.environ.get("container", "")))  # noqa: SIM112 - of systemd and podman
    return {"container": found} if found else {}


def _package_facts(deadline: float) -> dict[str, Any]:
    import importlib.metadata

    packages: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        if time.monotonic() >= deadline or len(packages) >= MAX_PACKAGES:
            return {"packages": packages, "packages_truncated": True}
        try:
            # Only the head is needed; `distribution.metadata` would parse all of it.
            head = (distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or "").partition("\n\n")[0]
        except (OSError, UnicodeError):  # removed meanwhile, or damaged
            continue
        rows = (line.partition(": ") for line in reversed(head.splitlines()))
        fields = {name: value for name, _, value in rows}
        if "Name" in fields:
            packages.setdefault(_clean(fields["Name"]), _clean(fields.get("Version", "")))  # the first is imported
        time.sleep(0)  # lets the training have the interpreter
    return {"packages": dict(sorted(packages.items(), key=lambda each: each[0].lower()))}


def _gpu_facts(deadline: float) -> dict[str, Any]:
    query = ("--query-gpu=name,uuid,memory.total,driver_version", "--format=csv,noheader,nounits")
    output = _run(["nvidia-smi", *query], deadline)
    gpus: list[dict[str, Any]] = []
    if output.ended == "complete":
        for line in output.data.decode(errors="replace").splitlines():
            cells = [_clean(each.strip()) for each in line.split(",")]
            if len(cells) == 4:  # noqa: PLR2004
                name, uuid, memory, driver = cells
                gpus.append({"name": name, "uuid": uuid, "memory_mib": _to_int(memory), "driver": driver})
    gpus = gpus or list(_proc_gpus()) or _nvml_gpus(deadline)
    if not gpus and output.ended == "late":
        return {"missing": {"gpus": "nvidia-smi did not answer"}}
    return {"gpus": gpus} if gpus else {}


def _proc_gpus() -> Iterator[dict[str, Any]]:
    """Yield what the driver of NVIDIA lists in /proc."""
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        rows = (line.partition(":") for line in _read_small(str(path)).splitlines())
        fields = {name: value for name, _, value in rows}
        yield {"name": _clean(fields.get("Model", "").strip()), "uuid": _clean(fields.get("GPU UUID", "").strip())}


def _nvml_gpus(deadline: float) -> list[dict[str, Any]]:
    """Ask the library of NVIDIA's driver, if its Python package is installed."""
    import importlib.util
    import threading

    if importlib.util.find_spec("pynvml") is None:
        return []
    gpus: list[dict[str, Any]] = []

    def read() -> None:
        try:
            nvml: Any = importlib.import_module("pynvml")
            nvml.nvmlInit()
            for index in range(nvml.nvmlDeviceGetCount()):
                device = nvml.nvmlDeviceGetHandleByIndex(index)
                memory = nvml.nvmlDeviceGetMemoryInfo(device).total >> 20
                gpus.append({"name": _clean(str(nvml.nvmlDeviceGetName(device))), "memory_mib": memory})
        except Exception:  # no driver
            return

    thread = threading.Thread(target=read, name="evsys-bus-nvml", daemon=True)  # a broken driver may never answer
    thread.start()
    thread.join(max(0.0, deadline - time.monotonic()))
    return list(gpus)


# Git


def _git_facts(folder: Path | None, deadline: float) -> dict[str, Any]:
    for each in _code_folders() if folder is None else [folder]:
        if any((parent / ".git").exists() for parent in (each, *each.parents)):
            facts = _repository_facts(each, deadline)
            if facts:
                return facts
    return {}


def _code_folders() -> Iterator[Path]:
    main_file = getattr(sys.modules.get("__main__"), "__file__", None)
    if main_file:
        yield Path(main_file).absolute().parent
    yield Path.cwd()


def _repository_facts(folder: Path, deadline: float) -> dict[str, Any]:
    remote, settings, is_harmless = _read_config(folder, deadline)
    place = _git(folder, deadline, settings, "rev-parse", "--show-toplevel", "HEAD", "--abbrev-ref", "HEAD")
    lines = place.data.decode(errors="backslashreplace").splitlines()
    if not lines:  # not a repository, one of another user, or no git
        return {}
    facts: dict[str, Any] = {"folder": _clean(lines[0])}
    if remote:
        facts["remote"] = _without_credentials(remote)
    if place.ended != "complete" or len(lines) != 3:  # noqa: PLR2004 - no commit yet
        return {"git": facts}
    facts["commit"] = lines[1]
    if lines[2] != "HEAD":  # of a detached one
        facts["branch"] = _clean(lines[2])
    if not is_harmless:
        return {"git": facts, "missing": {"diff": "the repository configures filters that cannot be turned off"}}
    diff = _git(folder, deadline, settings, *_GIT_DIFF, limit=MAX_DIFF_BYTES)
    if diff.data or diff.ended == "complete":
        facts["dirty"] = bool(diff.data)
    if diff.ended in {"late", "failed"}:
        return {"git": facts, "missing": {"diff": f"git diff {'took too long' if diff.ended == 'late' else 'failed'}"}}
    if diff.ended == "cut":
        facts["diff_truncated"] = True
    whole_lines = diff.data if diff.ended == "complete" else diff.data[: diff.data.rfind(b"\n") + 1]
    return {"git": facts, "diff": _redact_lines(whole_lines.decode(errors="replace"))} if diff.data else {"git": facts}


def _read_config(folder: Path, deadline: float) -> tuple[str | None, dict[str, str], bool]:
    """Return the URL of the remote, the settings that turn off filters, and whether no other filter is left."""
    config = _git(folder, deadline, {}, "config", "--null", "--get-regexp", r"^(remote\..*\.url|filter\..*)$")
    remotes: dict[str, str] = {}
    settings: dict[str, str] = {}
    for entry in config.data.decode(errors="surrogateescape").split("\0"):
        name, _, value = entry.partition("\n")
        section = name.rpartition(".")[0]
        if name.startswith("remote."):
            remotes[name] = value
        elif section.startswith("filter."):  # programs that git runs on files before it compares them
            settings |= {f"{section}.{each}": "" for each in ("clean", "smudge", "process")}
            settings[f"{section}.required"] = "false"
    is_read = config.ended == "complete" or (config.ended == "failed" and not config.data)  # failed: it has none
    is_harmless = is_read and len(settings) <= _MAX_FILTER_SETTINGS and not any("=" in name for name in settings)
    return remotes.get("remote.origin.url", next(iter(remotes.values()), None)), settings, is_harmless


def _git(folder: Path, deadline: float, settings: dict[str, str], *arguments: str, limit: int = 1 << 20) -> "_Output":
    """Run git where nothing in the repository's configuration can run code."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("GIT_") or name in _PASSED_GIT_VARIABLES  # GIT_DIR, GIT_EXTERNAL_DIFF
    }
    options = [part for name, value in (_GIT_SETTINGS | settings).items() for part in ("-c", f"{name}={value}")]
    command = ["git", "--no-pager", *options, *arguments]
    return _run(command, deadline, limit=limit, folder=folder, environment=environment | _GIT_VARIABLES)


def _without_credentials(url: str) -> str:
    """Return the URL of a remote without user, password and query; the user of ``git@host:path`` is no credential."""
    scheme, separator, rest = url.partition("://")
    if separator:
        host, slash, path = rest.partition("/")
        url = f"{scheme}://{host.rpartition('@')[2]}{slash}{path.partition('?')[0].partition('#')[0]}"
    return _clean(url)


def _redact_lines(text: str) -> str:
    """Redact a long text in pieces, so that no single search holds the interpreter for long."""
    pieces: list[str] = []
    piece: list[str] = []
    size = 0
    in_key = False
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if "-----BEGIN " in line:
            in_key = True
        if "-----END " in line:
            in_key = False
        if size >= _PIECE_CHARS and not in_key:
            pieces.append(redact_text("".join(piece)))
            piece, size = [], 0
            time.sleep(0)
    return "".join((*pieces, redact_text("".join(piece))))


# Programs and texts

_Ended = Literal["complete", "failed", "cut", "late"]
"""``cut`` at the limit, or ``late`` at the deadline; both were killed."""


class _Output:
    """What a program printed. A named tuple would take half of the time that importing this module takes."""

    __slots__ = ("data", "ended")

    def __init__(self, data: bytes, ended: "_Ended") -> None:
        self.data = data
        self.ended = ended


def _run(
    command: list[str],
    deadline: float,
    *,
    limit: int = 1 << 20,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> _Output:
    """Return what a program prints to stdout, at most ``limit`` bytes. It is killed at the deadline."""
    import select
    import subprocess

    try:
        process = subprocess.Popen(  # noqa: S603 - no shell, and no argument is the user's
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # so that what it starts is killed with it
        )
    except OSError:  # not installed
        return _Output(b"", "failed")
    data = bytearray()
    ended: _Ended = "late"
    with process.stdout as output:  # pyright: ignore[reportOptionalContextManager] - a pipe
        poll = select.poll()
        poll.register(output, select.POLLIN | select.POLLHUP)
        while (milliseconds := (deadline - time.monotonic()) * 1000) > 0 and poll.poll(milliseconds):
            block = os.read(output.fileno(), min(1 << 16, limit + 1 - len(data)))
            data += block
            if not block or len(data) > limit:
                ended = "cut" if block else "complete"
                break
    if ended == "complete":
        try:
            ended = "failed" if process.wait(max(0.0, deadline - time.monotonic())) else "complete"
        except subprocess.TimeoutExpired:
            ended = "late"
    if ended in {"cut", "late"}:
        _kill(process)
    return _Output(bytes(data[:limit]), ended)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    import signal
    import subprocess

    try:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(_KILL_SECONDS)
    except (OSError, subprocess.TimeoutExpired):  # ended meanwhile; or a driver does not let it go
        return


def _read_small(path: str) -> str:
    """Return the beginning of a small file, or an empty text."""
    try:
        with Path(path).open("rb") as file:
            return file.read(_MAX_SMALL_FILE_BYTES).decode(errors="replace").strip()
    except OSError:
        return ""


def _to_int(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def _escape(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _clean(text: str) -> str:
    return redact_text(_escape(text if len(text) <= _MAX_TEXT_CHARS else f"{text[:_MAX_TEXT_CHARS]}…"))
