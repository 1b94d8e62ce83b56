"""A study: a folder with everything that looking for schedules has found out so far.

    study.json              what is studied; another study does not fit into the folder
    engines/                the compiled artifact
    samples/N.safetensors   noise and uncached result of batch N
    calibration.safetensors statistics of the first batch
    losses.jsonl            one line for each batch and schedule that was run

All of it can be made again from `study.json`; whatever is there is not computed twice.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from recache_compile.api import compile
from recache_compile.artifact.store import load_own
from recache_compile.errors import ArtifactError, ModelError
from recache_compile.evaluation.distances import get_distance, get_reward
from recache_compile.ir.forecasters import Forecaster, get_forecaster, uncalibrated
from recache_compile.ir.schedule import Schedule
from recache_compile.pipelines.load import load_pipeline
from recache_compile.pipelines.record import prompted
from recache_compile.pipelines.rollout import Batch, Rollouts
from recache_compile.policies.base import Calibration
from recache_compile.policies.calibration import load_calibration, save_calibration
from recache_compile.support.files import writing
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
        num_steps: length T of the denoising loop.
        forecaster, order: fill the cached steps.
        granularity: where features are cached.
        distance, reward: names of d and R.
        training_prompts, held_out_prompts: captions, taken in turn.
        batch_size: samples that are run together.
        seed: of the noise.
        dtype: of the weights.
        component: the transformer that is studied.
        runtime: of the engines.
        call: further arguments of the pipeline.
    """

    model: str
    num_steps: int
    forecaster: str
    order: int
    granularity: str
    distance: str
    reward: str
    training_prompts: tuple[str, ...]
    held_out_prompts: tuple[str, ...]
    batch_size: int
    seed: int = 0
    dtype: str = "float32"
    component: str = "transformer"
    runtime: str = "auto"
    call: Mapping[str, Any] = field(default_factory=dict)

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


def compile_engines(
    study: Study, folder: Path, pipeline: Any, report: Callable[[str], None] = lambda stage: None
) -> None:
    """Compile the engines of a study for its batch size, unless they are there, and begin it.

    A study that cannot be compiled leaves nothing behind.

    Args:
        study: what is studied.
        folder: of the study.
        pipeline: with the transformer's weights.
        report: told what begins.
    """
    if (folder / "engines").exists():
        return
    compiled = compile(
        pipeline, None, (max(1, min(study.order + 1, study.num_steps - 1)),), study.num_steps, uncalibrated(study.forecaster), study.order, "uniform",
        study.granularity, study.runtime, component=study.component, report=report,
        call=prompted(pipeline, list(study.batch(0).prompts), study.call),
    )  # fmt: skip
    write_study(study, folder)
    compiled.save(folder / "engines")


class StudyRunner:
    """Runs the generations of a study; each process that does so has one of its own.

    Args:
        folder: of the study; its engines are there.
        pipeline: the study's pipeline, where it is loaded already.
    """

    def __init__(self, folder: Path, pipeline: Any = None) -> None:
        self.study = read_study(folder)
        self.compiled = load_own(folder / "engines")
        self._folder = folder
        if pipeline is None:
            dtype = getattr(torch, self.study.dtype)
            pipeline = load_pipeline(self.study.model, dtype, **{self.study.component: None})
        self._pipeline = pipeline
        self._rollouts = Rollouts(pipeline, self.compiled, self.study.call)
        self._distance = get_distance(self.study.distance, self.study.model)
        self._reward = get_reward(self.study.reward, self.study.model)
        self._reference = functools.lru_cache(maxsize=4)(self._sample)

    def calibration(self) -> Calibration:
        """Statistics of the first training batch."""
        file = self._folder / "calibration.safetensors"
        if not file.exists():
            save_calibration(self._rollouts.calibrate(self.study.batch(0)), file)
            self._rollouts.forget()
        return load_calibration(file)

    def forecaster(self) -> Forecaster:
        """The study's forecaster; `fitted` is fitted to the calibration."""
        gram = self.calibration().gram if self.study.forecaster == "fitted" else None
        return get_forecaster(self.study.forecaster, self.study.order, gram)

    @functools.cached_property
    def _cached(self) -> Rollouts:
        return Rollouts(self._pipeline, self.compiled, self.study.call, self.forecaster())

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, tuple[float, ...], tuple[float, ...]]]:
        """Distances and rewards of the samples of each task, those with most in common one after another."""
        for number, mask in sorted(tasks):
            batch = self.study.batch(number)
            noise, full = self._reference(number)
            made = self._cached.generate(Schedule.from_mask(mask), batch)
            if not torch.equal(self._cached.noise().cpu(), noise):
                raise ModelError(
                    f"{self._folder}: its seeds give another noise here than where it was begun; name another folder"
                )
            distances = self._distance(made, full).tolist()
            rewards = self._reward(made, batch.prompts).tolist()
            yield (number, mask), tuple(distances), tuple(rewards)

    def prepare(self, numbers: Iterable[int]) -> None:
        """Make the noise and the uncached results of batches, where they are not there yet."""
        for number in numbers:
            self._reference(number)

    def full(self, number: int) -> Tensor:
        """The uncached results of a batch (samples, *shape), as the pipeline returns them."""
        return self._reference(number)[1]

    def _sample(self, number: int) -> tuple[Tensor, Tensor]:
        """Noise and uncached results of a batch."""
        file = self._folder / "samples" / f"{number}.safetensors"
        if not file.exists():
            full = self._rollouts.full(self.study.batch(number))
            with writing(file) as partial:
                save_file({"noise": self._rollouts.noise().cpu().contiguous(), "full": full.contiguous()}, partial)
            self._rollouts.forget()
        try:
            tensors = load_file(file)
            return tensors["noise"], tensors["full"]
        except (OSError, SafetensorError, KeyError) as error:
            raise ArtifactError(f"{file}: damaged ({error}); remove it, it is then made anew") from None


def judging_batches(count: int) -> tuple[int, ...]:
    """Numbers of held-out batches that no decision is made on."""
    return tuple(range(FIRST_HELD_OUT + 1000, FIRST_HELD_OUT + 1000 + count))


def held_out_batches(count: int) -> tuple[int, ...]:
    """Numbers of the first held-out batches."""
    return tuple(range(FIRST_HELD_OUT, FIRST_HELD_OUT + count))
