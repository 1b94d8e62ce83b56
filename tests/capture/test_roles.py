"""Roles: what names usually mean, and what the caller says."""

import pytest

from recache_compile.capture.roles import assign_roles, usual_role
from recache_compile.errors import CaptureError
from recache_compile.ir.value import Kind


def test_usual_names() -> None:
    assert usual_role("hidden_states") is Kind.LATENTS
    assert usual_role("timestep") is Kind.TIMESTEP
    assert usual_role("encoder_hidden_states") is Kind.CONDITIONING


def test_the_caller_overrides_what_names_mean() -> None:
    assert assign_roles(["noise", "timestep", "text"], {"noise": "latents"}) == {
        "noise": Kind.LATENTS,
        "timestep": Kind.TIMESTEP,
        "text": Kind.CONDITIONING,
    }


@pytest.mark.parametrize(
    ("names", "overrides", "message"),
    [
        (["sample"], {"samples": "latents"}, r"roles: \['samples'\] are no tensor inputs; these are: sample"),
        (["sample"], {"sample": "noise"}, "roles: 'noise' for 'sample' is no role; choose one of"),
        (["noise"], {}, "no latents among noise; name one with roles={'INPUT': 'latents'}"),
        ([], {}, "no latents among no inputs"),
    ],
)
def test_what_makes_no_roles_is_refused(names: list[str], overrides: dict[str, str], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        assign_roles(names, overrides)
