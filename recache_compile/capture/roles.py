"""The roles of inputs: what their names usually mean, and what the caller says."""

from collections.abc import Iterable, Mapping

from recache_compile.errors import CaptureError
from recache_compile.ir.value import ROLES, Kind

USUAL_NAMES = {
    Kind.LATENTS: ("hidden_states", "sample", "latents", "latent_model_input", "x"),
    Kind.TIMESTEP: ("timestep", "timesteps", "t", "time", "sigma", "sigmas"),
}
"""What the inputs of a role are usually called; all others are conditioning."""


def usual_role(name: str) -> Kind:
    """The role of an input that nothing but its name is known of; members of a list or dict have that of the whole."""
    whole = name.partition(".")[0]
    return next((role for role, usual in USUAL_NAMES.items() if whole in usual), Kind.CONDITIONING)


def assign_roles(names: Iterable[str], overrides: Mapping[str, Kind | str]) -> dict[str, Kind]:
    """The role of every tensor input: the usual one, unless the caller says another.

    Raises:
        CaptureError: an override names no input or no role, or no input is the latents.
    """
    usual = {name: usual_role(name) for name in names}
    unknown = sorted(set(overrides) - set(usual))
    if unknown:
        raise CaptureError(f"roles: {unknown} are no tensor inputs; these are: {', '.join(usual)}")
    for name, role in overrides.items():
        if role not in ROLES:
            raise CaptureError(f"roles: {role!r} for {name!r} is no role; choose one of {', '.join(ROLES)}")
    roles = usual | {name: Kind(role) for name, role in overrides.items()}
    if Kind.LATENTS not in roles.values():
        raise CaptureError(
            f"roles: no latents among {', '.join(usual) or 'no inputs'}; name one with roles={{'INPUT': 'latents'}}"
        )
    return roles
