"""Sizes that are free: terms are read back as torch wrote them, and shapes tell what symbols are."""

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from recache_compile.errors import ArtifactError
from recache_compile.ir.sizes import bytes_of, sizes_in, texts_of, value_of_term, within
from recache_compile.ir.value import Kind, Value, unmet

SIZES = {"s0": 6, "s1": 4}


@pytest.mark.parametrize(
    ("term", "value"),
    [
        ("s0", 6),
        ("2*((s0//2))*((s1//2))", 12),
        ("s0 - s1 + 1", 3),
        ("Max(1, s0) + Min(s1, 2)", 8),
        ("-s1 + 3", -1),
        ("Eq(Mod(s0, 4), 0)", 0),
        ("Ne(s0, s1)", 1),
        ("(s0 >= 2) & (s0 <= 16)", 1),
        ("(s0 >= 7) | (s0 <= 5)", 0),
        ("~(s0 < 7)", 0),
    ],
)
def test_terms_are_read_as_they_were_written(term: str, value: int) -> None:
    assert value_of_term(term, SIZES) == value


@given(st.integers(2, 50), st.integers(2, 50), st.integers(1, 7), st.integers(1, 7))
def test_a_term_of_sympy_is_what_sympy_says(first: int, second: int, factor: int, divisor: int) -> None:
    from torch.utils._sympy.functions import FloorDiv, Mod

    s0, s1 = sympy.symbols("s0 s1", integer=True, positive=True)
    for term in (factor * s0 + s1, FloorDiv(s0 * s1, divisor) - factor, Mod(s0, divisor) + sympy.Max(s1, factor)):
        assert value_of_term(str(term), {"s0": first, "s1": second}) == int(term.subs({s0: first, s1: second}))


@pytest.mark.parametrize(
    "term", ["__import__('os')", "s0.real", "[s0]", "s2", "s0 +", "s0 / 2", "(lambda: 1)()", "s0//0", "'a'"]
)
def test_anything_else_is_refused(term: str) -> None:
    with pytest.raises(ArtifactError, match="is no term of s0, s1"):
        value_of_term(term, SIZES)


def test_shapes_tell_the_sizes_or_do_not_fit() -> None:
    described = [((1, 6), ("", "s0"), (1, 9)), ((None, 12), ("", "2*s0"), (3, 18)), ((4,), (), (4,))]
    assert sizes_in(described) == {"s0": 9}
    for at, shape in ((0, (2, 9)), (1, (3, 17)), (2, (5,)), (0, (1, 9, 1))):
        wrong = [
            (expected, terms, shape if at == number else given)
            for number, (expected, terms, given) in enumerate(described)
        ]
        assert sizes_in(wrong) is None


def test_a_value_is_described_from_a_tensor_with_free_sizes() -> None:
    class Twice(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, x], 1)

    exported = torch.export.export(Twice(), (torch.zeros(1, 6, 3),), dynamic_shapes=({1: torch.export.Dim.AUTO},))
    given, *_, made = (node.meta["val"] for node in exported.graph.nodes if node.op != "output")
    value, result = Value.like(given, "x", Kind.LATENTS), Value.like(made, "y", Kind.PREDICTION)
    (symbol,) = [term for term in value.free if term]
    assert (value.shape, value.free) == ((1, 6, 3), ("", symbol, ""))
    assert (result.shape, texts_of(made.shape)) == ((1, 12, 3), ("", f"2*{symbol}", ""))
    assert bytes_of(made) == result.nbytes == 12 * 3 * 4
    assert result.with_rows.shape_at({symbol: 5}, rows=7) == [7, 1, 10, 3]
    assert result.shape_text({symbol: (4, 6)}) == "[1, 8..12, 3]"
    assert unmet([value], [f"{symbol} <= 8"], {"x": (1, 8, 3)}) is None
    assert unmet([value], [f"{symbol} <= 8"], {"x": (1, 9, 3)}) == "x.shape[1] <= 8 does not hold"
    assert (
        unmet([value], within({symbol: (4, 6)}), {"x": (1, 7, 3)})
        == "(4 <= x.shape[1]) & (x.shape[1] <= 6) does not hold"
    )
    assert "sizes" in (unmet([value], (), {"x": (2, 6, 3)}) or "")
