"""MNIST and Fashion-MNIST as AnnData."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ._fetch import fetch
from ._idx import parse_idx

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass(frozen=True)
class ImageSet:
    """What is known about an image set before it is read; ``sha256`` is of the decompressed files."""

    folder: str
    url: str
    classes: tuple[str, ...]
    citation: str
    sha256: dict[str, str]


_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}

MNIST = ImageSet(
    folder="mnist",
    url="https://ossci-datasets.s3.amazonaws.com/mnist/",
    classes=tuple("0123456789"),
    citation="LeCun, Bottou, Bengio & Haffner 1998, Proc. IEEE 86(11):2278-2324",
    sha256={
        "train-images-idx3-ubyte.gz": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte.gz": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte.gz": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte.gz": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
)

FASHION_MNIST = ImageSet(
    folder="fashion-mnist",
    url="https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    classes=(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    citation="Xiao, Rasul & Vollgraf 2017, arXiv:1708.07747",
    sha256={
        "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
)


def mnist(split: Literal["train", "test"] | None = None) -> AnnData:
    """Handwritten digits: 60,000 images to train on, 10,000 to test on, in the original order.

    The files are looked for in ``$SCCVAE_DATA_DIR/mnist/``, then in the cache, then downloaded (11 MB) into the
    cache. Their decompressed content is verified by SHA-256.

    Parameters
    ----------
    split
        ``"train"`` or ``"test"`` for one part; by default both, train first.

    Returns
    -------
    AnnData of 70,000 images x 784 pixels (or the part asked for):

    - ``X``: float32 in [0, 1], row by row from the top left pixel, 0 is background; dense
    - ``obs["label"]``: the digit, categories ``"0"`` to ``"9"``
    - ``obs["split"]``: ``"train"`` or ``"test"``
    - ``uns["image_shape"]``: ``[28, 28]``; ``uns["source"]``, ``uns["citation"]``

    Raises
    ------
    FileNotFoundError
        If a file is in neither folder and cannot be downloaded; the message says what to do.
    ValueError
        If a file has other content than the official one, or ``split`` is unknown.

    References
    ----------
    LeCun, Bottou, Bengio & Haffner 1998, "Gradient-based learning applied to document recognition".

    Examples
    --------
    >>> adata = sccvae.datasets.mnist()  # doctest: +SKIP
    >>> train = adata[adata.obs["split"] == "train"]  # doctest: +SKIP
    """
    return _load(MNIST, split)


def fashion_mnist(split: Literal["train", "test"] | None = None) -> AnnData:
    """Articles of clothing: 60,000 images to train on, 10,000 to test on, in the original order.

    The files are looked for in ``$SCCVAE_DATA_DIR/fashion-mnist/``, then in the cache, then downloaded (31 MB) into
    the cache. Their decompressed content is verified by SHA-256.

    Parameters
    ----------
    split
        ``"train"`` or ``"test"`` for one part; by default both, train first.

    Returns
    -------
    AnnData as :func:`mnist` returns it; ``obs["label"]`` holds the names of the ten classes, the categories in the
    official order (``"T-shirt/top"`` is 0, ``"Ankle boot"`` is 9).

    Raises
    ------
    FileNotFoundError
        If a file is in neither folder and cannot be downloaded; the message says what to do.
    ValueError
        If a file has other content than the official one, or ``split`` is unknown.

    References
    ----------
    Xiao, Rasul & Vollgraf 2017, "Fashion-MNIST: a novel image dataset for benchmarking machine learning algorithms".
    """
    return _load(FASHION_MNIST, split)


def _load(images: ImageSet, split: str | None) -> AnnData:
    import pandas as pd
    from anndata import AnnData

    if split is not None and split not in _FILES:
        msg = f"split={split!r} is unknown: choose 'train', 'test', or None for both."
        raise ValueError(msg)
    splits = list(_FILES) if split is None else [split]
    parts = [[_array(images, name) for name in _FILES[part]] for part in splits]  # (n, H, W) and (n,) of each split

    sizes = [len(labels) for _, labels in parts]
    height, width = parts[0][0].shape[1:]
    x = np.empty((sum(sizes), height * width), dtype=np.float32)
    for (pixels, labels), rows in zip(parts, np.split(x, np.cumsum(sizes)[:-1]), strict=True):
        # rows is a view of x: 220 MB are filled in place, without a second copy
        np.divide(pixels.reshape(len(labels), -1), np.float32(255), out=rows, dtype=np.float32)

    codes = np.concatenate([labels for _, labels in parts])
    obs = pd.DataFrame(
        {
            "label": pd.Categorical.from_codes(codes, categories=list(images.classes)),
            "split": pd.Categorical.from_codes(np.repeat(np.arange(len(splits)), sizes), categories=splits),
        },
        index=[f"{part}-{i}" for part, size in zip(splits, sizes, strict=True) for i in range(size)],
    )
    var = pd.DataFrame(index=[f"pixel-{row}-{column}" for row in range(height) for column in range(width)])
    uns = {"image_shape": [height, width], "source": images.url, "citation": images.citation}
    return AnnData(x, obs=obs, var=var, uns=uns)


def _array(images: ImageSet, name: str) -> np.ndarray:
    content = fetch(name, folder=images.folder, url=images.url + name, sha256=images.sha256[name])
    return parse_idx(content, source=name)
