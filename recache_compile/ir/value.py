"""Facts about the inputs and outputs of programs."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from recache_compile.ir.sizes import is_free, number_of, sizes_in, texts_of, value_of_term


class Kind(StrEnum):
    """What a program's input or output is.

    The first three tell how often an input of the model changes: they are its roles.  A
    prologue's outputs are of kind TABLE (rows, size) or FIXED (size,); the step programs read a
    TABLE_ROW (size,) of the one, and the other as it is.  SHAPE is an input of the model that a
    program reads the sizes of, and nothing else.
    """

    LATENTS = "latents"
    TIMESTEP = "timestep"
    CONDITIONING = "conditioning"
    SHAPE = "shape"
    HISTORY = "history"
    COEFFICIENTS = "coefficients"
    TABLE_ROW = "row"
    FIXED = "fixed"
    PREDICTION = "prediction"
    FEATURE = "feature"
    TABLE = "table"


ROLES = (Kind.LATENTS, Kind.TIMESTEP, Kind.CONDITIONING)
"""Kinds of a model's inputs: what changes from step to step, what does so in a way that is known ahead, what stays."""


@dataclass(frozen=True, slots=True)
class Value:
    """An input or output of a program.

    Args:
        name: unique within the program.
        kind: what it is.
        shape: sizes; None marks a number of rows, which is free at run time.  Other sizes that are free are
            those of the example.
        dtype: element type.
        site: cache site that a HISTORY input or FEATURE output belongs to.
        slot: history slot of a HISTORY input.
        table: of a prologue's input or output, the table that its rows belong to.
        source: of a prologue's input, the model's input that it stands for; of a prologue's
            output, the packed input of the step programs that it fills.
        free: for every dimension the size as a term of free sizes, "" where it is fixed; empty where all are.
    """

    name: str
    kind: Kind
    shape: tuple[int | None, ...]
    dtype: torch.dtype
    site: int | None = None
    slot: int | None = None
    table: str | None = None
    source: str | None = None
    free: tuple[str, ...] = ()

    @classmethod
    def like(cls, tensor: Tensor, name: str, kind: Kind, **facts: Any) -> "Value":
        """Of a tensor that is traced, or one of the example."""
        sizes = tuple(tensor.shape)
        return cls(name, kind, tuple(map(number_of, sizes)), tensor.dtype, free=texts_of(sizes), **facts)

    @property
    def with_rows(self) -> "Value":
        """The same for any number of rows."""
        return replace(self, shape=(None, *self.shape), free=("", *self.free) if self.free else ())

    @property
    def terms(self) -> tuple[str, ...]:
        """For every dimension the size as a term of free sizes, "" where it is fixed."""
        return self.free or ("",) * len(self.shape)

    @property
    def free_at(self) -> tuple[int, ...]:
        """Dimensions whose size is free at run time, rows among them."""
        return tuple(
            at for at, (size, term) in enumerate(zip(self.shape, self.terms, strict=True)) if size is None or term
        )

    def fixed_in(self, traced: Tensor) -> tuple[int, ...]:
        """Dimensions whose size is free, and a number in a tensor that stands for this value in a trace."""
        return tuple(at for at in self.free_at if not is_free(traced.shape[at]))

    def shape_at(self, sizes: Mapping[str, int], rows: int = 0) -> list[int]:
        """Its shape for free sizes, by symbol, and a number of rows."""
        return [
            value_of_term(term, sizes) if term else rows if size is None else size
            for size, term in zip(self.shape, self.terms, strict=True)
        ]

    def shape_text(self, ranges: Mapping[str, tuple[int, int]]) -> str:
        """Its shape for people: a size that is free as its smallest and largest among the examples."""
        bounds = [
            self.shape_at({symbol: each[at] for symbol, each in ranges.items()}) if ranges else self.shape
            for at in (0, 1)
        ]
        pairs = zip(self.terms, self.shape, *bounds, strict=True)
        sizes = [f"{min(low, high)}..{max(low, high)}" if term else str(size) for term, size, low, high in pairs]
        return f"[{', '.join(sizes)}]"

    @property
    def nbytes(self) -> int:
        """Size in bytes, of one row, at the sizes of the example."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= 1 if length is None else length
        return size


def unmet(inputs: Sequence[Value], conditions: Iterable[str], shapes: Mapping[str, Sequence[int | None]]) -> str | None:
    """Why what was compiled for inputs does not serve those of other sizes, for people; None: it does.

    Args:
        inputs: what they are.
        conditions: what must hold of free sizes, see `capture.free_sizes`.
        shapes: of the tensors of a call, by name.
    """
    sizes = sizes_in([(value.shape, value.free, shapes[value.name]) for value in inputs])
    if sizes is None:
        return "sizes that are fixed differ, or some that must be equal"
    failed = next((each for each in conditions if not value_of_term(each, sizes)), None)
    if failed is None:
        return None
    names = {
        term: value.name if value.kind is Kind.SHAPE else f"{value.name}.shape[{at}]"
        for value in reversed(inputs)
        for at, term in enumerate(value.free)
        if term
    }
    return re.sub(r"[A-Za-z_]\w*", lambda found: names.get(found.group(), found.group()), failed) + " does not hold"
