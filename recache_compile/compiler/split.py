"""From a captured program to its parts: cache points, one program for each site pattern, and the prologue."""

import logging
from collections.abc import Mapping

from torch import fx

from recache_compile.capture.capture import Captured
from recache_compile.config import CompileConfig
from recache_compile.ir.meta import tensor_of
from recache_compile.ir.program import REQUESTS, Program, SitePattern, pattern_name
from recache_compile.ir.sizes import bytes_of
from recache_compile.ir.value import Kind
from recache_compile.passes.base import run_passes
from recache_compile.passes.drop_unread_rows import DropUnreadRows
from recache_compile.passes.find_cache_sites import find_cache_sites
from recache_compile.passes.hoist import Hoist
from recache_compile.passes.insert_cache_points import InsertCachePoints
from recache_compile.passes.map_gap import map_over_gap
from recache_compile.passes.map_requests import map_over_requests
from recache_compile.passes.ops import CACHE_POINT
from recache_compile.passes.prologue import build_prologue
from recache_compile.passes.read_sizes import ReadSizes
from recache_compile.passes.simplify import Simplify
from recache_compile.passes.specialise import Specialise
from recache_compile.passes.verify_split import verify_split

log = logging.getLogger(__name__)

MIN_TABLE_BYTES = 64 << 20
"""Tables of this size are always worth it."""

ROWS = 50
"""Rows of a usual table; programs do not depend on the number of steps."""


def annotate(captured: Captured, config: CompileConfig) -> Program:
    """The captured program with its cache points."""
    graph = captured.program.module.graph
    sites = find_cache_sites(graph, config.granularity, captured.containers, config.residual)
    return run_passes(captured.program, (InsertCachePoints(sites), Simplify()))


def cache_points(annotated: Program) -> list[fx.Node]:
    """The cache points of a program."""
    return annotated.module.graph.find_nodes(op="call_function", target=CACHE_POINT)


def describe_sites(annotated: Program) -> str:
    """How many sites there are and what an anchor takes, for people."""
    points = cache_points(annotated)
    size = sum(bytes_of(tensor_of(point)) for point in points)
    return f"{len(points)} cache site{'s' * (len(points) > 1)}, {size / 1e6:.3g} MB per anchor"


def patterns_of(config: CompileConfig, num_sites: int) -> list[SitePattern]:
    """Recompute, and a forecast from as many anchors as a plan can hold: fewer are the same with zero weights.

    Whatever steps are chosen later, and wherever a generation starts, its patterns are among these.
    """
    return [(anchors,) * num_sites for anchors in (0, config.anchors)]


def row_limit(annotated: Program) -> int:
    """Bytes that the prologue may keep for each step, so that its tables stay small beside the weights."""
    weights = sum(weight.nbytes for weight in annotated.weights.values())
    return max(MIN_TABLE_BYTES, weights // 4) // ROWS


def specialise(annotated: Program, config: CompileConfig) -> dict[str, Program]:
    """One program for each pattern, and the prologue that they share."""
    limit = row_limit(annotated)
    programs: dict[str, Program] = {}
    for pattern in patterns_of(config, len(cache_points(annotated))):
        name = pattern_name(pattern)
        log.info("specialising %s", name)
        passes = (*((Hoist(limit),) if config.hoist else ()), DropUnreadRows(), Simplify(), ReadSizes())
        programs[name] = run_passes(annotated, (Specialise(pattern), *passes)).renamed(name)
    reads = {value.kind for program in programs.values() for value in program.inputs}
    if not reads & {Kind.TABLE_ROW, Kind.FIXED}:
        return mapped(programs, config)
    log.info("building the prologue")
    prologue = build_prologue(annotated, programs)
    verify_split(annotated, prologue, programs)
    return {"prologue": prologue, **mapped(programs, config)}


def mapped(programs: Mapping[str, Program], config: CompileConfig) -> dict[str, Program]:
    """The same programs, and what they become for several steps or requests at once.

    A call of those that forecast makes the predictions of a whole gap where it can.
    """
    ready = {name: map_over_gap(each) if name == "forecast" else each for name, each in programs.items()}
    return ready | ({REQUESTS: map_over_requests(programs["recompute"])} if config.batching else {})
