"""An independent eager reference: forward hooks on the original module, forecasts on features.

It shares no code with the product: features are kept as difference tables, updated as the
papers' own recursions say, where the product keeps raw anchors and weights; what depends on
the latents, and which input a block adds to, is found by changing inputs and looking at
outputs, where the product reads a graph.
"""

import inspect
from collections.abc import Mapping
from itertools import pairwise
from math import factorial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def hermite(n: int, x: float) -> float:
    """Physicists' Hermite polynomial by its three-term recurrence."""
    before, now = 0.0, 1.0
    for i in range(n):
        before, now = now, 2 * x * now - 2 * i * before
    return now


class FeatureHistory:
    """The past of one feature and its forecast, in double precision."""

    def __init__(self, forecaster: str, order: int) -> None:
        self.forecaster, self.order = forecaster, order
        self.table: list[Tensor] = []
        self.anchors: list[tuple[int, Tensor]] = []

    def store(self, step: int, feature: Tensor) -> None:
        feature = feature.double()
        table = [feature]
        if self.anchors:
            gap = step - self.anchors[-1][0]
            for older in self.table[: self.order]:
                table.append((table[-1] - older) / gap)
        self.table = table
        self.anchors.append((step, feature))

    def forecast(self, step: int) -> Tensor:
        x = step - self.anchors[-1][0]
        if self.forecaster == "reuse":
            return self.table[0]
        if self.forecaster == "taylor":
            return sum(x**i / factorial(i) * term for i, term in enumerate(self.table))
        if self.forecaster == "hicache":
            return sum(0.5**i * hermite(i, 0.5 * x) / factorial(i) * term for i, term in enumerate(self.table))
        return self._newton(step)

    def _newton(self, step: int) -> Tensor:
        """Newton's divided differences, newest anchor first."""
        points = self.anchors[-(self.order + 1) :][::-1]
        column = [feature for _, feature in points]
        value, product = column[0], 1.0
        for width in range(1, len(points)):
            column = [
                (after - before) / (points[i + width][0] - points[i][0])
                for i, (before, after) in enumerate(pairwise(column))
            ]
            product *= step - points[width - 1][0]
            value = value + product * column[0]
        return value


class CachedReference:
    """Runs a module with what its blocks return replaced by forecasts on cached steps.

    Args:
        module: the original.
        inputs: arguments of one call.
        latents: names of the noisy inputs, dotted where they are nested.
        recompute_steps: the other steps are cached.
        increments: forecast what a block adds to its input; else what it returns.
        names: of the modules whose results are cached; by default the blocks, which are the
            outermost members of module lists.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Mapping[str, Any],
        latents: tuple[str, ...],
        recompute_steps: tuple[int, ...],
        forecaster: str = "taylor",
        order: int = 1,
        increments: bool = False,
        names: tuple[str, ...] = (),
    ) -> None:
        self.module, self.recompute_steps, self.increments = module, recompute_steps, increments
        self.forecaster, self.order = forecaster, order
        self.step = 0
        self.histories: dict[tuple[str, int], FeatureHistory] = {}
        self.bases: dict[tuple[str, int], int | None] = {}
        self.blocks = {name: module.get_submodule(name) for name in names} or dict(outermost_list_members(module))
        self.dependent = self._dependent_results(inputs, latents)

    def __call__(self, step: int, **inputs: Any) -> tuple[Any, ...]:
        self.step = step
        handles = [
            block.register_forward_hook(
                lambda block, args, kwargs, result, name=name: self._hook(name, block, args, kwargs, result),
                with_kwargs=True,
            )
            for name, block in self.blocks.items()
        ]
        try:
            return self._call(inputs)
        finally:
            for handle in handles:
                handle.remove()

    def _call(self, inputs: Mapping[str, Any]) -> Any:
        plain = {"return_dict": False} if "return_dict" in inspect.signature(self.module.forward).parameters else {}
        return self.module(**inputs, **plain)

    def _hook(self, name: str, block: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
        leaves, spec = pytree.tree_flatten(result)
        for number, leaf in enumerate(leaves):
            key = (name, number)
            if key not in self.dependent:
                continue
            base = self._base(key, block, args, kwargs, leaf) if self.increments else 0.0
            if self.step in self.recompute_steps:
                history = self.histories.setdefault(key, FeatureHistory(self.forecaster, self.order))
                history.store(self.step, leaf.double() - base)
            else:
                leaves[number] = (base + self.histories[key].forecast(self.step)).to(leaf.dtype)
        return pytree.tree_unflatten(leaves, spec)

    def _base(self, key: tuple[str, int], block: nn.Module, args: Any, kwargs: Any, result: Tensor) -> Any:
        """The input that a result is a sum with: a change of it arrives in the result as it is."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if key not in self.bases:
            self.bases[key] = None
            for number, leaf in enumerate(leaves):
                if not isinstance(leaf, Tensor) or leaf.shape != result.shape or not leaf.is_floating_point():
                    continue
                change = 1e-4 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(number))
                changed = [*leaves[:number], leaf + change, *leaves[number + 1 :]]
                args, kwargs = pytree.tree_unflatten(changed, spec)
                effect = pytree.tree_leaves(block.forward(*args, **kwargs))[key[1]] - result
                if abs(float((effect * change).sum() / change.square().sum()) - 1) < 0.4:
                    self.bases[key] = number
                    break
        number = self.bases[key]
        return 0.0 if number is None else leaves[number].double()

    def _dependent_results(self, inputs: Mapping[str, Any], latents: tuple[str, ...]) -> set[tuple[str, int]]:
        """Which results of which blocks change with the latents."""
        first, second = self._block_results(inputs), self._block_results(changed_latents(inputs, latents, 0.5))
        return {key for key, value in first.items() if not torch.equal(value, second[key])}

    def _block_results(self, inputs: Mapping[str, Any]) -> dict[tuple[str, int], Tensor]:
        results: dict[tuple[str, int], Tensor] = {}

        def keep(name: str, result: Any) -> None:
            for number, leaf in enumerate(pytree.tree_leaves(result)):
                if isinstance(leaf, Tensor):
                    results[name, number] = leaf.clone()

        handles = [
            block.register_forward_hook(lambda block, args, result, name=name: keep(name, result))
            for name, block in self.blocks.items()
        ]
        self._call(inputs)
        for handle in handles:
            handle.remove()
        return results


def outermost_list_members(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """The members of the module lists that are not inside a member of another one."""
    found = []
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            found += [(f"{prefix}{name}.{number}", member) for number, member in enumerate(child)]
        else:
            found += outermost_list_members(child, f"{prefix}{name}.")
    return found


def changed_latents(
    inputs: Mapping[str, Any], latents: tuple[str, ...], amount: float, seed: int = 0
) -> dict[str, Any]:
    """The same arguments with noise added to the latents."""
    generator = torch.Generator().manual_seed(seed)

    def change(path: Any, leaf: Any) -> Any:
        name = ".".join(str(getattr(key, "key", getattr(key, "idx", ""))) for key in path)
        return leaf + amount * torch.randn(leaf.shape, generator=generator) if name in latents else leaf

    return pytree.tree_map_with_path(change, dict(inputs))
