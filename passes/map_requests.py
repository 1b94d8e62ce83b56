"""Map a recompute program over requests."""

from recache_compile.errors import PassError, check_memory, first_line
from recache_compile.ir.program import REQUESTS, Program
from recache_compile.ir.value import Kind
from recache_compile.passes.map_over import map_over


def map_over_requests(program: Program) -> Program:
    """The recompute program for any number of requests at once.

    Every input becomes (R, *shape) and every result too: rows of one call may be at different
    steps of different generations.  The weights alone are shared, and what is read for its sizes.

    Args:
        program: a recompute program.

    Raises:
        PassError: one of its operators cannot be mapped over a free number of requests.
    """
    try:
        return map_over(program, [kind for kind in Kind if kind is not Kind.SHAPE], "request").renamed(REQUESTS)
    except Exception as error:  # torch raises many kinds, depending on the operator
        check_memory(error)
        raise PassError(
            f"map-over-requests: {program.name} cannot be mapped over requests ({first_line(error)}); compile without"
            " batching"
        ) from error
