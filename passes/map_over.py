"""Map a program over rows: steps of a gap, or requests."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx, nn

from recache_compile.capture.compat import on_values
from recache_compile.capture.export import export_module, flatten
from recache_compile.ir.meta import describe_input, describe_outputs, set_result, tensor_of, value_of
from recache_compile.ir.program import PassRecord, Program
from recache_compile.ir.value import Kind
from recache_compile.passes.base import copy_module
from recache_compile.passes.map_rows import check_free, free_dimensions, use_free_row_rules, zeros
from recache_compile.passes.ops import aten


def map_over(program: Program, own: Collection[Kind], what: str) -> Program:
    """A program for any number of rows at once; its results have one row each (`torch.vmap`).

    Args:
        program: it has no rows yet.
        own: kinds of the inputs that every row has its own of; the others are shared.
        what: the rows are, for people and for the names of constants.

    Raises:
        Exception: of many kinds, where an operator cannot be mapped over a free number of rows.
    """
    nodes = program.module.graph.find_nodes(op="placeholder")
    values = [value.with_rows if value.kind in own else value for value in program.inputs]
    shapes = tuple(map(free_dimensions, values))
    exported = export_module(
        _Mapped(program.module, own), zeros(values, nodes), {}, dynamic_shapes=(shapes,), decompose=True
    )
    names = {id(weight): name for name, weight in program.weights.items()}
    module = flatten(exported, names, f"constant_{what}")
    for node, value in zip(module.graph.find_nodes(op="placeholder"), values, strict=True):
        with module.graph.inserting_before(node):
            named = module.graph.placeholder(value.name)
        check_free(node, value)
        set_result(named, tensor_of(node))
        describe_input(named, value)
        node.replace_all_uses_with(named)
        module.graph.erase_node(node)
    describe_outputs(module.graph.output_node(), [value.with_rows for value in program.outputs])
    drop_unit_dimensions(module.graph)
    module.recompile()
    return Program(program.name, module, (*program.provenance, PassRecord(f"map-over-{what}s")), program.ranges)


class _Mapped(nn.Module):
    """A program's graph, mapped over those inputs that every row has its own of."""

    def __init__(self, module: fx.GraphModule, own: Collection[Kind]) -> None:
        super().__init__()
        self.in_dims = tuple(
            0 if value_of(node).kind in own else None for node in module.graph.find_nodes(op="placeholder")
        )
        self.step = copy_module(module)
        use_free_row_rules(self.step.graph)
        for node in self.step.graph.find_nodes(op="call_function", target=aten.sym_size.int):
            node.target = _size
        self.step.recompile()

    def forward(self, *arguments: Tensor) -> list[Tensor]:
        """The program's inputs, to its results."""
        results: list[Tensor] = torch.vmap(self.step, in_dims=self.in_dims)(*arguments)
        return results


def _size(value: Tensor, dim: int) -> int:
    """What `torch.vmap` sees as the size of a value."""
    return value.shape[dim]


def drop_unit_dimensions(graph: fx.Graph) -> None:
    """Leave dimensions of size 1 out where a value is only reshaped to be permuted and reshaped again.

    Patches of a video have eight dimensions there, which is all that TensorRT takes, before the
    steps of a gap become one more.
    """
    for permute in graph.find_nodes(op="call_function", target=aten.permute.default):
        reshape: Any = permute.args[0]
        copies = [user for user in permute.users if user.target is aten.clone.default]
        readers = [user for node in (permute, *copies) for user in node.users if user not in copies]
        if reshape.target is not aten.reshape.default or len(reshape.users) > 1:
            continue
        if any(user.target not in (aten.reshape.default, aten._unsafe_view.default) for user in readers):
            continue
        shape, dense = reshape.args[1], tensor_of(reshape)
        order = [int(at) % len(shape) for at in permute.args[1]]  # type: ignore[arg-type, union-attr]
        kept = [at for at, size in enumerate(shape) if isinstance(size, fx.Node) or size != 1]
        reshape.args = (reshape.args[0], [shape[at] for at in kept])
        permuted = [kept.index(at) for at in order if at in kept]
        permute.args = (reshape, permuted)
        with on_values(dense):
            set_result(reshape, dense.reshape([dense.shape[at] for at in kept]))
            set_result(permute, tensor_of(reshape).permute(permuted))
            for copied in copies:
                set_result(copied, tensor_of(permute).contiguous())
