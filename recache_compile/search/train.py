"""Train a policy: `recache-compile train`."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from recache_compile._version import __version__
from recache_compile.config import CompileConfig
from recache_compile.errors import ArtifactError, ScheduleError
from recache_compile.evaluation.distances import get_distance
from recache_compile.evaluation.rewards import get_reward
from recache_compile.ir.forecasters import check_forecaster
from recache_compile.ir.schedule import Schedule, check_budgets
from recache_compile.pipelines.load import absolute, load_pipeline
from recache_compile.pipelines.prompts import training_and_held_out
from recache_compile.policies.base import Problem, Progress
from recache_compile.policies.recache import ReCache, is_trained, read_policy
from recache_compile.policies.reinforce import Reinforce
from recache_compile.policies.search import Search
from recache_compile.policies.uniform import Uniform
from recache_compile.runtimes.registry import runtime_on
from recache_compile.search.charts import draw_schedules, draw_training
from recache_compile.search.objective import Losses, Runner
from recache_compile.search.ray_pool import RayRunner, import_ray
from recache_compile.search.runner import StudyRunner, build_study_engines
from recache_compile.search.study import Study, held_out_batches, is_begun, judging_batches
from recache_compile.support.files import check_place, output_errors

log = logging.getLogger(__name__)


class Trainer(Protocol):
    """Makes a policy for several budgets."""

    def train(self, problem: Problem, budgets: Sequence[int]) -> ReCache:
        """One policy for all budgets."""
        ...

    def reports(self, budgets: int) -> int:
        """How many times at most it reports its progress for so many budgets."""
        ...

    def scaled(self, effort: float) -> "Trainer":
        """The same with `effort` times as much to try."""
        ...


TRAINERS: dict[str, type[Search] | type[Reinforce]] = {"search": Search, "recache": Reinforce}
"""Ways to train, by the name users choose them by."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How a study is gone about.

    Args:
        training, held_out: numbers of batches.
        alpha: weight of the reward.
        seed: of the search; the study's own is that of the noise.
        workers: Ray workers; 0: in this process.
        ray_address: of a running cluster for the workers; None: they get one on this machine.
    """

    training: int = 3
    held_out: int = 4
    alpha: float = 0.0
    seed: int = 0
    workers: int = 0
    ray_address: str | None = None


@dataclass(frozen=True, slots=True)
class Trained:
    """What training made.

    Args:
        policy: serves every budget.
        losses: held-out losses (mean, standard error) by budget: the policy's and the uniform schedule's.
        generations: that the losses it asked for have taken, those of earlier attempts included.
    """

    policy: ReCache
    losses: Mapping[int, Mapping[str, tuple[float, float]]]
    generations: int


@dataclass(frozen=True, slots=True)
class TrainingRequest:
    """What a user asks of `train`.

    Args:
        model: name, folder or Hub id of the pipeline.
        budgets: numbers of recompute steps k to train for.
        config: what engines are built with.
        forecaster: fills the cached steps, with all the anchors of `config`.
        method: a key of `TRAINERS`.
        samples, held_out: to choose schedules on, and to accept and judge them on; in whole batches.
        batch_size: samples that run together, at most.
        distance, reward: names of d and R; distance "auto" is resolved.
        alpha: weight of the reward.
        prompts: file with one caption a line; None for captions of our own.
        effort: scales how much is tried.
        seed: of the noise and of the search.
        workers: Ray workers; 0: in this process.
        ray_address: of a running cluster for them.
    """

    model: str
    budgets: tuple[int, ...] = (5, 10, 15)
    config: CompileConfig = field(default_factory=CompileConfig)
    forecaster: str = "taylor"
    method: str = "search"
    samples: int = 48
    held_out: int = 64
    batch_size: int = 16
    distance: str = "auto"
    reward: str = "none"
    alpha: float = 7.0
    prompts: Path | None = None
    effort: float = 1.0
    seed: int = 0
    workers: int = 0
    ray_address: str | None = None

    @property
    def trainer(self) -> "Trainer":
        """What trains."""
        return TRAINERS[self.method]().scaled(self.effort)

    def study(self) -> Study:
        """The study that this asks for, every choice checked before a model is loaded.

        Raises:
            RecacheError: naming the choice that cannot be used.
        """
        check_forecaster(self.forecaster, self.config.anchors - 1)
        training, held_out = training_and_held_out(self.model, self.prompts)
        runtime = runtime_on(self.config.runtime, torch.device("cpu")).name
        return Study(
            model=absolute(self.model),
            config=replace(self.config, runtime=runtime),
            forecaster=self.forecaster,
            distance=get_distance(self.distance, self.model).name,
            reward=get_reward(self.reward, self.model).name,
            training_prompts=training,
            held_out_prompts=held_out,
            batch_size=min(self.batch_size, self.samples, self.held_out),
            seed=self.seed,
        )

    def spent(self, study: Study) -> Effort:
        """How much of it."""
        return Effort(
            training=-(-self.samples // study.batch_size),
            held_out=-(-self.held_out // study.batch_size),
            alpha=0.0 if study.reward == "none" else self.alpha,
            seed=self.seed,
            workers=self.workers,
            ray_address=self.ray_address,
        )


def train_policy(
    request: TrainingRequest,
    out: Path,
    progress: Callable[[Progress], None] = lambda progress: None,
    count: Callable[[int, int], None] = lambda done, asked: None,
) -> Trained:
    """Train what a user asks for; arguments and errors as of `train`."""
    study = request.study()
    check_out(study, request.budgets, out)
    if request.distance == "auto":
        log.info("distance %s, reward %s", study.distance, study.reward)
    return train(study, request.budgets, out, request.trainer, request.spent(study), progress, count)


def check_out(study: Study, budgets: Sequence[int], out: Path) -> None:
    """Raise unless these budgets can be trained for and the folder can take the policy.

    Raises:
        ScheduleError: a budget leaves nothing to choose.
        ArtifactError: the folder holds something else, or a policy of other budgets, or cannot be written.
    """
    for budget in check_budgets(budgets, study.num_steps):
        if not 1 < budget < study.num_steps:
            raise ScheduleError(f"budget {budget}: there is one schedule only; train for 2..{study.num_steps - 1}")
    with output_errors(out, "folder"):
        begun = is_begun(study, out / "study")
        if not begun and out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ArtifactError(f"output {out}: holds something that is no policy in training; name another folder")
        check_place(out / "study")
    if is_trained(out):
        known = read_policy(out).facts.get("schedules", {})
        if lost := [budget for budget in known if int(budget) not in budgets]:
            raise ArtifactError(
                f"output {out}: its policy is for {', '.join(known)} too; add {', '.join(lost)} to --budgets (what was"
                " run is not run again), or name another folder"
            )


@contextlib.contextmanager
def open_study(
    study: Study,
    folder: Path,
    effort: Effort,
    count: Callable[[int, int], None] = lambda done, asked: None,
) -> Iterator[tuple[Problem, Losses, StudyRunner]]:
    """Everything that looking for schedules takes: engines, samples, calibration, workers.

    Until it is closed torch has one thread on the CPU: more of them add up in another order,
    and losses shall have the same bits with any number of workers, which use more cores.

    Args:
        study: what is studied.
        folder: where it is kept; whatever is there is not made again.
        effort: how much of it.
        count: told how many losses of those asked for are there.

    Raises:
        RecacheError: naming what cannot be done.
    """
    is_begun(study, folder)  # if it holds another one, that is an error
    if effort.workers:
        import_ray()  # before anything takes long
    pipeline = None
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        if not (folder / "engines").exists():
            log.info("loading %s", study.model)
            pipeline = load_pipeline(study.model, getattr(torch, study.config.dtype))
            build_study_engines(study, folder, pipeline)
        log.info("loading the engines")
        study_runner = StudyRunner(folder, pipeline)
        log.info("generating the uncached samples")
        study_runner.prepare((*range(effort.training), *held_out_batches(effort.held_out)))
        log.info("calibrating")
        calibration = study_runner.calibration()
        runner: Runner = study_runner
        if effort.workers:
            log.info("starting the workers")
            runner = stack.enter_context(RayRunner(folder, effort.workers, effort.ray_address))
        objective = Losses(
            folder / "losses.jsonl", runner, study.batch_size, effort.training, effort.held_out, effort.alpha, count
        )
        yield (
            Problem(
                study.num_steps,
                study_runner.forecaster(),
                calibration,
                objective,
                effort.seed,
                levels=study_runner.engines.description.levels,
            ),
            objective,
            study_runner,
        )


def train(
    study: Study,
    budgets: Sequence[int],
    out: Path,
    trainer: Trainer,
    effort: Effort,
    progress: Callable[[Progress], None] = lambda progress: None,
    count: Callable[[int, int], None] = lambda done, asked: None,
) -> Trained:
    """Train a policy and write it to a folder, with its curves and schedules.

    Interrupted at any time, the same call goes on: losses that are known are not run again,
    and everything else follows from them and the seed.

    Args:
        study: what is studied.
        budgets: numbers of recompute steps k to train for.
        out: folder of the policy; the study is kept in `study` below it.
        trainer: how.
        effort: how much.
        progress: told how the search goes.
        count: told how many losses of those asked for are there.

    Raises:
        RecacheError: naming what cannot be done.
    """
    check_out(study, budgets, out)
    seen: list[tuple[int, Progress]] = []
    with open_study(study, out / "study", effort, count) as (problem, objective, study_runner):

        def note(each: Progress) -> None:
            seen.append((objective.generations, each))
            progress(each)

        policy, levels = trainer.train(replace(problem, report=note), budgets), problem.levels
        log.info("judging on samples that nothing was decided on")
        judging = judging_batches(effort.held_out)
        study_runner.prepare(judging)
        rivals = {budget: (policy.schedule(problem, budget), Uniform().schedule(problem, budget)) for budget in budgets}
        losses = {budget: _judge(objective.losses(pair, judging)) for budget, pair in rivals.items()}
    facts = _facts(study, effort, trainer, rivals, losses, objective.generations)
    policy = replace(policy, facts={**facts, "levels": list(levels)})
    policy.save(out)
    if seen:
        draw_training(seen, out / "training.png")
    named = {
        "trained": {k: ours for k, (ours, _) in rivals.items()},
        "uniform": {k: other for k, (_, other) in rivals.items()},
    }
    draw_schedules(named, out / "schedules.png")
    return Trained(policy, losses, objective.generations)


def _judge(losses: np.ndarray) -> dict[str, tuple[float, float]]:
    """Mean loss and its standard error of the trained and the uniform schedule, from losses (2, samples)."""
    errors = losses.std(1, ddof=min(1, losses.shape[1] - 1)) / losses.shape[1] ** 0.5
    return {name: (float(losses[at].mean()), float(errors[at])) for at, name in enumerate(("trained", "uniform"))}


def _facts(
    study: Study,
    effort: Effort,
    trainer: Trainer,
    rivals: Mapping[int, tuple[Schedule, Schedule]],
    losses: Mapping[int, Mapping[str, tuple[float, float]]],
    generations: int,
) -> dict[str, Any]:
    """Where a policy comes from, for `policy.json`."""
    return {
        "recache_version": __version__,
        "model": study.model,
        "forecaster": study.forecaster,
        "order": study.order,
        "granularity": study.config.granularity.value,
        "method": next(name for name, kind in TRAINERS.items() if kind is type(trainer)),
        "distance": study.distance,
        "reward": study.reward if effort.alpha else "none",
        "alpha": effort.alpha,
        "training_samples": effort.training * study.batch_size,
        "held_out_samples": effort.held_out * study.batch_size,
        "seed": effort.seed,
        "generations": generations,
        "schedules": {str(budget): list(ours.recompute_steps) for budget, (ours, _) in rivals.items()},
        "held_out_losses": {str(budget): dict(values) for budget, values in losses.items()},
    }
