"""Several pipelines share engines and weights; each reads its own scheduler."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
)
from peft import LoraConfig
from torch import Tensor

import recache_compile as rc
from recache_compile.errors import ModelError
from recache_compile.pipelines.transformer import CompiledTransformer
from tests.families import BUDGET, DIFFERENT, EXACT, STEPS, TINY, error, family, plain
from tests.tiny_pipelines import draw
from tests.zoo.pipelines_sd3_to_sana import SD3_CONTROL

SD3, IMG2IMG = TINY["sd3"], TINY["sd3-img2img"]


def shifted(pipeline: Any) -> None:
    """Give a pipeline a scheduler of its own, with other timesteps."""
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, shift=5.0)


def made(cls: Any, pipeline: Any, **components: Any) -> Any:
    """Another pipeline of its components."""
    result = cls.from_pipe(pipeline, **components)
    result.set_progress_bar_config(disable=True)
    return result


def at_once(*jobs: Callable[[], Tensor]) -> list[Tensor]:
    """The results of jobs that begin in threads of their own at the same time."""
    start = Barrier(len(jobs))

    def run(job: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            start.wait()
            return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(run, jobs))


def test_a_pipeline_made_of_another_reads_its_own_scheduler() -> None:
    pipeline = family("sd3").pipeline()
    other = made(StableDiffusion3Img2ImgPipeline, pipeline)
    assert isinstance(other.transformer, CompiledTransformer)
    assert other.transformer is pipeline.transformer
    shifted(other)
    expected = plain(SD3, SD3.call(0)), plain(IMG2IMG, IMG2IMG.call(0), shifted)
    assert error(plain(IMG2IMG, IMG2IMG.call(0)), expected[1]) >= DIFFERENT
    for _ in range(2):
        assert error(draw(other, IMG2IMG.call(0), STEPS), expected[1]) <= EXACT
        assert error(draw(pipeline, SD3.call(0), STEPS), expected[0]) <= EXACT
    family("sd3").recomputed()
    draw(other, IMG2IMG.call(0), STEPS, budget=BUDGET)
    assert family("sd3").recomputed()["transformer"] < STEPS // 2
    assert error(draw(rc.restore(other), IMG2IMG.call(0), STEPS), expected[1]) <= EXACT
    assert isinstance(pipeline.transformer, CompiledTransformer)


def test_a_pipeline_of_the_same_components_reads_its_own_scheduler() -> None:
    pipeline, expected = family("sd3").pipeline(), plain(SD3, SD3.call(0), shifted)
    other = diffusers.StableDiffusion3Pipeline(**pipeline.components)
    other.set_progress_bar_config(disable=True)
    shifted(other)
    for _ in range(2):
        assert error(draw(other, SD3.call(0), STEPS), expected) <= EXACT
        assert error(draw(pipeline, SD3.call(0), STEPS), plain(SD3, SD3.call(0))) <= EXACT


def test_threads_with_schedulers_of_their_own() -> None:
    pipeline = family("sd3").pipeline()
    image, again = made(StableDiffusion3Img2ImgPipeline, pipeline), made(diffusers.StableDiffusion3Pipeline, pipeline)
    for each in (image, again):
        shifted(each)
    calls = [(pipeline, SD3.call(0)), (image, IMG2IMG.call(1)), (again, SD3.call(2))]
    expected = [plain(SD3, SD3.call(0)), plain(IMG2IMG, IMG2IMG.call(1), shifted), plain(SD3, SD3.call(2), shifted)]
    for _ in range(4):
        found = at_once(*(lambda one=one, call=call: draw(one, call, STEPS) for one, call in calls))
        assert max(map(error, found, expected)) <= EXACT


def adapted(pipeline: Any) -> None:
    """Put an adapter into a pipeline's transformer."""
    torch.manual_seed(0)
    pipeline.transformer.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_v"]), "a")


def test_pipelines_with_one_transformer_have_one_set_of_adapters() -> None:
    pipeline = family("sd3").pipeline()
    other = made(StableDiffusion3Img2ImgPipeline, pipeline)
    base = draw(other, IMG2IMG.call(0), STEPS)
    adapted(pipeline)
    assert other.get_list_adapters() == {"transformer": ["a"]}
    assert error(draw(other, IMG2IMG.call(0), STEPS), plain(IMG2IMG, IMG2IMG.call(0), adapted)) <= EXACT
    other.set_adapters("a", 0.5)
    expected = plain(SD3, SD3.call(0), lambda one: (adapted(one), one.set_adapters("a", 0.5)))
    assert error(draw(pipeline, SD3.call(0), STEPS), expected) <= EXACT
    other.unload_lora_weights()
    assert pipeline.get_list_adapters() == {}
    assert torch.equal(draw(other, IMG2IMG.call(0), STEPS), base)


def test_modules_with_other_adapters_may_take_turns_on_the_same_engines() -> None:
    """At the price of a change of weights a turn."""
    one, other = family("sd3").pipeline(), family("sd3").pipeline()
    weaker = made(diffusers.StableDiffusion3Pipeline, one, scheduler=copy.deepcopy(one.scheduler))
    adapted(one)
    weak = {"joint_attention_kwargs": {"scale": 0.5}}
    expected = [
        plain(SD3, SD3.call(0), adapted),
        plain(SD3, SD3.call(0)),
        plain(SD3, SD3.call(0), adapted, **weak),
    ]
    found = at_once(
        lambda: draw(one, SD3.call(0), STEPS),
        lambda: draw(other, SD3.call(0), STEPS),
        lambda: draw(weaker, SD3.call(0), STEPS, **weak),
    )
    assert max(map(error, found, expected)) <= EXACT


def test_controlnet_shares_the_engines_and_its_kind_of_call_is_compiled_too() -> None:
    pipeline, reference = SD3.make(), SD3.make()
    torch.manual_seed(1)
    net = diffusers.SD3ControlNetModel(**SD3_CONTROL).eval()
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    call = SD3.call(0) | {"control_image": torch.rand(1, 3, 16, 16), "controlnet_conditioning_scale": 0.7}
    control = made(StableDiffusion3ControlNetPipeline, pipeline, controlnet=net)
    options = {"call": SD3.call(0), "num_steps": STEPS, "budgets": (STEPS,), "policy": "uniform", "runtime": "eager"}
    with pytest.raises(ModelError, match="is not that of StableDiffusion3Pipeline; make the one from the other"):
        rc.compile(
            pipeline, others=[(made(StableDiffusion3ControlNetPipeline, SD3.make(), controlnet=net), call)], **options
        )
    compiled = rc.compile(pipeline, others=[(control, call)], **options)
    assert len(compiled.variants) == 2
    transformer = pipeline.transformer
    assert all(
        compiled.weights[name].data_ptr() == each.data_ptr()
        for name, each in transformer.named_parameters()
        if name in compiled.weights
    )
    rc.accelerate(pipeline, compiled)
    rc.accelerate(control, compiled)
    theirs = made(StableDiffusion3ControlNetPipeline, reference, controlnet=net)

    def controlled(one: Any) -> Tensor:
        torch.manual_seed(0)  # the control image is encoded with noise
        return draw(one, call, STEPS)

    for _ in range(2):
        assert error(controlled(control), controlled(theirs)) <= EXACT
        assert error(draw(pipeline, SD3.call(0), STEPS), draw(reference, SD3.call(0), STEPS)) <= EXACT
    assert error(controlled(theirs), draw(reference, SD3.call(0), STEPS)) >= DIFFERENT
