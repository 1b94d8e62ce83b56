from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from recache_compile.runtimes._tensor_snapshot import TensorSnapshot


def test_a_tensor_that_was_not_touched_is_the_same() -> None:
    tensor = torch.randn(3)
    seen = TensorSnapshot.of(tensor)
    assert seen.still_equals(tensor)
    assert seen.still_equals(tensor)


def test_another_tensor_of_equal_values_is_the_same() -> None:
    seen = TensorSnapshot.of(torch.arange(3.0))
    other = torch.arange(3.0)
    assert seen.still_equals(other)
    assert seen.tensor is other


@pytest.mark.parametrize(
    "write",
    [
        lambda tensor: tensor.add_(1),
        lambda tensor: tensor.data.add_(1),
        lambda tensor: tensor[1:].zero_(),
        lambda tensor: tensor.numpy().fill(5),
    ],
    ids=["in place", "behind the version counter", "through a view", "through numpy"],
)
@pytest.mark.parametrize("inference", [False, True])
def test_a_write_is_noticed_and_undoing_it_too(write: Callable[[Tensor], object], inference: bool) -> None:
    with torch.inference_mode(inference):
        tensor = torch.arange(3.0)
        before = tensor.clone()
        seen = TensorSnapshot.of(tensor)
        write(tensor)
        assert not seen.still_equals(tensor)
        tensor.copy_(before)
        assert seen.still_equals(tensor)


def test_other_values_and_shapes_are_others() -> None:
    seen = TensorSnapshot.of(torch.zeros(2, 3))
    assert not seen.still_equals(torch.ones(2, 3))
    assert not seen.still_equals(torch.zeros(3, 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_an_object_of_the_same_version_is_taken_as_it_is() -> None:
    tensor = torch.zeros(3, device="cuda")
    seen = TensorSnapshot.of(tensor)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert seen.still_equals(tensor)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tensor.add_(1)
    assert not seen.still_equals(tensor)
