"""`SystemMetricsCallback`: CPU, memory, disk, network and GPUs beside the loop, as events of a stream of their own.

    cpu/percent  cpu/load_1m  cpu/process_percent              percent of all cores; of one core for the process
    memory/percent  memory/used_bytes  memory/process_bytes    of the machine; resident memory of the process
    disk/percent  disk/free_bytes                              of the file system with the run's directory
    network/received_bytes_per_second  network/sent_bytes_per_second
    process/threads
    gpu/0/percent  gpu/0/memory_percent  gpu/0/memory_used_bytes  gpu/0/celsius  gpu/0/watts

A thread of its own samples and writes: it takes no token of the bus, and hooks do nothing but start and end it. The
journal has the samples in a stream ``s<rank>-…``, apart from the training's. Adapters get them as the event
`SystemMetrics`, by ``on_system_metrics(ctx, values, step)`` or in ``write``, with the time and the step of the
sample.
"""

import contextlib
import importlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, NamedTuple

import msgspec

from evsys_adapters.common.hook_arguments import (
    field,
    output_dir_of,
    rank_of_event,
    run_context,
    run_id,
    run_key,
    run_name,
)
from evsys_adapters.common.params import require_package, validate_params
from evsys_bus.adapter import Ranks
from evsys_bus.callback import Callback
from evsys_bus.codec import encode
from evsys_bus.context import ArmResult, ExperimentResult, LogContext, LoopArtifacts, LoopState, RunResult
from evsys_bus.diagnostics import FaultLog
from evsys_bus.events import Envelope, Event
from evsys_bus.journal import JournalWriter

_FIRST_SECONDS: Final = 1.0
"""When the first sample is taken at the latest: percentages need two readings."""
_END_SECONDS: Final = 2.0
"""How long `close` waits for the thread."""


class SystemMetrics(Event, frozen=True):
    """A sample of the machine and the process while a run is open."""

    ctx: LogContext
    """Names the run; it has no configuration."""
    values: dict[str, float]
    """By name, such as ``cpu/percent``."""
    step: int | None = None
    """The step of the run then; None before its training."""


class SystemMetricsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of `SystemMetricsCallback`."""

    every_seconds: Annotated[float, msgspec.Meta(ge=0.05)] = 15.0
    """Pause between two samples."""
    gpus: bool = True
    """Whether to sample NVIDIA GPUs, where there are any and nvidia-ml-py is installed."""

    def __post_init__(self) -> None:
        require_package("system_metrics", "psutil", "system")


class _OpenRun(NamedTuple):
    ctx: LogContext
    name: str
    folder: Path
    state: object
    """The loop's state, whose step is read at each sample; None before training."""
    rank: int


