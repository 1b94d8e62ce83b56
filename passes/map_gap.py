"""Map a forecast program over the cached steps of a gap."""

import logging

from recache_compile.errors import check_memory, first_line
from recache_compile.ir.program import Program
from recache_compile.ir.value import Kind
from recache_compile.passes.map_over import map_over

log = logging.getLogger(__name__)

_OWN = (Kind.COEFFICIENTS, Kind.TABLE_ROW)
"""Inputs that every step has its own of."""

_SHARED = (Kind.HISTORY, Kind.FIXED, Kind.SHAPE)
"""Inputs that the steps of a gap have in common."""


def map_over_gap(program: Program) -> Program:
    """The forecast program for all steps of a gap at once, where a prediction does not depend on the latents.

    Coefficients become (G, h), table rows (G, size) and predictions (G, *shape) for any number G
    of steps; history and what the conditioning alone decides are shared by them (`torch.vmap`).

    Args:
        program: a hoisted forecast program.

    Returns:
        The same program where it reads latents, or a timestep that is not in a table, or where
        one of its operators cannot be mapped over a free number of steps.
    """
    inputs = program.inputs
    if any(value.kind not in (*_OWN, *_SHARED) for value in inputs):
        return program
    try:
        return map_over(program, _OWN, "step")
    except Exception as error:  # noqa: BLE001  # torch raises many kinds, depending on the operator
        check_memory(error)
        log.debug("%s is called at every step, it cannot be mapped over them: %s", program.name, first_line(error))
        return program
