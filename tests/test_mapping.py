"""Query mapping: the reference stays bit for bit, new weights alone move, what is missing is masked, labels follow."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from _models import FAST, TINY, make
from _toys import toy_counts, toy_values
from anndata import AnnData
from safetensors.torch import load_file, save_file
from scipy import sparse
from scipy.sparse import csr_matrix
from scipy.special import log_softmax
from scipy.stats import multivariate_normal
from sklearn.metrics import roc_auc_score

import sccvae
from sccvae import model as models
from sccvae.data import batch_moments, splits
from sccvae.distributions import ZINB, Bernoulli, NegativeBinomial, Normal, Poisson
from sccvae.model import AE, CVAE, GMVAE, VAE, _transfer
from sccvae.model._classes import (
    against_classes,
    by_normals,
    calibrate,
    calibration_error,
    logistic,
    normals,
    principal_axes,
    strangeness,
)
from sccvae.module import Batch
from sccvae.module._growing import new_weights
from sccvae.nn import ConditionedLinear, new_columns, widen

EVERY_KIND = {
    "batch_key": "batch",
    "categorical_covariate_keys": ["donor", "treated"],
    "continuous_covariate_keys": ["dose"],
}
CASES = {
    "cvae": (CVAE, {}, None),
    "learned prior": (CVAE, {"prior": "learned"}, None),
    "several conditions": (CVAE, {"n_layers": 2, "dropout": 0.1}, EVERY_KIND),
    "gene-batch": (CVAE, {"likelihood": NegativeBinomial(dispersion="gene-batch")}, None),
    "gmvae": (GMVAE, {"n_components": 2}, None),
    "gmvae, learned w": (GMVAE, {"n_components": 2, "w_prior": "learned"}, None),
}


def query_of(n=30, genes=slice(None), **columns):
    """Cells of a batch that the reference does not know."""
    query = toy_counts(n, seed=3)[:, genes].copy()
    query.obs["batch"] = "new"
    for name, value in columns.items():
        query.obs[name] = value
    return query


@pytest.fixture(scope="module", params=CASES)
def reference(request):
    cls, options, setup = CASES[request.param]
    return make(cls, toy_counts(), setup=setup, **options)


@pytest.fixture(scope="module")
def cvae():
    return make(CVAE, toy_counts())


# The reference stays


def test_widen_by_hand():
    weight = torch.tensor([[1.0, 3.0, 10.0, 20.0, 30.0, 7.0]])  # a batch of 2, a covariate of 3, a number
    wide = widen(weight, (2, 3), (3, 5))
    assert wide.tolist() == [[1.0, 3.0, 2.0, 10.0, 20.0, 30.0, 20.0, 20.0, 7.0]]
    assert new_columns((2, 3), (3, 5), 1).tolist() == [False, False, True, False, False, False, True, True, False]


def test_reference_cells_stay_and_only_new_weights_move(reference):
    cells = toy_counts()
    before = reference.get_latent_representation(cells), reference.get_elbo(cells, return_mean=False)
    own = {k: v.clone() for k, v in reference.module.state_dict().items()}
    query = reference.load_query(query_of(donor="d9") if len(reference.schema.categories) > 1 else query_of())
    known = reference.schema.n_categories
    start = {k: v.clone() for k, v in query.module.state_dict().items()}
    assert not query.is_trained
    query.train(**FAST)
    assert query.is_trained
    after = query.get_latent_representation(cells), query.get_elbo(cells, return_mean=False)
    for old, new in zip(before, after, strict=True):  # a product with more columns may add up in another order
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-6)
    masks = new_weights(query.module, known)
    moved = 0
    for name, value in query.module.state_dict().items():  # buffers, such as the statistics of batch norm, included
        new = masks.get(name, torch.zeros((), dtype=torch.bool)).expand(value.shape)
        assert torch.equal(value[~new], start[name][~new]), name
        moved += int((value[new] != start[name][new]).sum())
    assert moved
    assert all(torch.equal(v, own[k]) for k, v in reference.module.state_dict().items())
    assert all(p.requires_grad for p in query.module.parameters())
    assert not any(getattr(layer, "frozen", False) for layer in query.module.modules())


def test_the_new_weights_are_all_that_see_the_new_category(reference):
    """Scrambling what ``new_weights`` names changes the output for every cell of the query."""
    query = reference.load_query(query_of())
    query.is_trained = True
    before = query.get_elbo(return_mean=False)
    masks = new_weights(query.module, reference.schema.n_categories)
    with torch.no_grad():
        for name, weight in query.module.named_parameters():
            if name in masks:
                weight[masks[name].expand(weight.shape)] += 5.0
    assert (query.get_elbo(return_mean=False) != before).all()


def test_a_condition_scales_by_hand():
    torch.manual_seed(0)
    layer = ConditionedLinear(4, 3, 2)
    h, c = torch.randn(5, 4), torch.eye(2)[[0, 1, 1, 0, 1]]
    before = layer(h, c)
    layer.adapt()
    assert torch.equal(layer(h, c), before)
    with torch.no_grad():
        layer.scale.weight[:, 1] = torch.tensor([0.7, -0.2, 0.0])
    product = h @ layer.linear.weight + layer.linear.bias
    shift = layer.condition.weight.T
    torch.testing.assert_close(layer(h, c)[1], product[1] * torch.tensor([0.7, -0.2, 0.0]).exp() + shift[1])
    assert torch.equal(layer(h, c)[[0, 3]], before[[0, 3]])
    plain = ConditionedLinear(4, 3)
    plain.adapt()
    assert plain.scale is None


def test_a_new_batch_scales_what_the_encoder_makes_of_the_genes(cvae):
    query = cvae.load_query(query_of())
    scale = query.module.encoder.body.linears[0].scale.weight
    assert not scale.any()
    query.train(**FAST)
    assert scale[:, -1].any()
    assert not scale[:, :-1].any()
    assert cvae.module.encoder.body.linears[0].scale is None
    blind = make(CVAE, toy_counts(), encode_condition=False).load_query(query_of())
    assert blind.module.encoder.body.linears[0].scale is None


def test_unfrozen_everything_moves(cvae):
    query = cvae.load_query(query_of(), freeze=False)
    query.train(**FAST)
    assert not np.array_equal(query.get_latent_representation(toy_counts()), cvae.get_latent_representation())


def test_the_query_itself_is_not_written_to(cvae):
    query = query_of()
    obs, uns = query.obs.copy(), dict(query.uns)
    cvae.load_query(query).train(**FAST)
    pd.testing.assert_frame_equal(query.obs, obs)
    assert dict(query.uns) == uns
    assert not query.obsm
    view = query_of()[:20]  # so a view will do
    cvae.load_query(view).train(**FAST)
    assert view.is_view


def test_without_new_categories_there_is_nothing_to_train(cvae, caplog):
    same = toy_counts(20, seed=5)
    query = cvae.load_query(same)
    assert query.is_trained
    assert np.array_equal(query.get_latent_representation(), cvae.get_latent_representation(same))
    with pytest.raises(TypeError, match="no argument 'nonsense'"):
        query.train(nonsense=3)
    query.train(**FAST)
    assert "nothing to train" in caplog.text
    assert query.history == {}
    with pytest.raises(ValueError, match="no new categories, so nothing was trained"):
        sccvae.pl.history(query)
    autoencoder = make(AE, toy_values())
    values = toy_values(20, seed=5)
    values.obs["batch"] = "new"
    assert np.isfinite(autoencoder.load_query(values).get_latent_representation()).all()


def planted(n=400, n_genes=20, seed=0):
    """Counts of three types in three batches; each batch multiplies the genes by factors of its own."""
    rng = np.random.default_rng(seed)
    kind, batch = rng.integers(3, size=n), rng.integers(3, size=n)
    rates = rng.gamma(1.0, 4.0, size=(3, n_genes))[kind] * np.exp(rng.normal(0, 0.7, size=(3, n_genes)))[batch]
    obs = pd.DataFrame({"batch": np.array(["a", "b", "c"])[batch], "type": np.array(["x", "y", "z"])[kind]})
    obs.index = [f"cell{i}" for i in range(n)]
    return AnnData(sparse.csr_matrix(rng.poisson(rates * 3).astype(np.float32)), obs=obs)


@pytest.fixture(scope="module")
def planted_reference():
    adata = planted()
    reference = adata[adata.obs["batch"] != "c"].copy()
    setup = {"batch_key": "batch", "labels_key": "type"}
    CVAE.setup_anndata(reference, **setup)
    model = CVAE(reference, n_latent=3, n_hidden=32)
    model.train(**FAST | {"max_epochs": 60})
    return model, adata[adata.obs["batch"] == "c"].copy()


def test_a_planted_batch_is_mapped(planted_reference):
    """Training the new weights raises the ELBO of the new batch and brings its types to those of the reference."""
    model, cells = planted_reference
    query = model.load_query(cells)
    query.is_trained = True
    before = query.get_elbo()

    def gap():
        z, own = query.get_latent_representation(), model.get_latent_representation()
        mine, theirs = cells.obs["type"].to_numpy(), model.adata.obs["type"].to_numpy()
        return sum(np.linalg.norm(z[mine == t].mean(0) - own[theirs == t].mean(0)) for t in "xyz")

    far = gap()
    query.train(accelerator="cpu", progress_bar=False)
    assert query.get_elbo() > before + 2
    assert gap() < far
    assert (query.history["alignment_train"].to_numpy() != 0).all()  # with draws from p(z): there is one new batch
    assert query.module.alignment.anchor is None


@pytest.mark.parametrize("only", list("xyz"))
def test_cells_of_one_type_are_mapped_on_that_type(planted_reference, only):
    """They are not drawn over all of p(z)."""
    model, cells = planted_reference
    query = model.load_query(cells[cells.obs["type"] == only].copy())
    query.train(accelerator="cpu", progress_bar=False)
    own, types = model.get_latent_representation(), model.adata.obs["type"].to_numpy()
    apart = np.linalg.norm(query.get_latent_representation()[:, None] - own, axis=2)
    nearest = types[apart.argsort(1)[:, :15]]
    assert (nearest == only).mean() > 0.9


# Missing genes


@pytest.mark.parametrize(
    "likelihood",
    [Poisson(), NegativeBinomial(), NegativeBinomial("gene-cell"), ZINB(), Normal(), Normal("latent"), Bernoulli()],
    ids=lambda v: str(v.config),
)
def test_masked_features_do_not_count(likelihood):
    """The masked log mass is that of the measured features one by one: torch's own distributions, term by term."""
    torch.manual_seed(0)
    n, g = 4, 6
    measured = torch.tensor([True, False, True, True, False, True])
    likelihood.build(3, g)
    x = torch.poisson(torch.full((n, g), 2.0)) if likelihood.support == "counts" else torch.rand(n, g)
    h, library = torch.randn(n, 3), torch.full((n, 1), 12.0)
    batch = Batch(x, torch.zeros(n, 0).long(), torch.zeros(n, 0), library, present=measured.expand(n, g))
    p = likelihood(h, library)
    found = batch.log_prob(p)
    terms = []
    for j in torch.nonzero(measured)[:, 0]:
        only = torch.zeros(g, dtype=torch.bool)
        only[j] = True
        terms.append(p.restrict(only).log_prob(x[:, only]))
    assert torch.allclose(found, sum(terms), atol=1e-5)
    changed = batch.x.clone()
    changed[:, ~measured] += 1.0
    batch.x = changed
    assert torch.equal(batch.log_prob(likelihood(h, library)), found)
    every = Batch(x, batch.codes, batch.covariates, library, present=torch.ones(n, g, dtype=torch.bool))
    torch.testing.assert_close(every.log_prob(p), p.log_prob(x))  # with and without the softmax in one loop


