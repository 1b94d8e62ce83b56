"""The prologue's tables of one generation: filled when needed; what is stale is noticed, at the end at the latest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recache_compile.errors import DispatchError
from recache_compile.ir.plan import Plan
from recache_compile.ir.program import MIN_ROWS
from recache_compile.ir.value import Kind, Value
from recache_compile.runtimes._tensor_snapshot import TensorSnapshot, host_waits
from recache_compile.runtimes.base import Revision, Variant


@dataclass(frozen=True, slots=True)
class Timetable:
    """The timesteps that a scheduler makes.

    Args:
        timesteps: (T,), on the CPU.
        num_train_timesteps: steps of the training, which models are told shares of, or those steps.
    """

    timesteps: Tensor
    num_train_timesteps: int = 1000

    @classmethod
    def of(cls, scheduler: Any, num_steps: int) -> "Timetable":
        """That of a scheduler of diffusers whose timesteps are set; without what comes after step T-1."""
        train = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None) or 1000
        return cls(torch.as_tensor(scheduler.timesteps)[:num_steps].cpu(), train)

    @property
    def levels(self) -> tuple[float, ...]:
        """The noise level of every step, as a share of the training's steps."""
        return tuple((self.timesteps.double() / self.num_train_timesteps).tolist())

    def scaled(self, like: Tensor) -> list[Tensor]:
        """As a model may be told of them, in the type of a timestep input: whole ones are cut off."""
        if not like.is_floating_point():
            return [self.timesteps.trunc().to(like.dtype)]
        return [(self.timesteps.double() * scale).to(like.dtype) for scale in (1.0, 1.0 / self.num_train_timesteps)]

    def expected(self, step: int, given: Tensor) -> list[Tensor] | None:
        """What a timestep input will be at every step, if it is `given` at one of them; None: it cannot be told.

        Tokens may have timesteps of their own: the loop's, or zero.  What a pipeline makes of the
        scheduler's timesteps must be one thing alone: known, and beyond all doubt of rounding.
        """
        if not given.numel() or step >= len(self.timesteps):
            return None
        largest = given.max()
        exact = largest.cpu()
        known = self.scaled(given)
        if given.is_floating_point():
            share = self.timesteps.to(given.dtype) / self.num_train_timesteps
            known += [share, 1 - share]  # one minus the share is what Lumina's models are told
        fitting = [column for column in known if column[step] == exact]
        if not fitting or any(not torch.equal(column, fitting[0]) for column in fitting[1:]):
            return None
        is_loop = given == largest
        if not bool((is_loop | (given == 0)).all()):
            return None
        return [torch.where(is_loop, value, given) for value in fitting[0].to(given.device)]


