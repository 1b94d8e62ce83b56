"""Kinds of calls: constants, inputs whose values were compiled in, results that are None."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recache_compile as rc
from recache_compile.errors import CaptureError, MismatchError

STEPS = 4
OPTIONS = {"budgets": (2, STEPS), "num_steps": STEPS, "granularity": "output", "runtime": "eager"}


class Masked(nn.Module):
    """Its code reads the values of the mask; the second result may be None; constants choose what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        mask: Tensor,
        scale: float = 1.0,
        mode: str = "sin",
        extra: Tensor | None = None,
    ) -> Any:
        kept = self.linear(sample)[:, : int(mask.sum())] * scale
        turned = kept.sin() if mode == "sin" else kept.cos()
        return turned * timestep, None if extra is None else extra * timestep, {"context": None}


MASK, SHORT = torch.tensor([True, True, False]), torch.tensor([True, False, False])


def inputs(step: int = 0, **changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "sample": torch.randn(1, 3, 4, generator=generator),
        "timestep": torch.full((1,), 1.0 - 0.2 * step),
        "mask": MASK.clone(),
    } | changes


def assert_full_budget_is_exact(compiled: rc.Compiled, model: Masked, *kinds: dict[str, Any]) -> None:
    """Every kind of call gives what the model gives, one after the other in each step."""
    run = compiled.dispatcher(budget=STEPS)
    for step in range(STEPS):
        for changes in kinds:
            ours, expected = run(step=step, **inputs(step, **changes)), model(**inputs(step, **changes))
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def model() -> Masked:
    torch.manual_seed(0)
    return Masked()


@pytest.fixture(scope="module")
def masked(model: Masked) -> rc.Compiled:
    with torch.no_grad():
        return rc.compile(model, inputs(), **OPTIONS)


def test_variants_that_differ_in_constants_alone_keep_apart(model: Masked) -> None:
    kinds: tuple[dict[str, Any], ...] = ({}, {"scale": 2.0}, {"mode": "cos"}, {"mode": "cos", "scale": 2.0})
    compiled = rc.compile(model, [inputs(**changes) for changes in kinds], **OPTIONS)
    assert [dict(variant.constants)["scale"] for variant in compiled.variants] == ["1.0", "2.0", "1.0", "2.0"]
    assert_full_budget_is_exact(compiled, model, *kinds)
    assert_full_budget_is_exact(compiled, model, {"scale": 1.0, "mode": "sin"})


def test_a_refusal_names_the_constants_that_differ_from_the_nearest_variant(model: Masked) -> None:
    kinds = ({}, {"mode": "cos", "scale": 2.0})
    run = rc.compile(model, [inputs(**changes) for changes in kinds], **OPTIONS).dispatcher(budget=2)
    with pytest.raises(MismatchError) as caught:
        run(step=0, **inputs(mode="cos", scale=3.0))
    assert str(caught.value) == "no engine for these inputs: scale is 3.0, compiled 2.0; compile for them too"
    with pytest.raises(MismatchError, match=r"extra is float32\[2\], compiled None"):
        run(step=0, **inputs(extra=torch.ones(2)))


def test_a_refused_call_does_not_end_the_generation(masked: rc.Compiled, model: Masked) -> None:
    run = masked.dispatcher(budget=STEPS)
    run(step=0, **inputs())
    with pytest.raises(MismatchError):
        run(step=1, **inputs(1, scale=2.0))
    assert torch.equal(run(step=1, **inputs(1))[0], model(**inputs(1))[0])


def test_values_that_were_compiled_in_are_exact_and_no_input(masked: rc.Compiled, model: Masked) -> None:
    assert list(masked.variants[0].fixed) == ["mask"]
    assert "mask" not in [value.name for value in masked.variants[0].inputs]
    assert_full_budget_is_exact(masked, model, {})


def test_other_values_than_those_compiled_in_are_refused(masked: rc.Compiled) -> None:
    run = masked.dispatcher(budget=2)
    message = "the values of 'mask' are not those compiled, and the model's code decides by them"
    with pytest.raises(MismatchError, match=message):
        run(step=0, **inputs(mask=SHORT))
    given = inputs()
    run(step=0, **given)
    given["mask"][1] = False
    with pytest.raises(MismatchError, match=message):
        run(step=1, **given)
    run(step=1, **inputs(1))


def test_another_size_of_what_was_compiled_in_is_refused(masked: rc.Compiled) -> None:
    with pytest.raises(MismatchError, match=r"mask is bool\[4\], compiled bool\[3\]"):
        masked.dispatcher(budget=2)(step=0, **inputs(mask=torch.ones(4, dtype=torch.bool)))


def test_variants_that_differ_in_values_compiled_in_keep_apart(model: Masked) -> None:
    """Compiling for other values too is the remedy that the refusal names."""
    kinds = ({"mask": MASK}, {"mask": SHORT})
    compiled = rc.compile(model, [inputs(**changes) for changes in kinds], **OPTIONS)
    assert_full_budget_is_exact(compiled, model, *kinds)


def test_results_that_are_none_are_none(masked: rc.Compiled) -> None:
    assert masked.engines.signature.tensors == (True, False, False)
    run = masked.dispatcher(budget=2)
    for step in range(STEPS):
        prediction, extra, more = run(step=step, **inputs(step))
        assert prediction.shape == (1, 2, 4)
        assert (extra, more) == (None, {"context": None})


def test_results_after_one_that_is_none_stay_in_their_place(tmp_path: Path) -> None:
    class Second(Masked):
        def forward(self, sample: Tensor, timestep: Tensor, mask: Tensor) -> Any:
            first, second, _ = super().forward(sample, timestep, mask)
            return {"second": second, "first": first, "embedding": timestep.cos()}

    model = Second()
    compiled = rc.compile(model, inputs(), **OPTIONS)
    compiled.save(tmp_path / "artifact")
    for each in (compiled, rc.load(tmp_path / "artifact")):
        results = each.dispatcher(budget=2)(step=0, **inputs())
        assert list(results) == ["second", "first", "embedding"]
        assert results["second"] is None
        torch.testing.assert_close(results["first"], model(**inputs())["first"])
        assert torch.equal(results["embedding"], inputs()["timestep"].cos())


def test_examples_of_which_one_returns_none_are_refused(model: Masked) -> None:
    with pytest.raises(CaptureError, match="returns another structure"):
        rc.compile(model, [inputs(), inputs(extra=torch.ones(2))], **OPTIONS)


def test_an_artifact_keeps_constants_and_values_that_were_compiled_in(
    masked: rc.Compiled, model: Masked, tmp_path: Path
) -> None:
    masked.save(tmp_path / "artifact")
    loaded = rc.load(tmp_path / "artifact")
    assert torch.equal(loaded.variants[0].fixed["mask"], MASK)
    assert loaded.variants[0].constants == masked.variants[0].constants
    assert_full_budget_is_exact(loaded, model, {})
    with pytest.raises(MismatchError, match="not those compiled"):
        loaded.dispatcher(budget=2)(step=0, **inputs(mask=SHORT))
