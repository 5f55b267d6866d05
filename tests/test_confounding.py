"""Designs that cannot tell a column from the batch are named; those that can are left in peace."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pandas as pd
import pytest
from _toys import toy_counts

from sccvae.data import confounding
from sccvae.model import CVAE, GMVAE


def said(pairs):
    """What is said of a design, given as (batch, other) pairs that have cells."""
    batch, other = zip(*pairs, strict=True)
    return confounding(pd.Series(batch, name="batch"), pd.Series(other, name="treatment"))


CROSSED = [("b1", "ctrl"), ("b1", "stim"), ("b2", "ctrl"), ("b2", "stim")]


@pytest.mark.parametrize(
    "pairs",
    [
        CROSSED,
        CROSSED[:3],  # one bridge is enough
        [("b1", "x"), ("b1", "y"), ("b2", "y"), ("b2", "z"), ("b3", "z"), ("b3", "w")],  # a chain
        [("b1", "x"), ("b2", "x")],  # one category
        [("b1", "x"), ("b1", "y")],  # one batch
        [*CROSSED, ("b2", "rare")],  # a category in one batch only, the others shared
        [("b1", "x"), ("b2", np.nan), ("b1", "y"), ("b2", "x")],
    ],
)
def test_designs_that_can_tell_are_left_in_peace(pairs):
    assert said(pairs) is None


@pytest.mark.parametrize(
    ("pairs", "parts"),
    [
        (
            [("b1", "ctrl"), ("b2", "stim")],
            ["'batch' and 'treatment' split the cells in the same way", "ctrl only in b1; stim only in b2"],
        ),
        (
            [("d1", "ctrl"), ("d2", "ctrl"), ("d3", "stim")],
            ["'batch' is nested in 'treatment'", "ctrl only in d1, d2; stim only in d3", "the effect of 'treatment'"],
        ),
        (
            [("b1", "x"), ("b1", "y"), ("b2", "z")],
            ["'treatment' is nested in 'batch'", "x, y only in b1; z only in b2", "within one 'batch'"],
        ),
        (
            [*CROSSED, ("b3", "p"), ("b3", "q"), ("b4", "q")],
            ["fall into 2 parts", "ctrl, stim only in b1, b2; p, q only in b3, b4", "between these parts"],
        ),
    ],
)
def test_what_cannot_be_told_is_named(pairs, parts):
    found = said(pairs)
    for part in parts:
        assert part in found


def test_parts_agree_with_the_rank_of_a_linear_model():
    """Two factors are told apart just if the design matrix has full rank."""
    rng = np.random.default_rng(0)
    seen = {True: 0, False: 0}
    for _ in range(300):
        grid = [p for p in itertools.product("abcd", "wxyz") if rng.random() < 0.4]
        batch, other = (pd.Series(c) for c in zip(*grid, strict=True)) if grid else (pd.Series(), pd.Series())
        if batch.nunique() < 2 or other.nunique() < 2:
            continue
        design = np.hstack([pd.get_dummies(batch), pd.get_dummies(other)]).astype(float)
        full = np.linalg.matrix_rank(design) == design.shape[1] - 1
        assert (confounding(batch, other) is None) == full
        seen[full] += 1
    assert min(seen.values()) > 20


def test_a_few_cells_hardly_tell():
    batch = pd.Series(np.repeat(["b1", "b2"], 300), name="batch")
    other = pd.Series(np.repeat(["ctrl", "stim"], 300), name="treatment")
    other.iloc[0], other.iloc[599] = "stim", "ctrl"
    found = confounding(batch, other)
    assert "split the cells in the same way, but for 2 of 600 cells (ctrl only in b1; stim only in b2)" in found
    assert "can hardly be told" in found
    other.iloc[:6] = "stim"
    assert confounding(batch, other) is None
    rare = pd.Series(np.repeat(["T", "B"], 300), name="type")
    rare.iloc[[0, 400]] = "rare"  # few cells, but all of a type
    rare.iloc[150:300], rare.iloc[450:] = "B", "T"
    assert confounding(batch, rare) is None


def test_numbers_that_follow_the_batch():
    adata = toy_counts()
    rng = np.random.default_rng(0)
    adata.obs["dose"] = (adata.obs["batch"] == "a") * 10 + rng.normal(0, 0.1, adata.n_obs)
    adata.obs["age"] = (adata.obs["batch"] == "a") * 10 + rng.normal(0, 5, adata.n_obs)
    with pytest.warns(UserWarning, match=r"'dose' hardly varies within 'batch' \(0.0% of its variance\)") as caught:
        CVAE.setup_anndata(adata, batch_key="batch", continuous_covariate_keys=["dose", "age"])
    assert "'age'" not in str(caught[0].message)


def test_covariates_without_a_batch():
    adata = toy_counts()
    adata.obs["treatment"] = adata.obs["batch"].map({"a": "ctrl", "b": "stim"})
    with pytest.warns(UserWarning, match="'batch' and 'treatment' split the cells in the same way"):
        CVAE.setup_anndata(adata, categorical_covariate_keys=["batch", "treatment"])


def test_setup_says_it_once_and_goes_on():
    adata = toy_counts()
    adata.obs["treatment"] = adata.obs["batch"].map({"a": "ctrl", "b": "stim"})
    adata.obs["lane"] = adata.obs["batch"] + adata.obs["donor"]
    keys = ["donor", "treatment", "lane"]
    with pytest.warns(UserWarning, match="'batch' and 'treatment' split the cells in the same way") as caught:
        CVAE.setup_anndata(adata, batch_key="batch", categorical_covariate_keys=keys)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    message = str(caught[0].message)
    assert "'lane' is nested in 'batch'" in message
    assert "'lane' is nested in 'donor'" in message
    assert "'batch' and 'donor'" not in message
    assert CVAE(adata, n_latent=2, n_hidden=4).schema.n_categories == (2, 3, 2, 6)


def test_labels():
    adata = toy_counts()
    adata.obs["type"] = np.where(adata.obs["batch"] == "a", "T", "B")
    adata.obs.loc[adata.obs_names[:10], "type"] = "Unknown"
    options = {"batch_key": "batch", "labels_key": "type", "unlabeled_category": "Unknown"}
    with pytest.warns(UserWarning, match="'batch' and 'type' split the cells in the same way"):
        GMVAE.setup_anndata(adata, **options)
    adata.obs.loc[adata.obs_names[20:22], "type"] = "T"
    GMVAE.setup_anndata(adata, **options)


def test_usual_designs_do_not_warn():
    adata = toy_counts()
    adata.obs["type"] = np.where(np.arange(adata.n_obs) % 3 == 0, np.where(adata.obs["batch"] == "a", "rare", "T"), "T")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CVAE.setup_anndata(adata, batch_key="batch", categorical_covariate_keys=["donor", "treated"])
        CVAE.setup_anndata(adata, batch_key="batch", labels_key="type")
        CVAE.setup_anndata(adata, batch_key="batch", categorical_covariate_keys=["batch"])
        CVAE.setup_anndata(adata, categorical_covariate_keys=["donor", "batch"])
