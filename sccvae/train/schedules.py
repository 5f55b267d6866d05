"""Schedules counted in optimiser steps, so that they end whatever the number of cells and epochs."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Optimiser steps that the default number of epochs aims at, and the fewest and most epochs it gives.
DEFAULT_STEPS, MIN_EPOCHS, MAX_EPOCHS = 6000, 20, 400


def default_max_epochs(steps_per_epoch: int) -> int:
    """Epochs for about :data:`DEFAULT_STEPS` optimiser steps: small data see more epochs, large data fewer.

    Parameters
    ----------
    steps_per_epoch
        Mini-batches of an epoch.

    Returns
    -------
    Epochs, from 20 to 400.
    """
    return min(MAX_EPOCHS, max(MIN_EPOCHS, math.ceil(DEFAULT_STEPS / max(1, steps_per_epoch))))


def default_sizes(n_cells: int) -> dict[str, int]:
    """Width of the hidden layers, and latent dimensions, that suit so many cells.

    A wide network overfits few cells, and moves a type that only one batch holds onto others (500 cells of pancreas);
    more latent dimensions reduce this. Many cells are of many types, some of which a narrow network merges (60
    simulated types in 8,000 cells: the neighbours in other batches are of the same type for 0.86 of the cells with 64
    units, 0.97 with 128, 0.99 with 256); more dimensions help these a little, and harm sets of blood cells as much.

    Parameters
    ----------
    n_cells
        Cells of the data.

    Returns
    -------
    ``n_hidden``: 64 below 1,000 cells, 128 below 5,000, else 256; ``n_latent``: 20 below 1,000 cells, else 10.
    """
    if n_cells < 1_000:
        return {"n_hidden": 64, "n_latent": 20}
    return {"n_hidden": 128 if n_cells < 5_000 else 256, "n_latent": 10}


@dataclass(frozen=True)
class Schedule:
    """Weight of the KL terms and factor of the learning rate at each optimiser step.

    The KL weight rises linearly and stays at its target; the learning rate rises over the first hundredth of the
    steps and
    falls along a cosine to a hundredth of its height. scvi-tools counts its warm-up in epochs (400), which large data
    never reach; this one ends after ``kl_warmup`` of the steps there are.

    Parameters
    ----------
    total_steps
        Optimiser steps of the whole training.
    kl_weight
        Target of the KL weight; 1 is the ELBO.
    kl_warmup
        Share of all steps (0 to 1) after which the target is reached.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    total_steps: int
    kl_weight: float = 1.0
    kl_warmup: float = 0.2

    def __post_init__(self) -> None:
        if self.total_steps < 1 or self.kl_weight < 0 or not 0 <= self.kl_warmup <= 1:
            msg = f"{self}: needs total_steps >= 1, kl_weight >= 0 and kl_warmup between 0 and 1."
            raise ValueError(msg)

    @property
    def warmup_steps(self) -> int:
        """Steps until the KL weight is at its target."""
        return round(self.kl_warmup * self.total_steps)

    def kl(self, step: int) -> float:
        """KL weight at optimiser step ``step`` (0, 1, ...)."""
        return self.kl_weight * min(1.0, (step + 1) / max(1, self.warmup_steps))

    def late(self, step: int) -> float:
        """Factor, 0 to 1, of penalties that wait for the KL weight: it then rises over as many steps as that took."""
        n = self.warmup_steps
        return min(1.0, max(0.0, (step + 1 - n) / n)) if n else 1.0

    def lr(self, step: int) -> float:
        """Factor of the learning rate at optimiser step ``step``."""
        rise = max(1, self.total_steps // 100)
        if step < rise:
            return (step + 1) / rise
        done = min(1.0, (step - rise) / max(1, self.total_steps - rise))
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))

    def at(self, step: int) -> dict[str, float]:
        """``kl_weight``, ``late`` and ``lr`` at optimiser step ``step``."""
        return {"kl_weight": self.kl(step), "late": self.late(step), "lr": self.lr(step)}
