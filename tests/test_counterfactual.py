"""What if: other conditions, arithmetic in the latent space, and draws from the posterior predictive."""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from _models import FAST, make, trained
from _toys import toy_counts
from anndata import AnnData
from scipy import sparse

from sccvae import pl, tl
from sccvae.metrics import r_squared_of_means
from sccvae.model import CVAE, GMVAE, VAE

KEYS = {
    "batch_key": "batch",
    "categorical_covariate_keys": ["donor", "treated"],
    "continuous_covariate_keys": ["dose", "size"],
}


@cache
def conditioned():
    """A model with five conditions."""
    return make(CVAE, toy_counts(), setup=KEYS)


def cells_with(**columns) -> AnnData:
    adata = toy_counts()
    for key, value in columns.items():
        adata.obs[key] = value
    return adata


# Replacing conditions


@pytest.mark.parametrize(
    "condition",
    [{"treated": 1}, {"donor": "d2"}, {"dose": 7.5}, {"batch": "a", "treated": "0", "dose": 1, "size": 2.0}],
    ids=str,
)
def test_conditions_are_replaced_in_the_decoder_alone(condition):
    """Encoded as they are, decoded as cells whose columns of obs were overwritten."""
    model = conditioned()
    with torch.no_grad():
        z = model.module.inference(next(model._stream(None)))["z"].loc
        target = next(model._stream(cells_with(**condition)))
        wanted = model.module.generative({"z": z}, target).expression(1e4).numpy()
    got = model.predict_counterfactual(condition=condition, library_size=1e4)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    assert list(got.columns) == list(model.adata.var_names)
    assert list(got.index) == list(model.adata.obs_names)
    assert not np.allclose(got, model.get_normalized_expression(library_size=1e4))


def test_the_batch_alone_is_a_transformed_batch():
    model = conditioned()
    options = {"indices": [5, 2], "gene_list": ["gene3", "gene0"], "n_samples": 3, "seed": 4, "return_numpy": True}
    one = model.predict_counterfactual(condition={"batch": "b"}, **options)
    np.testing.assert_array_equal(one, model.get_normalized_expression(transform_batch="b", **options))
    out = np.zeros((48, 12), dtype=np.float32)
    assert model.predict_counterfactual(condition={"batch": "b"}, out=out, batch_size=7) is out
    np.testing.assert_allclose(out, model.predict_counterfactual(condition={"batch": "b"}), rtol=1e-5)


def test_a_mixture_changes_conditions():
    adata = toy_counts()
    model = make(GMVAE, adata, n_components=2)
    a, b = (model.predict_counterfactual(condition={"batch": name}, return_numpy=True) for name in "ab")
    own = model.get_normalized_expression(return_numpy=True)
    in_a = (adata.obs["batch"] == "a").to_numpy()[:, None]
    np.testing.assert_allclose(np.where(in_a, a, b), own, rtol=1e-5)
    assert not np.allclose(a, b)


@pytest.mark.parametrize(
    ("condition", "error", "message"),
    [
        (
            {"treatment": "stim"},
            ValueError,
            r"names \['treatment'\], .* set up with \['batch', 'donor', 'treated', 'do",
        ),
        ({}, ValueError, "condition is empty"),
        ("stim", TypeError, "must be a dictionary"),
        ({"donor": "d9"}, ValueError, r"'d9' is no category of obs\['donor'\] .*it knows \['d1', 'd2', 'd3'\]"),
        ({"dose": "much"}, ValueError, r"condition\['dose'\]='much' must be a finite number"),
        ({"dose": np.nan}, ValueError, "finite number"),
    ],
)
def test_unknown_conditions_are_named(condition, error, message):
    out = np.full((48, 12), -1.0)
    with pytest.raises(error, match=message):
        conditioned().predict_counterfactual(condition=condition, out=out)
    assert (out == -1).all()


def test_a_category_without_cells_was_not_learned():
    adata = toy_counts()
    adata.obs["batch"] = pd.Categorical(adata.obs["batch"], categories=["a", "b", "c"])
    model = make(CVAE, adata)
    with pytest.raises(ValueError, match=r"No cell .* has obs\['batch'\] == 'c', so it was not learned|it knows"):
        model.predict_counterfactual(condition={"batch": "c"})


