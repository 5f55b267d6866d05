"""Models in use: new data, repeatability, training again, and what they learn."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from _models import CASES, FAST, TINY, make, toy_for, trained
from _toys import toy_counts, toy_values
from scipy import sparse

from sccvae.distributions import NegativeBinomial
from sccvae.model import AE, CVAE, GMVAE, IDEC, VAE

N, G = 48, 12


# New data


@pytest.mark.parametrize("name", ["ae", "idec", "vae-nb", "cvae-nb", "cvae-learned"])
def test_new_data_in_any_shape_give_the_same_latent(name, tmp_path):
    model = trained(name)
    adata = model.adata
    z = model.get_latent_representation()
    x = adata.X.toarray() if sparse.issparse(adata.X) else adata.X
    plain = ad.AnnData(x, obs=adata.obs[["batch"]], var=pd.DataFrame(index=adata.var_names))
    order = np.random.default_rng(0).permutation(G)
    reordered = plain[:, order].copy()
    extra = ad.AnnData(np.ones((N, 1), np.float32), obs=plain.obs, var=pd.DataFrame(index=["more"]))
    wide = ad.concat([extra, reordered], axis=1, merge="same")
    forms = {
        "plain": plain, "reordered": reordered, "superset": wide, "view": plain[:], "view of genes": wide[:, ::-1],
    }  # fmt: skip
    for kind, convert in {
        "csc": sparse.csc_matrix,
        "csr": sparse.csr_matrix,
        "float64": lambda x: x.astype(float),
    }.items():
        forms[kind] = plain.copy()
        forms[kind].X = convert(x)
    wide.write_h5ad(tmp_path / "wide.h5ad")
    forms["backed"] = ad.read_h5ad(tmp_path / "wide.h5ad", backed="r")
    for kind, form in forms.items():
        assert (model.get_latent_representation(form) == z).all(), kind
    if not isinstance(model, AE | IDEC):
        assert model.get_elbo(forms["backed"]) == model.get_elbo()
    frame = model.get_normalized_expression(reordered)
    assert list(frame.columns) == list(reordered.var_names)
    assert list(model.get_normalized_expression(wide).columns) == list(adata.var_names)  # more genes: the model's order
    assert not any(key.startswith("_scvi") for key in plain.obs)  # nothing is written to new data
    assert not plain.uns


@pytest.mark.parametrize("name", ["ae", "vae-normal", "cvae-nb"])
def test_arrays_fit_the_layers_of_their_cells(name, tmp_path):
    """Genes in another order than the model's: columns follow the cells."""
    model = trained(name)
    order = np.random.default_rng(1).permutation(G)
    cells = model.adata[:, order].copy()
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", adata=cells)
    for a, given in ((model, {"adata": cells}), (loaded, {})):
        frame = a.get_normalized_expression(**given)
        assert list(frame.columns) == list(cells.var_names)
        pd.testing.assert_frame_equal(frame[model.adata.var_names], model.get_normalized_expression(), rtol=1e-5)
        cells.layers["array"] = a.get_normalized_expression(return_numpy=True, **given)
        np.testing.assert_array_equal(cells.layers["array"], frame)
        out = np.zeros(cells.shape, np.float32)
        a.get_normalized_expression(out=out, **given)
        np.testing.assert_array_equal(out, frame)
        genes = ["gene3", "gene0"]  # a list keeps its own order
        assert list(a.get_normalized_expression(gene_list=genes, **given).columns) == genes
        if name != "ae":
            drawn, wanted = a.posterior_predictive_sample(**given), model.posterior_predictive_sample()
            drawn, wanted = (v.toarray() if sparse.issparse(v) else v for v in (drawn, wanted))
            np.testing.assert_allclose(drawn, wanted[:, order], rtol=1e-5)
    loaded.correct(**({"library_size": 1} if name == "cvae-nb" else {}))
    np.testing.assert_allclose(cells.layers["corrected"], cells.layers["array"], rtol=1e-5)


