"""What is lowered for the calls that engines are built for: captured, split, and checked against the model."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from recache_compile.capture.capture import Captured, capture
from recache_compile.capture.check import check_program, check_stateless
from recache_compile.capture.export import quiet
from recache_compile.capture.free_sizes import LOGGER, FreeSizes, telling_lines
from recache_compile.capture.processors import PROCESSORS, under_processors
from recache_compile.capture.roles import usual_role
from recache_compile.compiler.examples import Example, alike, differing_sizes
from recache_compile.compiler.program_cache import Split, keep_split, read_split, split_key
from recache_compile.compiler.side_by_side import Helpers
from recache_compile.compiler.split import annotate, cache_points, describe_sites, specialise
from recache_compile.config import CompileConfig
from recache_compile.errors import CaptureError, check_memory, first_line
from recache_compile.ir.cost import count_macs
from recache_compile.ir.serialize import program_to_json
from recache_compile.ir.signature import named_leaves
from recache_compile.ir.sizes import symbols_in, terms_in
from recache_compile.ir.value import Kind, unmet

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Part:
    """What is lowered for one kind of call.

    Args:
        example: one of them.
        captured: the model as it is called so.
        num_sites: how many values are cached.
        split: the programs.
    """

    example: Example
    captured: Captured
    num_sites: int
    split: Split


@dataclass(frozen=True, slots=True)
class Capturing:
    """Makes the parts of one model.

    Args:
        module: the model.
        config: the choices.
        helpers: begin to load libraries once there is something to lower.
    """

    module: nn.Module
    config: CompileConfig
    helpers: Helpers

    def parts(self, examples: Sequence[Example]) -> list[Part]:
        """One for every kind of call; those that differ in sizes alone are one kind where the model's code allows it.

        Args:
            examples: one for each kind of call.

        Raises:
            CaptureError: it cannot be captured, or a call returns another structure than the first.
        """
        made: list[Part] = []
        is_free = self.config.free_sizes and not self.config.cuda_graphs  # which replay calls of one size
        for group in alike(examples) if is_free else [[each] for each in examples]:
            left = group
            while left:
                first, free = left[0], differing_sizes(left)
                found = self._for_free_sizes(left, free, str(len(made))) if free else None
                made += self._for_values(first, str(len(made))) if found is None else [found]
                left = [each for each in left[1:] if found is None or _unmet(found.captured, each) is not None]
        _check_same_model(made)
        return made

    def _for_free_sizes(self, group: Sequence[Example], free: FreeSizes, label: str) -> Part | None:
        """One for calls of several sizes: that of the first, and of others; None where none can stay free."""
        first, who = group[0], type(self.module).__name__
        try:
            with quiet(LOGGER):
                with telling_lines() as line_of:
                    captured = self._captured(first, first.inputs, label, free)
                for value in captured.program.inputs:
                    for at in free.get(value.name, ()):
                        if at not in value.free_at:
                            size = value.shape[at]
                            assert size is not None, "a call has no rows"
                            log.info("%s: the size %s of %s stays fixed by %s", who, size, value.name, line_of(size))
                reasons = [(each, _unmet(captured, each)) for each in group]
                served = [each for each, reason in reasons if reason is None]
                for each, reason in reasons:
                    if reason is not None:
                        log.info("%s: engines of their own for %s: %s", who, each.shapes, reason)
                if len(served) < 2:
                    return None
                captured = replace(captured, program=replace(captured.program, ranges=_ranges(captured, served)))
                program_to_json(captured.program)  # what an artifact could not hold is found now
                for each in served:
                    with under_processors(self.module, each.processors):
                        for inputs in (each.inputs, *each.others):
                            if inputs is not first.inputs:  # which it was checked with already
                                check_program(self.module, inputs, captured, who)
                part = self._part(first, captured)
                for each in served:
                    _check_terms(part, each)
                return part
        except Exception as error:  # noqa: BLE001  # of many kinds, where something cannot be done with terms
            check_memory(error)
            log.info("%s: its sizes stay fixed: %s", who, first_line(error))
            return None

    def _for_values(self, example: Example, label: str) -> list[Part]:
        """One for the sizes of a call, and one more for each call with other values of inputs that became constants."""
        own: list[Captured] = []
        for inputs in (example.inputs, *example.others):
            leaves = named_leaves(inputs)
            if any(all(torch.equal(leaves[name], value) for name, value in each.fixed.items()) for each in own):
                continue
            own.append(self._captured(example, inputs, f"{label}_{len(own)}" if own else label))
        return [self._part(example, each) for each in own]

    def _captured(
        self, example: Example, inputs: Mapping[str, Any], label: str, free: FreeSizes = MappingProxyType({})
    ) -> Captured:
        """The model as one call has it, checked; `label` tells the constants of several apart."""
        log.info("capturing")
        leaves = named_leaves(inputs)
        roles, who = {**example.roles, **self.config.roles}, type(self.module).__name__
        latents = [name for name in leaves if roles.get(name, usual_role(name)) == Kind.LATENTS]
        with under_processors(self.module, example.processors):
            check_stateless(self.module, inputs, latents, who)
            captured = capture(self.module, inputs, roles, label, free)
            check_program(self.module, inputs, captured, who)
        if example.attention:
            captured = replace(captured, constants=(*captured.constants, (PROCESSORS, repr(example.attention))))
        return captured

    def _part(self, example: Example, captured: Captured) -> Part:
        """Its programs, made now or read from the cache."""
        annotated = annotate(captured, self.config)
        log.info(describe_sites(annotated))
        key = split_key(captured.program, annotated, self.config)
        split = read_split(key, captured.program, example.device)
        if split is None:
            self.helpers.start()
            split = Split(specialise(annotated, self.config), count_macs(captured.program, example.device))
            keep_split(key, captured.program, split)
        return Part(example, captured, len(cache_points(annotated)), split)


def _unmet(captured: Captured, example: Example) -> str | None:
    """Why a capture does not serve a call that is like its own but for sizes and numbers; None: it does."""
    leaves = named_leaves(example.inputs)
    given = captured.signature.constants(example.inputs, leaves)
    for name, text in captured.constants:
        if name in given and given[name] != text:
            return f"{name} is {given[name]}, not {text}"
    return unmet(captured.program.inputs, captured.conditions, example.shapes)


def _sizes(captured: Captured, example: Example) -> dict[str, int]:
    """The free sizes of a call, by symbol."""
    shapes = example.shapes
    return symbols_in([(value.shape, value.free, shapes[value.name]) for value in captured.program.inputs])


def _check_terms(part: Part, example: Example) -> None:
    """Raise `ArtifactError` where the shape of a result cannot be told from those of a program's inputs."""
    sizes = _sizes(part.captured, example)
    for program in part.split.programs.values():
        given = [(value.shape, value.free, value.shape_at(sizes)) for value in program.inputs]
        for value in program.outputs:
            value.shape_at(terms_in(given))


def _ranges(captured: Captured, examples: Sequence[Example]) -> dict[str, tuple[int, int]]:
    """Smallest and largest of each free size."""
    found = [_sizes(captured, each) for each in examples]
    return {symbol: (min(each), max(each)) for symbol in found[0] if (each := [sizes[symbol] for sizes in found])}


def _check_same_model(parts: Sequence[Part]) -> None:
    """Raise `CaptureError` unless all calls have one result structure and the same number of cache sites."""
    if len({part.captured.signature for part in parts}) > 1:
        raise CaptureError(
            "examples: the model returns another structure for one of them than for the first; compile apart"
        )
    first, *others = (part.num_sites for part in parts)
    for found in others:
        if found != first:
            raise CaptureError(f"examples: one has {found} cache sites, the first has {first}; compile apart")
