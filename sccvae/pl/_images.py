"""Grids of images: as given, reconstructed, generated, and the centres of a learned prior."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from ._style import SMALL, bare, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANEL, _GAP, _TITLE = 0.72, 0.06, 0.2  # inches: width of one image, space between two, height of a title


def images(
    adata: Any,
    *,
    image_shape: Sequence[int] | None = None,
    titles: Sequence[str] | None = None,
    ncols: int = 10,
    n: int = 100,
    cmap: str = "gray",
) -> np.ndarray:
    """Draw images side by side, all on one scale of grey.

    Parameters
    ----------
    adata
        AnnData with one image per row, or array of shape (images, pixels) or (images, height, width).
    image_shape
        (height, width), or (height, width, 3) for colour. ``None`` takes ``adata.uns["image_shape"]``, and without
        one a square, if the number of pixels is one.
    titles
        One short text per image.
    ncols
        Images in a row.
    n
        At most so many are drawn, the first ones.
    cmap
        Matplotlib colour map; ``"gray_r"`` prints dark on white. The scale is [0, 1] where the values lie in it, else
        from the least to the greatest. They may leave it by a tenth, as means of a normal likelihood do, and a
        hundredth on either side by more.

    Returns
    -------
    One-dimensional array of Axes, one per image.

    Raises
    ------
    ValueError
        If there is no image, its shape is not known or does not fit, titles and images differ in number, or ``n`` or
        ``ncols`` is not positive.
    """
    if n < 1 or ncols < 1:
        msg = f"n={n} and ncols={ncols} must be at least 1."
        raise ValueError(msg)
    pictures = _pictures(_rows(adata[:n]), _shape(adata, image_shape))
    if titles is not None:
        titles = list(titles)[: len(pictures)]
        if len(titles) != len(pictures):
            msg = f"There are {len(pictures)} images to draw, but {len(titles)} titles."
            raise ValueError(msg)
    ncols = min(ncols, len(pictures))
    return _draw(pictures, ncols=ncols, titles=titles, cmap=cmap)


def reconstructions(
    model: Any, adata: Any, *, n: int = 10, image_shape: Sequence[int] | None = None, cmap: str = "gray"
) -> np.ndarray:
    """Draw images above what the model makes of them.

    Parameters
    ----------
    model
        Trained on images; its ``get_normalized_expression`` gives the mean of p(x|z).
    adata
        Images of shape (images, pixels) in ``X``. ``n`` rows spread evenly over it are taken.
    n
        Number of images.
    image_shape, cmap
        As in :func:`images`.

    Returns
    -------
    Array of Axes of shape (2, n): originals, reconstructions.

    Raises
    ------
    ValueError
        As :func:`images`.
    """
    rows = np.unique(np.linspace(0, adata.n_obs - 1, min(n, adata.n_obs)).astype(int))
    shape = _shape(adata, image_shape)
    original = _rows(adata[rows])
    rebuilt = np.asarray(model.get_normalized_expression(adata, indices=rows, return_numpy=True), dtype=float)
    pictures = np.concatenate([_pictures(original, shape), _pictures(rebuilt, shape)])
    axes = _draw(pictures, ncols=len(rows), cmap=cmap, row_labels=("original", "reconstruction"))
    return axes.reshape(2, len(rows))


def generated(
    model: Any,
    *,
    n: int = 100,
    ncols: int = 10,
    batch: str | None = None,
    mean: bool = True,
    seed: int = 0,
    image_shape: Sequence[int] | None = None,
    cmap: str = "gray",
) -> np.ndarray:
    """Draw images that the model makes up.

    Parameters
    ----------
    model
        A trained model with ``sample``.
    n, ncols
        Number of images, and how many in a row.
    batch
        Condition to sample under, where the model has one. ``None`` leaves the choice to the model.
    mean
        Draw the means of p(x|z), smooth; otherwise samples of it, with the noise of the likelihood.
    seed
        Seed of the draw.
    image_shape, cmap
        As in :func:`images`.

    Returns
    -------
    One-dimensional array of Axes, one per image.

    Raises
    ------
    ValueError
        If the model has no prior, as an autoencoder, and as :func:`images`.
    """
    if not hasattr(model, "sample"):
        msg = f"{type(model).__name__} has no prior to draw from: generate with a VAE or a CVAE."
        raise ValueError(msg)
    condition = {} if batch is None else {"batch": batch}
    drawn = model.sample(n, mean=mean, seed=seed, **condition)
    return images(drawn, image_shape=image_shape, ncols=ncols, n=n, cmap=cmap)


def prior_centers(
    model: Any, *, ncols: int = 5, image_shape: Sequence[int] | None = None, cmap: str = "gray"
) -> np.ndarray:
    """Draw the decoded centre of each blob of a learned prior p(z|c), under the name of its condition.

    Parameters
    ----------
    model
        A trained model with a learned prior; its ``prior_centers()`` gives one row per condition.
    ncols
        Images in a row.
    image_shape, cmap
        As in :func:`images`.

    Returns
    -------
    One-dimensional array of Axes, one per condition.

    Raises
    ------
    ValueError
        If the model has no learned prior, and as :func:`images`.
    """
    if not hasattr(model, "prior_centers"):
        msg = f'{type(model).__name__} has no learned prior to draw: make the model with CVAE(adata, prior="learned").'
        raise ValueError(msg)
    centers = model.prior_centers()
    names = centers.obs.astype(str).agg(", ".join, axis=1) if centers.obs.shape[1] else centers.obs_names
    return images(centers, image_shape=image_shape, titles=list(names), ncols=ncols, n=centers.n_obs, cmap=cmap)


def _rows(x: Any) -> np.ndarray:
    """Dense values, one row per image; AnnData and sparse matrices included."""
    values = x.X if hasattr(x, "X") else x
    values = values.toarray() if hasattr(values, "toarray") else values
    values = np.asarray(values, dtype=float)
    if values.ndim < 2 or len(values) == 0:
        msg = f"Images are read from rows, shape (images, pixels), and there must be one; got shape {values.shape}."
        raise ValueError(msg)
    return values


def _shape(x: Any, image_shape: Sequence[int] | None) -> tuple[int, ...]:
    if image_shape is not None:
        return tuple(int(side) for side in image_shape)
    if "image_shape" in getattr(x, "uns", {}):
        return tuple(int(side) for side in x.uns["image_shape"])
    shape = tuple(getattr(x, "shape", np.shape(x)))
    if len(shape) > 2:
        return shape[1:]
    side = isqrt(shape[-1])
    if side * side == shape[-1]:
        return side, side
    msg = f"{shape[-1]} pixels do not make a square: pass image_shape=(height, width), or set adata.uns['image_shape']."
    raise ValueError(msg)


def _pictures(rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if int(np.prod(shape)) != int(np.prod(rows.shape[1:])):
        msg = f"Each row holds {int(np.prod(rows.shape[1:]))} values, which do not make an image of shape {shape}."
        raise ValueError(msg)
    return rows.reshape(len(rows), *shape)  # (images, pixels) -> (images, height, width[, 3])


def _draw(
    pictures: np.ndarray,
    *,
    ncols: int,
    cmap: str,
    titles: Sequence[str] | None = None,
    row_labels: Sequence[str] = (),
    header: Sequence[str] = (),
) -> np.ndarray:
    """Draw on a grid measured in inches: constrained layout takes seconds for a hundred panels.

    ``titles`` are one for each image, ``header`` one for each column.
    """
    from matplotlib import pyplot as plt

    nrows = -(-len(pictures) // ncols)
    named = [*(titles or ()), *header]
    width = max([_PANEL, *(0.07 * len(str(t)) for t in named)])  # wide enough for the longest title
    height = width * pictures.shape[1] / pictures.shape[2]
    left = _GAP + 0.08 * max((len(label) for label in row_labels), default=0)
    space = _GAP + (_TITLE if titles else 0)
    top = _TITLE if header else 0.0
    figure = left + ncols * (width + _GAP), nrows * (height + space) + _GAP + top
    fig = plt.figure(figsize=figure)
    low, high = _scale(pictures)
    axes: list[Axes] = []
    for i, picture in enumerate(pictures):
        row, col = divmod(i, ncols)
        x = left + col * (width + _GAP)
        y = figure[1] - top - (row + 1) * (height + space)
        ax = fig.add_axes((x / figure[0], y / figure[1], width / figure[0], height / figure[1]))
        ax.imshow(np.clip((picture - low) / (high - low), 0, 1), cmap=cmap, vmin=0, vmax=1)
        bare(ax)
        title = titles[i] if titles else header[col] if header and row == 0 else None
        if title is not None:
            ax.set_title(plain(title), fontsize=SMALL, pad=3)
        if row_labels and col == 0:
            ax.set_ylabel(row_labels[row], rotation=0, ha="right", va="center", fontsize=SMALL)
        axes.append(ax)
    return np.array(axes)


def _scale(pictures: np.ndarray) -> tuple[float, float]:
    low, high = np.nanquantile(pictures, [0.01, 0.99])
    if low >= -0.1 and high <= 1.1:
        return 0.0, 1.0
    low, high = float(np.nanmin(pictures)), float(np.nanmax(pictures))
    return low, high if high > low else low + 1
