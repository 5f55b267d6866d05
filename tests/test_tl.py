"""sccvae.tl: one call does the whole job, says what it did, and leaves everything else alone."""

from __future__ import annotations

import gc
import weakref

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import zarr
from _training import Raise
from scipy import sparse

from sccvae import __version__, model, pl, tl
from sccvae.data import open_anndata
from sccvae.tl._job import plain

N, G = 200, 100
FAST = {"max_epochs": 2, "progress_bar": False}


def make_cells(seed: int = 0) -> ad.AnnData:
    """Counts of two cell types in two batches; X is log-normalised."""
    rng = np.random.default_rng(seed)
    kind, batch = rng.integers(0, 2, N), rng.integers(0, 2, N)
    rate = rng.gamma(1.0, 1.0, (2, G))[kind] * np.exp(rng.normal(0, 0.7, (2, G)))[batch]
    counts = rng.poisson(rate).astype(np.float32)
    adata = ad.AnnData(
        sparse.csr_matrix(np.log1p(1e4 * counts / counts.sum(1, keepdims=True))),
        obs=pd.DataFrame(
            {
                "batch": pd.Categorical.from_codes(batch, ["a", "b"]),
                "donor": rng.choice(["d1", "d2", "d3"], N),
                "age": rng.uniform(20, 80, N),
                "size": counts.sum(1) / counts.sum(1).mean(),
            },
            index=[f"cell{i}" for i in range(N)],
        ),
        var=pd.DataFrame({"note": "x"}, index=[f"gene{i}" for i in range(G)]),
    )
    adata.layers["counts"] = sparse.csr_matrix(counts)
    adata.uns["image_shape"] = [10, 10]
    return adata


@pytest.fixture
def cells() -> ad.AnnData:
    return make_cells()


@pytest.fixture(scope="module")
def trained() -> model.CVAE:
    adata = make_cells()
    model.CVAE.setup_anndata(adata, layer="counts", batch_key="batch")
    cvae = model.CVAE(adata, n_latent=4, seed=3)
    cvae.train(**FAST, seed=3)
    return cvae


def keys(adata: ad.AnnData) -> dict[str, set[str]]:
    return {part: set(getattr(adata, part)) for part in ("obs", "var", "obsm", "varm", "obsp", "layers", "uns")}


# embed


def test_embed_does_what_the_model_does_and_touches_nothing_else(cells, trained):
    before, x, counts = keys(cells), cells.X, cells.layers["counts"]
    obs = cells.obs.copy()
    options = {"n_latent": 4, "seed": 3, "train_options": FAST}
    assert tl.embed(cells, batch_key="batch", layer="counts", **options) is None
    assert np.array_equal(cells.obsm["X_cvae"], trained.get_latent_representation())
    assert cells.obsm["X_cvae"].dtype == np.float32
    before["obsm"].add("X_cvae")
    before["uns"].add("X_cvae")
    assert keys(cells) == before
    assert cells.X is x
    assert cells.layers["counts"] is counts
    pd.testing.assert_frame_equal(cells.obs, obs)


def test_embed_records_what_it_did(cells, trained):
    tl.embed(cells, batch_key="batch", layer="counts", n_latent=4, seed=3, train_options=FAST)
    found = cells.uns["X_cvae"]
    assert (found["model"], found["sccvae_version"], found["seed"], found["epochs"]) == ("CVAE", __version__, 3, 2)
    assert found["params"]["setup"] == {"layer": "counts", "batch_key": "batch"}
    assert found["params"]["train"] == FAST
    assert (found["params"]["model"]["n_latent"], found["params"]["model"]["prior"]) == (4, "mixture")
    kept = trained.reference["kept_epoch"]
    for name in ("elbo_train", "elbo_validation"):
        assert found[name] == trained.history[name][name].iloc[kept]


