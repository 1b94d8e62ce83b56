"""Facts on nodes survive copies, and a node is found again in every copy."""

import copy

import pytest
import torch
from torch import fx

from recache_compile.ir.meta import (
    Entry,
    block_of,
    by_origin,
    describe_input,
    describe_outputs,
    is_described,
    is_kept_in_step,
    keep_in_step,
    layout_of,
    module_paths,
    number_nodes,
    origin_of,
    result_of,
    set_layout,
    set_result,
    set_type_text,
    tensor_of,
    type_text,
    value_of,
    values_of,
)
from recache_compile.ir.value import Kind, Value

VALUE = Value("hidden", Kind.LATENTS, (2,), torch.float32)


@pytest.fixture
def graph() -> fx.Graph:
    """An input, its negative, and that as the result."""
    graph = fx.Graph()
    given = graph.placeholder("hidden")
    graph.output([graph.call_function(torch.neg, (given,))])
    return graph


def test_nothing_is_known_of_a_new_node(graph: fx.Graph) -> None:
    given, negative, _ = graph.nodes
    assert not is_described(given)
    assert layout_of(given) == ()
    assert (origin_of(negative), result_of(negative), type_text(negative)) == (None, None, None)
    assert not is_kept_in_step(negative)
    assert (module_paths(negative), block_of(negative)) == ((), None)


def test_facts_survive_a_copy(graph: fx.Graph) -> None:
    given, negative, output = graph.nodes
    tensor = torch.empty(2, device="meta")
    describe_input(given, VALUE)
    set_layout(given, [Entry(3, 0, (2,))])
    describe_outputs(output, [VALUE])
    keep_in_step(negative)
    set_result(negative, tensor)
    set_type_text(negative, "float32[2]")
    given, negative, output = copy.deepcopy(graph).nodes
    assert (value_of(given), values_of(output), layout_of(given)) == (VALUE, (VALUE,), (Entry(3, 0, (2,)),))
    assert is_kept_in_step(negative)
    assert tensor_of(negative) is tensor
    assert type_text(negative) == "float32[2]"


def test_a_node_and_its_copies_have_one_origin_and_no_other_node_has_it(graph: fx.Graph) -> None:
    number_nodes(graph)
    first = by_origin(graph)
    copied = copy.deepcopy(graph)
    with copied.inserting_before(copied.output_node()):
        added = copied.call_function(torch.neg, (next(iter(copied.nodes)),))
    number_nodes(copied)
    again = by_origin(copied)
    assert {origin: node.name for origin, node in first.items()} == {
        origin: node.name for origin, node in again.items() if origin in first
    }
    assert origin_of(added) not in first
    other = fx.Graph()
    other.placeholder("hidden")
    number_nodes(other)
    assert not set(by_origin(other)) & set(again)


def test_a_copy_in_the_same_graph_has_an_origin_of_its_own(graph: fx.Graph) -> None:
    number_nodes(graph)
    _, negative, output = graph.nodes
    origin = origin_of(negative)
    with graph.inserting_before(output):
        twin = graph.node_copy(negative, lambda node: node)
    number_nodes(graph)
    assert origin_of(negative) == origin != origin_of(twin)


@pytest.mark.parametrize(
    ("paths", "containers", "block"),
    [
        (("", "blocks", "blocks.3", "blocks.3.parts.0"), ("blocks", "blocks.3.parts"), "blocks.3"),
        (("", "blocks.3"), ("others",), None),
        (("", "blocks.3"), None, "blocks.3"),
        (("", "blocks.first"), None, None),
    ],
)
def test_the_block_of_a_node_is_the_outermost(
    graph: fx.Graph, paths: tuple[str, ...], containers: tuple[str, ...] | None, block: str | None
) -> None:
    _, negative, _ = graph.nodes
    negative.meta["nn_module_stack"] = {str(at): (path, object) for at, path in enumerate(paths)}
    assert module_paths(negative) == paths
    assert block_of(negative, containers) == block
