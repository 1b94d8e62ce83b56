"""Models described by data: a class, its configuration and the shapes of one call.  No weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from recache_compile.capture.export import quiet
from recache_compile.compiler.examples import Example
from recache_compile.errors import ModelError, RecacheError, check_memory

FOLDER = Path(__file__).parent.parent / "models" / "specs"


class Spec(BaseModel):
    """A model and one call of it, as a JSON file says.

    `inputs` holds, for each argument, {"shape": [...], "dtype": "bfloat16"}, {"value": ...}
    for what is no tensor, or lists and objects of these.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    name: str
    source: str = ""
    size: str = ""
    num_steps: int = Field(ge=1)
    dtype: str = "bfloat16"
    class_name: str = Field(alias="class")
    config: dict[str, Any]
    inputs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class WeightlessModel:
    """A model without weights and one call of it, all on the meta device.

    Args:
        name, size: what it is, for people.
        num_steps: its usual number of denoising steps.
        module: the transformer.
        example: the call.
    """

    name: str
    size: str
    num_steps: int
    module: nn.Module
    example: Example


def known_specs() -> tuple[str, ...]:
    """Names of the models that come with the package as specs, without the small ones for benchmarks."""
    return tuple(sorted(file.stem for file in FOLDER.glob("*.json")))


def find_spec_file(model: str) -> Path | None:
    """The file of a spec that comes with the package, or that was named; None where it is neither."""
    named = Path(model)
    if named.suffix == ".json":
        return named
    files = (folder / f"{model.lower()}.json" for folder in (FOLDER, FOLDER / "small"))
    return next((file for file in files if file.is_file()), None)


def read_spec(file: Path) -> WeightlessModel:
    """Build the model that a spec describes, on the meta device.

    Raises:
        ModelError: the file cannot be read, or does not describe a transformer of `diffusers`.
    """
    try:
        spec = Spec.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: cannot be read ({error})") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ModelError(f"{file}: at {'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}") from None
    dtype = _dtype(spec.dtype, file)
    try:
        with torch.device("meta"), quiet("diffusers.models.modeling_utils"):
            module = _cast(transformer_class(spec.class_name)(**spec.config), dtype).eval()
    except RecacheError:
        raise
    except Exception as error:  # whatever a constructor raises
        check_memory(error)
        raise ModelError(f"{file}: {spec.class_name} does not take this config: {error}") from error
    inputs = {name: _read_input(entry, file) for name, entry in spec.inputs.items()}
    return WeightlessModel(spec.name, spec.size, spec.num_steps, module, Example(inputs))


def transformer_class(name: str) -> type[nn.Module]:
    """A transformer class of `diffusers`.

    Raises:
        ModelError: it has none of that name.
    """
    import diffusers

    cls = getattr(diffusers, name, None)
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise ModelError(f"diffusers {diffusers.__version__} has no model class {name!r}")
    return cls


def _cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The types that `from_pretrained` gives: some modules stay in float32, and so do buffers that are not stored."""
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    stored = {
        name: tensor.to(dtype)
        for name, tensor in module.state_dict().items()
        if tensor.is_floating_point() and not kept & set(name.split("."))
    }
    module.load_state_dict(stored, strict=False, assign=True)
    return module


def on_meta(value: Any) -> Any:
    """The same arguments with every tensor on the meta device."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), value)


def _read_input(entry: Any, file: Path) -> Any:
    if isinstance(entry, list):
        return [_read_input(item, file) for item in entry]
    if not isinstance(entry, dict):
        raise ModelError(f"{file}: input {json.dumps(entry)}: expected an object with a shape or a value")
    if set(entry) == {"value"}:
        return entry["value"]
    if "shape" in entry:
        if set(entry) != {"shape", "dtype"}:
            raise ModelError(f"{file}: input {json.dumps(entry)}: expected a shape and a dtype, nothing else")
        try:
            return torch.empty(entry["shape"], dtype=_dtype(entry["dtype"], file), device="meta")
        except (TypeError, RuntimeError):
            raise ModelError(f"{file}: input {json.dumps(entry)}: is no shape; write it as in [1, 4096, 64]") from None
    return {name: _read_input(item, file) for name, item in entry.items()}


def _dtype(name: str, file: Path) -> torch.dtype:
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise ModelError(f"{file}: {name!r} is no dtype; write it as in torch, for example bfloat16")
    return dtype
