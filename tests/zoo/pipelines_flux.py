"""Pipelines of FLUX."""

from tests.tiny_pipelines import DISTILLED, FLUX_PARTS, IMAGE, calls, maker
from tests.zoo.pipelines import PipelineCase

CASES = (PipelineCase("FluxPipeline", maker("FluxPipeline", **FLUX_PARTS), calls(IMAGE, **DISTILLED, pooled=True)[0]),)