def test_a_decoder_without_conditions_says_so():
    message = "this CVAE does not decode from conditions .*any prior but 'learned'.*w_prior='fixed'.*predict_pert"
    with pytest.raises(ValueError, match=message):
        trained("cvae-learned").predict_counterfactual(condition={"batch": "a"})
    assert not hasattr(trained("vae-nb"), "predict_counterfactual")


# Planted truth


@cache
def planted():
    """Counts of cells on a disc of states; a treatment multiplies the rates of a third of the genes by known factors.

    Three types by the angle, and a fourth, "mid", in the middle, of which no treated cell is seen.
    """
    rng = np.random.default_rng(0)
    n, n_genes = 900, 30
    radius, angle = np.sqrt(rng.uniform(0, 1, n)), rng.uniform(0, 2 * np.pi, n)
    types = np.where(radius < 0.4, 3, (angle * 3 / (2 * np.pi)).astype(int))
    treated = rng.permutation(n) % 2
    state = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    rates = np.exp(state @ rng.normal(size=(2, n_genes)) + rng.uniform(1, 2.5, size=n_genes))
    fold = np.ones(n_genes)
    fold[:5], fold[5:10] = 4.0, 0.25
    x = rng.poisson(rates * np.where(treated[:, None] == 1, fold, 1.0)).astype(np.float32)
    obs = pd.DataFrame(
        {"type": np.array(["t0", "t1", "t2", "mid"])[types], "treatment": np.array(["ctrl", "stim"])[treated]},
        index=[f"c{i}" for i in range(n)],
    )
    adata = AnnData(sparse.csr_matrix(x), obs=obs, var=pd.DataFrame(index=[f"g{j}" for j in range(n_genes)]))
    seen = adata[~((types == 3) & (treated == 1))].copy()
    before = rates[(types == 3) & (treated == 0)].mean(0)
    return adata, seen, before, before * fold


@cache
def fitted(cls):
    """A model of the cells seen; only a CVAE is told the treatment."""
    seen = planted()[1].copy()
    cls.setup_anndata(seen, **({"batch_key": "treatment"} if cls is CVAE else {}))
    model = cls(seen, n_latent=4, n_hidden=32)
    model.train(max_epochs=40, batch_size=64, lr=5e-3, accelerator="cpu", progress_bar=False)
    return model


def held_out(adata, state):
    return adata[(adata.obs["type"] == "mid").to_numpy() & (adata.obs["treatment"] == state).to_numpy()].copy()


def check_response(values, before, after):
    """Predicted proportions (n, genes) of an unseen response: close to the true ones, and no copy of the controls."""
    predicted, wanted = values.mean(axis=0), after / after.sum()
    assert np.corrcoef(predicted, wanted)[0, 1] ** 2 > 0.97
    change = np.log(predicted / (before / before.sum()))
    truth = np.log(wanted / (before / before.sum()))
    assert np.corrcoef(change, truth)[0, 1] > 0.95
    assert np.abs(change - truth).mean() < 0.2 < np.abs(truth).mean()


def test_counterfactual_finds_a_planted_response_of_an_unseen_type():
    adata, _, before, after = planted()
    model = fitted(CVAE)
    controls = held_out(adata, "ctrl")
    treated = model.predict_counterfactual(controls, condition={"treatment": "stim"}).to_numpy()
    check_response(treated, before, after)
    drawn = model.posterior_predictive_sample(controls, condition={"treatment": "stim"})
    real = held_out(adata, "stim")
    assert r_squared_of_means(drawn, real.X) > 0.97 > r_squared_of_means(controls.X, real.X)


def test_arithmetic_finds_a_planted_response_of_an_unseen_type():
    adata, _, before, after = planted()
    model = fitted(VAE)
    states = {"condition_key": "treatment", "cell_type_key": "type"}
    controls = held_out(adata, "ctrl")
    treated = model.predict_perturbation("ctrl", "stim", adata=controls, **states).to_numpy()
    check_response(treated, before, after)
    shift = model.latent_delta("ctrl", "stim", **states)
    drawn = model.posterior_predictive_sample(controls, shift=shift)
    assert r_squared_of_means(drawn, held_out(adata, "stim").X) > 0.97