class Tables:
    """Prologue outputs for one guidance branch at one shape.

    The prologue runs when conditioning is first seen and when its values change, for all
    steps whose timestep is known: from compilation, told by the scheduler, or learned from the
    calls themselves.  A step with an unknown or different timestep gets its row from a run of its own.

    Args:
        variant: programs and engines; "prologue" is among them.
        plan: which step reads which table; its first step is `start`.
        start: the step that generations begin with; rows are counted from it.
        revision: of the weights; when it moves on, everything is computed anew.
        every: compute the rows of all tables for all steps, read or not, so that they serve
            every plan and their rounding does not depend on it.
    """

    def __init__(
        self, variant: Variant, plan: Plan, start: int = 0, revision: Revision | None = None, every: bool = False
    ) -> None:
        self._variant = variant
        self._revision = revision or Revision()
        self._computed_at: int | None = None
        self._weights = tuple(variant.programs["prologue"].weights.values())
        self._versions = 0
        tables = {value.table for value in variant.programs["prologue"].outputs if value.table is not None}
        self._every = tuple(sorted(tables)) if every else ()
        self.follow(plan)
        names = variant.names(Kind.TIMESTEP)
        self._conditioned = variant.names(Kind.CONDITIONING)
        known = {name: each[start:] for name, each in variant.timesteps.items() if len(each) - start == len(plan.steps)}
        self._timesteps: dict[str, list[Tensor | None]] = {
            name: list(known[name]) if name in known else [None] * len(plan.steps) for name in names
        }
        self._conditioning: dict[str, TensorSnapshot] = {}
        self._fixed: dict[tuple[str | None, str | None], Tensor] = {}
        self._rows: dict[tuple[int, str | None, str | None], Tensor] = {}
        self._differs: Tensor | None = None
        self._timetable: Timetable | None = None
        self._distrusted: Timetable | None = None
        self._start = start

    def follow(self, plan: Plan) -> None:
        """Serve another plan with the same first step; rows that are there already stay."""
        self._tables = [step.program for step in plan.steps]
        self._reads = [
            tuple(value for value in self._variant.programs[step.program].inputs if value.kind is Kind.TABLE_ROW)
            for step in plan.steps
        ]

    def read(self, value: Value, step: int) -> Tensor:
        """What a step program reads as its packed input `value`."""
        if value.kind is Kind.FIXED:
            return self._fixed[self._tables[step], value.name]
        return self._rows[step, self._tables[step], value.name]

    def prepare(self, step: int, tensors: Mapping[str, Tensor]) -> bool:
        """Make sure that what `step` reads belongs to these conditioning and timestep tensors.

        Returns:
            Whether what was read for it before, if anything, still belongs to them.
        """
        steps: Sequence[int] = range(len(self._tables))
        stale = self._conditioning_changed(tensors) or self._computed_at != self._revision.number
        self._computed_at = self._revision.number
        if stale:
            self._rows.clear()
        if not self._timesteps_match(step, tensors) and not stale:
            for key in [key for key in self._rows if key[0] == step]:
                del self._rows[key]
            steps = [each for each in steps if each == step or not self.has_rows(each)]
        elif not stale and self.has_rows(step):
            return True
        try:
            self._run(steps, tensors)
        except BaseException:  # nothing half-filled is ever read
            self._rows.clear()
            self._conditioning.clear()
            raise
        return False

    def has_rows(self, step: int) -> bool:
        """Whether all that a step reads is there."""
        return all((step, self._tables[step], value.name) in self._rows for value in self._reads[step])

    def restart(self, timetable: Timetable | None = None) -> None:
        """Forget what an interrupted generation left to be checked, and rows of weights that were written to since.

        Args:
            timetable: of the scheduler.  Where the timesteps that are known do not belong to it, all are
                learned anew: from the first step and this, else on the way.  None: each step's is compared
                when it comes.
        """
        self._differs = None
        for seen in self._conditioning.values():
            seen.look_again()
        if timetable is not None:
            if not self._fits(timetable):
                self._forget_timesteps()
            self._timetable = timetable
        versions = sum(weight._version for weight in self._weights if not weight.is_inference())
        if versions != self._versions:
            self._versions, self._computed_at = versions, None

    def finish(self) -> None:
        """Raise `DispatchError` if timesteps or conditioning that were compared on the device turned out to differ."""
        differs, self._differs = self._differs, None
        if differs is not None and bool(differs):
            self._forget_timesteps()
            self._distrusted = self._timetable
            self._conditioning.clear()
            raise DispatchError(
                "the timesteps of this generation are not those it was compiled for, or its conditioning was written"
                " to under way, so its result is wrong; run it again: all is then learned on the way"
            )

    def _fits(self, timetable: Timetable) -> bool:
        """Whether a scheduler's timesteps are those that are known, of one input at least.

        Tokens may have timesteps of their own, of which the largest is the loop's.
        """
        if self._timetable is not None:
            return torch.equal(timetable.timesteps, self._timetable.timesteps)
        found = []
        for column in self._timesteps.values():
            known = [tensor.max().cpu() for tensor in column if tensor is not None]
            wanted = timetable.timesteps[self._start :]
            if len(known) != len(wanted):
                continue  # some are not known yet: they are compared when they come
            values = torch.stack(known)
            rtol = 2 * torch.finfo(values.dtype).eps if values.is_floating_point() else 0.0
            scaled = (each[self._start :] for each in timetable.scaled(values))
            found.append(any(torch.allclose(values, each, rtol=rtol, atol=0.0) for each in scaled))
        return any(found) or not found

    def _forget_timesteps(self) -> None:
        self._timesteps = {name: [None] * len(steps) for name, steps in self._timesteps.items()}
        self._rows.clear()

    def _conditioning_changed(self, tensors: Mapping[str, Tensor]) -> bool:
        changed = False
        for name in self._conditioned:
            tensor, seen = tensors[name], self._conditioning.get(name)
            if seen is not None and (differs := seen.differs(tensor)) is not None:
                self._gather(differs)
            elif seen is None or not seen.still_equals(tensor):
                self._conditioning[name] = TensorSnapshot.of(tensor)
                changed = True
        return changed

    def _timesteps_match(self, step: int, tensors: Mapping[str, Tensor]) -> bool:
        """Compare with the known timetable, and learn where there is none.

        On a GPU the comparison is gathered there and read after the last step, so that the
        loop never waits for it.
        """
        match = True
        for name, known in self._timesteps.items():
            expected, given = known[step], tensors[name]
            if expected is not None and host_waits(given):
                self._gather((expected != given).any())
            elif expected is None or not torch.equal(expected, given):
                self._learn(known, step, given)
                match = False
        return match

    def _learn(self, column: list[Tensor | None], step: int, given: Tensor) -> None:
        """Remember the timestep of a step, and those of others that follow from it."""
        column[step] = given.clone()
        known, distrusted = self._timetable, self._distrusted
        if known is None or all(each is not None for each in column):
            return
        if distrusted is not None and torch.equal(distrusted.timesteps, known.timesteps):
            return  # it has told wrong ones before
        for at, value in enumerate((known.expected(step + self._start, given) or [])[self._start :]):
            if column[at] is None:
                column[at] = value

    def _gather(self, differs: Tensor) -> None:
        """Remember something that `finish` reads."""
        self._differs = differs if self._differs is None else self._differs | differs

    def _run(self, steps: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        """Fill the rows of those steps whose timesteps are known."""
        known = [step for step in steps if all(column[step] is not None for column in self._timesteps.values())]
        one_by_one = self._variant.programs["prologue"].makes_one_row
        for group in [[step] for step in known] if one_by_one else [known]:
            self._fill(group, tensors, 1 if one_by_one else MIN_ROWS)

    def _fill(self, steps: Sequence[int], tensors: Mapping[str, Tensor], min_rows: int) -> None:
        """One call of the prologue."""
        program = self._variant.programs["prologue"]
        readers: dict[str | None, list[int]] = {}
        for step in steps:
            for table in self._every or (self._tables[step],):
                readers.setdefault(table, []).append(step)
        arguments = []
        for value in program.inputs:
            if value.kind is Kind.TIMESTEP:
                assert value.source is not None
                column = self._timesteps[value.source]
                stack = [tensor for step in readers.get(value.table, steps[:1]) if (tensor := column[step]) is not None]
                arguments.append(torch.stack([*stack, *stack[:1] * (min_rows - len(stack))]))
            else:
                arguments.append(tensors[value.name].contiguous())
        results = self._variant.engines["prologue"](arguments)
        for value, result in zip(program.outputs, results, strict=True):
            if value.kind is Kind.FIXED:
                self._fixed[value.table, value.source] = result
                continue
            for step, row in zip(readers.get(value.table, ()), result, strict=False):
                self._rows[step, value.table, value.source] = row
