"""tl.cluster, tl.consensus and `sccvae cluster`: what is written, what is left alone, and what runs agree on."""

from __future__ import annotations

import os
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from sccvae import cli, datasets, metrics, model, pl, tl
from sccvae.tl import _consensus

FAST = {"max_epochs": 6, "progress_bar": False, "accelerator": "cpu"}
TINY = {"likelihood": "normal", "n_latent": 4, "model_options": {"n_hidden": 16, "n_w": 2}}


def make_cells() -> ad.AnnData:
    adata = datasets.blobs(n_per_group=30)
    some = adata.obs["class"].astype(object)
    some[np.arange(adata.n_obs) % 5 > 0] = "Unknown"
    adata.obs["some"] = some.astype("category")
    return adata


@pytest.fixture
def cells() -> ad.AnnData:
    return make_cells()


@pytest.fixture(scope="module")
def trained() -> model.GMVAE:
    adata = make_cells()
    model.GMVAE.setup_anndata(adata, batch_key="condition")
    gmvae = model.GMVAE(adata, n_components=5, likelihood="normal", n_latent=4, n_hidden=16, n_w=2, seed=3)
    gmvae.train(**FAST, seed=3)
    return gmvae


def keys(adata: ad.AnnData) -> dict[str, set[str]]:
    return {part: set(getattr(adata, part)) for part in ("obs", "var", "obsm", "varm", "obsp", "layers", "uns")}


# cluster


def test_cluster_does_what_the_model_does_and_touches_nothing_else(cells, trained, tmp_path):
    before, x = keys(cells), cells.X
    options = {"n_components": 5, "seed": 3, "train_options": FAST, **TINY}
    assert tl.cluster(cells, batch_key="condition", **options) is None
    q = trained.predict_proba()
    np.testing.assert_array_equal(cells.obsm["gmvae_proba"], q)
    assert cells.obsm["gmvae_proba"].dtype == np.float32
    np.testing.assert_array_equal(cells.obsm["X_gmvae"], trained.get_latent_representation())
    np.testing.assert_array_equal(cells.obs["gmvae_entropy"], trained.get_entropy())
    assert list(cells.obs["gmvae"].cat.categories) == ["0", "1", "2", "3", "4"]
    np.testing.assert_array_equal(cells.obs["gmvae"], trained.predict())
    before["obs"] |= {"gmvae", "gmvae_entropy"}
    before["obsm"] |= {"gmvae_proba", "X_gmvae"}
    before["uns"] |= {"gmvae", "X_gmvae"}
    assert keys(cells) == before
    assert cells.X is x

    note = cells.uns["gmvae"]
    assert (note["model"], note["n_components"], note["seed"]) == ("GMVAE", 5, 3)
    assert (note["embedding"], note["probabilities"]) == ("X_gmvae", "gmvae_proba")
    assert note["params"]["setup"] == {"batch_key": "condition"}
    # a mixture keeps its last weights, not those of the warm-up's best epoch
    assert note["elbo_validation"] == trained.history["elbo_validation"].iloc[-1, 0]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    back = ad.read_h5ad(tmp_path / "cells.h5ad")
    assert len(pl.occupancy(back.uns["gmvae"]["history"]).collections) == 5


def test_cluster_with_labels_fills_in_the_others_of_a_copy(cells):
    before = keys(cells)
    enough = FAST | {"max_epochs": 30, "batch_size": 32, "lr": 3e-3}
    options = TINY | {"n_latent": 5, "model_options": {"n_hidden": 32, "n_w": 2}, "train_options": enough}
    labels = {"labels_key": "some", "unlabeled_category": "Unknown"}
    new = tl.cluster(cells, key_added="type", copy=True, **labels, **options)
    assert keys(cells) == before
    assert list(new.obs["type"].cat.categories) == list("ABCDE")
    seen = new.obs["some"] != "Unknown"
    assert (new.obs["type"][seen].astype(str) == new.obs["some"][seen].astype(str)).all()
    assert (new.obs["type"].astype(str) == new.obs["class"].astype(str)).mean() > 0.95
    assert {"type_proba", "X_type"} <= set(new.obsm)


