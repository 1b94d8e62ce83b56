"""Engines whose sizes are free: right at sizes that were never seen, refused where the model's code decides otherwise."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, WanTransformer3DModel
from torch import Tensor, nn

import recache_compile as rc
from recache_compile.artifact.manifest import MANIFEST, signed
from recache_compile.errors import ArtifactError, MismatchError
from recache_compile.ir.program import REQUESTS
from recache_compile.runtimes.dispatcher import MAX_SIZES
from tests.compiler.test_build import relative_error
from tests.conftest import Doubled, flux_inputs, tiny_flux

STEPS, BUDGET = 4, 2
SEEN = ((4, 4, 6), (3, 6, 9))
"""Height and width in patches, and text tokens, that engines are built from."""

OTHERS = ((4, 4, 6), (5, 2, 13), (2, 2, 3), (7, 5, 6))
"""At which they are tried."""


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def flux_call(height: int, width: int, text: int, batch: int = 1) -> dict[str, Any]:
    rows, columns = torch.meshgrid(torch.arange(height) * 1.0, torch.arange(width) * 1.0, indexing="ij")
    return flux_inputs(batch=batch) | {
        "hidden_states": drawn(batch, height * width, 8),
        "encoder_hidden_states": drawn(batch, text, 24),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3),
        "txt_ids": torch.zeros(text, 3),
    }


def tiny_wan() -> nn.Module:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=2,
    ).eval()  # fmt: skip


def wan_call(height: int, width: int, text: int) -> dict[str, Any]:
    return {
        "hidden_states": drawn(1, 4, 2, 2 * height, 2 * width),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": drawn(1, text, 16),
    }


def tiny_sd3() -> nn.Module:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=12, out_channels=4, pos_embed_max_size=8,
    ).eval()  # fmt: skip


def sd3_call(height: int, width: int, text: int) -> dict[str, Any]:
    return {
        "hidden_states": drawn(1, 4, 2 * height, 2 * width),
        "encoder_hidden_states": drawn(1, text, 16),
        "pooled_projections": drawn(1, 12),
        "timestep": torch.tensor([0.5]),
    }


MODELS = {"flux": (tiny_flux, flux_call), "wan": (tiny_wan, wan_call), "sd3": (tiny_sd3, sd3_call)}


def compile_free(module: nn.Module, calls: list[dict[str, Any]], **options: Any) -> rc.Compiled:
    given = {"budgets": (BUDGET, STEPS), "num_steps": STEPS, "policy": "uniform", "runtime": "eager"} | options
    return rc.compile(module, calls, **given)


def first(result: Any) -> Tensor:
    """The prediction."""
    return result if isinstance(result, Tensor) else result[0]  # type: ignore[no-any-return]


def error_of(compiled: rc.Compiled, module: nn.Module, call: Mapping[str, Any]) -> float:
    """Largest error over a generation that recomputes every step."""
    run, errors = compiled.dispatcher(STEPS), []
    plain = {"return_dict": False} if hasattr(module, "config") else {}
    for step in range(STEPS):
        inputs = {**call, "timestep": call["timestep"] * (STEPS - step) / STEPS}
        errors.append(relative_error(first(run(step=step, **inputs)), first(module(**inputs, **plain))))
    return max(errors)


@pytest.mark.parametrize(
    ("runtime", "tolerance"),
    [
        ("eager", 1e-5),
        pytest.param("inductor", 1e-5, marks=pytest.mark.slow),
        pytest.param("onnxruntime", 1e-5, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_one_set_of_engines_serves_sizes_that_were_never_seen(
    name: str, runtime: str, tolerance: float, tmp_path: Path
) -> None:
    make, call = MODELS[name]
    module = make()
    compiled = compile_free(module, [call(*each) for each in SEEN], runtime=runtime)
    compiled.save(tmp_path / "artifact")
    loaded = rc.load(tmp_path / "artifact")
    for engines in (compiled, loaded):
        (variant,) = engines.variants
        assert variant.programs["forecast"].serves_gaps
        assert not variant.programs["recompute"].weights.keys() & variant.programs["prologue"].weights.keys()
        for sizes in OTHERS:
            assert error_of(engines, module, call(*sizes)) <= tolerance


def test_a_cached_step_at_another_size_is_what_engines_for_that_size_alone_make() -> None:
    module = tiny_flux()
    free, fixed = compile_free(module, [flux_call(*each) for each in SEEN]), compile_free(module, [flux_call(5, 2, 13)])
    runs = [compiled.dispatcher(BUDGET) for compiled in (free, fixed)]
    for step in range(STEPS):
        inputs = flux_call(5, 2, 13) | {"timestep": torch.tensor([1 - step / STEPS])}
        ours, theirs = (run(step=step, **inputs)[0] for run in runs)
        assert relative_error(ours, theirs) <= 1e-5


def test_a_batch_is_free_from_two_on_and_one_is_a_kind_of_its_own() -> None:
    module = tiny_flux()
    calls = [flux_call(*sizes, batch=batch) for sizes, batch in zip(SEEN * 2, (1, 1, 2, 3), strict=True)]
    compiled = compile_free(module, calls)
    assert len(compiled.variants) == 2
    for batch in (1, 2, 3, 5):
        assert error_of(compiled, module, flux_call(5, 2, 4, batch=batch)) <= 1e-5


def test_sizes_that_do_not_go_together_are_refused_and_say_why() -> None:
    compiled = compile_free(tiny_flux(), [flux_call(*each) for each in SEEN])
    call = flux_call(4, 4, 6) | {"img_ids": torch.zeros(17, 3)}
    with pytest.raises(
        MismatchError, match=r"img_ids is float32\[17, 3\], compiled float32\[16..18, 3\]; .*does not hold"
    ):
        compiled.dispatcher(STEPS)(step=0, **call)
    with pytest.raises(MismatchError, match=r"float32.1, 16, 9., compiled float32.1, 16..18, 8."):
        compiled.dispatcher(STEPS)(step=0, **(flux_call(4, 4, 6) | {"hidden_states": drawn(1, 16, 9)}))


def test_what_the_model_s_code_allows_is_part_of_it() -> None:
    module = tiny_sd3()
    compiled = compile_free(module, [sd3_call(*each) for each in SEEN])
    assert error_of(compiled, module, sd3_call(7, 6, 5)) <= 1e-5
    with pytest.raises(MismatchError, match=r"hidden_states.shape.2.//2.* <= 8 does not hold"):
        compiled.dispatcher(STEPS)(step=0, **sd3_call(9, 4, 5))


class Branching(Doubled):
    """Its code knows a size."""

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        if hidden_states.shape[1] == 6:
            hidden_states = hidden_states * 2
        for layer in self.layers:
            hidden_states = layer(hidden_states) * timestep
        return hidden_states


class Fixing(Doubled):
    """Its code fixes a size."""

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        hidden_states = hidden_states + torch.ones(1, 3 if hidden_states.shape[1] == 3 else 5, 4)
        for layer in self.layers:
            hidden_states = layer(hidden_states) * timestep
        return hidden_states


def tokens(number: int) -> dict[str, Tensor]:
    return {"hidden_states": drawn(1, number, 4), "timestep": torch.ones(1)}


def test_a_branch_of_the_model_is_not_taken_for_another_size() -> None:
    module = Branching()
    compiled = compile_free(module, [tokens(4), tokens(6), tokens(5)])
    assert len(compiled.variants) == 2
    for number in (4, 5, 6, 9):
        assert error_of(compiled, module, tokens(number)) <= 1e-6


def test_a_size_that_the_code_fixes_gets_engines_of_its_own_and_the_line_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = Fixing()
    with caplog.at_level(logging.INFO, "recache_compile"):
        compiled = compile_free(module, [tokens(3), tokens(5)])
    assert len(compiled.variants) == 2
    assert "stays fixed by test_free_sizes.py" in caplog.text
    assert "torch.ones(1, 3 if" in caplog.text
    for number in (3, 5):
        assert error_of(compiled, module, tokens(number)) <= 1e-6
    with pytest.raises(MismatchError, match="compile for them too"):
        compiled.dispatcher(STEPS)(step=0, **tokens(4))


def test_sizes_are_fixed_where_it_is_asked() -> None:
    compiled = compile_free(tiny_flux(), [flux_call(*each) for each in SEEN], fixed_sizes=True)
    assert [variant.has_free_sizes for variant in compiled.variants] == [False, False]


def test_a_branch_holds_tables_for_a_few_sizes_only() -> None:
    compiled = compile_free(Doubled(), [tokens(4), tokens(6)])
    run = compiled.dispatcher(STEPS)
    for number in range(3, 13):
        run.reset()
        for step in range(STEPS):
            run(step=step, **tokens(number))
    assert len(run._states) == MAX_SIZES


def test_requests_of_equal_sizes_share_a_call_and_others_do_not_wait_for_them() -> None:
    module = tiny_wan()
    compiled = compile_free(module, [wan_call(*each) for each in SEEN], batching=True)
    shared, found = compiled.batcher(max_wait_ms=1000), {}

    def generate(number: int, sizes: tuple[int, int, int]) -> None:
        with torch.no_grad():
            found[number] = error_of(shared, module, wan_call(*sizes))

    threads = [Thread(target=generate, args=(number, OTHERS[number % 2 + 1])) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [0, 1, 2, 3]
    assert max(found.values()) <= 1e-5
    assert REQUESTS in compiled.variants[0].programs


def test_an_artifact_tells_its_ranges_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    compile_free(tiny_flux(), [flux_call(*each) for each in SEEN]).save(tmp_path / "artifact")
    facts = rc.inspect(tmp_path / "artifact")
    assert facts.calls[0]["hidden_states"] == "[1, 16..18, 8]"
    assert facts.calls[0]["encoder_hidden_states"] == "[1, 6..9, 24]"
    file = tmp_path / "artifact" / MANIFEST
    for condition in ("__import__('os').abort()", "s87 < 0"):
        text = json.loads(file.read_text())
        text["variants"][0]["conditions"] = [condition]
        file.write_text(signed(text))
        with pytest.raises(ArtifactError, match=r"compile again|no term"):
            rc.load(tmp_path / "artifact")


class Small(Doubled):
    """Two layers after something that sizes matter to."""

    def before(self, hidden_states: Tensor, size: int) -> Tensor:
        return hidden_states

    def forward(self, hidden_states: Tensor, timestep: Tensor, index: int = 0) -> Tensor:
        hidden_states = self.before(hidden_states, hidden_states.shape[1])
        for layer in self.layers:
            hidden_states = layer(hidden_states) * timestep
        return hidden_states if index < 3 else -hidden_states


class Reading(Small):
    """Its code makes what export cannot follow with a free size, and decides by the size."""

    def before(self, hidden_states: Tensor, size: int) -> Tensor:
        hidden_states = hidden_states + torch.zeros(len([0] * size))[None, :, None]
        return hidden_states * 2 if size < 7 else hidden_states


class Pooling(Small):
    """A size that follows from another one is 1 for some, and the code looks at that."""

    def before(self, hidden_states: Tensor, size: int) -> Tensor:
        pooled = nn.functional.avg_pool1d(hidden_states.transpose(1, 2), 4).transpose(1, 2).squeeze(1)
        return hidden_states * (1.0 if pooled.dim() == 2 else 2.0)


class Counting(Small):
    """`int` is a type for it."""

    def before(self, hidden_states: Tensor, size: int) -> Tensor:
        return hidden_states + torch.zeros(int(size), dtype=int)[None, :, None]  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Reading, Pooling, Counting])
def test_no_size_gets_the_result_of_another(kind: type[Small]) -> None:
    module = kind()
    compiled = compile_free(module, [tokens(5), tokens(7)])
    compile_free(module, [tokens(5)], fixed_sizes=True)
    for number in (5, 7, 8, 9, 13):
        try:
            error = error_of(compiled, module, tokens(number))
        except MismatchError:
            assert number not in (5, 7)
        else:
            assert error <= 1e-6


def test_a_failed_export_leaves_no_mark_on_the_caller_s_tensors() -> None:
    calls = [tokens(5), tokens(7)]
    compile_free(Reading(), calls)
    assert not [name for call in calls for leaf in call.values() for name in vars(leaf)]
    assert not compile_free(Counting(), calls, fixed_sizes=True).variants[0].has_free_sizes


def test_numbers_that_the_code_decides_by_tell_kinds_of_calls_apart() -> None:
    module = Small()
    calls = [tokens(number) | {"index": index} for index in (2, 3) for number in (5, 7)]
    compiled = compile_free(module, calls)
    assert len(compiled.variants) == 2
    for call in (*calls, tokens(9) | {"index": 3}):
        assert error_of(compiled, module, call) <= 1e-6


def test_the_order_of_examples_does_not_matter() -> None:
    compiled = compile_free(Branching(), [tokens(6), tokens(4), tokens(5)])
    assert [variant.has_free_sizes for variant in compiled.variants] == [False, True]


def test_nothing_of_torch_s_log_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    compile_free(tiny_flux(), [flux_call(*each) for each in SEEN])
    assert not capfd.readouterr().err


class Masked(Doubled):
    """Attention with a mask, which cannot be mapped over requests where its size is free."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            query = layer(hidden_states)[:, None] * timestep
            hidden_states = nn.functional.scaled_dot_product_attention(query, query, query, mask[:, None, None])[:, 0]
        return hidden_states


def test_a_mapping_that_fails_leaves_torch_as_it_was() -> None:
    calls = [tokens(number) | {"mask": torch.ones(1, number, dtype=torch.bool)} for number in (5, 7)]
    module = Masked()
    compiled = compile_free(module, calls, batching=True)
    assert torch.randn(2).shape == (2,)
    for call in calls:
        assert error_of(compiled, module, call) <= 1e-6
