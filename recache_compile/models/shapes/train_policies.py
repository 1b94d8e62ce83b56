"""Train the policies of `shapes` that ship with the package.

    python -m recache_compile.models.shapes.train_policies --output FOLDER

Writes FOLDER/taylor-1 and FOLDER/hicache-2; `policy.json` and `policy.safetensors` of each
are what the package holds in `policies`.  Stopped at any time, the same command goes on.
"""

from pathlib import Path

import click
from rich.console import Console

from recache_compile.config import CompileConfig
from recache_compile.ir.forecasters import anchors_of
from recache_compile.policies.search import Search
from recache_compile.search.progress import show_training, table_of
from recache_compile.search.train import Effort, TrainingRequest, train

BUDGETS = (5, 7, 9, 10, 13, 15)
FORECASTERS = (("taylor", 1), ("hicache", 2))
NUM_STEPS = 50
TRAINING = 8
"""Batches of 16 samples that schedules are chosen on; few of them see every schedule."""


@click.command()
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder to write.")
@click.option("--workers", default=0, show_default=True, help="Ray workers on this machine.")
def main(output: Path, workers: int) -> None:
    """Train both policies: feature distance alone, 128 training and 64 held-out samples."""
    console = Console()
    trainer = Search()
    for name, order in FORECASTERS:
        config = CompileConfig(num_steps=NUM_STEPS, anchors=anchors_of(name, order))
        request = TrainingRequest("shapes", BUDGETS, config, name, distance="features", reward="caption")
        study = request.study()
        with show_training(console, trainer, len(BUDGETS)) as shown:
            trained = train(
                study, BUDGETS, output / f"{name}-{order}", trainer, Effort(TRAINING, workers=workers), *shown
            )
        console.print(table_of(trained))


if __name__ == "__main__":
    main()
