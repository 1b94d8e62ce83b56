"""Find a model and one call of it, without its weights."""

from collections.abc import Mapping
from typing import Any

import torch

from recache_compile.artifact.specs import (
    WeightlessModel,
    find_spec_file,
    known_specs,
    on_meta,
    read_spec,
    transformer_class,
)
from recache_compile.compiler.examples import Example
from recache_compile.errors import ModelError, check_memory
from recache_compile.pipelines.load import load_config, load_pipeline
from recache_compile.pipelines.record import DENOISER, record_examples


def find_weightless(model: str, num_steps: int, call: Mapping[str, Any]) -> WeightlessModel:
    """A model on the meta device and one call of it.

    Args:
        model: a spec's name or file, or what `load_pipeline` takes; then the pipeline is run
            with a transformer whose weights are not loaded; those of its
            text encoders are.
        num_steps: length of the denoising loop, for pipelines.
        call: arguments of the pipeline.

    Raises:
        ModelError: there is no such model.
    """
    file = find_spec_file(model)
    if file is not None:
        return read_spec(file)
    try:
        index = load_config(model)
    except ModelError as error:
        raise ModelError(f"{error}; models that come with the package: {', '.join(known_specs())}") from error
    entry = index.get(DENOISER)
    if not isinstance(entry, (list, tuple)) or len(entry) != 2 or not isinstance(entry[1], str):
        raise ModelError(f"model {model}: its pipeline has no {DENOISER}")
    cls: Any = transformer_class(entry[1])
    config = load_config(model, DENOISER)
    try:
        with torch.device("meta"):
            module = cls.from_config(config).eval()
    except Exception as error:  # whatever a constructor raises
        check_memory(error)
        raise ModelError(f"model {model}: {entry[1]} does not take its config: {error}") from error
    example = record_examples(load_pipeline(model, transformer=module), num_steps, call)[0]
    return WeightlessModel(model, "", num_steps, module, Example(on_meta(dict(example.inputs)), roles=example.roles))
