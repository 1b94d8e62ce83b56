"""What schedules are worth on `shapes`: exhaustive truth, rivals at T = 50, forecasters, sample efficiency.

    python benchmarks/schedules.py truth --folder studies
    python benchmarks/schedules.py rivals --folder studies
    python benchmarks/schedules.py forecasters --folder studies
    python benchmarks/schedules.py efficiency --folder studies
    python benchmarks/schedules.py page --folder studies        # writes docs/schedules.md and its plots

Each part writes a JSON file into the folder and can be stopped and started again: losses
that are known are not run again.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torchmetrics.functional import spearman_corrcoef

from recache_compile.config import CompileConfig
from recache_compile.evaluation.distances import get_distance
from recache_compile.ir.forecasters import anchors_of
from recache_compile.ir.schedule import Schedule
from recache_compile.pipelines.load import load_pipeline
from recache_compile.policies.annealing import Annealing
from recache_compile.policies.base import Objective, Policy, Problem, Progress
from recache_compile.policies.dynamic import DynamicProgram, Minimax
from recache_compile.policies.evolution import Nsga2
from recache_compile.policies.front_loaded import FrontLoaded
from recache_compile.policies.gram import Gram
from recache_compile.policies.recache import ReCache, read_policy
from recache_compile.policies.reinforce import Reinforce
from recache_compile.policies.search import Climb, Search, best_of
from recache_compile.policies.surrogate import Surrogate
from recache_compile.policies.thresholds import MagCache, TeaCache
from recache_compile.policies.uniform import Uniform
from recache_compile.search.objective import Losses
from recache_compile.search.runner import StudyRunner
from recache_compile.search.study import FIRST_HELD_OUT, Study
from recache_compile.search.train import Effort, TrainingRequest, open_study
from recache_compile.support.log import told

BATCH = 16
TRAINING, VALIDATION, TEST = 8, 4, 8
"""Batches that schedules are chosen on, that REINFORCE is accepted on, and that all are judged on."""

T50 = Effort(TRAINING, VALIDATION)
BUDGETS = (5, 7, 9, 10, 13, 15)
TEST_BATCHES = tuple(range(FIRST_HELD_OUT + 100, FIRST_HELD_OUT + 100 + TEST))


def shapes(num_steps: int, forecaster: str, order: int, batch_size: int = BATCH) -> Study:
    """`shapes` under one forecaster."""
    config = CompileConfig(num_steps=num_steps, anchors=anchors_of(forecaster, order))
    asked = {"distance": "features", "reward": "caption", "batch_size": batch_size, "samples": batch_size}
    return TrainingRequest("shapes", (), config, forecaster, held_out=batch_size, **asked).study()


@contextlib.contextmanager
def studied(folder: Path, study: Study, effort: Effort) -> Iterator[tuple[Problem, Losses, StudyRunner]]:
    """A study in a folder of its own."""
    place = folder / f"T{study.num_steps}-{study.forecaster}-{study.order}"
    with told(click.echo), open_study(study, place, effort) as found:
        yield found


@dataclass(slots=True)
class Counted:
    """An objective that counts the generations that one policy asks for."""

    inner: Objective
    asked: set[tuple[int, str]] = field(default_factory=set)

    @property
    def training(self) -> tuple[int, ...]:
        """As the inner one's."""
        return self.inner.training

    @property
    def held_out(self) -> tuple[int, ...]:
        """As the inner one's."""
        return self.inner.held_out

    @property
    def batch_size(self) -> int:
        """As the inner one's."""
        return self.inner.batch_size

    @property
    def generations(self) -> int:
        """Distinct pairs of schedule and sample so far."""
        return len(self.asked) * self.batch_size

    def losses(self, schedules: Sequence[Schedule], batches: Sequence[int]) -> np.ndarray:
        """As the inner one's, and counted."""
        self.asked |= {(batch, schedule.mask) for schedule in schedules for batch in batches}
        return self.inner.losses(schedules, batches)


def save(folder: Path, name: str, result: Any) -> None:
    """Write one part's result."""
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def policies() -> dict[str, Policy]:
    """The rivals, by name; the page tells how many generations annealing is given, and how many our search takes."""
    return {
        "uniform": Uniform(),
        "front-loaded": FrontLoaded(),
        "dp": DynamicProgram(),
        "minimax": Minimax(),
        "teacache": TeaCache(),
        "magcache": MagCache(),
        "gram": Gram(),
        "annealing": Annealing(evaluations=32),
    }


@dataclass(frozen=True, slots=True)
class Trained:
    """Search, fit and REINFORCE for one budget, as the shipped policies are made."""

    def schedule(self, problem: Problem, budget: int) -> Schedule:
        """The fitted policy's answer."""
        return Search().train(problem, (budget,)).schedule(problem, budget)


