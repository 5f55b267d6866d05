"""Where data files come from: the user's folder, the cache, the network; verified, whichever it was."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from ._idx import read_decompressed


def fetch(name: str, *, folder: str, url: str, sha256: str) -> bytes:
    """Decompressed, verified content of one data file.

    Looked for in ``$SCCVAE_DATA_DIR/<folder>/``, then in the cache, then downloaded into the cache with a progress
    bar.

    Parameters
    ----------
    name
        File name, such as ``"train-images-idx3-ubyte.gz"``.
    folder
        Subfolder of ``SCCVAE_DATA_DIR`` and of the cache.
    url
        Address of the file.
    sha256
        SHA-256 of the decompressed content: gzip files of equal content differ in their bytes.

    Raises
    ------
    FileNotFoundError
        If the file is in neither folder and cannot be downloaded.
    ValueError
        If the file that was found or downloaded has other content than expected.
    """
    import pooch

    cache = Path(pooch.os_cache("sccvae")) / folder
    data_dir = os.environ.get("SCCVAE_DATA_DIR")
    for place in ([Path(data_dir) / folder] if data_dir else []) + [cache]:
        path = place / name
        if path.is_file():
            return _verified(path, sha256, f"{path}", "Delete it, or replace it by a good copy.")
    return _download(name, cache=cache, url=url, sha256=sha256, data_dir=data_dir)


def _verified(path: Path, sha256: str, source: str, advice: str) -> bytes:
    try:
        content = read_decompressed(path)
    except ValueError:
        found = "none, as it is a damaged gzip file"
    else:
        found = hashlib.sha256(content).hexdigest()
        if found == sha256:
            return content
    msg = (
        f"{source} is not the expected file. SHA-256 of its decompressed content: {found}; expected: {sha256}. {advice}"
    )
    raise ValueError(msg)


def _download(name: str, *, cache: Path, url: str, sha256: str, data_dir: str | None) -> bytes:
    import pooch

    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Beside its final place, so that the rename is atomic: the cache never holds half a file or a wrong one.
        with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as scratch:
            partial = Path(scratch) / name
            pooch.HTTPDownloader(progressbar=True, chunk_size=2**16)(url, str(partial), None)
            advice = f"Try again later, or copy a good {name} into {cache}."
            content = _verified(partial, sha256, f"What {url} returned", advice)
            os.replace(partial, cache / name)
    except OSError as error:  # requests' exceptions are OSErrors too
        user_folder = Path(data_dir) / cache.name if data_dir else "(SCCVAE_DATA_DIR is not set)"
        msg = (
            f"{name} is neither in SCCVAE_DATA_DIR: {user_folder}, nor in the cache: {cache}, "
            f"and could not be downloaded from {url} ({type(error).__name__}: {error}). "
            f"Copy the file into {cache}, or set the environment variable SCCVAE_DATA_DIR to a folder "
            f"that holds it as {cache.name}/{name}."
        )
        raise FileNotFoundError(msg) from error
    return content
