"""Speed: sccvae and scvi-tools in turn, in one run, on the same simulated cells.

    SCCVAE_DATA_DIR=... python -m benchmarks.speed [--cells 10000] [--parts train inference startup memory target]

Counts are negative binomial: gene means of each cell type, dispersions and library sizes of `kang2018_ctrl12k`, its
genes drawn anew to make 2,000 and thinned to 9 % non-zero, written to disk once. Both models are VAEs: one hidden layer
of 128, 10 latent dimensions, mini-batches of 128, in memory, on the same threads; the rest is each tool's default. The
ratio is that of medians, with the smallest and largest ratio of the paired rounds; above 1 sccvae is faster.

*train*: cells per second in an epoch without validation (the first epoch is left out); of a `GMVAE` with K = 20 in a
whole training, with all phases, guides and validation, beside the same epochs of scVI. *inference*: the first two calls
are left out. *target*: scVI trains at its
defaults; ours at its own, until its held-out reconstruction loss is scVI's last.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from benchmarks.results import write_section
from benchmarks.sets import LABELLED, load

WIDTH = {"n_hidden": 128, "n_latent": 10, "n_layers": 1}
BLOCK = 10_000
N_GENES, DENSITY = 2_000, 0.09
#: A call takes a second or less: so many times as many rounds of it.
INFERENCE = 5
PARTS = ("train", "inference", "startup", "memory", "target")


def simulated(n: int, like: str, folder: Path) -> Path:
    """File of ``n`` cells like those of a set, as CSR float32; made if it is not there."""
    file = folder / f"like-{like}-{n}.h5ad"
    if file.exists():
        return file
    cells = next(c for c in LABELLED if c.name == like)
    real = load(cells)
    x, types = real.X.tocsr(), real.obs[cells.label_key].cat.codes.to_numpy()
    library = np.asarray(x.sum(1)).ravel()
    shares = np.stack([np.asarray(x[types == k].sum(0)).ravel() + 1e-3 for k in range(types.max() + 1)])
    shares /= shares.sum(1, keepdims=True)
    mean = library[:, None] * shares[types]
    excess = np.square(x.toarray() - mean).sum(0) - mean.sum(0)  # variance above Poisson: sum of mean^2 / theta
    theta = np.square(mean).sum(0) / np.maximum(excess, 1e-2 * mean.sum(0))
    rng = np.random.default_rng(0)
    genes = rng.integers(x.shape[1], size=N_GENES)
    shares, theta = shares[:, genes] / shares[:, genes].sum(1, keepdims=True), theta[genes]
    low, high = 1e-3, 1.0
    for _ in range(30):  # the thinning that leaves so many counts
        thinned = np.sqrt(low * high)
        mu = thinned * library[:500, None] * shares[types[:500]]
        low, high = (thinned, high) if 1 - ((theta / (theta + mu)) ** theta).mean() < DENSITY else (low, thinned)
    library = library * thinned
    folder.mkdir(parents=True, exist_ok=True)
    drawn, unfinished = [], file.with_suffix(".part")
    with h5py.File(unfinished, "w") as f:  # block by block: a million cells do not have to fit into memory
        f.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        for start in range(0, n, BLOCK):
            some = rng.integers(len(types), size=min(BLOCK, n - start))
            mu = library[some, None] * shares[types[some]]
            block = sparse.csr_matrix(rng.poisson(rng.gamma(theta, mu / theta)).astype(np.float32))
            if start:
                ad.io.sparse_dataset(f["X"]).append(block)
            else:
                ad.io.write_elem(f, "X", block)
            drawn.append(types[some])
        names = pd.Categorical(np.concatenate(drawn).astype(str))
        obs = pd.DataFrame({"type": names}, index=[f"c{i}" for i in range(n)])
        ad.io.write_elem(f, "obs", obs)
        ad.io.write_elem(f, "var", pd.DataFrame(index=[str(i) for i in range(N_GENES)]))
    unfinished.rename(file)
    return file


def epoch_timer():
    """A Lightning callback that notes the seconds of each epoch and when the first step was done."""
    from lightning import Callback

    class Timer(Callback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.first_step: float | None = None

        def on_train_epoch_start(self, *_) -> None:
            self.start = time.perf_counter()

        def on_train_batch_end(self, *_) -> None:
            self.first_step = self.first_step or time.perf_counter()

        def on_train_epoch_end(self, *_) -> None:
            self.seconds.append(time.perf_counter() - self.start)

    return Timer()


def ours(adata: ad.AnnData, likelihood: str):
    """A VAE of sccvae, not trained."""
    from sccvae.model import VAE

    VAE.setup_anndata(adata)
    return VAE(adata, likelihood=likelihood, **WIDTH)


def theirs(adata: ad.AnnData, likelihood: str):
    """A VAE of scvi-tools, not trained."""
    import scvi

    scvi.model.SCVI.setup_anndata(adata)
    return scvi.model.SCVI(adata, gene_likelihood=likelihood, **WIDTH)


TOOLS: dict[str, Callable] = {"sccvae": ours, "scvi-tools": theirs}
QUIET = {"sccvae": {"progress_bar": False}, "scvi-tools": {"enable_progress_bar": False}}


def epochs(tool: str, adata: ad.AnnData, likelihood: str, n: int, accelerator: str):
    """Train for ``n`` epochs on all cells: seconds of each, and the model."""
    model, timer = TOOLS[tool](adata, likelihood), epoch_timer()
    options = QUIET[tool] | {"accelerator": accelerator, "callbacks": [timer]}
    model.train(max_epochs=n, train_size=1.0, batch_size=128, early_stopping=False, **options)
    return timer, model


def in_turn(tasks: dict[str, Callable[[], float]], rounds: int, left_out: int = 0) -> dict[str, list[float]]:
    """What each task gives, round after round, after some that are left out."""
    found: dict[str, list[float]] = {name: [] for name in tasks}
    for task in left_out * list(tasks.values()):
        task()
    for _ in range(rounds):
        for name, task in tasks.items():
            found[name].append(task())
    return found


def row(what: str, rates: dict[str, list[float]]) -> dict:
    """One line of the table from figures of which more is better."""
    own, peer = np.array(rates["sccvae"]), np.array(rates["scvi-tools"])
    ratio = own / peer
    found = {"what": what, "sccvae": np.median(own), "scvi-tools": np.median(peer)}
    found |= {"ratio": np.median(own) / np.median(peer), "smallest": ratio.min(), "largest": ratio.max()}
    print({k: v if isinstance(v, str) else round(float(v), 3) for k, v in found.items()}, flush=True)
    return found


def train(adata: ad.AnnData, rounds: int, accelerator: str) -> list[dict]:
    """Cells per second."""

    def rate(tool: str, likelihood: str) -> float:
        return adata.n_obs / np.median(epochs(tool, adata, likelihood, 3, accelerator)[0].seconds[1:])

    rows = []
    for likelihood in ("nb", "zinb"):
        tasks = {tool: lambda tool=tool, by=likelihood: rate(tool, by) for tool in TOOLS}
        rows.append(row(f"training, {likelihood} (cells/s)", in_turn(tasks, rounds)))
    tasks = {"sccvae": lambda: mixture_rate(adata, accelerator), "scvi-tools": lambda: rate("scvi-tools", "nb")}
    rows.append(row("whole training, GMVAE (cells/s)", in_turn(tasks, rounds)))
    return rows


def mixture_rate(adata: ad.AnnData, accelerator: str) -> float:
    """Training cells seen in a second of a whole GMVAE training, guides and validation included."""
    from sccvae.model import GMVAE

    GMVAE.setup_anndata(adata)
    model, timer = GMVAE(adata, n_components=20, likelihood="nb", **WIDTH), epoch_timer()
    start = time.perf_counter()
    model.train(accelerator=accelerator, callbacks=[timer], **QUIET["sccvae"])
    return len(timer.seconds) * len(model.train_indices) / (time.perf_counter() - start)


def inference(adata: ad.AnnData, rounds: int, accelerator: str) -> list[dict]:
    """Cells per second embedded and decoded; two rounds more, before, load or compile what each tool needs."""
    models = {tool: epochs(tool, adata, "nb", 1, accelerator)[1] for tool in TOOLS}
    rows = []

    def rate(call: Callable[[], np.ndarray]) -> float:
        start = time.perf_counter()
        call()
        return adata.n_obs / (time.perf_counter() - start)

    tasks = {t: lambda m=m: rate(m.get_latent_representation) for t, m in models.items()}
    rows.append(row("embedding (cells/s)", in_turn(tasks, INFERENCE * rounds, 2)))
    tasks = {t: lambda m=m: rate(lambda: m.get_normalized_expression(return_numpy=True)) for t, m in models.items()}
    rows.append(row("decoded expression (cells/s)", in_turn(tasks, INFERENCE * rounds, 2)))
    return rows


def in_process(tool: str, file: Path, n: int) -> dict[str, float]:
    """In a Python of its own: seconds to import and to the first step, peak memory in bytes."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.speed", "--alone", tool, str(file), str(n)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
    return json.loads(done.stdout.splitlines()[-1])


