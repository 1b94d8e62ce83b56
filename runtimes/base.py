"""What a runtime is: a backend that lowers programs to engines and runs them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from recache_compile.errors import DispatchError, RuntimeUnavailableError
from recache_compile.ir.program import Program
from recache_compile.ir.sizes import terms_in, within
from recache_compile.ir.value import Kind, Value, unmet

EXAMPLE_ROWS = 3
"""Rows that stand for a free number of rows while a program is lowered."""


class Engine(Protocol):
    """A lowered program; classes that derive from it have its defaults."""

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Flat tensors in the order of its inputs to flat tensors in the order of its outputs, in dense memory."""
        ...

    def use(self, weights: Mapping[str, Tensor]) -> None:
        """From now on read the weights from here, in place and without a copy."""
        ...

    def concurrent(self) -> "Engine":
        """An engine on the same weights that may run at the same time as this one, as CUDA graphs do.

        By default this one, which holds nothing while it runs.
        """
        return self


class Runtime(Protocol):
    """A backend; classes that derive from it have its defaults: engines run where the model is, on any machine."""

    @property
    def name(self) -> str:
        """The name users choose it by."""
        ...

    @property
    def capturable(self) -> bool:
        """Whether its engines can be part of a CUDA graph."""
        ...

    @property
    def max_requests(self) -> int | None:
        """How many requests a call of its engines for several can serve; None: any number."""
        return None

    @property
    def sizes_are_bounded(self) -> bool:
        """Whether engines with free sizes serve those between the examples alone."""
        return False

    def files(self, variant: int, program: str) -> tuple[str, ...]:
        """Where in an artifact the engine of a program lies, and what it was built of."""
        ...

    def engine_device(self, device: torch.device) -> torch.device:
        """Where the engines of programs that were captured on a device run."""
        return device

    def build_requirements(self, device: torch.device) -> Mapping[str, str]:
        """What engines that are built now fit, by what it is; empty when they fit everywhere."""
        return {}

    def machine_facts(self, device: torch.device) -> Mapping[str, str]:
        """What of it this machine and device are."""
        return self.build_requirements(device)

    def lowering_facts(self, device: torch.device) -> Mapping[str, str] | None:
        """What, beside a program, its options and versions, its files follow from; None: they are not kept on disk."""
        return None

    def lowers_apart(self, device: torch.device) -> bool:
        """Whether another process can lower for a device what is asked for in this one."""
        return False

    def settings(self) -> bytes:
        """What was set in this process, beside the environment, and decides about what it lowers."""
        return b""

    def adopt(self, settings: bytes) -> None:
        """Set in this process what was set in another."""
        return

    def prepare(self) -> None:
        """Load libraries, and begin to find out about the machine, before there is something to lower."""
        return

    def require(self, building: bool) -> None:
        """Raise `RuntimeUnavailableError` where this machine cannot run engines, or cannot build them."""
        ...

    def require_on(self, device: torch.device) -> None:
        """Raise `RuntimeUnavailableError` where what building for this device takes is missing."""
        return

    def lower(self, program: Program, device: torch.device, files: Sequence[Path]) -> None:
        """Write the engine of a program for a device, without its weights."""
        ...

    def link(self, files: Sequence[Path], weights: Path, prefix: str) -> None:
        """Let files tell where their weights are: in the safetensors file `weights`, under `prefix`."""
        return

    def load(
        self, program: Program, files: Sequence[Path], weights: Mapping[str, Tensor], device: torch.device
    ) -> Engine:
        """Make an engine that uses `weights` in place, without a copy.

        Where a device cannot run it, calling the engine tells so; it can still be saved.
        """
        ...


