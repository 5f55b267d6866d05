"""Plots of predictions: what is drawn, and what errors say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from matplotlib import pyplot as plt
from scipy.sparse import csr_matrix

from sccvae import pl
from sccvae.metrics import perturbation_scores


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture
def groups():
    """Predicted, real and control cells of 20 genes; the first five respond."""
    rng = np.random.default_rng(0)
    base = rng.uniform(0.5, 3, 20)
    response = np.where(np.arange(20) < 5, 2.0, 0.0)
    names = [f"g${i}" for i in range(20)]
    predicted = pd.DataFrame(base + 0.8 * response + 0.3 * rng.normal(size=(30, 20)), columns=names)
    real = base + response + 0.3 * rng.normal(size=(40, 20))
    control = base + 0.3 * rng.normal(size=(50, 20))
    return predicted, AnnData(csr_matrix(real), var=pd.DataFrame(index=names)), csr_matrix(control)


def test_counterfactual_draws_means_and_names_the_response(groups):
    predicted, real, control = groups
    ax = pl.counterfactual(predicted, real, control, n_top=5, n_labels=3, title="a $ type")
    rest, top = (c.get_offsets() for c in ax.collections)
    assert (len(rest), len(top)) == (15, 5)
    order = np.argsort(top[:, 0])
    truth = np.asarray(real.X.mean(axis=0)).ravel()[:5]
    np.testing.assert_allclose(np.asarray(top)[order, 0], np.sort(truth))
    np.testing.assert_allclose(np.asarray(top)[order, 1], predicted.to_numpy().mean(0)[:5][np.argsort(truth)])
    scores = perturbation_scores(predicted.to_numpy(), real.X, control, n=5)
    texts = [t.get_text() for t in ax.texts]
    assert f"R² = {scores['r2']:.3f} (all 20 genes)\nR² = {scores['r2_top']:.3f} (top 5 differential)" in texts
    names = {t.replace("\\", "") for t in texts if t.startswith("g")}
    assert len(names) == 3
    assert names < {f"g${i}" for i in range(5)}
    ax.figure.draw_without_rendering()  # a formula in a name would fail here


def test_counterfactual_without_controls_or_names(groups):
    predicted, real, _ = groups
    _, ax = plt.subplots()
    assert pl.counterfactual(predicted.to_numpy(), real.X, ax=ax) is ax
    assert len(ax.texts) == 1
    with pytest.raises(ValueError, match="the same genes in the same order"):
        pl.counterfactual(predicted, real[:, ::-1])
    with pytest.raises(ValueError, match=r"numbers found: \[19, 20\]"):
        pl.counterfactual(predicted, real[:, 1:])


def test_posterior_predictive_colours_what_lies_outside():
    low, high = np.array([0.0, 1.0, 2.0]), np.array([0.2, 2.0, 3.0])
    table = pd.DataFrame(index=["a", "b", "c"])
    for name in ("mean", "variance", "zero_fraction"):
        table[name] = [0.1, 1.5, 9.0]
        table[f"{name}_low"], table[f"{name}_high"] = low, high
        table[f"{name}_inside"] = table[name].between(low, high)
    axes = pl.posterior_predictive(table, title="NB")
    assert [ax.get_xscale() for ax in axes] == ["log", "log", "linear"]
    for ax in axes:
        assert "67% of genes inside" in ax.get_title()
        sizes = [
            len(c.get_offsets()) for c in ax.collections if c.get_paths() and c.__class__.__name__ == "PathCollection"
        ]
        assert sizes == [2, 1]
    axes[0].figure.draw_without_rendering()
    with pytest.raises(ValueError, match=r"lacks the columns \['mean_low'\]"):
        pl.posterior_predictive(table.drop(columns="mean_low"))
