from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import recache_compile as rc

pytestmark = pytest.mark.slow


class Small(nn.Module):
    """Weights of all small sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 8)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.shift = nn.Parameter(torch.randn(1))
        self.register_buffer("table", torch.randn(8))
        self.wide = nn.Parameter(torch.randn(9))

    def forward(self, sample: Tensor) -> Tensor:
        return self.linear(sample) * self.scale + self.shift + self.table + self.wide[:8]


@pytest.fixture(scope="module")
def compiled() -> rc.Compiled:
    with torch.no_grad():
        return rc.compile(
            Small(), {"sample": torch.ones(2, 16)}, (2,), 4, granularity="output", runtime="inductor", hoist=False
        )


@pytest.mark.parametrize("saved", [False, True])
def test_every_weight_is_read_where_it_lies_however_small(saved: bool, compiled: rc.Compiled, tmp_path: Path) -> None:
    if saved:
        compiled.save(tmp_path / "artifact")
        compiled = rc.load(tmp_path / "artifact")
    run, sample = compiled.dispatcher(budget=2), torch.randn(2, 16)
    run(step=0, sample=sample)
    other = Small()
    compiled.refit(other.state_dict())
    torch.testing.assert_close(run(step=0, sample=sample), other(sample))
