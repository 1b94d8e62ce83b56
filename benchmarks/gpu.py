"""Everything that needs a GPU, in one command: the stages that tell most come first.

    python benchmarks/gpu.py --list
    python benchmarks/gpu.py --output results/        every stage that has no result there yet
    python benchmarks/gpu.py --only loop,refit        some of them
    python benchmarks/gpu.py --dry-run                tiny sizes, on the CPU

For a machine that is there for half an hour: each stage is a process of its own with a time
limit, its result is a JSON file as soon as it ends, and what was broken off goes on where it
was.  Where packages cannot be downloaded, `--wheels FOLDER` installs those that lie there.
"""

import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from recache_compile.bench.subjects import OURS
from recache_compile.support.files import writing
from recache_compile.support.machine import machine, versions

ROOT = Path(__file__).parents[1]
LOG = Console(stderr=True, highlight=False)
PYTHON = (sys.executable,)


@dataclass(frozen=True, slots=True)
class Stage:
    """One thing that is looked at.

    Args:
        name: of the result's file.
        tells: what it shows.
        command: prints a JSON object as its last line, or nothing of the kind.
        tiny: the same at a size for the CPU; empty: another stage's is no different.
        limit: seconds after which it is ended.
    """

    name: str
    tells: str
    command: tuple[str, ...]
    tiny: tuple[str, ...]
    limit: int = 300


def _bench(model: str, *options: str) -> tuple[str, ...]:
    return (*PYTHON, "-m", "recache_compile.cli.app", "bench", model, "--json", *options)


def _loop(*options: str) -> tuple[str, ...]:
    return (*PYTHON, "benchmarks/loop.py", "--json=/dev/stdout", *options)


def _worker(name: str, *options: str) -> tuple[str, ...]:
    return (*PYTHON, "benchmarks/gpu_workers.py", name, *options)


def _peers(name: str) -> tuple[str, ...]:
    return _worker("peers", "--model", name)


WIDE = ("--blocks=4,8", "--width=2048", "--tokens=4096", "--text-tokens=512", "--steps=28", "--budget=7", "--rounds=5")
SMALL = (
    "--no-jit",
    "--blocks=1,1",
    "--width=64",
    "--tokens=16",
    "--text-tokens=4",
    "--steps=6",
    "--budget=2",
    "--rounds=1",
)
TINY_BENCH = _bench(
    "flux-small", *("--steps", "6", "--budget", "3", "--rounds", "1", "--only", f"eager,{OURS}", "--runtime", "eager")
)
TINY = ("--model", "flux-small", "--runtime", "eager", "--dtype", "float32", "--steps", "4", "--budget", "2")

