"""Plots of predictions and of an integration: what is drawn, and what errors say."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from matplotlib import pyplot as plt
from matplotlib.text import Text
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


def test_counterfactual_names_and_title_stay_in_the_figure():
    rng = np.random.default_rng(0)
    groups = [pd.DataFrame(rng.gamma(2, size=(20, 60)), columns=[f"gene{i}" for i in range(60)]) for _ in range(3)]
    for ax in (None, plt.subplots(figsize=(5, 3), layout="constrained")[1]):
        ax = pl.counterfactual(*groups, n_labels=40, title="a very long title " * 6, ax=ax)
        ax.figure.draw_without_rendering()
        full = ax.figure.bbox
        names = [(t.y0, t.y1) for t in map(_without_arrow, ax.texts[1:])]
        assert len(names) == 40
        assert all(a[1] <= b[0] + 1 for a, b in pairwise(names))
        assert names[0][0] >= full.y0
        assert names[-1][1] <= full.y1
        title = ax.title.get_window_extent()
        assert full.x0 <= title.x0 < title.x1 <= full.x1


def _without_arrow(text):
    """Extent of the words of an annotation alone."""
    return Text.get_window_extent(text)


def test_posterior_predictive_colours_what_lies_outside():
    low, high = np.array([0.0, 1.0, 2.0]), np.array([0.2, 2.0, 3.0])
    table = pd.DataFrame(index=["a", "b", "c"])
    for name in ("mean", "variance", "zero_fraction"):
        table[name] = [0.1, 1.5, 9.0]
        table[f"{name}_low"], table[f"{name}_high"] = low, high
        table[f"{name}_inside"] = table[name].between(low, high)
    axes = pl.posterior_predictive(table, title="NB")
    assert [ax.get_xscale() for ax in axes] == ["symlog", "symlog", "linear"]  # a band begins at zero
    for ax in axes:
        assert "67% of genes inside" in ax.get_title()
        sizes = [
            len(c.get_offsets()) for c in ax.collections if c.get_paths() and c.__class__.__name__ == "PathCollection"
        ]
        assert sizes == [2, 1]
    axes[0].figure.draw_without_rendering()
    with pytest.raises(ValueError, match=r"lacks the columns \['mean_low'\]"):
        pl.posterior_predictive(table.drop(columns="mean_low"))


@pytest.mark.parametrize(("least", "scale"), [(0.5, "log"), (0.0, "symlog"), (-0.5, "linear")])
def test_posterior_predictive_has_a_place_for_every_value(least, scale):
    table = pd.DataFrame({"mean": [least, 3.0], "mean_low": [least, 2.0], "mean_high": [1.0, 4.0]})
    for name in ("variance", "zero_fraction"):
        for end in ("", "_low", "_high"):
            table[f"{name}{end}"] = [0.2, 0.4]
    table[["mean_inside", "variance_inside", "zero_fraction_inside"]] = True
    mean, variance, _ = pl.posterior_predictive(table)
    assert (mean.get_xscale(), mean.get_yscale(), variance.get_xscale()) == (scale, scale, "log")
    (band, _), dots = mean.collections[0].get_segments(), mean.collections[1].get_offsets()
    np.testing.assert_allclose(band, [[least, least], [least, 1.0]])
    assert dots[0, 0] == least
    assert least < dots[0, 1] < 1
    plt.close("all")
    with pytest.raises(ValueError, match="The table has no rows"):
        pl.posterior_predictive(table[:0])
    assert not plt.get_fignums()


def test_integration_writes_what_types_are_among_beside_everything_else():
    after = np.linspace(0, 0.6, 13)
    table = pd.DataFrame({"purity_after": after, "purity_before": after + 0.35})
    table["label"] = [f"a type with a long name {i}" for i in range(13)]
    table = table.assign(embedding="X_z", batch="b", n_cells=9, fell=True, one_batch=False, mixed_with="CD14+ Monocyte")
    ax = pl.integration(AnnData(shape=(1, 1), uns={"integration": {"overcorrection": table}}))
    ax.figure.draw_without_rendering()
    texts = [_without_arrow(t) for t in ax.texts]
    others = [t.get_window_extent() for t in ax.get_yticklabels()] + [ax.get_legend().get_window_extent()]
    assert len(texts) == 13
    for i, text in enumerate(texts):
        assert ax.figure.bbox.x0 <= text.x0 < text.x1 <= ax.figure.bbox.x1
        assert not any(text.overlaps(other) for other in [*others, *texts[:i]])
        dots = np.concatenate([ax.transData.transform(c.get_offsets()) for c in ax.collections])
        assert not any(text.contains(*dot) for dot in dots)
