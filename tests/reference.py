"""An independent eager reference: forward hooks on the original module, forecasts on features.

It shares no code with the product: features are kept as difference tables, updated as the
papers' own recursions say, where the product keeps raw anchors and weights.
"""

from itertools import pairwise
from math import factorial

import torch
from torch import nn


def hermite(n: int, x: float) -> float:
    """Physicists' Hermite polynomial by its three-term recurrence."""
    before, now = 0.0, 1.0
    for i in range(n):
        before, now = now, 2 * x * now - 2 * i * before
    return now


class CachedReference:
    """Runs a FLUX transformer with its last block's hidden states replaced on cached steps."""

    def __init__(self, module: nn.Module, recompute_steps: tuple[int, ...], forecaster: str, order: int) -> None:
        self.module, self.recompute_steps = module, recompute_steps
        self.forecaster, self.order = forecaster, order
        self.table: list[torch.Tensor] = []
        self.anchors: list[tuple[int, torch.Tensor]] = []
        self.step = 0
        module.single_transformer_blocks[-1].register_forward_hook(self._hook)

    def __call__(self, step: int, **inputs: torch.Tensor) -> torch.Tensor:
        self.step = step
        return self.module(**inputs, return_dict=False)[0]

    def _hook(self, module: nn.Module, args: object, output: tuple[torch.Tensor, torch.Tensor]) -> tuple:
        text, hidden = output
        if self.step in self.recompute_steps:
            self._store(hidden)
            return output
        return text, self._forecast()

    def _store(self, feature: torch.Tensor) -> None:
        feature = feature.double()
        table = [feature]
        if self.anchors:
            gap = self.step - self.anchors[-1][0]
            for older in self.table[: self.order]:
                table.append((table[-1] - older) / gap)
        self.table = table
        self.anchors.append((self.step, feature))

    def _forecast(self) -> torch.Tensor:
        x = self.step - self.anchors[-1][0]
        if self.forecaster == "reuse":
            value = self.table[0]
        elif self.forecaster == "taylor":
            value = sum(x**i / factorial(i) * term for i, term in enumerate(self.table))
        elif self.forecaster == "hicache":
            value = sum(0.5**i * hermite(i, 0.5 * x) / factorial(i) * term for i, term in enumerate(self.table))
        else:
            value = self._newton()
        return value.float()

    def _newton(self) -> torch.Tensor:
        """Newton's divided differences, newest anchor first."""
        points = self.anchors[-(self.order + 1) :][::-1]
        column = [feature for _, feature in points]
        value, product = column[0], 1.0
        for width in range(1, len(points)):
            column = [
                (after - before) / (points[i + width][0] - points[i][0])
                for i, (before, after) in enumerate(pairwise(column))
            ]
            product *= self.step - points[width - 1][0]
            value = value + product * column[0]
        return value
