"""The step of a call: told, known to the scheduler, or looked up; and where generations begin."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from recache_compile.errors import DispatchError
from recache_compile.pipelines.step_tracker import StepTracker, loop_length

TABLE = (900.0, 600.0, 300.0, 100.0)


def tracker() -> StepTracker:
    return StepTracker(["timestep"])


def scheduler(**facts: Any) -> Any:
    return SimpleNamespace(**{"timesteps": torch.tensor(TABLE)} | facts)


def call(timestep: float = -1.0) -> dict[str, Any]:
    return {"hidden_states": torch.tensor([300.0]), "timestep": torch.tensor([timestep, timestep]), "scale": 600.0}


def step_of(scheduler: Any, timestep: float = -1.0) -> int:
    return tracker().advance(scheduler, call(timestep))[0]


def test_what_the_pipeline_tells_comes_first() -> None:
    subject, knowing = tracker(), scheduler(step_index=2)
    with subject.telling(1):
        assert subject.advance(knowing, call(100.0))[0] == 1
        with subject.telling(None):
            assert subject.advance(knowing, call())[0] == 2
        assert subject.advance(knowing, call())[0] == 1
    assert subject.advance(knowing, call())[0] == 2


def test_what_was_told_ends_with_an_error() -> None:
    subject = tracker()
    with pytest.raises(KeyError), subject.telling(1):
        raise KeyError
    assert subject.advance(scheduler(step_index=3), call())[0] == 3


def test_other_branches_of_the_first_step_are_known_by_its_timestep() -> None:
    subject, unmoved = tracker(), scheduler(step_index=None, begin_index=None)
    assert subject.advance(unmoved, call(0.25)) == (0, True)  # in units that the table does not have
    assert subject.advance(unmoved, call(0.25)) == (0, False)
    with pytest.raises(DispatchError, match="does not tell its step"):
        subject.advance(unmoved, call(0.2))


def test_other_branches_of_a_first_step_in_the_middle_begin_there_too() -> None:
    """Heun's table names each timestep twice."""
    twice = scheduler(timesteps=torch.tensor([900.0, 600.0, 600.0, 100.0]), step_index=None, begin_index=2)
    subject = tracker()
    assert [subject.advance(twice, call(600.0)) for _ in range(2)] == [(2, True), (2, False)]


def test_the_scheduler_knows_its_step() -> None:
    assert step_of(scheduler(step_index=2, begin_index=1)) == 2
    assert step_of(scheduler(step_index=torch.tensor(2))) == 2


def test_before_the_first_step_the_scheduler_knows_where_it_begins() -> None:
    assert step_of(scheduler(step_index=None, begin_index=1), 300.0) == 1
    assert step_of(scheduler(step_index=None, begin_index=None), 300.0) == 2
    assert step_of(scheduler(step_index=None), 300.0) == 2
    assert step_of(scheduler(step_index=None), 5.0) == 0
    repeated = scheduler(timesteps=torch.tensor([900.0, 300.0, 300.0, 100.0]), step_index=None)
    assert step_of(repeated, 300.0) == 1


@pytest.mark.parametrize(("step", "timestep"), enumerate(TABLE))
def test_the_timestep_is_looked_up_where_the_scheduler_does_not_tell_its_step(step: int, timestep: float) -> None:
    assert step_of(scheduler(), timestep) == step


@pytest.mark.parametrize(("timestep", "where"), [(5.0, "not in"), (300.0, "at several places in")])
def test_a_timestep_without_one_place_is_refused(timestep: float, where: str) -> None:
    repeated = scheduler(timesteps=torch.tensor([900.0, 300.0, 300.0, 100.0]))
    with pytest.raises(DispatchError, match=f"SimpleNamespace does not tell its step, and the timestep is {where} its"):
        step_of(repeated, timestep)


def test_a_call_without_timestep_is_refused() -> None:
    with pytest.raises(DispatchError, match="the timestep is not in its table; use another scheduler"):
        tracker().advance(scheduler(), {"timestep": None})


@pytest.mark.parametrize(
    ("table", "asked", "length"),
    [
        (TABLE, None, 4),
        (TABLE, 4, 4),
        ((*TABLE, 0.0), 4, 4),  # nothing is left to denoise at zero
        ((*TABLE, 0.0), 5, 5),
        ((*TABLE, 0.0), None, 5),
        ((*TABLE, 50.0), 4, 5),
        ((*TABLE, 50.0, 20.0), 4, 6),
    ],
)
def test_a_loop_is_as_long_as_its_scheduler_says(table: tuple[float, ...], asked: int | None, length: int) -> None:
    facts = {} if asked is None else {"num_inference_steps": asked}
    assert loop_length(scheduler(timesteps=torch.tensor(table), **facts)) == length


def test_a_generation_begins_with_the_first_call_and_where_steps_go_back() -> None:
    subject = tracker()
    steps = (1, 1, 2, 3, 3, 0, 0, 2, 1)
    begins = [subject.advance(scheduler(step_index=step), call()) for step in steps]
    assert begins == list(zip(steps, (True, False, False, False, False, True, False, False, True), strict=True))


def test_a_call_that_is_refused_begins_nothing() -> None:
    subject = tracker()
    with pytest.raises(DispatchError):
        subject.advance(scheduler(), call())
    assert subject.advance(scheduler(step_index=3), call()) == (3, True)
    assert subject.advance(scheduler(step_index=3), call()) == (3, False)


def test_a_generation_begins_where_the_loop_has_another_length() -> None:
    subject = tracker()
    longer = scheduler(timesteps=torch.arange(9.0), step_index=4)
    assert subject.advance(scheduler(step_index=3), call()) == (3, True)
    assert subject.advance(longer, call()) == (4, True)
    assert subject.num_steps == 9
    assert subject.advance(longer, call()) == (4, False)


def test_outside_of_a_pipeline_s_call_the_scheduler_s_step_must_fit_the_timestep() -> None:
    knowing = scheduler(step_index=2)
    assert tracker().advance(knowing, call(300.0), in_call=False)[0] == 2
    assert tracker().advance(knowing, call(100.0))[0] == 2
    with pytest.raises(DispatchError, match=r"a loop that does not move the scheduler .*; rc\.accelerate\(\.\.\.\)"):
        tracker().advance(knowing, call(100.0), in_call=False)
    with pytest.raises(DispatchError, match="a loop that does not move the scheduler"):
        tracker().advance(scheduler(step_index=4), call(), in_call=False)


def test_tokens_may_have_timesteps_of_their_own() -> None:
    given = {"timestep": torch.tensor([[0.0, 300.0, 300.0]])}
    assert tracker().advance(scheduler(step_index=None), given)[0] == 2


def test_a_timestep_of_zero_at_the_end_is_no_step() -> None:
    spare = scheduler(timesteps=torch.tensor([*TABLE, 0.0]), step_index=None, num_inference_steps=4)
    assert tracker().advance(spare, call(100.0))[0] == 3
