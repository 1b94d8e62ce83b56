"""The Plackett-Luce distribution over subsets: items are drawn one after another without replacement."""

import functools
import math

import torch
from torch import Tensor

NODES = 200
"""Of the quadrature for `set_log_probability`; so many are exact to 1e-11 for up to 200 items."""


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


def set_log_probability(logits: Tensor, items: Tensor, nodes: int = NODES) -> Tensor:
    """log p of drawing these items in any order (count,).

    p(S) = int_0^1 prod_(i in S) (1 - u^exp(theta_i - phi)) du with phi the logsumexp over
    the items outside S, by quadrature.

    Args:
        logits: (items,).
        items: (count, size) item numbers.
        nodes: of the quadrature.
    """
    if items.shape[1] in (0, len(logits)):
        return logits.double().sum() * torch.zeros(len(items), dtype=torch.float64)
    places, log_weights = _quadrature(nodes)
    others = logits.double().expand(len(items), -1).scatter(1, items, -math.inf).logsumexp(1, keepdim=True)
    rates = (logits.double()[items] - others).clamp(max=700).exp()
    factors = torch.log(-torch.expm1((rates[:, :, None] * places).clamp(max=-1e-300)))
    return (factors.sum(1) + log_weights).logsumexp(1)


@functools.cache
def _quadrature(nodes: int) -> tuple[Tensor, Tensor]:
    """log u at the nodes, and the logarithms of their weights: the trapezoidal rule in x, u = exp(-t).

    t = exp(x - exp(-x)) is the double exponential formula of Takahasi and Mori (1974) for
    integrals over t > 0 that fall like exp(-t).
    """
    x = torch.linspace(-3.8, 7.8, nodes, dtype=torch.float64)
    t = (x - (-x).exp()).exp()
    return -t, t.log() - t + (-x).exp().log1p() + math.log((x[1] - x[0]).item())


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the first draw in nats; log(items) where all are equally likely."""
    return torch.distributions.Categorical(logits=logits).entropy()