class SystemMetricsCallback(Callback):
    """Samples the machine while runs are open, and records the samples in the journal for every adapter.

    It needs a bus with a journal, or with any followed adapter. Without a run nothing is sampled, and there is no
    thread. Samples cost the loop nothing; each takes a few milliseconds of the thread. What a sample cannot read, such
    as a GPU that is gone, is left out.

    Example:
        >>> SystemMetricsCallback(every_seconds=60, gpus=False).config.every_seconds
        60.0

    Raises:
        ModuleNotFoundError: psutil is not installed; `build_callbacks` makes a BrokenAdapterError of it.
    """

    name: ClassVar[str] = "system_metrics"
    Config: ClassVar[type | None] = SystemMetricsConfig
    ranks: ClassVar[Ranks | None] = "rank0"

    def __init__(self, every_seconds: float = 15.0, *, gpus: bool = True) -> None:
        self.config = validate_params(SystemMetricsConfig, {"every_seconds": every_seconds, "gpus": gpus})
        self._lock = threading.Lock()
        self._runs: dict[str, _OpenRun] = {}
        self._announced: set[str] = set()
        """Runs with a RunStart, which are open until their RunEnd."""
        self._sampler: _Sampler | None = None
        self._faults = FaultLog(every_seconds=60.0)

    def on_run_start(self, ctx: LogContext) -> None:
        """Start sampling."""
        self._announced.add(run_id(ctx))
        self._open(ctx)

    def on_train_start(self, state: LoopState) -> None:
        """Start sampling, if the run has no RunStart."""
        self._open(state)

    def on_train_end(self, state: LoopState, artifacts: LoopArtifacts) -> None:
        """Stop sampling, if the run has no RunStart."""
        del artifacts
        if run_id(state) not in self._announced:
            self._end(run_id(state))

    def on_run_end(self, ctx: LogContext, run_result: RunResult, arm: ArmResult) -> None:
        """Stop sampling."""
        del run_result, arm
        self._announced.discard(run_id(ctx))
        self._end(run_id(ctx))

    def on_experiment_end(self, ctx: LogContext, result: ExperimentResult) -> None:
        """Stop sampling runs without an end."""
        del result
        root = os.path.join(output_dir_of(ctx), "")  # noqa: PTH118 # with the separator
        for run in [each for each in self._runs if each.startswith(root)]:
            self._announced.discard(run)
            self._end(run)

    def close(self) -> None:
        """End the thread, and close its stream."""
        with self._lock:
            sampler, self._sampler = self._sampler, None
            self._runs.clear()
        self._announced.clear()
        if sampler is not None:
            sampler.end()
            sampler.thread.join(_END_SECONDS)
        self._faults.flush()

    def _open(self, handle: LoopState | LogContext) -> None:
        bus: object = self.evsys_attached[-1] if self.evsys_attached else None
        health: Callable[[], Any] | None = getattr(bus, "health", None)
        if health is None:
            fix = "leave out `placement`, and give it to an EventBus: a courier may be on another machine"
            self._faults.warn(
                "system_metrics.not_sampled", "", why="only a bus knows the journal and the process", fix=fix
            )
            return
        key, folder = run_key(handle), Path(output_dir_of(handle) or output_dir_of(run_context(handle)))
        ctx = LogContext(Path(output_dir_of(run_context(handle))), run_key=key) if key else LogContext(folder)
        state = handle if field(handle, "step") is not None else None
        run = _OpenRun(ctx, run_name(handle), folder, state, rank_of_event(self.event))
        with self._lock:
            self._runs[run_id(handle)] = run
            if self._sampler is None or not self._sampler.takes_runs:
                self._sampler = _Sampler(self.config, self._open_runs, health, self._faults)
                self._sampler.thread.start()

    def _end(self, run: str) -> None:
        with self._lock:
            self._runs.pop(run, None)
            if not self._runs and self._sampler is not None:
                self._sampler.end()

    def _open_runs(self) -> list[_OpenRun]:
        with self._lock:
            return list(self._runs.values())


class _Sampler:
    """The thread, from the first open run to the last.

    Args:
        config: The adapter's parameters.
        open_runs: Returns the runs to sample for.
        health: Returns the health of the bus, which names its journal.
        faults: Where errors are logged.
    """

    def __init__(
        self,
        config: SystemMetricsConfig,
        open_runs: Callable[[], list[_OpenRun]],
        health: Callable[[], Any],
        faults: FaultLog,
    ) -> None:
        self.thread: Final = threading.Thread(target=self._run, name="evsys-bus:system_metrics", daemon=True)
        self._config = config
        self._open_runs = open_runs
        self._health = health
        self._faults = faults
        self._ended = threading.Event()

    @property
    def takes_runs(self) -> bool:
        """Whether it will still sample for a run that is opened now."""
        return not self._ended.is_set() and self.thread.is_alive()

    def end(self) -> None:
        """Ask the thread to end."""
        self._ended.set()

    def _run(self) -> None:
        runs = self._open_runs()
        if not runs:
            return
        journal: Any = self._health().journal
        if journal is None:
            fix = "give the bus a journal: EventBus([...], journal=...)"
            self._faults.warn("system_metrics.not_sampled", "", why="the bus records nothing", fix=fix)
            return
        writer = JournalWriter(
            journal.directory,
            rank=runs[0].rank,
            family="s",
            flush_seconds=max(1.0, self._config.every_seconds),
            reserve_bytes=0,
        )
        try:
            writer.open()
        except OSError as error:
            self._faults.warn("system_metrics.not_recorded", journal.directory, error=error)
            return
        machine = Machine(open_nvml() if self._config.gpus else None)
        try:
            wait = min(self._config.every_seconds, _FIRST_SECONDS)
            while not self._ended.wait(wait):
                wait = self._config.every_seconds
                self._record(writer, machine)
        finally:
            machine.close()
            writer.close()

    def _record(self, writer: JournalWriter, machine: "Machine") -> None:
        values, now = machine.sample(), time.time()
        for run in self._open_runs():
            step: object = field(run.state, "step")
            event = SystemMetrics(run.ctx, values | machine.disk(run.folder), step if isinstance(step, int) else None)
            envelope = Envelope(writer.stream, writer.next_sequence, now, event, run.name, run.rank)
            try:
                writer.append(encode(envelope))
            except (OSError, MemoryError) as error:
                self._faults.warn("system_metrics.not_recorded", writer.directory, error=error)


