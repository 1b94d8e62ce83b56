"""What an evaluation is about; kept in its folder, so that it goes on where it was.

evaluation.json         the setting; another one does not fit into the folder
engines/                the compiled artifact, unless one was given
calibration.safetensors what policies look at
batches/N.safetensors   values and a few pictures of the samples of batch N
profile.json            where the time goes
result.json             what came out
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from recache_compile.errors import ArtifactError
from recache_compile.evaluation.metrics import METRICS
from recache_compile.files import writing
from recache_compile.rollout import Batch

T = TypeVar("T")

FIRST_OF_REFERENCE = 1_000_000
"""Number of the first batch of the reference set: the same prompts, other noise."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is evaluated; values of two settings cannot be compared.

    Args:
        model: name, folder or Hub id of the pipeline.
        artifact: folder of the engines; "" for those in the evaluation's own folder.
        digest: of that artifact's manifest.
        num_steps: length T of the denoising loop.
        forecaster, order: fill the cached steps.
        granularity: where features are cached.
        prompts: captions, taken in turn.
        batch_size: samples that are run together.
        seed: of the noise.
        dtype: of the weights.
        device: where models run.
        component: the transformer.
        runtime: of the engines.
        call: further arguments of the pipeline.
        metrics: names; with the masks, it may change from run to run, as what is known is kept.
        masks: of the schedules.
    """

    model: str
    artifact: str
    digest: str
    num_steps: int
    forecaster: str
    order: int
    granularity: str
    prompts: tuple[str, ...]
    batch_size: int
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    component: str = "transformer"
    runtime: str = "auto"
    call: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()

    def batch(self, number: int) -> Batch:
        """The samples of a batch: prompts in turn, noise seeds that no other batch has."""
        reference = number >= FIRST_OF_REFERENCE
        first = (number - FIRST_OF_REFERENCE if reference else number) * self.batch_size
        places = range(first, first + self.batch_size)
        base = self.seed + (FIRST_OF_REFERENCE * self.batch_size if reference else 0)
        return Batch(tuple(self.prompts[at % len(self.prompts)] for at in places), tuple(base + at for at in places))

    @property
    def full(self) -> str:
        """The mask of an uncached generation."""
        return "1" * self.num_steps

    def wanted(self, number: int) -> dict[str, tuple[str, ...]]:
        """The metrics of a batch by mask; the reference set is uncached, and only features are taken of it."""
        sets = tuple(name for name in self.metrics if METRICS[name].against == "set")
        if number >= FIRST_OF_REFERENCE:
            return {self.full: sets}
        alone = tuple(name for name in self.metrics if METRICS[name].against != "uncached")
        return dict.fromkeys(self.masks, self.metrics) | {self.full: alone}

    def engines(self, folder: Path) -> Path:
        """Where the engines are, for an evaluation in a folder."""
        return Path(self.artifact) if self.artifact else folder / "engines"


def begin(setting: Setting, folder: Path) -> None:
    """Begin an evaluation in a folder, or go on with the one that is there.

    Raises:
        ArtifactError: the folder holds another evaluation, or something else.
    """
    check_begun(setting, folder)
    with writing(folder / "evaluation.json") as partial:
        partial.write_text(json.dumps(asdict(setting), indent=1), encoding="utf-8")


def check_begun(setting: Setting, folder: Path) -> None:
    """Raise `ArtifactError` unless the folder is free for this evaluation, or holds it."""
    if (folder / "evaluation.json").exists():
        before = asdict(replace(read_setting(folder), metrics=setting.metrics, masks=setting.masks))
        if names := [name for name, value in asdict(setting).items() if before[name] != value]:
            raise ArtifactError(
                f"output {folder}: holds an evaluation with another {' and '.join(names)}; name another folder"
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtifactError(f"output {folder}: holds something that is no evaluation; name another folder")


def read_setting(folder: Path) -> Setting:
    """The setting of the evaluation in a folder.

    Raises:
        ArtifactError: there is none, or it makes no sense.
    """
    return read_json(folder / "evaluation.json", Setting, "put the file back, or name another folder")


def read_json(file: Path, kind: type[T], remedy: str) -> T:
    """A dataclass from a JSON file.

    Raises:
        ArtifactError: the file is not there, or holds something else.
    """
    try:
        return TypeAdapter(kind).validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
        raise ArtifactError(f"{file}: cannot be read ({reason}); {remedy}") from None
