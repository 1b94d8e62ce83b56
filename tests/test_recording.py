"""Recording how a pipeline calls its transformer."""

from typing import Any

import pytest
import torch

import recache_compile as rc
from recache_compile.errors import ModelError
from recache_compile.recording import record_examples
from tests.conftest import PROMPT

STEPS = 8


def test_a_recording_knows_shapes_and_timesteps(shapes: Any) -> None:
    (example,) = record_examples(shapes, STEPS, {"prompt": PROMPT, "guidance_scale": 3.0})
    assert example.inputs["hidden_states"].shape == (1, 64, 48)
    assert torch.allclose(example.timesteps["timestep"][:, 0] * 1000, shapes.scheduler.timesteps)
    assert "forward" not in vars(shapes.transformer)


def test_a_recording_that_fails_restores_the_transformer(shapes: Any) -> None:
    with pytest.raises(ModelError, match="recording a call"):
        record_examples(shapes, STEPS, {"prompt": "a purple elephant"})
    assert "forward" not in vars(shapes.transformer)


def test_a_pipeline_without_transformer_is_refused() -> None:
    with pytest.raises(ModelError, match="no transformer to compile"):
        rc.compile(object())
