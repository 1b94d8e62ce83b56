import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from recache_compile.errors import ScheduleError
from recache_compile.ir.carry_over import carry_over
from recache_compile.policies.base import Problem
from recache_compile.policies.recache import FACTS, WEIGHTS, Logits, ReCache, is_trained, most_likely, read_policy
from recache_compile.policies.registry import get_policy

TOTAL = 9


def policy_of(width: int = 8, seed: int = 0, num_steps: int = TOTAL) -> ReCache:
    torch.manual_seed(seed)
    logits = Logits(num_steps, width)
    with torch.no_grad():
        logits.bias.normal_()
    return ReCache(logits, {"model": "shapes", "budgets": [3, 5]})


def all_steps(policy: ReCache) -> list[tuple[int, ...]]:
    total = policy.logits.num_steps
    return [policy.schedule(Problem(total), budget).recompute_steps for budget in range(1, total + 1)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    policy_of().save(tmp_path / "policy")
    return tmp_path / "policy"


@pytest.mark.parametrize("width", [0, 8])
def test_what_was_saved_comes_back(width: int, tmp_path: Path) -> None:
    policy = policy_of(width)
    policy.save(tmp_path / "new" / "folder")
    read = read_policy(tmp_path / "new" / "folder")
    assert read.facts["model"] == "shapes"
    assert read.facts["budgets"] == [3, 5]
    for name, value in policy.logits.state_dict().items():
        assert torch.equal(read.logits.state_dict()[name], value)
    assert all_steps(read) == all_steps(policy)


def test_a_policy_that_was_read_can_be_saved_again(folder: Path, tmp_path: Path) -> None:
    read_policy(folder).save(tmp_path / "again")
    for name in (FACTS, WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert sorted(file.name for file in folder.iterdir()) == [FACTS, WEIGHTS]


def test_facts_do_not_hide_the_shape_of_the_network(tmp_path: Path) -> None:
    policy = policy_of()
    ReCache(policy.logits, {"width": 512, "num_steps": 50, "format_version": 99}).save(tmp_path)
    assert all_steps(read_policy(tmp_path)) == all_steps(policy)


@pytest.mark.parametrize(("width", "num_steps"), [(0, 1), (0, 2), (8, 2), (0, 9), (8, 9), (8, 50)])
def test_every_budget_has_exactly_k_steps_that_begin_with_0(width: int, num_steps: int) -> None:
    for budget, steps in enumerate(all_steps(policy_of(width, num_steps=num_steps)), start=1):
        assert len(set(steps)) == budget
        assert steps[0] == 0
        assert max(steps) < num_steps


@pytest.mark.parametrize("seed", range(3))
def test_the_steps_are_those_with_the_largest_logits(seed: int) -> None:
    policy = policy_of(seed=seed)
    for budget in range(1, TOTAL + 1):
        theta = policy.logits(budget).numpy()
        steps = policy.schedule(Problem(TOTAL), budget).recompute_steps
        assert set(steps[1:]) == {int(step) + 1 for step in np.argsort(-theta)[: budget - 1]}


def test_logits_depend_on_the_budget_unless_they_have_no_width() -> None:
    with_width, without = policy_of(8).logits, policy_of(0).logits
    assert not torch.allclose(with_width(3), with_width(5))
    assert torch.equal(without(3), without(5))
    steps = [set(most_likely(without, budget).recompute_steps) for budget in range(1, TOTAL + 1)]
    assert all(smaller < larger for smaller, larger in pairwise(steps))


def test_a_loop_of_another_length_gets_the_nearest_steps_with_a_warning(folder: Path) -> None:
    policy = read_policy(folder)
    with pytest.warns(
        UserWarning, match=r"trained for 9 steps, its schedule is carried over to 50; train one"
    ) as caught:
        found = policy.schedule(Problem(50), 5)
    assert str(folder) in str(caught[0].message)
    assert found == carry_over(policy.schedule(Problem(TOTAL), 5), 5, 50)
    with pytest.warns(UserWarning, match="carried over"):
        assert policy.schedule(Problem(50), 12).budget == 12


def test_steps_correspond_by_noise_level_where_the_training_s_are_known(folder: Path) -> None:
    levels = tuple((1 - step / TOTAL) ** 2 for step in range(TOTAL))
    others = tuple((1 - step / 50) ** 3 for step in range(50))
    policy = replace(read_policy(folder), facts={"levels": levels})
    with pytest.warns(UserWarning, match="carried over"):
        found = policy.schedule(Problem(50, levels=others), 5)
    assert found == carry_over(policy.schedule(Problem(TOTAL), 5), 5, 50, levels, others)


def test_reading_takes_no_random_numbers(folder: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    read_policy(folder)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", ["", FACTS])
def test_the_registry_takes_the_folder_and_its_json(folder: Path, name: str) -> None:
    choice = folder / name if name else folder
    assert is_trained(choice)
    policy = get_policy(str(choice), TOTAL)
    assert isinstance(policy, ReCache)
    assert all_steps(policy) == all_steps(policy_of())


def test_a_folder_without_a_policy_is_none(tmp_path: Path) -> None:
    assert not is_trained(tmp_path)
    assert not is_trained(tmp_path / FACTS)
    with pytest.raises(ScheduleError, match="cannot be read as a schedule"):
        get_policy(str(tmp_path), TOTAL)


def change(**facts: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / FACTS
        file.write_text(json.dumps(json.loads(file.read_text()) | facts))

    return damage


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return damage


def drop(fact: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        facts = json.loads((folder / FACTS).read_text())
        del facts[fact]
        (folder / FACTS).write_text(json.dumps(facts))

    return damage


def truncate(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def poison(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["bias"][3] = float("nan")
    save_file(weights, folder / WEIGHTS)


def forget(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights["bias"]
    save_file(weights, folder / WEIGHTS)


def pickle(folder: Path) -> None:
    torch.save(Explodes(), folder / WEIGHTS)


class Explodes:
    """Nothing that is read may run."""

    def __reduce__(self) -> tuple[object, ...]:
        return (pytest.fail, ("a file was unpickled",))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no facts": (lambda folder: (folder / FACTS).unlink(), "no trained policy"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "no trained policy"),
    "empty facts": (write(FACTS, b""), "no trained policy"),
    "facts cut off": (write(FACTS, b'{"format_version": 1, "num'), "no trained policy"),
    "facts not text": (write(FACTS, b"\xff\xfe\x00"), "no trained policy"),
    "facts deeper than Python goes": (write(FACTS, b"[" * 100_000), "no trained policy"),
    "facts a list": (write(FACTS, b"[0, 3, 5]"), "no trained policy"),
    "facts a number": (write(FACTS, b"7"), "no trained policy"),
    "no version": (drop("format_version"), "no trained policy"),
    "no shape": (drop("width"), "no trained policy"),
    "version is text": (change(format_version="new"), "no trained policy"),
    "newer": (change(format_version=2), "format 2, this version reads 1; upgrade"),
    "steps are text": (change(num_steps="many"), "no trained policy"),
    "steps are infinite": (change(num_steps=float("inf")), "no trained policy"),
    "steps are nothing": (change(num_steps=None), "no trained policy"),
    "no steps": (change(num_steps=0), "no trained policy"),
    "other steps": (change(num_steps=12), "no trained policy"),
    "more steps than memory": (change(num_steps=10**12), "no trained policy"),
    "negative width": (change(width=-1), "no trained policy"),
    "other width": (change(width=9), "no trained policy"),
    "no width": (change(width=0), "no trained policy"),
    "weights cut off": (truncate, "no trained policy"),
    "empty weights": (write(WEIGHTS, b""), "no trained policy"),
    "weights that are no weights": (write(WEIGHTS, b"PK\x03\x04" * 50), "no trained policy"),
    "weights pickled": (pickle, "no trained policy"),
    "a weight missing": (forget, "no trained policy"),
    "a weight not a number": (poison, "a weight is not finite"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_or_newer_is_refused_in_one_line(folder: Path, damage: str) -> None:
    spoil, message = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(ScheduleError, match=message) as caught:
        read_policy(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).mkdir()
    with pytest.raises(Exception, match=r"policy\.safetensors") as caught:
        policy_of().save(tmp_path)
    assert type(caught.value).__name__ == "ArtifactError"
