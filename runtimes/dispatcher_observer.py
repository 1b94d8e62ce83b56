"""A dispatcher that looks at what it caches: how much every cache site's feature changes from step to step."""

from collections.abc import Sequence
from typing import Any

import torch

from recache_compile.ir.forecasters import Taylor
from recache_compile.ir.plan import make_plan
from recache_compile.ir.schedule import Schedule
from recache_compile.ir.signature import Signature
from recache_compile.runtimes.base import Revision, Variant
from recache_compile.runtimes.dispatcher import Dispatcher


class Watch(Dispatcher):
    """Recomputes every step and compares each feature with that of the step before.

    Only two steps' features are held at a time.

    Args:
        sites: number of cache sites.
        num_steps: length T of the denoising loop.
        variants, signature, revision: as of `Dispatcher`.
    """

    def __init__(
        self,
        sites: int,
        num_steps: int,
        variants: Sequence[Variant],
        signature: Signature,
        revision: Revision | None = None,
    ) -> None:
        forecaster = Taylor(1)  # two anchors: this step and the one before
        plan = make_plan(Schedule.every(num_steps), forecaster, sites)
        super().__init__(plan, forecaster, variants, signature, revision)
        self._found: dict[tuple[int, int], list[torch.Tensor]] = {}

    def __call__(self, *, step: int, branch: str = "", **model_inputs: Any) -> Any:
        """See `Dispatcher`."""
        _, state = self._state(branch, step, model_inputs)
        result = super().__call__(step=step, branch=branch, **model_inputs)
        if step > state.start:
            now, past = (state.steps[at - state.start].slot for at in (step, step - 1))
            for site in {site for site, _ in state.history}:
                feature, before = (state.history[site, slot].float() for slot in (now, past))
                change = (feature - before).abs().mean() / before.abs().mean().clamp(min=1e-12)
                self._found.setdefault((step, site or 0), []).append(change)
        return result

    def changes(self) -> list[list[float | None]]:
        """Relative L1 change |F_i - F_(i-1)| / |F_(i-1)| by site and step, the mean over guidance branches.

        That of TeaCache (arXiv 2411.19108, equation 4); None where a step was not run.
        """
        sites = 1 + max((site for _, site in self._found), default=-1)
        return [
            [
                float(torch.stack(self._found[step, site]).mean()) if (step, site) in self._found else None
                for step in range(len(self.plan.steps))
            ]
            for site in range(sites)
        ]
