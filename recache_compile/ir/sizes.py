"""Sizes of values: numbers, or terms of sizes that are free at run time, as `torch.export` found them."""

import ast
import math
import operator
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch

from recache_compile.errors import ArtifactError

MOST_SQUARED = 4
"""The largest exponent that sizes have."""

_SIGNS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: lambda base, exponent: base ** min(exponent, MOST_SQUARED),
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_CALLS: dict[str, Callable[..., Any]] = {
    "Max": max,
    "Min": min,
    "Mod": operator.mod,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "IntTrueDiv": operator.truediv,
    "PythonMod": operator.mod,
    "ToFloat": float,
    "TruncToInt": math.trunc,
    "FloorToInt": math.floor,
    "CeilToInt": math.ceil,
    "Eq": operator.eq,
    "Ne": operator.ne,
}


def is_free(size: Any) -> bool:
    """Whether a size is no number."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def number_of(size: Any) -> int:
    """A size, or what it is in the example."""
    return int(size.node.hint) if is_free(size) else int(size)


def bytes_of(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, or what they are in the example."""
    return math.prod(map(number_of, tensor.shape)) * tensor.dtype.itemsize


def term_of(size: Any) -> Any:
    """A size as a number or as a term that can be added to, hashed, and compared without a guard."""
    return size.node.expr if is_free(size) else int(size)


def terms_of(sizes: Iterable[Any]) -> tuple[Hashable, ...]:
    """The same of several: equal where they are the same whatever the free sizes are."""
    return tuple(map(term_of, sizes))


def texts_of(sizes: Iterable[Any]) -> tuple[str, ...]:
    """The terms of free sizes as text, "" for numbers; nothing where all are numbers."""
    texts = tuple(str(size.node.expr) if is_free(size) else "" for size in sizes)
    return texts if any(texts) else ()


def value_of_term(text: str, sizes: Mapping[str, int]) -> int:
    """What a term or a condition is.

    Args:
        text: sums, products, quotients, remainders and comparisons of symbols and whole numbers, as sympy writes them.
        sizes: by symbol; a term that is known as a whole may be among them.

    Raises:
        ArtifactError: it is no such term, or a symbol is missing.
    """
    if text in sizes:
        return sizes[text]
    try:
        return int(_value(ast.parse(text.strip(), mode="eval").body, sizes))
    except (SyntaxError, KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError, RecursionError) as error:
        raise ArtifactError(f"size {text!r:.80}: is no term of {', '.join(sizes) or 'known sizes'}") from error


def _value(tree: ast.AST, sizes: Mapping[str, int]) -> Any:
    match tree:
        case ast.Constant(value=int(number) | float(number)):
            return number
        case ast.Name(id=name):
            return sizes[name]
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_value(inner, sizes)
        case ast.UnaryOp(op=ast.Invert(), operand=inner):
            return not _value(inner, sizes)
        case ast.BinOp(left=left, op=sign, right=right) | ast.Compare(left=left, ops=[sign], comparators=[right]):
            return _SIGNS[type(sign)](_value(left, sizes), _value(right, sizes))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            return _CALLS[name](*(_value(each, sizes) for each in arguments))
    raise KeyError(type(tree).__name__)


Described = Sequence[tuple[Sequence[int | None], Sequence[str], Sequence[Any]]]
"""Per tensor its expected shape, its terms (as `texts_of`), and the shape that it has."""


def terms_in(described: Described) -> dict[str, int]:
    """Free sizes by term, whether that is a symbol or not."""
    return {term: size for _, terms, shape in described for term, size in zip(terms, shape, strict=False) if term}


def symbols_in(described: Described) -> dict[str, int]:
    """Free sizes by symbol, of the dimensions that have nothing else."""
    return {term: size for term, size in terms_in(described).items() if term.isidentifier()}


def sizes_in(described: Described) -> dict[str, int] | None:
    """Free sizes by symbol, where shapes fit what is expected; else None."""
    sizes = symbols_in(described)
    for expected, terms, shape in described:
        if len(expected) != len(shape):
            return None
        for size, term, given in zip(expected, terms or [""] * len(shape), shape, strict=True):
            wanted = value_of_term(term, sizes) if term else given if size is None else size
            if wanted != given:
                return None
    return sizes


def within(ranges: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    """Conditions that hold of sizes in these ranges."""
    return tuple(f"({least} <= {symbol}) & ({symbol} <= {most})" for symbol, (least, most) in ranges.items())