STAGES = (
    Stage(
        "tests",
        "that results equal those of the CPU, and that the loop never waits",
        (*PYTHON, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"),
        (*PYTHON, "-m", "pytest", "-q", "tests/test_gpu.py", "-p", "no:cacheprovider"),
    ),
    Stage(
        "loop",
        "our loop over its ideal, float32, with and without CUDA graphs",
        _loop("--device=cuda", *WIDE, "--runtimes=inductor,inductor+graphs"),
        _loop("--device=cpu", *SMALL, "--runtimes=eager"),
    ),
    Stage(
        "loop-bfloat16",
        "the same in bfloat16",
        _loop("--device=cuda", "--dtype=bfloat16", *WIDE, "--runtimes=inductor,inductor+graphs,eager"),
        (),
    ),
    Stage("flux-1b", "a FLUX-shaped model of 1.1 B parameters beside the peers, T = 28, k = 7", _peers("flux-1b"), ()),
    Stage("flux-3b", "one of 2.8 B", _peers("flux-3b"), ()),
    Stage("flux-12b", "FLUX.1-dev's own size", _peers("flux-12b"), TINY_BENCH, 600),
    Stage(
        "guidance",
        "Wan2.1-1.3B with guidance, two branches a step",
        _worker("guidance", "--model", "wan2.1-1.3b"),
        _worker("guidance", *TINY),
    ),
    Stage("memory", "bytes that are held, and at most, over the weights", _worker("memory"), _worker("memory", *TINY)),
    Stage(
        "offload",
        "the prologue's own weights in the host's memory",
        _worker("offload"),
        _worker("offload", *TINY),
    ),
    Stage("refit", "new weights in place, and the step after", _worker("refit"), _worker("refit", *TINY)),
    Stage(
        "onnxruntime",
        "onnxruntime-gpu on PyTorch's stream",
        _loop("--device=cuda", *WIDE, "--runtimes=onnxruntime"),
        (),
    ),
)


# the stages, one after another


def run_stage(stage: Stage, command: Sequence[str]) -> dict[str, Any]:
    """What a stage gave."""
    begin = time.monotonic()
    code, out, err = run_limited(command, stage.limit)
    return {
        "stage": stage.name,
        "tells": stage.tells,
        "date": datetime.date.today().isoformat(),
        "machine": machine("cuda" if torch.cuda.is_available() else "cpu"),
        "versions": versions(),
        "command": shown(command),
        "exit": code,
        "seconds": round(time.monotonic() - begin, 1),
        "result": _last_json(out),
        "output": "" if _last_json(out) else out[-4000:],
        "errors": err[-4000:] if code else "",
    }


def run_limited(command: Sequence[str], limit: float) -> tuple[int | None, str, str]:
    """Exit status, stdout and stderr of a command; None: it was ended at the limit, with all that it had started."""
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            return None, out, err
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, out, err


def shown(command: Sequence[str]) -> list[str]:
    """A command as a result tells it."""
    return ["python" if part == sys.executable else part for part in command]


def is_done(file: Path, command: Sequence[str]) -> bool:
    """Whether this very command has left its result there."""
    if not file.exists():
        return False
    found = json.loads(file.read_text(encoding="utf-8"))
    return found["exit"] == 0 and found["command"] == shown(command)


def _last_json(out: str) -> Any:
    """The JSON object that a command printed last; None where it printed none."""
    begin = out.rfind("\n{") + 1
    try:
        return json.loads(out[begin:])
    except ValueError:
        return None


def chosen_stages(only: str | None) -> list[Stage]:
    """Some of the stages, in their order.

    Raises:
        click.ClickException: one is unknown.
    """
    names = [stage.name for stage in STAGES] if only is None else [part.strip() for part in only.split(",")]
    if unknown := sorted(set(names) - {stage.name for stage in STAGES}):
        raise click.ClickException(f"--only {unknown[0]}: no such stage; see --list")
    return [stage for stage in STAGES if stage.name in names]


def show_stages() -> None:
    """Print what there is."""
    table = Table("stage", "tells", "limit s")
    for stage in STAGES:
        table.add_row(stage.name, stage.tells, str(stage.limit))
    Console().print(table)


def install(wheels: Path) -> None:
    """Install what lies in a folder, and nothing else.

    Raises:
        click.ClickException: it cannot be installed.
    """
    files = sorted(map(str, wheels.glob("*.whl")))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", *files]
    if not files or subprocess.run(command, check=False).returncode:
        raise click.ClickException(f"--wheels {wheels}: no wheels there, or pip could not install them")


@click.command()
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default="gpu-results", show_default=True)
@click.option("--only", help="Names of stages, separated by commas.")
@click.option("--list", "listing", is_flag=True, help="Say which stages there are.")
@click.option("--again", is_flag=True, help="Also those that have a result.")
@click.option("--dry-run", is_flag=True, help="Tiny sizes on the CPU.")
@click.option("--wheels", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Install these first.")
def main(
    output: Path,
    only: str | None,
    listing: bool,
    again: bool,
    dry_run: bool,
    wheels: Path | None,
) -> None:
    """Run the stages; see the file's head."""
    if listing:
        show_stages()
        return
    if wheels:
        install(wheels)
    run_stages(chosen_stages(only), output, again, dry_run)


def run_stages(stages: Sequence[Stage], output: Path, again: bool, dry_run: bool) -> None:
    """Run what has no result yet, one file each.

    Raises:
        click.ClickException: a stage failed; the others have run.
    """
    if not dry_run and not torch.cuda.is_available():
        raise click.ClickException("there is no CUDA GPU here; --dry-run runs the stages at tiny sizes on the CPU")
    output.mkdir(parents=True, exist_ok=True)
    failed = []
    for stage in stages:
        command, file = stage.tiny if dry_run else stage.command, output / f"{stage.name}.json"
        if not command:
            continue
        if not again and is_done(file, command):
            LOG.print(f"{stage.name}: has its result in {file}; --again runs it once more")
            continue
        LOG.print(f"{stage.name}: {stage.tells}")
        found = run_stage(stage, command)
        with writing(file) as partial:
            partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        LOG.print(f"  exit {found['exit']} after {found['seconds']} s; {file}")
        failed += [] if found["exit"] == 0 else [stage.name]
    if failed:
        raise click.ClickException(f"{', '.join(failed)} failed; see their files in {output}")


if __name__ == "__main__":
    main()
