"""Higher-order calls are gone after capture: regions are inlined, flexible attention is ordinary attention."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention, noop_mask

from recache_compile.capture.capture import capture
from recache_compile.errors import CaptureError
from recache_compile.ir.meta import block_of
from recache_compile.ir.program import Binding, Program
from recache_compile.passes.binding_times import binding_times

QUERY = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(0))
OFFSETS = torch.tensor([0, 1, 2, 3])


class Block(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Model(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(function)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)


def captured(function: Callable[[Tensor], Tensor]) -> Program:
    return capture(Model(function), {"x": QUERY}).program


def targets(program: Program) -> list[str]:
    return [str(node.target) for node in program.module.graph.nodes if node.op == "call_function"]


def assert_plain_and_same(function: Callable[[Tensor], Tensor]) -> Program:
    """No higher-order call is left, every call is of the block, and the result is right."""
    program = captured(function)
    assert all(target.startswith("aten.") for target in targets(program))
    calls = [node for node in program.module.graph.nodes if node.op == "call_function"]
    assert {block_of(node, ("blocks",)) for node in calls} == {"blocks.0"}
    torch.testing.assert_close(program.module(QUERY + 1)[0], function(QUERY + 1))
    return program


def in_no_grad(x: Tensor) -> Tensor:
    with torch.enable_grad():
        y = x * 2
        with torch.no_grad():
            return y + 1


def in_float32(x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return (x.float() * torch.arange(8.0)).sin()


def in_half(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return functional.linear(x, torch.eye(8))


@pytest.mark.parametrize("function", [in_no_grad, in_float32])
def test_regions_are_inlined(function: Callable[[Tensor], Tensor]) -> None:
    assert_plain_and_same(function)


def test_a_region_in_half_precision_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"capture of Model: .*torch.autocast to torch.bfloat16"):
        captured(in_half)


def block_mask(function: Any, heads: int | None = None) -> BlockMask:
    return create_block_mask(function, None, heads, 6, 6, device="cpu", BLOCK_SIZE=2)


MASKS = {
    "causal": (lambda b, h, q, k: q >= k, None),
    "by head": (lambda b, h, q, k: (q >= k) | (h == 0), 4),
    "of a tensor": (lambda b, h, q, k: k >= OFFSETS[h], 4),
    "rows without any": (lambda b, h, q, k: (q > 2) & (k >= q), None),
}


@pytest.mark.parametrize(("function", "heads"), MASKS.values(), ids=MASKS.keys())
def test_flexible_attention_becomes_attention_with_a_mask(function: Any, heads: int | None) -> None:
    program = assert_plain_and_same(lambda x: flex.flex_attention(x, x, x, block_mask=block_mask(function, heads)))
    (attention,) = [node for node in program.module.graph.nodes if "attention" in str(node.target)]
    mask = attention.args[3]
    assert mask.meta["val"].shape == (1, heads or 1, 6, 6)
    assert binding_times(program.module.graph)[mask] is Binding.NOTHING


def test_flexible_attention_that_masks_nothing_has_no_mask() -> None:
    program = assert_plain_and_same(lambda x: flex.flex_attention(x, x, x, block_mask=block_mask(noop_mask)))
    (attention,) = [node for node in program.module.graph.nodes if "attention" in str(node.target)]
    assert len(attention.args) == 3


def test_a_mask_that_is_made_of_the_latents() -> None:
    def attend(x: Tensor) -> Tensor:
        lengths = (x[0, :, 0, 0] > 0).int() + 3
        mask = block_mask(lambda b, h, q, k: k < lengths[h], 4)
        return flex.flex_attention(x, x, x, block_mask=mask)

    assert_plain_and_same(attend)


def test_fewer_heads_of_keys_and_another_scale() -> None:
    assert_plain_and_same(lambda x: flex.flex_attention(x, x[:, :2], x[:, :2], scale=0.5, enable_gqa=True))


REFUSED = {
    "score_mod": lambda x: flex.flex_attention(x, x, x, score_mod=lambda score, b, h, q, k: score + q - k),
    "return_lse": lambda x: torch.cat([each.flatten() for each in flex.flex_attention(x, x, x, return_lse=True)]),
}


@pytest.mark.parametrize("function", REFUSED.values(), ids=REFUSED.keys())
def test_what_ordinary_attention_cannot_do_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(CaptureError, match=r"capture of Model: .*flex_attention with a score_mod or more results"):
        captured(function)


def test_other_higher_order_operators_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"capture of Model: .*operator flex_attention"):
        captured(lambda x: flex_attention(x, x, x))  # bound before it could be replaced
