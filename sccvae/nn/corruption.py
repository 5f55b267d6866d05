"""What a denoising autoencoder does to its input while training; the target stays clean."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sccvae._rows import SparseRows


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

    def forward(self, x: Tensor | SparseRows) -> Tensor | SparseRows:
        """Corrupt x, any shape."""
        if not (self.training and self.level):
            return x
        return self._masked(x) if isinstance(x, Tensor) else x.map(self._masked)

    def _masked(self, values: Tensor) -> Tensor:
        return values * (torch.rand_like(values) >= self.level)


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
