"""Compiling for the command line: what cannot be done is refused before anything takes long."""

from pathlib import Path
from typing import Any

import pytest

import recache_compile as rc
from recache_compile.compiler.lowering import Lowering
from recache_compile.config import CompileConfig
from recache_compile.errors import ModelError
from recache_compile.evaluation import compilation
from recache_compile.evaluation.compilation import CompileRequest, compile_model
from recache_compile.runtimes.registry import get_runtime
from tests.families import EXACT, STEPS, TINY, error
from tests.tiny_pipelines import draw


def worded(*_: Any, **__: Any) -> Any:
    """A pipeline that makes one token of each word."""
    tiny = TINY["flux"]
    pipeline = tiny.make()
    kind = type(pipeline)

    def call_with(self: Any, prompt: str, num_inference_steps: int = 50, **given: Any) -> Any:
        call = tiny.call(0)
        call["prompt_embeds"] = call["prompt_embeds"][:, :1].repeat(1, len(prompt.split()), 1)
        given["num_inference_steps"] = num_inference_steps
        return kind.__call__(self, **{**call, **given})

    pipeline.__class__ = type("Worded", (kind,), {"__call__": call_with})
    return pipeline


def test_prompts_of_other_lengths_are_refused_before_anything_is_lowered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any) -> None:
        raise AssertionError("this takes long")

    monkeypatch.setattr(compilation, "load_pipeline", worded)
    monkeypatch.setattr(Lowering, "lower", forbidden)
    config = CompileConfig(STEPS, runtime="eager", free_sizes=False)
    request = CompileRequest("some/model", config, (3,), policy="uniform", prompts=("a cat", "a black cat"))
    with pytest.raises(
        ModelError, match="prompt 'a black cat': the transformer is called with other shapes than for 'a"
    ):
        compile_model(request, tmp_path / "out", get_runtime("eager"))
    assert not (tmp_path / "out").exists()


def test_prompts_of_other_lengths_make_the_length_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "load_pipeline", worded)
    config = CompileConfig(STEPS, runtime="eager")
    request = CompileRequest("some/model", config, (3,), policy="uniform", prompts=("a cat", "a black cat"))
    made = compile_model(request, tmp_path / "out", get_runtime("eager"))
    (variant,) = made.compiled.variants
    assert variant.programs["recompute"].ranges.popitem()[1] == (2, 3)
    pipeline = rc.accelerate(worded(), rc.load(tmp_path / "out"), budget=STEPS)
    for prompt in ("a cat", "a large black cat that sleeps"):
        ours, theirs = (draw(each, {"prompt": prompt}, STEPS) for each in (pipeline, worded()))
        assert error(ours, theirs) <= EXACT
