"""Programs survive JSON, and JSON cannot name what a program may not call."""

import json

import pytest
import torch

import recache_compile as rc
from recache_compile.errors import ArtifactError
from recache_compile.ir.meta import module_paths
from recache_compile.ir.program import Program
from recache_compile.ir.serialize import program_from_json, program_to_json

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["prologue", "recompute", "forecast"])
def test_round_trip_runs_the_same(name: str, eager: rc.Compiled) -> None:
    program = eager.variants[0].programs[name]
    again = program_from_json(program_to_json(program), dict(eager.weights), CPU)
    assert (again.inputs, again.outputs, again.provenance) == (program.inputs, program.outputs, program.provenance)
    inputs = [torch.rand([3 if size is None else size for size in value.shape]) for value in program.inputs]
    assert all(map(torch.equal, again.module(*inputs), program.module(*inputs)))


@pytest.mark.parametrize("name", ["prologue", "recompute", "forecast"])
def test_a_program_that_was_read_is_written_as_before(name: str, eager: rc.Compiled) -> None:
    text = program_to_json(eager.variants[0].programs[name])
    assert program_to_json(program_from_json(text, dict(eager.weights), CPU)) == text


def test_nodes_that_were_read_know_their_module(eager: rc.Compiled) -> None:
    """The innermost one: engines of programs from the disk are named as those of the model."""
    made = eager.variants[0].programs["recompute"]
    again = program_from_json(program_to_json(made), dict(eager.weights), CPU)
    calls = [[node for node in each.module.graph.nodes if node.op == "call_function"] for each in (made, again)]
    paths = [[module_paths(node)[-1:] for node in nodes] for nodes in calls]
    assert paths[0] == paths[1]
    assert ("single_transformer_blocks.2.attn",) in paths[1]


def minimal(call: str, args: list[object]) -> str:
    value = {"name": "x", "kind": "latents", "shape": [2], "dtype": "float32"}
    node = {"node": "y", "type": "", "call": call, "args": args, "kwargs": {}}
    return json.dumps(
        {"name": "p", "provenance": [], "inputs": [{"node": "x", **value}], "nodes": [node], "results": [{"node": "y"}],
         "outputs": [{**value, "kind": "prediction"}]}
    )  # fmt: skip


def test_a_minimal_program_runs() -> None:
    program = program_from_json(minimal("aten::add.Tensor", [{"node": "x"}, {"float": "inf"}]), {}, CPU)
    assert isinstance(program, Program)
    assert torch.isinf(program.module(torch.zeros(2))[0]).all()


@pytest.mark.parametrize(
    "call",
    [
        "os::system",
        "operator::call",
        "operator::attrgetter",
        "builtins::eval",
        "aten::nothing",
        "aten::from_file",
        "aten::name.upper",
        "prims::x",
        "",
    ],
)
def test_other_functions_are_refused(call: str) -> None:
    with pytest.raises(ArtifactError, match="not a program"):
        program_from_json(minimal(call, [{"node": "x"}]), {}, CPU)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", minimal("aten::neg", [{"node": "z"}])])
def test_text_that_is_no_program_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="not a program"):
        program_from_json(text, {}, CPU)
