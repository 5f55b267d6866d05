"""What model.correct writes to layers: dense, sparse or on disk, with what the posterior leaves open."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import torch
from _models import trained
from scipy import sparse

from sccvae import tl
from sccvae.model._base import evaluating


@pytest.fixture
def model():
    """A trained model on a copy of its data, so that tests can write."""
    model = trained("cvae-nb")
    for part in (model.adata.layers, model.adata.uns):
        for key in [k for k in part if k.startswith("corrected")]:
            del part[key]
    return model


def decode(model, **options):
    return model.get_normalized_expression(return_numpy=True, **options)


def test_scales(model):
    adata = model.adata
    assert model.correct(transform_batch="a") is None
    np.testing.assert_allclose(adata.layers["corrected"], 1e4 * decode(model, transform_batch="a"), rtol=1e-5)
    np.testing.assert_allclose(adata.layers["corrected"].sum(1), 1e4, rtol=1e-4)
    assert adata.uns["corrected"] == {"transform_batch": ["a"], "n_samples": 1, "library_size": 1e4}
    model.correct(transform_batch="all", library_size="latent", dtype="float64")
    wanted = decode(model, transform_batch=["a", "b"], library_size="latent")
    np.testing.assert_allclose(adata.layers["corrected"], wanted, rtol=1e-5)
    np.testing.assert_array_equal(decode(model, transform_batch="all", library_size="latent"), wanted)
    np.testing.assert_allclose(adata.layers["corrected"].sum(1), np.asarray(adata.X.sum(1)).ravel(), rtol=1e-4)
    assert adata.layers["corrected"].dtype == np.float64
    assert adata.uns["corrected"]["transform_batch"] == ["a", "b"]


def test_own_batch_of_a_model_without_batches():
    model = trained("vae-normal")
    adata = model.adata.copy()
    model.correct(adata, key_added="denoised")
    np.testing.assert_allclose(adata.layers["denoised"], decode(model), rtol=1e-5)
    assert adata.uns["denoised"] == {"transform_batch": "own", "n_samples": 1}
    with pytest.raises(ValueError, match="library_size=10 is for count likelihoods"):
        model.correct(adata, library_size=10)
    with pytest.raises(ValueError, match=r"transform_batch='a': this VAE does not decode from the batch"):
        model.correct(adata, transform_batch="a")


def test_genes_keep_the_order_of_the_cells_given(model):
    other = model.adata[::2, ::-1].copy()
    model.correct(other)
    np.testing.assert_allclose(other.layers["corrected"], 1e4 * decode(model)[::2, ::-1], rtol=1e-5)
    assert "corrected" not in model.adata.layers


def test_sparse_drops_small_values_only(model):
    model.correct(sparse_below=700.0, batch_size=5)
    dense = 1e4 * decode(model)
    layer = model.adata.layers["corrected"]
    assert sparse.issparse(layer)
    assert layer.format == "csr"
    assert 0 < layer.nnz < dense.size
    np.testing.assert_allclose(layer.toarray(), np.where(dense < 700, 0, dense), rtol=1e-5)


def test_deviation_over_draws(model):
    """Against draws taken by hand: what is averaged over batches within a draw must not count as spread."""
    model.correct(transform_batch="all", n_samples=100, sd=True, seed=2)
    layers = model.adata.layers
    batch = next(model._stream(None))
    with evaluating(5):
        q = model.module.inference(batch)["z"]
        draws = []
        for _ in range(400):
            z, decoded = q.sample(), 0
            for code in (0, 1):
                batch.codes[:, 0] = code
                decoded = decoded + 1e4 * model.module.generative({"z": z}, batch).expression() / 2
            draws.append(decoded)
        draws = torch.stack(draws).numpy()
    np.testing.assert_allclose(layers["corrected_sd"], draws.std(0, ddof=1), rtol=0.45)
    assert np.median(layers["corrected_sd"] / draws.std(0)) == pytest.approx(1, abs=0.05)
    error = draws.std(0) / np.sqrt(100)
    assert np.abs((layers["corrected"] - draws.mean(0)) / error).max() < 8
    wanted = decode(model, transform_batch=["a", "b"], n_samples=30, library_size=1e4, batch_size=3, seed=2)
    model.correct(transform_batch="all", n_samples=30, batch_size=3, seed=2, key_added="corrected_mean")
    np.testing.assert_allclose(layers["corrected_mean"], wanted, rtol=1e-5)
    with pytest.raises(ValueError, match="sd=True needs at least two draws"):
        model.correct(sd=True)


@pytest.mark.parametrize("suffix", [".zarr", ".h5ad"])
def test_on_disk(model, suffix, tmp_path):
    options = {"transform_batch": "b", "n_samples": 3, "sd": True, "batch_size": 7}
    model.correct(**options)
    layers = dict(model.adata.layers)
    for key in ("corrected", "corrected_sd"):
        del model.adata.layers[key]
    del model.adata.uns["corrected"]
    model.correct(key_added="earlier")
    model.correct(out=tmp_path / f"x{suffix}", **options)
    assert "corrected" not in model.adata.layers
    assert "corrected" not in model.adata.uns
    read = ad.read_zarr if suffix == ".zarr" else ad.read_h5ad
    found = read(tmp_path / f"x{suffix}")
    for key in ("corrected", "corrected_sd"):
        np.testing.assert_allclose(found.layers[key], layers[key], rtol=1e-5)
    assert list(found.uns["corrected"]["transform_batch"]) == ["b"]
    assert list(found.obs_names) == list(model.adata.obs_names)
    assert not [key for part in (found.obs, found.obsm, found.uns) for key in part if key.startswith("_scvi")]
    assert "earlier" not in found.uns
    with pytest.raises(FileExistsError):
        model.correct(out=tmp_path / f"x{suffix}", **options)


def test_the_tool_writes_the_same(model):
    adata = model.adata.copy()
    tl.correct(adata, model, reference="a")
    model.correct(transform_batch="a")
    np.testing.assert_array_equal(adata.layers["corrected"], model.adata.layers["corrected"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transform_batch": "z"}, r"it knows \['a', 'b'\]"),
        ({"library_size": -1}, "library_size=-1 must be a positive number or 'latent'"),
        ({"dtype": "int32"}, "dtype='int32' must be a floating type"),
        ({"dtype": "float16", "sparse_below": 1}, "dtype='float16': a sparse layer holds float32 or float64"),
        ({"sparse_below": 0}, "sparse_below=0 must be positive"),
        ({"sparse_below": 1, "out": "x.zarr"}, r"not given with out="),
        ({"out": "x.csv"}, r"must end in \.zarr or \.h5ad"),
        ({"n_samples": 0}, "n_samples=0 must be at least 1"),
    ],
)
def test_bad_input_leaves_nothing_behind(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.correct(**options)
    assert "corrected" not in model.adata.layers
    assert "corrected" not in model.adata.uns


def test_views_and_unknown_genes(model):
    with pytest.raises(ValueError, match="adata is a view"):
        model.correct(model.adata[:5])
    other = model.adata.copy()
    other.var_names = [f"x{g}" for g in other.var_names]
    with pytest.raises(ValueError, match="genes of adata are not known to the model"):
        model.correct(other)


def test_a_layer_that_no_file_can_hold_is_refused(model):
    with pytest.raises(ValueError, match=r"key_added='a/b': .* choose a key without it"):
        model.correct(key_added="a/b")
    assert "a/b" not in model.adata.layers
