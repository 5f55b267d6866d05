"""Other batches, other conditions, the learned prior, size factors."""

from __future__ import annotations

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from _models import make, trained
from _toys import totals, toy_counts

from sccvae.distributions import NegativeBinomial
from sccvae.model import CVAE

N, G = 48, 12


# Changing the batch


@pytest.mark.parametrize("name", ["cvae-nb", "cvae-normal", "cvae-q(z|x)"])
def test_transform_batch(name):
    model = trained(name)

    def decode(batch, **options):
        return model.get_normalized_expression(transform_batch=batch, return_numpy=True, **options)

    a, b, own = decode("a"), decode("b"), decode(None)
    in_a = (model.adata.obs["batch"] == "a").to_numpy()
    assert not np.allclose(a, b)
    np.testing.assert_allclose(own[in_a], a[in_a], rtol=1e-5)
    np.testing.assert_allclose(own[~in_a], b[~in_a], rtol=1e-5)
    for both in (["a", "b"], ("b", "a"), np.array(["a", "b"]), pd.Index(["a", "b"])):
        np.testing.assert_allclose(decode(both), (a + b) / 2, rtol=1e-5)
    np.testing.assert_allclose(decode(["b"]), b, rtol=1e-6)
    with pytest.raises(ValueError, match=r"'c' is no category of obs\['batch'\] .*it knows \['a', 'b'\]"):
        decode("c")
    with pytest.raises(ValueError, match=r"it knows \['a', 'b'\]"):
        decode(["a", "c"])
    with pytest.raises(ValueError, match="transform_batch"):
        decode([])


@pytest.mark.parametrize("kind", ["memmap", "zarr", "h5py", "fortran", "backward", ">f4", "float64"])
@pytest.mark.parametrize("options", [{}, {"gene_list": ["g3", "g0"], "indices": [5, 2, 30]}], ids=["all", "some"])
def test_expression_goes_where_it_is_told(kind, options, tmp_path):
    model = trained("cvae-nb")
    options = options | {"transform_batch": "a", "library_size": 1e4}
    if "gene_list" in options:
        options["gene_list"] = list(model.adata.var_names[[3, 0]])
    wanted = model.get_normalized_expression(return_numpy=True, **options)
    if kind == "memmap":
        out = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, wanted.shape)
    elif kind == "zarr":
        out = zarr.create_array(tmp_path / "x.zarr", shape=wanted.shape, chunks=(20, 5), dtype="float32")
    elif kind == "fortran":
        out = np.empty(wanted.shape, np.float32, order="F")
    elif kind == "backward":
        out = np.empty(wanted.shape, np.float32)[::-1]
    elif kind in (">f4", "float64"):
        out = np.empty(wanted.shape, kind)
    else:
        out = h5py.File(tmp_path / "x.h5", "w").create_dataset("x", wanted.shape, "float32")
    assert model.get_normalized_expression(out=out, batch_size=7, **options) is out
    np.testing.assert_allclose(out[:], wanted, rtol=1e-5)


def test_an_array_that_does_not_fit_is_refused():
    model = trained("cvae-nb")
    wanted = model.adata.shape
    out = np.full((wanted[0], wanted[1] + 1), -1, dtype=np.float32)
    with pytest.raises(ValueError, match=r"out is \(.*\) of float32; it must be \(.*\) of float32"):
        model.get_normalized_expression(out=out)
    assert (out == -1).all()
    for no_array, name in (([1], "list"), ("out.zarr", "str"), (pd.DataFrame(out), "DataFrame")):
        with pytest.raises(TypeError, match=rf"out must be an array .* numpy, zarr and h5py; not {name}\. `correct"):
            model.get_normalized_expression(out=no_array)
    with pytest.raises(ValueError, match="of int64; it must be"):
        model.get_normalized_expression(out=np.empty(wanted, dtype=np.int64))


@pytest.mark.parametrize("name", ["ae", "vae-nb", "cvae-learned"])
def test_models_that_cannot_change_the_batch_say_so(name):
    message = (
        "transform_batch='a': this .* does not decode from the batch. Use a CVAE with any prior but 'learned' or a "
        "GMVAE with w_prior='fixed'.*, with batch_key="
    )
    with pytest.raises(ValueError, match=message):
        trained(name).get_normalized_expression(transform_batch="a")


