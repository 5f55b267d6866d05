"""A toy whose geometry is known exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from anndata import AnnData

_N_DIMS = 16
_CLASSES = ("A", "B", "C", "D", "E")
_CONDITIONS = ("control", "treated")
_CLASS_RADIUS = 8.0  # distance of each class centre from the origin, in noise standard deviations
_SHIFT_LENGTH = 6.0  # so 8 * sqrt(2) = 11.3 between classes, 6 between the conditions of a class


def blobs(n_per_group: int = 200, seed: int = 0) -> AnnData:
    r"""Gaussian blobs in 16 dimensions: 5 classes, each under 2 conditions.

    .. math:: x = \mu_{class} + [condition = treated] \, \delta + \varepsilon, \quad \varepsilon \sim N(0, I)

    The class centres :math:`\mu` and the shift :math:`\delta` lie in orthogonal random directions: classes are
    11.3 apart, the conditions of one class 6, in units of the noise. So a model that keeps the class and forgets the
    condition should recover ``obsm["truth"]`` up to an invertible map.

    Parameters
    ----------
    n_per_group
        Samples of each class under each condition.
    seed
        Seed of the directions, the noise and the order of the rows.

    Returns
    -------
    AnnData of ``10 * n_per_group`` samples x 16, rows in random order:

    - ``X``: float32, dense
    - ``obs["class"]``: ``"A"`` to ``"E"``; ``obs["condition"]``: ``"control"`` or ``"treated"``
    - ``obsm["truth"]``: float32, the same samples without the shift of the condition
    - ``uns["blobs"]``: ``class_centers`` (5, 16), ``condition_shift`` (16,), ``noise_sd`` and ``seed``

    Raises
    ------
    ValueError
        If ``n_per_group`` is less than 1.
    """
    import pandas as pd
    from anndata import AnnData

    if n_per_group < 1:
        msg = f"n_per_group={n_per_group} leaves the groups empty: give 1 or more."
        raise ValueError(msg)
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.normal(size=(_N_DIMS, _N_DIMS)))[0].T  # (16, 16), orthonormal rows
    centers = _CLASS_RADIUS * directions[: len(_CLASSES)]  # (5, 16)
    shift = _SHIFT_LENGTH * directions[len(_CLASSES)]  # (16,)

    groups = rng.permutation(np.repeat(np.arange(len(_CLASSES) * len(_CONDITIONS)), n_per_group))
    classes, conditions = np.divmod(groups, len(_CONDITIONS))
    truth = centers[classes] + rng.normal(size=(len(groups), _N_DIMS))
    x = truth + conditions[:, None] * shift

    obs = pd.DataFrame(
        {
            "class": pd.Categorical.from_codes(classes, categories=list(_CLASSES)),
            "condition": pd.Categorical.from_codes(conditions, categories=list(_CONDITIONS)),
        },
        index=[f"sample-{i}" for i in range(len(groups))],
    )
    notes = {"class_centers": centers, "condition_shift": shift, "noise_sd": 1.0, "seed": seed}
    return AnnData(
        x.astype(np.float32),
        obs=obs,
        var=pd.DataFrame(index=[f"x{i}" for i in range(_N_DIMS)]),
        obsm={"truth": truth.astype(np.float32)},
        uns={"blobs": notes},
    )