# Latent arithmetic


def test_delta_by_hand():
    model = trained("vae-nb")
    obs, z = model.adata.obs, model.get_latent_representation().astype(np.float64)
    in_b = (obs["batch"] == "b").to_numpy()
    plain = model.latent_delta("a", "b")
    np.testing.assert_allclose(plain, z[in_b].mean(0) - z[~in_b].mean(0), rtol=1e-6)
    by_donor = [
        z[in_b & (obs["donor"] == d).to_numpy()].mean(0) - z[~in_b & (obs["donor"] == d).to_numpy()].mean(0)
        for d in ("d1", "d2", "d3")
    ]
    np.testing.assert_allclose(model.latent_delta("a", "b", cell_type_key="donor"), np.mean(by_donor, 0), rtol=1e-6)
    np.testing.assert_allclose(model.latent_delta("b", "a"), -plain, rtol=1e-6)
    other = model.latent_delta(0, 1, condition_key="treated")
    assert other.shape == (2,)
    assert not np.allclose(other, plain)


def test_a_type_that_lacks_a_state_does_not_count():
    adata = toy_counts()
    model = make(VAE, adata, setup={"batch_key": "batch"})
    types = np.array(["t0", "t1"])[np.arange(48) // 24]
    types[(types == "t1") & (adata.obs["batch"] == "b")] = "t2"  # t1 in a only, t2 in b only
    adata.obs["type"] = types
    z, in_b, is_t0 = model.get_latent_representation(), (adata.obs["batch"] == "b").to_numpy(), types == "t0"
    wanted = z[in_b & is_t0].mean(0) - z[~in_b & is_t0].mean(0)
    np.testing.assert_allclose(model.latent_delta("a", "b", cell_type_key="type"), wanted, rtol=1e-4)
    adata.obs["type"] = pd.Series(np.where(is_t0, None, types), adata.obs_names, dtype=object)
    with pytest.raises(ValueError, match=r"No cell type in obs\['type'\] has cells of both 'a' \(\['t1'\]\)"):
        model.latent_delta("a", "b", cell_type_key="type")


@pytest.mark.parametrize("name", ["vae-nb", "vae-normal", "cvae-nb", "ae"])
def test_perturbed_cells_are_decoded_from_the_shifted_z(name):
    model = trained(name)
    delta = model.latent_delta("a", "b", condition_key="batch").astype(np.float32)
    rows = np.flatnonzero(model.adata.obs["batch"] == "a")
    batch = next(model._stream(None, rows))
    with torch.no_grad():
        q = model.module.inference(batch)["z"]
        z = q if isinstance(q, torch.Tensor) else q.loc
        wanted = model.module.generative({"z": z + torch.from_numpy(delta)}, batch).expression().numpy()
    got = model.predict_perturbation("a", "b", condition_key="batch")
    np.testing.assert_allclose(got, wanted, rtol=1e-4)
    assert list(got.index) == list(model.adata.obs_names[rows])  # by default, the training cells before
    some = model.predict_perturbation("a", "b", condition_key="batch", indices=rows[:3], return_numpy=True)
    np.testing.assert_allclose(some, wanted[:3], rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"source": "a", "target": "c"}, ValueError, r"has obs\['batch'\] == 'c'; there are \['a', 'b'\]"),
        ({"source": "a", "target": "b", "cell_type_key": "type"}, KeyError, "cell_type_key='type': there is no"),
        ({"source": "a", "target": "b", "condition_key": "x"}, KeyError, "condition_key='x': there is no"),
    ],
)
def test_states_that_are_not_there(arguments, error, message):
    with pytest.raises(error, match=message):
        trained("vae-nb").predict_perturbation(**arguments)


def test_states_are_found_by_value():
    """A column of whole numbers with a gap, once, is one of floats."""
    adata = toy_counts()
    adata.obs["treated"] = adata.obs["treated"].astype(float)
    model = make(VAE, adata, setup={"batch_key": "treated"})
    wanted = model.predict_perturbation(0.0, 1.0)
    for source, target in ((0, 1), (np.int64(0), True), ("0.0", "1.0")):
        pd.testing.assert_frame_equal(model.predict_perturbation(source, target), wanted)
    for other in (2, None, [1]):
        with pytest.raises(ValueError, match=r"No cell of the training data has obs\['treated'\] =="):
            model.latent_delta(0, other)


