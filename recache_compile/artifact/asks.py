"""The policy in an artifact, so that it can be asked for other budgets and other numbers of steps."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from recache_compile.compiler.planner import Planner
from recache_compile.errors import ArtifactError, ScheduleError
from recache_compile.policies.base import Calibration, Policy
from recache_compile.policies.calibration import load_calibration, save_calibration
from recache_compile.policies.recache import ReCache, read_policy
from recache_compile.policies.registry import POLICIES, get_policy, text_of

POLICY = "policy"
CALIBRATION = "calibration.safetensors"


class StoredPolicy(BaseModel):
    """What other budgets are asked of.

    Args:
        kind: a policy that is known by what a user writes, or a trained one whose files are in `policy`.
        text: what a user writes.
        calibrated: whether the calibration that it looks at is there, too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["named", "trained"]
    text: str
    calibrated: bool


def store_policy(planner: Planner, folder: Path) -> StoredPolicy | None:
    """Write what a planner asks, as far as it can be written; see `can_store`."""
    policy, text = planner.policy, text_of(planner.policy)
    if not can_store(policy):
        return None
    if isinstance(policy, ReCache):
        policy.save(folder / POLICY)
    if planner.calibration is not None:
        (folder / POLICY).mkdir(exist_ok=True)
        save_calibration(planner.calibration, folder / POLICY / CALIBRATION)
    return StoredPolicy(
        kind="named" if text else "trained", text=text or "", calibrated=planner.calibration is not None
    )


def can_store(policy: Policy | None) -> bool:
    """Whether a policy is known by what a user writes, or by its files: not what users have programmed or stated."""
    return isinstance(policy, ReCache) or text_of(policy) is not None


def restore_policy(
    stored: StoredPolicy | None, folder: Path, num_steps: int
) -> tuple[Policy | None, Calibration | None]:
    """What `store_policy` wrote.

    Raises:
        ArtifactError: it makes no sense.
    """
    if stored is None:
        return None, None
    if stored.kind == "named" and stored.text.partition(":")[0] not in POLICIES:
        raise ArtifactError(f"its policy {stored.text!r} is none; compile again")
    try:
        policy = read_policy(folder / POLICY) if stored.kind == "trained" else get_policy(stored.text, num_steps)
    except ScheduleError as error:
        raise ArtifactError(f"{error}; compile again") from error
    calibration = load_calibration(folder / POLICY / CALIBRATION) if stored.calibrated else None
    if calibration is not None and calibration.num_steps != num_steps:
        raise ArtifactError(
            f"its calibration is of {calibration.num_steps} steps, its plans are of {num_steps}; compile again"
        )
    return policy, calibration
