"""What a case of the zoo of pipelines is: one pipeline class of `diffusers`, small, with the arguments of its calls."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor
from torch.utils import _pytree as pytree

from recache_compile.pipelines.record import DENOISER

NUM_STEPS = 6
BUDGET = 3


EXACT = 2e-5
"""Bound of the error where every step is recomputed."""

ROUNDED = 1e-3
"""Kandinsky 5 rounds queries and keys to bfloat16: another order of a sum makes some of them differ by 1 in 256.

Without that rounding the error is 1.3e-7.
"""


@dataclass(frozen=True, slots=True)
class PipelineCase:
    """A pipeline class in a small configuration.

    Args:
        name: its class in `diffusers`.
        make: a new pipeline, the same weights every time; see `tests.tiny_pipelines.maker`.
        call: arguments of one call for prompt number n, with guidance; without generator and
            number of steps.  "output_type" is "latent" unless it says otherwise.
        steps: the call's argument for the number of steps.
        refused: what the message says, where the pipeline cannot run on engines; "" where it can.
        variant: tells several cases of one class apart.
        exact: bound of the error where every step is recomputed: the same float32 operations, some summed
            in another order.
    """

    name: str
    make: Callable[[], DiffusionPipeline]
    call: Callable[[int], dict[str, Any]]
    steps: str = "num_inference_steps"
    refused: str = ""
    variant: str = ""
    exact: float = EXACT

    @property
    def title(self) -> str:
        """The class, and which of its cases this is."""
        return f"{self.name}, {self.variant}" if self.variant else self.name

    def arguments(self, n: int) -> dict[str, Any]:
        """All arguments of one call, but the generator."""
        accepted = inspect.signature(getattr(diffusers, self.name).__call__).parameters
        latent = {"output_type": "latent"} if "output_type" in accepted else {}
        return latent | {self.steps: NUM_STEPS} | self.call(n)

    def draw(self, pipeline: Any, n: int, **options: Any) -> Tensor:
        """All values that one generation for prompt number n returns, in one row."""
        accepted = inspect.signature(getattr(diffusers, self.name).__call__).parameters
        seeded = {"generator": torch.Generator().manual_seed(0)} if "generator" in accepted else {}
        plain = {"return_dict": False} if "return_dict" in accepted else {}
        torch.manual_seed(0)
        return values(pipeline(**seeded | plain | self.arguments(n) | options))


def values(result: Any) -> Tensor:
    """The numbers of a result, whatever it is made of: tensors, arrays, pictures, containers of these."""
    leaves = pytree.tree_leaves(dict(result) if isinstance(result, Mapping) else result)
    rows = [torch.as_tensor(np.asarray(leaf)) for leaf in leaves if isinstance(leaf, (Tensor, np.ndarray, Image.Image))]
    return torch.cat([row.flatten().double() for row in rows])


def pipeline_classes() -> list[str]:
    """Every pipeline class that `diffusers` exports and does not call deprecated, whose denoiser is a transformer."""
    found = []
    for name in sorted(dir(diffusers)):
        kind = getattr(diffusers, name, None)
        if inspect.isclass(kind) and issubclass(kind, DiffusionPipeline) and ".deprecated." not in kind.__module__:
            parameters = inspect.signature(kind.__init__).parameters
            found += [name] if any(DENOISER in each for each in parameters) else []
    return found
