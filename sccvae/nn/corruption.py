"""What is done to an encoder's input while training; the target stays clean."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GaussianNoise(nn.Module):
    """Add N(0, level) to each value while training; the identity in evaluation.

    Parameters
    ----------
    level
        Standard deviation of the noise, in units of the input.
    """

    def __init__(self, level: float = 0.1) -> None:
        super().__init__()
        self.level = level

    def forward(self, x: Tensor) -> Tensor:
        """Corrupt x, any shape."""
        return x + self.level * torch.randn_like(x) if self.training else x


class Masking(nn.Module):
    """Set each value to zero with probability ``level`` while training, without rescaling; else the identity.

    Parameters
    ----------
    level
        Probability in [0, 1).

    Raises
    ------
    ValueError
        If the level is out of range.
    """

    def __init__(self, level: float = 0.1) -> None:
        super().__init__()
        if not 0 <= level < 1:
            msg = f"masking={level} must be at least 0 and below 1."
            raise ValueError(msg)
        self.level = level

    def forward(self, x: Tensor) -> Tensor:
        """Corrupt x, any shape."""
        return x * (torch.rand_like(x) >= self.level) if self.training and self.level else x


class InputDropout(nn.Module):
    """Set each value to zero with probability ``level`` while training, and rescale the others; else the identity.

    As :class:`torch.nn.Dropout`, but a random byte decides on a value: for thousands of genes on a CPU that takes a
    quarter of the time. So the probability is rounded to 1/256; the factor of the values that stay is exact.

    Parameters
    ----------
    level
        Probability in [0, 1).

    Raises
    ------
    ValueError
        If the level is out of range.
    """

    def __init__(self, level: float) -> None:
        super().__init__()
        if not 0 <= level < 1:
            msg = f"input_dropout={level} must be at least 0 and below 1."
            raise ValueError(msg)
        self.level = level
        self.dropped = min(round(256 * level), 255)  # of 256

    @classmethod
    def of(cls, level: float | None, support: str) -> InputDropout:
        """The one asked for; for None half of the counts are dropped, and nothing of other data (by ``support``)."""
        return cls((0.5 if support == "counts" else 0.0) if level is None else level)

    def forward(self, x: Tensor) -> Tensor:
        """Drop values of x, any shape."""
        if not self.training or not self.dropped:
            return x
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        kept = words.view(torch.uint8)[: x.numel()].view(x.shape) >= self.dropped
        return x * kept.to(x.dtype).mul_(256 / (256 - self.dropped))


def as_corruption(noise: str | None, level: float) -> nn.Module:
    """The corruption called ``noise``: ``"gaussian"``, ``"mask"`` or None for none.

    Parameters
    ----------
    noise
        Its name.
    level
        Standard deviation of the noise, or probability of masking.

    Returns
    -------
    A module that corrupts its input while it trains.

    Raises
    ------
    ValueError
        If the name is not known, or the level does not fit it.
    """
    if noise is None:
        return nn.Identity()
    fits = {"gaussian": level >= 0, "mask": 0 <= level < 1}
    if not fits.get(noise, False):
        msg = (
            f"noise={noise!r} with noise_level={level}: choose 'gaussian' (level >= 0), 'mask' (0 <= level < 1) or "
            "None."
        )
        raise ValueError(msg)
    return GaussianNoise(level) if noise == "gaussian" else Masking(level)
