"""Who is told of each step of a dispatcher: what the step was given, what it stored and what it returned."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from typing_extensions import override

from recache_compile.support.features import relative_change


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of one guidance branch, as engines ran it.

    Args:
        step: index i of the step, 0..T-1.
        branch: name of the guidance branch.
        kind: the kind of its call; branches may be called in several, each with a history of its own.
        first: whether a generation of this branch and kind begins with it.
        latents: the model's latents inputs.
        result: what the model call returned.
        slot: history slot that the features were stored in; None where the step was forecast.
        features: what was stored, by cache site; empty where the step was forecast.
    """

    step: int
    branch: str
    kind: Hashable
    first: bool
    latents: tuple[Tensor, ...]
    result: Any
    slot: int | None = None
    features: Mapping[int | None, Tensor] = field(default_factory=dict)


class Observer(Protocol):
    """Is told of the steps of a dispatcher."""

    def after_step(self, record: StepRecord) -> None:
        """A step has succeeded.

        Args:
            record: the step.  Features stay as they are; the caller may write to the result and
                to the latents, so an observer that keeps those keeps a copy.
        """
        ...


class StepRecorder(Observer):
    """Keeps the last record of every step.

    Attributes:
        records: by guidance branch and step.
    """

    def __init__(self) -> None:
        self.records: dict[tuple[str, int], StepRecord] = {}

    @override
    def after_step(self, record: StepRecord) -> None:
        latents = tuple(tensor.clone() for tensor in record.latents)
        kept = replace(record, latents=latents, result=copy_of_result(record.result))
        self.records[record.branch, record.step] = kept

    def forget(self, start: int = 0) -> None:
        """Let go of the records of the steps from `start` on."""
        for place in [place for place in self.records if place[1] >= start]:
            del self.records[place]


class FeatureChanges(Observer):
    """Compares each cache site's feature with that of the step before.

    Only two steps' features are held at a time.  Both steps of a pair must be recomputed, so
    the plan for it is one that recomputes every step.

    Args:
        num_steps: length T of the denoising loop.
    """

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._last: dict[tuple[str, Hashable], StepRecord] = {}
        self._found: dict[tuple[int, int], list[Tensor]] = {}

    @override
    def after_step(self, record: StepRecord) -> None:
        last = self._last.get((record.branch, record.kind))
        self._last[record.branch, record.kind] = record
        if last is None or record.first or last.step != record.step - 1:
            return
        for site in record.features.keys() & last.features.keys():
            change = relative_change(record.features[site], last.features[site])
            self._found.setdefault((record.step, site or 0), []).append(change)

    def changes(self) -> list[list[float | None]]:
        """Relative L1 change of each feature by site and step, the mean over guidance branches and generations.

        None where a step was not compared with the one before.
        """
        sites = 1 + max((site for _, site in self._found), default=-1)
        return [
            [
                float(torch.stack(self._found[step, site]).mean()) if (step, site) in self._found else None
                for step in range(self._num_steps)
            ]
            for site in range(sites)
        ]


def copy_of_result(result: Any) -> Any:
    """The same result in memory of its own: callers may write to theirs."""
    return pytree.tree_map_only(Tensor, Tensor.clone, result)
