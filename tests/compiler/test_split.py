"""What one compilation exports and copies."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import fx

import recache_compile as rc
from recache_compile.passes import base
from tests.conftest import NUM_STEPS, flux_inputs, tiny_flux

PROGRAMS = 3
"""The prologue, recompute and forecast."""


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts calls of `torch.export.export` and copies of whole graphs by passes."""
    counts: Counter[str] = Counter()
    export, copied = torch.export.export, base.copy_module

    def counting_export(*args: Any, **kwargs: Any) -> torch.export.ExportedProgram:
        counts["exports"] += 1
        return export(*args, **kwargs)

    def counting_copy(module: fx.GraphModule) -> fx.GraphModule:
        counts["copies"] += 1
        return copied(module)

    monkeypatch.setenv("RECACHE_CACHE_SIZE", "0")
    monkeypatch.setattr(torch.export, "export", counting_export)
    monkeypatch.setattr(base, "copy_module", counting_copy)
    return counts


def compile_at_order_1(runtime: str) -> None:
    compiled = rc.compile(
        tiny_flux(), flux_inputs(), budgets=(3,), num_steps=NUM_STEPS, order=1, policy="uniform", runtime=runtime
    )
    assert len(compiled.variants[0].programs) == PROGRAMS


def test_a_compilation_exports_three_times_and_copies_once_for_each_pattern_and_the_whole(counts: Counter[str]) -> None:
    """The model, the prologue and the forecast of a gap are exported; copied are the captured graph, and the annotated one for each pattern."""
    compile_at_order_1("eager")
    assert counts == {"exports": 3, "copies": 1 + (PROGRAMS - 1)}


@pytest.mark.slow
def test_inductor_exports_and_copies_every_program_once_more(counts: Counter[str]) -> None:
    """The prologue is copied twice: its nodes get values for one number of rows before the passes for CPUs."""
    compile_at_order_1("inductor")
    assert counts == {"exports": 3 + PROGRAMS, "copies": PROGRAMS + PROGRAMS + 1}