def test_arithmetic_needs_to_know_the_column():
    model = make(VAE, toy_counts(), setup={})
    with pytest.raises(ValueError, match="condition_key= is needed"):
        model.latent_delta("a", "b")


# Draws and the check by them


def test_draws_have_the_mean_of_the_model():
    model = conditioned()
    draws = [model.posterior_predictive_sample(condition={"treated": 1}, seed=i) for i in range(60)]
    assert all(sparse.issparse(d) and d.dtype == np.float32 for d in draws)
    mean = sum(d.toarray() for d in draws) / 60
    wanted = model.predict_counterfactual(condition={"treated": 1}, library_size="latent", n_samples=60)
    assert np.corrcoef(mean.mean(0), wanted.mean(0))[0, 1] > 0.999
    np.testing.assert_allclose(mean.sum(), wanted.to_numpy().sum(), rtol=0.02)
    assert (draws[0] != draws[1]).nnz
    assert not (draws[0] != model.posterior_predictive_sample(condition={"treated": 1})).nnz
    with pytest.raises(ValueError, match=r"shift has shape \(3,\); it must be 2 finite"):
        model.posterior_predictive_sample(shift=np.zeros(3))
    assert isinstance(trained("vae-normal").posterior_predictive_sample(), np.ndarray)


def test_several_draws_of_chosen_genes():
    """(cells, genes, n_samples), as scvi-tools has it; the same seed gives the same."""
    model = conditioned()
    options = {"n_samples": 400, "gene_list": ["gene3", "gene1"], "condition": {"treated": 1}, "indices": [3, 8, 9]}
    draws = model.posterior_predictive_sample(batch_size=2, **options)
    assert draws.shape == (3, 2, 400)
    assert draws.dtype == np.float32
    wanted = model.predict_counterfactual(library_size="latent", return_numpy=True, **options)
    np.testing.assert_allclose(draws.mean(-1), wanted, rtol=0.25)
    np.testing.assert_array_equal(draws, model.posterior_predictive_sample(batch_size=2, **options))
    assert (draws != model.posterior_predictive_sample(batch_size=2, seed=1, **options)).any()
    one = model.posterior_predictive_sample(gene_list="gene3")
    np.testing.assert_array_equal(one.toarray()[:, 0], model.posterior_predictive_sample().toarray()[:, 3])
    with pytest.raises(ValueError, match="n_samples=0 must be at least 1"):
        model.posterior_predictive_sample(n_samples=0)


