"""A training step: its time, that of its parts, and beside it scVI's own module on the same cells.

    python -m benchmarks.step [--device cuda] [--batch-size 1024] [--repeats 60] [--no-peer]

Torch alone (and scVI for the peer): no data path, the mini-batch lies on the device as the loader of each tool gives it
(on a CPU sparse rows here, dense for scVI). All are timed in turn, round after round; the smallest and the median of
the rounds are shown. *Products* are the large matrix products of the network, forward and backward: what a step cannot
do without. Ratios are those of medians. On a GPU a step is *recorded* and played back, as in a training; *kernels* is
what its work on the GPU adds up to (by torch's profiler).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import torch

from benchmarks.results import write_section
from sccvae._recording import Recorder
from sccvae._rows import SparseRows, few
from sccvae.distributions import counts as families
from sccvae.distributions import kernels
from sccvae.module import CVAE, GMVAE, VAE, Batch

N_GENES, N_HIDDEN, N_LATENT, DENSITY = 2_000, 128, 10, 0.09
WARM_UP = 5


def counts(n: int) -> torch.Tensor:
    """Counts (n, G) about as sparse as single cells: gamma-Poisson with gene means over two decades."""
    torch.manual_seed(0)
    means = torch.logspace(-2.5, 0.3, N_GENES)
    means *= -np.log1p(-DENSITY) / means.mean()
    return torch.poisson(torch.distributions.Gamma(2.0, 2.0 / means).sample((n,)))


def ours(module: torch.nn.Module, batch: Batch, *, recorded: bool = False) -> Callable[[], None]:
    """One optimiser step of a module of sccvae."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)

    def step(tensors: dict) -> None:
        loss, _ = module.loss(Batch(**tensors))  # a new one: nothing that it makes of x is kept for the next step
        optimizer.zero_grad(set_to_none=True)
        optimizer.param_groups[0]["capturable"] = recorded and torch.cuda.is_current_stream_capturing()
        loss.backward()
        optimizer.step()

    tensors = tensors_of(batch)
    if not recorded:
        return lambda: step(tensors)
    recorder = Recorder(module.device)
    return lambda: recorder.run("step", step, tensors)


def tensors_of(batch: Batch) -> dict[str, torch.Tensor | SparseRows]:
    """What a mini-batch is made of, by name."""
    parts = {f.name: getattr(batch, f.name) for f in fields(batch) if f.init}
    return {name: t for name, t in parts.items() if t is not None}


def kernels_of(step: Callable[[], None]) -> float:
    """Milliseconds that the work of a step on the GPU adds up to; the mean of ten."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(10):
            step()
        torch.cuda.synchronize()
    return sum(e.self_device_time_total for e in profile.key_averages()) / 1e4


def theirs(likelihood: str, x: torch.Tensor) -> Callable[[], None]:
    """One optimiser step of scVI's module, without Lightning."""
    from scvi import REGISTRY_KEYS
    from scvi.module import VAE as ScviVAE

    module = ScviVAE(x.shape[1], gene_likelihood=likelihood, n_hidden=N_HIDDEN, n_latent=N_LATENT).to(x.device)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, eps=0.01, weight_decay=1e-6)
    zeros = torch.zeros(len(x), 1, device=x.device)
    tensors = {REGISTRY_KEYS.X_KEY: x, REGISTRY_KEYS.BATCH_KEY: zeros, REGISTRY_KEYS.LABELS_KEY: zeros}

    def step() -> None:
        loss = module(tensors, loss_kwargs={"kl_weight": 1.0})[2].loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def products(x: torch.Tensor) -> Callable[[], None]:
    """The five large products of an encoder and a decoder of one layer: two forward, three backward."""
    h = torch.randn(len(x), N_HIDDEN, device=x.device)
    narrow = torch.randn(x.shape[1], N_HIDDEN, device=x.device)

    def step() -> None:
        x @ narrow  # encoder
        wide = h @ narrow.T  # decoder
        wide.T @ h, wide @ narrow  # gradients of the decoder's weights and input
        x.T @ h  # gradient of the encoder's weights

    return step


