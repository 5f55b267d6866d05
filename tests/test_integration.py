"""Scores of an integration, over-correction found type by type, the report and its picture."""

from __future__ import annotations

import logging
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from sccvae import metrics, pl, tl


def cells(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Three types far apart in two batches, C in b only; after integration C lies upon A, and B is well mixed."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(["A", "B", "C"], [80, 80, 40])
    batch = np.where(np.arange(200) % 2 == 0, "a", "b")
    batch[labels == "C"] = "b"
    center = {"A": [0, 0], "B": [10, 0], "C": [0, 10]}
    noise = rng.normal(size=(200, 2))
    before = noise + np.array([center[k] for k in labels]) + 5 * (batch == "b")[:, None]
    after = noise + np.array([center["A" if k == "C" else k] for k in labels])
    return before, after, batch, labels


def test_a_type_that_was_mixed_into_another_is_found():
    before, after, batch, labels = cells()
    table = metrics.overcorrection(after, batch, labels, unintegrated=before)
    assert list(zip(table["label"], table["batch"], strict=True)) == [
        *(("A", "a"), ("A", "b"), ("B", "a"), ("B", "b"), ("C", "b"))
    ]
    assert table["n_cells"].tolist() == [40, 40, 40, 40, 40]
    assert table["one_batch"].tolist() == [False] * 4 + [True]
    assert table["fell"].tolist() == [True, True, False, False, True]
    assert (table["purity_before"] > 0.95).all()
    assert table["mixed_with"].tolist()[0::4] == ["C", "A"]
    assert table["purity_after"].iloc[4] == pytest.approx(1 / 3, abs=0.15)  # 40 of 120 cells, as at random
    assert (table["mixing"][:4] > 0.8).all()
    assert np.isnan(table["mixing"].iloc[4])
    assert metrics.overcorrection(before, batch, labels, unintegrated=before)["fell"].sum() == 0
    apart = metrics.overcorrection(before, batch, labels, unintegrated=before)
    assert (apart["mixing"][:4] < 0.2).all()


def test_purity_by_brute_force():
    before, after, batch, labels = cells(1)
    labels = labels.astype(object)
    labels[:4] = "rare"  # fewer than the neighbours that are asked for
    table = metrics.overcorrection(after, batch, labels, unintegrated=before, n_neighbors=7)
    distance = np.linalg.norm(after[:, None] - after[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    near = labels[np.argsort(distance, axis=1)]
    purity = np.array(
        [(row[: min(7, (labels == k).sum() - 1)] == k).mean() for row, k in zip(near, labels, strict=True)]
    )
    for row in table.itertuples():
        assert row.purity_after == pytest.approx(purity[(labels == row.label) & (batch == row.batch)].mean())
    assert len(table) == 7


def test_a_type_of_a_single_cell():
    before, after, batch, labels = cells()
    labels = labels.astype(object)
    labels[0] = "one"
    row = metrics.overcorrection(after, batch, labels, unintegrated=before).iloc[-1]
    assert (row["label"], row["n_cells"], row["fell"]) == ("one", 1, False)
    assert np.isnan(row["purity_before"])


def test_a_type_of_few_cells_in_two_batches():
    """Of two cells each has the other as its only neighbour: mixed or not cannot be told. Of three it can."""
    before, after, batch, labels = cells()
    labels = labels.astype(object)
    labels[:5] = ["two", "two", "three", "three", "three"]
    table = metrics.overcorrection(after, batch, labels, unintegrated=before).set_index("label")
    assert not table.loc["two", "one_batch"].any()
    assert table.loc["two", "mixing"].isna().all()
    assert np.allclose(table.loc["three", "mixing"], 1)  # all of them are neighbours of each


@pytest.mark.slow  # JAX compiles each metric
def test_scores_tell_the_better_embedding():
    pytest.importorskip("scib_metrics", reason="needs the extra 'bench'")
    before, _, batch, labels = cells()
    good = before - 5 * (batch == "b")[:, None]
    shuffled = np.random.default_rng(0).permutation(good)
    table = metrics.integration({"good": good, "before": before, "noise": shuffled}, batch, labels, unintegrated=before)
    assert list(table.index) == ["good", "before", "noise"]
    assert table["Batch correction"]["good"] > table["Batch correction"]["before"]
    assert table["Bio conservation"].idxmin() == "noise"
    assert table["Total"].idxmax() == "good"
    np.testing.assert_allclose(table["Total"], 0.4 * table["Batch correction"] + 0.6 * table["Bio conservation"])
    wanted = metrics.label_silhouette(good, labels)
    assert table["Silhouette label"]["good"] == pytest.approx(wanted, abs=1e-3)


def test_scores_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scib_metrics.benchmark", None)
    before, after, batch, labels = cells()
    with pytest.raises(ImportError, match=r"need scib-metrics .*`pip install 'sccvae\[bench\]'`"):
        metrics.integration({"z": after}, batch, labels, unintegrated=before)


def test_bad_input_is_named():
    before, after, batch, labels = cells()
    with pytest.raises(ValueError, match="z has 199 cells, unintegrated 200"):
        metrics.integration({"z": after[1:]}, batch, labels, unintegrated=before)
    with pytest.raises(TypeError, match=r"dictionary of names and arrays, as \{'X_cvae': z\}, not ndarray"):
        metrics.integration(after, batch, labels, unintegrated=before)
    with pytest.raises(ValueError, match="no embedding to judge"):
        metrics.integration({}, batch, labels, unintegrated=before)
    with pytest.raises(ValueError, match="All cells have the same batch, a"):
        metrics.integration({"z": after}, ["a"] * 200, labels, unintegrated=before)
    with pytest.raises(ValueError, match=r"No label has cells in two batches.*overcorrection"):
        metrics.integration({"z": after}, [f"batch of {label}" for label in labels], labels, unintegrated=before)
    with pytest.raises(ValueError, match="labels has 1 missing"):
        metrics.overcorrection(after, batch, [None, *labels[1:]], unintegrated=before)


@pytest.fixture
def adata() -> ad.AnnData:
    before, after, batch, labels = cells()
    obs = pd.DataFrame({"batch": batch, "type": pd.Categorical(labels)}, index=[f"c{i}" for i in range(200)])
    return ad.AnnData(np.zeros((200, 1)), obs=obs, obsm={"X_pca": before, "X_z": after, "X_y": before})


KEYS = {"batch_key": "batch", "label_key": "type"}


def test_report(adata, tmp_path, caplog):
    adata.obs.loc["c0", "type"] = np.nan
    with caplog.at_level(logging.WARNING, "sccvae"):
        assert tl.integration_report(adata, ["X_z", "X_y"], **KEYS) is None
    assert "purity of 'C' in 'b' fell" in caplog.text
    found = adata.uns["integration"]
    known = adata[1:]
    wanted = metrics.overcorrection(
        known.obsm["X_z"], known.obs["batch"], known.obs["type"].astype(str), unintegrated=known.obsm["X_pca"]
    )
    table = found["overcorrection"]
    part = table[table["embedding"] == "X_z"].drop(columns="embedding").reset_index(drop=True)
    pd.testing.assert_frame_equal(part, wanted)
    assert not table["fell"][table["embedding"] == "X_y"].any()
    adata.write_h5ad(tmp_path / "x.h5ad")
    again = ad.read_h5ad(tmp_path / "x.h5ad").uns["integration"]["overcorrection"]
    assert again["fell"].tolist() == table["fell"].tolist()


def test_report_copies_and_names_what_is_missing(adata):
    copy = tl.integration_report(adata, "X_z", copy=True, key_added="r", **KEYS)
    assert "r" in copy.uns
    assert not adata.uns
    with pytest.raises(KeyError, match=r"no adata.obsm\['X_q'\]; it has \['X_pca'"):
        tl.integration_report(adata, "X_q", **KEYS)
    with pytest.raises(KeyError, match=r"no adata.obs\['kind'\]"):
        tl.integration_report(adata, "X_z", batch_key="batch", label_key="kind")
    del adata.obsm["X_pca"]
    with pytest.raises(KeyError, match=r"Run `scanpy.pp.pca"):
        tl.integration_report(adata, "X_z", **KEYS)
    assert not adata.uns


def test_report_names_the_embedding_that_has_holes(adata):
    adata.obsm["X_y"] = adata.obsm["X_y"].copy()
    adata.obsm["X_y"][[3, 8]] = np.nan  # as a model of a part of the cells leaves them
    with pytest.raises(ValueError, match=r"obsm\['X_y'\] of the .* finite, but 2 of its 200 rows hold NaN"):
        tl.integration_report(adata, ["X_z", "X_y"], **KEYS)
    with pytest.raises(ValueError, match=r"obsm\['X_y'\] of the .* finite, but 2 of its 200 rows hold NaN"):
        tl.integration_report(adata, "X_z", unintegrated="X_y", **KEYS)
    with pytest.raises(ValueError, match=r"use_rep=\[\] names no embedding to judge: give keys of adata.obsm"):
        tl.integration_report(adata, [], **KEYS)
    assert not adata.uns
    adata.obs.loc[["c3", "c8"], "type"] = np.nan
    tl.integration_report(adata, ["X_z", "X_y"], **KEYS)


def test_report_refuses_cells_without_a_batch(adata, monkeypatch):
    adata.obs.loc[["c0", "c1", "c2"], "batch"] = np.nan
    adata.obs.loc["c2", "type"] = np.nan  # left out anyway
    for kind in ("object", "category"):
        adata.obs["batch"] = adata.obs["batch"].astype(kind)
        with pytest.raises(
            ValueError, match=r"obs\['batch'\] is missing \(NaN\) for 2 of 199 cells with a type.*fillna"
        ):
            tl.integration_report(adata, "X_z", **KEYS)
    assert not adata.uns
    adata.obs.loc[["c0", "c1"], "type"] = np.nan
    tl.integration_report(adata, "X_z", **KEYS)
    assert set(adata.uns["integration"]["overcorrection"]["batch"]) == {"a", "b"}


def test_picture(adata):
    with pytest.raises(KeyError, match=r"Run `sccvae\.tl\.integration_report"):
        pl.integration(adata)
    tl.integration_report(adata, ["X_z", "X_y"], **KEYS)
    ax = pl.integration(adata)
    names = [t.get_text() for t in ax.get_yticklabels()]
    assert "C ★ · b (40)" in names
    assert len(names) == 5
    assert any("now among A" in t.get_text() for t in ax.texts)
    assert not pl.integration(adata, "X_y").texts
    with pytest.raises(KeyError, match="no report of 'X_q'"):
        pl.integration(adata, "X_q")
    plt.close("all")
