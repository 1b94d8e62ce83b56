"""What a case of the zoo is: one transformer class of `diffusers`, small, with the arguments of one call."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn


class Draw:
    """Makes the tensors of one call; the same seed draws the same values."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal values."""
        return torch.randn(shape, generator=self._generator)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Whole numbers 0..high-1 (int64)."""
        return torch.randint(high, shape, generator=self._generator)


@dataclass(frozen=True, slots=True)
class Case:
    """A transformer class in a small configuration.

    Args:
        name: its class in `diffusers`.
        config: arguments of its constructor.
        inputs: arguments of one call, as its pipeline would pass them, batch 1; the latents are drawn.
        roles: role of inputs whose name does not tell it.
    """

    name: str
    config: Mapping[str, Any]
    inputs: Callable[[Draw], dict[str, Any]]
    roles: Mapping[str, str] = field(default_factory=dict)

    def build(self, seed: int = 0) -> nn.Module:
        """The module with random weights; none of them is constant, or gates would be shut."""
        torch.manual_seed(seed)
        module = getattr(diffusers, self.name)(**self.config).eval()
        for parameter in module.parameters():
            if bool((parameter == parameter.flatten()[0]).all()):
                parameter.data += 0.1 * torch.randn_like(parameter)
        return module