def likelihood_alone(name: str, x: torch.Tensor, seen: torch.Tensor | SparseRows) -> Callable[[], None]:
    """Log mass of the counts and its gradients, from the scores of the genes on."""
    parameters = [torch.randn_like(x), torch.zeros(1, x.shape[1], device=x.device)]
    parameters += [torch.randn_like(x)] if name == "zinb" else []
    parameters = [p.requires_grad_() for p in parameters]
    library = x.sum(-1, keepdim=True)
    made = {"nb": families.NBObservation, "zinb": families.ZINBObservation}[name]

    def step() -> None:
        torch.autograd.grad(made(parameters[0], library, *parameters[1:]).log_prob(seen).sum(), parameters)

    return step


def measure(steps: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> pd.DataFrame:
    """Milliseconds of each, in turn; on a GPU of ten, one after the other as in a training, that are waited for."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    wait, n = (torch.cuda.synchronize, 10) if device.type == "cuda" else (lambda: None, 1)
    for i in range(WARM_UP + repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(n):
                step()
            wait()
            if i >= WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - start) / n)
    rows = [{"step": n, "min (ms)": min(t), "median (ms)": float(np.median(t))} for n, t in times.items()]
    return pd.DataFrame(rows)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--no-peer", action="store_true", help="without scVI, for a machine that has torch alone")
    parser.add_argument("--no-write", action="store_true", help="leave benchmarks/RESULTS.md as it is")
    args = parser.parse_args()
    device = torch.device(args.device)
    x = counts(args.batch_size)
    batch = Batch.of(x)
    if device.type != "cpu":
        x, csr = x.to(device), x.to_sparse_csr()
        parts = csr.crow_indices(), csr.col_indices().int(), csr.values()
        batch = Batch.on(device, tensors_of(batch) | {"x": SparseRows(*parts, N_GENES)})
    elif few(x) is not None:
        batch = replace(batch, x=few(x))
    codes = torch.arange(len(x), device=device)[:, None] % 4
    width = {"n_hidden": N_HIDDEN, "n_latent": N_LATENT}
    made: dict[str, Callable[[], tuple[torch.nn.Module, Batch]]] = {
        "VAE nb": lambda: (VAE(N_GENES, likelihood="nb", **width), batch),
        "VAE zinb": lambda: (VAE(N_GENES, likelihood="zinb", **width), batch),
        "CVAE, 4 batches": lambda: (CVAE(N_GENES, [4], **width), replace(batch, codes=codes)),
        "GMVAE nb, K = 20": lambda: (GMVAE(N_GENES, 20, likelihood="nb", **width), batch),
    }
    steps: dict[str, Callable[[], None]] = {"products": products(x)}
    steps |= {f"likelihood {name}": likelihood_alone(name, x, batch.x) for name in ("nb", "zinb")}
    steps |= {} if args.no_peer else {f"scVI {name}": theirs(name, x) for name in ("nb", "zinb")}
    for name, make in made.items():
        for recorded in (False, True) if device.type == "cuda" else (False,):
            module, some = make()
            steps[name + ", recorded" * recorded] = ours(module.to(device), some, recorded=recorded)
    table = measure(steps, args.repeats, device)
    if device.type == "cuda":
        table["kernels (ms)"] = [kernels_of(steps[name]) for name in table["step"]]
    median = table.set_index("step")["median (ms)"]
    for name in ("nb", "zinb"):
        own = median[f"VAE {name}, recorded" if device.type == "cuda" else f"VAE {name}"]
        print(f"{name}: step / products {own / median['products']:.2f}", end="")
        print("" if args.no_peer else f", scVI / ours {median[f'scVI {name}'] / own:.2f}")
    if not args.no_peer:
        table["scVI nb / this"] = median["scVI nb"] / table["median (ms)"]
    what = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(
        what, "numba" if kernels.applies(x) else "torch", f"{float((x > 0).float().mean()):.3f} of the counts not zero"
    )
    print(table.round(3).to_string(index=False))
    if not args.no_write:
        command = f"python -m benchmarks.step --device {args.device} --batch-size {args.batch_size}"
        write_section(f"A training step ({args.device})", f"On {what}. " + __doc__.split("\n\n", 2)[2], table, command)


if __name__ == "__main__":
    main()
