"""Input that cannot work raises an error that says what, where and what to do; input that can, works."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from _models import FAST, TINY
from _toys import toy_counts, toy_values
from scipy import sparse

from sccvae.model import AE, CVAE, IDEC, VAE

N = 48


@pytest.fixture
def adata():
    return toy_counts()


def make(adata, cls=CVAE, train=True, setup=None, **options):
    cls.setup_anndata(adata, **({"batch_key": "batch"} if setup is None else setup))
    model = cls(adata, **(TINY | options))
    if train:
        model.train(**FAST)
    return model


def works(model):
    assert np.isfinite(model.get_latent_representation()).all()
    assert np.isfinite(model.get_normalized_expression(return_numpy=True)).all()
    assert np.isfinite(model.get_reconstruction_error())


# Conditions


def test_a_condition_that_mixes_text_and_numbers(adata):
    adata.obs["mixed"] = pd.Series(["a", 1] * (N // 2), index=adata.obs_names, dtype=object)
    with pytest.raises(TypeError, match=r"obs\['mixed'\] mixes text with values such as 1 \(int\).*astype\(str\)"):
        make(adata, setup={"batch_key": "mixed"})
    adata.obs["mixed"] = adata.obs["mixed"].astype(str)
    works(make(adata, setup={"batch_key": "mixed"}))


def test_labels_that_mix_text_and_numbers(adata):
    """1 and "1" were two classes of one name."""
    mixed = pd.Series([1, "1", np.nan, -1] * (N // 4), index=adata.obs_names, dtype=object)
    adata.obs["mixed"] = mixed
    with pytest.raises(TypeError, match=r"obs\['mixed'\] mixes text with .* 1 \(int\).*map\(str, na_action='ignore'\)"):
        make(adata, setup={"batch_key": "batch", "labels_key": "mixed"})
    adata.obs["mixed"] = mixed.map(str, na_action="ignore")  # what the message says
    setup = {"batch_key": "batch", "labels_key": "mixed", "unlabeled_category": "-1"}
    assert make(adata, setup=setup).schema.classes.tolist() == ["1"]
    adata.obs["mixed"] = mixed.replace(1, "1")  # what stands for no label may be of another kind
    assert make(adata, train=False, setup=setup | {"unlabeled_category": -1}).schema.classes.tolist() == ["1"]


@pytest.mark.parametrize("name", ["Unknown", "unlabelled", "NA", "nan", "None", " ", "unassigned"])
def test_a_class_that_reads_like_no_label(adata, name):
    adata.obs["type"] = np.tile(["T", "B", name], N // 3)
    setup = {"batch_key": "batch", "labels_key": "type"}
    message = rf"obs\['type'\]: '{name}' \(16 cells\) counts as a class.*say so: `unlabeled_category='{name}'`"
    for other in (None, name.swapcase(), "T cell"):
        if other != name:  # " "
            with pytest.warns(UserWarning, match=message) as caught:
                CVAE.setup_anndata(adata, **setup, unlabeled_category=other)
            assert caught[0].filename == __file__
    CVAE.setup_anndata(adata, **setup, unlabeled_category=name)
    assert CVAE(adata, **TINY).schema.classes.tolist() == ["B", "T"]
    adata.obs["type"], setup["batch_key"] = np.tile(["T", "B", name, "t"], N // 4), "donor"
    with pytest.warns(UserWarning, match=rf"'{name}' .* counts.*say so: `(.*)`") as caught:
        CVAE.setup_anndata(adata, **setup, unlabeled_category="t")
    exec(str(caught[0].message).split("`")[1])  # what the message says
    CVAE.setup_anndata(adata, **setup, unlabeled_category="t")
    assert CVAE(adata, **TINY).schema.classes.tolist() == ["B", "T"]


def test_a_category_that_the_model_does_not_know(adata):
    model = make(adata, train=False)
    model.is_trained = True
    for call in (
        lambda: model.get_normalized_expression(transform_batch="no such"),
        lambda: model.predict_counterfactual(condition={"batch": "no such"}),
        lambda: model.sample(3, batch="no such"),
    ):
        with pytest.raises(ValueError, match=r"'no such' is no category of obs\['batch'\] in this model; it knows"):
            call()


# Values


@pytest.mark.parametrize("likelihood", ["poisson", "nb", "zinb"])
@pytest.mark.parametrize("make_matrix", [sparse.csr_matrix, np.array])
def test_negative_values_with_a_count_likelihood(adata, likelihood, make_matrix):
    x = adata.X.toarray()
    x[3, 4] = -2
    adata.X = make_matrix(x)
    with pytest.raises(ValueError, match=r"adata.X holds negative values \(smallest -2\).*likelihood='normal'"):
        make(adata, likelihood=likelihood)


def test_fractional_values_with_a_count_likelihood(adata):
    adata.layers["log"] = np.log1p(adata.X)
    setup = {"batch_key": "batch", "layer": "log"}
    with pytest.raises(
        ValueError, match=r"adata.layers\['log'\] holds values that are not whole numbers.*layer='counts'"
    ):
        make(adata, setup=setup)
    works(make(adata, setup=setup, likelihood="normal"))


def test_pixels_outside_of_the_unit_interval():
    adata = toy_values()
    adata.X = adata.X * 255
    with pytest.raises(ValueError, match=r"needs \[0, 1\]. Divide images by their largest value"):
        make(adata, likelihood="bernoulli")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("cls", [AE, VAE, CVAE])
def test_nan_and_infinite_values(adata, bad, cls):
    adata.X.data[0] = bad
    with pytest.raises(
        ValueError, match=r"adata.X holds NaN or infinite values in 1 cells \(first: row 0\); remove or replace"
    ):
        make(adata, cls, setup={"batch_key": "batch"})


def test_bad_values_in_new_data(adata):
    model = make(adata)
    other = adata.copy()
    other.X.data[:] = 0.5
    with pytest.raises(ValueError, match=r"not whole numbers, such as 0\.5"):
        model.get_latent_representation(other)
    other.X.data[:] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite values in 48 cells"):
        model.get_elbo(other)


def test_empty_cells_warn_and_work(adata):
    x = adata.X.toarray()
    x[[2, 9]] = 0
    adata.X = sparse.csr_matrix(x)
    message = r"2 of 48 cells have no counts at all in adata.X.*scanpy.pp.filter_cells"
    with pytest.warns(UserWarning, match=message):
        model = make(adata, train=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message, UserWarning)
        model.train(**FAST)
        works(model)


def test_no_counts_at_all(adata):
    adata.X = sparse.csr_matrix(adata.shape, dtype=np.float32)
    with (
        pytest.raises(ValueError, match=r"adata.X holds no counts at all"),
        pytest.warns(UserWarning, match="48 of 48"),
    ):
        make(adata)


@pytest.mark.parametrize("value", [0, 3])
def test_genes_of_zero_variance(adata, value):
    x = adata.X.toarray()
    x[:, 5] = value
    adata.X = sparse.csr_matrix(x)
    works(make(adata))
    values = toy_values()
    values.X[:, 5] = value
    model = make(values, likelihood="normal")
    works(model)
    assert model.module.likelihood.sigma().min() >= 0.009


@pytest.mark.parametrize("make_matrix", [np.array, sparse.csr_matrix])
def test_one_gene(make_matrix):
    adata = toy_counts(n_genes=1)
    adata.X = make_matrix(adata.X.toarray())
    works(make(adata))


def test_strings_in_x():
    for dtype in ("U3", object):
        adata = toy_counts(5, 3)
        adata.X = np.full((5, 3), "a12", dtype=dtype)
        with pytest.raises(TypeError, match=r"adata.X has values of type .*; the model needs numbers"):
            make(adata, VAE, setup={})


def test_x_is_none(adata):
    counts = adata.X
    empty = ad.AnnData(obs=adata.obs, var=adata.var, layers={"counts": counts})
    with pytest.raises(ValueError, match=r"adata.X is None; pass layer= with one of \['counts'\]"):
        make(empty)
    works(make(empty, setup={"layer": "counts", "batch_key": "batch"}))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_empty_adata(shape):
    with pytest.raises(ValueError, match=f"adata has {shape[0]} cells and {shape[1]} genes; there is nothing to model"):
        make(ad.AnnData(np.zeros(shape, np.float32)), VAE, setup={})


# Genes


def test_duplicate_genes(adata):
    adata.var_names = ["gene0", "gene0", *adata.var_names[2:]]
    with pytest.raises(ValueError, match=r"var_names are not unique \('gene0' stands twice\).*var_names_make_unique"):
        make(adata)


def test_genes_missing_in_new_data(adata):
    model = make(adata)
    with pytest.raises(
        ValueError, match=r"1 of the model's 12 genes are missing from adata.var_names, such as \['gene4'\]"
    ):
        model.get_latent_representation(adata[:, adata.var_names != "gene4"].copy())


def test_genes_reordered_in_new_data(adata):
    model = make(adata)
    assert (model.get_latent_representation(adata[:, ::-1]) == model.get_latent_representation()).all()


# Batches and covariates


def test_one_batch_only_warns_and_works(adata, tmp_path):
    adata.obs["batch"] = "only"
    with pytest.warns(UserWarning, match=r"obs\['batch'\] has a single category: .*acts as a VAE"):
        model = make(adata, train=False)
    model.train(**FAST)
    works(model)
    model.save(tmp_path / "model")
    CVAE.load(tmp_path / "model", adata)  # known by now: no warning


def test_a_batch_of_one_cell_works(adata):
    adata.obs["batch"] = ["single"] + ["many"] * (N - 1)
    with pytest.warns(
        UserWarning, match=r"obs\['batch'\] has 1 of 2 categories with fewer than 3 cells \('single'\)"
    ) as caught:
        model = make(adata, train=False)
    assert caught[0].filename == __file__
    model.train(**FAST)
    works(model)
    assert np.isfinite(model.get_normalized_expression(transform_batch="single", return_numpy=True)).all()
    assert list(model.sample(3, batch="single").obs["batch"]) == ["single"] * 3


def test_more_batches_than_cells_in_a_mini_batch(adata):
    adata.obs["batch"] = [f"b{i // 3}" for i in range(N)]
    works(make(adata))


def test_an_unused_category(adata):
    adata.obs["batch"] = pd.Categorical(adata.obs["batch"], categories=["a", "b", "never"])
    model = make(adata)
    works(model)
    assert "never" not in set(model.sample(50).obs["batch"])
    with pytest.raises(ValueError, match="never"):
        model.sample(3, batch="never")
    with pytest.raises(ValueError, match="never"):
        model.get_normalized_expression(transform_batch="never")


@pytest.mark.parametrize("key", ["batch_key", "categorical_covariate_keys"])
def test_an_unused_category_is_not_learned(adata, key, tmp_path):
    """A query that has it brings it, with weights of its own."""
    adata.obs["k"] = pd.Categorical(np.tile(["b", "d"], N // 2), categories=["a", "b", "c", "d"])
    model = make(adata, setup={key: "k" if key == "batch_key" else ["k"]})
    assert model.schema.categories["k"].tolist() == ["b", "d"]
    codes = adata.obs["_scvi_batch"] if key == "batch_key" else adata.obsm["_scvi_extra_categorical_covs"]["k"]
    assert np.array_equal(codes, np.arange(N) % 2)
    assert adata.obs["k"].cat.categories.tolist() == ["a", "b", "c", "d"]
    model.save(tmp_path / "model")
    loaded = CVAE.load(tmp_path / "model", adata)
    assert (loaded.get_latent_representation() == model.get_latent_representation()).all()
    query = adata.copy()
    query.obs["k"] = "a"
    mapped = loaded.load_query(query)
    assert not mapped.is_trained
    assert mapped.schema.categories["k"].tolist() == ["b", "d", "a"]


@pytest.mark.parametrize("key", ["batch_key", "categorical_covariate_keys"])
def test_an_unseen_category(adata, key):
    model = make(adata, setup={key: "batch" if key == "batch_key" else ["batch"]})
    other = adata.copy()
    other.obs["batch"] = ["new"] * 5 + ["a"] * (N - 5)
    with pytest.raises(
        ValueError,
        match=r"obs\['batch'\] is \['new'\] in 5 cells.*it knows \['a', 'b'\]. Leave these cells out, map them",
    ):
        model.get_latent_representation(other)
    works(model)


@pytest.mark.parametrize("setup", [{"batch_key": "k"}, {"categorical_covariate_keys": ["k"]}])
@pytest.mark.parametrize("categorical", [True, False])
def test_nan_in_a_category(adata, setup, categorical):
    values = np.array(["x", "y"] * 24, dtype=object)
    values[[1, 7, 8]] = np.nan
    adata.obs["k"] = pd.Categorical(values) if categorical else values
    with pytest.raises(ValueError, match=r"obs\['k'\] is missing \(NaN\) for 3 of 48 cells.*fillna\('unknown'\)"):
        make(adata, setup=setup)
    assert not any(c.startswith("_scvi") for c in adata.obs)  # nothing was written before the check
    adata.obs["k"] = adata.obs["k"].astype(object).fillna("unknown")  # what the message says
    works(make(adata, setup=setup))


@pytest.mark.parametrize("categorical", [True, False])
def test_nan_in_the_labels_is_no_label(adata, categorical):
    values = np.array(["x", "x", "y", "y"] * 12, dtype=object)
    values[[1, 7, 8]] = np.nan
    adata.obs["k"] = pd.Categorical(values) if categorical else values
    model = make(adata, setup={"labels_key": "k", "batch_key": "batch"})
    works(model)
    assert list(model.schema.classes) == ["x", "y"]
    codes = model.schema.label_codes(adata.obs["k"])
    assert np.flatnonzero(codes < 0).tolist() == [1, 7, 8]
    assert (codes[codes >= 0] == (np.arange(N) // 2 % 2)[codes >= 0]).all()


def test_nan_in_a_category_of_new_data(adata):
    model = make(adata)
    other = adata.copy()
    other.obs["batch"] = pd.Categorical(["a"] * (N - 1) + [None], categories=["a", "b"])
    with pytest.raises(ValueError, match=r"obs\['batch'\] is missing \(NaN\) in 1 cells"):
        model.get_latent_representation(other)


@pytest.mark.parametrize("cls", [VAE, AE, IDEC])
def test_conditions_that_a_model_does_not_read(cls, caplog, tmp_path):
    """It says so, once, and asks no new cells for them."""
    setup = {"batch_key": "batch", "continuous_covariate_keys": ["dose"]}
    options = {VAE: {"likelihood": "normal"}, AE: {}, IDEC: {"n_components": 2}}
    model = make(toy_values(), cls, setup=setup, **options[cls])
    said = r"takes no account of obs['batch', 'dose'] and removes no batch effect; a CVAE or GMVAE does."
    assert caplog.text.count(said) == 1
    model.save(tmp_path / "model")
    other, without = toy_values(), toy_values()
    other.obs["batch"] = "new"
    del without.obs["batch"], without.obs["dose"]
    z = model.get_latent_representation()
    for cells in (other, without):
        assert (model.get_latent_representation(cells) == z).all()
        loaded = cls.load(tmp_path / "model", cells)
        assert (loaded.get_latent_representation() == z).all()
        if cls is not IDEC:
            query = model.load_query(cells)
            assert query.query_report["new_categories"] == {}
            assert (query.get_latent_representation() == z).all()
    loaded.train(**FAST)
    assert caplog.text.count(said) == 1


def test_no_condition_at_all(adata):
    with pytest.raises(
        ValueError, match=r"A CVAE needs a condition: call CVAE.setup_anndata with batch_key=.*or use a VAE"
    ):
        make(adata, setup={"labels_key": "donor"})


@pytest.mark.parametrize("name", ["categorical_covariate_keys", "continuous_covariate_keys"])
def test_keys_given_as_one_string(adata, name):
    with pytest.raises(TypeError, match=rf"{name} must be a list; write {name}=\['dose'\]"):
        make(adata, setup={name: "dose"})


@pytest.mark.parametrize("name", ["batch_key", "labels_key", "size_factor_key"])
def test_one_key_given_as_a_list(adata, name):
    with pytest.raises(TypeError, match=rf"{name}=\['donor', 'x'\] must be the name of one column, as {name}='donor'"):
        CVAE.setup_anndata(adata, **{name: ["donor", "x"]})


@pytest.mark.parametrize(
    "setup",
    [
        {"batch_key": "no"},
        {"labels_key": "no"},
        {"size_factor_key": "no"},
        {"categorical_covariate_keys": ["no"]},
        {"continuous_covariate_keys": ["no"]},
    ],
)
def test_a_column_that_is_not_there(adata, setup):
    with pytest.raises(KeyError, match=r"There is no adata.obs\['no'\]; the columns are .*'batch'"):
        make(adata, setup=setup)


def test_a_layer_that_is_not_there(adata):
    adata.layers["counts"] = adata.X
    with pytest.raises(
        KeyError, match=r"There is no adata.layers\['raw'\]; the layers are \['counts'\]. Use layer=None"
    ):
        make(adata, setup={"layer": "raw"})


def test_a_covariate_that_is_not_numeric(adata):
    adata.obs["stage"] = ["early", "late"] * 24
    with pytest.raises(
        ValueError,
        match=r"obs\['stage'\] must hold finite numbers; 48 of 48 cells do not \(first: early in cell 'cell0'",
    ):
        make(adata, setup={"continuous_covariate_keys": ["stage"]})


@pytest.mark.parametrize(
    ("values", "what"),
    [
        (pd.to_datetime(["2024-01-01", None] * 24), "holds dates"),
        (pd.to_datetime(["2024-01-01", "2024-01-03", "2024-01-03"] * 16).tz_localize("UTC"), "holds dates"),
        (pd.to_timedelta(["1d", None] * 24), "holds durations"),
        (np.array([1 + 2j, 1, 2] * 16), "holds complex numbers"),
    ],
)
def test_covariates_that_are_no_numbers(adata, values, what):
    adata.obs["when"] = values
    setup = {"batch_key": "batch", "continuous_covariate_keys": ["when"]}
    with pytest.raises(TypeError, match=rf"obs\['when'\] {what}, and numbers are needed: `.*`") as caught:
        make(adata, setup=setup)
    exec(str(caught.value).split("`")[1])  # what the message says
    if adata.obs["when"].isna().any():
        with pytest.raises(ValueError, match="24 of 48 cells do not"):
            make(adata, setup=setup)
    else:
        works(make(adata, setup=setup))


def test_a_covariate_that_varies_in_digits_that_are_lost(adata):
    setup = {"batch_key": "batch", "continuous_covariate_keys": ["when"]}
    adata.obs["when"] = 1.7e9 + np.arange(N) % 10
    with pytest.warns(UserWarning, match=r"obs\['when'\] varies by 2\.8\d around 1.7e\+09.*Subtract") as caught:
        CVAE.setup_anndata(adata, **setup)
    assert caught[0].filename == __file__
    exec(str(caught[0].message).split("`")[1])  # what the message says
    CVAE.setup_anndata(adata, **setup)
    assert float(CVAE(adata, **TINY).module.conditions.spread) == pytest.approx(adata.obs["when"].std(ddof=0))
    for fine in (
        np.full(N, 1.7e9 + 1),
        np.arange(N) * 86400.0 + 1.7e9,
        np.float32(0.1) + np.float32(1e-8) * np.arange(N),
    ):
        adata.obs["when"] = fine
        CVAE.setup_anndata(adata, **setup)


def test_nan_in_a_covariate(adata):
    adata.obs.loc["cell3", "dose"] = np.nan
    with pytest.raises(
        ValueError, match=r"obs\['dose'\] must hold finite numbers; 1 of 48 cells do not \(first: nan in cell 'cell3'"
    ):
        make(adata, setup={"continuous_covariate_keys": ["dose"]})


@pytest.mark.parametrize("kind", [int, bool, "category", str])
def test_covariates_of_other_types(adata, kind):
    adata.obs["n"] = pd.Series(np.arange(N) % 2, index=adata.obs_names).astype(kind)
    works(make(adata, setup={"continuous_covariate_keys": ["n"]}))


def test_the_same_column_twice(adata):
    model = make(adata, setup={"batch_key": "batch", "categorical_covariate_keys": ["batch", "donor"]})
    works(model)
    assert model.schema.n_categories == (2, 3)
    query = adata.copy()
    query.obs["batch"] = "new"
    assert model.load_query(query).schema.n_categories == (3, 3)
    works(make(adata, setup={"batch_key": "batch", "categorical_covariate_keys": ["donor", "donor"]}))


def test_a_constant_covariate(adata):
    adata.obs["dose"] = 0.1
    model = make(adata, setup={"batch_key": "batch", "continuous_covariate_keys": ["dose"]})
    works(model)
    other = adata.copy()
    other.obs["dose"] = 0.2
    np.testing.assert_allclose(model.get_latent_representation(other), model.get_latent_representation(), atol=0.5)


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_size_factors_must_be_positive(adata, value):
    adata.obs.loc["cell5", "size"] = value
    with pytest.raises(ValueError, match=r"obs\['size'\] must hold positive finite numbers; 1 of 48 .*in cell 'cell5'"):
        make(adata, setup={"batch_key": "batch", "size_factor_key": "size"})


# The AnnData itself


def test_a_view_at_setup(adata):
    with pytest.raises(ValueError, match=r"adata is a view of another AnnData; run `adata = adata.copy\(\)` first"):
        make(adata[:40])
    works(make(adata[:40].copy()))


def test_something_else_than_anndata(adata):
    with pytest.raises(TypeError, match="adata must be an AnnData object, not ndarray"):
        VAE.setup_anndata(adata.X.toarray())


def test_no_setup(adata):
    with pytest.raises(ValueError, match=r"setup_anndata"):
        VAE(adata)
    make(adata, train=False)
    with pytest.raises(ValueError, match=r"VAE.setup_anndata"):  # set up for a CVAE
        VAE(adata)


def test_no_data_at_all():
    with pytest.raises(ValueError, match="adata"):
        VAE()


def test_data_changed_after_setup(adata):
    model = make(adata)
    adata.X = adata.X * 0.5
    with pytest.raises(ValueError, match="not whole numbers"):
        model.get_latent_representation()


# Options


def test_batch_size_of_zero(adata):
    model = make(adata)
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        model.train(**(FAST | {"batch_size": 0}))
    with pytest.raises(ValueError, match="batch_size=-2 must be at least 1"):
        model.get_latent_representation(batch_size=-2)


@pytest.mark.parametrize("size", [0, -0.5, 1.5])
def test_train_size_out_of_range(adata, size):
    model = make(adata, train=False)
    with pytest.raises(ValueError, match=rf"train_size={size} .* train_size must be in \(0, 1\]"):
        model.train(train_size=size, **FAST)
    assert not model.is_trained


def test_a_single_training_cell(adata):
    model = make(adata, train=False)
    with pytest.raises(ValueError, match=r"Training needs at least 2 cells, there are 1 of 48; raise train_size"):
        model.train(train_size=0.01, **FAST)
    with pytest.raises(ValueError, match="Training needs at least 2 cells"):
        make(toy_counts(1), VAE, setup={})


def test_a_last_mini_batch_of_one_cell(adata):
    model = make(adata, train=False)
    model.train(train_size=33 / 48, **FAST)  # 33 = 2 * 16 + 1
    assert len(model.train_indices) == 33
    works(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nonsense": 3}, r"train\(\) has no argument 'nonsense', and neither has lightning.Trainer\.$"),
        ({"patiense": 3}, r"'patiense', and neither has lightning.Trainer; did you mean 'patience'"),
        ({"guide": "donor"}, "no argument 'guide'"),
        ({"plan_kwargs": {"n_epochs_kl_warmup": 9}}, "no argument 'n_epochs_kl_warmup': set kl_warmup="),
        ({"plan_kwargs": {"lr": 0.1}, "lr": 0.2}, "lr= is given two values.*plan_kwargs"),
        ({"trainer_config": "fast"}, "'trainer_config': give a dictionary"),
        ({"limit_train_batches": 2}, "chunk of many mini-batches here; for fewer cells lower train_size="),
        ({"max_steps": 9}, "'max_steps'.*set max_epochs="),
        ({"use_gpu": True}, "'use_gpu': set accelerator="),
    ],
)
def test_arguments_of_train_that_are_not_ours(adata, options, message):
    """Before anything is read or set; Lightning would take some in another sense."""
    model = make(adata, train=False)
    with pytest.raises(TypeError, match=message):
        model.train(**FAST, **options)
    assert model.train_indices is None
    assert model.history is None


def test_names_of_scvi_tools_that_mean_the_same(adata, capsys):
    quiet = {k: v for k, v in FAST.items() if k != "progress_bar"} | {"enable_progress_bar": False}
    histories = []
    for options in (
        {"lr": 0.02, "weight_decay": 0.1, "patience": 1, "kl_warmup": 0.0},
        {"plan_kwargs": {"lr": 0.02, "weight_decay": 0.1}, "early_stopping_patience": 1, "kl_warmup": 0.0}
        | {"train_size": None, "datasplitter_kwargs": None},
    ):
        model = make(adata, train=False)
        model.train(**quiet, **options)
        histories.append(model.history)
    assert "cells/s" not in capsys.readouterr().err
    assert all(histories[0][name].equals(frame) for name, frame in histories[1].items())


@pytest.mark.parametrize("options", [{"patience": 3}, {"early_stopping": True}])
def test_early_stopping_without_held_out_cells(adata, options):
    model = make(adata, train=False)
    with pytest.warns(UserWarning, match=r"No cells are held out.*Pass train_size=0\.9"):
        model.train(**FAST, train_size=1.0, **options)
    model.train(**FAST, train_size=1.0)


def test_two_cells():
    with pytest.warns(UserWarning, match="fewer than 3 cells"):
        model = make(toy_counts(2), train=False)
    model.train(**FAST)
    works(model)


@pytest.mark.parametrize("cls", [AE, VAE, CVAE])
def test_sizes_of_zero(cls):
    adata = toy_counts()
    with pytest.raises(ValueError, match="n_latent=0 must be at least 1"):
        make(adata, cls, n_latent=0)
    with pytest.raises(ValueError, match="n_hidden=0 must be at least 1"):
        make(adata, cls, n_hidden=0)


@pytest.mark.parametrize("size", [2.5, "wide", True])
def test_sizes_that_are_no_whole_numbers(size):
    for name in ("n_latent", "n_hidden"):
        with pytest.raises(TypeError, match=f"{name}={size!r} must be a whole number, at least 1"):
            make(toy_counts(), CVAE, **{name: size})


@pytest.mark.parametrize(("cells", "genes", "warns"), [(20, 4_000, False), (20, 4_001, True), (801, 4_005, False)])
def test_many_genes_of_few_cells_are_warned_of(cells, genes, warns):
    adata = ad.AnnData(sparse.csr_matrix(np.eye(cells, genes, dtype=np.float32)))
    if not warns:
        VAE.setup_anndata(adata)
        return
    with pytest.warns(UserWarning, match=r"4001 genes and 20 cells.*highly_variable_genes") as found:
        VAE.setup_anndata(adata)
    assert found[0].filename == __file__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood": "gauss"}, "No likelihood is called 'gauss'; choose one of"),
        ({"prior": "flat"}, "prior='flat' is not known; choose 'mixture'"),
        ({"activation": "swish"}, "activation='swish' is not known; choose one of"),
        ({"norm": "group"}, "norm='group' is not known; choose 'batch', 'layer' or None"),
        ({"kl": "exact"}, "kl='exact'.*choose kl='analytic' or 'monte_carlo'"),
        ({"n_layers": 0}, "conditions.*n_layers"),
    ],
)
def test_unknown_options(adata, options, message):
    with pytest.raises(ValueError, match=message):
        make(adata, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout_rate": 0.1}, r"CVAE\(\) has no argument 'dropout_rate': set dropout="),
        ({"gene_likelihood": "nb"}, "'gene_likelihood': set likelihood="),
        ({"use_layer_norm": "both"}, "'use_layer_norm': set norm="),
        ({"batch_key": "batch"}, "'batch_key': it is one of setup_anndata"),
        ({"n_hiden": 8}, "'n_hiden'; did you mean 'n_hidden'"),
    ],
)
def test_arguments_of_a_model_that_are_not_ours(adata, options, message):
    with pytest.raises(TypeError, match=message):
        make(adata, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": "fixed", "n_components": 50}, "n_components=50 does nothing with prior='fixed'"),
        ({"prior": "learned", "alignment": 100}, "alignment=100 does nothing here"),
    ],
)
def test_options_that_do_nothing_are_warned_of_once(adata, options, message, tmp_path):
    with pytest.warns(UserWarning, match=message) as found:
        model = make(adata, train=False, **options)
    assert len(found) == 1
    assert found[0].filename == __file__
    model.save(tmp_path / "model")
    CVAE.load(tmp_path / "model", toy_counts())


def test_unknown_noise():
    with pytest.raises(ValueError, match=r"noise='blur'.*choose 'gaussian'.*'mask'"):
        make(toy_values(), AE, noise="blur")


def test_indices_that_select_nothing_or_too_much(adata):
    model = make(adata)
    for indices in ([], np.zeros(N, bool)):
        with pytest.raises(ValueError, match="indices selects no cell"):
            model.get_latent_representation(indices=indices)
    with pytest.raises(ValueError, match=r"mask of 47 .* 48 cells"):
        model.get_latent_representation(indices=np.ones(N - 1, bool))
    for far in (N, -N - 1):
        with pytest.raises(IndexError, match=f"indices holds {far}, but there are 48 cells"):
            model.get_latent_representation(indices=[0, far])
    for other in (["cell1"], ["1"], [1.0], 1, [[1]]):
        with pytest.raises(TypeError, match=r"whole numbers of rows.*obs_names.get_indexer"):
            model.get_latent_representation(indices=other)


def test_indices_of_all_kinds(adata):
    model = make(adata)
    z = model.get_latent_representation()
    even = np.arange(N) % 2 == 0
    for indices in (slice(None, None, 2), even, pd.Series(even), np.arange(0, N, 2, dtype=np.uint8)):
        np.testing.assert_allclose(model.get_latent_representation(indices=indices), z[::2], atol=1e-6)
    np.testing.assert_allclose(model.get_latent_representation(indices=[-1, 0]), z[[-1, 0]], atol=1e-6)


def test_sampling_options(adata):
    model = make(adata)
    with pytest.raises(ValueError, match="n_samples=0 must be at least 1"):
        model.get_normalized_expression(n_samples=0)
    with pytest.raises(ValueError, match="n_mc_samples=0 must be at least 1"):
        model.get_marginal_ll(n_mc_samples=0)
    with pytest.raises(TypeError, match=r"n_mc_samples=2\.5 must be a whole number"):
        model.get_marginal_ll(n_mc_samples=2.5)
    with pytest.raises(ValueError, match="n=0 must be at least 1"):
        model.sample(0)
    model = make(adata, VAE, setup={})
    with pytest.raises(ValueError, match="batch='a': the model was set up without batch_key"):
        model.sample(3, batch="a")


def test_a_size_that_is_no_number(adata):
    model = make(adata)
    for size in ("own", 0, -1.0, None):
        with pytest.raises(ValueError, match=rf"library_size={size!r} must be a positive number or 'latent'"):
            model.get_normalized_expression(library_size=size)


def test_a_loss_that_explodes_says_what_to_do():
    model = make(toy_counts(), train=False)
    with pytest.raises(FloatingPointError, match=r"no longer finite.*lower learning rate"):
        model.train(**(FAST | {"lr": 1e30, "max_epochs": 10}))
    assert not model.is_trained
    with pytest.warns(UserWarning, match="untrained"):
        works(model)


# Columns and cells as they come out of a notebook


def test_a_condition_is_named_once(adata):
    adata.obs["age"] = np.linspace(20, 60, N)
    setup = {"batch_key": "batch", "continuous_covariate_keys": ["age", "age"]}
    model = make(adata, setup=setup)
    assert model.schema.continuous == ("age",)
    adata[:9].copy()  # two columns of one name cannot be copied
    assert model._change({"age": 30.0}).covariates == {0: 30.0}
    with pytest.raises(ValueError, match=r"obs\['age'\] is named as a batch or categorical covariate and as a number"):
        make(adata, setup=setup | {"categorical_covariate_keys": ["age"]})


@pytest.mark.parametrize("kind", [np.array, pd.Index, tuple])
def test_covariate_keys_in_any_list(adata, kind):
    adata.obs["day"], adata.obs["age"] = np.tile(["a", "b"], N // 2), np.linspace(20, 60, N)
    setup = {"categorical_covariate_keys": kind(["donor", "day"]), "continuous_covariate_keys": kind(["age"])}
    model = make(adata, train=False, setup=setup)
    assert [*model.schema.categories, *model.schema.continuous] == ["donor", "day", "age"]


def test_a_column_that_stands_twice(adata):
    model = make(adata)
    twice = adata.copy()
    twice.obs = pd.concat([adata.obs, adata.obs[["batch"]]], axis=1)
    for action in (
        lambda: make(twice),
        lambda: model.load_query(twice),
        lambda: model.get_latent_representation(twice),
    ):
        with pytest.raises(ValueError, match=r"2 columns called 'batch'; keep one: .*duplicated"):
            action()
    twice.obs = twice.obs.loc[:, ~twice.obs.columns.duplicated()]  # what the message says
    works(make(twice))


def test_a_part_of_what_was_set_up(adata):
    make(adata)
    part = adata[: N // 2].copy()
    with pytest.raises(ValueError, match=r"a copy, a part of it, or one read from a file: run `CVAE\.setup_anndata"):
        CVAE(part, **TINY)
    make(part)


def test_batches_to_average_over_in_any_list(adata):
    model = make(adata)
    batches = adata.obs["batch"].astype("category")
    expected = model.get_normalized_expression(transform_batch=batches.cat.categories.tolist())
    for some in (batches.cat.categories, batches.unique(), pd.Series(batches.unique()), set(batches)):
        pd.testing.assert_frame_equal(model.get_normalized_expression(transform_batch=some), expected, rtol=1e-5)


def test_draws_of_a_deterministic_encoder():
    model = make(toy_values(N), AE, setup={})
    with pytest.raises(ValueError, match="AE has a deterministic encoder: there are no draws of z to give"):
        model.get_normalized_expression(n_samples=5)


def test_a_query_without_cells_and_one_of_a_single_cell(adata):
    model = make(adata)
    with pytest.raises(ValueError, match=r"The query has no cells; was it filtered"):
        model.load_query(adata[:0].copy())
    one = adata[:1].copy()
    one.obs["batch"] = "new"
    query = model.load_query(one)
    query.train(max_epochs=3, progress_bar=False, accelerator="cpu")
    assert np.isfinite(query.get_latent_representation()).all()


def test_loading_with_cells_that_have_no_label(adata, tmp_path):
    adata.obs["type"] = np.repeat(["T", "B"], N // 2)
    make(adata, setup={"batch_key": "batch", "labels_key": "type"}).save(tmp_path / "m")
    for labels in (np.nan, None):
        if labels is None:
            del adata.obs["type"]
        else:
            adata.obs["type"] = labels
        with pytest.raises(ValueError, match=r"obs\['type'\] holds no label.*load it without adata and pass these"):
            CVAE.load(tmp_path / "m", adata)
    assert np.isfinite(CVAE.load(tmp_path / "m").get_latent_representation(adata)).all()  # what the message says


# What is drawn


def test_a_drawn_layer_is_not_x(adata):
    adata.layers["counts"] = adata.X.copy()
    model = make(adata, setup={"batch_key": "batch", "layer": "counts"})
    drawn = model.sample(5)
    before = drawn.layers["counts"].sum()
    drawn.X.data *= 2
    assert drawn.layers["counts"].sum() == before
    model.get_latent_representation(drawn)


def test_a_vae_draws_no_batch(adata):
    model = make(adata, VAE)
    with pytest.raises(ValueError, match="a VAE knows no batch; use a CVAE or a GMVAE"):
        model.sample(3, batch="batch0")
    assert "batch" not in model.sample(3).obs
    model.get_latent_representation(model.sample(3))


def test_drawing_from_an_untrained_model_is_warned_of(adata):
    with pytest.warns(UserWarning, match="untrained"):
        make(adata, train=False).sample(2)