def test_missing_genes_are_masked_and_reported(cvae, caplog):
    genes = [f"gene{j}" for j in (7, 0, 3, 2, 11, 5, 9, 10)]
    with caplog.at_level(logging.WARNING, "sccvae"):
        query = cvae.load_query(query_of(genes=genes))
    missing = ["gene1", "gene4", "gene6", "gene8"]
    assert query.query_report["missing_genes"] == missing
    assert "4 of 12 genes (33%) are missing and masked" in caplog.text
    assert "4 of 12 genes" in query._model_summary_string
    query.train(**FAST)
    # The encoder sees the mean of log(1 + x) there, and the library size is what all genes would have given.
    store = query._store(None)
    tensors = store.gather(np.arange(30))
    own = cvae.adata.X.toarray()[cvae.train_indices]
    absent = np.isin(cvae.schema.var_names, missing)
    size = own.sum(1, keepdims=True)
    depth = np.median(cvae.adata.X.toarray().sum(1))
    stand_in = np.expm1(np.log1p(own / size * depth).mean(0)) * tensors["library"].numpy() / depth
    assert np.allclose(tensors["x"][:, absent], stand_in[:, absent], rtol=1e-5)
    assert np.array_equal(tensors["x"][:, ~absent], query_of().X.toarray()[:, ~absent])
    scale = own.sum() / own[:, ~absent].sum()
    assert np.allclose(tensors["library"][:, 0], query_of().X.toarray()[:, ~absent].sum(1) * scale, rtol=1e-5)
    # Cells of the reference have all genes, and keep their bits.
    assert np.array_equal(query.get_latent_representation(toy_counts()), cvae.get_latent_representation())
    # All readers work on masked cells.
    assert np.isfinite(query.get_elbo(return_mean=False)).all()
    assert np.isfinite(query.get_marginal_ll(n_mc_samples=3))
    assert query.get_normalized_expression().shape == (30, 12)
    assert query.get_normalized_expression(transform_batch=["a", "new"]).shape == (30, 12)


