"""Runs the generations of a study."""

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recache_compile.artifact.store import load_own
from recache_compile.errors import ModelError
from recache_compile.evaluation.distances import get_distance
from recache_compile.evaluation.rewards import get_reward
from recache_compile.ir.forecasters import Forecaster, get_forecaster
from recache_compile.ir.schedule import Schedule
from recache_compile.pipelines.engines import engines_of_pipeline
from recache_compile.pipelines.load import load_pipeline
from recache_compile.pipelines.record import prompted
from recache_compile.pipelines.rollout import Rollouts
from recache_compile.policies.base import Calibration
from recache_compile.policies.calibration import load_calibration, save_calibration
from recache_compile.search.study import Study, Task, read_study, write_study
from recache_compile.support.tensors import read_tensors, write_tensors


def build_study_engines(study: Study, folder: Path, pipeline: Any) -> None:
    """Build the engines of a study for its batch size, unless they are there, and begin it.

    A study that cannot be compiled leaves nothing behind.

    Args:
        study: what is studied.
        folder: of the study.
        pipeline: with the transformer's weights.
    """
    if (folder / "engines").exists():
        return
    call = prompted(pipeline, list(study.batch(0).prompts), study.config.call)
    engines = engines_of_pipeline(pipeline, study.config, [call])
    write_study(study, folder)
    engines.uncached().save(folder / "engines")


class StudyRunner:
    """Runs the generations of a study; each process that does so has one of its own.

    Args:
        folder: of the study; its engines are there.
        pipeline: the study's pipeline, where it is loaded already.
    """

    def __init__(self, folder: Path, pipeline: Any = None) -> None:
        self.study = read_study(folder)
        self.engines = load_own(folder / "engines").engines
        self._folder = folder
        if pipeline is None:
            dtype = getattr(torch, self.study.config.dtype)
            pipeline = load_pipeline(self.study.model, dtype, **{self.study.config.component: None})
        self._pipeline = pipeline
        self._rollouts = Rollouts(pipeline, self.engines, self.study.config.call)
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
        return Rollouts(self._pipeline, self.engines, self.study.config.call, self.forecaster())

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

    def uncached(self, number: int) -> Tensor:
        """The uncached results of a batch (samples, *shape), as the pipeline returns them."""
        return self._reference(number)[1]

    def _sample(self, number: int) -> tuple[Tensor, Tensor]:
        """Noise and uncached results of a batch."""
        file = self._folder / "samples" / f"{number}.safetensors"
        if not file.exists():
            uncached = self._rollouts.uncached(self.study.batch(number))
            write_tensors({"noise": self._rollouts.noise().cpu(), "uncached": uncached}, file)
            self._rollouts.forget()
        tensors = read_tensors(file, ("noise", "uncached"))
        return tensors["noise"], tensors["uncached"]