def test_cluster_with_a_trained_model_of_new_cells(cells, trained):
    some = cells[::2, ::-1].copy()
    tl.cluster(some, trained)
    np.testing.assert_allclose(some.obsm["gmvae_proba"], trained.predict_proba()[::2], atol=1e-5)
    with pytest.raises(ValueError, match=r"\['n_components'\] belong to a model that is still to be trained"):
        tl.cluster(some, trained, n_components=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "vae"}, "model='vae' cannot cluster"),
        ({"unlabeled_category": "x"}, "needs labels_key"),
        ({"labels_key": "class", "n_components": 2}, "each needs a component of its own"),
        ({"likelihood": None}, "a count likelihood cannot describe them"),
    ],
)
def test_cluster_errors_come_before_training(cells, monkeypatch, arguments, message):
    monkeypatch.setattr(model.GMVAE, "train", lambda *_, **__: pytest.fail("it trained"))
    before = keys(cells)
    with pytest.raises(ValueError, match=message):
        tl.cluster(cells, **TINY | arguments)
    assert keys(cells) == before


@pytest.mark.parametrize(
    ("tool", "key", "lost"),
    [
        (tl.cluster, "condition", "condition"),
        (tl.cluster, "some", "some"),
        (tl.cluster, "plate", "plate"),
        (tl.cluster, "age", "age"),
        (tl.cluster, "size", "size_entropy"),
        (tl.consensus, "condition", "condition"),
        (tl.consensus, "size", "size_confidence"),
    ],
)
def test_results_do_not_take_the_place_of_what_the_model_reads(cells, trained, monkeypatch, tool, key, lost):
    cells.obs["plate"] = np.where(np.arange(cells.n_obs) % 3, "p", "q")
    cells.obs[["age", "size_entropy", "size_confidence"]] = 1.0
    cells.obs["age"] += np.arange(cells.n_obs)
    options = {
        "batch_key": "condition",
        "labels_key": "some",
        "unlabeled_category": "Unknown",
        "size_factor_key": lost if lost.startswith("size") else None,
        "categorical_covariate_keys": ["plate"],
        "continuous_covariate_keys": ["age"],
    }
    monkeypatch.setattr(model.GMVAE, "train", lambda *_, **__: pytest.fail("it trained"))
    before, obs = keys(cells), cells.obs.copy()
    message = rf"written to obs\['{lost}'\], which the model reads and which would be lost: choose another key"
    for copy in (False, True):
        with pytest.raises(ValueError, match=message):
            tool(cells, key_added=key, copy=copy, **options, **TINY)
    if key == "condition" and tool is tl.cluster:
        with pytest.raises(ValueError, match=message):
            tl.cluster(cells, trained, key_added=key)
    assert keys(cells) == before
    pd.testing.assert_frame_equal(cells.obs, obs)


def test_results_of_an_earlier_run_are_written_over(cells, trained):
    tl.cluster(cells, trained)
    tl.cluster(cells[:, ::-1].copy(), trained)
    before = keys(cells)
    tl.cluster(cells, trained)
    assert keys(cells) == before


def test_models_without_clusters_or_components_say_so(cells):
    model.AE.setup_anndata(cells)
    with pytest.raises(ValueError, match="model='AE' cannot cluster"):
        tl.cluster(cells, model.AE(cells))
    with pytest.raises(ValueError, match="model='vae' has no components"):
        tl.embed(cells, "vae", model_options={"n_components": 3})


# consensus