def test_latent_does_not_change_with_the_library_of_others():
    """A cell's coordinates depend on that cell alone."""
    model = trained("cvae-nb")
    alone = model.get_latent_representation(model.adata[7:8].copy())
    np.testing.assert_allclose(alone, model.get_latent_representation()[7:8], rtol=1e-4, atol=1e-5)


def test_draws_one_by_one_have_the_mean_that_is_given_otherwise():
    """(n_samples, cells, genes), as scvi-tools has it."""
    model = trained("cvae-nb")
    options = {"transform_batch": ["a", "b"], "gene_list": ["gene3", "gene1"], "n_samples": 5, "batch_size": 20}
    draws = model.get_normalized_expression(return_mean=False, **options)
    assert isinstance(draws, np.ndarray)
    assert draws.shape == (5, 48, 2)
    assert draws.dtype == np.float32
    np.testing.assert_allclose(draws.mean(0), model.get_normalized_expression(**options), rtol=1e-5)
    assert (draws.std(0) > 0).all()
    one = model.get_normalized_expression(return_mean=False)
    pd.testing.assert_frame_equal(one, model.get_normalized_expression())
    with pytest.raises(ValueError, match=r"return_mean=False gives .* which out= does not take"):
        model.get_normalized_expression(return_mean=False, n_samples=2, out=np.zeros((48, 12)))
    for more in ({"return_mean": False, "n_samples": 2}, {"n_samples_overall": 3}):
        with pytest.raises(ValueError, match="AE has a deterministic encoder"):
            trained("ae").get_normalized_expression(**more)


def test_draws_of_the_population():
    model = trained("cvae-nb")
    cells = [4, 5, 7]
    table = model.get_normalized_expression(indices=cells, n_samples_overall=2000)
    assert table.shape == (2000, 12)
    assert table.index.value_counts().between(550, 780).all()
    assert set(table.index) == set(model.adata.obs_names[cells])
    wanted = model.get_normalized_expression(indices=cells, n_samples=2000, return_mean=False)
    for name, draws in zip(model.adata.obs_names[cells], wanted.swapaxes(0, 1), strict=True):
        np.testing.assert_allclose(table.loc[name].mean(), draws.mean(0), rtol=0.05)
        np.testing.assert_allclose(table.loc[name].std(), draws.std(0), rtol=0.25)
    with pytest.raises(ValueError, match="n_samples=2 and n_samples_overall=3: give one"):
        model.get_normalized_expression(n_samples=2, n_samples_overall=3)
    with pytest.raises(ValueError, match="n_samples_overall=0 must be at least 1"):
        model.get_normalized_expression(n_samples_overall=0)


def test_one_gene_as_a_string_and_a_progress_bar(capfd):
    model = trained("cvae-nb")
    one = model.get_normalized_expression(gene_list="gene3")
    pd.testing.assert_frame_equal(one, model.get_normalized_expression(gene_list=["gene3"]))
    with pytest.raises(ValueError, match=r"The model has no genes \['CD3D'\]"):
        model.get_normalized_expression(gene_list="CD3D")
    assert not capfd.readouterr().err
    model.get_normalized_expression(silent=False)
    assert "48.0/48.0" in capfd.readouterr().err


def test_n_samples_average_over_the_posterior():
    model = trained("cvae-nb")
    mean = model.get_normalized_expression(return_numpy=True)
    many = model.get_normalized_expression(n_samples=400, return_numpy=True)
    other = model.get_normalized_expression(n_samples=400, seed=1, return_numpy=True)
    single = model.get_normalized_expression(n_samples=2, return_numpy=True)
    assert (many == model.get_normalized_expression(n_samples=400, return_numpy=True)).all()
    assert np.abs(many - other).max() < np.abs(single - many).max()
    assert (many != mean).any()
    np.testing.assert_allclose(many.sum(1), 1, rtol=1e-4)
    with pytest.raises(ValueError, match="n_samples=0 must be at least 1"):
        model.get_normalized_expression(n_samples=0)
    for n_samples in (2.5, "2", True):
        for call in (model.get_normalized_expression, model.correct, model.posterior_predictive_check):
            with pytest.raises(TypeError, match=f"n_samples={n_samples!r} must be a whole number"):
                call(n_samples=n_samples)
    two = model.get_normalized_expression(n_samples=np.int64(2), return_numpy=True)
    np.testing.assert_array_equal(two, single)


