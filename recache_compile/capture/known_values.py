"""While a model is traced: the values of what is computed from constants alone, for code that asks for them.

A tracer knows shapes, not values, so code that makes Python numbers or sizes of tensors
stops it, even where these values do not depend on any input.  Here they are computed for
real beside the trace, and given to the code that asks.
"""

import logging
import math
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from recache_compile.capture.compat import (
    TorchDispatchMode,
    WeakTensorKeyDictionary,
    is_traced,
    outside_of_the_trace,
    writes_to,
)

log = logging.getLogger(__name__)

READS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
"""Tags of the operators whose result's value or size cannot be traced."""

TO_PYTHON = frozenset({Tensor.tolist, Tensor.numpy, Tensor.item, Tensor.__array__})
"""Conversions that never become an operator."""

MOST_ELEMENTS = 1 << 22
"""Larger values are not computed beside the trace: masks over all pairs of tokens, say."""

_INDEXING = {Tensor.__getitem__, Tensor.__setitem__}
_REPEATING = {torch.repeat_interleave, Tensor.repeat_interleave}
_MAKERS = {torch.zeros, torch.ones, torch.full, torch.arange, torch.linspace, torch.eye, torch.tensor, torch.as_tensor}
_MAKERS_LIKE = {
    *(torch.zeros_like, torch.ones_like, torch.full_like),
    *(Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_tensor),
}
_FACTS = {
    *(Tensor.size, Tensor.stride, Tensor.storage_offset, Tensor.untyped_storage, Tensor.numel, Tensor.dim),
    *(Tensor.is_conj, Tensor.is_neg, Tensor.is_inference, Tensor._is_view),
    *(Tensor.shape.__get__, Tensor.ndim.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.layout.__get__),  # type: ignore[attr-defined]
    *(Tensor.requires_grad.__get__, Tensor.is_leaf.__get__, Tensor.is_sparse.__get__, Tensor.is_quantized.__get__),  # type: ignore[attr-defined]
    *(Tensor.is_nested.__get__, Tensor.is_mkldnn.__get__),  # type: ignore[attr-defined]
}
"""What a tracer tells of a tensor by itself; most calls are of this kind."""

_UNKNOWN: Any = object()


class KnownValues(TorchFunctionMode):
    """Keeps the values of constants and of what is computed from them.

    The trace itself stays complete: only what was asked for enters it as a new constant.
    """

    def __init__(self) -> None:
        super().__init__()
        self._values = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__iter__:  # an iterator would hide its tensors
            return iter(self.__torch_function__(Tensor.unbind, types, args))
        if func in _FACTS:
            return func(*args, **(kwargs or {}))
        args, kwargs = self._with_sizes(func, args, kwargs or {})
        values, asked = self._evaluate(func, args, kwargs)
        if asked:
            return pytree.tree_map_only(Tensor, self._enter, values)
        result = func(*args, **kwargs)
        for traced, value in zip(_tensors(result), _tensors(values), strict=False):
            if is_traced(traced):
                self._remember(traced, value)
        return result

    def _evaluate(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, bool]:
        """The call's result for real, if its arguments are known; and whether that is what its caller asks for."""
        known, options = pytree.tree_map_only(Tensor, self._value, (args, kwargs))
        try:
            with outside_of_the_trace(), _Evaluation() as evaluation:
                if func in _MAKERS_LIKE and known[0] is _UNKNOWN:
                    known = (_blank(args[0]), *known[1:])
                elif func not in _MAKERS and not _tensors((known, options)):
                    return None, False
                if all(leaf is not _UNKNOWN for leaf in pytree.tree_leaves((known, options))):
                    values = func(*known, **options)
                    return values, evaluation.reads or func in TO_PYTHON
        except Exception:  # errors of the model: they come again in the trace, which tells of them
            log.debug("not known beside the trace: %s", func, exc_info=True)
        return None, False

    def _value(self, tensor: Tensor) -> Any:
        """What a tensor holds, if that is known.

        A write of something unknown bumps the version of the traced tensor alone, and that
        of everything which shares its memory: what was known of it is then no longer true.
        """
        if not is_traced(tensor) and tensor not in self._values:
            with outside_of_the_trace():
                self._remember(tensor, tensor.detach().clone())
        value, distance = self._values.get(tensor, (None, 0))
        return _UNKNOWN if value is None or writes_to(tensor) - writes_to(value) != distance else value

    def _remember(self, tensor: Tensor, value: Tensor) -> None:
        self._values[tensor] = value, writes_to(tensor) - writes_to(value)

    def _enter(self, value: Tensor) -> Tensor:
        """A new constant of the trace."""
        traced: Tensor = torch.ops.aten.lift_fresh_copy(value)
        self._remember(traced, value)
        return traced

    def _with_sizes(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of a call whose result's size depends on values, written so that the size is known."""
        if func in _INDEXING:
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(each for part in parts for each in self._index(part))
            return (args[0], index if len(index) > 1 or args[1] is parts else index[0], *args[2:]), kwargs
        if func in _MAKERS:
            return pytree.tree_map_only(Tensor, self._number, (args, kwargs))  # type: ignore[no-any-return]
        if func in _REPEATING and "output_size" not in kwargs:
            counts = kwargs["repeats"] if "repeats" in kwargs else args[1] if len(args) > 1 else None
            value = self._value(counts) if isinstance(counts, Tensor) else _UNKNOWN
            if value is not _UNKNOWN:
                with outside_of_the_trace():
                    return args, {"output_size": int(value.sum()), **kwargs}
        return args, kwargs

    def _index(self, part: Any) -> tuple[Any, ...]:
        """A known mask as whole numbers, a slice with known bounds as numbers; else the index itself."""
        if isinstance(part, slice):
            return (slice(*(self._number(each) for each in (part.start, part.stop, part.step))),)
        if isinstance(part, Tensor) and is_mask(part) and part.dim():
            value = self._value(part)
            if value is not _UNKNOWN:
                with outside_of_the_trace():
                    return tuple(value.nonzero(as_tuple=True))
        return (part,)

    def _number(self, value: Any) -> Any:
        """A known tensor of no dimensions as a Python number; else the value itself."""
        if not isinstance(value, Tensor) or value.dim():
            return value
        known = self._value(value)
        with outside_of_the_trace():
            return value if known is _UNKNOWN else known.item()


class _Evaluation(TorchDispatchMode):
    """Computes small values that are the same every time; notes whether they were read."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags or _most_elements(args) > MOST_ELEMENTS:
            raise ValueError("not to be known")
        self.reads |= bool(READS & set(func.tags)) and func.overloadpacket is not torch.ops.aten.index
        return func(*args, **(kwargs or {}))


def is_mask(index: Tensor) -> bool:
    """Whether an index chooses elements by true and false."""
    return index.dtype in (torch.bool, torch.uint8)


def _blank(tensor: Tensor) -> Tensor:
    """A tensor of the same type, whose values do not matter."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _most_elements(args: Any) -> int:
    """Bound of a result's size: of what the arguments have if they are broadcast, and of the sizes among them."""
    shapes: list[Any] = [leaf.shape for leaf in _tensors(args)]
    shapes += [each for each in args if isinstance(each, (list, tuple)) and all(isinstance(size, int) for size in each)]
    sizes = zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1)
    return math.prod(max(column) for column in sizes)