def test_a_gene_is_the_same_missing_or_never_there(cvae):
    """What a query measured in genes that the reference lacks changes nothing."""
    query = query_of()
    more = query_of()
    extra = AnnData(
        sparse.hstack([more.X, sparse.csr_matrix(np.full((30, 2), 50.0, np.float32))]).tocsr(),
        obs=more.obs,
        var=pd.DataFrame(index=[*more.var_names, "other0", "other1"]),
    )
    found = []
    for cells in (query, extra):
        mapped = cvae.load_query(cells)
        mapped.train(**FAST)
        found.append(mapped.get_latent_representation())
    assert mapped.query_report["n_genes_left_out"] == 2
    assert np.array_equal(*found)


def test_dispersions_of_missing_genes_are_those_of_the_known_batches():
    model = make(CVAE, toy_counts())
    query = model.load_query(query_of(genes=[f"gene{j}" for j in range(9)]))
    theta = query.module.likelihood.log_theta.detach()
    assert torch.allclose(theta[2, 9:], theta[:2, 9:].mean(0), atol=1e-6)
    assert not torch.allclose(theta[2, :9], theta[:2, :9].mean(0), atol=1e-2)


def test_mapping_leaves_the_global_random_state_alone(cvae):
    before = torch.random.get_rng_state()
    cvae.load_query(query_of())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_masking_beats_zeros(planted_reference):
    """Cells that lose genes stay closer to where all genes put them than with zeros in their place."""
    model, _ = planted_reference
    cells = model.adata.copy()
    lost = np.arange(cells.n_vars) % 3 == 0
    z = model.get_latent_representation(cells)
    masked = model.load_query(cells[:, ~lost].copy()).get_latent_representation()
    zeros = cells.copy()
    zeros.X = sparse.csr_matrix(zeros.X.toarray() * ~lost)
    filled = model.get_latent_representation(zeros)
    assert np.square(masked - z).sum() < 0.3 * np.square(filled - z).sum()


def test_stand_ins_are_a_cells_own(planted_reference, monkeypatch):
    """Two in five genes missing: z stays nearer to that of all genes, and known cells are not called unknown."""
    model, _ = planted_reference
    cells = model.adata.copy()
    query = model.load_query(cells[:, np.random.default_rng(0).random(cells.n_vars) < 0.6].copy())
    batch = next(query._batches(query._store(None), np.arange(cells.n_obs)))
    z = model.get_latent_representation(cells)
    masked, labels = query.get_latent_representation(), query.transfer_labels()
    monkeypatch.setattr(type(model.module), "completed", lambda self, batch: batch)
    plain = next(query._batches(query._store(None), np.arange(cells.n_obs)))
    assert np.square(masked - z).sum() < 0.5 * np.square(query.get_latent_representation() - z).sum()
    assert (labels["label"] == "unknown").mean() < 0.25 < (query.transfer_labels()["label"] == "unknown").mean()
    with torch.inference_mode():  # by hand
        expected = query.module.generative({"z": query.module.inference(plain)["z"].loc}, plain).mean
    usual = torch.tensor(model.reference["gene_means"])
    more = (expected / expected.sum(1, keepdim=True)) / (usual / usual.sum())
    torch.testing.assert_close(batch.x, torch.where(plain.present, plain.x, plain.x * more))