@pytest.mark.parametrize("size", [np.inf, np.nan, -1.0, True, None, "own", np.full(3, 1e4)], ids=str)
def test_a_library_size_is_a_number(size):
    model = make(CVAE, toy_counts(), train=False)
    message = "library_size=.* must be a positive number or 'latent', which is each cell's own"
    with pytest.raises(ValueError, match=message):
        model.get_normalized_expression(library_size=size)
    if size is not None:  # 10,000 there
        with pytest.raises(ValueError, match=message):
            model.correct(library_size=size)
    assert not model.adata.layers


def test_genes_from_a_generator():
    model = trained("cvae-nb")
    some = model.get_normalized_expression(gene_list=(f"gene{j}" for j in (3, 0)))
    pd.testing.assert_frame_equal(some, model.get_normalized_expression(gene_list=["gene3", "gene0"]))
    with pytest.raises(ValueError, match=r"The model has no genes \['nonsense'\]"):
        model.get_normalized_expression(gene_list=(name for name in ("gene1", "nonsense", "gene2")))


@pytest.mark.parametrize("name", ["ae", "idec"])
def test_a_deterministic_encoder_has_no_draws_to_differ(name):
    model = trained(name)
    with pytest.raises(ValueError, match=r"sd=True: .* has a deterministic encoder"):
        model.correct(sd=True, n_samples=5)
    assert not model.adata.layers


# The learned prior


def test_prior_centers():
    model = trained("cvae-learned")
    centers = model.prior_centers()
    assert centers.shape == (2, G)
    assert list(centers.obs["batch"]) == ["a", "b"]
    assert centers.obsm["z"].shape == (2, 2)
    batch = next(model._stream(None, [0, 1]))
    with torch.no_grad():
        p = model.module.prior(batch)["z"]
    np.testing.assert_allclose(centers.obsm["z"], p.loc.numpy(), rtol=1e-5)
    median = np.median(totals(model.adata))
    np.testing.assert_allclose(np.asarray(centers.X.sum(1)).ravel(), median, rtol=1e-3)
    assert (centers.X != model.prior_centers().X).sum() == 0
    with pytest.raises(ValueError, match=r"has no centres of the conditions.*prior='learned'"):
        trained("cvae-nb").prior_centers()


def test_samples_of_a_condition_follow_its_prior():
    model = trained("cvae-learned")
    batch = next(model._stream(None, [1]))
    with torch.no_grad():
        p = model.module.prior(batch)["z"]
    z = model.sample(4000, batch=model.adata.obs["batch"].iloc[1]).obsm["z"]
    standard = (z - p.loc.numpy()) / p.scale.numpy()
    assert np.abs(p.scale.numpy() - 1).max() > 0.1  # or the test would show nothing
    np.testing.assert_allclose(standard.mean(0), 0, atol=0.08)
    np.testing.assert_allclose(standard.std(0), 1, atol=0.06)


def test_prior_centers_of_crossed_conditions():
    adata = toy_counts()
    setup = {"batch_key": "batch", "categorical_covariate_keys": ["donor"], "continuous_covariate_keys": ["dose"]}
    model = make(CVAE, adata, setup=setup, prior="learned")
    centers = model.prior_centers()
    assert centers.n_obs == 6
    assert not centers.obs.duplicated(["batch", "donor"]).any()
    assert len(np.unique(centers.obsm["z"], axis=0)) == 6


def test_prior_centers_with_continuous_conditions_only():
    model = make(CVAE, toy_counts(), setup={"continuous_covariate_keys": ["dose"]}, prior="learned")
    assert model.prior_centers().shape == (1, G)
    assert model.sample(4).shape == (4, G)


# Conditions


SETUPS = [
    {
        "batch_key": "batch",
        "categorical_covariate_keys": ["donor", "treated"],
        "continuous_covariate_keys": ["dose", "size"],
    },
    {"categorical_covariate_keys": ["donor"]},
    {"continuous_covariate_keys": ["dose"]},
    {"batch_key": "treated", "labels_key": "donor"},
    {"batch_key": "batch", "size_factor_key": "size"},
]


