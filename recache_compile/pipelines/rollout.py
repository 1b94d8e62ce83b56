"""Generations of a pipeline under any schedules, on engines that are compiled once."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from recache_compile.compiler.compiled import Engines
from recache_compile.errors import ModelError, RecacheError, check_memory
from recache_compile.ir.forecasters import Forecaster, Reuse
from recache_compile.ir.schedule import Schedule
from recache_compile.pipelines.accelerate import inner_pipelines, put_in
from recache_compile.pipelines.record import prompted
from recache_compile.pipelines.transformer import CompiledTransformer
from recache_compile.policies.base import Calibration
from recache_compile.policies.calibration import calibrate, step_sizes
from recache_compile.runtimes.dispatcher_observer import StepRecord


@dataclass(frozen=True, slots=True)
class Batch:
    """The samples of one pipeline call.

    Args:
        prompts: one for each sample.
        seeds: of the initial noise of each sample.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]

    @classmethod
    def taken(cls, prompts: Sequence[str], number: int, size: int, seed: int, first: int = 0) -> "Batch":
        """Batch `number` of `size` samples: prompts in turn, anew from batch `first` on; seeds count up over all."""
        places = range(number * size, (number + 1) * size)
        return cls(
            tuple(prompts[(at - first * size) % len(prompts)] for at in places), tuple(seed + at for at in places)
        )


class Rollouts:
    """Runs a pipeline's whole generations.

    Consecutive generations of the same batch share the steps before their schedules differ.

    Args:
        pipeline: a `diffusers` pipeline; it is left as it is.
        engines: of its transformer, for batches of the size that is run.
        call: further arguments of the pipeline.
        forecaster: fills the cached steps, where schedules have any.
    """

    def __init__(
        self, pipeline: Any, engines: Engines, call: Mapping[str, Any], forecaster: Forecaster | None = None
    ) -> None:
        self.num_steps = engines.config.num_steps
        if inner_pipelines(pipeline):
            raise ModelError(
                f"{type(pipeline).__name__}: is made of pipelines, whose generations are not looked at; choose a policy"
                " that needs none (policy='uniform')"
            )
        self._pipeline = copy.copy(pipeline)
        self._pipeline.set_progress_bar_config(disable=True)
        self._replay = engines.replay(forecaster or Reuse())
        self._transformer = CompiledTransformer(
            engines.uncached(), self._pipeline, self.num_steps, dispatcher=self._replay
        )
        put_in(self._pipeline, {engines.config.component: self._transformer})
        self._call = dict(call)
        self._last: Batch | None = None

    @torch.no_grad()
    def generate(self, schedule: Schedule, batch: Batch) -> Tensor:
        """Pictures (batch, 3, H, W) or videos (batch, frames, 3, H, W) in [0, 1], on the CPU.

        Raises:
            ModelError: the pipeline gives neither.
        """
        result = self._run(schedule, batch, "pt")
        made = getattr(result, "images", getattr(result, "frames", None))
        if not isinstance(made, Tensor) or len(made) != len(batch.seeds):
            raise ModelError(
                f"{type(self._pipeline).__name__}: gives no pictures or frames as tensors, one for each prompt"
            )
        return made.detach().float().cpu()

    def _run(self, schedule: Schedule, batch: Batch, output_type: str) -> Any:
        """One pipeline call."""
        self._replay.begin(schedule, same=batch == self._last)
        self._last = batch
        arguments = {
            "num_inference_steps": self.num_steps,
            "output_type": output_type,
            **prompted(self._pipeline, list(batch.prompts), self._call),
            "generator": [torch.Generator().manual_seed(seed) for seed in batch.seeds],
        }
        try:
            return self._pipeline(**arguments)
        except RecacheError:
            raise
        except Exception as error:  # whatever the pipeline's own checks raise
            check_memory(error)
            raise ModelError(
                f"{type(self._pipeline).__name__}: a generation with {sorted(arguments)} failed: {error}"
            ) from error

    def uncached(self, batch: Batch) -> Tensor:
        """What the batch becomes when every step is recomputed (samples, *shape)."""
        return self.generate(Schedule.every(self.num_steps), batch)

    def noise(self) -> Tensor:
        """The first latents of the last generation, in the transformer's shape."""
        return min(self._replay.records.items(), key=lambda item: item[0][1])[1].latents[0]

    def forget(self) -> None:
        """Let go of what the last generation left, which is every feature of its recompute steps."""
        self._replay.forget()
        self._last = None

    @torch.no_grad()
    def calibrate(self, batch: Batch) -> Calibration:
        """The statistics of one uncached generation of a batch, which is not decoded.

        Raises:
            DispatchError: the generation leaves out steps.
        """
        self._run(Schedule.every(self.num_steps), batch, "latent")
        predictions, features = values_of_steps(self._replay.records)
        return calibrate(predictions, features, len(batch.seeds), self._step_sizes())

    def _step_sizes(self) -> Sequence[float]:
        return tuple(step_sizes(self._pipeline.scheduler))


def values_of_steps(
    records: Mapping[tuple[str, int], StepRecord],
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """What one generation computed, each value over the steps that were run.

    Args:
        records: every step of every guidance branch, all recomputed; see `ReplayDispatcher.records`.

    Returns:
        The predictions of each branch and each tensor of its result; the features of each
        branch and each cache site.
    """
    branches: dict[str, list[StepRecord]] = {}
    for (branch, _), record in sorted(records.items(), key=lambda item: item[0]):
        branches.setdefault(branch, []).append(record)
    predictions: list[list[Tensor]] = []
    features: list[list[Tensor]] = []
    for steps in branches.values():
        predictions += map(list, zip(*(_only_tensors(step.result) for step in steps), strict=True))
        features += [[step.features[site] for step in steps] for site in steps[0].features]
    return predictions, features


def _only_tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
