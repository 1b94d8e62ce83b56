"""One set of engines for requests that differ in everything: steps, length of the text, size, batch, guidance."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import recache_compile as rc
from recache_compile.config import CompileConfig
from recache_compile.errors import ModelError
from recache_compile.pipelines.varied import PROMPTS, STEP, check_wishes, varied
from recache_compile.runtimes.eager import Eager
from tests.families import EXACT
from tests.zoo.pipelines import PipelineCase, values
from tests.zoo.pipelines_table import all_pipelines

REQUESTS = [
    # steps, length of the text, height and width in units, batch, guidance
    (8, 6, 0, 0, 1, True),
    (20, 9, 1, 0, 1, True),
    (5, 4, 0, 1, 3, True),
    (28, 9, 1, 1, 1, False),
    (50, 6, 0, 1, 2, False),
    (8, 4, 1, 0, 4, True),
]

UNITS = {"FluxPipeline": 32, "WanPipeline": 32, "StableDiffusion3Pipeline": 8, "QwenImagePipeline": 32}
"""Pixels that sizes differ by."""

BATCHES = {"QwenImagePipeline": (1,)}
"""Of pipelines that tell the model the size of every picture, so that each number of them is another kind of call."""


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def arguments(
    case: PipelineCase, steps: int, text: int, high: int, wide: int, batch: int, guided: bool, seed: int = 0
) -> dict[str, Any]:
    """One request: embeddings of its own, for as many tokens and pictures as it says."""
    given = case.arguments(0) | {"num_inference_steps": steps}
    for number, (name, value) in enumerate(given.items()):
        if name.endswith("_mask"):
            given[name] = torch.ones(batch, text, dtype=value.dtype)
        elif isinstance(value, Tensor):
            sizes = (batch, text, value.shape[-1]) if value.dim() == 3 else (batch, value.shape[-1])
            given[name] = drawn(seed + number, *sizes)
    unit = UNITS[case.name]
    given |= {"height": given["height"] + high * unit, "width": given["width"] + wide * unit}
    guidance = "true_cfg_scale" if "true_cfg_scale" in given else "guidance_scale"
    return given if guided else given | {guidance: 1.0}


def draw(pipeline: Any, request: dict[str, Any], **options: Any) -> Tensor:
    return values(pipeline(**request, generator=torch.Generator().manual_seed(0), return_dict=False, **options))


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the programs that were lowered."""
    names: list[str] = []
    lower: Callable[..., None] = Eager.lower
    monkeypatch.setattr(
        Eager, "lower", lambda self, program, *rest: (names.append(program.name), lower(self, program, *rest))[1]
    )
    return names


@pytest.mark.slow
@pytest.mark.parametrize("name", UNITS)
def test_any_request_is_what_the_pipeline_alone_makes_and_compiles_nothing(name: str, lowered: list[str]) -> None:
    case = all_pipelines()[name]
    pipeline, plain = case.make(), case.make()
    batches = BATCHES.get(name, (1, 2, 3))
    seen = [(batch, size) for batch in batches for size in (0, 1)]
    calls = [arguments(case, 4, 6 + 3 * size, size, size, batch, True) for batch, size in seen]
    unguided = [arguments(case, 4, 6 + 3 * size, size, size, 1, False) for size in (0, 1)]
    rc.accelerate(
        pipeline,
        rc.compile(pipeline, call=[*calls, *unguided], budgets=(2, 4), num_steps=4, policy="uniform", runtime="eager"),
    )
    built = len(lowered)
    assert built <= 2 * 3  # for one row and for any number of rows: a prologue and two step programs
    for number, request in enumerate(REQUESTS):
        steps, text, high, wide, batch, guided = request
        batch = batch if name not in BATCHES else 1
        given = arguments(case, steps, text, high, wide, batch, guided, seed=10 * number)
        ours, theirs = draw(pipeline, given, budget=steps), draw(plain, given)
        assert (ours - theirs).abs().max() <= EXACT * theirs.abs().max()
        assert not torch.equal(draw(pipeline, given, budget=2), theirs)
    assert len(lowered) == built


class Tellers:
    """Stands for a pipeline."""

    default_sample_size, vae_scale_factor = 16, 8

    def __call__(
        self, prompt: str = "", height: int | None = None, width: int | None = None, num_images_per_prompt: int = 1
    ) -> None: ...


def test_calls_differ_in_what_is_to_be_free() -> None:
    one, other = varied(Tellers(), {}, ["size"])
    assert one == {"height": 128, "width": 128}
    assert other == {"height": 128 + STEP, "width": 128 + 2 * STEP}
    one, other = varied(Tellers(), {"prompt": "a cat", "width": 8}, ["text"])
    assert one == {"prompt": "a cat", "width": 8}
    assert other == {"prompt": f"a cat, {PROMPTS[1]}", "width": 8}
    several = varied(Tellers(), {"height": 8, "width": 8}, ["batch", "size", "text"])
    assert [each["num_images_per_prompt"] for each in several] == [1, 2, 3] * 2
    assert {(each["prompt"], each["height"]) for each in several} == {
        (PROMPTS[0], 8),
        (f"{PROMPTS[0]}, {PROMPTS[1]}", 8 + STEP),
    }


@pytest.mark.parametrize(
    ("call", "free", "message"),
    [
        ({"prompt_embeds": 1}, "text", "free text: Tellers is called with prompt_embeds"),
        ({"prompt": ["a", "b"]}, "text", "free text: the prompt is"),
    ],
)
def test_what_cannot_be_varied_is_refused(call: dict[str, Any], free: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        varied(Tellers(), call, [free])


def test_wishes_that_contradict_each_other_are_refused() -> None:
    for free, config, message in (
        (["colour"], CompileConfig(), "free 'colour': choose from text, size, batch"),
        (["text"], CompileConfig(free_sizes=False), "not together with fixed sizes"),
        (["size"], CompileConfig(cuda_graphs=True), "CUDA graphs replay calls of one size"),
    ):
        with pytest.raises(ModelError, match=message):
            check_wishes(free, config)
    check_wishes(["text", "size"], replace(CompileConfig(), batching=True))


def test_a_module_says_by_its_examples_what_is_free(flux: torch.nn.Module) -> None:
    with pytest.raises(ModelError, match="give two example_inputs that differ"):
        rc.compile(flux, {"hidden_states": torch.zeros(1, 2, 8)}, free=["size"], budgets=(2,), num_steps=4)
