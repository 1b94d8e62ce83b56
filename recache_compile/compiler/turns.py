"""Who reads what is shared: many at once that want the same, others one after another as they came."""

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

_ALONE = object()


@dataclass(frozen=True, slots=True, eq=False)
class _Wish:
    """What a thread reads or waits for.

    Args:
        key: tells what is to be read.
        lay: puts it there.
    """

    key: Hashable
    lay: Callable[[], None]


class Turns:
    """Threads that read what a key tells, or change it while nobody reads.

    Who wants what is there goes in at once, but for when somebody waits: then it waits behind.
    With the first of those who wait, all that wait for the same thing go in, so that it is put
    there once for them.  So whoever waits is overtaken by those alone who wait already.

    A thread that reads may read, or be alone, inside: nobody waits for what it reads further
    out meanwhile, and it takes its turn to get that back.
    """

    def __init__(self) -> None:
        self._key: Hashable = None
        self._changed = threading.Condition(threading.Lock())
        self._owner: int | None = None
        self._readers: dict[int, _Wish] = {}
        self._waiting: dict[int, _Wish] = {}  # in the order in which they came

    def forget(self) -> None:
        """What is there is to be put there anew, but for what None tells; for a thread that is alone."""
        self._key = self._key if self._key is None else object()

    @property
    def num_waiting(self) -> int:
        """How many threads wait."""
        return len(self._waiting)

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Nobody else reads meanwhile; what this thread reads inside takes no turn."""
        return self._turn(_Wish(_ALONE, lambda: None))

    def reading(self, key: Hashable, lay: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
        """What is there stays what this key tells.

        Args:
            key: None is there at first.
            lay: puts there what the key tells, while nobody reads; where it fails, nobody knows what is there.
        """
        return self._turn(_Wish(key, lay))

    @contextlib.contextmanager
    def _turn(self, wish: _Wish) -> Iterator[None]:
        me = threading.get_ident()
        outer = self._readers.get(me)
        if self._owner == me:
            self._put(wish)
            yield
        elif outer is not None and outer.key == wish.key:
            yield
        else:
            try:
                self._enter(me, wish)
                yield
            finally:
                self._leave(me)
                if outer is not None:
                    self._enter(me, outer)

    def _enter(self, me: int, wish: _Wish) -> None:
        """Wait for a turn, and put there what is wished for."""
        with self._changed:
            self._readers.pop(me, None)
            if wish.key == self._key and self._owner is None and not self._waiting:
                self._readers[me] = wish
                return
            self._waiting[me] = wish
            self._pass_on()
            while me in self._waiting:
                self._changed.wait()
        if self._owner == me and wish.key is not _ALONE:
            self._put(wish)
            with self._changed:
                self._owner, self._readers[me] = None, wish
                self._let_in()

    def _leave(self, me: int) -> None:
        """Give up whatever a thread has or waits for."""
        with self._changed:
            self._readers.pop(me, None)
            self._waiting.pop(me, None)
            self._owner = None if self._owner == me else self._owner
            self._pass_on()

    def _put(self, wish: _Wish) -> None:
        if wish.key not in (self._key, _ALONE):
            self._key = object()  # nobody's, should it fail
            wish.lay()
            self._key = wish.key

    def _pass_on(self) -> None:
        """Let in whose turn it is."""
        if self._owner is not None or not self._waiting:
            return
        first = next(iter(self._waiting))
        if self._waiting[first].key == self._key:
            self._let_in()
        elif not self._readers:
            del self._waiting[first]
            self._owner = first
            self._changed.notify_all()

    def _let_in(self) -> None:
        """Let in all that wait for what is there."""
        for thread, wish in [*self._waiting.items()]:
            if wish.key == self._key:
                self._readers[thread] = self._waiting.pop(thread)
        self._changed.notify_all()
