"""A study: a folder with everything that looking for schedules has found out so far.

    study.json              what is studied; another study does not fit into the folder
    engines/                the compiled artifact
    samples/N.safetensors   noise and uncached result of batch N
    calibration.safetensors statistics of the first batch
    losses.jsonl            one line for each batch and schedule that was run

All of it can be made again from `study.json`; whatever is there is not computed twice.
"""

from dataclasses import dataclass
from pathlib import Path

from recache_compile.config import CompileConfig
from recache_compile.pipelines.rollout import Batch
from recache_compile.support.records import check_folder, read_record, write_record

STUDY = "study.json"
FIRST_HELD_OUT = 1_000_000
"""Number of the first held-out batch."""

Task = tuple[int, str]
"""A batch and a schedule's mask."""


@dataclass(frozen=True, slots=True)
class Study:
    """What is studied; losses of two studies cannot be compared.

    Args:
        model: name, folder or Hub id of the pipeline.
        config: what its engines are built with.
        forecaster: fills the cached steps, with all the anchors that the engines hold.
        distance, reward: names of d and R.
        training_prompts, held_out_prompts: captions, taken in turn.
        batch_size: samples that are run together.
        seed: of the noise.
    """

    model: str
    config: CompileConfig
    forecaster: str
    distance: str
    reward: str
    training_prompts: tuple[str, ...]
    held_out_prompts: tuple[str, ...]
    batch_size: int
    seed: int = 0

    @property
    def num_steps(self) -> int:
        """Length T of the denoising loop."""
        return self.config.num_steps

    @property
    def order(self) -> int:
        """The forecaster's polynomial order m."""
        return self.config.anchors - 1

    def batch(self, number: int) -> Batch:
        """The samples of a batch: prompts in turn, noise seeds that no other batch has."""
        if number < FIRST_HELD_OUT:
            return Batch.taken(self.training_prompts, number, self.batch_size, self.seed)
        return Batch.taken(self.held_out_prompts, number, self.batch_size, self.seed, FIRST_HELD_OUT)


def is_begun(study: Study, folder: Path) -> bool:
    """Whether a folder holds this study; False: it is free for it.

    Raises:
        ArtifactError: the folder holds another study, or something else.
    """
    before = read_study(folder) if (folder / STUDY).exists() else None
    return check_folder(study, before, folder, "a study")


def write_study(study: Study, folder: Path) -> None:
    """Begin a study in a folder, or go on with the one that is there.

    Raises:
        ArtifactError: the folder holds another study, or something else.
    """
    if is_begun(study, folder):
        return
    write_record(study, folder / STUDY)


def read_study(folder: Path) -> Study:
    """The study in a folder.

    Raises:
        ArtifactError: there is none, or it makes no sense.
    """
    return read_record(folder / STUDY, Study, "put the file back, or name another folder")


def judging_batches(count: int) -> tuple[int, ...]:
    """Numbers of held-out batches that no decision is made on."""
    return tuple(range(FIRST_HELD_OUT + 1000, FIRST_HELD_OUT + 1000 + count))


def held_out_batches(count: int) -> tuple[int, ...]:
    """Numbers of the first held-out batches."""
    return tuple(range(FIRST_HELD_OUT, FIRST_HELD_OUT + count))
