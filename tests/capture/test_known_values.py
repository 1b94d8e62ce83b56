"""What is computed from constants alone is known while a model is traced, until something unknown is written to it."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from recache_compile.capture import known_values
from recache_compile.capture.known_values import KnownValues


def unknown(*shape: int) -> Tensor:
    """An input of a trace."""
    return torch.empty(shape)


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """Real tensors from outside are constants of the trace."""
    with FakeTensorMode(allow_non_fake_inputs=True), KnownValues():
        yield


def test_what_is_made_from_numbers_is_known() -> None:
    with traced():
        steps = torch.arange(4) * 2 + torch.ones(4, dtype=torch.int64)
        assert type(steps) is not Tensor
        assert steps.tolist() == [1, 3, 5, 7]
        assert int(steps[2]) == 5
        assert bool((steps > 0).all())
        assert [int(step) for step in steps] == [1, 3, 5, 7]
        assert steps.numpy().sum() == 16


def test_constants_are_known() -> None:
    constant = torch.tensor([3, 1, 2])
    with traced():
        assert constant.max().item() == 3
        assert constant.sort().values.tolist() == [1, 2, 3]


def test_shapes_and_types_of_what_is_unknown_are_known() -> None:
    with traced():
        hidden = unknown(2, 3)
        assert torch.zeros_like(hidden, dtype=torch.int64).tolist() == [[0] * 3] * 2
        assert hidden.new_full((2,), 4).tolist() == [4.0, 4.0]
        assert hidden.new_tensor([1, 2]).tolist() == [1.0, 2.0]


def test_what_is_computed_from_something_unknown_is_not_known() -> None:
    with traced():
        mixed = torch.ones(3) + unknown(3)
        assert torch.ones(3).sum() == 3
        with pytest.raises(DataDependentOutputException):
            mixed.tolist()


def test_random_numbers_are_not_known() -> None:
    constant = torch.ones(3)
    with traced(), pytest.raises(DataDependentOutputException):
        torch.rand_like(constant).tolist()


def test_large_values_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_values, "MOST_ELEMENTS", 100)
    with traced():
        positions = torch.arange(20)
        assert positions.tolist() == list(range(20))
        with pytest.raises(DataDependentOutputException):
            (positions[:, None] == positions).tolist()


def test_writes_of_known_values_stay_known() -> None:
    with traced():
        mask = torch.zeros(4, dtype=torch.int64)
        mask[1:3] = torch.ones(2, dtype=torch.int64)
        mask[0] = 5
        mask.view(2, 2)[1].add_(1)
        assert mask.tolist() == [5, 1, 2, 1]


def test_a_write_of_something_unknown_is_noticed() -> None:
    with traced():
        mask = torch.zeros(4)
        mask[1:3] = unknown(2)
        with pytest.raises(DataDependentOutputException):
            mask.tolist()


@pytest.mark.parametrize("view", [lambda mask: mask.view(2, 2)[1], lambda mask: mask.expand_as(torch.empty(4))])
def test_a_write_through_a_view_is_noticed(view: object) -> None:
    with traced():
        mask = torch.zeros(4)
        view(mask).copy_(unknown(*view(mask).shape))  # type: ignore[operator]
        with pytest.raises(DataDependentOutputException):
            mask.tolist()


def test_known_masks_select_a_known_number() -> None:
    mask = torch.tensor([True, False, True])
    with traced():
        hidden = unknown(3, 2)
        assert hidden[mask].shape == (2, 2)
        assert hidden[:, mask[:2]].shape == (3, 1)
        assert hidden[~mask, 1:].shape == (1, 1)
        hidden[mask] = unknown(2, 2)


def test_sizes_may_be_known_tensors() -> None:
    lengths = torch.tensor([2, 1])
    with traced():
        hidden = unknown(3, 2)
        assert hidden[: lengths[0]].shape == (2, 2)
        assert torch.arange(lengths.max()).shape == (2,)
        assert hidden.repeat_interleave(lengths, dim=1).shape == (3, 3)
        assert torch.repeat_interleave(hidden, repeats=lengths, dim=1).shape == (3, 3)
        assert [part.shape[0] for part in hidden.split(lengths.tolist())] == [2, 1]
        assert lengths.nonzero().shape == (2, 1)


def test_tensors_made_in_inference_mode_are_known() -> None:
    with torch.inference_mode():
        constant = torch.ones(3)
    with traced():
        assert (constant + 1).tolist() == [2.0] * 3
