"""Generations of a pipeline under any schedules, on engines that are compiled once."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recache_compile.compiler.compiled import Engines
from recache_compile.errors import ModelError, RecacheError
from recache_compile.ir.forecasters import Forecaster, Reuse
from recache_compile.ir.schedule import Schedule
from recache_compile.pipelines.record import prompted
from recache_compile.pipelines.transformer import CompiledTransformer
from recache_compile.policies.base import Calibration
from recache_compile.policies.calibration import calibrate, step_sizes


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
        """Batch `number` of `size` samples: prompts in turn, beginning anew at batch `first`; seeds count up over all."""
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
        self._pipeline = copy.copy(pipeline)
        self._pipeline.set_progress_bar_config(disable=True)
        self._replay = engines.replay(forecaster or Reuse())
        self._stand_in = CompiledTransformer(
            engines.uncached(), self._pipeline, self.num_steps, dispatcher=self._replay
        )
        setattr(self._pipeline, engines.config.component, self._stand_in)
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
            with self._stand_in.generation(self._pipeline):
                return self._pipeline(**arguments)
        except RecacheError:
            raise
        except Exception as error:  # whatever the pipeline's own checks raise
            raise ModelError(
                f"{type(self._pipeline).__name__}: a generation with {sorted(arguments)} failed: {error}"
            ) from error

    def full(self, batch: Batch) -> Tensor:
        """What the batch becomes when every step is recomputed (samples, *shape)."""
        return self.generate(Schedule.every(self.num_steps), batch)

    def noise(self) -> Tensor:
        """The first latents of the last generation, in the transformer's shape."""
        return min(self._replay.records.items(), key=lambda item: item[0][1])[1].latents[0]

    def forget(self) -> None:
        """Let go of what the last generation left, which is every feature of its recompute steps."""
        self._replay.records.clear()
        self._last = None

    @torch.no_grad()
    def calibrate(self, batch: Batch) -> Calibration:
        """The statistics of one uncached generation of a batch, which is not decoded.

        Raises:
            DispatchError: the generation leaves out steps.
        """
        self._run(Schedule.every(self.num_steps), batch, "latent")
        return calibrate(self._replay.records, len(batch.seeds), self._step_sizes())

    def _step_sizes(self) -> Sequence[float]:
        return tuple(step_sizes(self._pipeline.scheduler))
