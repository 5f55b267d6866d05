"""Many cells: training in memory and from disk, and correcting into a file, with the peak of memory.

    SCCVAE_DATA_DIR=... python -m benchmarks.large [--cells 20000 250000 1000000] [--parts train layer]

The cells and the VAE are those of `benchmarks.speed`; each line is a Python of its own, on one file of CSR float32 in
.h5ad. Ways: *memory* (`read_h5ad`), *disk* (`backed="r"` and `train(data="disk")`), *zarr disk* (the same from zarr).

*train*: cells per second in the last of the epochs, without validation; microseconds per cell; the peak of resident
memory, and how far it is above that when everything was imported and nothing read. *layer*: `tl.correct(out=...)` into
zarr with a CVAE of two conditions trained for a few steps: cells per second, and the peak above that when it was made.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import zarr

from benchmarks.results import write_section
from benchmarks.sets import LABELLED
from benchmarks.speed import WIDTH, epoch_timer, simulated

WAYS = ("memory", "disk", "zarr disk")
QUIET = {"early_stopping": False, "progress_bar": False, "accelerator": "cpu"}


def peak() -> float:
    """Peak of resident memory so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def as_zarr(file: Path) -> Path:
    """The same cells in zarr, copied block by block; made if it is not there."""
    out = file.with_suffix(".zarr")
    if not out.exists():
        unfinished = file.with_suffix(".zarr-part")
        cells, group = ad.read_h5ad(file, backed="r"), zarr.open_group(unfinished, mode="w", zarr_format=3)
        options = {"dataset_kwargs": {"shards": None}}
        ad.io.write_elem(group, "/", ad.AnnData(obs=cells.obs, var=cells.var), **options)
        for start in range(0, cells.n_obs, 100_000):
            block = cells.X[start : start + 100_000]
            if start:
                ad.io.sparse_dataset(group["X"]).append(block)
            else:
                ad.io.write_elem(group, "X", block, **options)
        unfinished.rename(out)
    return out


def alone(part: str, way: str, file: str, epochs: str) -> None:
    """One line of a table, in a Python of its own."""
    from sccvae import tl
    from sccvae.data import open_anndata
    from sccvae.model import CVAE, VAE

    imported = peak()
    adata = ad.read_h5ad(file) if way == "memory" else open_anndata(file)
    data = "memory" if way == "memory" else "disk"
    if part == "train":
        VAE.setup_anndata(adata)
        model, timer = VAE(adata, **WIDTH), epoch_timer()
        model.train(int(epochs), train_size=1.0, data=data, callbacks=[timer], **QUIET)
        rate = adata.n_obs / timer.seconds[-1]
        found = {"cells/s": rate, "us/cell": 1e6 / rate, "peak GiB": peak(), "above imports GiB": peak() - imported}
    else:
        adata.obs["half"] = np.where(np.arange(adata.n_obs) % 2, "a", "b")
        CVAE.setup_anndata(adata, batch_key="half")
        model = CVAE(adata, **WIDTH)
        model.train(1, train_size=0.02, validation_size=0.0, data=data, **QUIET)
        made = peak()
        with tempfile.TemporaryDirectory(dir=Path(file).parent) as folder:
            start = time.perf_counter()
            tl.correct(adata, model, reference="a", out=Path(folder) / "corrected.zarr")
            rate = adata.n_obs / (time.perf_counter() - start)
            size = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file()) / 2**30
        found = {"cells/s": rate, "peak GiB": peak(), "above the model GiB": peak() - made, "file GiB": size}
    print(json.dumps(found))


def in_process(part: str, way: str, file: Path, epochs: int) -> dict:
    """Run :func:`alone`; the line of the table."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.large", "--alone", part, way, str(file), str(epochs)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run the command line."""
    if sys.argv[1:2] == ["--alone"]:
        alone(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[20_000, 250_000, 1_000_000])
    parser.add_argument("--like", default="kang2018_ctrl12k", choices=[c.name for c in LABELLED])
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/simulated"), help="of the simulated cells")
    parser.add_argument("--parts", nargs="+", default=["train", "layer"], choices=["train", "layer"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--no-write", action="store_true", help="leave benchmarks/RESULTS.md as it is")
    args = parser.parse_args()
    for part in args.parts:
        rows = []
        for n in args.cells:
            file = simulated(n, args.like, args.folder)
            with_values = ad.read_h5ad(file, backed="r").X.group["data"].shape[0]
            for way in args.ways:
                found = in_process(part, way, as_zarr(file) if way == "zarr disk" else file, args.epochs)
                rows.append({"cells": n, "CSR GiB": 8 * with_values / 2**30, "way": way} | found)
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
        if not args.no_write:
            command = f"python -m benchmarks.large --parts {part} --cells {' '.join(map(str, args.cells))}"
            title = {"train": "Many cells: training", "layer": "Many cells: correcting into a file"}[part]
            write_section(title, __doc__.split("\n\n", 2)[2], pd.DataFrame(rows), command)


if __name__ == "__main__":
    main()
