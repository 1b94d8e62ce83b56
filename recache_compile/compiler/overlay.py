"""Weights that engines read in the place of their own: what adapters make of them, for as long as they are on.

Engines keep pointers to weights, which they share with the module that was compiled.  So a
changed weight gets memory of its own, engines are told once where it is, and the next change
of the same weights is written there.  The shared ones are never written to, so that going
back to them is exact.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from recache_compile.compiler.turns import Turns
from recache_compile.errors import ModelError
from recache_compile.runtimes.base import Engine

Write = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], None]
"""Writes new values, from the weights of these names into memory for each of them."""


@dataclass(frozen=True, slots=True)
class Change:
    """New values of a few weights that are made together.

    Args:
        bases: what they are made from, by name; None: the engines' own.
        write: makes them.
    """

    bases: Mapping[str, Tensor | None]
    write: Write


@dataclass(frozen=True, slots=True)
class Patch:
    """What engines read in the place of their own weights.

    Args:
        given: tensors that are read where they are, if they lie as the engines' own; else a copy of them.
        changes: what is made.
    """

    given: Mapping[str, Tensor] = field(default_factory=dict)
    changes: tuple[Change, ...] = ()


class Overlay:
    """The weights that some engines read in the place of their own, and who is reading."""

    def __init__(self) -> None:
        self._made: dict[str, Tensor] = {}
        self._told: dict[str, Tensor] = {}
        self._all_know = True
        self._turns = Turns()

    @property
    def weights(self) -> dict[str, Tensor]:
        """What engines read in the place of their own weights, by name."""
        return dict(self._told)

    def reading(self, key: Hashable, lay: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
        """Weights stay those of this key meanwhile; see `Turns`.

        Args:
            key: None for the engines' own.
            lay: changes them to those of the key.
        """
        return self._turns.reading(key, lay)

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Nobody else reads meanwhile."""
        return self._turns.alone()

    def forget(self) -> None:
        """The engines' own weights have changed: what was made from them is stale."""
        self._turns.forget()

    def lay(self, patch: Patch, own: Mapping[str, Tensor], engines: Iterable[Engine], device: torch.device) -> None:
        """Let engines read what a patch says, and their own weights beside.

        Args:
            patch: of their weights.
            own: every weight of theirs.
            engines: all of them.
            device: of the engines.

        Raises:
            ModelError: the patch does not fit the weights.
        """
        _check(patch, own)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # what was enqueued before reads what it was meant to
        direct = {name: tensor for name, tensor in patch.given.items() if _lies_as(tensor, own[name])}
        made = {name for change in patch.changes for name in change.bases} | (patch.given.keys() - direct.keys())
        with torch.inference_mode(False), torch.no_grad():  # whatever mode the caller is in
            self._made = {name: self._made.get(name, _NONE) for name in made}
            for name, tensor in self._made.items():
                if tensor is _NONE:
                    self._made[name] = torch.empty_like(own[name], requires_grad=False)
            for name in patch.given.keys() - direct.keys():
                self._made[name].copy_(patch.given[name])
            for change in patch.changes:
                bases = {name: own[name] if base is None else base for name, base in change.bases.items()}
                change.write(bases, {name: self._made[name] for name in bases})
        self._tell({**direct, **self._made}, own, engines)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # calls on other streams see it

    def _tell(self, instead: dict[str, Tensor], own: Mapping[str, Tensor], engines: Iterable[Engine]) -> None:
        """Tell engines where their weights are, unless they know."""
        told, self._told = self._told, {**instead}
        if (
            self._all_know
            and instead.keys() == told.keys()
            and all(told[name] is each for name, each in instead.items())
        ):
            return
        self._all_know = False  # some, should it fail
        for engine in engines:
            engine.use({**own, **instead})
        self._all_know = True


_NONE = torch.empty(0)


def _lies_as(tensor: Tensor, own: Tensor) -> bool:
    """Whether engines can read a tensor where it is."""
    facts = (tensor.dtype, tensor.device, tensor.shape, tensor.stride())
    return facts == (own.dtype, own.device, own.shape, own.stride())


def _check(patch: Patch, own: Mapping[str, Tensor]) -> None:
    """Raise `ModelError` unless every weight of a patch is one of the engines', of its shape."""
    given = {**patch.given, **{name: base for change in patch.changes for name, base in change.bases.items()}}
    if unknown := sorted(given.keys() - own.keys()):
        raise ModelError(f"adapters: {', '.join(unknown[:3])}: no weights of the engines")
    for name, tensor in given.items():
        if tensor is not None and tensor.shape != own[name].shape:
            raise ModelError(f"adapters: {name} is {list(tensor.shape)}, compiled {list(own[name].shape)}")