class Machine:
    """Reads the machine and this process. Use it on one thread.

    Args:
        nvml: NVML, initialized, to read GPUs too; see `open_nvml`.
    """

    def __init__(self, nvml: Any = None) -> None:
        self._psutil: Any = importlib.import_module("psutil")
        self._errors: tuple[type[Exception], ...] = (OSError, self._psutil.Error, AttributeError, ValueError)
        self._process: Any = self._psutil.Process()
        self._network: tuple[float, Any] | None = None
        self._nvml = nvml
        self.sample()  # what percentages and rates are relative to

    def close(self) -> None:
        """Release the GPU library."""
        if self._nvml is not None:
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()
            self._nvml = None

    def sample(self) -> dict[str, float]:
        """Return all current values but those of disks; what cannot be read is left out."""
        values: dict[str, float] = {}
        for read in (self._cpu, self._memory, self._network_rates, self._gpus):
            with contextlib.suppress(*self._errors):
                values.update(read())  # up to what raises
        return values

    def disk(self, folder: Path) -> dict[str, float]:
        """Return the values of the file system with the folder, or with the nearest parent that exists."""
        for path in (folder, *folder.parents):
            with contextlib.suppress(*self._errors):
                usage = self._psutil.disk_usage(str(path))
                return {"disk/percent": float(usage.percent), "disk/free_bytes": float(usage.free)}
        return {}

    def _cpu(self) -> Iterator[tuple[str, float]]:
        yield "cpu/percent", float(self._psutil.cpu_percent())
        yield "cpu/load_1m", float(self._psutil.getloadavg()[0])
        with self._process.oneshot():
            yield "cpu/process_percent", float(self._process.cpu_percent())
            yield "memory/process_bytes", float(self._process.memory_info().rss)
            yield "process/threads", float(self._process.num_threads())

    def _memory(self) -> Iterator[tuple[str, float]]:
        memory = self._psutil.virtual_memory()
        yield "memory/percent", float(memory.percent)
        yield "memory/used_bytes", float(memory.total - memory.available)

    def _network_rates(self) -> Iterator[tuple[str, float]]:
        now, counters = time.monotonic(), self._psutil.net_io_counters()
        previous, self._network = self._network, (now, counters)
        if previous is None or counters is None or previous[1] is None or now <= previous[0]:
            return
        for name, key in (("received", "bytes_recv"), ("sent", "bytes_sent")):
            number = getattr(counters, key) - getattr(previous[1], key)
            yield f"network/{name}_bytes_per_second", max(0.0, number / (now - previous[0]))

    def _gpus(self) -> Iterator[tuple[str, float]]:
        nvml = self._nvml
        if nvml is None:
            return
        for index in range(_read(nvml, nvml.nvmlDeviceGetCount) or 0):
            gpu = _read(nvml, nvml.nvmlDeviceGetHandleByIndex, index)
            if gpu is None:
                continue
            use = _read(nvml, nvml.nvmlDeviceGetUtilizationRates, gpu)
            memory = _read(nvml, nvml.nvmlDeviceGetMemoryInfo, gpu)
            celsius = _read(nvml, nvml.nvmlDeviceGetTemperature, gpu, nvml.NVML_TEMPERATURE_GPU)
            milliwatts = _read(nvml, nvml.nvmlDeviceGetPowerUsage, gpu)
            if use is not None:
                yield f"gpu/{index}/percent", float(use.gpu)
            if memory is not None:
                yield f"gpu/{index}/memory_percent", 100.0 * memory.used / memory.total
                yield f"gpu/{index}/memory_used_bytes", float(memory.used)
            if celsius is not None:
                yield f"gpu/{index}/celsius", float(celsius)
            if milliwatts is not None:
                yield f"gpu/{index}/watts", milliwatts / 1000


def open_nvml() -> Any:
    """Return NVML, the library of NVIDIA's driver; None where there is none."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml


def _read(nvml: Any, function: Callable[..., Any], *args: object) -> Any:
    """Return what a function of NVML returns; None if this GPU does not have it."""
    try:
        return function(*args)
    except nvml.NVMLError:
        return None
