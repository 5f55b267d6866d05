"""Differential expression: planted genes, false discoveries, estimates by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from _models import FAST, make, toy_for, trained
from anndata import AnnData
from scipy import sparse, stats

from sccvae.model import CVAE, VAE
from sccvae.model._shrinkage import common_shift, expected_fdr, posterior_draws

N, G, CHANGED = 600, 200, 30


def planted_cells(seed: int) -> AnnData:
    """Two types, 30 genes changed fourfold, the total unchanged; two batches with gene factors of their own."""
    rng = np.random.default_rng(seed)
    kind, batch = rng.integers(0, 2, (2, N))
    change = np.repeat([2.0, -2.0, 0.0], [CHANGED // 2, CHANGED // 2, G - CHANGED])
    base = rng.lognormal(1, 0.7, G)
    base[CHANGED // 2 : CHANGED] = 4 * base[: CHANGED // 2]
    rate = base * 2 ** (kind[:, None] * change) * rng.lognormal(0, 0.6, (2, G))[batch]
    obs = pd.DataFrame({"type": np.array(["t0", "t1"])[kind], "batch": np.array(["a", "b"])[batch]})
    obs.index = [f"cell{i}" for i in range(N)]
    var = pd.DataFrame({"change": change}, index=[f"gene{j}" for j in range(G)])
    return AnnData(sparse.csr_matrix(rng.poisson(rate).astype(np.float32)), obs=obs, var=var)


@pytest.fixture(scope="module", params=[0, 1, 2])
def planted(request) -> CVAE:
    adata = planted_cells(request.param)
    adata.obs["coin"] = np.random.default_rng(9).choice(["heads", "tails"], N)
    CVAE.setup_anndata(adata, batch_key="batch")
    model = CVAE(adata, n_latent=4, n_hidden=32, seed=request.param)
    model.train(40, progress_bar=False, accelerator="cpu", lr=4e-3)
    return model


QUIET = {"silent": True}


def test_planted_genes_are_found_at_the_stated_rate(planted):
    table = planted.differential_expression(groupby="type", group1="t1", group2="t0", **QUIET)
    change = planted.adata.var["change"].loc[table.index]
    called = table["is_de_fdr_0.05"]
    assert (change[called] == 0).mean() <= 0.07
    assert called[change != 0].mean() >= 0.9
    assert np.abs(table["lfc_median"] - change)[change != 0].median() < 0.2
    assert (np.sign(table["lfc_median"]) == np.sign(change))[called & (change != 0)].all()
    assert table["proba_de"].is_monotonic_decreasing


def test_groups_without_a_difference(planted):
    table = planted.differential_expression(groupby="coin", group1="heads", **QUIET)
    assert not table["is_de_fdr_0.05"].any()


PARTED = r"'a vs b'.*no obs\['batch'\] in common.*pass batch_correction=False"


def test_a_difference_of_batches_is_none_of_groups(planted):
    with pytest.warns(UserWarning, match=PARTED) as caught:
        table = planted.differential_expression(groupby="batch", group1="a", group2="b", **QUIET)
    assert caught[0].filename == __file__
    assert table["is_de_fdr_0.05"].mean() < 0.01  # the shares of the types differ a little
    own = planted.differential_expression(groupby="batch", group1="a", group2="b", batch_correction=False, **QUIET)
    assert own["is_de_fdr_0.05"].mean() > 0.2


def expected(model) -> np.ndarray:
    """Mean of p(x|z,c) of each cell over draws of z, (n, genes)."""
    batch = next(model._stream(None))
    with torch.no_grad():
        q = model.module.inference(batch)["z"]
        return sum(model.module.generative({"z": q.sample()}, batch).mean.double().numpy() for _ in range(200)) / 200


@pytest.mark.parametrize("name", ["cvae-nb", "cvae-zinb", "vae-poisson", "cvae-normal"])
def test_estimates_by_hand(name):
    """Mean and standard error against their closed forms: ratio estimates, errors by linearisation."""
    model = trained(name)
    adata, counts = model.adata, name != "cvae-normal"
    batches = ["a", "b"] if name.startswith("cvae") else None
    many = {"n_samples": 200, "return_numpy": True}
    h = model.get_normalized_expression(transform_batch=batches, **many).astype(float)
    own = expected(model)
    x = np.asarray(adata.X.todense() if counts else adata.X, dtype=float)
    options = {"groupby": "donor", "group1": "d1", "group2": "d2", "pseudocounts": 1e-9, **QUIET}
    tables = [model.differential_expression(seed=seed, **options).loc[adata.var_names] for seed in range(10)]
    estimate = np.mean([t["lfc_raw"] for t in tables], axis=0)
    error = np.mean([t["lfc_error"] for t in tables], axis=0)
    scale = np.mean([t["scale1"] for t in tables], axis=0)
    wanted, variance = [], 0
    for donor in ("d1", "d2"):
        cells = (adata.obs["donor"] == donor).to_numpy()
        a, o, e = h[cells], x[cells], own[cells]
        if counts:
            n = len(a)
            wanted.append(np.log2(a.mean(0) * (o.sum(0) + 0.5) / (e.sum(0) + 0.5)))
            influence = (a / a.mean(0) + o / o.mean(0) - e / e.mean(0) - 1) / n / np.log(2)
            variance = variance + (influence**2).sum(0) * n / (n - 1)
        else:
            wanted.append((a + o - e).mean(0))
            variance = variance + (a + o - e).var(0, ddof=1) / len(a)
    np.testing.assert_allclose(estimate, wanted[0] - wanted[1], atol=0.08)
    np.testing.assert_allclose(np.log2(scale) if counts else scale, wanted[0], atol=0.08)
    floor = 0
    if counts:
        floor = sum(1 / (x[(adata.obs["donor"] == d).to_numpy()].sum(0) + 0.5) for d in ("d1", "d2")) / np.log(2) ** 2
    np.testing.assert_allclose(error, np.sqrt(np.maximum(variance, floor)), rtol=0.12)


def test_dropout_of_a_batch_is_none_of_groups():
    """Two batches alike, but in one of them a third of the genes is lost from every other cell."""
    rng = np.random.default_rng(0)
    batch = rng.integers(0, 2, N)
    rate = np.exp(rng.normal(1.5, 0.5, 60) + 0.4 * rng.normal(size=(N, 2)) @ rng.normal(size=(2, 60)))
    lost = (rng.random((N, 60)) < 0.5) & (batch == 1)[:, None] & (np.arange(60) < 20)
    obs = pd.DataFrame({"batch": np.array(["a", "b"])[batch]}, index=[f"cell{i}" for i in range(N)])
    adata = AnnData(sparse.csr_matrix(np.where(lost, 0, rng.poisson(rate)).astype(np.float32)), obs=obs)
    CVAE.setup_anndata(adata, batch_key="batch")
    model = CVAE(adata, likelihood="zinb", n_latent=4, n_hidden=32)
    model.train(40, progress_bar=False, accelerator="cpu", lr=4e-3)
    with pytest.warns(UserWarning, match=PARTED):
        table = model.differential_expression(groupby="batch", group1="a", group2="b", **QUIET).loc[adata.var_names]
    assert not table["is_de_fdr_0.05"].any()
    assert abs(table["lfc_raw"][:20].mean() - table["lfc_raw"][20:].mean()) < 0.3  # 1 in the counts


def test_shrinkage_of_a_known_mixture():
    """Effects from the prior that is assumed: shares, means and the false discovery rate come out right."""
    rng = np.random.default_rng(0)
    n = 4000
    effect = np.where(rng.random(n) < 0.8, 0.0, rng.normal(0, 2, n))
    error = rng.uniform(0.2, 0.8, n)
    estimate = effect + error * rng.normal(size=n)
    draws = posterior_draws(estimate, error, 1000, rng)
    v = error**2 + 4
    at_zero = 0.8 * stats.norm.pdf(estimate, 0, error)
    away = 0.2 * stats.norm.pdf(estimate, 0, np.sqrt(v))
    share = away / (at_zero + away)
    assert np.abs(draws.mean(0) - share * estimate * 4 / v).mean() < 0.03
    called = expected_fdr((np.abs(draws) > 0.25).mean(0)) <= 0.05
    assert called.sum() > 400
    assert 0.03 < (np.abs(effect) <= 0.25)[called].mean() < 0.07


def test_shrinkage_of_noise_finds_nothing():
    rng = np.random.default_rng(1)
    error = rng.uniform(0.1, 1, 2000)
    draws = posterior_draws(error * rng.normal(size=2000), error, 500, rng)
    assert (expected_fdr((np.abs(draws) > 0.1).mean(0)) <= 0.05).sum() <= 1


def noisy(seed: int, shift: float, n: int, changed: float, spread: float) -> tuple[np.ndarray, ...]:
    """Effects, their estimates and errors: few changed by 1.2 either way, all shifted."""
    rng = np.random.default_rng(seed)
    effect = shift + np.where(rng.random(n) < changed, rng.choice([-1.2, 1.2], n), 0)
    error = 0.15 * np.exp(spread * rng.normal(size=n))
    return effect, effect + error * rng.normal(size=n), error


def test_shrinkage_to_what_most_genes_have_in_common():
    """False discoveries of shifted genes against a known truth; shrunk to zero, more than a third would be false."""
    called, false, of_zero = 0, 0, []
    for seed in range(4):
        effect, estimate, error = noisy(seed, -0.45, 1000, 0.05, 0.5)
        shift = common_shift(estimate, error)
        assert abs(shift + 0.45) < 0.03
        for centre in (0.0, shift):
            draws = posterior_draws(estimate, error, 300, np.random.default_rng(0), centre)
            call = expected_fdr((np.abs(draws) > 0.5).mean(0)) <= 0.05
            if centre:
                called, false = called + call.sum(), false + (call & (np.abs(effect) <= 0.5)).sum()
            else:
                of_zero.append((np.abs(effect) <= 0.5)[call].mean())
    assert called > 150
    assert false / called <= 0.07
    assert min(of_zero) > 0.3


@pytest.mark.parametrize(("n", "changed", "spread"), [(1000, 0.0, 0.5), (1000, 0.1, 1.5), (20, 0.15, 0.5)])
def test_genes_have_nothing_in_common_by_chance(n, changed, spread):
    assert [common_shift(*noisy(seed, 0, n, changed, spread)[1:]) for seed in range(10)] == [0.0] * 10


def test_a_column_of_numbers_is_no_groups():
    model = make(CVAE, toy_for("cvae-nb"))
    model.adata.obs["score"] = np.arange(model.adata.n_obs) / 7
    with pytest.raises(ValueError, match=r"obs\['score'\] has 48 values for 48 cells: no groups. Cut it"):
        model.differential_expression(groupby="score")


def test_few_genes_that_all_change_have_little_in_common():
    """The penalty of the prior's weights, ten genes at zero, must not make a common change of them."""
    rng = np.random.default_rng(0)
    shifts = [common_shift(rng.normal(0, 1, 20), np.full(20, 0.15)) for _ in range(40)]
    assert np.mean(np.abs(shifts) > 0) <= 0.1


