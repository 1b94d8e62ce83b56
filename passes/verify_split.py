"""Check that a prologue and the step programs which read it fit together."""

from collections.abc import Mapping

from torch import fx

from recache_compile.errors import PassError
from recache_compile.ir.meta import is_kept_in_step
from recache_compile.ir.program import Binding, Program
from recache_compile.ir.value import Kind
from recache_compile.passes.binding_times import binding_times
from recache_compile.passes.ops import MATMULS, is_cheap, packet


def verify_split(annotated: Program, prologue: Program, steps: Mapping[str, Program]) -> None:
    """Raise unless the split is sound.

    Every table that a step reads is made by the prologue in the same layout size and type;
    no weight is read on both sides, unless the model itself ties it; no matrix product
    that does not depend on the latents is left in a step program.  What `Hoist` left there
    on purpose is excepted.

    Args:
        annotated: the program before the split.
        prologue: what `build_prologue` made.
        steps: the step programs, by name, which is that of the table that they read.

    Raises:
        PassError: naming the program and what is wrong with it.
    """
    made = {(value.table, value.source): value for value in prologue.outputs}
    for table, program in steps.items():
        for value in program.inputs:
            if value.kind not in (Kind.TABLE_ROW, Kind.FIXED):
                continue
            match = made.get((table, value.name))
            own = len(value.shape)  # a table has its rows in front
            if match is None or (match.shape[-own:], match.free[-own:], match.dtype) != (
                value.shape,
                value.free,
                value.dtype,
            ):
                raise PassError(f"split of {program.name}: it reads {value}, the prologue makes {match}")
        left = independent_matmuls(program)
        if left:
            raise PassError(f"split of {program.name}: {left} do not depend on the latents")
        shared = tied_weights(annotated) | staying_weights(program)
        torn = sorted(set(program.weights) & set(prologue.weights) - shared)
        if torn:
            raise PassError(f"split of {program.name}: the prologue reads the same weights {torn}")


def independent_matmuls(program: Program) -> list[str]:
    """Names of the matrix products that depend on neither latents nor history."""
    times = binding_times(program.module.graph)
    return [
        node.name
        for node, time in times.items()
        if packet(node) in MATMULS and Binding.LATENTS not in time and not is_kept_in_step(node)
    ]


def staying_weights(program: Program) -> set[str]:
    """Weights of what a step computes itself because its table would be too large."""
    weights = program.module.graph.find_nodes(op="get_attr")
    return {str(node.target) for node in weights if any(map(is_kept_in_step, node.users))}


def tied_weights(program: Program) -> set[str]:
    """Weights that a program itself uses both with and without the latents."""
    times = binding_times(program.module.graph)

    def readers(node: fx.Node) -> list[fx.Node]:
        """What reads a weight, looking through the cheap calls on weights alone, which steps repeat."""
        return [
            reader
            for user in node.users
            for reader in (readers(user) if times[user] is Binding.NOTHING and is_cheap(user) else [user])
        ]

    def is_tied(weight: fx.Node) -> bool:
        dependent = [Binding.LATENTS in times[reader] for reader in readers(weight)]
        return any(dependent) and not all(dependent)

    return {str(node.target) for node in program.module.graph.find_nodes(op="get_attr") if is_tied(node)}
