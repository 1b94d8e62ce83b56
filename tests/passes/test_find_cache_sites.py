from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, fx, nn

from recache_compile.errors import PassError
from recache_compile.ir.meta import block_of, by_origin, describe_input, module_paths
from recache_compile.ir.program import Granularity, Program
from recache_compile.ir.value import Kind, Value
from recache_compile.passes.base import copy_module
from recache_compile.passes.find_cache_sites import find_cache_sites
from tests.passes.tiny import WIDTH, Attention, Block, Formula, Heads, Plain, captured, example, show


@dataclass(frozen=True, slots=True)
class Found:
    """A program and the nodes of its cache sites, with their bases."""

    program: Program
    sites: tuple[tuple[fx.Node, fx.Node | None], ...]


def find(
    module: nn.Module,
    granularity: Granularity,
    inputs: dict[str, Tensor] | None = None,
    residual: bool | None = None,
) -> Found:
    program, made = captured(module, inputs)
    found = find_cache_sites(program.module.graph, granularity, made.containers, residual)
    nodes = by_origin(program.module.graph)
    return Found(program, tuple((nodes[site.node], None if site.base is None else nodes[site.base]) for site in found))


def sites(found: Found) -> dict[int, str]:
    return {number: node.name for number, (node, _) in enumerate(found.sites)}


def bases(found: Found) -> dict[str, str | None]:
    """Name of the base of every site, by the site's name."""
    return {node.name: base and base.name for node, base in found.sites}


def show_sites(found: Found) -> str:
    """The graph, one node a line, with the number and the base of every site."""
    marks = {
        node.name: f"  # site {number}" + ("" if base is None else f" less {base.name}")
        for number, (node, base) in enumerate(found.sites)
    }
    return "\n".join(line + marks.get(line.partition(" = ")[0], "") for line in show(found.program).splitlines())


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
        show_sites(find(Plain(), Granularity.STACK))
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


def test_sites_leave_the_graph_as_it_was_and_are_found_again_in_a_copy() -> None:
    program, made = captured(Plain(num_blocks=2))
    before = show(program)
    found = find_cache_sites(program.module.graph, Granularity.BLOCK, made.containers)
    assert show(program) == before
    assert found == find_cache_sites(copy_module(program.module).graph, Granularity.BLOCK, made.containers)


def test_a_graph_that_was_not_captured_has_no_sites_to_tell() -> None:
    graph = fx.Graph()
    hidden = graph.placeholder("hidden")
    describe_input(hidden, Value("hidden", Kind.LATENTS, (2,), torch.float32))
    graph.output([hidden])
    with pytest.raises(PassError, match="node hidden is of no captured program"):
        find_cache_sites(graph, Granularity.OUTPUT, ())


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
    program, made = captured(module)
    assert made.containers == ("blocks", "blocks.0.parts", "blocks.1.parts")
    graph = program.module.graph
    calls = [
        node for node in graph.nodes if node.name in ("linear", "linear_1", "cos", "linear_2", "linear_3", "cos_1")
    ]
    assert [block_of(node, made.containers) for node in calls] == ["blocks.0"] * 3 + ["blocks.1"] * 3
    assert sites(find(module, Granularity.STACK)) == {0: "cos_1"}


def test_nodes_outside_the_blocks_have_no_block() -> None:
    program, made = captured(Plain(2))
    blocks = {node.name: block_of(node, made.containers) for node in program.module.graph.nodes}
    assert (blocks["sin"], blocks["linear_2"]) == (None, None)
    assert (blocks["linear"], blocks["add_1"]) == ("blocks.0", "blocks.1")
    assert block_of(next(iter(program.module.graph.nodes)), made.containers) is None


def test_what_a_block_makes_without_the_latents_is_no_site() -> None:
    class Independent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block()])

        def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
            return hidden_states + self.blocks[0](encoder_hidden_states, timestep).sum()

    program, made = captured(Independent())
    with pytest.raises(PassError, match="no repeated block makes a value that depends on the latents"):
        find_cache_sites(program.module.graph, Granularity.STACK, made.containers)


