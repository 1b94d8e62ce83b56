from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from recache_compile.errors import PassError
from recache_compile.ir.program import Granularity, Program, SitePattern
from recache_compile.ir.value import Kind, Value
from recache_compile.passes.insert_cache_points import InsertCachePoints
from recache_compile.passes.specialise import Specialise
from tests.passes.tiny import (
    TOKENS,
    WIDTH,
    Attention,
    Formula,
    Heads,
    Plain,
    annotated,
    call,
    captured,
    example,
    show,
)


def history(program: Program, seed: int = 1) -> dict[str, Tensor]:
    """Random features for every history input."""
    generator = torch.Generator().manual_seed(seed)
    return {
        value.name: torch.randn(value.shape, generator=generator).to(value.dtype)
        for value in program.inputs
        if value.kind is Kind.HISTORY
    }


def specialised(module: nn.Module, pattern: SitePattern, granularity: Granularity = Granularity.STACK) -> Program:
    return Specialise(pattern)(annotated(module, granularity)).program


def names(program: Program) -> tuple[list[str], list[str]]:
    return [value.name for value in program.inputs], [value.name for value in program.outputs]


class InPlace(nn.Module):
    """A block that fills its result slice by slice, as some rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, scale: Tensor) -> Tensor:
        hidden = self.linear(hidden)
        rotated = torch.empty_like(hidden)
        rotated[..., ::2] = hidden[..., 1::2]
        rotated[..., 1::2] = -hidden[..., ::2]
        return rotated * scale


def test_recompute_returns_the_feature_as_well() -> None:
    program = specialised(Plain(), (0,))
    assert (
        show(program)
        == """\
hidden_states: latents 1x3x4
timestep: timestep 1
blocks_0_linear_weight: weight blocks.0.linear.weight
out_weight: weight out.weight
sin = aten.sin.default(timestep)
mul = aten.mul.Tensor(hidden_states, sin)
linear = aten.linear.default(mul, blocks_0_linear_weight)
add = aten.add.Tensor(hidden_states, linear)
linear_1 = aten.linear.default(add, out_weight)
return [linear_1, add]"""
    )
    assert program.outputs[1] == Value("feature_0", Kind.FEATURE, (1, TOKENS, WIDTH), torch.float32, site=0)


def test_forecast_is_a_weighted_sum_and_the_head() -> None:
    program = specialised(Plain(), (2,))
    assert (
        show(program)
        == """\
