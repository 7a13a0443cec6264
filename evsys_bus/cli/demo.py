"""``evsys-bus demo``: one training run on real data, with progress on stdout."""

import time
from contextlib import suppress
from pathlib import Path

import anyio
import click

from evsys_adapters.print_progress import PrintProgressCallback
from evsys_bus.demo import DemoResult, run_demo


@click.command("demo")
@click.option("--steps", type=click.IntRange(min=1), default=1000, show_default=True, help="How long to train.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Decides every number.")
@click.option("--output-dir", type=click.Path(path_type=Path, file_okay=False), help="Default: runs/demo-<time>.")
@click.option("--resume", is_flag=True, help="Continue the run that --output-dir holds.")
def command(steps: int, seed: int, output_dir: Path | None, resume: bool) -> None:
    """Train a small network on scikit-learn's handwritten digits, over the bus."""
    if resume and output_dir is None:
        raise click.UsageError("--resume needs --output-dir, the run to continue")
    run_dir = (output_dir or Path("runs", time.strftime("demo-%Y%m%d-%H%M%S"))).absolute()
    click.echo(f"data  {run_dir}   (Ctrl-C stops after the step; --resume goes on)", err=True)
    progress = PrintProgressCallback(every=max(steps // 12, 1), keys=["epoch", "loss", "accuracy"])

    async def demo() -> DemoResult:
        return await run_demo(run_dir, [progress], num_steps=steps, seed=seed, resume=resume)

    result = anyio.run(demo)
    with suppress(BrokenPipeError):  # nobody reads it any more; the training went well all the same
        _tell(result, run_dir)


def _tell(result: DemoResult, run_dir: Path) -> None:
    images = int(result.test.metrics["images"])
    click.echo(f"\ntest accuracy  {result.test.metrics['accuracy']:.4f} on {images} held-out images")
    click.echo(f"time           {result.seconds:.1f} s for {result.steps_done} steps")
    click.echo(f"metrics        {run_dir / 'metrics.jsonl'}")
    click.echo(f"checkpoints    {result.artifacts.manifest_path}  ({len(result.artifacts.checkpoints)})")
