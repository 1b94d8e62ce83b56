"""What every pass shares: copy, require, rewrite, check, record."""

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from torch import Tensor, fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from recache_compile.capture.compat import FakeTensorMode, on_values
from recache_compile.errors import PassError
from recache_compile.ir.meta import number_nodes, result_of, set_result, tensor_of
from recache_compile.ir.program import PassRecord, Program

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PassResult:
    """What a pass made, and whether it differs from what it was given."""

    program: Program
    modified: bool


class Pass(ABC):
    """A graph rewrite.  Subclasses are frozen dataclasses whose fields are their options.

    A call works on a copy: the given program never changes.  It checks what the pass
    requires, rewrites, and records the pass and its options in the program's provenance.  A graph
    that changed is linted and recompiled, its new nodes are numbered, and its inputs and outputs
    must be described.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def rewrite(self, module: fx.GraphModule) -> bool:
        """Change the graph in place; return whether anything changed."""

    def options(self) -> str:
        """What provenance tells of the pass beside its name."""
        return ", ".join(f"{field.name}={getattr(self, field.name)!r}" for field in fields(self))  # type: ignore[arg-type]

    def __call__(self, program: Program) -> PassResult:
        """Run on a copy of `program`.

        Raises:
            PassError: a required pass did not run before, or the graph cannot be rewritten.
        """
        return self.run_in_place(replace(program, module=copy_module(program.module)))

    def run_in_place(self, program: Program) -> PassResult:
        """The same on `program` itself, for those who have just copied it and share it with nobody."""
        before = [record.name for record in program.provenance]
        if missing := [name for name in self.requires if name not in before]:
            raise PassError(f"pass {self.name} on {program.name}: needs {', '.join(missing)} to run first")
        module, size = program.module, len(program.module.graph.nodes)
        try:
            modified = self.rewrite(module)
        except PassError as error:
            names = ", ".join(before) or "none"
            raise PassError(f"pass {self.name} on {program.name}: {error} (passes before: {names})") from error
        outcome = f"{size} nodes become {len(module.graph.nodes)}" if modified else "changes nothing"
        log.debug("pass %s on %s: %s", self.name, program.name, outcome)
        result = replace(program, provenance=(*program.provenance, PassRecord(self.name, self.options())))
        if modified:
            module.graph.lint()
            module.recompile()
            number_nodes(module.graph)
            _check_described(result, self.name)
        return PassResult(result, modified)


def run_passes(program: Program, passes: Iterable[Pass]) -> Program:
    """The program after all passes, in order, which share one copy of it."""
    ordered = tuple(passes)
    if not ordered:
        return program
    program = replace(program, module=copy_module(program.module))
    for each in ordered:
        program = each.run_in_place(program).program
    return program


def with_values(program: Program, inputs: Sequence[Tensor]) -> Program:
    """A program whose nodes have values in their metadata, which an artifact does not keep.

    Args:
        program: any program.
        inputs: an example of its inputs.
    """
    if all(result_of(node) is not None for node in program.module.graph.nodes if node.op != "output"):
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
    fakes = fx.node.map_arg(args, tensor_of)
    with on_values(fakes):
        set_result(node, target(*fakes))
    return node


def _check_described(program: Program, name: str) -> None:
    values = program.outputs
    results = program.module.graph.output_node().args[0]
    if len(values) != len(results):  # type: ignore[arg-type]
        raise PassError(f"pass {name} on {program.name}: {len(values)} values describe {len(results)} results")  # type: ignore[arg-type]
    names = [value.name for value in program.inputs]
    if len(set(names)) != len(names):
        raise PassError(f"pass {name} on {program.name}: two inputs share a name: {names}")
