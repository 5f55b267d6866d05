"""Plots: what is drawn, that nothing given is changed, and what errors say."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData, read_h5ad
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex, to_rgba
from scipy.sparse import csr_matrix

from sccvae import pl
from sccvae.module import Factorization
from sccvae.pl._plate_layout import RADIUS, Edge, arrange, curve
from sccvae.pl._style import MISSING, palette

PLATES = {
    "ae": ("p(x|z)", "delta(z|x)"),
    "vae": ("p(x|z) p(z)", "q(z|x)"),
    "cvae_fixed": ("p(x|z,c) p(z)", "q(z|x,c)"),
    "cvae_learned": ("p(x|z) p(z|c) p(c)", "q(z|x,c)"),
    "gmvae": ("p(x|z,c) p(z|w,y,c) p(y|d) p(d) p(w)", "q(z|x,c) q(w|x,c) q(y|z) q(d|z)"),
}


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture(params=PLATES)
def factorization(request):
    return Factorization(*PLATES[request.param])


def curves(n_epochs: int = 30, **series) -> dict[str, pd.DataFrame]:
    fall = 100 + 50 * np.exp(-np.arange(n_epochs) / 5)
    series = {"elbo": fall + 9, "reconstruction": fall, "kl_z": np.linspace(0, 9, n_epochs)} | series
    both = {f"{k}_{side}": v + bump for k, v in series.items() for side, bump in (("train", 0.0), ("validation", 1.0))}
    both |= {"kl_weight": np.minimum(1, np.arange(n_epochs) / 10), "lr": np.full(n_epochs, 1e-3)}
    return {k: pd.DataFrame({k: v}, index=pd.Index(range(n_epochs), name="epoch")) for k, v in both.items()}


@pytest.fixture
def cells() -> AnnData:
    rng = np.random.default_rng(0)
    n = 60
    obs = pd.DataFrame({"n_counts": rng.gamma(2, size=n)}, index=[f"cell{i}" for i in range(n)])
    obs["batch"] = pd.Categorical(rng.choice(["a", "b"], n), categories=["a", "b", "unused"])
    obs["cell_type"] = pd.Categorical(rng.choice(["T", "B", "cost $ of $"], n))
    adata = AnnData(csr_matrix(rng.poisson(1.0, (n, 4)).astype("float32")), obs=obs)
    adata.var_names = [f"gene{i}" for i in range(4)]
    for basis in ("X_pca", "X_cvae"):
        adata.obsm[basis] = rng.normal(size=(n, 5)).astype("float32")
        adata.obsm[f"{basis}_umap"] = rng.normal(size=(n, 2)).astype("float32")
    return adata


@pytest.fixture
def digits() -> AnnData:
    rng = np.random.default_rng(0)
    obs = pd.DataFrame({"label": pd.Categorical(list("0123456789") * 3)}, index=[f"image{i}" for i in range(30)])
    return AnnData(rng.random((30, 12), dtype="float32"), obs=obs, uns={"image_shape": [3, 4]})


class ImageModel:
    """Answers as a model trained on images would."""

    def get_normalized_expression(self, adata, *, indices, return_numpy):
        assert return_numpy
        return np.asarray(adata.X)[indices] / 2

    def sample(self, n, **asked):
        self.asked = asked
        return AnnData(np.full((n, 12), 0.25, dtype="float32"), uns={"image_shape": [3, 4]})

    def prior_centers(self):
        obs = pd.DataFrame({"label": list("01"), "pen": ["thin", "thick"]}, index=["a", "b"])
        return AnnData(np.eye(2, 12, dtype="float32"), obs=obs, uns={"image_shape": [3, 4]})


def assert_same(adata: AnnData, before: AnnData) -> None:
    for name in ("obs", "var"):
        pd.testing.assert_frame_equal(getattr(adata, name), getattr(before, name))
    for name in ("obsm", "uns", "obsp", "layers", "varm"):
        assert list(getattr(adata, name)) == list(getattr(before, name))
    for key, values in before.obsm.items():
        np.testing.assert_array_equal(adata.obsm[key], values)


def test_history_draws_one_panel_per_term_with_both_sides():
    given = curves()
    axes = pl.history(SimpleNamespace(history=given))
    assert [ax.get_title() for ax in axes] == ["−ELBO", "reconstruction", "KL of $z$"]
    for ax, term in zip(axes, ("elbo", "reconstruction", "kl_z"), strict=True):
        train, validation = ax.get_lines()
        np.testing.assert_array_equal(train.get_ydata(), given[f"{term}_train"].iloc[:, 0])
        np.testing.assert_array_equal(validation.get_ydata(), given[f"{term}_validation"].iloc[:, 0])
        assert train.get_color() != validation.get_color()
    (legend,) = axes[0].figure.legends
    assert [text.get_text().split("\n")[0] for text in legend.get_texts()] == ["train", "validation", "KL weight"]
    assert [len(ax.collections) for ax in axes] == [0, 0, 1]  # the weight is shaded behind KL terms, while it changes
    given["kl_weight"][:] = 1.0
    assert [len(ax.collections) for ax in pl.history(given)] == [0, 0, 0]


def test_history_of_a_record_and_of_one_term(tmp_path):
    record = {"model": "CVAE", "epochs": 30, "history": {k: frame[k].to_numpy() for k, frame in curves().items()}}
    AnnData(np.zeros((2, 1)), uns={"X_cvae": record}).write_h5ad(tmp_path / "x.h5ad")
    for given in (record, read_h5ad(tmp_path / "x.h5ad").uns["X_cvae"]):
        assert len(pl.history(given)) == 3
    assert [ax.get_title() for ax in pl.history(record, terms="kl_z")] == ["KL of $z$"]
    with pytest.raises(ValueError, match=r"no curve named \['kl_q'\]"):
        pl.history(record, terms="kl_q")


def test_history_keeps_a_huge_start_from_flattening_the_rest():
    huge = curves()["elbo_train"].to_numpy()[:, 0]
    huge[:2] = 4e4, 9e3
    ax, calm = pl.history(curves(elbo=huge), terms=["elbo", "reconstruction"])
    assert ax.get_ylim()[0] < huge.min() < 300 > ax.get_ylim()[1]
    assert "40,001" in ax.texts[0].get_text()
    assert calm.get_ylim()[1] > calm.get_lines()[1].get_ydata().max()
    assert not calm.texts


def test_history_joins_epochs_without_validation_and_survives_a_diverged_run():
    given = curves()
    given["elbo_validation"].iloc[1::2] = np.nan
    given["elbo_train"].iloc[-3:] = np.inf
    train, validation = pl.history(given, terms=["elbo"])[0].get_lines()
    np.testing.assert_array_equal(validation.get_xdata(), np.arange(0, 30, 2))
    assert np.isfinite(train.axes.get_ylim()).all()
    assert pl.history(curves(1))[0].get_lines()[0].get_marker() == "o"
    axes = pl.history(curves(kl_w=np.ones(30), kl_y=np.ones(30), kl_d=np.ones(30)))  # a second row of panels
    assert [ax.get_title()[-2] for ax in axes[2:]] == ["z", "w", "y", "d"]
    assert axes[0].figure.axes == list(axes)


def drawn(ax) -> np.ndarray:
    """Points of a panel with their colours, sorted: shape (n, 6)."""
    (points,) = (c for c in ax.collections if len(c.get_offsets()))
    colors = np.broadcast_to(points.get_facecolors(), (len(points.get_offsets()), 4))
    return np.array(sorted(map(tuple, np.column_stack([points.get_offsets(), colors]).round(5))))


def test_latent_colours_every_point_by_its_category(cells):
    before = cells.copy()
    ax = pl.latent(cells, color="batch", dims=(1, 3))
    table = dict(zip("ab", palette(2), strict=True))
    colors = [to_rgba(table[b], 0.8) for b in cells.obs["batch"]]
    expected = np.column_stack([cells.obsm["X_cvae"][:, [1, 3]].astype(float), colors]).round(5)
    np.testing.assert_allclose(drawn(ax), sorted(map(tuple, expected)), atol=1e-5)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "b"]  # none for the unused category
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("cvae 2", "cvae 4", "batch")
    assert ax.collections[0].get_rasterized()
    once, again = (np.asarray(pl.latent(cells).collections[0].get_offsets()) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert (once != cells.obsm["X_cvae"][:, :2]).any()  # in random order
    assert_same(cells, before)


def test_latent_takes_scanpy_colours_and_shows_missing_values(cells):
    cells.uns["batch_colors"] = np.array(["#112233", "#445566", "#778899"])
    cells.obs.loc["cell0", "batch"] = np.nan
    ax = pl.latent(cells, color="batch")
    assert {to_hex(color) for color in drawn(ax)[:, 2:5]} == {"#112233", "#445566", MISSING.lower()}
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "b", "missing"]
    cells.obs["empty"] = pd.Categorical([np.nan] * 60)
    assert {to_hex(color) for color in drawn(pl.latent(cells, color="empty"))[:, 2:5]} == {MISSING.lower()}


def test_latent_keeps_the_colour_of_a_category_called_missing():
    for given in (["known", "missing"], ["known", "missing", None]):
        ax = pl.latent(np.eye(len(given)), color=given)
        dots = [to_hex(dot.get_color()) for dot in ax.get_legend().legend_handles]
        assert dots == [to_hex(color) for color in [*palette(2), MISSING][: len(given)]]


def test_latent_gives_numbers_a_colour_bar(cells):
    cells.obs.loc["cell0", "n_counts"] = np.nan
    cells.obs.loc["cell1", "n_counts"] = 1e6
    ax = pl.latent(cells, color="n_counts")
    assert ax.figure.axes[1].get_ylim()[1] < 1e6
    missing, known = ax.collections
    assert (len(missing.get_offsets()), len(known.get_offsets())) == (1, 59)
    gene = pl.latent(cells, color="gene1")
    np.testing.assert_array_equal(np.sort(gene.collections[1].get_array()), np.sort(cells.X[:, 1].toarray().ravel()))


def test_latent_of_an_array_on_given_axes():
    ax = plt.subplots()[1]
    z = np.random.default_rng(0).normal(size=(50, 2))
    assert pl.latent(z, color=z[:, 0] > 0, ax=ax, size=3) is ax
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["False", "True"]
    assert ax.get_xlabel() == "z 1"
    assert ax.collections[0].get_sizes() == [3]
    few, many = (pl.latent(np.zeros((n, 2))).collections[0].get_sizes()[0] for n in (100, 20_000))
    assert few > many >= 1


def test_umap_draws_rows_of_representations_and_columns_of_colours(cells):
    before = cells.copy()
    axes = pl.umap(cells, titles=["PCA", "CVAE"])
    assert [[ax.get_title() for ax in row] for row in axes] == [["batch", "cell_type"], ["", ""]]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["UMAP of PCA", "UMAP of CVAE"]
    assert [[ax.get_legend() is not None for ax in row] for row in axes] == [[True, True], [False, False]]
    assert r"cost \$ of \$" in [t.get_text() for t in axes[0, 1].get_legend().get_texts()]
    for row, basis in zip(axes, ("X_pca_umap", "X_cvae_umap"), strict=True):
        np.testing.assert_array_equal(drawn(row[0])[:, 0], np.sort(cells.obsm[basis][:, 0].astype(float)).round(5))
        np.testing.assert_array_equal(drawn(row[0])[:, :2], drawn(row[1])[:, :2])
    assert_same(cells, before)


def test_umap_computes_on_a_copy_with_a_fixed_seed(cells, monkeypatch):
    # compiling UMAP takes 20 s: here only the calls are checked; the demo runs it
    import scanpy as sc

    calls = []

    def neighbors(light, **options):
        calls.append(options | {"rows": light.obsm["X"].copy()})

    def embed(light, *, random_state):
        calls.append(random_state)
        light.obsm["X_umap"] = light.obsm["X"][:, :2] + 1

    monkeypatch.setattr(sc.pp, "neighbors", neighbors)
    monkeypatch.setattr(sc.tl, "umap", embed)
    del cells.obsm["X_cvae_umap"]
    before = cells.copy()
    ax = pl.umap(cells, bases=("X_cvae",), colors=("n_counts",), seed=7)[0, 0]
    np.testing.assert_array_equal(calls[0].pop("rows"), cells.obsm["X_cvae"])
    assert calls == [{"use_rep": "X", "n_neighbors": 15, "random_state": 7}, 7]
    np.testing.assert_allclose(np.sort(ax.collections[-1].get_offsets()[:, 0]), np.sort(cells.obsm["X_cvae"][:, 0] + 1))
    assert_same(cells, before)


def test_umap_takes_one_name_and_refuses_few_cells_before_it_draws(cells):
    assert pl.umap(cells, bases="X_cvae", colors="batch", titles="mine")[0, 0].get_ylabel() == "UMAP of mine"
    plt.close("all")
    del cells.obsm["X_cvae_umap"]
    with pytest.raises(ValueError, match="at least 4 cells, but there are 3"):
        pl.umap(cells[:3], bases="X_cvae")
    assert not plt.get_fignums()


def test_images_are_drawn_in_the_shape_that_the_data_keep(digits):
    digits.X = csr_matrix(digits.X)
    axes = pl.images(digits, n=15, titles=digits.obs["label"], ncols=4)
    assert len(axes) == len(axes[0].figure.axes) == 15
    assert [ax.get_title() for ax in axes[:3]] == ["0", "1", "2"]
    for ax, row in zip(axes, digits.X.toarray(), strict=False):
        np.testing.assert_array_equal(ax.get_images()[0].get_array(), row.reshape(3, 4))
        assert ax.get_images()[0].get_clim() == (0, 1)
    boxes = [ax.get_position() for ax in axes]
    assert len({round(box.x0, 4) for box in boxes}) == 4
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert all(box.x0 > 0 and box.y0 > 0 and box.x1 < 1 and box.y1 < 1 for box in boxes)


def test_images_from_arrays():
    shades = pl.images(np.arange(18.0).reshape(2, 9))[1].get_images()[0].get_array()
    np.testing.assert_allclose(shades, np.arange(9, 18).reshape(3, 3) / 17)  # one scale for all images
    np.testing.assert_array_equal(pl.images(np.full((2, 4), 1.05))[0].get_images()[0].get_array(), np.ones((2, 2)))
    assert pl.images(np.zeros((2, 3, 5)))[0].get_images()[0].get_array().shape == (3, 5)
    assert pl.images(np.zeros((1, 12)), image_shape=(2, 2, 3))[0].get_images()[0].get_array().shape == (2, 2, 3)


def test_reconstructions_stand_below_their_originals(digits):
    before = digits.copy()
    axes = pl.reconstructions(ImageModel(), digits, n=4)
    assert axes.shape == (2, 4)
    for column, row in zip(axes.T, (0, 9, 19, 29), strict=True):
        above, below = (ax.get_images()[0].get_array() for ax in column)
        np.testing.assert_allclose(above.ravel(), digits.X[row])
        np.testing.assert_allclose(below, above / 2)
        assert column[0].get_position().y0 > column[1].get_position().y1
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["original", "reconstruction"]
    assert pl.reconstructions(ImageModel(), digits[:3], n=10).shape == (2, 3)
    assert_same(digits, before)


def test_generated_asks_the_model_for_samples():
    model = ImageModel()
    axes = pl.generated(model, n=6, ncols=3, seed=4)
    assert model.asked == {"mean": True, "seed": 4}
    assert [ax.get_images()[0].get_array().shape for ax in axes] == [(3, 4)] * 6
    pl.generated(model, n=1, batch="b", mean=False)
    assert model.asked == {"mean": False, "seed": 0, "batch": "b"}


def test_prior_centers_carry_the_names_of_their_conditions():
    axes = pl.prior_centers(ImageModel())
    assert [ax.get_title() for ax in axes] == ["0, thin", "1, thick"]
    assert axes[1].get_images()[0].get_array().ravel()[1] == 1


def artists(ax) -> dict:
    return {a.get_gid(): a for a in ax.patches if a.get_gid()}


def test_plate_shades_observed_nodes_and_dashes_inference(factorization):
    ax = pl.plate_diagram(factorization)
    found = artists(ax)
    nodes = {gid[5:]: a for gid, a in found.items() if gid.startswith("node:")}
    assert set(nodes) == {*factorization.observed, *factorization.latent}
    for name, node in nodes.items():
        white = node.get_facecolor()[:3] == (1, 1, 1)
        assert white == (name in factorization.latent)
        low, high = found["plate"].get_path().get_extents().get_points()
        assert (low < np.subtract(node.center, RADIUS)).all()
        assert (np.add(node.center, RADIUS) < high).all()
    deterministic = {f.variable for f in factorization.inference if f.kind == "delta"}
    assert {gid[6:] for gid in found if gid.startswith("inner:")} == deterministic

    for kind, side in (("generative", factorization.generative), ("inference", factorization.inference)):
        expected = {f"{kind}:{parent}->{f.variable}" for f in side for parent in f.parents}
        assert {gid for gid in found if gid.startswith(f"{kind}:")} == expected
        for gid in expected:
            assert (found[gid].get_linestyle() == "solid") == (kind == "generative")
            head, rim = found[f"head:{gid}"], nodes[gid[-1]].center
            if kind == "generative":  # a triangle whose tip touches the target
                assert np.linalg.norm(head.get_xy()[0] - rim) == pytest.approx(RADIUS, abs=0.02)
            else:  # an open circle that touches it
                assert np.linalg.norm(np.subtract(head.center, rim)) == pytest.approx(RADIUS + head.radius, abs=0.03)
                assert head.get_facecolor()[:3] == (1, 1, 1)
    texts = {t.get_text() for t in ax.texts}
    assert texts == {"$N$", *(f"${name}$" for name in nodes)}
    assert [t.get_text() for t in ax.get_legend().get_texts()][-2:] == ["generative p", "inference q"]


def test_plate_nothing_lies_on_anything_else(factorization):
    nodes, edges = arrange(factorization)
    for a, b in combinations(nodes.values(), 2):
        assert np.linalg.norm(a - b) > 3 * RADIUS
    for edge, control in edges.items():
        for name in set(nodes) - {edge.source, edge.target}:
            gap = np.linalg.norm(curve(control) - nodes[name], axis=1).min()
            assert gap > RADIUS + 0.05, f"{edge} runs through {name}"
    for (a, one), (b, other) in combinations(edges.items(), 2):
        middles = (curve(control, np.array([[0.5]])) for control in (one, other))
        assert np.linalg.norm(np.subtract(*middles)) > 0.12, f"{a} hides {b}"


def test_plate_puts_data_at_the_bottom_roots_on_top_and_conditions_aside():
    def place(name):
        return arrange(Factorization(*PLATES[name]))[0]

    fixed, learned, mixture = place("cvae_fixed"), place("cvae_learned"), place("gmvae")
    assert fixed["x"][1] < fixed["c"][1] < fixed["z"][1]
    assert fixed["x"][0] == fixed["z"][0] != fixed["c"][0]
    assert learned["x"][1] < learned["z"][1] < learned["c"][1]
    assert mixture["x"][1] < mixture["z"][1] < mixture["y"][1] < mixture["d"][1]
    assert abs(mixture["c"][0]) > abs(mixture["w"][0])


def test_plate_bends_around_nodes_and_handles_indexed_names():
    skip = Factorization(p="p(x|z1,y) p(z1|y) p(y)", q="q(z1|x) q(y|z1)")
    nodes, edges = arrange(skip)
    assert np.linalg.norm(curve(edges[Edge("generative", "y", "x")]) - nodes["z1"], axis=1).min() > RADIUS
    assert "$z_{1}$" in {t.get_text() for t in pl.plate_diagram(skip).texts}


def test_plate_of_a_model_on_given_axes():
    factors = Factorization(*PLATES["vae"])
    ax = plt.subplots(figsize=(1.5, 1.5))[1]
    assert pl.plate_diagram(SimpleNamespace(module=SimpleNamespace(factors=factors)), ax=ax) is ax
    assert max(t.get_fontsize() for t in ax.texts) < 14
    assert "node:z" in artists(pl.plate_diagram(SimpleNamespace(factors=factors)))


CIRCLE = {"p": "p(x|z) p(z|y) p(y|z)", "q": "q(z|x) q(y|z)"}
NAN = np.array([[0, np.nan], [0, 0]])
ERRORS = [
    (ValueError, r"train first, with model.train\(\)", lambda _, __: pl.history(SimpleNamespace(history=None))),
    (ValueError, r"no curve named \['kl_q'\]; it holds .*'kl_z'", lambda _, __: pl.history(curves(), terms=["kl_q"])),
    (ValueError, "no curve named elbo; it holds", lambda _, __: pl.history({"lr": pd.Series([1.0])})),
    (KeyError, r"= model.get_latent_representation\(\) first", lambda cells, _: pl.latent(cells, basis="X_vae")),
    (KeyError, "no 'donor' to colour by: obs holds", lambda cells, _: pl.latent(cells, color="donor")),
    (ValueError, r"dims=\(0, 5\) must be two of its columns", lambda cells, _: pl.latent(cells, dims=(0, 5))),
    (ValueError, "60 rows to draw, but 3 colour values", lambda cells, _: pl.latent(cells, color=[1, 2, 3])),
    (ValueError, "an array has none", lambda _, __: pl.latent(np.eye(2), color="batch")),
    (ValueError, "NaN or infinite coordinates in 1 of its 2 rows", lambda _, __: pl.latent(NAN)),
    (ValueError, r"obsm\['X_a'\] has NaN", lambda _, __: pl.umap(AnnData(obsm={"X_a": NAN}), bases=["X_a"], colors=[])),
    (KeyError, r"run sc.pp.pca\(adata\) first", lambda cells, _: pl.umap(AnnData(obs=cells.obs))),
    (KeyError, "no 'donor' to colour by", lambda cells, _: pl.umap(cells, colors=["donor"])),
    (ValueError, "2 bases, but 1 titles", lambda cells, _: pl.umap(cells, titles=["PCA"])),
    (ValueError, "12 pixels do not make a square: pass image_shape", lambda _, digits: pl.images(digits.X)),
    (ValueError, "holds 12 values, which do not make", lambda _, digits: pl.images(digits, image_shape=(5, 5))),
    (ValueError, "30 images to draw, but 2 titles", lambda _, digits: pl.images(digits, titles=["a", "b"])),
    (ValueError, "there must be one", lambda _, digits: pl.images(digits[:0])),
    (ValueError, "no prior to draw from: generate with a VAE or a CVAE", lambda _, __: pl.generated(object())),
    (ValueError, "no learned prior to draw: make the model with CVAE", lambda _, __: pl.prior_centers(object())),
    (TypeError, "str has no factors to draw: pass a model", lambda _, __: pl.plate_diagram("p(x|z)")),
    (ValueError, "run in a circle through", lambda _, __: pl.plate_diagram(Factorization(**CIRCLE))),
]


@pytest.mark.parametrize(("error", "message", "draw"), ERRORS, ids=[message for _, message, _ in ERRORS])
def test_errors_say_what_to_do(error, message, draw, cells, digits):
    with pytest.raises(error, match=message):
        draw(cells, digits)


def test_palette_has_distinct_colours():
    assert all(len(set(palette(n))) == n for n in (1, 7, 8, 20, 21, 100))


def test_pl_loads_neither_torch_nor_scvi_and_matplotlib_late():
    code = (
        "import sys; from sccvae import pl; loaded = set(sys.modules)\n"
        "assert not loaded & {'matplotlib', 'scanpy', 'torch', 'scvi', 'pandas'}, loaded\n"
        "import numpy as np, matplotlib; matplotlib.use('Agg'); pl.images(np.zeros((1, 4))); pl.latent(np.eye(3))\n"
        "assert not set(sys.modules) & {'scanpy', 'torch', 'scvi'}"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
