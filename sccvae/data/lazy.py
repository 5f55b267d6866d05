"""An AnnData whose matrices stay on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anndata import AnnData
from anndata.io import read_elem, sparse_dataset


def open_anndata(path: str | Path) -> AnnData:
    """Open a ``.h5ad`` or ``.zarr`` file; ``X`` and all layers stay on disk, the rest is read.

    ``anndata.read_h5ad(path, backed="r")`` leaves only ``X`` on disk and reads the layers, and there is no such thing
    for zarr. ``raw`` is left out.

    Parameters
    ----------
    path
        File or, for zarr, folder; it must stay where it is.

    Returns
    -------
    AnnData with ``anndata.abc.CSRDataset`` (or ``CSCDataset``, or dense h5py or zarr arrays) as ``X`` and layers, which
    every model of sccvae takes. Other packages may not.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If its name ends in neither ``.h5ad`` nor ``.zarr``.
    """
    path = Path(path)
    if path.suffix not in (".h5ad", ".zarr"):
        msg = f"{path} must end in .h5ad or .zarr."
        raise ValueError(msg)
    if not path.exists():
        msg = f"There is no {path}."
        raise FileNotFoundError(msg)
    file = _opened(path)
    parts = ("obs", "var", "uns", "obsm", "varm", "obsp", "varp")
    rest = {name: read_elem(file[name]) for name in parts if name in file}
    layers = {name: _lazy(file[f"layers/{name}"]) for name in file.get("layers", ())}
    return AnnData(_lazy(file["X"]) if "X" in file else None, layers=layers, **rest)


def _opened(path: Path) -> Any:
    if path.suffix == ".h5ad":
        import h5py

        return h5py.File(path, "r")
    import zarr

    return zarr.open_group(path, mode="r")


def _lazy(stored: Any) -> Any:
    return sparse_dataset(stored) if stored.attrs.get("encoding-type") in ("csr_matrix", "csc_matrix") else stored