def test_record_survives_h5ad_and_is_drawn(cells, tmp_path):
    options = {"validation_size": 0.1, "checkpoint_dir": tmp_path / "state", **FAST}
    keys_ = {"categorical_covariate_keys": ["donor"], "continuous_covariate_keys": ["age"]}
    tl.correct(cells, batch_key="batch", layer="counts", reference=["a"], train_options=options, **keys_)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    back = ad.read_h5ad(tmp_path / "cells.h5ad")
    for key in ("X_cvae", "corrected"):
        then, now = cells.uns[key], back.uns[key]
        assert set(then) == set(now)
        for name in ("model", "sccvae_version", "seed", "epochs", "elbo_train", "elbo_validation"):
            assert then[name] == now[name]
        assert now["params"]["train"]["checkpoint_dir"] == str(tmp_path / "state")
        assert list(now["params"]["setup"]["categorical_covariate_keys"]) == ["donor"]
    assert (list(back.uns["corrected"]["reference"]), back.uns["corrected"]["library_size"]) == (["a"], 1e4)
    assert np.array_equal(back.layers["corrected"], cells.layers["corrected"])
    assert len(pl.history(back.uns["X_cvae"]["history"])) == 3


def test_plain_values():
    value = {"a": None, "b": [1, None, np.float32(0.5)], "c": {"d": ("x", None)}, 1: object, "e": np.ones(2)}
    found = plain(value)
    assert found.pop("e").tolist() == [1, 1]
    assert found == {"b": [1, 0.5], "c": {"d": ["x"]}, "1": str(object)}


def test_names_of_columns_with_a_slash_are_recorded_flat(cells, tmp_path):
    cells.obs["state/day"] = cells.obs["batch"].to_numpy()
    tl.counterfactual(cells, {"state/day": "a"}, layer="counts", train_options=FAST | {"max_epochs": 1})
    ad.AnnData(uns=cells.uns).write_h5ad(tmp_path / "x.h5ad")
    back = ad.read_h5ad(tmp_path / "x.h5ad").uns["counterfactual"]
    assert back["condition"] == cells.uns["counterfactual"]["condition"] == {"state|day": "a"}
    assert back["params"]["setup"]["batch_key"] == "state/day"


@pytest.mark.parametrize("key", [3, "", ("a",)])
def test_a_key_is_a_text(cells, key):
    before = keys(cells)
    with pytest.raises(TypeError, match=r"key_added=.* must be a text, the key of the results"):
        tl.embed(cells, "vae", layer="counts", key_added=key)
    assert keys(cells) == before


def test_copy_leaves_the_original(cells):
    before = keys(cells)
    new = tl.embed(cells, "vae", layer="counts", copy=True, key_added="z", n_latent=3, train_options=FAST)
    assert keys(cells) == before
    assert new.obsm["z"].shape == (N, 3)
    assert new.uns["z"]["model"] == "VAE"
    new.layers["counts"].data[:] = 0
    assert cells.layers["counts"].data.all()


def test_seed_decides(cells):
    def run(seed: int) -> np.ndarray:
        tl.embed(cells, batch_key="batch", layer="counts", seed=seed, train_options=FAST | {"max_epochs": 1})
        return cells.obsm["X_cvae"]

    first = run(1)
    assert np.array_equal(first, run(1))
    assert not np.allclose(first, run(2))


def test_ae_on_log_values(cells):
    tl.embed(cells, "ae", n_latent=3, model_options={"linear": True}, train_options=FAST)
    assert cells.obsm["X_ae"].shape == (N, 3)
    assert cells.uns["X_ae"]["params"]["model"]["linear"] is True
    assert cells.uns["X_ae"]["elbo_validation"] > 0


def test_covariates_and_size_factors(cells):
    tl.embed(
        cells,
        layer="counts",
        size_factor_key="size",
        categorical_covariate_keys=["donor"],
        continuous_covariate_keys=["age"],
        train_options=FAST,
    )
    assert cells.uns["X_cvae"]["params"]["setup"]["size_factor_key"] == "size"
    assert not [name for name in keys(cells)["obsm"] | keys(cells)["obs"] if "scvi" in name]


def test_trained_model_is_used_as_it_is(cells, trained):
    mixed = cells[:50, ::-1].copy()
    tl.embed(mixed, trained)
    assert np.array_equal(mixed.obsm["X_cvae"], trained.get_latent_representation(indices=range(50)))
    assert mixed.uns["X_cvae"]["seed"] == 3
    assert mixed.uns["X_cvae"]["params"]["train"] == {}


