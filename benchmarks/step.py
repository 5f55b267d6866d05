"""A training step: its time, that of its parts, and beside it scVI's own module on the same cells.

    python -m benchmarks.step [--device cuda] [--batch-size 1024] [--repeats 60] [--no-peer]

Torch alone (and scVI for the peer): no data path, the mini-batch lies on the device as the loader of each tool gives it
(on a CPU sparse rows here, dense for scVI). All are timed in turn, round after round; the smallest and the median of
the rounds are shown. *Products* are the large matrix products of the network, forward and backward: what a step cannot
do without. Ratios are those of medians.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from benchmarks.results import write_section
from sccvae._rows import few
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


def ours(module: torch.nn.Module, batch: Batch) -> Callable[[], None]:
    """One optimiser step of a module of sccvae."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        loss, _ = module.loss(replace(batch))  # a new one: nothing that it makes of x is kept for the next step
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


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


def likelihood_alone(name: str, x: torch.Tensor) -> Callable[[], None]:
    """Log mass of the counts and its gradients, from the scores of the genes on."""
    parameters = [torch.randn_like(x), torch.zeros(1, x.shape[1], device=x.device)]
    parameters += [torch.randn_like(x)] if name == "zinb" else []
    parameters = [p.requires_grad_() for p in parameters]
    library = x.sum(-1, keepdim=True)
    made = {"nb": families.NBObservation, "zinb": families.ZINBObservation}[name]

    def step() -> None:
        torch.autograd.grad(made(parameters[0], library, *parameters[1:]).log_prob(x).sum(), parameters)

    return step


def measure(steps: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> pd.DataFrame:
    """Milliseconds of each, in turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(WARM_UP + repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i >= WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - start))
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
    x = counts(args.batch_size).to(device)
    sparse = few(x)
    batch = replace(Batch.of(x), x=x if sparse is None else sparse)
    width = {"n_hidden": N_HIDDEN, "n_latent": N_LATENT}
    steps: dict[str, Callable[[], None]] = {"products": products(x)}
    for name in ("nb", "zinb"):
        steps[f"likelihood {name}"] = likelihood_alone(name, x)
        steps[f"VAE {name}"] = ours(VAE(N_GENES, likelihood=name, **width).to(device), batch)
        if not args.no_peer:
            steps[f"scVI {name}"] = theirs(name, x)
    batches = replace(batch, codes=torch.arange(len(x), device=device)[:, None] % 4)
    steps["CVAE, 4 batches"] = ours(CVAE(N_GENES, [4], **width).to(device), batches)
    steps["GMVAE nb, K = 20"] = ours(GMVAE(N_GENES, 20, likelihood="nb", **width).to(device), batch)
    table = measure(steps, args.repeats, device)
    median = table.set_index("step")["median (ms)"]
    for name in ("nb", "zinb"):
        print(f"{name}: step / products {median[f'VAE {name}'] / median['products']:.2f}", end="")
        print("" if args.no_peer else f", scVI / ours {median[f'scVI {name}'] / median[f'VAE {name}']:.2f}")
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
