"""Plots of a mixture: what is drawn, that nothing given is changed, and what errors say."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba

from sccvae import datasets, model, pl
from sccvae.pl import _mixture
from sccvae.pl._style import palette


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def gmvae() -> model.GMVAE:
    """Three components in two latent dimensions, on images of 4 x 4 pixels."""
    adata = datasets.blobs(n_per_group=12)
    adata.uns["image_shape"] = [4, 4]
    model.GMVAE.setup_anndata(adata, batch_key="condition")
    trained = model.GMVAE(adata, n_components=3, likelihood="normal", n_latent=2, n_hidden=16)
    trained.train(max_epochs=8, progress_bar=False, accelerator="cpu")
    return trained


class Clusters:
    """Answers as a model without a mixture in z would; z has three dimensions."""

    adata = AnnData(shape=(40, 2))
    component_names = ("0", "1", "empty")

    def predict(self, adata, indices=None):
        codes = np.arange(adata.n_obs)[slice(None) if indices is None else indices] % 2
        return pd.Series(pd.Categorical.from_codes(codes, categories=list(self.component_names)))

    def get_latent_representation(self, adata, indices):
        return np.random.default_rng(0).normal(size=(len(indices), 3)).astype(np.float32)

    def get_entropy(self, adata, indices):
        return np.linspace(0, 1, len(indices), dtype=np.float32)


def marks(ax) -> dict[str, np.ndarray]:
    return {t.get_gid()[5:]: np.array(t.xy) for t in ax.texts if str(t.get_gid()).startswith("mean:")}


def test_mixture_draws_cells_in_the_colour_of_their_component_and_the_means(gmvae):
    before = gmvae.adata.copy()
    ax = pl.mixture(gmvae)
    (points,) = ax.collections
    z, found = gmvae.get_latent_representation(), gmvae.predict()
    drawn = {tuple(xy): color for xy, color in zip(points.get_offsets().data, points.get_facecolors(), strict=True)}
    assert len(drawn) == gmvae.adata.n_obs
    for at, name in zip(z, found, strict=True):
        assert drawn[tuple(at.astype(float))][:3] == pytest.approx(to_rgba(palette(3)[int(name)])[:3])
    means = gmvae.get_components()[0]
    for name, at in marks(ax).items():
        np.testing.assert_allclose(at, means.loc[name], rtol=1e-5)
    assert set(marks(ax)) == {"0", "1", "2"}
    assert ax.get_xlabel() == "z 1"
    pd.testing.assert_frame_equal(gmvae.adata.obs, before.obs)
    assert set(gmvae.adata.obsm) == set(before.obsm)


def test_mixture_reaches_out_to_means_far_from_the_cells(gmvae):
    some = gmvae.adata[gmvae.predict().to_numpy() == "0"].copy()
    for ax in (pl.mixture(gmvae, some), pl.entropy(gmvae, some)):  # the same view
        ax.figure.draw_without_rendering()
        (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
        means = gmvae.get_components()[0].to_numpy()
        assert ((means > [left, low]) & (means < [right, high])).all()


def test_mixture_embeds_means_with_the_cells_and_takes_some_cells(gmvae, monkeypatch):
    seen = []
    monkeypatch.setattr(_mixture, "compute_umap", lambda x, **_: (seen.append(x), x[:, :2] + 1)[1])
    wide = SimpleNamespace(
        adata=gmvae.adata,
        component_names=gmvae.component_names,
        predict=gmvae.predict,
        get_entropy=gmvae.get_entropy,
        get_components=lambda: tuple(f.assign(more=0.0) for f in gmvae.get_components()),
        get_latent_representation=lambda *a, **k: np.pad(gmvae.get_latent_representation(*a, **k), ((0, 0), (0, 1))),
    )
    ax = pl.mixture(wide, n=20, seed=1)
    assert seen[0].shape == (23, 3)
    assert len(ax.collections[0].get_offsets()) == 20
    np.testing.assert_allclose(marks(ax)["1"], gmvae.get_components()[0].loc["1"] + 1, rtol=1e-5)
    assert (ax.get_xlabel(), list(ax.get_xticks())) == ("UMAP 1", [])
    pl.entropy(wide, n=20, seed=1)
    np.testing.assert_array_equal(seen[1], seen[0])  # the same view, to compare


def test_mixture_without_means_names_only_what_is_used(monkeypatch):
    monkeypatch.setattr(_mixture, "compute_umap", lambda x, **_: x[:, :2])
    ax = pl.mixture(Clusters())
    assert not marks(ax)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["0", "1"]


def test_entropy_is_the_colour(gmvae):
    ax = pl.entropy(gmvae)
    points = max(ax.collections, key=lambda drawn: len(drawn.get_offsets()))
    np.testing.assert_allclose(np.sort(points.get_array()), np.sort(gmvae.get_entropy()), rtol=1e-5)
    assert "nats" in ax.get_title()


def test_views_need_clusters_and_cells(gmvae):
    with pytest.raises(TypeError, match="SimpleNamespace finds no clusters to draw"):
        pl.mixture(SimpleNamespace())
    with pytest.raises(ValueError, match="n=0 must be at least 1"):
        pl.entropy(gmvae, n=0)
    alone = SimpleNamespace(predict=None, component_names=[], adata=None)
    with pytest.raises(ValueError, match="loaded without data; pass adata="):
        pl.mixture(alone)


def shares(n_epochs: int = 9, phase=(0, 0, 0, 0, 1, 1, 2, 2, 2)) -> dict[str, np.ndarray]:
    first = np.linspace(0.5, 0.9, n_epochs)
    first[np.asarray(phase) == 0] = np.nan
    return {"phase": np.array(phase, float), "occupancy_0": first, "occupancy_1": 1 - first}


def test_occupancy_stacks_shares_and_names_phases():
    ax = pl.occupancy(shares())
    low, high = ax.collections
    assert low.get_datalim(ax.transData).x0 == pytest.approx(3.5)
    assert high.get_datalim(ax.transData).y1 == pytest.approx(1)
    assert low.get_datalim(ax.transData).y1 == pytest.approx(0.9)
    assert [t.get_text() for t in ax.texts] == ["warm-up", "guide", "guided"]
    assert [line.get_xdata()[0] for line in ax.lines] == [3.5, 5.5]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["0", "1"]


def test_occupancy_names_the_phase_that_was_run_again_and_the_components():
    named = SimpleNamespace(history=shares(phase=(0, 0, 0, 1, 2, 2, 3, 3, 4)), component_names=["T $", "B"])
    ax = pl.occupancy(named)
    assert [t.get_text() for t in ax.texts] == ["warm-up", "guide", "guided", "free", "free with guide"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [r"T \$", "B"]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("lengths", [(60, 12, 15, 5, 5), (60, 12, 15, 1, 1), (10, 10, 10, 1, 1)])
def test_occupancy_names_of_phases_overprint_nothing(lengths, own):
    axes = plt.subplots(1, 2, figsize=(7, 3), layout="constrained")[1]
    ax = pl.occupancy(shares(sum(lengths), np.repeat(range(5), lengths)), ax=axes[0] if own else None)
    ax.figure.draw_without_rendering()
    for text in ax.texts:
        assert text.get_window_extent().y0 > ax.get_legend().get_window_extent().y1 - 8
        assert ax.figure.bbox.padded(1).containsx(text.get_window_extent().x1)
    # the names are parallel: their distance is that of their starts, seen along the line
    starts = np.array([ax.transAxes.transform(t.get_position())[0] for t in ax.texts])
    turn = np.sin(np.deg2rad(ax.texts[0].get_rotation()))
    assert (np.diff(starts) * turn > 8 / 72 * ax.figure.dpi).all()


def test_occupancy_keeps_names_level_where_they_fit():
    ax = pl.occupancy(shares(40, np.repeat([0, 1, 2, 3], 10)))
    assert {t.get_rotation() for t in ax.texts} == {0}


def test_occupancy_of_a_trained_model_and_of_its_history(gmvae):
    for given in (gmvae, gmvae.history, {"model": "GMVAE", "epochs": 9, "history": gmvae.history}):
        ax = pl.occupancy(given)
        assert len(ax.collections) == 3
        assert ax.get_xlim()[1] == len(gmvae.history["phase"]) - 0.5


@pytest.mark.parametrize("history", [{"elbo_train": np.ones(3)}, {"occupancy_0": np.full(3, np.nan)}])
def test_occupancy_needs_shares(history):
    with pytest.raises(ValueError, match="only a GMVAE that was trained beyond its warm-up"):
        pl.occupancy(history)


def test_history_keeps_the_jump_between_phases_from_flattening_the_rest():
    values = np.r_[np.linspace(30, 20, 20), 500, np.linspace(25, 18, 19)]
    both = {"elbo_train": values, "elbo_validation": values, "phase": np.repeat([0.0, 1.0], 20)}
    (ax,) = pl.history(both)
    assert ax.get_ylim()[1] < 40
    assert "500" in ax.texts[0].get_text()
    assert [line.get_xdata()[0] for line in ax.lines if line.get_gid() == "phase"] == [19.5]


def guided_history() -> dict[str, np.ndarray]:
    """A warm-up, three guide rounds in which the terms are zero, and a guided phase; no cell held out has a guide."""
    phase = np.repeat([0.0, 1.0, 2.0], [10, 3, 10])
    zero, elbo = np.where(phase == 1, 0.0, 150.0), np.where(phase == 1, 2.0, 180.0)
    terms = {"elbo": elbo, "reconstruction": zero, "kl_z": zero, "kl_y": np.where(phase == 1, 2.0, 1.0)}
    both = {f"{name}_{side}": values for name, values in terms.items() for side in ("train", "validation")}
    return both | {"kl_y_validation": np.where(phase == 1, 0.0, 1.0), "phase": phase}


def test_history_leaves_a_gap_in_the_guide_rounds():
    given = guided_history()
    elbo, reconstruction, kl_z, kl_y = pl.history(given)
    for ax in (elbo, reconstruction, kl_z):
        assert ax.get_ylim()[0] > 100
        assert [t.get_text() for t in ax.texts] == ["guide"]
        for line in ax.get_lines()[:2]:
            np.testing.assert_array_equal(np.isnan(line.get_ydata()), given["phase"] == 1)
    train, validation = kl_y.get_lines()[:2]
    np.testing.assert_array_equal(train.get_ydata(), given["kl_y_train"])  # what is learned there
    np.testing.assert_array_equal(np.isnan(validation.get_ydata()), given["phase"] == 1)
    assert not kl_y.texts


def test_history_has_no_gap_in_other_phases_and_shows_a_lone_epoch():
    idec = {name: values for name, values in guided_history().items() if not name.startswith("kl")}
    assert all(np.isfinite(line.get_ydata()).all() for line in pl.history(idec)[0].get_lines())
    short = {name: values[9:] for name, values in guided_history().items()}  # one epoch, gap, others
    line = pl.history(short)[0].get_lines()[0]
    assert line.get_marker() == "o"
    assert np.flatnonzero(line.get_markevery()).tolist() == [0]


def test_confusion_puts_the_match_on_the_diagonal_and_the_rest_beside():
    classes = ["a"] * 5 + ["b"] * 5 + ["c"] * 4 + [None]
    components = [2] * 4 + [0] + [3] * 3 + [1] * 2 + [0] * 4 + [0]
    ax = pl.confusion(components, classes)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["2", "3", "1", "0"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b", "c"]
    (image,) = ax.images
    expected = [[0.8, 0, 0, 0.2], [0, 0.6, 0.4, 0], [0, 0, 0, 1]]
    np.testing.assert_allclose(image.get_array(), expected)
    assert sorted(t.get_text() for t in ax.texts) == ["1", "2", "3", "4", "4"]


def test_confusion_of_a_model_and_without_numbers_where_they_are_many(gmvae):
    ax = pl.confusion(gmvae, "class")
    cells = sum(int(t.get_text()) for t in ax.texts)
    assert cells == gmvae.adata.n_obs
    some = gmvae.adata[:30].copy()
    assert sum(int(t.get_text()) for t in pl.confusion(gmvae, "class", some).texts) == 30
    assert not pl.confusion(np.arange(60) % 20, np.arange(60) % 3).texts


def test_confusion_has_room_for_long_names_of_components():
    ax = pl.confusion(["CD8+/CD45RA+ Naive Cytotoxic", "CD14+ Monocyte"] * 5, ["a", "b"] * 5)
    ax.figure.draw_without_rendering()
    assert ax.get_window_extent().height / ax.figure.dpi > 1.2
    bar = ax.figure.axes[1].yaxis.label.get_window_extent()
    assert ax.figure.bbox.y0 <= bar.y0 < bar.y1 <= ax.figure.bbox.y1


def test_confusion_errors(gmvae):
    with pytest.raises(KeyError, match=r"labels='kind': there is no such column; adata.obs has \['class'"):
        pl.confusion(gmvae, "kind")
    with pytest.raises(ValueError, match="There are 2 classes, but 3 cells with a component"):
        pl.confusion([0, 1, 1], ["a", "b"])
    with pytest.raises(ValueError, match="No cell has both"):
        pl.confusion([0, 1], [None, None])


def test_component_grid_shares_w_in_a_row(gmvae):
    axes = pl.component_grid(gmvae, n=3, seed=4, batch="treated")
    assert axes.shape == (3, 3)
    assert [ax.get_title() for ax in axes[0]] == ["0", "1", "2"]
    assert not any(ax.get_title() for ax in axes[1:].ravel())
    made = [gmvae.sample(3, component=k, batch="treated", mean=True, seed=4) for k in "012"]
    pictures = np.array([a.X for a in made])  # (K, n, pixels)
    low, high = pictures.min(), pictures.max()
    shown = np.array([[ax.images[0].get_array().ravel() for ax in row] for row in axes])
    np.testing.assert_allclose(shown, (pictures.swapaxes(0, 1) - low) / (high - low), rtol=1e-4, atol=1e-6)


def test_component_grid_needs_components():
    with pytest.raises(TypeError, match="has no components to draw from: take a GMVAE"):
        pl.component_grid(SimpleNamespace(sample=None))


def test_every_phase_of_the_training_has_a_name():
    from sccvae.train.mixture import PHASES

    assert len(pl._mixture.PHASES) == len(PHASES)
    assert pl._mixture.PHASES[:4] == PHASES[:4]
