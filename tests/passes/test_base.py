from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import fx

from recache_compile.errors import PassError
from recache_compile.ir.meta import by_origin, result_of, tensor_of
from recache_compile.ir.program import PassRecord, Program
from recache_compile.ir.serialize import program_from_json, program_to_json
from recache_compile.passes.base import Pass, call, copy_module, run_passes, with_values
from recache_compile.passes.hoist import Hoist
from recache_compile.passes.insert_cache_points import InsertCachePoints
from recache_compile.passes.specialise import Specialise
from tests.passes.tiny import Attention, Plain, aten, captured, example, show
from tests.passes.tiny import call as run


@dataclass(frozen=True, slots=True)
class Negate(Pass):
    """Negates the first result."""

    name: ClassVar[str] = "negate"

    def rewrite(self, module: fx.GraphModule) -> bool:
        output = module.graph.output_node()
        with module.graph.inserting_before(output):
            output.args = ([call(module.graph, aten.neg.default, output.args[0][0])],)
        return True


@dataclass(frozen=True, slots=True)
class Nothing(Pass):
    """Does nothing, after `negate`."""

    name: ClassVar[str] = "nothing"
    requires: ClassVar[tuple[str, ...]] = ("negate", "rest")

    def rewrite(self, module: fx.GraphModule) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class Refuse(Pass):
    """Cannot do it."""

    name: ClassVar[str] = "refuse"

    def rewrite(self, module: fx.GraphModule) -> bool:
        raise PassError("node add has no friend")


@dataclass(frozen=True, slots=True)
class AddResult(Pass):
    """Forgets to describe a result."""

    name: ClassVar[str] = "add-result"

    def rewrite(self, module: fx.GraphModule) -> bool:
        output = module.graph.output_node()
        output.args = (output.args[0] * 2,)
        return True


@dataclass(frozen=True, slots=True)
class RepeatInput(Pass):
    """Adds an input under a name that is taken."""

    name: ClassVar[str] = "repeat-input"

    def rewrite(self, module: fx.GraphModule) -> bool:
        first = module.graph.find_nodes(op="placeholder")[0]
        with module.graph.inserting_after(first):
            module.graph.placeholder("other").meta.update(first.meta)
        return True


@dataclass(frozen=True, slots=True)
class Misplace(Pass):
    """Leaves a graph that reads a value before it is made."""

    name: ClassVar[str] = "misplace"

    def rewrite(self, module: fx.GraphModule) -> bool:
        *_, last, _ = module.graph.nodes
        next(iter(module.graph.nodes)).prepend(last)
        return True


@pytest.fixture(scope="module")
def program() -> Program:
    return captured(Plain())[0]


def test_a_pass_rewrites_a_copy(program: Program) -> None:
    before = show(program)
    result = Negate()(program)
    assert result.modified
    assert show(program) == before
    inputs = example(Plain())
    assert torch.equal(run(result.program, inputs)["prediction_0"], -run(program, inputs)["prediction_0"])


def test_a_pass_shares_the_weights(program: Program) -> None:
    weights = Negate()(program).program.weights
    assert list(weights) == ["blocks.0.linear.weight", "out.weight"]
    assert all(weight is program.weights[name] for name, weight in weights.items())


def test_a_pass_is_recorded_and_its_answer_passed_on(program: Program) -> None:
    result = Nothing()(replace(program, provenance=(PassRecord("negate"), PassRecord("rest", "level=3"))))
    assert result.modified is False
    assert list(map(str, result.program.provenance)) == ["negate", "rest(level=3)", "nothing"]


def test_passes_run_in_order(program: Program) -> None:
    ready = replace(program, provenance=(PassRecord("rest"),))
    made = run_passes(ready, iter((Negate(), Nothing(), Negate())))
    assert [record.name for record in made.provenance] == ["rest", "negate", "nothing", "negate"]
    assert run_passes(program, ()) is program


def test_missing_passes_are_named(program: Program) -> None:
    with pytest.raises(PassError, match=r"^pass nothing on capture: needs negate, rest to run first$"):
        Nothing()(program)
    with pytest.raises(PassError, match="needs rest to run first"):
        run_passes(program, (Negate(), Nothing()))