def test_view_and_backed(cells, trained, tmp_path):
    with pytest.raises(ValueError, match=r"is a view.*copy=True"):
        tl.embed(cells[:50], trained)
    assert tl.embed(cells[:50], trained, copy=True).obsm["X_cvae"].shape == (50, 4)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    tl.embed(backed, trained)
    assert np.array_equal(backed.obsm["X_cvae"], trained.get_latent_representation())
    tl.embed(backed, "ae", n_latent=2, train_options=FAST | {"max_epochs": 1})
    assert backed.obsm["X_ae"].shape == (N, 2)
    memory = tl.correct(backed, trained, copy=True)
    assert not memory.isbacked
    assert "corrected" not in backed.layers
    backed.file.close()


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_copy_of_matrices_on_disk_is_in_memory(cells, trained, tmp_path, kind):
    path = tmp_path / f"cells.{kind}"
    if kind == "h5ad":
        cells.write_h5ad(path)
    else:
        group = zarr.open_group(path, mode="w", zarr_format=3)
        ad.io.write_elem(group, "/", cells, dataset_kwargs={"shards": None})
    stored = open_anndata(path)
    before = keys(stored)
    new = tl.embed(stored, trained, copy=True)
    assert keys(stored) == before
    assert np.array_equal(new.obsm["X_cvae"], trained.get_latent_representation())
    assert sparse.issparse(new.X)
    assert (new.layers["counts"] != cells.layers["counts"]).nnz == 0


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        (tl.embed, {"batch_key": "batch", "layer": "counts"}),
        (tl.correct, {"batch_key": "batch", "layer": "counts"}),
        (tl.counterfactual, {"condition": {"batch": "a"}, "layer": "counts"}),
        (tl.cluster, {"batch_key": "batch", "layer": "counts"}),
        (tl.consensus, {"batch_key": "batch", "layer": "counts"}),
        (tl.map_query, {"reference": "none"}),
        (tl.integration_report, {"use_rep": "X_pca", "batch_key": "batch", "label_key": "donor"}),
    ],
)
def test_a_key_that_no_file_can_hold_is_refused_before_training(cells, monkeypatch, tool, arguments):
    monkeypatch.setattr(model.BaseModel, "train", lambda *_, **__: pytest.fail("it trained"))
    before = keys(cells)
    with pytest.raises(ValueError, match=r"'a/b' cannot be the key of the results.*Choose a key without it"):
        tool(cells, key_added="a/b", **arguments)
    assert keys(cells) == before


def test_nothing_keeps_the_matrix_alive():
    adata = make_cells()
    tl.embed(adata, batch_key="batch", layer="counts", train_options=FAST | {"max_epochs": 1})
    matrix = weakref.ref(adata.layers["counts"])
    del adata
    gc.collect()
    assert matrix() is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "gmm"}, ValueError, r"'gmm'; choose one of \['ae', 'cvae', 'gmvae', 'vae'\]"),
        ({"model": 3}, TypeError, "or a trained model, not int"),
        ({}, ValueError, "needs a condition: pass batch_key="),
        ({"model": "vae", "batch_key": "batch"}, ValueError, r"'vae' takes no account of \['batch_key'\].*'cvae'"),
        ({"model": "ae", "likelihood": "nb"}, ValueError, "has no likelihood.*model='vae'"),
        ({"batch_key": "plate"}, KeyError, "no adata.obs.'plate'.*'donor'"),
        ({"batch_key": "batch", "layer": "raw"}, KeyError, r"no adata.layers.'raw'.*\['counts'\]"),
        ({"batch_key": "batch"}, ValueError, "adata.X holds values that are not whole numbers.*layer='counts'"),
    ],
)
def test_embed_errors(cells, arguments, error, message):
    before = keys(cells)
    with pytest.raises(error, match=message):
        tl.embed(cells, **arguments)
    assert keys(cells) == before