def test_consensus_of_three_runs(cells, tmp_path, capsys):
    before = keys(cells)
    training = FAST | {"progress_bar": True, "max_epochs": 30, "checkpoint_dir": tmp_path / "state"}
    options = {"batch_key": "condition", "n_components": 5, "train_options": training, **TINY}
    assert tl.consensus(cells, 3, seed=7, **options) is None
    assert "run 2 of 3 (seed 8): 5 components" in capsys.readouterr().out
    assert {f.name for f in (tmp_path / "state").iterdir()} == {"seed-7", "seed-8", "seed-9"}
    before["obs"] |= {"consensus", "consensus_confidence"}
    before["uns"] |= {"consensus"}
    assert keys(cells) == before
    confidence = cells.obs["consensus_confidence"].to_numpy()
    assert confidence.dtype == np.float32
    assert set(np.round(confidence * 3)) <= {0, 1, 2, 3}
    note = cells.uns["consensus"]
    assert (note["n_runs"], note["seeds"], note["n_components"]) == (3, [7, 8, 9], [5, 5, 5])
    assert 0 < note["ari"] <= 1
    assert note["clusters"] == sorted(cells.obs["consensus"].unique())
    assert len(note["instability"]) == len(note["clusters"])
    # each run is that of tl.cluster with its seed
    alone = tl.cluster(cells, seed=8, copy=True, **options | {"train_options": FAST | {"max_epochs": 30}})
    assert metrics.clustering(alone.obs["gmvae"], cells.obs["consensus"])["ari"] > 0.3
    cells.write_h5ad(tmp_path / "cells.h5ad")


class Run:
    """Answers as a trained GMVAE would."""

    is_trained, seed, settings, history, reference = True, 0, {}, {}, {}

    def __init__(self, codes, n_components, classes=()):
        self.codes, self.n_components, self.classes = np.asarray(codes), n_components, list(classes)
        self.registry_ = {"setup_args": {}}
        self.component_names = [*classes, *(str(k) for k in range(len(classes), n_components))]

    def predict_proba(self, adata):
        return np.eye(self.n_components, dtype=np.float32)[self.codes]


def faked(monkeypatch, runs):
    queue = list(runs)
    monkeypatch.setattr(_consensus, "trained_model", lambda *_, **__: queue.pop(0))
    adata = ad.AnnData(shape=(len(runs[0].codes), 1), obs=pd.DataFrame(index=[f"c{i}" for i in range(6)]))
    tl.consensus(adata, len(runs), train_options={"progress_bar": False})
    return adata


def test_consensus_of_runs_that_differ_in_names_and_numbers(monkeypatch):
    # the same two clusters under other names; one run splits the second of them
    runs = [Run([0, 0, 0, 1, 1, 1], 2), Run([1, 1, 1, 0, 0, 0], 2), Run([2, 2, 2, 0, 0, 1], 3)]
    adata = faked(monkeypatch, runs)
    assert list(adata.obs["consensus"]) == ["0"] * 3 + ["1"] * 3  # named after the run with the median K
    assert (adata.obs["consensus_confidence"] == 1).all()  # what is left over counts for the best overlap
    note = adata.uns["consensus"]
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = np.mean([metrics.clustering(runs[a].codes, runs[b].codes)["ari"] for a, b in pairs])
    assert note["ari"] == pytest.approx(expected)
    np.testing.assert_allclose(note["instability"], [0, 1 - (1 + 1 + 2 / 3) / 3])
    assert note["n_components"] == [2, 2, 3]


def test_consensus_counts_the_runs_that_agree(monkeypatch):
    adata = faked(monkeypatch, [Run([0, 0, 0, 1, 1, 1], 2), Run([0, 0, 1, 1, 1, 1], 2), Run([0, 0, 0, 1, 1, 1], 2)])
    np.testing.assert_allclose(adata.obs["consensus_confidence"], [1, 1, 2 / 3, 1, 1, 1])


def test_classes_stand_for_themselves_whatever_overlaps(monkeypatch):
    first, other = np.eye(3)[[0, 0, 1, 1, 2]], np.eye(3)[[1, 1, 0, 0, 2]]
    assert list(_consensus.matched(first, other)) == [1, 0, 2]
    assert list(_consensus.matched(first, other, n_classes=2)) == [0, 1, 2]


