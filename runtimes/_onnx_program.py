"""Programs as ONNX models: named as in the original, weights outside, shared by all of them.

While a model is made and run, its weights are inputs: an engine is then handed the tensors
that every other engine reads, nothing is folded into copies, and new values are seen at
once.  `link_weights` makes them initializers whose data lie in a safetensors file, which is
what other tools expect: an ONNX model with external data.
"""

import ast
import contextlib
import copy
import io
import json
import struct
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from recache_compile.capture.export import export_module, quiet
from recache_compile.errors import RuntimeUnavailableError, importing, reason_of, root_cause
from recache_compile.ir.program import Program
from recache_compile.runtimes.base import check_free, dynamic_shapes, example_inputs


def onnx_file(variant: int, program: str) -> str:
    """Where in an artifact a program's model lies: beside the weights, as ONNX asks for of external data."""
    return f"{program}.{variant}.onnx"


def require_onnx(who: str) -> None:
    """Raise `RuntimeUnavailableError`, in the name of `who`, where the extra `onnx` is missing."""
    with importing(who, "pip install 'recache-compile[onnx]'"):
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401


def exporter_facts() -> dict[str, str]:
    """Versions of what decides about an exported model, beside torch."""
    return {package: metadata.version(package) for package in ("onnx", "onnxscript", "onnx-ir")}


def export_onnx(program: Program, device: torch.device, file: Path) -> None:
    """Write a program as an ONNX model whose weights are inputs, after its own inputs.

    Args:
        program: any program.
        device: where its weights are.
        file: ends in ".onnx".

    Raises:
        RuntimeUnavailableError: an operator has no counterpart in ONNX.
    """
    import onnx
    import onnx_ir as ir

    module, weights = lift_weights(program)
    if twice := sorted(set(weights) & {value.name for value in program.inputs}):
        raise RuntimeUnavailableError(
            f"ONNX: {program.name}: an input and a weight are both named {twice[0]}; choose another runtime"
        )
    sizes = [*dynamic_shapes(program), *({} for _ in weights)]
    inputs = (*example_inputs(program, device), *weights.values())
    exported = export_module(module, inputs, {}, dynamic_shapes=tuple(sizes) if any(sizes) else None)
    check_free(program, exported)
    silence = contextlib.redirect_stdout(io.StringIO())
    with silence, quiet("torch.onnx", "onnxscript", "onnx_ir"):
        try:
            made = torch.onnx.export(
                exported,
                dynamo=True,
                verbose=False,
                input_names=[*(value.name for value in program.inputs), *weights],
                output_names=[value.name for value in program.outputs],
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise RuntimeUnavailableError(
                f"ONNX: {program.name} cannot be exported: {root_cause(error)}; choose runtime inductor or eager"
            ) from error
    assert made is not None
    describe_nodes(made.model)
    made.model.graph.name = program.name
    ir.save(made.model, file)
    try:
        onnx.checker.check_model(file, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise RuntimeUnavailableError(
            f"ONNX: {program.name} was exported wrongly: {reason_of(error)}; choose runtime inductor or eager"
        ) from error


def lift_weights(program: Program) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """A program's graph with its weights as further arguments, and these weights by name."""
    weights = program.weights
    graph = copy.deepcopy(program.module.graph)
    reads: dict[str, list[fx.Node]] = {}
    for node in graph.find_nodes(op="get_attr"):
        reads.setdefault(str(node.target), []).append(node)
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        arguments = [graph.placeholder(f"weight_{number}") for number in range(len(weights))]
    for name, argument in zip(weights, arguments, strict=True):
        for node in reads[name]:
            node.replace_all_uses_with(argument)
            graph.erase_node(node)
    return fx.GraphModule({}, graph), weights


def describe_nodes(model: Any) -> None:
    """Name nodes by their module's path in the original, and drop what the exporter tells of itself."""
    count: Counter[str] = Counter()
    for node in model.graph.all_nodes():
        scopes = [scope for scope in _scopes(node) if scope]
        path = "/".join([*scopes[-2:-1], node.op_type])
        count[path] += 1
        node.name = f"{path}_{count[path]}"
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.metadata_props.clear()
    model.metadata_props.clear()


def _scopes(node: Any) -> list[str]:
    """Names of the modules that a node lies in, from the outermost, and of the operator."""
    written = node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]")
    return [str(scope) for scope in ast.literal_eval(written)]


def link_weights(file: Path, weights: Path, prefix: str) -> None:
    """Make the weights of a model initializers whose data lie in a safetensors file in the same folder.

    The file is a header and then the tensors, little-endian and dense: what ONNX calls external data.

    Args:
        file: the model, whose weights are inputs, or initializers of another file.
        weights: the safetensors file.
        prefix: of a weight's name there.
    """
    import onnx

    with weights.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        entries = json.loads(stream.read(length))
    model = _with_inputs(onnx.load(file, load_external_data=False))
    for value in list(model.graph.input):
        if entry := entries.get(prefix + value.name):
            begin, end = entry["data_offsets"]
            place = {"location": weights.name, "offset": str(8 + length + begin), "length": str(end - begin)}
            model.graph.input.remove(value)
            model.graph.initializer.append(
                onnx.TensorProto(
                    name=value.name,
                    data_type=value.type.tensor_type.elem_type,
                    dims=entry["shape"],
                    data_location=onnx.TensorProto.EXTERNAL,
                    external_data=[onnx.StringStringEntryProto(key=key, value=text) for key, text in place.items()],
                )
            )
    onnx.save(model, file)


def runnable(file: Path) -> bytes:
    """A model with its weights as inputs again; the files that it names are not read."""
    import onnx

    return _with_inputs(onnx.load(file, load_external_data=False)).SerializeToString()  # type: ignore[no-any-return]


def _with_inputs(model: Any) -> Any:
    """Turn initializers with external data into inputs."""
    import onnx

    for tensor in list(model.graph.initializer):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
            model.graph.initializer.remove(tensor)
    return model