def test_errors_about_models_and_objects(cells, trained):
    with pytest.raises(TypeError, match="must be an AnnData object, not ndarray"):
        tl.embed(np.ones((3, 2)), "ae")
    with pytest.raises(ValueError, match=r"\['batch_key', 'n_latent', 'n_hidden', 'train_options'\] belong to a"):
        tl.embed(cells, trained, batch_key="batch", n_latent=5, model_options={"n_hidden": 3}, train_options=FAST)
    model.VAE.setup_anndata(cells, layer="counts")
    with pytest.raises(ValueError, match=r"This VAE is not trained yet: run model.train\(\)"):
        tl.embed(cells, model.VAE(cells))


# correct


def test_correct_writes_layer_and_embedding(cells, trained):
    tl.correct(cells, batch_key="batch", reference="b", layer="counts", n_latent=4, seed=3, train_options=FAST)
    layer = cells.layers["corrected"]
    assert (layer.dtype, layer.shape) == (np.float32, (N, G))
    np.testing.assert_allclose(layer.sum(1), 1e4, rtol=1e-4)
    expected = trained.get_normalized_expression(transform_batch="b", library_size=1e4, return_numpy=True)
    assert np.array_equal(layer, expected)
    assert np.array_equal(cells.obsm["X_cvae"], trained.get_latent_representation())
    found = cells.uns["corrected"]
    assert (found["reference"], found["library_size"], found["embedding"], found["model"]) == (
        ["b"], 1e4, "X_cvae", "CVAE",
    )  # fmt: skip
    assert "reference" not in cells.uns["X_cvae"]


def test_correct_averages_over_all_batches(cells, trained):
    tl.correct(cells, trained, key_added="all")
    for batch in "ab":
        tl.correct(cells, trained, reference=batch, key_added=batch)
    np.testing.assert_allclose(cells.layers["all"], (cells.layers["a"] + cells.layers["b"]) / 2, rtol=1e-4)
    assert cells.uns["all"]["reference"] == ["a", "b"]
    assert not np.allclose(cells.layers["a"], cells.layers["b"], rtol=1e-3)


def test_correct_at_the_cells_own_library_size(cells, trained):
    tl.correct(cells, trained, library_size="latent")
    np.testing.assert_allclose(cells.layers["corrected"].sum(1), cells.layers["counts"].sum(1).A1, rtol=1e-4)


def test_correct_of_genes_in_another_order(cells, trained):
    mixed = cells[:, ::-1].copy()
    tl.correct(mixed, trained)
    tl.correct(cells, trained)
    assert np.array_equal(mixed.layers["corrected"][:, ::-1], cells.layers["corrected"])


def test_correct_of_log_values_is_on_their_scale(cells):
    tl.correct(cells, batch_key="batch", likelihood="normal", train_options=FAST)
    assert abs(cells.layers["corrected"].mean() - cells.X.mean()) < 0.2 * cells.X.mean()
    assert "library_size" not in cells.uns["corrected"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_key": None}, "batch_key= is needed"),
        ({"model": "vae"}, "'vae' cannot correct: only 'cvae'"),
        ({"reference": "c"}, r"reference='c' must be of the batches in obs\['batch'\]: \['a', 'b'\]"),
        ({"reference": []}, "must be of the batches"),
        ({"key_added": "counts"}, "is the layer of the input"),
        ({"library_size": -1}, "must be a positive number or 'latent'"),
        ({"library_size": "median"}, "must be a positive number or 'latent'"),
        ({"likelihood": "normal", "layer": None, "library_size": 1e4}, "is for count likelihoods"),
        (
            {"model_options": {"prior": "learned"}},
            r"does not decode from the batch \(p\(x\|z\) .*any prior but 'learned'",
        ),
    ],
)
def test_correct_errors_come_before_training(cells, monkeypatch, arguments, message):
    monkeypatch.setattr(model.CVAE, "train", lambda *_, **__: pytest.fail("it trained"))
    before = keys(cells)
    with pytest.raises(ValueError, match=message):
        tl.correct(cells, **{"batch_key": "batch", "layer": "counts"} | arguments)
    assert keys(cells) == before


