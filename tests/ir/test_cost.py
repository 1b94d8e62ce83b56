"""Costs against hand counts."""

import pytest
import torch
from torch import Tensor, nn

import recache_compile as rc
from recache_compile.capture.capture import capture
from recache_compile.ir.cost import count_macs
from tests.conftest import NUM_STEPS

CPU = torch.device("cpu")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 24, bias=False)

    def forward(self, sample: Tensor) -> Tensor:
        q, k, v = self.linear(sample)[:, None].chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v)


def test_macs_of_a_linear_and_an_attention() -> None:
    captured = capture(Attention(), {"sample": torch.randn(2, 5, 8)})
    assert count_macs(captured.program, CPU) == 2 * 5 * 8 * 24 + 2 * (2 * 5 * 5 * 8)


def test_a_generation_costs_its_steps_and_its_prologue(eager: rc.Compiled) -> None:
    cost = eager.cost(3)
    programs = eager.variants[0].programs
    recompute, forecast = count_macs(programs["recompute"], CPU), count_macs(programs["forecast"], CPU, {None: 3}) // 3
    assert cost.step_macs.count(recompute) == 3
    assert cost.step_macs.count(forecast) == NUM_STEPS - 3
    assert cost.macs == 3 * recompute + (NUM_STEPS - 3) * forecast + cost.prologue_macs
    assert cost.uncached_macs == NUM_STEPS * eager.variants[0].macs
    assert forecast == 16 * 32 * 8


def test_prologue_macs_grow_with_the_rows(eager: rc.Compiled) -> None:
    prologue = eager.variants[0].programs["prologue"]
    two, four, six = (count_macs(prologue, CPU, {"recompute": rows, "forecast": 4}) for rows in (2, 4, 6))
    assert six - four == four - two > 0


def test_recompute_and_prologue_do_the_work_of_the_original(eager: rc.Compiled) -> None:
    programs = eager.variants[0].programs
    rows = count_macs(programs["prologue"], CPU, {"recompute": 3}) - count_macs(
        programs["prologue"], CPU, {"recompute": 2}
    )
    assert count_macs(programs["recompute"], CPU) < eager.variants[0].macs
    assert count_macs(programs["recompute"], CPU) + rows <= eager.variants[0].macs


@pytest.mark.parametrize("budget", [3, NUM_STEPS])
def test_history_holds_one_feature_per_slot(budget: int, eager: rc.Compiled) -> None:
    assert eager.cost(budget).history_bytes == 2 * 16 * 32 * 4