@pytest.mark.parametrize("setup", SETUPS, ids=lambda s: "+".join(map(str, s)))
@pytest.mark.parametrize("prior", ["fixed", "learned"])
def test_conditions(setup, prior):
    adata = toy_counts()
    model = make(CVAE, adata, setup=setup, prior=prior, likelihood=NegativeBinomial())
    z = model.get_latent_representation()
    assert np.isfinite(z).all()
    assert np.isfinite(model.get_elbo())
    values = model.get_normalized_expression(return_numpy=True)
    assert np.isfinite(values).all()
    generated = model.sample(7)
    categorical = [setup.get("batch_key"), *setup.get("categorical_covariate_keys", [])]
    for key in filter(None, categorical):
        assert generated.obs[key].isin(adata.obs[key]).all()
    for key in setup.get("continuous_covariate_keys", []):
        np.testing.assert_allclose(generated.obs[key], adata.obs[key].mean(), rtol=1e-5)
    if "size_factor_key" not in setup:
        assert np.isfinite(model.get_latent_representation(generated)).all()
    if prior == "fixed" and "batch_key" in setup:
        category = adata.obs[setup["batch_key"]].iloc[0]
        changed = model.get_normalized_expression(transform_batch=category, return_numpy=True)
        assert not np.allclose(changed, values)
    for key in filter(None, [*categorical, *setup.get("continuous_covariate_keys", [])]):  # z sees every condition
        other = adata.copy()
        other.obs[key] = np.roll(other.obs[key], 1)
        assert not np.allclose(model.get_latent_representation(other), z)


def test_transform_batch_keeps_the_other_conditions():
    adata = toy_counts()
    model = make(CVAE, adata, setup=SETUPS[0])
    other = adata.copy()
    other.obs["batch"] = "a"
    batch = next(model._stream(None))
    with torch.no_grad():
        z = model.module.inference(batch)["z"].loc
        wanted = model.module.generative({"z": z}, next(model._stream(other))).expression().numpy()
    got = model.get_normalized_expression(transform_batch="a", return_numpy=True)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


