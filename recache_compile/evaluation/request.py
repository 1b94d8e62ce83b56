"""What a user asks of `evaluate`, checked before anything takes long."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from recache_compile.artifact.manifest import is_artifact
from recache_compile.artifact.store import check
from recache_compile.config import CompileConfig
from recache_compile.errors import ModelError
from recache_compile.evaluation.metrics import judge_of, pictures_in, usual_metrics
from recache_compile.evaluation.setting import Setting
from recache_compile.ir.forecasters import Reuse, anchors_of, check_forecaster
from recache_compile.ir.schedule import check_budgets
from recache_compile.models.registry import find
from recache_compile.pipelines.load import absolute
from recache_compile.pipelines.prompts import captions_of
from recache_compile.policies.base import Problem, make_schedules
from recache_compile.policies.registry import CALIBRATED, get_policy
from recache_compile.runtimes.registry import runtime_on
from recache_compile.support.devices import usable_device

log = logging.getLogger(__name__)

BUDGETS = (5, 10, 15)
POLICIES = ("auto", "uniform")
"""What is evaluated of a model where the user does not say."""
OPTIONS = {"num_steps": "steps"}
"""Names of options that differ from those of the choices."""


@dataclass(frozen=True, slots=True)
class EvaluationRequest:
    """What the user asked for; None: the usual, or what an artifact was compiled with.

    Args:
        model: what `compile` takes, or an artifact's folder.
        budgets: numbers of recompute steps k.
        policies: names, as for `compile`; of an artifact's own schedules without any.
        config: what engines are built with, and where they run; see `base_config`.
        forecaster: fills the cached steps.
        order: its polynomial order m.
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
    config: CompileConfig | None = None
    forecaster: str | None = None
    order: int | None = None
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

    def setting(self) -> Setting:
        """The setting that this asks for, every choice checked; masks are not known yet.

        Metrics that cannot be had are told to the log.

        Raises:
            RecacheError: naming the choice that cannot be used.
        """
        place = self._of_artifact() if self.is_artifact else self._of_model()
        self._check_policies(place.config.num_steps)
        if self.workers and torch.device(place.config.device).index:
            raise ModelError(
                f"--device {place.config.device}: Ray gives workers their GPUs; ask for cuda, or for no --workers"
            )
        metrics = self._metrics(place.model)
        embedded = None if self.is_artifact else find(place.model)  # of other models one at a time, as speed is told of
        batch = self.batch_size or min(self.samples, embedded.batch_size if embedded else 1)
        prompts = captions_of(place.model, self.prompts)
        return replace(place, prompts=prompts, batch_size=batch, seed=self.seed, metrics=metrics)

    def _metrics(self, model: str) -> tuple[str, ...]:
        """The metrics that are asked for, or the usual ones; and a reference that fits them."""
        if self.metrics is None:
            metrics = usual_metrics(model)
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
        return metrics

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

    def _of_model(self) -> Setting:
        """What a model will be compiled with."""
        config = self.config or CompileConfig()
        forecaster, order = self.forecaster or "taylor", 1 if self.order is None else self.order
        check_forecaster(forecaster, order)
        anchors = anchors_of(forecaster, order)
        device = usable_device(None if self.config is None else self.config.device)
        runtime = runtime_on(config.runtime, device, log.info).name
        config = replace(config, anchors=anchors, runtime=runtime, device=str(device))
        return Setting(absolute(self.model), "", "", config, forecaster, anchors - 1, (), 1)

    def _of_artifact(self) -> Setting:
        """What an artifact was compiled with.

        Raises:
            ModelError: the user wants something else.
        """
        manifest = check(Path(self.model))
        facts = manifest.description
        if facts.model == facts.model_class.rpartition(".")[2]:
            raise ModelError(
                f"{self.model}: was compiled from Python and does not tell its pipeline; evaluate the pipeline's folder"
                " or Hub id instead, with --policy and the artifact's steps"
            )
        wished = self.config or base_config(self.model)
        known = {"forecaster": manifest.forecaster.name, "order": manifest.forecaster.order}
        wishes = {"forecaster": self.forecaster, "order": self.order}
        for name in ("num_steps", "granularity", "runtime", "dtype", "component"):
            known[name], wishes[name] = getattr(facts.config, name), getattr(wished, name)
        for name, value in known.items():
            if wishes[name] not in (None, value, "auto" if name == "runtime" else value):
                raise ModelError(
                    f"--{OPTIONS.get(name, name)} {wishes[name]}: {self.model} was compiled with {value}; leave it out,"
                    " or evaluate the model"
                )
        device = str(usable_device(wished.device))
        config = replace(facts.config, device=device, call=_promptless(facts.config.call) | dict(wished.call))
        place = str(Path(self.model).resolve()), manifest.digest
        return Setting(facts.model, *place, config, manifest.forecaster.name, manifest.forecaster.order, (), 1)


def base_config(model: str) -> CompileConfig:
    """The choices that wishes are changes of: an artifact's, or the defaults on this machine's device.

    Args:
        model: what `compile` takes, or an artifact's folder.
    """
    if is_artifact(Path(model)):
        manifest = check(Path(model))
        config = manifest.description.config
        return replace(config, device=manifest.device, call=_promptless(config.call))
    return CompileConfig(device=str(usable_device()))


def _promptless(call: Mapping[str, Any]) -> dict[str, Any]:
    """A pipeline call without its prompt: samples have captions of their own."""
    return {name: value for name, value in call.items() if not name.startswith("prompt")}
