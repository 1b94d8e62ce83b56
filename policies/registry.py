"""Find a policy by what a user writes."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from recache_compile.errors import ScheduleError
from recache_compile.policies.annealing import Annealing
from recache_compile.policies.base import Policy
from recache_compile.policies.dynamic import DynamicProgram, Minimax
from recache_compile.policies.evolution import Nsga2
from recache_compile.policies.explicit import from_mapping, read_file, read_schedules
from recache_compile.policies.front_loaded import FrontLoaded
from recache_compile.policies.gram import Gram
from recache_compile.policies.recache import is_trained, read_policy
from recache_compile.policies.reinforce import Reinforce
from recache_compile.policies.search import Climb, Search
from recache_compile.policies.thresholds import MagCache, TeaCache
from recache_compile.policies.uniform import Uniform

POLICIES: dict[str, Callable[..., Policy]] = {
    "uniform": Uniform,
    "front-loaded": FrontLoaded,
    "gram": Gram,
    "dp": DynamicProgram,
    "minimax": Minimax,
    "teacache": TeaCache,
    "magcache": MagCache,
    "annealing": Annealing,
    "nsga2": Nsga2,
    "climb": Climb,
    "search": Search,
    "recache": Reinforce,
}

CALIBRATED = (Gram, DynamicProgram, Minimax, TeaCache, MagCache)
"""Policies that look at a few uncached generations of the model."""


def get_policy(choice: str | Mapping[int, Sequence[int]] | Policy, num_steps: int) -> Policy:
    """A policy from a name ("uniform", "uniform:warmup=3"), a trained policy, a file, steps, a mask or a mapping.

    Raises:
        ScheduleError: nothing of that name, or an option that the policy does not have.
    """
    if isinstance(choice, Mapping):
        return from_mapping(choice, num_steps)
    if not isinstance(choice, str):
        return choice
    name, _, options = choice.partition(":")
    if name in POLICIES:
        return POLICIES[name](**_options(name, options))
    if set(choice) <= set("0123456789, ") and choice.strip():
        return read_schedules(choice, num_steps, f"policy {choice!r}")
    with contextlib.suppress(OSError):  # such as a name that is too long
        if is_trained(Path(choice)):
            return read_policy(Path(choice))
        if Path(choice).exists():
            return read_file(Path(choice), num_steps)
    raise ScheduleError(
        f"policy {choice!r} is neither a policy (auto, {', '.join(POLICIES)}), a trained policy's folder, a file, steps"
        " such as 0,4,9 nor a 0/1 mask"
    )


def text_of(policy: Policy | None) -> str | None:
    """What `get_policy` makes this policy of; None: nothing does."""
    for name, kind in POLICIES.items():
        if type(policy) is kind:
            options = ",".join(f"{each.name}={getattr(policy, each.name)}" for each in fields(kind))  # type: ignore[arg-type]
            return f"{name}:{options}" if options else name
    return None


def _options(name: str, text: str) -> dict[str, Any]:
    known: dict[str, type[Any]] = {field.name: type(field.default) for field in fields(POLICIES[name])}  # type: ignore[arg-type]
    options: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key not in known:
            raise ScheduleError(f"policy {name}: no option {key!r}; it has {', '.join(known) or 'none'}")
        try:
            options[key] = known[key](value)
        except ValueError:
            kind = "a whole number" if known[key] is int else "a number"
            raise ScheduleError(f"policy {name}: option {part!r}: expected {key}= and {kind}") from None
    return options
