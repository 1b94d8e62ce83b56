import pytest
import torch
from torch import Tensor, nn

from recache_compile.errors import PassError
from recache_compile.passes.base import run_passes
from recache_compile.passes.find_cache_sites import FindCacheSites, block_of
from recache_compile.program import Granularity, Program
from tests.passes.tiny import Attention, Block, Formula, Heads, Plain, call, captured, example, show


def find(module: nn.Module, granularity: Granularity, inputs: dict[str, Tensor] | None = None) -> Program:
    program, signature = captured(module, inputs)
    return FindCacheSites(granularity, signature.containers)(program).program


def sites(program: Program) -> dict[int, str]:
    return {node.meta["site"]: node.name for node in program.module.graph.nodes if "site" in node.meta}


class Pair(nn.Module):
    """A block that holds a list itself."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Block(), Block()])

    def forward(self, hidden: Tensor, scale: Tensor) -> Tensor:
        for part in self.parts:
            hidden = part(hidden, scale)
        return hidden.cos()


class TwoStacks(nn.Module):
    """Two module lists one after the other, and a skip connection from the first to the end."""

    def __init__(self) -> None:
        super().__init__()
        self.joint = nn.ModuleList([Block(), Block()])
        self.single = nn.ModuleList([Block()])

    def forward(self, hidden_states: Tensor, timestep: Tensor, skip: bool) -> Tensor:
        for block in self.joint:
            hidden_states = block(hidden_states, timestep)
        early = hidden_states
        for block in self.single:
            hidden_states = block(hidden_states, timestep)
        return hidden_states + early if skip else hidden_states.sin()


def test_the_stack_site_is_what_leaves_the_last_block() -> None:
    assert (
        show(find(Plain(), Granularity.STACK))
        == """\
hidden_states: latents 1x3x4
timestep: timestep 1
blocks_0_linear_weight: weight blocks.0.linear.weight
out_weight: weight out.weight
sin = aten.sin.default(timestep)
mul = aten.mul.Tensor(hidden_states, sin)
linear = aten.linear.default(mul, blocks_0_linear_weight)
add = aten.add.Tensor(hidden_states, linear)  # site 0
linear_1 = aten.linear.default(add, out_weight)
return [linear_1]"""
    )


def test_the_output_site_is_the_prediction() -> None:
    assert sites(find(Plain(), Granularity.OUTPUT)) == {0: "linear_1"}


def test_marks_change_no_value_and_not_the_given_program() -> None:
    module = Plain(num_blocks=2)
    program, signature = captured(module)
    result = FindCacheSites(Granularity.STACK, signature.containers)(program)
    assert result.modified
    assert sites(program) == {}
    assert torch.equal(call(result.program, example(module))["prediction_0"], module(**example(module)))


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_a_chain_of_blocks_has_one_site(num_blocks: int) -> None:
    assert len(sites(find(Attention(num_blocks), Granularity.STACK))) == 1


def test_blocks_that_the_head_reads_are_a_site_each_in_graph_order() -> None:
    assert sites(find(Heads(3), Granularity.STACK)) == {0: "add", 1: "add_1", 2: "add_2"}


def test_a_value_between_two_stacks_is_no_site_unless_the_head_reads_it() -> None:
    module, inputs = TwoStacks(), example(Plain())
    assert sites(find(module, Granularity.STACK, inputs | {"skip": False})) == {0: "add_2"}
    assert sites(find(module, Granularity.STACK, inputs | {"skip": True})) == {0: "add_1", 1: "add_2"}


def test_a_list_inside_a_block_does_not_make_blocks_of_its_own() -> None:
    module = Plain()
    module.blocks = nn.ModuleList([Pair(), Pair()])
    program, signature = captured(module)
    assert signature.containers == ("blocks", "blocks.0.parts", "blocks.1.parts")
    graph = program.module.graph
    calls = [
        node for node in graph.nodes if node.name in ("linear", "linear_1", "cos", "linear_2", "linear_3", "cos_1")
    ]
    assert [block_of(node, signature.containers) for node in calls] == ["blocks.0"] * 3 + ["blocks.1"] * 3
    assert sites(find(module, Granularity.STACK)) == {0: "cos_1"}


def test_nodes_outside_the_blocks_have_no_block() -> None:
    program, signature = captured(Plain(2))
    blocks = {node.name: block_of(node, signature.containers) for node in program.module.graph.nodes}
    assert (blocks["sin"], blocks["linear_2"]) == (None, None)
    assert (blocks["linear"], blocks["add_1"]) == ("blocks.0", "blocks.1")
    assert block_of(next(iter(program.module.graph.nodes)), signature.containers) is None


def test_what_a_block_makes_without_the_latents_is_no_site() -> None:
    class Independent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block()])

        def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
            return hidden_states + self.blocks[0](encoder_hidden_states, timestep).sum()

    program, signature = captured(Independent())
    with pytest.raises(PassError, match="no repeated block makes a value that depends on the latents"):
        FindCacheSites(Granularity.STACK, signature.containers)(program)


def test_every_prediction_that_depends_on_the_latents_is_a_site_once() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        first, second = hidden.sin(), hidden.cos()
        return second, timestep.sin(), first, second

    assert sites(find(Formula(forward), Granularity.OUTPUT)) == {0: "cos", 1: "sin"}


def test_a_model_without_blocks_is_refused_with_the_remedy() -> None:
    program, signature = captured(Formula(lambda self, hidden, timestep, context: self.linear(hidden)))
    message = "pass find-cache-sites on capture: no cache site at granularity 'stack': .*; use granularity 'output'"
    with pytest.raises(PassError, match=message):
        FindCacheSites(Granularity.STACK, signature.containers)(program)
    assert sites(program) == {}
    assert sites(FindCacheSites(Granularity.OUTPUT, signature.containers)(program).program) == {0: "linear"}


def test_a_prediction_without_latents_is_refused_with_another_remedy() -> None:
    program, signature = captured(Formula(lambda self, hidden, timestep, context: context.sin()))
    with pytest.raises(PassError, match="no cache site at granularity 'output'") as caught:
        FindCacheSites(Granularity.OUTPUT, signature.containers)(program)
    assert "use 'output'" not in str(caught.value)


def test_a_second_run_replaces_the_marks_of_the_first() -> None:
    program, signature = captured(Plain())
    passes = [FindCacheSites(each, signature.containers) for each in (Granularity.STACK, Granularity.OUTPUT)]
    marked = [node.name for node in run_passes(program, passes).module.graph.nodes if "site" in node.meta]
    assert marked == ["linear_1"]


def test_marks_that_are_there_already_are_no_change() -> None:
    program, signature = captured(Plain())
    each = FindCacheSites(Granularity.STACK, signature.containers)
    assert each(each(program).program).modified is False
