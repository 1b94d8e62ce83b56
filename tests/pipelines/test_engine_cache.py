"""`accelerate` without a compilation: engines and schedules are made once, and afterwards found on the disk."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import recache_compile as rc
from recache_compile import api
from recache_compile.pipelines import engine_cache
from tests.families import BUDGET, EXACT, SAME, STEPS, TINY, error, plain
from tests.tiny_pipelines import draw

FLUX = TINY["flux"]
CALL = FLUX.call(0)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often engines are built, and how often a policy is asked, with a cache that is empty at first."""
    monkeypatch.setenv("RECACHE_CACHE", str(tmp_path / "cache"))
    seen: Counter[str] = Counter()
    build_engines, plan_pipeline = engine_cache.build_engines, api.plan_pipeline

    def building(*args: Any) -> rc.Engines:
        seen["built"] += 1
        return build_engines(*args)

    def planning(*args: Any) -> rc.Compiled:
        seen["planned"] += 1
        return plan_pipeline(*args)

    monkeypatch.setattr(engine_cache, "build_engines", building)
    monkeypatch.setattr(api, "plan_pipeline", planning)
    return seen


def accelerated(pipeline: Any, budget: int = BUDGET, call: Any = CALL) -> Any:
    return rc.accelerate(pipeline, budget=budget, num_steps=STEPS, call=call, runtime="eager")


def test_engines_and_schedules_are_found_the_second_time(made: Counter[str]) -> None:
    first, second = accelerated(FLUX.make()), accelerated(FLUX.make())
    assert made == {"built": 1, "planned": 1}
    ours, theirs = first.transformer.compiled, second.transformer.compiled
    assert list(ours.schedules) == [BUDGET]
    assert ours.schedules == theirs.schedules
    assert ours.policy == theirs.policy == "gram"
    assert error(draw(second, CALL, STEPS), draw(first, CALL, STEPS)) <= SAME


def test_every_budget_has_the_same_engines(made: Counter[str]) -> None:
    accelerated(FLUX.make())
    full = accelerated(FLUX.make(), STEPS)
    assert made == {"built": 1, "planned": 2}
    assert error(draw(full, CALL, STEPS), plain(FLUX, CALL)) <= EXACT


def test_another_value_of_a_weight_is_another_model(made: Counter[str]) -> None:
    accelerated(FLUX.make())
    other = FLUX.make()
    other.transformer.proj_out.weight[0, 0] += 1
    expected = draw(other, CALL, STEPS)
    accelerated(other, STEPS)
    assert made["built"] == 2
    assert error(draw(other, CALL, STEPS), expected) <= EXACT


def test_another_size_is_another_call(made: Counter[str]) -> None:
    accelerated(FLUX.make())
    accelerated(FLUX.make(), call=CALL | {"height": 32})
    assert made == {"built": 2, "planned": 2}


def test_damaged_engines_are_built_anew(made: Counter[str], tmp_path: Path) -> None:
    accelerated(FLUX.make())
    (weights,) = (tmp_path / "cache").rglob("weights.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4])
    pipeline = accelerated(FLUX.make())
    assert made == {"built": 2, "planned": 1}
    assert error(draw(pipeline, CALL, STEPS, budget=BUDGET), draw(accelerated(FLUX.make()), CALL, STEPS)) <= SAME
    assert made["built"] == 2


def test_a_cache_that_cannot_be_written_to_is_done_without(
    made: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RECACHE_CACHE", str(tmp_path / "file"))
    assert torch.isfinite(draw(accelerated(FLUX.make()), CALL, STEPS)).all()
    assert made == {"built": 1, "planned": 1}