def alone(tool: str, file: str, n: str) -> None:
    """What :func:`in_process` runs."""
    before_import = time.perf_counter()
    __import__({"sccvae": "sccvae", "scvi-tools": "scvi"}[tool])
    imported = time.perf_counter()
    adata = ad.read_h5ad(file)
    adata = adata[: int(n)].copy() if int(n) < adata.n_obs else adata
    read = time.perf_counter()
    timer, _ = epochs(tool, adata, "nb", 1, "cpu")
    found = {"import": imported - before_import, "first step": timer.first_step - read + imported - before_import}
    print(json.dumps(found | {"peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))


def startup(file: Path, rounds: int) -> list[dict]:
    """Times of a fresh Python, as rates so that more is better."""
    found = {tool: [in_process(tool, file, 512) for _ in range(rounds)] for tool in TOOLS}
    return [
        row(f"{what} (1/s)", {tool: [1 / f[what] for f in runs] for tool, runs in found.items()})
        for what in ("import", "first step")
    ]


def memory(file: Path, adata: ad.AnnData) -> list[dict]:
    """Peak of a training above that of reading the same cells, per byte of the CSR."""
    size = adata.X.data.nbytes + adata.X.indices.nbytes + adata.X.indptr.nbytes
    found = {tool: [in_process(tool, file, adata.n_obs)["peak"] / 2**30] for tool in TOOLS}
    rates = {tool: [1 / f for f in peaks] for tool, peaks in found.items()}
    return [row(f"peak memory (1/GiB; CSR {size / 2**30:.2f} GiB)", rates)]


def target(adata: ad.AnnData, accelerator: str) -> list[dict]:
    """Seconds until the held-out reconstruction loss of scVI's last epoch."""
    peer = theirs(adata, "nb")
    start = time.perf_counter()
    peer.train(accelerator=accelerator, check_val_every_n_epoch=10, **QUIET["scvi-tools"])
    peer_seconds = time.perf_counter() - start
    goal = float(peer.history["reconstruction_loss_validation"].iloc[-1, 0])
    model, timer = ours(adata, "nb"), epoch_timer()
    model.train(accelerator=accelerator, callbacks=[timer], **QUIET["sccvae"])
    losses = model.history["reconstruction_validation"].iloc[:, 0].to_numpy()
    reached = np.flatnonzero(losses <= goal)
    n = int(reached[0]) + 1 if len(reached) else len(losses)
    seconds = sum(timer.seconds[:n])
    print(
        f"scVI {goal:.2f} nats after {peer_seconds:.0f} s; ours {losses.min():.2f} at best, {seconds:.0f} s, epoch {n}"
    )
    what = "until scVI's held-out loss (1/s)" if len(reached) else f"NOT reached ({losses.min() - goal:+.2f} nats), 1/s"
    return [row(what, {"sccvae": [1 / seconds], "scvi-tools": [1 / peer_seconds]})]


def main() -> None:
    """Run the command line."""
    if sys.argv[1:2] == ["--alone"]:
        alone(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--like", default="kang2018_ctrl12k", choices=[c.name for c in LABELLED])
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/simulated"), help="of the simulated cells")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--no-write", action="store_true", help="leave benchmarks/RESULTS.md as it is")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    file = simulated(args.cells, args.like, args.folder)
    adata = ad.read_h5ad(file)
    print(f"{adata.shape}, {adata.X.nnz / np.prod(adata.shape):.3f} not zero", flush=True)
    accelerator = {"cpu": "cpu", "cuda": "gpu"}[args.device]
    rows = []
    if "startup" in args.parts:
        rows += startup(file, args.rounds)
    if "memory" in args.parts:
        rows += memory(file, adata)
    if "train" in args.parts:
        rows += train(adata, args.rounds, accelerator)
    if "inference" in args.parts:
        rows += inference(adata, args.rounds, accelerator)
    if "target" in args.parts:
        rows += target(adata, accelerator)
    table = pd.DataFrame(rows)
    print(table.round(3).to_string(index=False))
    if not args.no_write:
        command = f"python -m benchmarks.speed --cells {args.cells} --device {args.device}"
        write_section(f"Speed, {args.cells:,} cells ({args.device})", __doc__.split("\n\n", 2)[2], table, command)


if __name__ == "__main__":
    main()
