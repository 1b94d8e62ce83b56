"""How much a feature changes."""

import pytest
import torch

from recache_compile.support.features import relative_change


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_change_is_relative_to_the_feature_before(dtype: torch.dtype) -> None:
    past = torch.tensor([[1.0, -3.0], [0.0, 4.0]], dtype=dtype)
    now = torch.tensor([[2.0, -1.0], [0.0, 5.0]], dtype=dtype)
    assert relative_change(now, past).item() == pytest.approx(4 / 8)
    assert relative_change(now, past).dtype is torch.float32
    assert relative_change(3 * now, 3 * past).item() == pytest.approx(4 / 8)


def test_large_features_of_half_precision_do_not_overflow() -> None:
    past = torch.full((1000,), 60_000.0, dtype=torch.float16)
    assert relative_change(-past, past).item() == pytest.approx(2)


def test_a_feature_that_stays_zero_does_not_change() -> None:
    assert relative_change(torch.zeros(2), torch.zeros(2)).item() == 0
