"""Tell the guidance branches of a generation apart where the pipeline does not name them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from recache_compile.ir.signature import call_kind
from recache_compile.runtimes._tensor_snapshot import TensorSnapshot, host_waits


@dataclass(slots=True)
class Branches:
    """Knows the guidance branches of a generation by their conditioning.

    Each of them is called once a step.  Conditioning that none of them had is a new branch,
    whose first step is recomputed; the same tensors with other values are the same branch.
    """

    seen: list[dict[str, TensorSnapshot]] = field(default_factory=list)
    step: int | None = None
    called: set[int] = field(default_factory=set)

    def find(self, step: int, leaves: Mapping[str, Any], changing: Collection[str]) -> str:
        """Name of the branch that a call belongs to.

        Args:
            step: of the call.
            leaves: its arguments.
            changing: names of those that are other tensors in every step.
        """
        tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor) and name not in changing}
        if step != self.step:
            self.step, self.called = step, set()
        free = [number for number in range(len(self.seen)) if number not in self.called]
        same = [each for each in free if _are(self.seen[each], tensors)]
        if len(same) == 1 and any(map(host_waits, tensors.values())):  # no doubt, and comparing would stall the loop
            number = same[0]
        else:
            others = [*same, *(each for each in free if each not in same)]
            equal = next((each for each in others if _still_are(self.seen[each], tensors)), None)
            number = equal if equal is not None else next(iter(same), len(self.seen))  # `same`: written to in place
            if equal is None:
                self.seen[number : number + 1] = [{name: TensorSnapshot.of(tensor) for name, tensor in tensors.items()}]
        self.called.add(number)
        return str(number)


def _are(seen: Mapping[str, TensorSnapshot], tensors: Mapping[str, Tensor]) -> bool:
    return all(name in seen and seen[name].tensor is tensor for name, tensor in tensors.items())


def _still_are(seen: Mapping[str, TensorSnapshot], tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors that were seen, or others with their values."""
    remembered = {name: each.values for name, each in seen.items()}
    return call_kind(remembered) == call_kind(tensors) and all(
        each.still_equals(tensors[name]) for name, each in seen.items()
    )
