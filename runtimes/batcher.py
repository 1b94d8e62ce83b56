"""Generations that run at the same time share recompute calls: the rows of one call are requests."""

import threading
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakSet

import torch
from torch import Tensor
from typing_extensions import override

from recache_compile.errors import DispatchError
from recache_compile.ir.plan import Plan
from recache_compile.ir.program import REQUESTS
from recache_compile.ir.signature import Signature
from recache_compile.runtimes.base import Engine, Revision, Variant
from recache_compile.runtimes.dispatcher import Dispatcher
from recache_compile.runtimes.dispatcher_observer import Observer, StepRecord
from recache_compile.runtimes.dispatcher_tables import Timetable


@dataclass(slots=True, eq=False)
class Member(Observer):
    """A dispatcher, as the others see it.

    Args:
        last_step: the last recompute step of its plan.
        is_late: whether it did not come when the others waited for it; it is not waited for until it comes.
    """

    last_step: int
    is_late: bool = False
    _last: "Lane | None" = None
    _expected: "Lane | None" = None
    _after: "dict[Lane, Lane]" = field(default_factory=dict)
    _step: int = -1
    _branches: set[Hashable] = field(default_factory=set)
    _usual: int = 1

    def come(self, lane: "Lane") -> None:
        """A call comes to a lane: those of guidance branches with other shapes come to other lanes, in turn."""
        if self._last is not None:
            self._after[self._last] = lane
        self._last, self.is_late = lane, False

    @override
    def after_step(self, record: StepRecord) -> None:
        if record.slot is None or self._last is None:
            return
        if record.step != self._step:
            self._step, self._usual, self._branches = record.step, len(self._branches), set()
        self._branches.add((record.branch, record.kind))
        is_coming = record.step < self.last_step or len(self._branches) < self._usual
        self._expect(self._after.get(self._last, self._last) if is_coming else None)

    def leave(self) -> None:
        """Its generation is over, or given up."""
        self._last, self._step = None, -1
        self._branches.clear()
        self._expect(None)

    def _expect(self, lane: "Lane | None") -> None:
        before, self._expected = self._expected, lane
        if before is not None and before is not lane:
            before.expect(self, False)
        if lane is not None:
            lane.expect(self, True)


@dataclass(slots=True, eq=False)
class Call:
    """A call that waits.

    Args:
        member: whose it is.
        inputs: of the engine.
        since: when it came, in seconds.
        row: its place among those that run together; None: it ran alone, and the results are its own.
        results: of all that ran together.
        error: that was raised instead.
    """

    member: Member
    inputs: Sequence[Tensor]
    since: float
    row: int | None = None
    results: Sequence[Tensor] | None = None
    error: BaseException | None = None

    @property
    def is_done(self) -> bool:
        """Whether there is an outcome."""
        return self.results is not None or self.error is not None

    def outcome(self) -> Sequence[Tensor]:
        """Its own results, in memory of their own, in the mode of the thread that asks."""
        if self.error is not None:
            raise self.error
        assert self.results is not None
        return self.results if self.row is None else [result[self.row].clone() for result in self.results]