def test_check_by_hand():
    model = trained("cvae-nb")
    table = model.posterior_predictive_check(n_samples=30, batch_size=20, progress_bar=False)
    x = model.adata.X.toarray()
    np.testing.assert_allclose(table["mean"], x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(table["variance"], x.var(0), rtol=1e-5)
    np.testing.assert_allclose(table["zero_fraction"], (x == 0).mean(0), rtol=1e-6)
    means = np.stack([model.posterior_predictive_sample(seed=i).toarray().mean(0) for i in range(200)])
    low, high = np.quantile(means, [0.05, 0.95], axis=0)
    width = high - low
    assert (np.abs(table["mean_low"] - low) < width).all()
    assert (np.abs(table["mean_high"] - high) < width).all()
    for name in ("mean", "variance", "zero_fraction"):
        inside = table[name].between(table[f"{name}_low"], table[f"{name}_high"])
        assert (table[f"{name}_inside"] == inside).all()
    with pytest.raises(ValueError, match="band=1"):
        model.posterior_predictive_check(band=1)


def test_check_leaves_out_the_genes_that_a_query_lacks():
    model, cells = trained("cvae-nb"), toy_counts(seed=3)
    has = ~np.isin(np.arange(12), [1, 4, 6])
    query = model.load_query(cells[:, has].copy())
    query.train(**FAST)
    table = query.posterior_predictive_check(n_samples=10, progress_bar=False)
    assert list(table.index) == list(cells.var_names[has])
    np.testing.assert_allclose(table["mean"], cells.X.toarray()[:, has].mean(0), rtol=1e-6)
    assert table["mean_inside"].dtype == bool
    pl.posterior_predictive(table)
    assert query.posterior_predictive_sample().shape == (48, 12)
    whole = query.posterior_predictive_check(toy_counts(), n_samples=10, progress_bar=False)
    assert list(whole.index) == list(cells.var_names)  # cells of the reference have all


def test_check_tells_a_fitting_likelihood_from_another():
    """Poisson bands are too narrow for overdispersed counts."""
    rng = np.random.default_rng(0)
    mean = np.full((600, 30), 4.0)
    wide = rng.poisson(rng.gamma(0.5, mean / 0.5)).astype(np.float32)
    wide[:, 0] += 1
    obs = pd.DataFrame({"batch": np.array(["a", "b"])[np.arange(600) % 2]}, index=[f"c{i}" for i in range(600)])
    shares = {}
    for likelihood in ("poisson", "nb"):
        cells = AnnData(wide.copy(), obs=obs.copy(), var=pd.DataFrame(index=[f"g{i}" for i in range(30)]))
        CVAE.setup_anndata(cells, batch_key="batch")
        fit = CVAE(cells, likelihood=likelihood, n_latent=2, n_hidden=8)
        fit.train(max_epochs=40, lr=1e-2, accelerator="cpu", progress_bar=False)
        shares[likelihood] = fit.posterior_predictive_check(n_samples=60, progress_bar=False)["variance_inside"].mean()
    assert shares["nb"] >= 0.75 > 0.25 >= shares["poisson"]


# The whole job


def test_tool(monkeypatch):
    adata = toy_counts()
    train = {"max_epochs": 2, "batch_size": 16, "accelerator": "cpu", "progress_bar": False}
    options = {"n_latent": 2, "model_options": {"n_hidden": 8}, "train_options": train}
    done = tl.counterfactual(adata, {"treated": 1}, copy=True, **options)
    assert not adata.layers
    assert not adata.uns
    entry = done.uns["counterfactual"]
    assert entry["condition"] == {"treated": 1}
    assert entry["params"]["setup"]["batch_key"] == "treated"
    np.testing.assert_allclose(done.layers["counterfactual"].sum(1), 1e4, rtol=1e-4)
    assert done.obsm[entry["embedding"]].shape == (48, 2)
    model = conditioned()
    done = tl.counterfactual(adata, {"donor": "d1", "dose": 2}, model, key_added="what_if", library_size=1, copy=True)
    wanted = model.predict_counterfactual(condition={"donor": "d1", "dose": 2}, return_numpy=True)
    np.testing.assert_allclose(done.layers["what_if"], wanted, rtol=1e-6)
    with pytest.raises(TypeError, match="condition='stim' must be a dictionary of obs columns and values"):
        tl.counterfactual(adata, "stim", **options)
    with pytest.raises(ValueError, match=r"it knows \['0', '1'\]"):
        tl.counterfactual(adata, {"treated": 5}, **options)
    with pytest.raises(ValueError, match="model='vae' cannot be asked what if"):
        tl.counterfactual(adata, {"treated": 1}, "vae")
    monkeypatch.setattr("sccvae.data.out.free_memory", lambda: 1000)
    with pytest.raises(ValueError, match=r"of memory, 0\.00 GB are free.*take fewer cells"):
        tl.counterfactual(adata, {"treated": 1}, **options)
    assert not adata.layers


@pytest.mark.parametrize("kind", [np.array, pd.Index])
def test_tool_takes_the_names_of_covariates_from_an_array(kind):
    adata = toy_counts()
    train = {"max_epochs": 1, "batch_size": 16, "accelerator": "cpu", "progress_bar": False}
    keys = {"categorical_covariate_keys": kind(["donor"]), "continuous_covariate_keys": kind(["dose"])}
    condition = {"treated": 1, "donor": "d1"}
    tl.counterfactual(adata, condition, n_latent=2, model_options={"n_hidden": 8}, train_options=train, **keys)
    setup = adata.uns["counterfactual"]["params"]["setup"]
    assert setup["batch_key"] == "treated"
    assert setup["categorical_covariate_keys"] == ["donor"]
    assert setup["continuous_covariate_keys"] == ["dose"]
