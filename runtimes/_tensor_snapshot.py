"""Notice that a tensor has changed since it was last read."""

from dataclasses import dataclass

import torch
from torch import Tensor


def host_waits(tensor: Tensor) -> bool:
    """Whether reading a value of this tensor would stall the loop, as on a GPU."""
    return tensor.device.type != "cpu"


@dataclass(slots=True)
class TensorSnapshot:
    """A tensor as it was when it was last read."""

    tensor: Tensor
    version: int | None
    values: Tensor
    is_old: bool = False

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSnapshot":
        """Remember a tensor with its present values."""
        return cls(tensor, _version(tensor), tensor.clone())

    def still_equals(self, tensor: Tensor) -> bool:
        """Whether `tensor` has the remembered values.

        On the CPU they are compared.  On a GPU that would stall the loop, so a tensor that is
        the same object in the same version is taken to be unchanged.
        """
        same = tensor is self.tensor and self.version is not None and self.version == _version(tensor)
        if same and host_waits(tensor):
            return True
        if not torch.equal(tensor, self.values):
            return False
        self.tensor, self.version, self.is_old = tensor, _version(tensor), False
        return True

    def look_again(self) -> None:
        """Let the next comparison wait, once: a new generation begins, and values may have been written between."""
        self.is_old = True

    def differs(self, tensor: Tensor) -> Tensor | None:
        """Whether a tensor's values have changed that counts no versions (under inference mode), to be read later.

        Returns:
            A truth value on the tensor's device; None where `still_equals` needs no wait, or where
            it is another tensor.
        """
        if self.is_old or tensor is not self.tensor or self.version is not None or not host_waits(tensor):
            return None
        return (tensor != self.values).any()


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