def test_every_prediction_that_depends_on_the_latents_is_a_site_once() -> None:
    def forward(self: Formula, hidden: Tensor, timestep: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        first, second = hidden.sin(), hidden.cos()
        return second, timestep.sin(), first, second

    assert sites(find(Formula(forward), Granularity.OUTPUT)) == {0: "cos", 1: "sin"}


def test_a_model_without_blocks_is_refused_with_the_remedy() -> None:
    program, made = captured(Formula(lambda self, hidden, timestep, context: self.linear(hidden)))
    message = "find-cache-sites: no cache site at granularity 'stack': .*; use granularity 'output'"
    with pytest.raises(PassError, match=message):
        find_cache_sites(program.module.graph, Granularity.STACK, made.containers)
    assert len(find_cache_sites(program.module.graph, Granularity.OUTPUT, made.containers)) == 1


def test_a_prediction_without_latents_is_refused_with_another_remedy() -> None:
    program, made = captured(Formula(lambda self, hidden, timestep, context: context.sin()))
    with pytest.raises(PassError, match="no cache site at granularity 'output'") as caught:
        find_cache_sites(program.module.graph, Granularity.OUTPUT, made.containers)
    assert "use 'output'" not in str(caught.value)


class TwoStreams(nn.Module):
    """Attention in both directions and an MLP, each behind a norm or a gate, as in FLUX's double blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.text_attention, self.inner, self.mlp = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.gate = nn.Linear(1, WIDTH)

    def forward(self, hidden: Tensor, text: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        joint = hidden.mean(1, keepdim=True) + text.mean(1, keepdim=True)
        gate = self.gate(timestep[:, None])
        hidden = hidden + gate * self.attention(joint)
        hidden = hidden + self.mlp(self.inner(hidden).relu()).tanh()
        return hidden, text + self.text_attention(joint)


class Joint(nn.Module):
    """Blocks on two streams; the text stream of the last one is not used."""

    def __init__(self, num_blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TwoStreams() for _ in range(num_blocks))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        hidden, text = hidden_states.sin(), encoder_hidden_states
        for block in self.blocks:
            hidden, text = block(hidden, text, timestep)
        return self.out(hidden)


def modules_of(found: Found) -> list[str]:
    """Dotted names of the modules that made the sites."""
    return [module_paths(node)[-1] for node, _ in found.sites]


def test_every_block_has_a_site_that_is_less_what_goes_into_it() -> None:
    assert (
        show_sites(find(Plain(2), Granularity.BLOCK))
        == """\
hidden_states: latents 1x3x4
timestep: timestep 1
blocks_0_linear_weight: weight blocks.0.linear.weight
blocks_1_linear_weight: weight blocks.1.linear.weight
out_weight: weight out.weight
sin = aten.sin.default(timestep)
mul = aten.mul.Tensor(hidden_states, sin)
linear = aten.linear.default(mul, blocks_0_linear_weight)
add = aten.add.Tensor(hidden_states, linear)  # site 0 less hidden_states
mul_1 = aten.mul.Tensor(add, sin)
linear_1 = aten.linear.default(mul_1, blocks_1_linear_weight)
add_1 = aten.add.Tensor(add, linear_1)  # site 1 less add
linear_2 = aten.linear.default(add_1, out_weight)
return [linear_2]"""
    )


def test_every_stream_that_leaves_a_block_is_a_site() -> None:
    found = find(Joint(3), Granularity.BLOCK)
    assert bases(found) == {
        "add_2": "sin",
        "add_3": "encoder_hidden_states",
        "add_6": "add_2",
        "add_7": "add_3",
        "add_10": "add_6",
    }
    assert list(sites(found)) == list(range(5))


def test_a_stream_that_a_block_hands_on_unchanged_is_no_site() -> None:
    class Untouched(nn.Module):
        def forward(self, hidden: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            return hidden * scale, hidden

    class Model(Plain):
        def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
            changed, same = self.blocks[0](hidden_states, timestep)
            return self.out(changed + same)

    module = Model()
    module.blocks = nn.ModuleList([Untouched()])
    assert bases(find(module, Granularity.BLOCK)) == {"mul": None}


def test_what_a_block_makes_without_the_latents_is_no_site_of_a_block() -> None:
    class Modulated(Block):
        def forward(self, hidden: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(hidden, scale), scale.cos()

    class Model(Plain):
        def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
            hidden_states, scale = self.blocks[0](hidden_states, timestep)
            return self.out(hidden_states * scale)

    module = Model()
    module.blocks = nn.ModuleList([Modulated()])
    assert bases(find(module, Granularity.BLOCK)) == {"add": "hidden_states"}


def test_a_list_inside_a_block_makes_no_sites_of_its_own() -> None:
    module = Plain()
    module.blocks = nn.ModuleList([Pair(), Pair()])
    assert bases(find(module, Granularity.BLOCK)) == {"cos": None, "cos_1": None}


def test_module_sites_are_the_last_products_of_every_branch() -> None:
    """The text stream reaches the results through the attention of the next block alone."""
    found = find(Joint(), Granularity.MODULE)
    assert modules_of(found) == [f"blocks.{number}.{name}" for number in range(2) for name in ("attention", "mlp")]
    assert set(bases(found).values()) == {None}


def test_products_that_are_read_by_another_product_alone_are_no_sites() -> None:
    """Query, key, value and modulation are not; what attention puts out is."""
    assert modules_of(find(Attention(2), Granularity.MODULE)) == ["blocks.0.out", "blocks.1.out"]


def test_products_outside_of_blocks_are_no_sites() -> None:
    class Model(Plain):
        def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
            return super().forward(self.out(hidden_states), timestep)

    assert modules_of(find(Model(2), Granularity.MODULE)) == ["blocks.0.linear", "blocks.1.linear"]


def test_the_residual_of_a_stack_is_less_what_goes_into_the_first_block() -> None:
    assert bases(find(Plain(3), Granularity.STACK, residual=True)) == {"add_2": "hidden_states"}
    assert bases(find(Joint(2), Granularity.STACK, residual=True)) == {"add_6": "sin"}
    assert bases(find(Heads(2), Granularity.STACK, residual=True)) == {"add": "hidden_states", "add_1": "hidden_states"}


@pytest.mark.parametrize(
    ("granularity", "residual", "has_base"),
    [
        (Granularity.STACK, None, False),
        (Granularity.STACK, False, False),
        (Granularity.STACK, True, True),
        (Granularity.BLOCK, None, True),
        (Granularity.BLOCK, False, False),
        (Granularity.BLOCK, True, True),
    ],
)
def test_differences_are_the_default_at_blocks_alone(
    granularity: Granularity, residual: bool | None, has_base: bool
) -> None:
    found = bases(find(Plain(), granularity, residual=residual))
    assert found == {"add": "hidden_states" if has_base else None}


class PostNorm(Block):
    """A norm behind the addition ends the stream."""

    def forward(self, hidden: Tensor, scale: Tensor) -> Tensor:
        return nn.functional.layer_norm(super().forward(hidden, scale), (WIDTH,))


def post_norm(*others: nn.Module) -> Plain:
    module = Plain()
    module.blocks = nn.ModuleList([PostNorm(), *others])
    return module


def test_a_block_without_a_stream_is_cached_as_it_is_beside_others() -> None:
    assert bases(find(post_norm(Block()), Granularity.BLOCK)) == {"layer_norm": None, "add_1": "layer_norm"}
    assert bases(find(post_norm(Block()), Granularity.BLOCK, residual=True))["layer_norm"] is None
    assert bases(find(post_norm(), Granularity.BLOCK)) == {"layer_norm": None}


@pytest.mark.parametrize("granularity", [Granularity.STACK, Granularity.BLOCK])
def test_a_model_without_any_stream_has_no_residual_to_cache(granularity: Granularity) -> None:
    with pytest.raises(PassError, match="no residual to cache: no stream is carried from a block's input"):
        find(post_norm(), granularity, residual=True)


@pytest.mark.parametrize("granularity", [Granularity.OUTPUT, Granularity.MODULE])
def test_where_no_stream_goes_in_there_is_no_residual(granularity: Granularity) -> None:
    message = rf"residual caching needs granularity 'stack' or 'block', not '{granularity.value}'"
    with pytest.raises(PassError, match=message):
        find(Plain(), granularity, residual=True)


@pytest.mark.parametrize(
    ("granularity", "message"),
    [
        (Granularity.BLOCK, "no repeated block makes a value that depends on the latents; use granularity 'output'"),
        (Granularity.MODULE, "no repeated block multiplies matrices that depend on the latents; use granularity"),
    ],
)
def test_a_model_without_blocks_has_no_site_in_them(granularity: Granularity, message: str) -> None:
    with pytest.raises(PassError, match=message):
        find(Formula(lambda self, hidden, timestep, context: self.linear(hidden)), granularity)


def test_blocks_without_products_have_no_module_site() -> None:
    module = Plain()
    module.blocks = nn.ModuleList([nn.Bilinear(1, 1, 1)])
    module.blocks[0].forward = lambda hidden, scale: hidden.cos() * scale  # type: ignore[method-assign]
    assert len(sites(find(module, Granularity.BLOCK))) == 1
    with pytest.raises(PassError, match="no repeated block multiplies matrices"):
        find(module, Granularity.MODULE)
