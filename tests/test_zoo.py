"""Every transformer class of `diffusers`: two representative dozens always, all of them with `-m zoo`."""

import pytest

from recache_compile.errors import CaptureError
from tests.zoo.check import Checker
from tests.zoo.table import TOLERANCE, all_cases, transformer_classes

CASES = all_cases()

DOZEN = (
    "FluxTransformer2DModel",
    "SD3Transformer2DModel",
    "PixArtTransformer2DModel",
    "QwenImageTransformer2DModel",
    "HunyuanDiT2DModel",
    "SanaTransformer2DModel",
    "ZImageTransformer2DModel",
    "Lumina2Transformer2DModel",
    "WanTransformer3DModel",
    "HunyuanVideoTransformer3DModel",
    "LTX2VideoTransformer3DModel",
    "StableAudioDiTModel",
)
"""Joint and single blocks, cross attention, skip connections, lists in and out, masks that the code reads, refiners,
two streams of latents, in-place writes, audio."""

EVERYWHERE = (*DOZEN[:2], "SanaTransformer2DModel", "WanTransformer3DModel")
"""Those that are compiled at every granularity always; docs/models.md has all of them at all."""

UNREADABLE = ("HiDreamImageTransformer2DModel",)
"""Their code decides by values of the latents: which experts get how many tokens."""

SECOND_DOZEN = (
    "AllegroTransformer3DModel",
    "AuraFlowTransformer2DModel",
    "CogVideoXTransformer3DModel",
    "DiTTransformer2DModel",
    "Flux2Transformer2DModel",
    "LTXVideoTransformer3DModel",
    "LuminaNextDiT2DModel",
    "MochiTransformer3DModel",
    "OmniGenTransformer2DModel",
    "PriorTransformer",
    "T5FilmDecoder",
    "TransformerTemporalModel",
)
"""Looked at where most cached features are, at the end of the stack."""

SECOND_LOOK = tuple(name for name in (*DOZEN, *SECOND_DOZEN) if name not in EVERYWHERE)
"""Whose blocks are looked at with `-m zoo`."""

OTHERS = [
    pytest.param(name, marks=pytest.mark.zoo) for name in CASES if name not in (*DOZEN, *SECOND_DOZEN, *UNREADABLE)
]


@pytest.mark.parametrize(
    "name", [*DOZEN, *(pytest.param(name, marks=pytest.mark.slow) for name in SECOND_DOZEN), *OTHERS]
)
def test_both_budgets_are_right(name: str) -> None:
    checker = Checker(CASES[name])
    for granularity in ("stack",) if name in (*DOZEN, *SECOND_DOZEN) else ("stack", "block"):
        checked = checker.check(granularity)
        assert checked.full_error <= TOLERANCE, granularity
        assert checked.cached_error is not None
        assert checked.cached_error <= TOLERANCE, granularity


@pytest.mark.parametrize("name", [*EVERYWHERE, *(pytest.param(name, marks=pytest.mark.zoo) for name in SECOND_LOOK)])
def test_blocks_are_right_too(name: str) -> None:
    checker = Checker(CASES[name])
    checked = checker.check("block")
    assert checked.full_error <= TOLERANCE
    assert checked.cached_error is not None
    assert checked.cached_error <= TOLERANCE
    if name in EVERYWHERE:
        for granularity in ("output", "module"):
            assert checker.check(granularity).full_error <= TOLERANCE, granularity


@pytest.mark.parametrize("name", UNREADABLE)
def test_code_that_reads_the_latents_is_named(name: str) -> None:
    with pytest.raises(CaptureError, match="the model's code decides by values computed from hidden_states"):
        Checker(CASES[name]).check("stack")


def test_every_class_has_a_case() -> None:
    assert set(transformer_classes()) <= set(CASES)