@pytest.mark.parametrize("kind", ["int", "str", "bool", "category", "ordered", "float"])
def test_types_of_categories(kind):
    adata = toy_counts()
    column = (np.arange(N) // 3) % 2
    known = {"int": [0, 1], "str": ["0", "1"], "bool": [False, True], "float": [0.0, 1.0]}.get(kind, ["lo", "hi"])
    values = np.array(known)[column]
    if kind in ("category", "ordered"):
        values = pd.Categorical(values, categories=["lo", "hi"], ordered=kind == "ordered")
    adata.obs["k"] = values
    model = make(CVAE, adata, setup={"batch_key": "k"})
    decoded = [model.get_normalized_expression(transform_batch=c, return_numpy=True) for c in known]
    own = model.get_normalized_expression(return_numpy=True)
    np.testing.assert_allclose(own, np.where(column[:, None] == 0, decoded[0], decoded[1]), rtol=1e-5)
    assert set(model.sample(20).obs["k"]) == set(known)
    assert adata.obs["k"].dtype == pd.Series(values).dtype  # the user's column is left as it is


# Size factors


def test_size_factors_are_scaled_to_counts():
    adata = toy_counts()
    model = make(CVAE, adata, setup={"batch_key": "batch", "size_factor_key": "size"})
    own = model.get_normalized_expression(library_size="latent", return_numpy=True)
    np.testing.assert_allclose(
        own.sum(1), totals(adata)[:, 0], rtol=1e-3
    )  # the toy's factor is proportional to the sum
    half = adata[:10].copy()
    half.obs["size"] = adata.obs["size"].to_numpy()[:10] / 2
    np.testing.assert_allclose(
        model.get_normalized_expression(half, library_size="latent", return_numpy=True).sum(1),
        own[:10].sum(1) / 2,
        rtol=1e-3,
    )


# Parameters of the counts, under scvi-tools' names


@pytest.mark.parametrize("name", ["cvae-zinb", "cvae-gene-batch", "vae-poisson", "vae-nb"])
def test_parameters_of_the_likelihood(name):
    """Those of which the likelihood of the draws is made, so that mean and variance of its counts follow."""
    model = trained(name)
    found = model.get_likelihood_parameters(batch_size=20)
    of = {"cvae-zinb": ["mean", "dispersions", "dropout"], "vae-poisson": ["mean"]}
    assert list(found) == of.get(name, ["mean", "dispersions"])
    assert all(v.shape == (48, 12) and v.dtype == np.float32 for v in found.values())
    np.testing.assert_allclose(found["mean"].sum(1, keepdims=True), totals(model.adata), rtol=1e-4)
    many = model.get_likelihood_parameters(n_samples=50, indices=[3, 9])
    assert all(v.shape == (50, 2, 12) for v in many.values())
    mean = model.get_likelihood_parameters(n_samples=50, indices=[3, 9], give_mean=True)
    for key, value in mean.items():
        np.testing.assert_allclose(value, many[key].mean(0), rtol=1e-4)
    mu, theta, dropout = many["mean"], many.get("dispersions", np.inf), many.get("dropout", 0.0)
    first, second = (1 - dropout) * mu, (1 - dropout) * (mu + mu**2 / theta + mu**2)
    x = model.posterior_predictive_sample(n_samples=8000, indices=[3, 9])
    np.testing.assert_allclose(x.mean(-1), first.mean(0), rtol=0.15, atol=0.05)
    np.testing.assert_allclose((x**2).mean(-1), second.mean(0), rtol=0.5, atol=0.5)
    order = model.adata[:, ::-1].copy()
    np.testing.assert_allclose(model.get_likelihood_parameters(order)["mean"], found["mean"][:, ::-1], rtol=1e-4)


@pytest.mark.parametrize("kind", ["spearman", "pearson"])
@pytest.mark.parametrize("name", ["cvae-zinb", "cvae-poisson"])
def test_correlation_of_genes(name, kind):
    """scvi-tools' definition, with numpy's gamma: shape theta, mean 1,000 times the proportion."""
    model = trained(name)
    batches = ["a", "b"]
    table = model.get_feature_correlation_matrix(transform_batch=batches, n_samples=40, correlation_type=kind)
    assert list(table.index) == list(table.columns) == list(model.adata.var_names)
    np.testing.assert_allclose(np.diag(table), 1)
    rng, wanted = np.random.default_rng(0), []
    theta = model.get_likelihood_parameters(n_samples=40).get("dispersions")  # of genes alone here
    for batch in batches:
        rate = model.get_normalized_expression(
            transform_batch=batch, library_size=1000, n_samples=40, return_mean=False, return_numpy=True
        )
        rate = rate if theta is None else rng.gamma(theta, rate / theta)
        wanted.append(pd.DataFrame(rate.reshape(-1, 12)).corr(kind))
    np.testing.assert_allclose(table, np.mean(wanted, axis=0), atol=0.08)
    mirrored = model.get_feature_correlation_matrix(model.adata[:, ::-1].copy(), n_samples=2, correlation_type=kind)
    assert list(mirrored.columns) == list(model.adata.var_names[::-1])
    with pytest.raises(ValueError, match="correlation_type='kendall' must be 'spearman' or 'pearson'"):
        model.get_feature_correlation_matrix(correlation_type="kendall")


def test_library_sizes():
    model = trained("cvae-nb")
    np.testing.assert_array_equal(model.get_latent_library_size(), totals(model.adata))
    np.testing.assert_array_equal(model.get_latent_library_size(indices=[5, 2]), totals(model.adata)[[5, 2]])
    sized = make(CVAE, toy_counts(), setup={"batch_key": "batch", "size_factor_key": "size"})
    np.testing.assert_allclose(sized.get_latent_library_size(), totals(sized.adata), rtol=1e-5)


def test_values_that_are_no_counts_have_no_such_parameters():
    model = trained("vae-normal")
    for call in (
        model.get_likelihood_parameters,
        model.get_feature_correlation_matrix,
        model.get_latent_library_size,
    ):
        with pytest.raises(ValueError, match=rf"{call.__name__} is of models of counts .*; this one is Normal"):
            call()
