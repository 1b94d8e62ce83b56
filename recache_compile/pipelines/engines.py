"""Engines for a pipeline's transformer."""

from collections.abc import Mapping, Sequence
from typing import Any

from recache_compile.compiler.build import build_engines
from recache_compile.compiler.compiled import Engines
from recache_compile.config import CompileConfig
from recache_compile.pipelines.record import check_scheduler, denoiser_of, record_examples
from recache_compile.runtimes.base import Runtime


def engines_of_pipeline(
    pipeline: Any, config: CompileConfig, calls: Sequence[Mapping[str, Any]], runtime: Runtime | None = None
) -> Engines:
    """Record how a pipeline calls its transformer, and build engines for these calls.

    Args:
        pipeline: a `diffusers` pipeline; it is left as it is.
        config: the choices; names the transformer.
        calls: arguments of the pipeline calls that are recorded, at least one.
        runtime: a backend with options of its own, instead of the one that `config` names.

    Raises:
        RecacheError: naming what cannot be done and the remedy.
    """
    module = denoiser_of(pipeline, config.component)
    check_scheduler(pipeline)
    examples = [
        example for call in calls for example in record_examples(pipeline, config.num_steps, call, config.component)
    ]
    return build_engines(module, examples, config, runtime)
