"""The Plackett-Luce distribution over subsets: items are drawn one after another without replacement."""

import functools
import math

import numpy as np
import torch
from torch import Tensor

NODES = 200
"""Of the Gauss-Legendre rule for `set_log_probability`."""


def sample(logits: Tensor, size: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw ordered subsets by perturbing the logits with Gumbel noise (Gumbel-top-k, arXiv 1903.06059).

    Args:
        logits: (items,).
        size: items in each subset.
        count: number of subsets.
        generator: source of the noise.

    Returns:
        Item numbers (count, size), in the order in which they were drawn.
    """
    uniform = torch.rand(count, len(logits), generator=generator, dtype=torch.float64)
    gumbel = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
    return (logits.detach().double() + gumbel).topk(size, dim=1).indices


def ordered_log_probability(logits: Tensor, items: Tensor) -> Tensor:
    """log p of drawing these items in this order (count,).

    Args:
        logits: (items,).
        items: (count, size) item numbers.
    """
    chosen = logits.double()[items]
    others = logits.double().expand(len(items), -1).scatter(1, items, -math.inf).logsumexp(1, keepdim=True)
    left = torch.cat([others, chosen.flip(1)], 1).logcumsumexp(1)[:, 1:].flip(1)
    return (chosen - left).sum(1)


def set_log_probability(logits: Tensor, items: Tensor) -> Tensor:
    """log p of drawing these items in any order (count,).

    p(S) = int_0^1 prod_(i in S) (1 - u^exp(theta_i - phi)) du with phi the logsumexp over
    the items outside S, by Gauss-Legendre quadrature after u = v^8.

    Args:
        logits: (items,).
        items: (count, size) item numbers.
    """
    if items.shape[1] in (0, len(logits)):
        return logits.double().sum() * torch.zeros(len(items), dtype=torch.float64)
    nodes, log_weights = _quadrature()
    others = logits.double().expand(len(items), -1).scatter(1, items, -math.inf).logsumexp(1, keepdim=True)
    rates = (logits.double()[items] - others).exp()
    factors = torch.log(-torch.expm1((rates[:, :, None] * nodes).clamp(max=-1e-300)))
    return (factors.sum(1) + log_weights).logsumexp(1)


@functools.cache
def _quadrature() -> tuple[Tensor, Tensor]:
    """log u at the nodes, and the logarithms of their weights, du = 8 v^7 dv included."""
    points, weights = np.polynomial.legendre.leggauss(NODES)
    v = torch.from_numpy((points + 1) / 2)
    return 8 * v.log(), torch.from_numpy(weights / 2).log() + math.log(8) + 7 * v.log()


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the first draw in nats; log(items) where all are equally likely."""
    return torch.distributions.Categorical(logits=logits).entropy()