def test_counts_of_shallow_cells_are_drawn(planted_reference):
    """Cells at half of their counts are like others, and their labels come from what was measured."""
    model, _ = planted_reference
    cells = model.adata.copy()
    rng = np.random.default_rng(0)
    cells.X = sparse.csr_matrix(rng.binomial(cells.X.toarray().astype(int), 0.5).astype(np.float32))
    depth = model.reference["transfer"]["genes"]["depth"]
    library = np.asarray(model.adata.X.sum(1)).ravel()[model.train_indices]
    assert depth == pytest.approx(np.quantile(library, 0.25), rel=0.02)  # of those with a label
    batch = next(model._batches(model._store(cells), np.arange(50)))
    with torch.inference_mode():
        z = model.module.inference(batch)["z"].loc
        drawn = torch.stack([model._drawn(batch, z, depth).x for _ in range(300)])
        assert model._drawn(batch, z, 0.0) is batch
        share = model.module.generative({"z": z}, batch).mean / batch.library
    more = (depth - batch.library).clamp(min=0)
    assert (drawn >= batch.dense).all()
    torch.testing.assert_close(drawn.mean(0) - batch.dense, more * share, atol=1.0, rtol=0.15)
    found = model.transfer_labels(cells)
    del model.reference["transfer"]["genes"]["depth"]
    before = model.transfer_labels(cells)
    model.reference["transfer"]["genes"]["depth"] = depth
    assert (found["best_label"] == before["best_label"]).all()
    assert (found["label"] == "unknown").mean() < 0.02 < (before["label"] == "unknown").mean()


def test_values_have_no_depth():
    """Their sums may be negative, and nothing is drawn then."""
    adata = toy_values()
    adata.X = adata.X - 1.0
    adata.obs["type"] = pd.Categorical(np.where(np.arange(adata.n_obs) % 3, "x", "y"))
    model = make(CVAE, adata, setup={"batch_key": "batch", "labels_key": "type"}, likelihood="normal")
    assert "depth" not in model.reference["transfer"]["genes"]
    batch = next(model._batches(model._store(None), np.arange(9)))
    assert (batch.library < 0).any()
    with torch.inference_mode():
        assert model._drawn(batch, model.module.inference(batch)["z"].loc, 0.0) is batch


# What is refused


def test_refusals(cvae):
    untrained = make(CVAE, toy_counts(), train=False)
    with pytest.raises(ValueError, match=r"not trained, so nothing can be mapped.*model.train\(\)"):
        untrained.load_query(query_of())
    missing = query_of()
    missing.obs.loc[missing.obs_names[:4], "batch"] = np.nan
    with pytest.raises(ValueError, match=r"missing \(NaN\) for 4 of 30 query cells.*fillna\('query'\)"):
        cvae.load_query(missing)
    with pytest.raises(KeyError, match=r"obs\['batch'\], which the query lacks.*= 'query'"):
        cvae.load_query(AnnData(missing.X, var=missing.var))
    with pytest.raises(ValueError, match=r"has 5 of the reference's 12 genes, fewer than 50%.*gene5"):
        cvae.load_query(query_of(genes=slice(0, 5)))
    half = query_of()
    half.X = half.X * 0.5
    with pytest.raises(ValueError, match="not raw counts"):
        cvae.load_query(half)
    query = cvae.load_query(query_of())
    with pytest.raises(ValueError, match=r"weight_decay would shrink the frozen weights.*freeze=False"):
        query.train(**FAST, weight_decay=0.1)
    with pytest.raises(ValueError, match="at least 1"):
        query.train(**FAST | {"max_epochs": 0}, plan_kwargs={"weight_decay": 0.0})
    assert query.train_indices is None
    with pytest.warns(UserWarning, match=r"No cells are held out.*train_size=0\.9"):
        query.train(**FAST, patience=3)
    with pytest.raises(ValueError, match="not made by load_query"):
        _ = cvae.query_report
    with pytest.raises(TypeError, match=r"The reference is a CVAE: call CVAE.load_query_data"):
        VAE.load_query_data(query_of(), cvae)
    with pytest.raises(ValueError, match=r"without labels_key.*train it to transfer labels"):
        query.transfer_labels()
    with pytest.raises(TypeError, match=r"'unfrozen': freeze=False"):
        CVAE.load_query_data(query_of(), cvae, unfrozen=True)


def test_a_query_needs_no_preparation(cvae):
    """What scvi-tools does beforehand is done by load_query."""
    cells = query_of(genes=slice(0, 8))
    assert CVAE.prepare_query_anndata(cells, cvae) is None
    assert CVAE.prepare_query_anndata(cells, cvae, inplace=False) is cells
    assert cells.n_vars == 8
    genes = CVAE.prepare_query_anndata(cells, cvae, return_reference_var_names=True)
    assert genes.tolist() == cvae.schema.var_names.tolist()
    with pytest.raises(ValueError, match="fewer than 50%"):
        CVAE.prepare_query_anndata(query_of(genes=slice(0, 5)), cvae)


# On disk


def test_a_query_model_comes_back(cvae, tmp_path):
    cells = query_of(genes=slice(0, 10))
    query = CVAE.load_query_data(cells, cvae)
    query.train(**FAST)
    query.save(tmp_path / "query")
    for loaded in (models.load(tmp_path / "query", cells), models.load(tmp_path / "query")):
        found = loaded.get_latent_representation(cells)
        assert np.array_equal(found, query.get_latent_representation())
        assert loaded.query_report == query.query_report
    again = loaded.load_query(query_of(20, batch="newer"))  # a query on a query
    again.train(**FAST)
    assert again.schema.categories["batch"].tolist() == ["a", "b", "new", "newer"]
    assert np.array_equal(again.get_latent_representation(cells), found)


