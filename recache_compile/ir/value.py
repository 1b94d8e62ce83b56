"""Facts about the inputs and outputs of programs."""

from dataclasses import dataclass
from enum import StrEnum

import torch


class Kind(StrEnum):
    """What a program's input or output is.

    The first three tell how often an input of the model changes: they are its roles.  A
    prologue's outputs are of kind TABLE (rows, size) or FIXED (size,); the step programs read a
    TABLE_ROW (size,) of the one, and the other as it is.
    """

    LATENTS = "latents"
    TIMESTEP = "timestep"
    CONDITIONING = "conditioning"
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
        shape: sizes; None marks a size that is free at run time.
        dtype: element type.
        site: cache site that a HISTORY input or FEATURE output belongs to.
        slot: history slot of a HISTORY input.
        table: of a prologue's input or output, the table that its rows belong to.
        source: of a prologue's input, the model's input that it stands for; of a prologue's
            output, the packed input of the step programs that it fills.
    """

    name: str
    kind: Kind
    shape: tuple[int | None, ...]
    dtype: torch.dtype
    site: int | None = None
    slot: int | None = None
    table: str | None = None
    source: str | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes; a free dimension counts once."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= 1 if length is None else length
        return size