@dataclass(frozen=True, slots=True)
class UnavailableEngine(Engine):
    """Stands for an engine that cannot be called here.

    Args:
        reason: told to whoever calls it.
    """

    reason: str

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Raise `DispatchError`."""
        raise DispatchError(self.reason)

    def use(self, weights: Mapping[str, Tensor]) -> None:
        """Nothing reads them here."""


@dataclass(slots=True)
class Revision:
    """Counts the changes of the weights that engines share: what was computed from older ones is stale."""

    number: int = 0


@dataclass(frozen=True, slots=True)
class Variant:
    """The programs and engines of one kind of calls.

    Args:
        inputs: the model's tensor inputs, in call order; numbers that are free sizes are of kind SHAPE.
        constants: its other inputs, as text.
        fixed: tensor inputs that have these values in every call.
        device: where the engines and their weights are.
        programs: by name; "prologue" is absent when nothing was hoisted.
        engines: one for every program.
        timesteps: per timestep input, its value at every step (num_steps, *shape), where known.
        macs: multiply-accumulates of one call of the original.
        conditions: what must hold of free sizes, see `capture.free_sizes`.
        bounds: what must, too, for the engines' sake.
    """

    inputs: tuple[Value, ...]
    constants: tuple[tuple[str, str], ...]
    fixed: Mapping[str, Tensor]
    device: torch.device
    programs: Mapping[str, Program]
    engines: Mapping[str, Engine]
    timesteps: Mapping[str, Tensor]
    macs: int
    conditions: tuple[str, ...] = ()
    bounds: tuple[str, ...] = ()

    @property
    def has_free_sizes(self) -> bool:
        """Whether its engines serve calls of several sizes."""
        return any(value.free for value in self.inputs)

    @property
    def numbers(self) -> tuple[str, ...]:
        """The inputs that are whole numbers, which are sizes."""
        return self.names(Kind.SHAPE)

    def unmet(self, shapes: Mapping[str, Sequence[int | None]]) -> str | None:
        """Why calls with inputs of these shapes, by name, are not among them; None: they are."""
        return unmet(self.inputs, (*self.conditions, *self.bounds), shapes)

    def names(self, role: Kind) -> tuple[str, ...]:
        """The tensor inputs of a role, in call order."""
        return tuple(value.name for value in self.inputs if value.kind is role)


def bounds_of(program: Program, runtime: Runtime) -> tuple[str, ...]:
    """What must hold of free sizes for the sake of a runtime's engines."""
    return within(program.ranges) if runtime.sizes_are_bounded else ()


def requirement_texts(key: Mapping[str, str]) -> list[str]:
    """What engines fit, or what a machine is, for people."""
    several = {name: value.split(" and ") for name, value in key.items()}
    return [
        f"{name} {value}" if len(several[name]) < 4 else f"{len(several[name])} {name}" for name, value in key.items()
    ]


def missing_texts(key: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """What a machine is instead of what engines fit, or what it lacks of that, for people."""
    texts = []
    for name, wanted in key.items():
        found, needed = here.get(name, ""), wanted.split(" and ")
        if any(_is_met(each, found) for each in wanted.split(" or ")):
            continue
        lacking = [each for each in needed if each not in found.split(" and ")]
        texts.append(f"{name} without {', '.join(lacking)}" if len(needed) > 1 else f"{name} {found or 'unknown'}")
    return texts


def is_compatible(key: Mapping[str, str], here: Mapping[str, str]) -> bool:
    """Whether engines fit a machine.

    A key's entry names what fits: one, or one "or" another; "8.0+" also what is newer; or what
    must be there, one "and" another.
    """
    return all(any(_is_met(each, here.get(name, "")) for each in wanted.split(" or ")) for name, wanted in key.items())


def _is_met(wanted: str, found: str) -> bool:
    if not wanted.endswith("+"):
        return set(wanted.split(" and ")) <= set(found.split(" and "))
    return bool(found) and _numbers(found) >= _numbers(wanted)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))


def dynamic_shapes(program: Program) -> list[dict[int, Any]]:
    """For `torch.export`: the dimensions of every input whose size is free."""
    return [dict.fromkeys(value.free_at, torch.export.Dim.AUTO) for value in program.inputs]


def check_free(program: Program, exported: torch.export.ExportedProgram) -> None:
    """Raise `RuntimeUnavailableError` where a program that was exported for lowering has lost a free size."""
    nodes = {node.name: node for node in exported.graph.find_nodes(op="placeholder")}
    names = [name for name in exported.graph_signature.user_inputs if isinstance(name, str)]
    for value, name in zip(program.inputs, names, strict=False):
        if value.free_at and (fixed := value.fixed_in(nodes[name].meta["val"])):
            raise RuntimeUnavailableError(
                f"{program.name}: size {fixed[0]} of {value.name} cannot stay free while it is lowered; compile with"
                " --fixed-sizes (fixed_sizes=True), or choose another --runtime"
            )


def new_outputs(program: Program, inputs: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Memory for the results of a call: a table has as many rows as its timesteps, other free sizes are the inputs'."""
    given = list(zip(program.inputs, inputs, strict=True))
    rows = {value.table: tensor.shape[0] for value, tensor in given if None in value.shape}
    sizes = terms_in([(value.shape, value.free, tensor.shape) for value, tensor in given])
    return [
        torch.empty(value.shape_at(sizes, rows.get(value.table, 0)), dtype=value.dtype, device=device)
        for value in program.outputs
    ]


def example_inputs(program: Program, device: torch.device) -> tuple[Tensor, ...]:
    """Zeros of every input's shape."""
    return tuple(
        torch.zeros([EXAMPLE_ROWS if size is None else size for size in value.shape], dtype=value.dtype, device=device)
        for value in program.inputs
    )
