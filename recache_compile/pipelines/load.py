"""Load a `diffusers` pipeline by the name of an embedded model, a folder or a Hub id."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from recache_compile.errors import ModelError, RecacheError, RuntimeUnavailableError, check_memory
from recache_compile.models.registry import EMBEDDED, find, find_pipeline

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_UNKNOWN = f"not an embedded model ({', '.join(EMBEDDED)}), a pipeline folder, or a Hub id that can be loaded here"


def load_pipeline(
    model: str, dtype: torch.dtype = torch.float32, device: torch.device | None = None, **components: Any
) -> "DiffusionPipeline":
    """A pipeline from the name of an embedded model, a local folder or a Hub id.

    Args:
        model: what the user wrote.
        dtype: of its weights.
        device: where they go; None: the CPU.
        components: replace components, as `transformer=None`.

    Raises:
        ModelError: there is no such model, or it is no pipeline.
    """
    from diffusers import DiffusionPipeline

    config = load_config(model)
    if "_class_name" not in config:
        raise ModelError(f"model {model}: its model_index.json names no pipeline class (_class_name)")
    _require_libraries(model, config)
    embedded = find_pipeline(config["_class_name"])
    cls = DiffusionPipeline if embedded is None else embedded.code().pipeline_class()
    with _loading(model), _no_random_weights(model):
        pipeline = cls.from_pretrained(
            _source(model),
            dtype=dtype,
            use_safetensors=True,
            low_cpu_mem_usage=find_spec("accelerate") is not None,
            **components,
        )
    return pipeline if device is None else pipeline.to(device)


def load_config(model: str, component: str | None = None) -> dict[str, Any]:
    """The index of a pipeline, or the configuration of one of its components.

    Raises:
        ModelError: there is no such model, or it is no pipeline.
    """
    from diffusers import ConfigMixin, DiffusionPipeline
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with _loading(model):
        if component is None:
            return dict(DiffusionPipeline.load_config(_source(model)))
        reader: Any = type("Component", (ConfigMixin,), {"config_name": "config.json"})
        return dict(reader.load_config(_source(model), subfolder=component))


def absolute(model: str) -> str:
    """The model as the user wrote it; of a folder the absolute path, which holds in every working folder."""
    return str(Path(model).resolve()) if find(model) is None and Path(model).is_dir() else model


def _source(model: str) -> str:
    """The folder or Hub id of a model."""
    embedded = find(model)
    folder = embedded.weights if embedded else Path(model)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise ModelError(f"model {model}: the folder holds no pipeline (no model_index.json)")
    if not folder.is_dir() and model.count("/") != 1:
        raise ModelError(f"model {model}: {_UNKNOWN}")
    return str(folder) if folder.is_dir() else model


@contextlib.contextmanager
def _loading(model: str) -> Iterator[None]:
    """Turn whatever stops a model from being loaded into a `ModelError` of one line."""
    try:
        yield
    except RecacheError:
        raise
    except Exception as error:  # diffusers and the Hub raise many kinds, none of them ours
        check_memory(error)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"model {model}: {_UNKNOWN}: {reason[:300]}") from error


@contextlib.contextmanager
def _no_random_weights(model: str) -> Iterator[None]:
    """Refuse a checkpoint that lacks weights: `diffusers` would draw them at random and only log it."""
    logged: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.append(record.getMessage())

    listener, logger = Listener(), logging.getLogger("diffusers")
    logger.addHandler(listener)
    try:
        yield
    finally:
        logger.removeHandler(listener)
    if missing := [message for message in logged if "newly initialized" in message]:
        raise ModelError(f"model {model}: weights are missing: {' '.join(missing[0].split())[:300]}")


def _require_libraries(model: str, config: Mapping[str, Any]) -> None:
    """Raise `RuntimeUnavailableError` naming a missing package, which `diffusers` would report less clearly."""
    for component, entry in config.items():
        if not isinstance(entry, (list, tuple)) or len(entry) != 2 or not isinstance(entry[0], str):
            continue
        package = entry[0].partition(".")[0]
        if package in ("transformers", "sentencepiece") and find_spec(package) is None:
            raise RuntimeUnavailableError(
                f"model {model}: its {component} needs the package {package}; pip install 'recache-compile[hub]'"
            )
