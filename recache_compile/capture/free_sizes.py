"""Sizes that are free: what to tell `torch.export`, and what it found out about them."""

import contextlib
import functools
import logging
import re
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from recache_compile.capture.compat import detect_fake_mode
from recache_compile.ir.meta import set_result
from recache_compile.ir.signature import number_as_shape
from recache_compile.ir.sizes import is_free

FreeSizes = Mapping[str, Collection[int]]
"""Dimensions of inputs whose size is free, by the input's dotted name; of whole numbers that are sizes, 0."""

LOGGER = "torch.fx.experimental.symbolic_shapes"
"""What torch logs of free sizes."""

_FIXED = re.compile(r"set_replacement \S+ = (\d+)\b")
_TORCH, _PYTHON = Path(torch.__file__).parent, Path(contextlib.__file__).parent
_UNKNOWN = "its code"
_KEEPING = threading.RLock()
"""Held by whom stand-ins are there for."""


def dynamic(name: str, leaf: Any, free: FreeSizes) -> Any:
    """What `torch.export` is told of an argument: AUTO keeps a size free unless the model's code decides it."""
    if not isinstance(leaf, Tensor):
        return torch.export.Dim.AUTO if name in free else None
    return dict.fromkeys(free.get(name, ()), torch.export.Dim.AUTO)


def all_free(exported: torch.export.ExportedProgram, free: FreeSizes) -> bool:
    """Whether as many sizes of the inputs are free as were asked for."""
    values = [node.meta.get("val") for node in exported.graph.find_nodes(op="placeholder")]
    sizes = [size for value in values for size in (value.shape if isinstance(value, Tensor) else [value])]
    return sum(map(is_free, sizes)) == sum(map(len, free.values()))


def conditions_of(exported: torch.export.ExportedProgram) -> tuple[str, ...]:
    """What the model's code has assumed of the free sizes: the program is right where all of it holds."""
    traced = [node.meta["val"] for node in exported.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    mode = detect_fake_mode(traced)
    environment = None if mode is None else mode.shape_env
    if environment is None or not any(is_free(size) for tensor in traced for size in tensor.shape):
        return ()
    found = [str(_in_symbols_left(guard.expr, environment.replacements)) for guard in environment.guards]
    for symbol, bounds in exported.range_constraints.items():
        found += [f"{symbol} >= {bounds.lower}"]
        found += [f"{symbol} <= {bounds.upper}"] if str(bounds.upper).isdigit() else []
    return tuple(condition for condition in dict.fromkeys(found) if condition != "True")


def _in_symbols_left(term: Any, replacements: Mapping[Any, Any]) -> Any:
    """A term without the symbols that turned out to be another one, or a number."""
    while term.free_symbols & set(replacements):
        term = term.xreplace(replacements)
    return term


class _Lines(logging.Handler):
    """Remembers where a model was when a size was fixed to a number."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.found: dict[int, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Called in the middle of the model's code."""
        if match := _FIXED.match(record.getMessage()):
            self.found.setdefault(int(match.group(1)), _line_of_the_model())


def _line_of_the_model() -> str:
    """The innermost line of the stack below the call of the model that is neither ours nor torch's."""
    for frame in reversed(traceback.extract_stack()):
        file = Path(frame.filename)
        is_python = file.is_relative_to(_PYTHON) and "site-packages" not in file.parts
        is_other = is_python or file.is_relative_to(_TORCH) or "recache_compile" in file.parts
        if file.exists() and not is_other:
            return f"{file.name}:{frame.lineno}: {frame.line}"
    return _UNKNOWN


class _Numbers(type):
    """What `int` is to a model's code while it is traced: a free size stays one."""

    def __call__(cls, *given: Any, **options: Any) -> Any:
        return given[0] if len(given) == 1 and isinstance(given[0], torch.SymInt) else int(*given, **options)

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, int)

    def __subclasscheck__(cls, other: type) -> bool:
        return issubclass(other, int)


class _Int(metaclass=_Numbers):
    """Stands for `int`."""


def _extreme(usual: Callable[..., Any], of_sizes: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """What `max` or `min` is to it: of free sizes a term, which does not decide which one it is."""

    def chosen(*given: Any, **options: Any) -> Any:
        several = given[0] if len(given) == 1 and isinstance(given[0], (list, tuple)) else given
        if options or not any(isinstance(each, torch.SymInt) for each in several):
            return usual(*given, **options)
        return functools.reduce(of_sizes, several)

    return chosen


_STAND_INS = {"int": _Int, "max": _extreme(max, torch.sym_max), "min": _extreme(min, torch.sym_min)}


@contextlib.contextmanager
def keeping_sizes(module: nn.Module) -> Iterator[None]:
    """While a model is traced: in the files of its classes `int`, `max` and `min` do not decide about free sizes."""
    names = {type(part).__module__ for part in module.modules()}
    files = [vars(sys.modules[name]) for name in names if name in sys.modules and name.partition(".")[0] != "torch"]
    with _KEEPING:
        changed = [(scope, name) for scope in files for name in _STAND_INS if name not in scope]
        for scope, name in changed:
            scope[name] = _STAND_INS[name]
        try:
            yield
        finally:
            for scope, name in changed:
                del scope[name]


def take_as_shape(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Let a graph take a number that is a free size as the size of a tensor (`number_as_shape`)."""
    size = node.meta["val"]
    with graph.inserting_before(node):
        given = graph.placeholder(f"{node.name}_as_shape")
    with detect_fake_mode([each.meta.get("val") for each in graph.nodes]) or contextlib.nullcontext():
        set_result(given, number_as_shape(size))
    first = next(each for each in graph.nodes if each.op != "placeholder")
    with graph.inserting_before(first):
        read = graph.call_function(torch.ops.aten.sym_size.int, (given, 0))
    set_result(read, size)
    node.replace_all_uses_with(read)
    graph.erase_node(node)
    return given


@contextlib.contextmanager
def telling_lines() -> Iterator[Callable[[int], str]]:
    """While a model is exported: which line of it has fixed a free size to a number."""
    logger, handler = logging.getLogger(LOGGER), _Lines()
    before = logger.level, logger.propagate, logger.handlers
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    try:
        yield lambda size: handler.found.get(size, _UNKNOWN)
    finally:
        level, logger.propagate, logger.handlers = before
        logger.setLevel(level)