def test_the_shift_is_that_of_unchanged_genes():
    """Not of those that all rise, though these are more; nor of genes near the pseudocounts, that show less."""
    rng = np.random.default_rng(0)
    error = 0.15 * np.exp(0.5 * rng.normal(size=1000))
    effect = np.where(rng.random(1000) < 0.6, rng.normal(1, 0.5, 1000), 0)
    assert abs(common_shift(effect + error * rng.normal(size=1000), error)) < 0.03
    share = rng.beta(0.5, 0.5, 1000) + 1e-3
    assert abs(common_shift(-0.4 * share + share * error * rng.normal(size=1000), share * error, share) + 0.4) < 0.03


def test_genes_that_shift_together_are_said():
    """A gene that takes a quarter of the counts of one group."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 2, 400)
    rate = np.tile(rng.lognormal(1.5, 0.5, 100), (400, 1))
    rate[:, 0] = np.where(kind, rate[:, 1:].sum(1) / 3, 5)
    rate *= 500 / rate.sum(1, keepdims=True)
    obs = pd.DataFrame({"type": np.array(["t0", "t1"])[kind]}, index=[f"cell{i}" for i in range(400)])
    model = make(VAE, AnnData(sparse.csr_matrix(rng.poisson(rate).astype(np.float32)), obs=obs), setup={}, train=False)
    model.train(20, progress_bar=False, accelerator="cpu")
    options = {"groupby": "type", "group1": "t1", **QUIET}
    with pytest.warns(UserWarning, match="'t1 vs Rest': most genes shift together, by -0.4.*raise delta") as caught:
        table = model.differential_expression(**options)
    assert caught[0].filename == __file__
    assert table.index[table["is_de_fdr_0.05"]].tolist() == ["0"]
    assert model.differential_expression(delta=1.5, **options)["is_de_fdr_0.05"].sum() == 1
    model.differential_expression(delta=0, **options)
    model.differential_expression(mode="vanilla", **options)


def test_which_group_is_above(planted):
    table = planted.differential_expression(groupby="type", group1="t1", group2="t0", mode="vanilla", **QUIET)
    np.testing.assert_allclose(table["proba_m1"] + table["proba_m2"], 1)
    change = planted.adata.var["change"].loc[table.index]
    assert (table["proba_m1"][change > 0] > 0.9).all()
    assert (table["proba_m1"][change < 0] < 0.1).all()
    assert table["bayes_factor"].is_monotonic_decreasing


def test_what_was_observed():
    model = trained("cvae-nb")
    adata = model.adata
    x = pd.DataFrame(adata.X.toarray().astype(float), index=adata.obs_names, columns=adata.var_names)
    table = model.differential_expression(groupby="donor", n_samples_overall=50, batch_size=7, **QUIET)
    assert list(dict.fromkeys(table["comparison"])) == ["d1 vs Rest", "d2 vs Rest", "d3 vs Rest"]
    assert len(table) == 3 * adata.n_vars
    for donor, part in table.groupby("group1"):
        for k, cells in (("1", adata.obs["donor"] == donor), ("2", adata.obs["donor"] != donor)):
            group = x[cells.to_numpy()]
            np.testing.assert_allclose(part[f"raw_mean{k}"], group.mean().loc[part.index])
            np.testing.assert_allclose(part[f"non_zeros_proportion{k}"], (group > 0).mean().loc[part.index])
            scaled = group.div(group.sum(axis=1), axis=0) * 1e4
            np.testing.assert_allclose(part[f"raw_normalized_mean{k}"], scaled.mean().loc[part.index], rtol=1e-6)


@pytest.mark.parametrize("name", ["cvae-nb", "cvae-normal"])
def test_genes_that_a_query_lacks(name):
    """The decoded change alone, as far as the model tells; nothing that was observed."""
    reference, counts = trained(name), name == "cvae-nb"
    cells = toy_for("nb" if counts else "normal")
    has = ~np.isin(np.arange(cells.n_vars), [1, 4, 6])
    query = reference.load_query(cells[:, has].copy())
    query.train(**FAST)
    names, lost, seen = cells.var_names, cells.var_names[~has], cells.var_names[has]
    options = {"groupby": "donor", "group1": "d1", "group2": "d2", "pseudocounts": 1e-9, **QUIET}
    tables = [query.differential_expression(seed=seed, **options).loc[names] for seed in range(20)]
    h = query.get_normalized_expression(transform_batch=["a", "b"], n_samples=200)
    means = [h[(cells.obs["donor"] == donor).to_numpy()].mean() for donor in ("d1", "d2")]
    change = np.log2(means[0]) - np.log2(means[1]) if counts else means[0] - means[1]
    estimate, scale = (sum(t[column] for t in tables) / 20 for column in ("lfc_raw", "scale1"))
    np.testing.assert_allclose(estimate[lost], change[lost], atol=0.08 if counts else 0.03)
    np.testing.assert_allclose(scale[lost], means[0][lost], rtol=0.05)
    table = tables[0]
    x = pd.DataFrame(cells.X.toarray() if counts else cells.X, columns=names)[cells.obs["donor"].to_numpy() == "d1"]
    np.testing.assert_allclose(table.loc[seen, "raw_mean1"], x[seen].mean(), rtol=1e-5)
    np.testing.assert_allclose(table.loc[seen, "non_zeros_proportion1"], (x[seen] != 0).mean(), rtol=1e-5)
    if counts:
        scaled = x[seen].div(x[seen].sum(axis=1), axis=0) * 1e4
        np.testing.assert_allclose(table.loc[seen, "raw_normalized_mean1"], scaled.mean(), rtol=1e-5)
    raw = [c for c in table if c.startswith(("raw_", "non_zeros_"))]
    assert len(raw) == (6 if counts else 4)
    assert table.loc[lost, raw].isna().all(axis=None)
    assert table.drop(columns=raw).notna().all(axis=None)
    whole = query.differential_expression(reference.adata, "donor", "d1", **QUIET)  # the reference has all genes
    assert whole.notna().all(axis=None)


def test_expected_rate_by_hand():
    rate = expected_fdr(np.array([0.5, 1.0, 0.9, 0.98]))
    np.testing.assert_allclose(rate, [(0 + 0.02 + 0.1 + 0.5) / 4, 0, (0 + 0.02 + 0.1) / 3, 0.01])


def test_selections_are_as_good_as_groups():
    model = trained("cvae-nb")
    donor = model.adata.obs["donor"].to_numpy()
    options = {"n_samples_overall": 200, **QUIET}
    wanted = model.differential_expression(groupby="donor", group1="d1", group2="d3", **options)
    names = ["comparison", "group1", "group2"]
    for one, two in [
        (donor == "d1", donor == "d3"),
        (np.flatnonzero(donor == "d1"), np.flatnonzero(donor == "d3")),
        ("donor == 'd1'", "donor == 'd3'"),
    ]:
        got = model.differential_expression(idx1=one, idx2=two, **options)
        pd.testing.assert_frame_equal(got.drop(columns=names), wanted.drop(columns=names))
    twice = model.adata.copy()
    twice.obs.index = ["one name"] * twice.n_obs  # a query picks rows, not names
    got = model.differential_expression(twice, idx1="donor == 'd1'", idx2="donor == 'd3'", **options)
    pd.testing.assert_frame_equal(got.drop(columns=names), wanted.drop(columns=names))
    rest = model.differential_expression(groupby="donor", group1="d1", **options)
    got = model.differential_expression(idx1=donor == "d1", **options)
    pd.testing.assert_frame_equal(got.drop(columns=names), rest.drop(columns=names))


def test_cells_without_a_group_are_left_out():
    model = trained("cvae-nb")
    adata = model.adata.copy()
    adata.obs["group"] = pd.Categorical(adata.obs["donor"].where(adata.obs["donor"] != "d3"))
    two = model.differential_expression(adata, "group", "d1", n_samples_overall=100, **QUIET)
    wanted = model.differential_expression(adata, "donor", "d1", "d2", n_samples_overall=100, **QUIET)
    pd.testing.assert_frame_equal(two.iloc[:, :-3], wanted.iloc[:, :-3])


def test_values_that_are_mostly_zero_need_no_pseudocount():
    cells = toy_for("bernoulli")
    cells.X[: len(cells) * 2 // 3] = 0  # the median sum of a cell is zero
    table = make(VAE, cells, setup={}, likelihood="bernoulli").differential_expression(idx1=slice(30, None), **QUIET)
    assert (table["pseudocounts"] == 0).all()
    assert np.isfinite(table["lfc_mean"]).all()


def test_other_likelihoods_give_differences_of_means():
    model = trained("cvae-normal")
    table = model.differential_expression(groupby="donor", group1="d1", group2="d2", n_samples_overall=4000, **QUIET)
    assert np.allclose(table["lfc_raw"], table["scale1"] - table["scale2"], atol=1e-9)
    assert "raw_normalized_mean1" not in table


def test_the_same_seed_gives_the_same_table():
    model = trained("vae-nb")
    options = {"groupby": "donor", "group1": "d1", "n_samples_overall": 60, **QUIET}
    pd.testing.assert_frame_equal(model.differential_expression(**options), model.differential_expression(**options))
    one, other = (model.differential_expression(seed=seed, **options) for seed in (0, 1))
    assert not np.allclose(other["lfc_raw"], one["lfc_raw"].loc[other.index])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "Give either groupby=.*or idx1="),
        ({"groupby": "donor", "idx1": [1]}, ValueError, "Give either groupby=.*or idx1="),
        ({"groupby": "donor", "group1": "d1", "idx2": [1]}, ValueError, "either groupby=.*; or idx1=.* with idx2="),
        ({"idx1": [1], "group1": "d1", "group2": "d2"}, ValueError, "groupby=.*with group1= and group2=; or idx1="),
        ({"idx1": [1], "idx2": [2], "group2": "d2"}, ValueError, "Give either groupby=.*or idx1="),
        ({"group1": "d1"}, ValueError, "Give either groupby=.*or idx1="),
        ({"idx2": [1]}, ValueError, "Give either groupby=.*or idx1="),
        ({"groupby": "donor", "n_samples_overall": 2.5}, TypeError, "n_samples_overall=2.5 must be a whole number"),
        ({"groupby": "colour"}, KeyError, r"no adata.obs\['colour'\]; the columns are"),
        ({"groupby": "donor", "group1": "d9"}, ValueError, r"has no cells in \['d9'\]; its groups are \['d1'"),
        ({"groupby": "donor", "group1": "d1", "group2": "d1"}, ValueError, "are both 'd1'"),
        ({"groupby": ["donor"]}, TypeError, r"groupby=\['donor'\] names several: it is one column of adata.obs"),
        ({"groupby": "donor", "group2": ["d1", "d2"]}, TypeError, r"group2=\['d1', 'd2'\] names several: .* as idx2="),
        ({"idx1": "donor == @z"}, ValueError, "idx1='donor == @z' is no query of adata.obs: .*'z'.* in place of"),
        ({"idx1": [0], "idx2": "donor =="}, ValueError, "idx2='donor ==' is no query of adata.obs: .*columns are"),
        ({"idx1": [True, False]}, ValueError, "idx1 is a mask of 2 values, but there are 48 cells"),
        ({"idx1": "donor == 'd1'", "idx2": "donor == 'x'"}, ValueError, "idx2 selects no cell"),
        ({"idx1": ["c1", "c2"]}, TypeError, "idx1=.*must be whole numbers of rows, a mask or a slice"),
        ({"idx1": [0], "idx2": [1.5]}, TypeError, r"idx2=\[1.5\] must be whole numbers"),
        ({"idx1": [48]}, IndexError, "idx1 holds 48, but there are 48 cells"),
        ({"groupby": "donor", "mode": "t-test"}, ValueError, "choose 'change' or 'vanilla'"),
        ({"groupby": "donor", "fdr_target": 5}, ValueError, "fdr_target=5 must lie between 0 and 1"),
        ({"groupby": "donor", "delta": -1}, ValueError, "delta=-1 must not be negative"),
        ({"groupby": "donor", "delta": None}, TypeError, r"delta=None must be a number.*delta=0\.5.*none is estimated"),
        ({"groupby": "donor", "fdr_target": "x"}, TypeError, r"fdr_target='x' must be a number"),
    ],
)
def test_bad_input_is_named(options, error, message):
    with pytest.raises(error, match=message):
        trained("cvae-nb").differential_expression(**options)


def test_no_batch_to_correct_for():
    with pytest.raises(ValueError, match=r"this VAE does not decode from the batch\. Use a CVAE with any prior but"):
        trained("vae-nb").differential_expression(groupby="donor", batch_correction=True)
    alone = make(VAE, planted_cells(0)[:40].copy(), setup={}, train=False)
    alone.adata.obs["one"] = "x"
    with pytest.raises(ValueError, match="has 1 group: differential expression compares two"):
        alone.differential_expression(groupby="one")


@pytest.mark.filterwarnings("ignore:12 cells in one group")
def test_groups_without_a_common_batch_are_said():
    """Groups that share one are compared without a word, as test warnings are errors."""
    model = trained("cvae-nb")
    adata, options = model.adata.copy(), {"n_samples_overall": 10, **QUIET}
    adata.obs["within"] = adata.obs["batch"] + adata.obs["treated"].astype(str)
    for others in (None, "a1"):
        model.differential_expression(adata, "within", "a0", others, **options)
    with pytest.warns(UserWarning, match="'a0 vs b0': the two groups have no"):
        model.differential_expression(adata, "within", "a0", "b0", **options)
    with pytest.warns(UserWarning, match="'a0 vs b0' and 1 more: the two groups"):
        model.differential_expression(adata, "within", ["a0", "a1"], "b0", **options)
    model.differential_expression(adata, "within", "a0", "b0", batch_correction=False, **options)
    trained("vae-nb").differential_expression(adata, "within", "a0", "b0", **options)


@pytest.mark.parametrize("values", [[1.0, 2.0, np.nan], [1, 2, None], ["1", "2", None]])
@pytest.mark.parametrize("dtype", [None, object, "category"])
def test_groups_are_found_by_value(values, dtype):
    model = trained("vae-nb")
    adata = model.adata.copy()
    adata.obs["number"] = pd.Series(values * 16, index=adata.obs_names, dtype=dtype)
    options = {"n_samples_overall": 10, **QUIET}
    wanted = model.differential_expression(idx1=np.arange(0, 48, 3), idx2=np.arange(1, 48, 3), **options)
    for group1, group2 in ((1, 2), (1, None), ([1], 2), (values[0], values[1])):
        table = model.differential_expression(adata, "number", group1, group2, **options)
        pd.testing.assert_frame_equal(table.iloc[:, :-3], wanted.iloc[:, :-3])
    assert float(table["group1"].iloc[0]) == 1


@pytest.mark.parametrize("mode", ["change", "vanilla"])
def test_genes_that_are_equally_sure_stand_by_their_error(planted, mode):
    """Of genes of which no draw lies on the other side, that first which is most errors away; also of few draws."""
    options = {"groupby": "type", "group1": "t1", "group2": "t0", "mode": mode, **QUIET}
    table = planted.differential_expression(n_samples_overall=200, **options)
    proba = table["proba_de" if mode == "change" else "proba_m1"]
    assert proba.is_monotonic_decreasing
    sure = table[proba == 1].index
    assert len(sure) > 10
    exact = planted.differential_expression(n_samples_overall=200, **(options | {"mode": "change"})).loc[sure]
    far = (exact["lfc_mean"].abs() - exact["delta"]) if mode == "change" else exact["lfc_mean"]
    assert (far / exact["lfc_std"]).is_monotonic_decreasing
    if mode == "change":  # many draws agree
        many = planted.differential_expression(n_samples_overall=20_000, **options)
        assert many["proba_de"].loc[sure[:5]].min() >= many["proba_de"].loc[sure[-5:]].max()


def test_every_group_beside_the_rest_is_as_each_alone():
    """Sums are taken part by part, the parts of a group added."""
    model = trained("vae-nb")
    adata = model.adata.copy()
    adata.obs["group"] = [f"g{i}" for i in np.random.default_rng(0).permutation(48) // 16]
    options = {"pseudocounts": 1e-9, "n_samples_overall": 10, **QUIET}
    every = model.differential_expression(adata, "group", **options)
    for name, table in every.groupby("group1"):
        alone = model.differential_expression(adata, "group", name, **options).loc[table.index]
        for column in ("raw_mean1", "raw_mean2", "non_zeros_proportion2", "raw_normalized_mean2"):
            np.testing.assert_allclose(table[column], alone[column], rtol=1e-6)
        np.testing.assert_allclose(table["scale2"], alone["scale2"], rtol=0.2)


def test_few_cells_are_said():
    model = trained("cvae-nb")
    with pytest.warns(UserWarning, match="3 cells in one group of 'one vs Rest'.*rates are too low") as caught:
        table = model.differential_expression(idx1=[1, 5, 9], **QUIET)
    assert caught[0].filename == __file__
    few = model.adata.X[[1, 5, 9]].toarray().sum(0) + 0.5
    smallest = 1 / np.sqrt(few) / np.log(2)  # of Poisson counts
    assert (table["lfc_error"].loc[model.adata.var_names] > 0.9 * smallest).all()
