"""What an evaluation found; `result.json` holds it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from recache_compile.artifact.inspect import ProgramFacts, facts_of
from recache_compile.compiler.compiled import Compiled
from recache_compile.evaluation.statistics import TARGET_REDUCTION, Estimate, Verdict
from recache_compile.support.records import read_record, write_record

RESULT = "result.json"


@dataclass(frozen=True, slots=True)
class EvaluationLine:
    """One policy at one budget.

    Args:
        policy: its name.
        budget: number of recompute steps k.
        recompute_steps: which they are.
        macs_reduction: times fewer multiply-accumulates per generation.
        speedup: of a pipeline call, over that of the uncached pipeline; the same for all policies, as cost is.
        seconds: of a pipeline call that makes one batch.
        history_bytes, table_bytes: held by one guidance branch.
        values: by metric, of the cached samples.
        losses: by metric that counts, the part of the uncached value by which it is worse.
        target: twice as fast, half of the MACs, at most 1 % of loss?
    """

    policy: str
    budget: int
    recompute_steps: tuple[int, ...]
    macs_reduction: float
    speedup: float
    seconds: float
    history_bytes: int
    table_bytes: int
    values: Mapping[str, Estimate]
    losses: Mapping[str, Estimate]
    target: Verdict


@dataclass(frozen=True, slots=True)
class CompiledFacts:
    """What was compiled."""

    model_class: str
    parameters: int
    hoisted_parameters: int
    weight_bytes: int
    programs: tuple[ProgramFacts, ...]


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """One evaluation.

    Args:
        model, num_steps, forecaster, order, granularity, runtime, dtype, device, batch_size, seed: its setting.
        samples: that values are means of.
        reference: what the Frechet distance is to; "" where it was not asked for.
        uncached: values of the uncached samples.
        uncached_seconds: of a call of the uncached pipeline, which is not compiled, and of the engines when
            every step is recomputed.
        lines: by policy and budget.
        facts: about what was compiled.
        machine, versions, date, command: where, with what, when and how it was measured.
    """

    model: str
    num_steps: int
    forecaster: str
    order: int
    granularity: str
    runtime: str
    dtype: str
    device: str
    batch_size: int
    seed: int
    samples: int
    reference: str
    uncached: Mapping[str, Estimate]
    uncached_seconds: tuple[float, float]
    lines: tuple[EvaluationLine, ...]
    facts: CompiledFacts
    machine: str
    date: str
    command: str
    versions: Mapping[str, str] = field(default_factory=dict)

    def smallest(self, policy: str) -> int | None:
        """The smallest budget from which on a policy meets the target at all that are cheap enough for it."""
        found = None
        for line in sorted(self.lines, key=lambda line: -line.budget):
            if line.policy == policy and min(line.macs_reduction, line.speedup) >= TARGET_REDUCTION:
                if not line.target.startswith("pass"):
                    break
                found = line.budget
        return found


def facts_about(compiled: Compiled) -> CompiledFacts:
    """Facts about the engines that an evaluation runs."""
    facts = facts_of(compiled)
    return CompiledFacts(
        compiled.description.model_class,
        facts.parameters,
        facts.hoisted_parameters,
        sum(weight.nbytes for weight in compiled.weights.values()),
        facts.programs,
    )


def write_result(result: EvaluationResult, folder: Path) -> None:
    """Write `result.json`; if that fails, an earlier one stays as it was."""
    write_record(result, folder / RESULT)


def read_result(folder: Path) -> EvaluationResult:
    """The result of the evaluation in a folder.

    Raises:
        ArtifactError: there is none yet.
    """
    return read_record(folder / RESULT, EvaluationResult, "run `recache-compile evaluate` again, with its --out")
