"""Scenes and their pictures, for tests of what judges them."""

import random

import torch
from torch import Tensor

from recache_compile.models.shapes.scenes import Scene, render, sample_scene


def scenes(count: int, seed: int = 0) -> tuple[list[Scene], Tensor]:
    """Scenes and pictures of them (count, 3, 32, 32) in [0, 1]."""
    rng = random.Random(seed)
    drawn = [sample_scene(rng) for _ in range(count)]
    attributes = torch.tensor([scene.attributes() for scene in drawn])
    return drawn, (render(attributes, torch.Generator().manual_seed(seed)) + 1) / 2