def test_columns_of_a_query_that_lacks_genes_are_the_models():
    model = trained("cvae-nb")
    query = model.load_query(model.adata[:, [7, 0, 3, 2, 11, 5, 9, 10]].copy())
    assert list(query.get_normalized_expression().columns) == list(model.adata.var_names)


def test_training_from_a_backed_file(tmp_path):
    adata = toy_counts()
    adata.layers["counts"] = adata.X.copy()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    z = make(CVAE, backed).get_latent_representation()
    assert (z == make(CVAE, adata).get_latent_representation()).all()


def test_layer_and_untouched_data():
    adata = toy_counts()
    adata.layers["counts"] = sparse.csc_matrix(adata.X)
    adata.X = np.log1p(adata.X.toarray())
    before = adata.copy()
    model = make(CVAE, adata, setup={"layer": "counts", "batch_key": "batch"})
    assert (model.get_latent_representation() == make(CVAE, toy_counts()).get_latent_representation()).all()
    assert (adata.X == before.X).all()
    assert (adata.layers["counts"] != before.layers["counts"]).nnz == 0
    assert adata.layers["counts"].format == "csc"
    assert adata.obs[before.obs.columns].equals(before.obs)
    assert set(adata.obsm) - {k for k in adata.obsm if k.startswith("_scvi")} == set()


# Repeatability and use


@pytest.mark.parametrize("name", ["ae-mask", "idec", "cvae-nb", "cvae-deep"])
def test_same_seeds_same_bits(name):
    cls, likelihood, options = CASES[name]
    torch.manual_seed(123)
    torch.rand(7)
    again = make(cls, toy_for(likelihood), **options)
    assert (again.get_latent_representation() == trained(name).get_latent_representation()).all()
    other = make(cls, toy_for(likelihood), train=False, seed=1, **options)
    fresh = make(cls, toy_for(likelihood), train=False, **options)
    weights = [next(iter(m.module.parameters())).detach() for m in (other, fresh)]
    assert not torch.equal(*weights)


def test_making_a_model_leaves_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    make(CVAE, toy_counts(), train=False)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_two_models_share_nothing():
    adata = toy_counts()
    likelihood = NegativeBinomial()
    CVAE.setup_anndata(adata, batch_key="batch")
    a, b = (CVAE(adata, likelihood=likelihood, **TINY) for _ in range(2))
    a.train(**FAST)
    assert not torch.equal(a.module.likelihood.log_theta, b.module.likelihood.log_theta)
    VAE.setup_anndata(adata)  # the same data for another model
    VAE(adata, **TINY).train(**FAST)
    assert np.isfinite(a.get_elbo())


def test_sizes_of_sampling():
    model = trained("cvae-nb")
    assert model.sample(np.int64(3)).n_obs == 3
    for n in (2.5, "3", True):
        with pytest.raises(TypeError, match=f"n={n!r} must be a whole number"):
            model.sample(n)
    one, other = (model.get_marginal_ll(n_mc_samples=300, batch_size=size) for size in (None, 64))
    assert one == pytest.approx(other, abs=0.5)


def test_an_untrained_model_warns():
    model = make(VAE, toy_counts(), train=False)
    with pytest.warns(UserWarning, match="untrained"):
        assert model.get_latent_representation().shape == (N, 2)


def test_training_again_starts_from_the_weights_there_are():
    model = make(AE, toy_values())
    before = model.history["elbo_train"]["elbo_train"].iloc[-1]
    model.train(**(FAST | {"max_epochs": 1, "lr": 1e-6}))
    assert model.history["elbo_train"]["elbo_train"].iloc[0] < 1.3 * before


def test_train_without_validation_and_with_test_cells():
    model = make(VAE, toy_counts(), train=False)
    model.train(train_size=1.0, **FAST)
    assert "elbo_validation" not in model.history
    model.train(train_size=0.5, validation_size=0.25, **FAST)
    assert [len(p) for p in (model.train_indices, model.validation_indices, model.test_indices)] == [24, 12, 12]