def test_what_a_query_prints(cvae, tmp_path):
    query = cvae.load_query(query_of(genes=[f"gene{j}" for j in range(9)]))
    query.train(**FAST)
    query.save(tmp_path / "query")
    for one in (query, sccvae.model.load(tmp_path / "query")):
        assert "n_hidden=8" in one._model_summary_string
        assert "new in obs['batch']: ['new']; 3 of 12 genes (25%) are missing" in one._model_summary_string
    assert "new in obs" not in cvae._model_summary_string


def test_a_query_that_an_earlier_version_saved(cvae, tmp_path):
    """Its new batch shifts, and does not scale."""
    cells = query_of()
    query = cvae.load_query(cells)
    query.train(**FAST)
    query.save(tmp_path / "query")
    content = json.loads((tmp_path / "query/model.json").read_text())
    assert content["reference"]["mapping"].pop("adapted")
    (tmp_path / "query/model.json").write_text(json.dumps(content))
    weights = load_file(tmp_path / "query/weights.safetensors")
    del weights["encoder.body.linears.0.scale.weight"]
    save_file(weights, tmp_path / "query/weights.safetensors")
    with torch.no_grad():
        query.module.encoder.body.linears[0].scale.weight.zero_()
    loaded = models.load(tmp_path / "query")
    np.testing.assert_array_equal(loaded.get_latent_representation(cells), query.get_latent_representation())
    newer = loaded.load_query(query_of(20, batch="newer"))
    newer.is_trained = True
    np.testing.assert_allclose(newer.get_latent_representation(cells), query.get_latent_representation(), atol=1e-5)


def test_a_folder_alone_maps_in_a_new_process(planted_reference, tmp_path):
    model, cells = planted_reference
    model.save(tmp_path / "reference")
    cells.write_h5ad(tmp_path / "query.h5ad")
    script = """
import anndata, numpy, sccvae
query = sccvae.model.load("reference").load_query(anndata.read_h5ad("query.h5ad"))
query.train(max_epochs=2, batch_size=16, accelerator="cpu", progress_bar=False)
numpy.save("z.npy", query.get_latent_representation())
query.transfer_labels().to_csv("labels.csv")
"""
    root = Path(sccvae.__file__).parents[1]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, env=env, timeout=300)
    here = model.load_query(cells)
    here.train(**FAST)
    assert np.array_equal(np.load(tmp_path / "z.npy"), here.get_latent_representation())
    labels = pd.read_csv(tmp_path / "labels.csv", index_col=0)
    assert labels["label"].tolist() == here.transfer_labels()["label"].astype(str).tolist()


def test_model_card(planted_reference, tmp_path):
    model, _ = planted_reference
    model.save(tmp_path / "reference")
    card = (tmp_path / "reference" / "README.md").read_text()
    n = model.adata.n_obs
    for text in (
        "# CVAE on 20 genes",
        f"| cells | {n}: {len(model.train_indices)} trained on, {len(model.validation_indices)} held out",
        "| batch `batch` | a, b (2) |",
        "| labels `type` | x, y, z (3) |",
        f"| sccvae | {sccvae.__version__} |",
        f"negative ELBO, validation cells | {model.history['elbo_validation'].min().item():.2f}",
        "| expected_calibration_error |",
        "p: p(x|z,c) p(z)",
        "model.load_query(adata)",
    ):
        assert text in card, text
    assert str(tmp_path) not in card


# Labels


def test_normals_and_their_posterior_against_scipy():
    rng = np.random.default_rng(0)
    codes = np.repeat([0, 1, 2], [3000, 2000, 1000])
    mean, root = rng.normal(size=(3, 2)) * 3, rng.normal(size=(3, 2, 2))
    z = mean[codes] + np.einsum("nij,nj->ni", root[codes], rng.normal(size=(6000, 2)))
    known = normals(z, codes, 4)  # the last class has no cell
    score, log_q = by_normals(z[::50], known)
    densities = []
    for k in range(3):
        own = z[codes == k]
        assert np.allclose(known["means"][k], own.mean(0))
        cov = np.asarray(known["covariances"][k])
        assert np.allclose(cov, np.cov(own.T, bias=True), atol=0.15 * np.abs(cov).max())
        densities.append(known["shares"][k] * multivariate_normal(own.mean(0), cov).pdf(z[::50]))
    total = np.sum(densities, 0)
    assert np.allclose(score, -np.log(total))
    assert np.allclose(np.exp(log_q)[:, :3], np.stack(densities, 1) / total[:, None], atol=1e-9)
    assert (np.exp(log_q)[:, 3] == 0).all()


def test_genes_that_speak_for_a_class():
    """A class that no cell has is never chosen; the scale of the genes does not matter; of two classes one opposes."""
    rng = np.random.default_rng(0)
    codes = rng.choice([0, 2, 3], 300)
    x = csr_matrix(np.eye(4)[codes] * 3 + rng.uniform(size=(300, 4)))
    known = logistic(x, codes, 4)
    scores = x @ np.asarray(known["weights"]).T + known["intercepts"]
    assert (scores.argmax(1) == codes).all()
    for scale in (1e-9, 1e-3, 1e3):
        scaled = logistic(x * scale, codes, 4)
        assert np.allclose(np.asarray(scaled["weights"]) * scale, known["weights"], atol=1e-5)
        assert np.allclose(scaled["intercepts"], known["intercepts"], atol=1e-4)
        assert len(json.dumps(scaled)) < len(json.dumps(known)) + 100
    assert np.all(logistic(x * 0, codes, 4)["weights"] == np.zeros((4, 4)))
    some = codes > 0
    two = logistic(x[some], codes[some], 4)
    scores = x[some] @ np.asarray(two["weights"]).T + two["intercepts"]
    assert (scores.argmax(1) == codes[some]).all()
    assert np.allclose(scores[:, 2], -scores[:, 3])
    assert logistic(x[codes == 2], codes[codes == 2], 4) is None


