"""The IDX format, in which MNIST and its successors are published."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import os

# Third byte of the magic number -> type of the values; everything in the file is big-endian.
_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: str | os.PathLike) -> np.ndarray:
    """Read one array from an IDX file, gzip-compressed or plain.

    Compression is recognised by the content, not by the name of the file.

    Parameters
    ----------
    path
        File to read.

    Returns
    -------
    Array of the shape and type that the file declares (uint8, int8, int16, int32, float32 or float64), in the
    byte order of this machine. For MNIST images: uint8 of shape ``(n_images, 28, 28)``.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is not IDX, holds fewer or more bytes than its header declares, or is a damaged gzip file.

    Notes
    -----
    Format: two zero bytes, one byte for the type, one for the number of dimensions, one 4-byte integer for each
    dimension, then the values with the last dimension running fastest
    (http://yann.lecun.com/exdb/mnist/, section "The IDX file format").

    Examples
    --------
    >>> images = sccvae.datasets.read_idx("train-images-idx3-ubyte.gz")  # doctest: +SKIP
    >>> images.shape  # doctest: +SKIP
    (60000, 28, 28)
    """
    return parse_idx(read_decompressed(path), source=str(path))


def read_decompressed(path: str | os.PathLike) -> bytes:
    """Content of a file, decompressed if it is gzip; ValueError if it is gzip but damaged."""
    content = Path(path).read_bytes()
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        msg = f"{path} is a damaged gzip file ({error}). Download or copy it again."
        raise ValueError(msg) from error


def parse_idx(content: bytes, source: str) -> np.ndarray:
    """Array held by the decompressed bytes of an IDX file; ``source`` names the file in errors."""
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _DTYPES:
        msg = (
            f"{source} is not an IDX file: it starts with the bytes {content[:4].hex(' ') or '(none)'}, "
            f"where '00 00', one of {', '.join(f'{code:02x}' for code in _DTYPES)} "
            "and the number of dimensions are expected. Check that it is the file you meant."
        )
        raise ValueError(msg)
    dtype, n_dims = np.dtype(_DTYPES[content[2]]), content[3]
    start = 4 + 4 * n_dims
    if len(content) < start:
        msg = (
            f"{source} is truncated: its header needs {start} bytes, it has {len(content)}. Download or copy it again."
        )
        raise ValueError(msg)
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", n_dims, offset=4))
    expected = start + math.prod(shape) * dtype.itemsize  # Python integers: a damaged header cannot overflow
    if len(content) != expected:
        problem = "is truncated" if len(content) < expected else "has trailing bytes"
        msg = (
            f"{source} {problem}: shape {shape} of {dtype.newbyteorder('=').name} needs {expected} bytes, "
            f"it has {len(content)}. Download or copy it again."
        )
        raise ValueError(msg)
    return np.frombuffer(content, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))