def test_an_error_names_the_pass_the_program_and_the_passes_before(program: Program) -> None:
    message = r"^pass refuse on capture: node add has no friend \(passes before: capture, negate\)$"
    with pytest.raises(PassError, match=message):
        run_passes(program, (Negate(), Refuse()))
    with pytest.raises(PassError, match="passes before: none"):
        Refuse()(replace(program, provenance=()))


def test_results_without_a_description_are_refused(program: Program) -> None:
    with pytest.raises(PassError, match="pass add-result on capture: 1 values describe 2 results"):
        AddResult()(program)


def test_inputs_of_one_name_are_refused(program: Program) -> None:
    with pytest.raises(PassError, match="pass repeat-input on capture: two inputs share a name"):
        RepeatInput()(program)


def test_an_invalid_graph_is_caught(program: Program) -> None:
    with pytest.raises(RuntimeError, match="used before it has been defined"):
        Misplace()(program)


def test_a_copied_module_has_its_own_graph(program: Program) -> None:
    copied = copy_module(program.module)
    copied.graph.output_node().args = ([],)
    assert program.module.graph.output_node().args != ([],)
    assert copied.get_buffer("out.weight").data_ptr() == program.module.get_buffer("out.weight").data_ptr()


def test_an_inserted_call_knows_its_value(program: Program) -> None:
    graph = copy_module(program.module).graph
    output = graph.output_node()
    with graph.inserting_before(output):
        node = call(graph, aten.to.dtype, output.args[0][0], torch.bfloat16, name="narrow")
    assert node.name == "narrow"
    assert (tensor_of(node).shape, tensor_of(node).dtype) == (torch.Size([1, 3, 4]), torch.bfloat16)


def test_values_are_found_again_where_an_artifact_does_not_keep_them() -> None:
    program = captured(Attention())[0]
    assert with_values(program, ()) is program
    device = torch.device("cpu")
    restored = program_from_json(program_to_json(program), program.weights, device)
    again = with_values(restored, tuple(example(Attention()).values()))
    assert result_of(next(iter(restored.module.graph.nodes))) is None
    for node, same in zip(again.module.graph.nodes, program.module.graph.nodes, strict=True):
        if isinstance(facts := result_of(same), torch.Tensor):
            assert (tensor_of(node).dtype, tensor_of(node).shape) == (facts.dtype, facts.shape)
            assert tensor_of(node).stride() == facts.stride()


@dataclass(frozen=True, slots=True)
class Pretend(AddResult):
    """Says that it did nothing."""

    name: ClassVar[str] = "pretend"

    def rewrite(self, module: fx.GraphModule) -> bool:
        AddResult.rewrite(self, module)
        return False


def test_a_graph_that_did_not_change_is_not_checked_again(program: Program) -> None:
    result = Pretend()(program)
    assert (result.modified, str(result.program.provenance[-1])) == (False, "pretend")


def test_passes_in_order_share_one_copy(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []

    def counting(module: fx.GraphModule) -> fx.GraphModule:
        copies.append(module)
        return copy_module(module)

    monkeypatch.setattr("recache_compile.passes.base.copy_module", counting)
    before = show(program)
    twice = run_passes(program, (Negate(), Negate()))
    assert copies == [program.module]
    assert show(program) == before
    inputs = example(Plain())
    assert torch.equal(run(twice, inputs)["prediction_0"], run(program, inputs)["prediction_0"])


def test_what_a_pass_did_is_logged(program: Program, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", "recache_compile.passes.base"):
        run_passes(replace(program, provenance=(PassRecord("rest"),)), (Negate(), Nothing()))
    size = len(program.module.graph.nodes)
    assert [record.message for record in caplog.records] == [
        f"pass negate on capture: {size} nodes become {size + 1}",
        "pass nothing on capture: changes nothing",
    ]


def test_options_are_recorded(program: Program) -> None:
    made = run_passes(program, (InsertCachePoints(()), Specialise(()), Hoist(1024)))
    assert [str(record) for record in made.provenance[2:]] == ["specialise(pattern=())", "hoist(row_bytes=1024)"]


def test_new_nodes_are_numbered_and_old_ones_keep_their_number(program: Program) -> None:
    before = by_origin(program.module.graph)
    after = by_origin(Negate()(program).program.module.graph)
    assert len(before) == len(program.module.graph.nodes)
    assert {origin: node.name for origin, node in before.items()}.items() <= {
        origin: node.name for origin, node in after.items()
    }.items()
    assert [node.name for origin, node in after.items() if origin not in before] == ["neg_default"]
