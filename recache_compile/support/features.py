"""What statistics of features have in common."""

from torch import Tensor


def relative_change(now: Tensor, past: Tensor) -> Tensor:
    """Relative L1 change |now - past| / |past| of a feature, a float32 scalar on its device.

    That of TeaCache (arXiv 2411.19108, equation 4), which compares consecutive steps.

    Args:
        now, past: of one shape, whatever it is.
    """
    now, past = now.float(), past.float()
    return (now - past).abs().mean() / past.abs().mean().clamp(min=1e-12)
