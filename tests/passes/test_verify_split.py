from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx

from recache_compile.errors import PassError
from recache_compile.ir.meta import describe_outputs
from recache_compile.ir.program import Granularity, Program
from recache_compile.passes.base import copy_module, run_passes
from recache_compile.passes.hoist import Hoist
from recache_compile.passes.prologue import build_prologue
from recache_compile.passes.simplify import Simplify
from recache_compile.passes.specialise import Specialise
from recache_compile.passes.verify_split import independent_matmuls, tied_weights, verify_split
from tests.passes.tiny import Attention, Formula, Forward, Heads, Split, annotated, split


def verify(parts: Split) -> None:
    verify_split(parts.annotated, parts.prologue, parts.steps)


def tables(parts: Split) -> set[str | None]:
    """Names of the tables that the prologue makes."""
    return {value.table for value in parts.prologue.outputs}


def split_of(forward: Forward) -> Split:
    return split(Formula(forward), granularity=Granularity.OUTPUT)


def with_outputs(program: Program, outputs: tuple[object, ...]) -> Program:
    """The program with other facts about its results."""
    module = copy_module(program.module)
    describe_outputs(module.graph.output_node(), outputs)
    return replace(program, module=module)


def tied(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
    return self.linear(hidden) + self.linear(context).mean(1)


@pytest.fixture(scope="module")
def parts() -> Split:
    return split(Attention(), patterns=((0,), (2,)))


def test_what_hoist_and_build_prologue_make_is_accepted(parts: Split) -> None:
    assert tables(parts) == {"recompute", "forecast"}
    verify(parts)


def test_mixed_patterns_are_accepted() -> None:
    parts = split(Heads(2), patterns=((0, 0), (0, 2), (2, 0), (2, 2)))
    assert parts.steps.keys() == {"recompute", "pattern_0_2", "pattern_2_0", "forecast"}
    verify(parts)


def test_a_model_with_nothing_to_hoist_is_accepted() -> None:
    parts = split_of(lambda self, hidden, timestep, context: self.linear(hidden))
    assert not tables(parts)
    verify(parts)


def test_a_weight_that_the_model_ties_may_be_read_on_both_sides() -> None:
    parts = split_of(tied)
    assert set(parts.prologue.weights) == set(parts.steps["recompute"].weights) == {"linear.weight", "linear.bias"}
    assert tied_weights(parts.annotated) == {"linear.weight", "linear.bias"}
    verify(parts)


def test_a_weight_that_also_works_on_weights_alone_is_tied() -> None:
    """As where a recurrence begins with zeros: its first round does not depend on the latents."""
    parts = split_of(lambda self, hidden, timestep, context: self.linear(hidden + self.linear(self.table[:3]).exp()))
    assert set(parts.prologue.weights) == {"linear.weight", "linear.bias", "table"}
    assert tied_weights(parts.annotated) == {"linear.weight", "linear.bias"}
    verify(parts)


def test_products_that_stay_because_their_table_would_be_too_large_are_accepted() -> None:
    """The second modulation stays: the embedding that both read is smaller."""
    whole = annotated(Attention())
    step = run_passes(whole, (Specialise((0,)), Hoist(row_bytes=16), Simplify())).renamed("recompute")
    prologue = build_prologue(whole, {"recompute": step})
    assert "blocks.1.modulation.weight" in set(step.weights) - set(prologue.weights)
    verify_split(whole, prologue, {"recompute": step})


def test_a_weight_that_only_the_split_reads_twice_is_refused(parts: Split) -> None:
    """The step program of a model without a tie, next to the prologue of one with a tie."""
    other = split_of(tied)
    untied = annotated(Formula(lambda self, hidden, timestep, context: self.linear(hidden)), Granularity.OUTPUT)
    assert tied_weights(untied) == set()
    message = r"split of recompute: the prologue reads the same weights \['linear.bias', 'linear.weight'\]"
    with pytest.raises(PassError, match=message):
        verify_split(untied, other.prologue, {"recompute": other.steps["recompute"]})


def test_a_matrix_product_left_in_the_step_is_refused(parts: Split) -> None:
    """A step program that was specialised but not hoisted."""
    left = run_passes(parts.annotated, (Specialise((0,)), Simplify())).renamed("recompute")
    names = [node.name for node in left.module.graph.nodes if node.name in independent_matmuls(left)]
    assert len(names) == 1 + 2 * 3  # the timestep embedding; per block modulation, key and value
    with pytest.raises(PassError, match=r"split of recompute: \['linear', .*\] do not depend on the latents"):
        verify_split(parts.annotated, parts.prologue, {"recompute": left})


def test_a_forecast_program_is_checked_too(parts: Split) -> None:
    left = run_passes(parts.annotated, (Specialise((1,)), Simplify())).renamed("forecast")
    with pytest.raises(PassError, match=r"split of forecast: \['linear'\] do not depend on the latents"):
        verify_split(parts.annotated, parts.prologue, {**parts.steps, "forecast": left})


def test_a_table_that_the_prologue_does_not_make_is_refused(parts: Split) -> None:
    with pytest.raises(PassError, match=r"split of recompute: it reads .*row_float32.*, the prologue makes None"):
        verify_split(parts.annotated, parts.prologue, {"elsewhere": parts.steps["recompute"]})


@pytest.mark.parametrize("change", [{"shape": (None, 128)}, {"dtype": torch.bfloat16}], ids=["size", "dtype"])
def test_a_table_of_another_layout_is_refused(parts: Split, change: dict[str, object]) -> None:
    first, *others = parts.prologue.outputs
    prologue = with_outputs(parts.prologue, (replace(first, **change), *others))
    with pytest.raises(PassError, match=r"split of recompute: it reads .*row_float32.*, the prologue makes Value"):
        verify_split(parts.annotated, prologue, {"recompute": parts.steps["recompute"]})


def test_attention_on_the_conditioning_counts_as_a_matrix_product() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return hidden + torch.nn.functional.scaled_dot_product_attention(context, context, context).sum(1)

    program = annotated(Formula(forward), Granularity.OUTPUT)
    assert independent_matmuls(program) == ["scaled_dot_product_attention"]


def test_products_with_the_latents_or_the_history_are_not_independent(parts: Split) -> None:
    for step in parts.steps.values():
        assert independent_matmuls(step) == []
        assert isinstance(step.module, fx.GraphModule)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, hidden, timestep, context: hidden + self.table[:3] + (context + self.table[3:5]).sum(),
        lambda self, hidden, timestep, context: hidden @ self.table[:4].t() + (context @ self.table[:4]).sum(),
    ],
    ids=["positions of two streams", "transposed"],
)
def test_a_weight_that_the_model_ties_through_views_is_accepted(forward: Forward) -> None:
    parts = split_of(forward)
    assert set(parts.prologue.weights) == set(parts.steps["recompute"].weights) == {"table"}
    verify(parts)
