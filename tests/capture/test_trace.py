"""Tracing: what the model's code reads, constants of the conditioning, and what has no remedy."""

from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor, nn

from recache_compile.capture.trace import Trace, inputs_read, trace_module
from recache_compile.errors import CaptureError

HIDDEN = torch.randn(1, 4, 2, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[True, False, True, True]])


class Model(nn.Module):
    """A `forward` given as a function of (hidden_states, mask)."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Any:
        return self.function(hidden_states, mask)


def trace(function: Any, mask: Tensor = MASK) -> Trace:
    return trace_module(Model(function).eval(), {"hidden_states": HIDDEN, "mask": mask}, ["hidden_states"])


def assert_same(function: Any, mask: Tensor = MASK) -> Trace:
    """The trace computes what the function computes, for latents that it was not made with too."""
    traced = trace(function, mask)
    for hidden in (HIDDEN, HIDDEN + 1):
        result = traced.exported.module()(hidden_states=hidden, mask=None if "mask" in traced.constants else mask)
        torch.testing.assert_close(result, function(hidden, mask))
    return traced


READS = {
    "truth": lambda x, mask: x + 1 if mask.all() else x,
    "number": lambda x, mask: x[:, : mask.sum().item()],
    "list": lambda x, mask: x * torch.tensor(mask.tolist())[..., None],
    "array": lambda x, mask: x * float(mask.numpy().sum()),
    "boolean gather": lambda x, mask: x[mask],
    "positions": lambda x, mask: x[:, mask[0].nonzero()[:, 0]],
    "repetition": lambda x, mask: x.repeat_interleave(mask[0].long() + 1, dim=1),
    "written through a view": lambda x, mask: x[:, : int(_written(mask).sum())],
}


def _written(mask: Tensor) -> Tensor:
    counts = torch.zeros(1, 6, dtype=torch.int64)
    counts[:, 1:5] = mask
    return counts.view(2, 3)[0]


@pytest.mark.parametrize("function", READS.values(), ids=READS.keys())
def test_inputs_that_the_code_reads_are_named_and_become_constants(function: Any) -> None:
    tensors = {"hidden_states": HIDDEN, "mask": MASK}
    assert inputs_read(lambda: function(HIDDEN, MASK), tensors) == {"mask"}
    traced = assert_same(function)
    assert torch.equal(traced.constants["mask"], MASK)


UNREAD = {
    "arithmetic": lambda x, mask: x * mask[..., None],
    "masked fill": lambda x, mask: x.masked_fill(~mask[..., None], 0.0),
    "write of one number": lambda x, mask: x.clone().index_put_((mask,), torch.tensor(0.0)),
    "write to a mask": lambda x, mask: x.clone().index_put((mask,), x[0, :3]),
    "indices": lambda x, mask: x[:, mask[0].long()],
    "length": lambda x, mask: x * len(mask),
}


@pytest.mark.parametrize("function", UNREAD.values(), ids=UNREAD.keys())
def test_what_only_computes_stays_an_input(function: Any) -> None:
    assert inputs_read(lambda: function(HIDDEN, MASK), {"hidden_states": HIDDEN, "mask": MASK}) == set()
    assert assert_same(function).constants == {}


def test_a_weight_seen_in_the_shape_of_an_input_is_no_input() -> None:
    weight = torch.ones(1)

    def function(x: Tensor) -> Tensor:
        return x * weight.expand_as(x) if weight.item() else x

    assert inputs_read(lambda: (function(HIDDEN), function(HIDDEN)), {"hidden_states": HIDDEN}) == set()


def _loop_over_experts(x: Tensor, mask: Tensor) -> Tensor:
    counts = torch.full((2,), x.shape[1] // 2, dtype=torch.long)
    return torch.cat([part * number for number, part in enumerate(x.split(counts.tolist(), dim=1))], dim=1)


def _valid_first(x: Tensor, mask: Tensor) -> Tensor:
    padding = torch.zeros(1, 2, dtype=mask.dtype)
    valid = torch.cat([mask, padding], dim=1).bool()
    tokens = torch.cat([x, x[:, :2]], dim=1)
    return torch.stack([torch.cat([row[here], row[~here]]) for row, here in zip(tokens, valid, strict=True)])


def _filled(x: Tensor, mask: Tensor) -> Tensor:
    counts = torch.where(mask, 2, 1)[0]
    wide = mask[0].repeat_interleave(counts)
    ids = torch.full_like(wide, -1, dtype=torch.long)
    ids[wide.nonzero(as_tuple=True)[0]] = torch.tensor([0, 0, 1, 1, 2, 2])
    joint = x.new_zeros(1, len(ids), 2)
    joint[:, wide] = torch.cat([x, x[:, :2]], dim=1)
    allowed = torch.ones(len(ids), dtype=torch.bool)
    allowed[: int((ids < 1).sum())] = x[0, :, 0].sum() > -100
    return joint * allowed[:, None]


@pytest.mark.parametrize("function", [_loop_over_experts, _valid_first, _filled])
def test_code_may_make_sizes_of_what_depends_on_constants_alone(function: Any) -> None:
    assert_same(function)


@pytest.mark.parametrize(
    "function", [lambda x, mask: x if x.sum() > 0 else -x, lambda x, mask: x[mask & (x[..., 0] > 0)]]
)
def test_code_that_decides_by_the_latents_is_refused(function: Any) -> None:
    with pytest.raises(CaptureError, match="decides by values computed from hidden_states, which change from step"):
        trace(function)


def test_an_error_of_the_model_is_reported_as_it_is() -> None:
    def broken(x: Tensor, mask: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            raise RuntimeError("not while exporting")
        return x

    with pytest.raises(
        CaptureError, match=r"capture of Model: torch.export failed: RuntimeError: not while exporting$"
    ):
        trace(broken)


class Rotary(nn.Module):
    """Fills its table when it is first called."""

    table: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(hidden_states.shape[1]).cos()
        return hidden_states * self.table[:, None]


def test_a_table_that_is_filled_lazily_holds_no_tracer() -> None:
    model = Rotary().train()
    traced = trace_module(model, {"hidden_states": HIDDEN}, ["hidden_states"])
    assert type(model.table) is Tensor
    assert model.training
    torch.testing.assert_close(traced.exported.module()(hidden_states=HIDDEN), model(HIDDEN))


class Cache:
    """Keys of the blocks, as pipelines pass them."""

    def __init__(self, *keys: Tensor) -> None:
        self.layers = [Layer(key) for key in keys]
        self.mode = "read"


class Layer:
    def __init__(self, key: Tensor) -> None:
        self.key = key


class Cached(nn.Module):
    def forward(self, hidden_states: Tensor, cache: Cache) -> Tensor:
        for layer in cache.layers:
            hidden_states = hidden_states + layer.key
            if cache.mode == "write":
                layer.key = hidden_states
        return hidden_states


def test_tensors_of_objects_are_inputs() -> None:
    cache, other = Cache(torch.ones(2), torch.ones(2)), Cache(torch.zeros(2), torch.ones(2))
    traced = trace_module(Cached(), {"hidden_states": HIDDEN, "cache": cache}, ["hidden_states"])
    torch.testing.assert_close(traced.exported.module()(hidden_states=HIDDEN, cache=other), HIDDEN + 1)


def test_writes_to_objects_are_refused() -> None:
    cache = Cache(torch.ones(2))
    cache.mode = "write"
    with pytest.raises(CaptureError, match="it writes to an object among its arguments"):
        trace_module(Cached(), {"hidden_states": HIDDEN, "cache": cache}, ["hidden_states"])
    assert torch.equal(cache.layers[0].key, torch.ones(2))


def test_parts_that_are_compiled_already_are_seen_through() -> None:
    part = torch.compile(lambda x, mask: x[:, : int(mask.sum())], fullgraph=True)
    assert set(trace(lambda x, mask: part(x, mask)).constants) == {"mask"}


def test_cogvideox_is_traced_at_sizes_that_are_not_its_usual_ones() -> None:
    """It then makes its table of positions anew, through `tensor.data`."""
    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8,
        num_layers=1, sample_width=8, sample_height=8, sample_frames=9, max_text_seq_length=8,
    ).eval()  # fmt: skip
    hidden, text = torch.randn(1, 2, 4, 4, 12), torch.randn(1, 8, 8)
    inputs = {"hidden_states": hidden, "encoder_hidden_states": text, "timestep": torch.ones(1), "return_dict": False}
    traced = trace_module(model, inputs, ["hidden_states", "timestep"])
    other = {**inputs, "hidden_states": hidden + 1}
    torch.testing.assert_close(traced.exported.module()(**other), model(**other))
