"""Exact costs, known before anything runs: multiply-accumulates, parameters, bytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from recache_compile.ir.gaps import calls_of
from recache_compile.ir.plan import Plan
from recache_compile.ir.program import MIN_ROWS, Program
from recache_compile.ir.value import Kind

_COUNTED: WeakKeyDictionary[fx.GraphModule, dict[tuple[tuple[int, ...], ...], int]] = WeakKeyDictionary()
"""Multiply-accumulates of a graph by the shapes of its inputs; passes never change a graph that they are given."""


def count_macs(program: Program, device: torch.device, rows: Mapping[str | None, int] | None = None) -> int:
    """Multiply-accumulates of one call, counted by PyTorch's `FlopCounterMode` on fake tensors.

    Args:
        program: any program.
        device: where its weights are.
        rows: for the prologue, the number of rows of each table; for a program that serves gaps, the
            number of steps, by None.
    """
    shapes = []
    for value in program.inputs:
        free = MIN_ROWS if rows is None else max(rows.get(value.table, 0), MIN_ROWS)
        shapes.append(tuple(free if size is None else size for size in value.shape))
    known = _COUNTED.setdefault(program.module, {})
    if tuple(shapes) not in known:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            inputs = [
                torch.empty(shape, dtype=value.dtype, device=device)
                for value, shape in zip(program.inputs, shapes, strict=True)
            ]
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                program.module(*inputs)
        known[tuple(shapes)] = int(counter.get_total_flops()) // 2
    return known[tuple(shapes)]


@dataclass(frozen=True, slots=True)
class Cost:
    """What one generation costs under a plan.

    Args:
        macs: multiply-accumulates of the whole generation, with timesteps known ahead.
        uncached_macs: those of the uncached, unhoisted model.
        step_macs: per step; those of one engine call share what it costs.
        prologue_macs: of the prologue, its rows included.
        history_bytes: features held by one guidance branch.
        table_bytes: prologue outputs held by one guidance branch.
    """

    macs: int
    uncached_macs: int
    step_macs: tuple[int, ...]
    prologue_macs: int
    history_bytes: int
    table_bytes: int

    @property
    def macs_reduction(self) -> float:
        """How many times fewer multiply-accumulates than the uncached model."""
        return self.uncached_macs / self.macs


def cost_of(plan: Plan, programs: Mapping[str, Program], device: torch.device, capture_macs: int) -> Cost:
    """The cost of a plan that runs these programs.

    Args:
        plan: what each step runs.
        programs: by name, "prologue" among them where something was hoisted.
        device: where their weights are.
        capture_macs: multiply-accumulates of one call of the captured model.
    """
    steps: list[int] = []
    for call in dict.fromkeys(calls_of(plan, programs)):
        share, rest = divmod(count_macs(programs[plan.steps[call.start].program], device, {None: len(call)}), len(call))
        steps += [share + (number < rest) for number, _ in enumerate(call)]
    rows: dict[str | None, int] = {}
    slots: dict[tuple[int | None, int | None], int] = {}
    for step in plan.steps:
        rows[step.program] = rows.get(step.program, 0) + 1
        for value in programs[step.program].outputs:
            if value.kind is Kind.FEATURE:
                slots[value.site, step.slot] = value.nbytes
    prologue = programs.get("prologue")
    tables = prologue_macs = 0
    if prologue is not None:
        for value in prologue.outputs:
            assert value.table is not None
            tables += value.nbytes * (rows.get(value.table, 0) if value.kind is Kind.TABLE else 1)
        calls = len(plan.steps) if prologue.makes_one_row else 1
        prologue_macs = calls * count_macs(prologue, device, rows)
    full = capture_macs * len(plan.steps)
    return Cost(sum(steps) + prologue_macs, full, tuple(steps), prologue_macs, sum(slots.values()), tables)
