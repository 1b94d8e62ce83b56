"""What an evaluation is about; kept in its folder, so that it goes on where it was.

evaluation.json         the setting; another one does not fit into the folder
engines/                the compiled artifact, unless one was given
calibration.safetensors what policies look at
batches/N.safetensors   values and a few pictures of the samples of batch N
profile.json            where the time goes
result.json             what came out
"""

from dataclasses import dataclass
from pathlib import Path

from recache_compile.config import CompileConfig
from recache_compile.evaluation.metrics import METRICS
from recache_compile.ir.schedule import Schedule
from recache_compile.pipelines.rollout import Batch
from recache_compile.support.records import check_folder, read_record, write_record

EVALUATION = "evaluation.json"
FIRST_OF_REFERENCE = 1_000_000
"""Number of the first batch of the reference set: the same prompts, other noise."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is evaluated; values of two settings cannot be compared.

    Args:
        model: name, folder or Hub id of the pipeline.
        artifact: folder of the engines; "" for those in the evaluation's own folder.
        digest: of that artifact's manifest.
        config: what the engines are built with, and where they run.
        forecaster: fills the cached steps.
        order: its polynomial order m.
        prompts: captions, taken in turn.
        batch_size: samples that are run together.
        seed: of the noise.
        metrics: names; with the masks, it may change from run to run, as what is known is kept.
        masks: of the schedules.
    """

    model: str
    artifact: str
    digest: str
    config: CompileConfig
    forecaster: str
    order: int
    prompts: tuple[str, ...]
    batch_size: int
    seed: int = 0
    metrics: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()

    @property
    def num_steps(self) -> int:
        """Length T of the denoising loop."""
        return self.config.num_steps

    def batch(self, number: int) -> Batch:
        """The samples of a batch: prompts in turn, noise seeds that no other batch has."""
        first = FIRST_OF_REFERENCE if number >= FIRST_OF_REFERENCE else 0
        return Batch.taken(self.prompts, number, self.batch_size, self.seed, first)

    @property
    def uncached(self) -> str:
        """The mask of an uncached generation."""
        return Schedule.every(self.num_steps).mask

    def wanted(self, number: int) -> dict[str, tuple[str, ...]]:
        """The metrics of a batch by mask; the reference set is uncached, and only features are taken of it."""
        sets = tuple(name for name in self.metrics if METRICS[name].against == "set")
        if number >= FIRST_OF_REFERENCE:
            return {self.uncached: sets}
        alone = tuple(name for name in self.metrics if METRICS[name].against != "uncached")
        return dict.fromkeys(self.masks, self.metrics) | {self.uncached: alone}

    def engines(self, folder: Path) -> Path:
        """Where the engines are, for an evaluation in a folder."""
        return Path(self.artifact) if self.artifact else folder / "engines"


def begin(setting: Setting, folder: Path) -> None:
    """Begin an evaluation in a folder, or go on with the one that is there.

    Raises:
        ArtifactError: the folder holds another evaluation, or something else.
    """
    check_begun(setting, folder)
    write_record(setting, folder / EVALUATION)


def check_begun(setting: Setting, folder: Path) -> None:
    """Raise `ArtifactError` unless the folder is free for this evaluation, or holds it."""
    before = read_setting(folder) if (folder / EVALUATION).exists() else None
    check_folder(setting, before, folder, "an evaluation", free=("metrics", "masks"))


def read_setting(folder: Path) -> Setting:
    """The setting of the evaluation in a folder.

    Raises:
        ArtifactError: there is none, or it makes no sense.
    """
    return read_record(folder / EVALUATION, Setting, "put the file back, or name another folder")