def test_interrupted_training_leaves_a_usable_model():
    model = make(VAE, toy_counts(), train=False)
    calls = []
    inner = model.module.loss

    def loss(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return inner(*args, **kwargs)

    model.module.loss = loss
    model.train(**FAST)
    assert model.is_trained
    assert len(model.history["loss_train"]) == 1
    assert np.isfinite(model.get_elbo())


def test_checkpoint_resumes_a_model(tmp_path):
    from lightning import Callback

    class Stop(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if len(pl_module.rows) == 2:
                raise RuntimeError("power cut")

    options = FAST | {"max_epochs": 4}
    whole = make(CVAE, toy_counts(), train=False)
    whole.train(**options)
    first = make(CVAE, toy_counts(), train=False)
    with pytest.raises(RuntimeError, match="power cut"):
        first.train(checkpoint_dir=tmp_path, callbacks=[Stop()], **options)
    second = make(CVAE, toy_counts(), train=False)
    second.train(checkpoint_dir=tmp_path, **options)
    assert (second.get_latent_representation() == whole.get_latent_representation()).all()
    assert all(second.history[k].equals(whole.history[k]) for k in whole.history)
    third = make(CVAE, toy_counts(), train=False)
    third.train(checkpoint_dir=tmp_path, **options)  # finished: read, not trained
    assert (third.get_latent_representation() == whole.get_latent_representation()).all()
    assert third.is_trained


def test_scvi_tools_registry_works(capsys):
    model = make(CVAE, toy_counts(), setup={"batch_key": "batch", "labels_key": "donor"}, train=False)
    for show in (model.view_anndata_setup, model.view_registry):
        show()
        assert "batch" in capsys.readouterr().out
    with pytest.raises(NotImplementedError, match=r"keeps the set-up it was made with: run `CVAE\.setup_anndata"):
        model.update_setup_method_args({"batch_key": "donor"})
    assert model.summary_stats["n_batch"] == 2
    assert model.adata_manager.get_state_registry("labels")["categorical_mapping"].tolist() == ["d1", "d2", "d3"]


def test_the_set_up_of_a_model_without_a_registered_anndata(capsys, tmp_path):
    """A query and a model that was loaded without data have no manager, only a registry."""
    model = make(CVAE, toy_counts())
    model.save(tmp_path / "model")
    cells = toy_counts(20)
    cells.obs["batch"] = "new"
    query = model.load_query(cells)
    assert (query.summary_stats["n_cells"], query.summary_stats["n_batch"]) == (20, 3)
    assert model.summary_stats["n_cells"] == model.adata.n_obs
    for other, last in ((query, "new"), (CVAE.load(tmp_path / "model"), "b")):
        other.view_anndata_setup()
        shown = capsys.readouterr().out
        assert "adata.obs['batch']" in shown
        assert last in shown
        with pytest.raises(ValueError, match="registered no AnnData"):
            other.deregister_manager()
    model.deregister_manager()
    CVAE.view_setup_args(tmp_path / "model")
    assert "'batch_key': 'batch'" in capsys.readouterr().out
    assert CVAE.load_registry(tmp_path / "model")["setup_args"]["batch_key"] == "batch"
    with pytest.raises(NotImplementedError, match="load reads every format"):
        CVAE.convert_legacy_save(tmp_path / "model", tmp_path / "new")


def test_images_keep_their_shape():
    adata = toy_values()
    adata.uns["image_shape"] = np.array([3, 4])
    model = make(VAE, adata, setup={}, likelihood="bernoulli")
    assert model.sample(2).uns["image_shape"] == [3, 4]


def test_settings_may_be_numpy_numbers(tmp_path):
    adata = toy_counts()
    CVAE.setup_anndata(adata, batch_key="batch")
    model = CVAE(adata, n_latent=np.int64(2), n_hidden=np.int32(4), dropout=np.float32(0.1), seed=np.int64(3))
    model.train(**FAST)
    model.save(tmp_path / "model")
    assert CVAE.load(tmp_path / "model").settings["n_latent"] == 2


@pytest.mark.parametrize("cls", [VAE, CVAE, GMVAE])
def test_sizes_by_the_number_of_cells_are_kept(cls, tmp_path, monkeypatch):
    n_cells = toy_counts().n_obs

    def sizes(n):
        return {"n_hidden": 3, "n_latent": 2} if n == n_cells else {"n_hidden": 1_000_000, "n_latent": 1_000_000}

    monkeypatch.setattr("sccvae.model._base.default_sizes", sizes)
    adata = toy_counts()
    cls.setup_anndata(adata, batch_key="batch")
    model = cls(adata)
    assert (model.settings["n_hidden"], model.settings["n_latent"]) == (3, 2)
    model.train(**FAST)
    assert model.get_latent_representation().shape == (n_cells, 2)
    model.save(tmp_path / "model")
    loaded = cls.load(tmp_path / "model")  # without data, and whatever their number is then
    assert loaded.settings == model.settings
    assert loaded.module.decoder.n_out == 3
    query = model.load_query(adata[:9].copy())
    assert query.settings == model.settings
    assert cls(adata, n_latent=4).settings["n_latent"] == 4


# Learning


def test_cvae_removes_a_batch_effect():
    """Two batches that differ by a gene-wise factor; z must not tell them apart while a VAE's does."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    n, g = 300, 30
    batch = np.arange(n) % 2
    types = rng.gamma(1.0, 1.0, (3, g))[rng.integers(3, size=n)]
    factor = np.exp(rng.normal(0, 0.8, g))
    x = rng.poisson(types * np.where(batch[:, None] == 1, factor, 1) * 6).astype(np.float32)
    adata = ad.AnnData(
        sparse.csr_matrix(x), obs=pd.DataFrame({"batch": batch.astype(str)}, index=[str(i) for i in range(n)])
    )
    scores = {}
    for cls in (VAE, CVAE):
        model = make(cls, adata, train=False, n_latent=4, n_hidden=32)
        model.train(max_epochs=30, batch_size=32, lr=5e-3, accelerator="cpu", progress_bar=False)
        z = model.get_latent_representation()
        scores[cls] = LogisticRegression().fit(z, batch).score(z, batch)
    assert scores[VAE] > 0.9
    assert scores[CVAE] < 0.7
    truth = types / types.sum(1, keepdims=True)  # as in batch "0"
    corrected = model.get_normalized_expression(transform_batch="0", return_numpy=True)
    own = model.get_normalized_expression(return_numpy=True)
    ones = batch == 1
    assert np.abs(corrected - truth)[ones].mean() < 0.5 * np.abs(own - truth)[ones].mean()


def test_linear_ae_spans_the_principal_components():
    """8 components of 8 x 8 digits: principal angles under 5 degrees, error within 1 % of PCA's."""
    from scipy.linalg import subspace_angles
    from sklearn.datasets import load_digits
    from sklearn.decomposition import PCA

    x = (load_digits().data / 16).astype(np.float32)
    adata = ad.AnnData(x)
    AE.setup_anndata(adata)
    model = AE(adata, n_latent=8, linear=True)
    model.train(60, batch_size=64, lr=0.02, train_size=1.0, accelerator="cpu", progress_bar=False)
    pca = PCA(8).fit(x)
    decoder = model.module.likelihood.mean_head.weight.detach().numpy()
    assert np.degrees(subspace_angles(decoder, pca.components_.T)).max() < 5
    error = ((x - pca.inverse_transform(pca.transform(x))) ** 2).sum(1).mean()
    assert error <= model.get_reconstruction_error() * (1 + 1e-6)
    assert model.get_reconstruction_error() < 1.01 * error