def test_consensus_errors(cells):
    with pytest.raises(ValueError, match="n_runs=1: at least two runs"):
        tl.consensus(cells, 1)
    with pytest.raises(TypeError, match=r"no arguments \['components'\]; the options are \['batch_key'"):
        tl.consensus(cells, components=3)


# the command


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_cells().write_h5ad(tmp_path / "cells.h5ad")
    monkeypatch.chdir(tmp_path)
    return tmp_path


ARGUMENTS = ["--likelihood", "normal", "--n-latent", "4", "--n-hidden", "16", "--accelerator", "cpu"]


def test_command_trains_on_the_fly_as_tl_does(folder, capsys):
    options = [*ARGUMENTS, "--batch-key", "condition", "--components", "5", "--max-epochs", "4", "--seed", "2"]
    assert cli.main(["cluster", "cells.h5ad", "out.h5ad", *options]) == 0
    said = capsys.readouterr().out
    assert "out.h5ad: obs['gmvae'], " in said
    assert "obsm['gmvae_proba'] and obsm['X_gmvae']" in said
    out, adata = ad.read_h5ad("out.h5ad"), make_cells()
    training = FAST | {"max_epochs": 4}
    tl.cluster(
        adata,
        batch_key="condition",
        n_components=5,
        likelihood="normal",
        n_latent=4,
        seed=2,
        model_options={"n_hidden": 16},
        train_options=training,
    )
    np.testing.assert_array_equal(out.obsm["gmvae_proba"], adata.obsm["gmvae_proba"])
    np.testing.assert_array_equal(out.obs["gmvae"], adata.obs["gmvae"])
    assert set(os.listdir(folder)) == {"cells.h5ad", "out.h5ad"}


def test_command_with_labels_and_with_a_saved_model(folder, capsys):
    labels = ["--labels-key", "some", "--unlabeled-category", "Unknown", "--max-epochs", "2"]
    assert cli.main(["train", "cells.h5ad", "--out", "m", "--model", "gmvae", *ARGUMENTS, *labels]) == 0
    gmvae = model.load("m")
    last = gmvae.history["elbo_validation"].iloc[-1, 0]
    assert f"m: GMVAE of 300 cells x 16 genes, −ELBO {last:.1f}" in capsys.readouterr().out
    assert cli.main(["cluster", "cells.h5ad", "out.h5ad", "--model-dir", "m", "--key", "type", "--quiet"]) == 0
    out = ad.read_h5ad("out.h5ad")
    assert list(out.obs["type"].cat.categories) == list("ABCDE")
    np.testing.assert_array_equal(out.obsm["type_proba"], gmvae.predict_proba(out))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--components", "0"], 2, "'0' is not a whole number above 0"),
        (["--model-dir", "m", "--components", "3"], 2, "--components: the model in --model-dir is trained already"),
        (["--model", "vae"], 2, "invalid choice: 'vae'"),
        (["--likelihood", "normal", "--labels-key", "kind"], 1, "no adata.obs['kind']"),
        (
            ["--likelihood", "normal", "--labels-key", "class", "--key", "class"],
            1,
            "written to obs['class'], which the",
        ),
        (["--likelihood", "normal", "--labels-key", "class", "--components", "2"], 1, "a component of its own"),
    ],
)
def test_command_errors(folder, capsys, arguments, code, message):
    command = ["cluster", "cells.h5ad", "out.h5ad", *arguments]
    if code == 2:
        with pytest.raises(SystemExit) as end:
            cli.main(command)
        assert end.value.code == 2
    else:
        assert cli.main(command) == 1
    assert message in capsys.readouterr().err
    assert set(os.listdir(folder)) == {"cells.h5ad"}


def test_command_train_refuses_components_elsewhere(folder, capsys):
    arguments = ["train", "cells.h5ad", "--out", "m", "--batch-key", "condition", "--components", "3"]
    assert cli.main(arguments) == 1
    assert "model='cvae' has no components" in capsys.readouterr().err
