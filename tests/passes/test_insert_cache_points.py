import pytest
import torch

from recache_compile.errors import PassError
from recache_compile.ir.program import Granularity, Program
from recache_compile.passes.find_cache_sites import find_cache_sites
from recache_compile.passes.insert_cache_points import InsertCachePoints
from recache_compile.passes.ops import CACHE_POINT
from tests.passes.tiny import Attention, Formula, Heads, Plain, annotated, call, captured, example, show


def points(program: Program) -> list[tuple[str, int]]:
    """Name of the marked value and number of every cache point."""
    found = program.module.graph.find_nodes(op="call_function", target=CACHE_POINT)
    return [(str(point.args[0]), point.args[1]) for point in found]


def test_the_head_reads_the_site_through_a_cache_point() -> None:
    assert (
        show(annotated(Plain()))
        == """\
hidden_states: latents 1x3x4
timestep: timestep 1
blocks_0_linear_weight: weight blocks.0.linear.weight
out_weight: weight out.weight
sin = aten.sin.default(timestep)
mul = aten.mul.Tensor(hidden_states, sin)
linear = aten.linear.default(mul, blocks_0_linear_weight)
add = aten.add.Tensor(hidden_states, linear)
cache_point_default = recache.cache_point.default(add, 0)
linear_1 = aten.linear.default(cache_point_default, out_weight)
return [linear_1]"""
    )


def test_a_base_that_is_a_site_is_read_through_its_point() -> None:
    assert (
        show(annotated(Plain(2), Granularity.BLOCK))
        == """\
hidden_states: latents 1x3x4
timestep: timestep 1
blocks_0_linear_weight: weight blocks.0.linear.weight
blocks_1_linear_weight: weight blocks.1.linear.weight
out_weight: weight out.weight
sin = aten.sin.default(timestep)
mul = aten.mul.Tensor(hidden_states, sin)
linear = aten.linear.default(mul, blocks_0_linear_weight)
add = aten.add.Tensor(hidden_states, linear)
cache_point_default = recache.cache_point.default(add, 0, hidden_states)
mul_1 = aten.mul.Tensor(cache_point_default, sin)
linear_1 = aten.linear.default(mul_1, blocks_1_linear_weight)
add_1 = aten.add.Tensor(cache_point_default, linear_1)
cache_point_default_1 = recache.cache_point.default(add_1, 1, cache_point_default)
linear_2 = aten.linear.default(cache_point_default_1, out_weight)
return [linear_2]"""
    )


@pytest.mark.parametrize("granularity", list(Granularity))
def test_cache_points_change_no_value(granularity: Granularity) -> None:
    for module in (Attention(), Heads()):
        inputs = example(module)
        assert torch.equal(call(annotated(module, granularity), inputs)["prediction_0"], module(**inputs))


def test_a_cache_point_is_described_like_its_value() -> None:
    (point,) = annotated(Attention()).module.graph.find_nodes(op="call_function", target=CACHE_POINT)
    assert (point.meta["val"].shape, point.meta["val"].dtype) == (torch.Size([1, 3, 4]), torch.float32)


def test_three_sites_have_three_points() -> None:
    assert points(annotated(Heads(3))) == [("add", 0), ("add_1", 1), ("add_2", 2)]


def test_every_reader_and_the_result_read_the_point() -> None:
    def forward(self: Formula, hidden: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor) -> object:
        prediction = hidden.sin()
        return prediction, prediction.cos(), prediction

    program = annotated(Formula(forward), Granularity.OUTPUT)
    assert points(program) == [("sin", 0), ("cos", 1)]
    sin = next(node for node in program.module.graph.nodes if node.name == "sin")
    assert [user.target for user in sin.users] == [CACHE_POINT]
    assert str(program.module.graph.output_node().args[0]) == (
        "[cache_point_default, cache_point_default_1, cache_point_default]"
    )


def test_a_graph_without_sites_is_left_alone() -> None:
    program = captured(Plain())[0]
    result = InsertCachePoints(())(program)
    assert result.modified is False
    assert show(result.program) == show(program)


def test_the_given_program_stays_as_it_was() -> None:
    program, signature = captured(Plain())
    sites = find_cache_sites(program.module.graph, Granularity.STACK, signature.containers)
    before = show(program)
    result = InsertCachePoints(sites)(program)
    assert result.modified
    assert str(result.program.provenance[-1]) == "insert-cache-points(sites=1)"
    assert show(program) == before


def test_sites_must_have_been_found_in_this_program() -> None:
    other, made = captured(Plain())
    sites = find_cache_sites(other.module.graph, Granularity.STACK, made.containers)
    with pytest.raises(PassError, match="pass insert-cache-points on capture: 1 values of the cache sites are not in"):
        InsertCachePoints(sites)(captured(Plain())[0])


def test_a_second_run_changes_nothing() -> None:
    given, made = captured(Plain())
    sites = find_cache_sites(given.module.graph, Granularity.STACK, made.containers)
    once = InsertCachePoints(sites)(given).program
    twice = InsertCachePoints(sites)(once)
    assert not twice.modified
    assert points(twice.program) == points(once) == [("add", 0)]