def test_views_decide_together():
    """The product of their probabilities, each at its temperature; a cell of which they disagree is strange."""
    rng = np.random.default_rng(0)
    z = np.concatenate([rng.normal(size=(100, 2)), rng.normal(size=(100, 2)) + 8])
    known = normals(z, np.repeat([0, 1], 100), 2)
    cells, genes = np.array([[0.0, 0], [8, 8], [0, 0], [0, 0]]), np.array([[5.0, 0], [0, 5], [0, 5], [0, 0]])
    _, by_z = by_normals(cells, known)
    known |= {"temperatures": {"z": 4.0, "genes": 1.0}, "scores": {"disagreement": (1.0, 2.0)}}
    score, log_q = against_classes({"z": cells, "genes": genes, "drawn": genes}, known)
    wanted = [log_softmax(by_z / 4, 1), log_softmax(genes, 1)]
    assert np.allclose(log_q, sum(wanted))
    agree = (np.exp(wanted[0]) * np.exp(wanted[1])).sum(1)
    assert np.allclose(score, (-np.log(agree) - 1) / 2)
    assert score.argmax() == 2
    known["scores"] = {"energy": (0.0, 1.0)}
    score, _ = against_classes({"z": cells, "genes": genes[::-1], "drawn": genes}, known)
    assert np.allclose(score, -np.log(np.exp(genes).sum(1)))
    # As an earlier version saved it: the normals alone, or q alone.
    old = {name: known[name] for name in ("shares", "means", "covariances")}
    score, log_q = against_classes({"z": cells}, old)
    assert np.allclose(score, by_normals(cells, known)[0])
    assert np.allclose(np.exp(log_q), np.exp(by_z))
    assert np.allclose(against_classes({"z": cells, "q": genes}, old)[1], log_softmax(genes, 1))