coefficients: coefficients 2
history_0_0: history 1x3x4
history_0_1: history 1x3x4
out_weight: weight out.weight
select_int = aten.select.int(coefficients, 0, 0)
mul_tensor = aten.mul.Tensor(history_0_0, select_int)
select_int_1 = aten.select.int(coefficients, 0, 1)
mul_tensor_1 = aten.mul.Tensor(history_0_1, select_int_1)
add_tensor = aten.add.Tensor(mul_tensor, mul_tensor_1)
linear_1 = aten.linear.default(add_tensor, out_weight)
return [linear_1]"""
    )
    assert program.inputs[2] == Value("history_0_1", Kind.HISTORY, (1, TOKENS, WIDTH), torch.float32, site=0, slot=1)


def test_recompute_is_exact() -> None:
    module = Attention()
    inputs = example(module)
    results = call(specialised(module, (0,)), inputs)
    assert torch.equal(results["prediction_0"], module(**inputs))
    embedding = module.time(inputs["timestep"][:, None])
    assert torch.equal(results["prediction_0"], module.out(results["feature_0"] + embedding[:, None]))


@pytest.mark.parametrize("anchors", [1, 2, 3])
def test_forecast_equals_the_head_on_the_weighted_sum(anchors: int) -> None:
    module = Attention()
    program = specialised(module, (anchors,))
    held, weights = history(program), torch.randn(anchors, generator=torch.Generator().manual_seed(2))
    feature = sum(weight * held[f"history_0_{slot}"] for slot, weight in enumerate(weights))
    timestep = torch.tensor([0.3])
    expected = module.out(feature + module.time(timestep[:, None])[:, None])
    result = call(program, {**held, "coefficients": weights, "timestep": timestep})
    torch.testing.assert_close(result["prediction_0"], expected)


def test_cached_step_reads_no_block_weights_and_no_input_that_only_blocks_read() -> None:
    program = specialised(Attention(), (2,))
    assert sorted(program.weights) == ["out.bias", "out.weight", "time.bias", "time.weight"]
    assert names(program)[0] == ["timestep", "coefficients", "history_0_0", "history_0_1"]


def test_cached_step_at_output_granularity_runs_no_model_at_all() -> None:
    program = specialised(Attention(), (1,), Granularity.OUTPUT)
    assert names(program) == (["coefficients", "history_0_0"], ["prediction_0"])
    assert program.weights == {}
    assert program.num_calls == 2


@pytest.mark.parametrize(
    ("pattern", "inputs", "outputs"),
    [
        ((0, 0, 0), ["hidden_states", "timestep"], ["prediction_0", "feature_0", "feature_1", "feature_2"]),
        ((1, 1, 1), ["coefficients", "history_0_0", "history_1_0", "history_2_0"], ["prediction_0"]),
        (
            (0, 2, 1),
            ["hidden_states", "timestep", "coefficients", "history_1_0", "history_1_1", "history_2_0"],
            ["prediction_0", "feature_0"],
        ),
    ],
)
def test_three_sites_follow_their_entry_of_the_pattern(
    pattern: SitePattern, inputs: list[str], outputs: list[str]
) -> None:
    assert names(specialised(Heads(3), pattern)) == (inputs, outputs)


@pytest.mark.parametrize("pattern", [(0, 2), (2, 0), (1, 2)])
def test_mixed_patterns_compute_each_site_by_its_own_rule(pattern: SitePattern) -> None:
    module = Heads(2)
    program = specialised(module, pattern)
    inputs, held, weights = example(module), history(program), torch.tensor([1.5, -0.5])
    features = [
        sum(weights[slot] * held[f"history_{site}_{slot}"] for slot in range(anchors))
        if anchors
        else module.blocks[site](inputs["hidden_states"], inputs["timestep"])
        for site, anchors in enumerate(pattern)
    ]
    results = call(program, {**inputs, **held, "coefficients": weights})
    torch.testing.assert_close(results.pop("prediction_0"), torch.cat(features, -1))
    for name, feature in results.items():
        torch.testing.assert_close(feature, features[int(name.removeprefix("feature_"))])
    (coefficients,) = [value for value in program.inputs if value.kind is Kind.COEFFICIENTS]
    assert coefficients == Value("coefficients", Kind.COEFFICIENTS, (max(pattern),), torch.float32)


def test_sites_in_a_chain_keep_the_recomputed_one_downstream_of_the_forecast() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        first = hidden.sin()
        return first, first.cos()

    program = specialised(Formula(forward), (1, 0), Granularity.OUTPUT)
    held = history(program)["history_0_0"]
    results = call(program, {"history_0_0": held, "coefficients": torch.tensor([2.0])})
    torch.testing.assert_close(results["prediction_1"], (2 * held).cos())
    torch.testing.assert_close(results["feature_1"], (2 * held).cos())


def test_bfloat16_history_accumulates_in_float32() -> None:
    module = Plain().to(torch.bfloat16)
    program = Specialise((3,))(annotated(module, Granularity.OUTPUT, example(module, dtype=torch.bfloat16))).program
    assert [value.dtype for value in program.inputs] == [torch.float32, *[torch.bfloat16] * 3]
    held, weights = history(program), torch.tensor([1.625, -0.75, 0.1251])
    terms = [held[f"history_0_{slot}"].float() * weight for slot, weight in enumerate(weights)]
    result = call(program, {**held, "coefficients": weights})["prediction_0"]
    assert torch.equal(result, (terms[0] + terms[1] + terms[2]).to(torch.bfloat16))
    narrow = [held[f"history_0_{slot}"] * weight.bfloat16() for slot, weight in enumerate(weights)]
    assert not torch.equal(result, narrow[0] + narrow[1] + narrow[2])


def test_a_prediction_that_is_stored_is_a_copy_of_its_own() -> None:
    module = Attention()
    inputs = example(module)
    results = call(specialised(module, (0,), Granularity.OUTPUT), inputs)
    assert torch.equal(results["prediction_0"], results["feature_0"])
    results["prediction_0"].zero_()
    assert torch.equal(results["feature_0"], module(**inputs))


def test_a_prediction_that_is_returned_twice_is_stored_once() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        prediction = self.linear(hidden)
        return prediction, prediction

    program = specialised(Formula(forward), (0,), Granularity.OUTPUT)
    assert names(program)[1] == ["prediction_0", "prediction_1", "feature_0"]
    forecast = specialised(Formula(forward), (1,), Granularity.OUTPUT)
    held = history(forecast)
    results = call(forecast, {**held, "coefficients": torch.ones(1)})
    assert torch.equal(results["prediction_0"], held["history_0_0"])
    assert torch.equal(results["prediction_1"], held["history_0_0"])


def test_a_prediction_that_is_a_view_of_the_feature_does_not_share_its_memory() -> None:
    class Flattened(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Flatten()

    module = Flattened()
    results = call(specialised(module, (0,)), example(module))
    feature = results["feature_0"].clone()
    results["prediction_0"].zero_()
    assert torch.equal(results["feature_0"], feature)


def test_other_results_stay_results() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return timestep.sin(), self.linear(hidden)

    program = specialised(Formula(forward), (1,), Granularity.OUTPUT)
    assert names(program) == (["timestep", "coefficients", "history_0_0"], ["prediction_0", "prediction_1"])


def test_the_given_program_stays_as_it_was() -> None:
    program = annotated(Heads(2))
    before, facts = show(program), (program.inputs, program.outputs)
    for pattern in ((0, 0), (2, 2), (0, 1)):
        assert Specialise(pattern)(program).modified
    assert (show(program), (program.inputs, program.outputs)) == (before, facts)


@pytest.mark.parametrize("pattern", [(), (0,), (0, 0, 0, 0)])
def test_a_pattern_of_another_length_is_refused(pattern: SitePattern) -> None:
    message = rf"pass specialise on capture: the pattern has {len(pattern)} entries, the graph 3 cache sites"
    with pytest.raises(PassError, match=message):
        Specialise(pattern)(annotated(Heads(3)))


def test_cache_points_must_have_been_inserted() -> None:
    with pytest.raises(PassError, match="pass specialise on capture: needs insert-cache-points to run first"):
        Specialise((0,))(captured(Plain())[0])


def test_a_graph_without_cache_points_is_left_alone() -> None:
    program = replace(captured(Plain())[0], provenance=())
    result = Specialise(())(InsertCachePoints(())(program).program)
    assert show(result.program) == show(program)
    assert result.modified is False


def test_cached_step_runs_nothing_of_blocks_that_write_in_place() -> None:
    module = Plain()
    module.blocks = nn.ModuleList([InPlace()])
    program = specialised(module, (1,))
    assert names(program)[0] == ["coefficients", "history_0_0"]
    assert list(program.weights) == ["out.weight"]


class Added(nn.Module):
    """What a block adds to its input, without the addition."""

    def __init__(self, module: nn.Module, number: int) -> None:
        super().__init__()
        self.block = module.blocks[number]

    def forward(self, hidden: Tensor, scale: Tensor) -> Tensor:
        return self.block.linear(hidden * scale)


def residual(module: nn.Module, pattern: SitePattern, inputs: dict[str, Tensor] | None = None) -> Program:
    """A step program that caches what every block adds."""
    return Specialise(pattern)(annotated(module, Granularity.BLOCK, inputs)).program


def test_a_recomputed_site_with_a_base_returns_the_difference() -> None:
    program = residual(Plain(), (0,))
    assert (
        show(program)
        == """\
