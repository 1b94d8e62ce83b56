"""Who waits gets a turn, whatever others do, and a thread never waits for itself."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager

import pytest

from recache_compile.compiler.turns import Turns

PATIENCE = 60.0


class Shared:
    """Something that threads read under a key, with an account of what happened."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.turns = Turns()
        self.pool = pool
        self.laid: list[str] = []
        self.order: list[str] = []

    def reading(self, key: str) -> AbstractContextManager[None]:
        return self.turns.reading(key, lambda: self.laid.append(key))

    def alone(self) -> AbstractContextManager[None]:
        return self.turns.alone()

    def start(self, name: str, turn: Callable[[], AbstractContextManager[None]], waits: bool = True) -> Future[None]:
        """Take a turn in another thread; return once it waits, or has begun to run."""
        before = self.turns.num_waiting

        def run() -> None:
            with turn():
                self.order.append(name)

        future = self.pool.submit(run)
        until(lambda: self.turns.num_waiting > before if waits else future.done())
        return future


def until(is_so: Callable[[], bool]) -> None:
    """Wait for what is about to happen."""
    end = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


@pytest.fixture
def shared() -> Iterator[Shared]:
    with ThreadPoolExecutor(8) as pool:
        yield Shared(pool)


def finish(*futures: Future[None]) -> None:
    for future in futures:
        future.result(PATIENCE)


def test_the_same_is_read_at_the_same_time_and_put_there_once(shared: Shared) -> None:
    with shared.reading("a"):
        finish(shared.start("another", lambda: shared.reading("a"), waits=False))
    assert (shared.laid, shared.order) == (["a"], ["another"])


@pytest.mark.parametrize("kind", ["other key", "alone"])
def test_new_readers_wait_behind_who_waits(kind: str, shared: Shared) -> None:
    with shared.reading("a"):
        first = shared.start("first", lambda: shared.alone() if kind == "alone" else shared.reading("b"))
        second = shared.start("second", lambda: shared.reading("a"))
        assert shared.order == []
    finish(first, second)
    assert shared.order == ["first", "second"]


def test_those_who_wait_for_the_same_go_in_together(shared: Shared) -> None:
    with shared.reading("a"):
        waiting = [shared.start(name, lambda name=name: shared.reading(name[0])) for name in ("b1", "a1", "b2", "a2")]
    finish(*waiting)
    assert shared.laid == ["a", "b", "a"]
    assert [name[0] for name in shared.order] == ["b", "b", "a", "a"]


def test_alone_is_overtaken_by_nobody_who_comes_later(shared: Shared) -> None:
    with shared.reading("a"):
        waiting = [shared.start("b", lambda: shared.reading("b")), shared.start("alone", shared.alone)]
        waiting.append(shared.start("a", lambda: shared.reading("a")))
    finish(*waiting)
    assert shared.order == ["b", "alone", "a"]


@pytest.mark.parametrize("inner", ["a", "b", "alone"])
def test_a_thread_that_reads_may_go_in_again_though_another_waits(inner: str, shared: Shared) -> None:
    def again() -> AbstractContextManager[None]:
        return shared.alone() if inner == "alone" else shared.reading(inner)

    with shared.reading("a"):
        waiting = shared.start("waiting", shared.alone)
        with again():
            shared.order.append("inner")
        shared.order.append("outer")
        assert shared.laid[-1] == "a"
    finish(waiting)
    first, *others = ["inner", "outer", "waiting"] if inner == "a" else ["waiting", "inner", "outer"]
    assert shared.order == [first, *others]


def test_two_threads_that_read_may_both_want_something_else_inside(shared: Shared) -> None:
    both = threading.Barrier(2)

    def nested(inner: str) -> None:
        with shared.reading("a"):
            both.wait(PATIENCE)
            with shared.reading(inner):
                assert shared.laid[-1] == inner
                shared.order.append(inner)
            assert shared.laid[-1] == "a"

    finish(shared.pool.submit(nested, "b"), shared.pool.submit(nested, "c"))
    assert sorted(shared.order) == ["b", "c"]


def test_alone_a_thread_may_read_and_be_alone(shared: Shared) -> None:
    with shared.alone(), shared.alone():
        with shared.reading("a"):
            pass
        with shared.reading("b"):
            waiting = shared.start("b", lambda: shared.reading("b"))
        assert shared.order == []
    finish(waiting)
    assert shared.laid == ["a", "b"]


def test_what_fails_lets_the_others_in_and_is_put_there_anew(shared: Shared) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with shared.reading("a"):
        failing = shared.start("b", lambda: shared.turns.reading("b", fail))
        waiting = shared.start("a", lambda: shared.reading("a"))
    with pytest.raises(ZeroDivisionError):
        failing.result(PATIENCE)
    finish(waiting)
    assert shared.laid == ["a", "a"]


@contextmanager
def interrupted_wait(turns: Turns, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Waiting is interrupted, as by Ctrl-C."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(turns, "_changed", _Interrupted(threading.Lock()))
        yield


class _Interrupted(threading.Condition):
    def wait(self, timeout: float | None = None) -> bool:
        raise KeyboardInterrupt


def test_who_is_interrupted_holds_nobody_up(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, done = threading.Event(), threading.Event()

    def read() -> None:
        with shared.reading("a"):
            reads.set()
            done.wait(PATIENCE)

    reader = shared.pool.submit(read)
    reads.wait(PATIENCE)
    with interrupted_wait(shared.turns, monkeypatch), shared.reading("b"):
        pytest.fail("went in")
    assert shared.turns.num_waiting == 0
    finish(shared.start("a", lambda: shared.reading("a"), waits=False))
    done.set()
    finish(reader)


def test_forgotten_is_put_there_anew_but_for_what_was_there_at_first(shared: Shared) -> None:
    with shared.turns.reading(None, lambda: pytest.fail("it is there")):
        pass
    with shared.alone():
        shared.turns.forget()
    with shared.turns.reading(None, lambda: pytest.fail("it is there")):
        pass
    for _ in range(2):
        with shared.reading("a"):
            pass
        with shared.alone():
            shared.turns.forget()
    assert shared.laid == ["a", "a"]
