"""Models on AnnData: every method of the API, for every model and likelihood."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from _models import CASES, make, trained
from _toys import totals, toy_counts
from scipy import sparse

from sccvae.model import AE, CVAE, IDEC, VAE

N, G = 48, 12


@pytest.fixture(params=CASES)
def model(request):
    return trained(request.param)


@pytest.fixture(params=[name for name in CASES if not name.startswith(("ae", "idec"))])
def variational(request):
    return trained(request.param)


def is_counts(model):
    return model.module.likelihood.support == "counts"


# The whole API, for every model and likelihood


def test_history(model):
    terms = {*model.module.factors.terms, "elbo", "loss"}
    names = {f"{t}_{p}" for t in terms for p in ("train", "validation")} | {"kl_weight", "lr"}
    phases = isinstance(model, IDEC)  # its second one takes half the epochs of the first
    extra = {"clustering_train", "phase"} if phases else set()
    if hasattr(model.module, "alignment") and model.module.alignment.weight:  # a penalty, in training only
        extra = {"alignment_train"}
    assert set(model.history) == names | extra
    for name, frame in model.history.items():
        assert frame.shape == (3 if phases else 2, 1)
        assert list(frame.columns) == [name]
        assert frame.index.name == "epoch"
        assert np.isfinite(frame.to_numpy()[2 * (name == "clustering_train") :]).all()
    assert model.is_trained
    assert not model.module.training


def test_split(model):
    parts = [model.train_indices, model.validation_indices, model.test_indices]
    assert sorted(np.concatenate(parts)) == list(range(N))
    assert [len(p) for p in parts] == [43, 5, 0]


def test_latent(model):
    z = model.get_latent_representation()
    assert z.shape == (N, 2)
    assert z.dtype == np.float32
    assert np.isfinite(z).all()
    assert z.std(0).min() > 0
    assert (z == model.get_latent_representation()).all()
    np.testing.assert_allclose(model.get_latent_representation(batch_size=7), z, rtol=1e-4, atol=1e-5)


def test_latent_of_some_cells(model):
    z = model.get_latent_representation()
    mask = np.arange(N) % 5 == 0
    for indices in (mask, mask.tolist(), np.flatnonzero(mask), list(np.flatnonzero(mask)), pd.Series(mask)):
        np.testing.assert_allclose(model.get_latent_representation(indices=indices), z[mask], rtol=1e-4, atol=1e-5)
    some = model.get_latent_representation(indices=[5, -1, 5])
    np.testing.assert_allclose(some, z[[5, -1, 5]], rtol=1e-4, atol=1e-5)
    assert model.get_latent_representation(indices=[3]).shape == (1, 2)


def test_reconstruction_error(model):
    each = model.get_reconstruction_error(return_mean=False)
    assert each.shape == (N,)
    assert each.dtype == np.float32
    assert np.isfinite(each).all()
    mean = model.get_reconstruction_error()
    assert isinstance(mean, float)
    assert mean == pytest.approx(each.mean(), rel=1e-5)
    if isinstance(model, AE | IDEC):
        x = model.adata.X
        shown = model.get_normalized_expression(return_numpy=True)
        np.testing.assert_allclose(each, ((x - shown) ** 2).sum(1), rtol=1e-3)


def test_normalized_expression(model):
    values = model.get_normalized_expression()
    assert isinstance(values, pd.DataFrame)
    assert values.index.equals(model.adata.obs_names)
    assert list(values.columns) == list(model.adata.var_names)
    assert (values.dtypes == np.float32).all()
    assert np.isfinite(values.to_numpy()).all()
    array = model.get_normalized_expression(return_numpy=True)
    assert isinstance(array, np.ndarray)
    assert (array == values.to_numpy()).all()
    if is_counts(model):
        np.testing.assert_allclose(array.sum(1), 1, rtol=1e-5)
        np.testing.assert_allclose(
            model.get_normalized_expression(library_size=1e4, return_numpy=True), 1e4 * array, rtol=1e-4
        )
        own = model.get_normalized_expression(library_size="latent", return_numpy=True)
        np.testing.assert_allclose(own, array * totals(model.adata), rtol=1e-4)
    else:
        for size in (1e4, "latent"):
            with pytest.raises(ValueError, match=r"library_size=.* needs a count likelihood"):
                model.get_normalized_expression(library_size=size)


def test_genes_and_cells_of_normalized_expression(model):
    everything = model.get_normalized_expression()
    genes = ["gene7", "gene0", "gene11"]
    some = model.get_normalized_expression(gene_list=genes, indices=[9, 2])
    assert list(some.columns) == genes
    assert list(some.index) == ["cell9", "cell2"]
    pd.testing.assert_frame_equal(some, everything.loc[["cell9", "cell2"], genes], rtol=1e-4)
    with pytest.raises(ValueError, match=r"The model has no genes \['nonsense'\]"):
        model.get_normalized_expression(gene_list=["gene1", "nonsense"])


def test_global_random_state_is_left_alone(model):
    before = torch.random.get_rng_state()
    model.get_latent_representation()
    model.get_reconstruction_error()
    model.get_normalized_expression()
    if not isinstance(model, AE | IDEC):
        model.get_normalized_expression(n_samples=2)
        model.get_elbo()
        model.get_marginal_ll(n_mc_samples=2)
        model.sample(3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_description(model, capsys):
    print(model)  # noqa: T201 (scvi-tools prints instead of returning a text)
    text = " ".join(capsys.readouterr().out.split())
    assert f"sccvae {type(model).__name__}(" in text
    assert "n_latent=2" in text
    assert f"p: {model.module.factors.p} q: {model.module.factors.q}" in text
    assert torch.device(model.device) == next(model.module.parameters()).device


def test_description_has_what_is_in_use():
    """Not the None that asks for a default, nor what does nothing."""
    models = [make(CVAE, toy_counts(), train=False, prior=prior) for prior in ("mixture", "fixed", "learned")]
    mixture, fixed, learned = (model._model_summary_string for model in models)
    assert "'dispersion': 'gene-batch'" in mixture
    assert "alignment=3.6" in mixture
    assert "kl='monte_carlo'" in mixture
    assert "kl='analytic'" in fixed
    assert "n_components" not in fixed
    assert "alignment=0," in learned
    assert models[0].settings["alignment"] is None


def test_latent_distribution(variational):
    mean, variance = variational.get_latent_representation(return_dist=True)
    assert mean.shape == variance.shape == (N, 2)
    assert mean.dtype == variance.dtype == np.float32
    assert (variance > 0).all()
    assert (mean == variational.get_latent_representation()).all()
    n = 20
    draws = np.stack([variational.get_latent_representation(give_mean=False, seed=s) for s in range(n)])
    assert (variational.get_latent_representation(give_mean=False, seed=3) == draws[3]).all()
    z = (draws - mean) / np.sqrt(variance)  # (n, N, 2) standard normal
    assert abs(z.mean()) < 5 / np.sqrt(z.size)
    assert abs(z.var() - 1) < 5 * np.sqrt(2 / z.size)
    assert abs(np.mean(z[0] * z[1])) < 5 / np.sqrt(z[0].size)


def test_bounds_of_the_evidence(variational):
    elbo = variational.get_elbo(return_mean=False)
    assert elbo.shape == (N,)
    assert np.isfinite(elbo).all()
    assert isinstance(variational.get_elbo(), float)
    assert variational.get_elbo() == pytest.approx(elbo.mean(), rel=1e-5)
    assert (elbo == variational.get_elbo(return_mean=False)).all()
    assert (elbo != variational.get_elbo(return_mean=False, seed=1)).any()
    bound = variational.get_marginal_ll(n_mc_samples=60)
    assert isinstance(bound, float)
    assert bound == variational.get_marginal_ll(n_mc_samples=60)
    assert variational.get_marginal_ll(n_mc_samples=60, return_mean=False).shape == (N,)
    elbos = [variational.get_elbo(seed=s) for s in range(12)]
    assert np.mean(elbos) - 2 * np.std(elbos) / np.sqrt(12) < bound


@pytest.mark.parametrize("name", ["vae-nb", "cvae-learned"])
def test_elbo_is_reconstruction_and_kl(name):
    """The same seed draws the same z."""
    model = trained(name)
    kl = -(model.get_elbo(return_mean=False) + model.get_reconstruction_error(return_mean=False))
    mean, variance = model.get_latent_representation(return_dist=True)
    q = torch.distributions.Normal(torch.from_numpy(mean), torch.from_numpy(variance).sqrt())
    if name == "vae-nb":
        p = torch.distributions.Normal(0.0, 1.0)
    else:
        with torch.no_grad():
            p = model.module.prior(next(model._stream(None)))["z"]
    wanted = torch.distributions.kl_divergence(q, p).sum(1)
    np.testing.assert_allclose(kl, wanted, rtol=1e-3, atol=1e-4)


def test_sample(variational):
    cells = variational.sample(30, seed=4)
    assert cells.shape == (30, G)
    assert list(cells.var_names) == list(variational.adata.var_names)
    assert cells.obs_names.is_unique
    assert cells.X.dtype == np.float32
    assert cells.obsm["z"].shape == (30, 2)
    assert cells.obsm["z"].dtype == np.float32
    reads = not isinstance(variational, VAE)
    if reads:
        assert list(cells.obs["batch"].cat.categories) == ["a", "b"]
    else:
        assert cells.obs.empty
    values = cells.X.toarray() if sparse.issparse(cells.X) else cells.X
    assert np.isfinite(values).all()
    if is_counts(variational):
        assert isinstance(cells.X, sparse.csr_matrix)
        assert (values == values.round()).all()
        assert values.min() >= 0
    elif variational.module.likelihood.support == "unit":
        assert set(np.unique(values)) <= {0, 1}
    again = variational.sample(30, seed=4)
    assert (again.X != cells.X).sum() == 0
    assert again.obs.equals(cells.obs)
    assert (variational.sample(30, seed=5).obsm["z"] != cells.obsm["z"]).any()
    expected = variational.sample(5, mean=True)
    shown = expected.X.toarray() if sparse.issparse(expected.X) else expected.X
    assert np.isfinite(shown).all()
    if not reads:
        with pytest.raises(ValueError, match="a VAE knows no batch; use a CVAE or a GMVAE"):
            variational.sample(5, batch="b")
        return
    assert list(variational.sample(5, batch="b").obs["batch"]) == ["b"] * 5
    with pytest.raises(ValueError, match=r"'z' is no category of obs\['batch'\] .*it knows \['a', 'b'\]"):
        variational.sample(5, batch="z")


def test_sample_more_than_a_mini_batch(monkeypatch):
    monkeypatch.setattr("sccvae.model._base.MOST", 10)
    cells = trained("cvae-nb").sample(33)
    assert cells.shape == (33, G)
    assert len(np.unique(cells.obsm["z"], axis=0)) == 33


def test_sample_follows_the_training_data():
    model = trained("cvae-nb")
    cells = model.sample(2000, mean=True)
    drawn, seen = (np.quantile(totals(a), [0.1, 0.5, 0.9]) for a in (cells, model.adata))
    np.testing.assert_allclose(drawn, seen, rtol=0.1)
    assert 0.45 < (cells.obs["batch"] == "a").mean() < 0.55
    with torch.no_grad():
        p_z = model.module.mixture()
        mean, scale = p_z.mean.numpy(), p_z.stddev.numpy()
    np.testing.assert_allclose(cells.obsm["z"].mean(0), mean, atol=0.12)
    np.testing.assert_allclose(cells.obsm["z"].std(0), scale, rtol=0.1)


# What the AE cannot do


def test_ae_has_no_distribution_of_z():
    model = trained("ae")
    with pytest.raises(ValueError, match="deterministic encoder"):
        model.get_latent_representation(return_dist=True)
    with pytest.raises(ValueError, match="deterministic encoder"):
        model.get_latent_representation(give_mean=False)
    for name in ("get_elbo", "get_marginal_ll", "sample"):
        assert not hasattr(model, name)