def truth_of(folder: Path, study: Study, budget: int) -> dict[str, Any]:
    """Every schedule, on two batches for training and one held out, and where the policies end among them."""
    num_steps = study.num_steps
    with studied(folder, study, Effort(2, 1)) as (problem, losses, _):
        every = [Schedule((0, *rest), num_steps) for rest in itertools.combinations(range(1, num_steps), budget - 1)]
        training = dict(zip(every, losses.losses(every, losses.training).mean(1), strict=True))
        held_out = dict(zip(every, losses.losses(every, losses.held_out).mean(1), strict=True))
        chosen: dict[str, tuple[Schedule, int]] = {}
        reinforce = Reinforce(300, 16, every=25)
        others = {"nsga2": Nsga2(), "climb": Climb(), "search": Search(), "recache": reinforce, "trained": Trained()}
        for name, policy in {**policies(), **others}.items():
            counted = Counted(losses)
            schedule = policy.schedule(replace(problem, objective=counted), budget)
            chosen[name] = schedule, counted.generations
        likelihoods = {
            likelihood: [
                training[replace(reinforce, likelihood=likelihood).schedule(replace(problem, seed=seed), budget)]
                for seed in range(1, 6)
            ]
            for likelihood in ("set", "ordered")
        }
        assert problem.calibration is not None and problem.forecaster is not None
        of_features = replace(problem.calibration, predictions=problem.calibration.features)
        guesses = {
            name: Surrogate(calibration, problem.forecaster).errors(every)
            for name, calibration in (("predictions", problem.calibration), ("features", of_features))
        }
    best, best_held_out = min(training.values()), min(held_out.values())
    return {
        "num_steps": num_steps, "budget": budget, "samples": 2 * study.batch_size, "held_out_samples": study.batch_size, "forecaster": study.forecaster,
        "order": study.order, "schedules": len(every),
        "best": best_of(training).recompute_steps, "best_loss": best, "best_held_out_loss": best_held_out,
        "rank_correlations": {
            name: float(spearman_corrcoef(torch.from_numpy(guess), torch.tensor(list(training.values())))) for name, guess in guesses.items()
        },
        "likelihoods": {name: float(np.mean(found)) / best - 1 for name, found in likelihoods.items()},
        "policies": {
            name: {
                "steps": schedule.recompute_steps, "generations": spent,
                "regret": training[schedule] / best - 1, "held_out_regret": held_out[schedule] / best_held_out - 1,
            }
            for name, (schedule, spent) in chosen.items()
        },
    }  # fmt: skip


def fewer_steps(study_runner: StudyRunner, num_steps: int) -> np.ndarray:
    """Distances (samples,) of the uncached pipeline with fewer steps to the full one, on the test batches."""
    pipeline = load_pipeline("shapes")
    pipeline.set_progress_bar_config(disable=True)
    distance = get_distance(study_runner.study.distance, "shapes")
    rows = []
    for number in TEST_BATCHES:
        batch = study_runner.study.batch(number)
        generators = [torch.Generator().manual_seed(seed) for seed in batch.seeds]
        made = pipeline(
            list(batch.prompts), num_inference_steps=num_steps, generator=generators, output_type="pt"
        ).images
        rows.append(distance(made, study_runner.uncached(number)).numpy())
    return np.concatenate(rows)


def summary(values: np.ndarray) -> dict[str, float]:
    """Mean and standard error of losses (samples,)."""
    return {"mean": float(values.mean()), "error": float(values.std(ddof=1) / len(values) ** 0.5)}


def rivals_of(folder: Path, forecaster: str, order: int) -> dict[str, Any]:
    """Held-out distances of every policy at T = 50."""
    table: dict[str, dict[int, Any]] = {}
    with studied(folder, shapes(50, forecaster, order), T50) as (problem, losses, study_runner):
        study_runner.prepare(TEST_BATCHES)
        trained = trained_policy(folder, problem, losses, forecaster, order)
        front = Counted(losses)
        evolved = dict(Nsga2(population=14, generations=10).front(replace(problem, objective=front), BUDGETS))
        for budget in BUDGETS:
            searched = trained.facts["searched"][str(budget)]
            chosen = {
                "search": (Schedule(tuple(searched["steps"]), 50), searched["generations"]),
                "trained": (trained.schedule(problem, budget), trained.facts["generations"]),
            }
            for each in evolved:
                if each.budget == budget:
                    chosen["nsga2"] = each, front.generations
            for name, policy in policies().items():
                counted = Counted(losses)
                chosen[name] = policy.schedule(replace(problem, objective=counted), budget), counted.generations
            ours = losses.losses([chosen["trained"][0]], TEST_BATCHES)[0]
            for name, (schedule, spent) in chosen.items():
                values = losses.losses([schedule], TEST_BATCHES)[0]
                training = float(losses.losses([schedule], losses.training).mean())
                row = {"steps": schedule.recompute_steps, "generations": spent, "training": training, **summary(values)}
                table.setdefault(name, {})[budget] = {**row, "behind": summary(values - ours)}
            table.setdefault("fewer steps", {})[budget] = summary(fewer_steps(study_runner, budget))
            save(folder, f"rivals-{forecaster}-{order}", {"table": table, "samples": TEST * BATCH})
    return {"table": table, "samples": TEST * BATCH}