def test_temperature_is_found_again():
    """Labels drawn from known probabilities, reported three times too sharp: the temperature is three."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20_000, 4)) * 2
    q = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    codes = (q.cumsum(1) > rng.uniform(size=(20_000, 1))).argmax(1)
    sharp = 3 * logits
    found = calibrate(sharp - np.log(np.exp(sharp).sum(1, keepdims=True)), codes)
    assert found["temperature"] == pytest.approx(3, rel=0.05)
    assert found["expected_calibration_error"] < 0.015
    assert found["expected_calibration_error_before"] > 0.1
    assert found["accuracy"] == pytest.approx((q.argmax(1) == codes).mean())


def test_calibration_error_by_hand():
    q = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.3, 0.7]])
    # Two bins of ten: 0.9 with one of two right, and 0.6 and 0.7, each right.
    assert calibration_error(q, np.array([0, 1, 1, 1]), bins=10) == pytest.approx((2 * 0.4 + 0.4 + 0.3) / 4)


@pytest.mark.parametrize("nan_labels", [False, True])
def test_labels_are_transferred(planted_reference, nan_labels):
    model, cells = planted_reference
    truth = cells.obs["type"].astype(str).to_numpy()
    cells = cells.copy()
    if nan_labels:
        cells.obs["type"] = np.nan
    query = model.load_query(cells)
    assert query.query_report["n_unlabelled"] == (len(truth) if nan_labels else 0)
    query.train(accelerator="cpu", progress_bar=False)
    table = query.transfer_labels()
    assert list(table) == ["label", "best_label", "probability", "uncertainty", "outlier_score"]
    assert (table["best_label"].astype(str) == truth).mean() > 0.9
    assert np.allclose(table["probability"] + table["uncertainty"], 1)
    every = query.transfer_labels(unknown_threshold=None)
    assert (every["label"].astype(str) == every["best_label"].astype(str)).all()
    unknown = table["label"] == "unknown"
    assert (query.transfer_labels(unknown_threshold=0.2)["label"] == "unknown").sum() > unknown.sum()
    assert (unknown == (table["outlier_score"] > query.unknown_score(0.9))).all()
    assert 0 <= query.calibration["expected_calibration_error"] < 0.2
    with pytest.raises(ValueError, match=r"unknown_threshold=3 must be a share"):
        query.transfer_labels(unknown_threshold=3)
    with pytest.raises(ValueError, match=r"n_neighbors=0 must be at least 1"):
        query.transfer_labels(n_neighbors=0)


def test_strangeness_of_genes_by_hand():
    """On the principal axes by normals of the classes, and the squared length of what the axes leave."""
    rng = np.random.default_rng(0)
    x = np.abs(rng.normal(size=(60, 3))) @ rng.normal(size=(3, 12)) + 0.1 * rng.normal(size=(60, 12))
    axes = principal_axes(csr_matrix(x))
    np.testing.assert_allclose(axes @ axes.T, np.eye(11), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(x @ axes.T, axis=0), np.linalg.svd(x)[1][:11], rtol=1e-4)
    codes = np.arange(60) % 2
    places = normals(x @ axes.T, codes, 2)
    views = {"z": x[:, :2], "place": x @ axes.T, "beyond": (x**2).sum(1) - ((x @ axes.T) ** 2).sum(1)}
    found = strangeness(np.zeros(60), views, np.zeros((60, 2)), {"places": places})
    density = sum(
        0.5 * multivariate_normal(m, c).pdf(views["place"])
        for m, c in zip(places["means"], places["covariances"], strict=True)
    )
    np.testing.assert_allclose(found["place"], -np.log(density), rtol=1e-6)
    np.testing.assert_allclose(found["beyond"], ((x - x @ axes.T @ axes) ** 2).sum(1), atol=1e-4)


def test_what_a_whole_query_exceeds_the_reference_by_is_its_technologys():
    rng = np.random.default_rng(0)
    z, place = rng.normal(size=(80, 2)), rng.normal(size=(80, 3))
    known = normals(z, np.zeros(80, int), 1) | {"places": normals(place, np.zeros(80, int), 1)}
    known |= {"temperatures": {"z": 1.0}, "scores": {"beyond": (0.0, 1.0)}, "quartiles": {"beyond": 1.0}}
    beyond = rng.normal(size=80)
    for shift, taken in ((5.0, None), (-5.0, 0.0)):  # only what is more
        views = {"z": z, "place": place, "beyond": beyond + shift}
        alone, together = (against_classes(views, known, together=t)[0] for t in (False, True))
        np.testing.assert_allclose(alone, beyond + shift)
        taken = np.quantile(beyond + shift, 0.25) - 1 if taken is None else taken
        np.testing.assert_allclose(together, alone - taken)


def test_a_strange_group_stands_out_more_than_its_cells(planted_reference):
    """Neighbours by their genes are asked as well: what is strange about a whole group is no chance."""
    model, cells = planted_reference
    strange, gains = np.arange(cells.n_obs) % 4 == 0, []
    for seed in range(4):
        query, x, rng = cells.copy(), cells.X.toarray(), np.random.default_rng(seed)
        of_x, other = x[query.obs["type"] == "x"].mean(0), rng.permutation(x.mean(0))
        x[strange] = rng.poisson(0.8 * of_x + 0.2 * other, (strange.sum(), x.shape[1]))
        query.X = sparse.csr_matrix(x)
        query = model.load_query(query)
        query.train(accelerator="cpu", progress_bar=False)
        alone, together = (query.transfer_labels(n_neighbors=n) for n in (1, 15))
        a, b = (roc_auc_score(strange, table["outlier_score"]) for table in (alone, together))
        gains.append(b - a)
    assert np.mean(gains) > 0.05
    assert (alone[["best_label", "probability"]] == together[["best_label", "probability"]]).all(axis=None)
    few = np.flatnonzero(strange)[:5]
    assert (query.transfer_labels(indices=few)["outlier_score"] == alone["outlier_score"].iloc[few]).all()


def test_held_out_cells_of_the_reference_are_known(planted_reference):
    model, _ = planted_reference
    share = (model.transfer_labels(indices=model.validation_indices)["label"] == "unknown").mean()
    assert share <= 2 / len(model.validation_indices)


def test_gmvae_transfers_by_its_classes():
    adata = planted(240)
    adata.obs.loc[adata.obs_names[::4], "type"] = np.nan
    setup = {"batch_key": "batch", "labels_key": "type"}
    reference = adata[adata.obs["batch"] != "c"].copy()
    GMVAE.setup_anndata(reference, **setup)
    model = GMVAE(reference, **TINY | {"n_latent": 3, "n_hidden": 24})
    model.train(**FAST | {"max_epochs": 20})
    shares = model.reference["component_shares"]
    cells = adata[adata.obs["batch"] == "c"].copy()
    cells.obs.loc[cells.obs["type"] == "x", "type"] = "of no reference"
    query = model.load_query(cells)
    assert query.query_report["unknown_labels"] == ["of no reference"]
    with pytest.raises(ValueError, match=r"guide= starts clusters.*leave it out"):
        query.train(**FAST, guide="type")
    query.train(**FAST)
    assert query.reference["component_shares"] == shares
    table = query.transfer_labels()
    assert table["best_label"].cat.categories.tolist() == query.component_names
    assert (table["best_label"].astype(str) == query.predict().astype(str)).mean() > 0.9
    query.reference["transfer"]["temperatures"] |= {"z": 1e12, "genes": 1e12, "q": 1.0}  # q alone
    table = query.transfer_labels()
    assert (table["best_label"].astype(str) == query.predict().astype(str)).all()
    temperature = query.calibration["temperature"]
    q = query.predict_proba().astype(np.float64) ** (1 / temperature)
    assert np.allclose(table["probability"], (q / q.sum(1, keepdims=True)).max(1), atol=1e-4)


def test_dispersions_of_a_new_batch_start_at_its_cells():
    adata = planted(240)
    reference, cells = (adata[(adata.obs["batch"] == "c") == new].copy() for new in (False, True))
    model = make(CVAE, reference)
    query = model.load_query(cells)
    before, after = (m.module.likelihood.log_theta.detach() for m in (model, query))
    assert torch.equal(after[:2], before)
    theta = batch_moments(query._store(None), 3)[1]
    np.testing.assert_allclose(after[2].exp(), 2 * theta[2], rtol=1e-5)


@pytest.mark.parametrize("labels", [False, True])
def test_only_labels_teach_the_classifier_a_new_batch(labels):
    adata = planted(120)
    GMVAE.setup_anndata(adata, batch_key="batch", labels_key="type")
    model = GMVAE(adata, **TINY)
    model.train(**FAST)
    cells = adata[:40].copy()
    cells.obs["batch"] = "new"
    if not labels:
        cells.obs["type"] = np.nan
    query = model.load_query(cells)
    before = {name: w.clone() for name, w in query.module.named_parameters() if name.endswith("condition.weight")}
    query.train(**FAST)
    moved = {name.split(".")[0]: not torch.equal(w, query.module.get_parameter(name)) for name, w in before.items()}
    assert moved == {"encoder": True, "decoder": True, "y_body": labels}


def test_categories_keep_their_type():
    adata = toy_counts()
    adata.obs["batch"] = adata.obs["treated"]
    query = make(CVAE, adata).load_query(query_of(batch=7))
    assert query.schema.categories["batch"].tolist() == [0, 1, 7]


@pytest.mark.parametrize(
    ("known", "new", "categories"),
    [
        ([0, 1], [0.0, 1.0], [0, 1]),
        ([0, 1], [1.0, 2.0], [0, 1, 2]),
        ([0, 1], [0.5, 1.0], [0.0, 1.0, 0.5]),
        ([0.0, 1.0], [1, 5], [0.0, 1.0, 5.0]),
        ([False, True], [1, 2], [False, True, 2]),
        (np.array([0, 1], np.int8), [0, 300], [0, 1, 300]),
        ([0, 1], ["1", "x"], [0, 1, "x"]),
    ],
)
def test_numbers_of_another_type_are_the_same_categories(known, new, categories, tmp_path):
    adata, cells = toy_counts(), toy_counts(seed=3)
    adata.obs["batch"], cells.obs["batch"] = np.tile(known, 24), np.tile(new, 24)
    query = make(CVAE, adata).load_query(cells)
    assert query.schema.categories["batch"].tolist() == categories
    query.train(**FAST)
    query.save(tmp_path / "query")
    again = sccvae.model.load(tmp_path / "query", cells)
    assert np.array_equal(again.get_latent_representation(), query.get_latent_representation())


@pytest.mark.parametrize("cls", [CVAE, GMVAE])
def test_a_class_may_be_called_unknown(cls):
    adata = planted(120)
    adata.obs["type"] = np.where(adata.obs["type"] == adata.obs["type"].iloc[0], "unknown", "known")
    with pytest.warns(UserWarning, match="say so: `unlabeled_category='unknown'`"):
        model = make(cls, adata, setup={"batch_key": "batch", "labels_key": "type"}, train=False)
    model.train(**FAST)
    table = model.transfer_labels(unknown_threshold=0.5)
    assert list(table["label"].cat.categories) == list(table["best_label"].cat.categories) == ["known", "unknown"]
    assert (table["label"] == "unknown").sum() > (table["best_label"] == "unknown").sum()


def test_labels_are_looked_at_before_the_training(tmp_path):
    adata = planted(120)
    make(CVAE, adata, setup={"batch_key": "batch", "labels_key": "type"}).save(tmp_path / "m")
    more = adata.copy()
    more.obs["type"] = "new"
    model = sccvae.model.load(tmp_path / "m", more)
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    with pytest.raises(ValueError, match=r"holds \['new'\]"):
        model.train(**FAST)
    del more.obs["type"]
    with pytest.raises(KeyError, match="no such column"):
        model.train(**FAST)
    assert all(torch.equal(v, before[k]) for k, v in model.module.state_dict().items())


@pytest.mark.parametrize("cls", [CVAE, GMVAE])
def test_a_class_without_training_cells_does_not_spoil_the_probabilities(cls, caplog, monkeypatch):
    monkeypatch.setattr(splits, "_let_each_train", lambda *of: None)  # as where there is no room for it
    adata = planted(400)
    adata.obs["type"] = adata.obs["type"].astype(str)
    plain = make(cls, adata.copy(), setup={"batch_key": "batch", "labels_key": "type"})
    adata.obs.iloc[plain.validation_indices[0], adata.obs.columns.get_loc("type")] = "rare"
    model = make(cls, adata, setup={"batch_key": "batch", "labels_key": "type"})
    assert "Classes ['rare'] have no training cell: their 1 held-out cells" in caplog.text
    assert model.calibration["n_held_out"] == len(model.validation_indices) - 1
    assert max(model.reference["transfer"]["temperatures"].values()) < 10


# In one call


def test_map_query(planted_reference, tmp_path):
    model, cells = planted_reference
    model.save(tmp_path / "reference")
    options = {"accelerator": "cpu", "progress_bar": False, "max_epochs": 3}
    found = sccvae.tl.map_query(cells, tmp_path / "reference", copy=True, train_options=options)
    assert "X_mapped" not in cells.obsm
    wanted = model.load_query(cells)
    wanted.train(**options)
    assert np.array_equal(found.obsm["X_mapped"], wanted.get_latent_representation())
    table = wanted.transfer_labels()
    assert (found.obs["mapped_label"] == table["label"]).all()
    assert np.array_equal(found.obs["mapped_uncertainty"], table["uncertainty"])
    assert found.uns["mapped"]["query"]["new_categories"]["batch"] == ["c"]
    found.write_h5ad(tmp_path / "mapped.h5ad")
    with pytest.raises(ValueError, match="must be a share"):
        sccvae.tl.map_query(cells, model, unknown_threshold=2)
    with pytest.raises(TypeError, match="not int"):
        sccvae.tl.map_query(cells, 3)


def test_a_rare_class_is_among_the_cells_that_genes_are_learned_from(monkeypatch):
    """Of 10,000 cells drawn at random, one of 20 cells in 100,000 may have none: it had probability 0."""
    monkeypatch.setattr(_transfer, "LEARNS_FROM", 40)
    adata = toy_counts(300)
    adata.obs["type"] = np.where(np.arange(300) % 100 == 0, "rare", np.where(np.arange(300) % 2, "T", "B"))
    model = make(CVAE, adata, setup={"batch_key": "donor", "labels_key": "type"}, train=False)
    model.train(**FAST, train_size=1.0)
    known = model.reference["transfer"]
    assert min(known["genes"]["intercepts"]) > -100
    assert min(known["places"]["shares"]) > 0
