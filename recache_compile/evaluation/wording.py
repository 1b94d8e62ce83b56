"""How an evaluation's numbers are written."""

from math import floor, log10

from recache_compile.evaluation.result import EvaluationLine, EvaluationResult
from recache_compile.evaluation.statistics import SURE, TARGET_LOSS, TARGET_REDUCTION, Estimate

DIVERGED = "not finite"
UNSURE = f"? where {TARGET_LOSS:.0%} is within {SURE:g} standard errors"


def target_line(result: EvaluationResult, policy: str) -> str:
    """At which budgets a policy meets the target."""
    target = f"{TARGET_REDUCTION:g} times fewer MACs and faster at a loss up to {TARGET_LOSS:.0%}"
    if all(each.target == "unknown" for each in result.lines):
        missing = "nothing that counts was measured (clip, vbench, fid to real pictures)"
        return f"{policy}: {target}: unknown, because {missing}"
    met = [f"{each.budget}{each.target.removeprefix('pass')}" for each in result.lines if _is_met(each, policy)]
    return f"{policy}: {target}: " + (f"at k = {', '.join(met)}" if met else "at no budget")


def _is_met(line: EvaluationLine, policy: str) -> bool:
    return line.policy == policy and line.target.startswith("pass")


def percent(loss: Estimate) -> str:
    """A loss with its standard error, as +0.3 ± 0.1 %."""
    if loss.value is None:
        return DIVERGED
    error = "" if loss.error is None else f" ± {100 * loss.error:.1f}"
    return f"{100 * loss.value:+.1f}{error} %"


def plain(estimate: Estimate) -> str:
    """A value with its standard error, to the error's second digit."""
    if estimate.value is None:
        return DIVERGED
    if not estimate.error:
        return f"{estimate.value:.4g}"
    digits = max(0, 1 - floor(log10(estimate.error)))
    return f"{estimate.value:.{digits}f} ± {estimate.error:.{digits}f}"
