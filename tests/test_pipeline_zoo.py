"""Every transformer pipeline of `diffusers`: two dozens always, all of them with `-m zoo`."""

import re

import pytest

from recache_compile.errors import RecacheError
from tests.zoo.check_pipeline import check_pipeline
from tests.zoo.pipelines import pipeline_classes
from tests.zoo.pipelines_table import all_pipelines

CASES = all_pipelines()

WEIGHTY = (
    *("FluxPipeline", "FluxKontextPipeline", "FluxFillPipeline", "FluxControlPipeline", "FluxControlNetPipeline"),
    *("Flux2Pipeline", "QwenImagePipeline", "QwenImageEditPipeline", "QwenImageControlNetPipeline", "ZImagePipeline"),
    *("WanPipeline", "WanImageToVideoPipeline", "WanVACEPipeline", "HunyuanVideoPipeline", "HunyuanVideo15Pipeline"),
    *("LTXPipeline", "LTX2Pipeline", "StableDiffusion3ControlNetPipeline", "ChromaPipeline", "Lumina2Pipeline"),
    *("SanaPipeline", "CogVideoXPipeline", "Kandinsky5T2VPipeline", "AceStepPipeline", "StableDiffusion3PAGPipeline"),
)
"""Those that most people run, and one that changes attention for a call."""

NAMES = [pytest.param(name, marks=() if name in WEIGHTY else pytest.mark.zoo) for name in CASES]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_is_right_or_refused(name: str) -> None:
    case = CASES[name]
    if case.refused:
        with pytest.raises(RecacheError, match=re.escape(case.refused)):
            check_pipeline(case)
        return
    checked = check_pipeline(case)
    assert checked.is_right, checked


def test_every_class_has_a_case() -> None:
    assert set(pipeline_classes()) <= {case.name for case in CASES.values()}
