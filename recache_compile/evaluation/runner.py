"""Generates the samples of an evaluation and judges them; every process has a runner of its own."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recache_compile.artifact.store import load
from recache_compile.compiler.compiled import Compiled
from recache_compile.evaluation.metrics import judge_of
from recache_compile.evaluation.pretrained import bytes_of
from recache_compile.evaluation.setting import Setting, read_setting
from recache_compile.ir.schedule import Schedule
from recache_compile.pipelines.load import load_pipeline
from recache_compile.pipelines.rollout import Rollouts
from recache_compile.support.tensors import read_tensors, write_tensors

KEPT = 6
"""Samples whose pictures are kept for people to look at."""
PICTURES = "pictures"

Values = Mapping[str, Mapping[str, Tensor]]
"""By mask and metric: (batch,) or (batch, features); `PICTURES` are bytes (kept, 3, H, W)."""


class SampleRunner:
    """Runs batches of an evaluation.

    Args:
        folder: of the evaluation.
        pipeline, compiled: the setting's pipeline and engines, where they are loaded already.
    """

    def __init__(self, folder: Path, pipeline: Any = None, compiled: Compiled | None = None) -> None:
        self._folder, self._setting = folder, read_setting(folder)
        compiled = compiled or load(self._setting.engines(folder), device=self._setting.config.device)
        if pipeline is None:
            dtype, device = getattr(torch, self._setting.config.dtype), torch.device(self._setting.config.device)
            pipeline = load_pipeline(self._setting.model, dtype, device, **{self._setting.config.component: None})
        self._rollouts = Rollouts(pipeline, compiled.engines, self._setting.config.call, compiled.forecaster)
        self._judges = {name: judge_of(name, self._setting.model) for name in self._setting.metrics}

    def run(self, numbers: Iterable[int]) -> Iterator[int]:
        """Generate and judge batches; a number is yielded once the values of its batch are on disk."""
        for number in numbers:
            known = read_values(self._folder, number)
            if missing := missing_of(self._setting, number, known):
                for mask, values in self._judged(number, missing).items():
                    known.setdefault(mask, {}).update(values)
                write_values(self._folder, number, known)
            yield number

    def _judged(self, number: int, missing: Mapping[str, Collection[str]]) -> dict[str, dict[str, Tensor]]:
        """The values that are not known yet."""
        batch = self._setting.batch(number)
        uncached = self._rollouts.uncached(batch)
        found = {}
        for mask, names in sorted(missing.items()):
            made = (
                uncached if mask == self._setting.uncached else self._rollouts.generate(Schedule.from_mask(mask), batch)
            )
            found[mask] = self._values(made, uncached, batch.prompts, names)
            if PICTURES in names:
                found[mask][PICTURES] = _kept(made, number * self._setting.batch_size)
        return found

    @torch.no_grad()
    def _values(
        self, made: Tensor, uncached: Tensor, prompts: Sequence[str], names: Collection[str]
    ) -> dict[str, Tensor]:
        place = torch.device(self._setting.config.device)
        pair = made.to(place), uncached.to(place)
        return {name: self._judges[name](*pair, prompts).detach().cpu() for name in names if name != PICTURES}


def missing_of(setting: Setting, number: int, known: Values) -> dict[str, list[str]]:
    """What of a batch is not known yet: names of metrics by mask."""
    kept = [PICTURES] if number * setting.batch_size < KEPT else []
    left = {
        mask: [name for name in [*names, *kept] if name not in known.get(mask, {})]
        for mask, names in setting.wanted(number).items()
    }
    return {mask: names for mask, names in left.items() if names}


def read_values(folder: Path, number: int) -> dict[str, dict[str, Tensor]]:
    """What is known of a batch.

    Raises:
        ArtifactError: the file is damaged.
    """
    file = _file(folder, number)
    if not file.exists():
        return {}
    values: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(file).items():
        mask, _, name = key.partition(".")
        values.setdefault(mask, {})[name] = tensor
    return values


def write_values(folder: Path, number: int, values: Values) -> None:
    """Write what is known of a batch; if that fails, the earlier file stays as it was."""
    tensors = {f"{mask}.{name}": value for mask, of_mask in values.items() for name, value in of_mask.items()}
    write_tensors(tensors, _file(folder, number))


def _file(folder: Path, number: int) -> Path:
    return folder / "batches" / f"{number}.safetensors"


def _kept(made: Tensor, first: int) -> Tensor:
    """Bytes (kept, 3, H, W) of the first samples; of a video its middle frame."""
    pictures = made[: KEPT - first]
    if pictures.dim() == 5:
        pictures = pictures[:, pictures.shape[1] // 2]
    return bytes_of(pictures)