class Lane:
    """Where calls of one recompute engine wait for each other.

    The oldest call that waits runs all of them once nobody else is expected soon, and after
    `patience` at the latest, which counts from when the engine is free.

    Args:
        one: the engine for one request.
        many: that for several.
        max_batch: most requests in a call.
        patience: in seconds.
        own: which inputs every request has its own of.
    """

    def __init__(self, one: Engine, many: Engine, max_batch: int, patience: float, own: Sequence[bool]) -> None:
        self._one, self._many, self._max_batch, self._patience, self._own = one, many, max_batch, patience, own
        self._changed = threading.Condition()
        self._waiting: list[Call] = []
        self._coming: WeakSet[Member] = WeakSet()
        self._is_busy = False
        self._free_since = 0.0

    def expect(self, member: Member, is_coming: bool) -> None:
        """Whether the next call of a member comes here."""
        with self._changed:
            (self._coming.add if is_coming else self._coming.discard)(member)
            self._changed.notify_all()

    def run(self, member: Member, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """A call of the engine, perhaps together with others."""
        call = Call(member, inputs, time.monotonic())
        with self._changed:
            member.come(self)
            self._waiting.append(call)
            self._changed.notify_all()
            try:
                while not call.is_done and not self._is_turn_of(call):
                    self._changed.wait(self._time_left(call))
            except BaseException:  # such as an interrupt: the others go on without this one
                if call in self._waiting:
                    self._waiting.remove(call)
                self._changed.notify_all()
                raise
            together = [] if call.is_done else self._take()
        if together:
            self._execute(together)
        return call.outcome()

    def _is_turn_of(self, call: Call) -> bool:
        if self._is_busy or self._waiting[:1] != [call]:
            return False
        present = {each.member for each in self._waiting}
        is_complete = all(member in present or member.is_late for member in self._coming)
        return is_complete or len(self._waiting) >= self._max_batch or self._time_left(call) == 0

    def _time_left(self, call: Call) -> float | None:
        """Seconds until a call runs whoever is missing; None: another one decides."""
        if self._is_busy or self._waiting[:1] != [call]:
            return None
        return max(0.0, max(call.since, self._free_since) + self._patience - time.monotonic())

    def _take(self) -> list[Call]:
        """The calls that run now; who was waited for in vain is late."""
        together, self._waiting = self._waiting[: self._max_batch], self._waiting[self._max_batch :]
        if len(together) < self._max_batch:
            present = {call.member for call in together}
            for member in self._coming:
                member.is_late |= member not in present
        self._is_busy = True
        return together

    def _execute(self, together: Sequence[Call]) -> None:
        try:
            if len(together) == 1:
                results = self._one(together[0].inputs)
            else:
                columns = zip(self._own, zip(*(call.inputs for call in together), strict=True), strict=True)
                results = self._many([torch.stack(column) if is_own else column[0] for is_own, column in columns])
            for row, call in enumerate(together):
                call.row, call.results = (None if len(together) == 1 else row), results
        except Exception as error:  # noqa: BLE001  # whatever the engine raises, each of them is told
            for call in together:
                call.error = error
        finally:
            with self._changed:
                left = [call for call in together[1:] if not call.is_done]  # the thread that ran them was interrupted
                self._waiting = [*left, *self._waiting]
                self._is_busy, self._free_since = False, time.monotonic()
                self._changed.notify_all()


class Lanes:
    """The lanes of one variant: one for each set of sizes, where these are free.

    Args:
        variant: programs and engines.
        max_batch, patience: as of `Lane`.
    """

    def __init__(self, variant: Variant, max_batch: int, patience: float) -> None:
        self.one, many = variant.engines["recompute"], variant.engines[REQUESTS]
        own = [None in value.shape for value in variant.programs[REQUESTS].inputs]
        self._make = lambda: Lane(self.one, many, max_batch, patience, own)
        self._making = threading.Lock()
        self._lanes: dict[tuple[torch.Size, ...], Lane] = {}

    def of(self, inputs: Sequence[Tensor]) -> Lane:
        """Where a call waits."""
        sizes = tuple(tensor.shape for tensor in inputs)
        with self._making:
            return self._lanes.get(sizes) or self._lanes.setdefault(sizes, self._make())


@dataclass(frozen=True, slots=True)
class SharedEngine(Engine):
    """A recompute engine that a dispatcher shares with others."""

    lanes: Lanes
    member: Member

    @override
    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.lanes.of(inputs).run(self.member, inputs)

    @override
    def use(self, weights: Mapping[str, Tensor]) -> None:
        self.lanes.one.use(weights)


class SharingDispatcher(Dispatcher):
    """A dispatcher whose recompute calls may run together with those of others.

    Args:
        member: what the others see of it.
        plan, variants, signature, revision, observers: as of `Dispatcher`.
    """

    def __init__(
        self,
        member: Member,
        plan: Plan,
        variants: Sequence[Variant],
        signature: Signature,
        revision: Revision,
        observers: Sequence[Observer] = (),
    ) -> None:
        super().__init__(plan, variants, signature, revision, observers=(member, *observers))
        self._member = member

    @override
    def reset(self, start: int | None = 0, timetable: Timetable | None = None) -> None:
        self._member.leave()
        super().reset(start, timetable)


@dataclass(frozen=True, slots=True, eq=False)
class Batcher:
    """Makes dispatchers that share their recompute calls.

    Each dispatcher runs in a thread of its own, and waits while others compute.  Cached steps are
    cheap, and not shared.  A lone dispatcher never waits.

    Args:
        variants: programs and engines; those for several requests among them.
        max_batch: most requests in a call.
        max_wait_ms: a call waits that long, at most, for those of generations that have recompute steps left.

    Raises:
        DispatchError: the engines were not compiled for several requests, or a bound makes no sense.
    """

    variants: Sequence[Variant]
    max_batch: int = 8
    max_wait_ms: float = 5.0
    _lanes: list[Lanes] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if any(REQUESTS not in variant.engines for variant in self.variants):
            raise DispatchError(
                "batcher: the engines are for one request at a time; compile with batching=True (--batching)"
            )
        if isinstance(self.max_batch, bool) or not isinstance(self.max_batch, int) or self.max_batch < 1:
            raise DispatchError(f"batcher: max_batch {self.max_batch!r}: expected a whole number from 1 on")
        if not 0 <= self.max_wait_ms < float("inf"):
            raise DispatchError(f"batcher: max_wait_ms {self.max_wait_ms!r}: expected 0 or more")
        for variant in self.variants:
            self._lanes.append(Lanes(variant, self.max_batch, self.max_wait_ms / 1000))

    def dispatcher(
        self, plan: Plan, signature: Signature, revision: Revision, observers: Sequence[Observer] = ()
    ) -> Dispatcher:
        """A dispatcher under a plan, for one generation after another, each in one thread."""
        member = Member(plan.schedule.recompute_steps[-1])
        variants = [
            replace(variant, engines={**variant.engines, "recompute": SharedEngine(lanes, member)})
            for variant, lanes in zip(self.variants, self._lanes, strict=True)
        ]
        return SharingDispatcher(member, plan, variants, signature, revision, observers)