def test_correct_leaves_out_batches_that_no_cell_has(cells, monkeypatch):
    cells.obs["batch"] = cells.obs["batch"].cat.add_categories("zzz").cat.reorder_categories(["zzz", "b", "a"])
    options = {"batch_key": "batch", "layer": "counts", "train_options": FAST | {"max_epochs": 1}}
    tl.correct(cells, **options)
    assert cells.uns["corrected"]["reference"] == ["b", "a"]
    monkeypatch.setattr(model.CVAE, "train", lambda *_, **__: pytest.fail("it trained"))
    for reference in ("zzz", ["a", "zzz"]):
        with pytest.raises(ValueError, match=r"must be of the batches in obs\['batch'\]: \['b', 'a'\]"):
            tl.correct(cells, reference=reference, **options)


def test_correct_needs_the_genes_of_the_model(cells, trained):
    counts = sparse.hstack([cells.layers["counts"], np.zeros((N, 1))], format="csr")
    var = pd.DataFrame(index=[*cells.var_names, "new"])
    more = ad.AnnData(obs=cells.obs, var=var, layers={"counts": counts})
    with pytest.raises(ValueError, match=r"1 of the 101 genes of adata.*\['new'\].*model.schema.var_names"):
        tl.correct(more, trained)
    tl.embed(more, trained)
    assert np.array_equal(more.obsm["X_cvae"], trained.get_latent_representation())


# map_query, and what is written to obs


def test_map_query_says_which_models_can_be_mapped_on(cells, tmp_path):
    model.IDEC.setup_anndata(cells)
    idec = model.IDEC(cells, n_components=2, n_latent=2, n_hidden=8)
    with pytest.raises(ValueError, match=r"on a model of class IDEC; the classes that can are AE, VAE, CVAE, GMVAE\."):
        tl.map_query(cells, idec)
    idec.is_trained = True
    idec.save(tmp_path / "idec")
    card = (tmp_path / "idec" / "README.md").read_text()
    code = card.split("```python")[1].split("```")[0]
    assert "z = model.get_latent_representation(adata)\nclusters = model.predict(adata)\n" in code
    assert "query" not in code


@pytest.mark.parametrize("column", ["mapped_label", "mapped_uncertainty", "mapped_outlier_score"])
def test_map_query_does_not_write_over_what_the_reference_reads(cells, monkeypatch, column):
    cells.obs[column] = cells.obs["batch"]
    model.CVAE.setup_anndata(cells, layer="counts", batch_key=column, labels_key="donor")
    reference = model.CVAE(cells, n_latent=2, n_hidden=8)
    reference.train(**FAST)
    tl.map_query(cells, reference, key_added="other", train_options=FAST)
    tl.map_query(cells, reference, key_added="other", train_options=FAST)  # columns of an earlier run are no matter
    monkeypatch.setattr(model.CVAE, "train", lambda *_, **__: pytest.fail("it trained"))
    before = keys(cells)
    with pytest.raises(ValueError, match=rf"written to obs\['{column}'\], which the model reads.*choose another key"):
        tl.map_query(cells, reference)
    assert keys(cells) == before


# interrupted


@pytest.mark.parametrize("job", ["embed", "correct", "map_query", "consensus"])
def test_a_job_that_is_interrupted_writes_nothing(cells, trained, job):
    """As the stop button of a notebook, once: the next training of several would go on."""
    before = keys(cells)
    stop = {"callbacks": [Raise(KeyboardInterrupt(), after=1)], "max_epochs": 5, "progress_bar": False}
    common = {"layer": "counts", "batch_key": "batch", "train_options": stop}
    jobs = {
        "embed": lambda: tl.embed(cells, "cvae", **common),
        "correct": lambda: tl.correct(cells, **common),
        "map_query": lambda: tl.map_query(cells, trained, train_options=stop),
        "consensus": lambda: tl.consensus(cells, 2, n_components=2, **common),
    }
    if job == "map_query":
        cells.obs["batch"] = "new"
    with pytest.raises(KeyboardInterrupt, match="interrupted: nothing was written"):
        jobs[job]()
    assert keys(cells) == before


def test_a_job_whose_time_is_over_writes_what_it_has(cells):
    options = {"max_time": "00:00:00:01", "max_epochs": 100_000, "progress_bar": False}
    tl.embed(cells, "vae", layer="counts", train_options=options)
    assert np.isfinite(cells.obsm["X_vae"]).all()
