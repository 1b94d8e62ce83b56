"""What every pass shares: copy, require, rewrite, check, record."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from recache_compile.errors import PassError
from recache_compile.ir.program import Program


@dataclass(frozen=True, slots=True)
class PassResult:
    """What a pass made, and whether it differs from what it was given."""

    program: Program
    modified: bool


class Pass(ABC):
    """A graph rewrite.  Subclasses are frozen dataclasses whose fields are their options.

    A call works on a copy: the given program never changes.  It checks what the pass
    requires, rewrites, lints, recompiles, verifies that inputs and outputs are described,
    and records the pass in the program's provenance.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def rewrite(self, module: fx.GraphModule) -> bool:
        """Change the graph in place; return whether anything changed."""

    def __call__(self, program: Program) -> PassResult:
        """Run on a copy of `program`.

        Raises:
            PassError: a required pass did not run before, or the graph cannot be rewritten.
        """
        missing = [name for name in self.requires if name not in program.provenance]
        if missing:
            raise PassError(f"pass {self.name} on {program.name}: needs {', '.join(missing)} to run first")
        module = copy_module(program.module)
        try:
            modified = self.rewrite(module)
        except PassError as error:
            before = ", ".join(program.provenance) or "none"
            raise PassError(f"pass {self.name} on {program.name}: {error} (passes before: {before})") from error
        module.graph.lint()
        module.recompile()
        result = replace(program, module=module, provenance=(*program.provenance, self.name))
        _check_described(result, self.name)
        return PassResult(result, modified)


def run_passes(program: Program, passes: Iterable[Pass]) -> Program:
    """The program after all passes, in order."""
    for each in passes:
        program = each(program).program
    return program


def with_values(program: Program, inputs: Sequence[Tensor]) -> Program:
    """A program whose nodes have values in their metadata, which an artifact does not keep.

    Args:
        program: any program.
        inputs: an example of its inputs.
    """
    if all("val" in node.meta for node in program.module.graph.nodes if node.op != "output"):
        return program
    module = copy_module(program.module)
    FakeTensorProp(module, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*inputs)
    return replace(program, module=module)


def copy_module(module: fx.GraphModule) -> fx.GraphModule:
    """A graph module with its own graph and the same weights."""
    return fx.GraphModule(module, copy.deepcopy(module.graph))


def call(graph: fx.Graph, target: Any, *args: Any, name: str | None = None) -> fx.Node:
    """Insert an operator call at the graph's insertion point, with its value's metadata."""
    node = graph.create_node("call_function", target, args, name=name)
    fakes = fx.node.map_arg(args, lambda argument: argument.meta["val"])
    with detect_fake_mode(fakes) or torch.no_grad():
        node.meta["val"] = target(*fakes)
    return node


def _check_described(program: Program, name: str) -> None:
    values = program.outputs
    results = program.module.graph.output_node().args[0]
    if len(values) != len(results):  # type: ignore[arg-type]
        raise PassError(f"pass {name} on {program.name}: {len(values)} values describe {len(results)} results")  # type: ignore[arg-type]
    names = [value.name for value in program.inputs]
    if len(set(names)) != len(names):
        raise PassError(f"pass {name} on {program.name}: two inputs share a name: {names}")