hidden_states: latents 1x3x4
timestep: timestep 1
blocks_0_linear_weight: weight blocks.0.linear.weight
out_weight: weight out.weight
sin = aten.sin.default(timestep)
mul = aten.mul.Tensor(hidden_states, sin)
linear = aten.linear.default(mul, blocks_0_linear_weight)
add = aten.add.Tensor(hidden_states, linear)
linear_1 = aten.linear.default(add, out_weight)
sub_tensor = aten.sub.Tensor(add, hidden_states)
return [linear_1, sub_tensor]"""
    )
    assert program.outputs[1] == Value("feature_0", Kind.FEATURE, (1, TOKENS, WIDTH), torch.float32, site=0)


def test_a_forecast_site_with_a_base_is_added_to_it() -> None:
    program = residual(Plain(), (2,))
    assert (
        show(program)
        == """\
hidden_states: latents 1x3x4
coefficients: coefficients 2
history_0_0: history 1x3x4
history_0_1: history 1x3x4
out_weight: weight out.weight
select_int = aten.select.int(coefficients, 0, 0)
mul_tensor = aten.mul.Tensor(history_0_0, select_int)
select_int_1 = aten.select.int(coefficients, 0, 1)
mul_tensor_1 = aten.mul.Tensor(history_0_1, select_int_1)
add_tensor = aten.add.Tensor(mul_tensor, mul_tensor_1)
add_tensor_1 = aten.add.Tensor(hidden_states, add_tensor)
linear_1 = aten.linear.default(add_tensor_1, out_weight)
return [linear_1]"""
    )


def test_recompute_with_bases_is_exact() -> None:
    module = Attention(3)
    inputs = example(module)
    results = call(residual(module, (0, 0, 0)), inputs)
    assert torch.equal(results["prediction_0"], module(**inputs))
    embedding, hidden = module.time(inputs["timestep"][:, None]), inputs["hidden_states"]
    for number, block in enumerate(module.blocks):
        after = block(hidden, embedding, inputs["encoder_hidden_states"])
        assert torch.equal(results[f"feature_{number}"], after - hidden)
        hidden = after


@pytest.mark.parametrize("pattern", [(0, 0, 0), (1, 1, 1), (2, 2, 2), (0, 2, 0), (2, 0, 1), (1, 2, 0)])
def test_patterns_with_bases_follow_the_stream_block_by_block(pattern: SitePattern) -> None:
    """What a block reads and adds to is what the step made before it, computed or forecast."""
    module = Plain(3)
    program = residual(module, pattern)
    inputs, held, weights = example(module), history(program), torch.tensor([1.5, -0.5])
    hidden, features = inputs["hidden_states"], {}
    for site, anchors in enumerate(pattern):
        if anchors:
            added = sum(weights[slot] * held[f"history_{site}_{slot}"] for slot in range(anchors))
        else:
            added = features[f"feature_{site}"] = Added(module, site)(hidden, inputs["timestep"].sin())
        hidden = hidden + added
    results = call(program, {**inputs, **held, "coefficients": weights[: max(pattern)]})
    torch.testing.assert_close(results.pop("prediction_0"), module.out(hidden))
    torch.testing.assert_close(results, features)


def test_cached_step_with_bases_reads_the_latents_and_no_block_weights() -> None:
    program = residual(Plain(3), (1, 1, 1))
    assert list(program.weights) == ["out.weight"]
    assert names(program)[0] == ["hidden_states", "coefficients", *(f"history_{site}_0" for site in range(3))]


def test_forecasting_the_stored_difference_gives_back_the_value() -> None:
    """One anchor of weight one at the same latents: nothing has changed since."""
    module = Attention(2)
    inputs = example(module)
    recomputed = call(residual(module, (0, 0)), inputs)
    held = {f"history_{site}_0": recomputed[f"feature_{site}"] for site in range(2)}
    cached = call(residual(module, (1, 1)), {**inputs, **held, "coefficients": torch.ones(1)})
    torch.testing.assert_close(cached["prediction_0"], recomputed["prediction_0"])


def test_a_bfloat16_difference_is_taken_in_float32_and_rounded_once() -> None:
    module = Plain(2).to(torch.bfloat16)
    inputs = example(module, dtype=torch.bfloat16)
    program = residual(module, (0, 0), inputs)
    results = call(program, inputs)
    first = module.blocks[0](inputs["hidden_states"], inputs["timestep"].sin())
    second = module.blocks[1](first, inputs["timestep"].sin())
    assert [value.dtype for value in program.outputs] == [torch.bfloat16] * 3
    assert torch.equal(results["prediction_0"], module(**inputs))
    assert torch.equal(results["feature_0"], (first.float() - inputs["hidden_states"].float()).bfloat16())
    assert torch.equal(results["feature_1"], (second.float() - first.float()).bfloat16())
    subtractions = program.module.graph.find_nodes(op="call_function", target=torch.ops.aten.sub.Tensor)
    assert [node.meta["val"].dtype for node in subtractions] == [torch.float32] * 2


def test_a_bfloat16_forecast_is_added_in_float32_and_rounded_once() -> None:
    module = Plain().to(torch.bfloat16)
    module.out = nn.Identity()
    inputs = example(module, dtype=torch.bfloat16)
    program = residual(module, (2,), inputs)
    held, weights = history(program), torch.tensor([1.625, -0.7501])
    terms = [held[f"history_0_{slot}"].float() * weight for slot, weight in enumerate(weights)]
    expected = inputs["hidden_states"].float() + (terms[0] + terms[1])
    result = call(program, {**inputs, **held, "coefficients": weights})["prediction_0"]
    assert torch.equal(result, expected.bfloat16())
    twice = inputs["hidden_states"] + (terms[0] + terms[1]).bfloat16()
    assert not torch.equal(result, twice)


def test_a_difference_of_float64_stays_in_float64() -> None:
    module = Plain().double()
    inputs = example(module, dtype=torch.float64)
    results = call(residual(module, (0,), inputs), inputs)
    after = module.blocks[0](inputs["hidden_states"], inputs["timestep"].sin())
    assert torch.equal(results["feature_0"], after - inputs["hidden_states"])


def test_a_base_of_the_stack_is_what_goes_into_its_first_block() -> None:
    module = Plain(3)
    program = annotated(module, Granularity.STACK, residual=True)
    inputs, weights = example(module), torch.tensor([2.0, -0.5])
    results = call(Specialise((0,))(program).program, inputs)
    hidden = inputs["hidden_states"]
    for block in module.blocks:
        hidden = block(hidden, inputs["timestep"].sin())
    assert torch.equal(results["feature_0"], hidden - inputs["hidden_states"])
    forecast = Specialise((2,))(program).program
    held = history(forecast)
    result = call(forecast, {**inputs, **held, "coefficients": weights})["prediction_0"]
    added = 2 * held["history_0_0"] - 0.5 * held["history_0_1"]
    torch.testing.assert_close(result, module.out(inputs["hidden_states"] + added))
