"""What a user asks of `evaluate`, checked before anything takes long."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from recache_compile.api import compile_options
from recache_compile.artifact.manifest import is_artifact
from recache_compile.artifact.store import check
from recache_compile.compiler.build import make_schedules
from recache_compile.errors import ModelError
from recache_compile.evaluation.metrics import judge_of, pictures_in, usual_metrics
from recache_compile.evaluation.setting import Setting
from recache_compile.ir.forecasters import Reuse
from recache_compile.ir.schedule import check_budgets
from recache_compile.models.registry import find
from recache_compile.pipelines.load import absolute
from recache_compile.pipelines.prompts import captions_of
from recache_compile.policies.base import Problem
from recache_compile.policies.registry import CALIBRATED, get_policy
from recache_compile.runtimes.registry import runtime_on
from recache_compile.support.devices import usable_device

USUAL: dict[str, Any] = {
    "num_steps": 50, "forecaster": "taylor", "order": 1, "granularity": "stack", "runtime": "auto", "dtype": "float32",
    "component": "transformer",
}  # fmt: skip
"""What a model is compiled with where the user does not say."""
BUDGETS = (5, 10, 15)
POLICIES = ("auto", "uniform")
"""What is evaluated of a model where the user does not say."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for; None: the usual, or what an artifact was compiled with.

    Args:
        model: what `compile` takes, or an artifact's folder.
        budgets: numbers of recompute steps k.
        policies: names, as for `compile`; of an artifact's own schedules without any.
        num_steps, forecaster, order, granularity, runtime, dtype, device, component, call: as for `compile`.
        metrics: names.
        prompts: file with one caption a line.
        samples: to judge, rounded up to whole batches.
        batch_size: samples that are run together.
        seed: of the first sample's noise.
        reference: folder of pictures for the Frechet distance; None: uncached samples of other noise.
        repeats: timed calls of the pipeline under every budget.
        workers: Ray workers; 0: in this process.
        ray_address: of a running cluster for them.
    """

    model: str
    budgets: tuple[int, ...] | None = None
    policies: tuple[str, ...] | None = None
    num_steps: int | None = None
    forecaster: str | None = None
    order: int | None = None
    granularity: str | None = None
    runtime: str | None = None
    dtype: str | None = None
    device: str | None = None
    component: str | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[str, ...] | None = None
    prompts: Path | None = None
    samples: int = 64
    batch_size: int | None = None
    seed: int = 0
    reference: Path | None = None
    repeats: int = 3
    workers: int = 0
    ray_address: str | None = None

    @property
    def is_artifact(self) -> bool:
        """Whether the model is an artifact's folder."""
        return is_artifact(Path(self.model))

    def setting(self, notice: Callable[[str], None]) -> Setting:
        """The setting that this asks for, every choice checked; masks are not known yet.

        Args:
            notice: told of metrics that cannot be had.

        Raises:
            RecacheError: naming the choice that cannot be used.
        """
        chosen = self._of_artifact() if self.is_artifact else self._of_model(notice)
        model = str(chosen["model"])
        self._check_policies(chosen["num_steps"])
        if self.workers and torch.device(chosen["device"]).index:
            raise ModelError(
                f"--device {chosen['device']}: Ray gives workers their GPUs; ask for cuda, or for no --workers"
            )
        if self.metrics is None:
            metrics = usual_metrics(model, notice)
        else:
            metrics = tuple(dict.fromkeys(self.metrics))
            if not metrics:
                raise ModelError("metrics: none is named; choose psnr or others, or leave the option out")
            for name in metrics:
                judge_of(name, model)
        if self.reference is not None:
            if "fid" not in metrics:
                raise ModelError(
                    f"--reference {self.reference}: is for metric fid, which is not among {', '.join(metrics)}"
                )
            pictures_in(self.reference)
        embedded = None if self.is_artifact else find(model)  # of other models one at a time, as speed is told of
        batch = self.batch_size or min(self.samples, embedded.batch_size if embedded else 1)
        return Setting(
            **chosen, prompts=captions_of(model, self.prompts), batch_size=batch, seed=self.seed, metrics=metrics
        )

    def _check_policies(self, num_steps: int) -> None:
        """Raise for budgets that cannot be, and for policies that have no schedule for one.

        Raises:
            ScheduleError: naming it.
        """
        budgets = self.budgets or (() if self.is_artifact else BUDGETS)
        if budgets:
            check_budgets(budgets, num_steps)
        for name in self.policies or ():
            policy = None if name == "auto" else get_policy(name, num_steps)
            if policy is not None and not isinstance(policy, CALIBRATED):
                make_schedules(policy, budgets, Problem(num_steps, Reuse()))

    def _of_model(self, notice: Callable[[str], None]) -> dict[str, Any]:
        """What a model will be compiled with."""
        wishes = {name: getattr(self, name) for name in USUAL}
        chosen = {name: USUAL[name] if wish is None else wish for name, wish in wishes.items()}
        compile_options(
            (chosen["num_steps"],), chosen["num_steps"], chosen["forecaster"], chosen["order"], "uniform",
            chosen["granularity"], True,
        )  # fmt: skip
        if chosen["forecaster"] == "reuse":
            chosen["order"] = 0
        device = usable_device(self.device)
        chosen["runtime"] = runtime_on(chosen["runtime"], device, notice).name
        place = {"artifact": "", "digest": "", "device": str(device)}
        return chosen | place | {"model": absolute(self.model), "call": dict(self.call)}

    def _of_artifact(self) -> dict[str, Any]:
        """What an artifact was compiled with.

        Raises:
            ModelError: the user wants something else.
        """
        manifest = check(Path(self.model))
        facts = manifest.description
        if facts.model == facts.model_class.rpartition(".")[2]:
            raise ModelError(
                f"{self.model}: was compiled from Python and does not tell its pipeline; evaluate the pipeline's folder or"
                " Hub id instead, with --policy and the artifact's steps"
            )
        chosen = {name: getattr(facts, name) for name in USUAL}
        for name, value in chosen.items():
            wish = getattr(self, name)
            if wish not in (None, value, "auto" if name == "runtime" else value):
                option = {"num_steps": "steps"}.get(name, name)
                raise ModelError(
                    f"--{option} {wish}: {self.model} was compiled with {value}; leave it out, or evaluate the model"
                )
        place = {"artifact": str(Path(self.model).resolve()), "digest": manifest.digest}
        device = str(usable_device(self.device or manifest.device))
        call = {name: value for name, value in facts.call.items() if not name.startswith("prompt")}
        return chosen | place | {"model": facts.model, "device": device, "call": call | dict(self.call)}