def trained_policy(folder: Path, problem: Problem, losses: Losses, forecaster: str, order: int) -> ReCache:
    """The policy that `recache-compile train` makes; kept in the folder."""
    place = folder / f"policy-{forecaster}-{order}"
    if not (place / "policy.json").exists():
        begin, counted = time.perf_counter(), Counted(losses)
        searched: dict[int, dict[str, Any]] = {}

        def note(each: Progress) -> None:
            if each.stage in ("race", "climb"):
                now = {"steps": each.schedule.recompute_steps, "loss": each.loss}
                kept = min(searched.get(each.budget, now), now, key=lambda found: found["loss"])
                earlier = sum(found["generations"] for budget, found in searched.items() if budget != each.budget)
                searched[each.budget] = {**kept, "generations": counted.generations - earlier}

        policy = Search().train(replace(problem, objective=counted, report=note), BUDGETS)
        facts = {"seconds": time.perf_counter() - begin, "generations": counted.generations, "searched": searched}
        replace(policy, facts=facts).save(place)
    return read_policy(place)


def forecasters_of(folder: Path, budget: int = 7) -> dict[str, Any]:
    """Forecasters of equal history on schedules that a search has found for each."""
    result: dict[str, Any] = {}
    for order, name in itertools.product((1, 2), ("taylor", "hicache", "newton", "fitted")):
        with studied(folder, shapes(50, name, order), T50) as (problem, losses, study_runner):
            study_runner.prepare(TEST_BATCHES)
            schedule = Search(shortlist=16, evaluations=32).schedule(problem, budget)
            ours, uniform = losses.losses([schedule, Uniform().schedule(problem, budget)], TEST_BATCHES)
            result[f"{name} {order} {budget}"] = {
                "steps": schedule.recompute_steps, **summary(ours), "uniform": summary(uniform)
            }  # fmt: skip
            save(folder, "forecasters", result)
    return result


def efficiency_of(folder: Path, budget: int = 7) -> dict[str, Any]:
    """Training loss of the best schedule against generations spent."""
    curves: dict[str, list[tuple[int, float]]] = {}
    with studied(folder, shapes(50, "taylor", 1), T50) as (problem, losses, _):
        methods: dict[str, Callable[[Problem], Any]] = {
            "search": lambda each: Search().schedule(each, budget),
            **{
                f"REINFORCE, rate {rate}": lambda each, rate=rate: Reinforce(200, rate=rate).train(each, (budget,))
                for rate in (0.005, 0.02)
            },
        }
        for name, method in methods.items():
            counted, seen = Counted(losses), []

            def note(progress: Progress, counted: Counted = counted, seen: list[Any] = seen) -> None:
                seen.append((counted.generations, progress.schedule))

            method(replace(problem, objective=counted, report=note))
            shown = seen if name == "search" else seen[9::10]  # most likely schedules need not have been run
            distinct = list(dict.fromkeys(schedule for _, schedule in shown))
            values = dict(zip(distinct, losses.losses(distinct, losses.training).mean(1), strict=True))
            curves[name] = [(spent, float(values[schedule])) for spent, schedule in shown]
            save(folder, "efficiency", {"budget": budget, "curves": curves})
    return {"budget": budget, "curves": curves}


@click.command()
@click.argument("part", type=click.Choice(["truth", "rivals", "forecasters", "efficiency", "page"]))
@click.option("--folder", type=click.Path(path_type=Path), default="studies", show_default=True)
@click.option("--only", help="Of the truth: one forecaster, as taylor-1.")
def main(part: str, folder: Path, only: str | None) -> None:
    """Run one part."""
    folder.mkdir(parents=True, exist_ok=True)
    if part == "page":
        from schedules_page import write_page

        write_page(folder, Path(__file__).parent.parent / "docs")
    elif part == "truth":
        for name, order in (("reuse", 0), ("taylor", 1), ("hicache", 2)):
            if only in (None, f"{name}-{order}"):
                small, large = shapes(12, name, order), shapes(16, name, order, batch_size=8)
                save(folder, f"truth-{name}-{order}", [truth_of(folder, small, 4), truth_of(folder, large, 5)])
    elif part == "rivals":
        save(folder, "rivals-taylor-1", rivals_of(folder, "taylor", 1))
    elif part == "forecasters":
        save(folder, "forecasters", forecasters_of(folder))
    else:
        save(folder, "efficiency", efficiency_of(folder))


if __name__ == "__main__":
    main()
