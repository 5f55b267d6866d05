"""sccvae.datasets: formats written out by hand, files served locally, effects checked against their truth."""

from __future__ import annotations

import gzip
import hashlib
import os
import socket
import struct
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from sccvae import datasets
from sccvae.datasets import _images


def test_import_is_light():
    heavy = "'torch', 'scvi', 'scanpy', 'anndata', 'pooch', 'pandas', 'scipy'"
    code = f"import sys, sccvae.datasets; print([m for m in ({heavy}) if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _knn_accuracy(z, labels):
    return cross_val_score(KNeighborsClassifier(15), z, labels, cv=5).mean()


# read_idx


@pytest.mark.parametrize(
    ("code", "letter", "dtype", "values"),
    [
        (0x08, "B", np.uint8, [0, 1, 127, 128, 254, 255]),
        (0x09, "b", np.int8, [0, 1, 127, -128, -1, 5]),
        (0x0B, "h", np.int16, [0, 1, 258, -32768, 32767, -1]),
        (0x0C, "i", np.int32, [0, 1, 2**31 - 1, -(2**31), 65536, -1]),
        (0x0D, "f", np.float32, [0, 1.5, -2.25, 1e30, -1e-30, 0.1]),
        (0x0E, "d", np.float64, [0, 1.5, -2.25, 1e300, -1e-300, 0.1]),
    ],
)
@pytest.mark.parametrize("compress", [gzip.compress, bytes])
def test_read_idx_types(tmp_path, code, letter, dtype, values, compress):
    content = bytes([0, 0, code, 2]) + struct.pack(">II", 2, 3) + struct.pack(f">6{letter}", *values)
    (tmp_path / "a.idx").write_bytes(compress(content))
    array = datasets.read_idx(tmp_path / "a.idx")
    assert array.dtype == dtype
    assert array.dtype.isnative
    assert array.flags.writeable
    np.testing.assert_array_equal(array, np.array(values, dtype=dtype).reshape(2, 3))


@pytest.mark.parametrize("shape", [(), (5,), (2, 1, 3, 2, 1), (0, 4)])
def test_read_idx_ranks(tmp_path, shape):
    n = int(np.prod(shape))
    header = bytes([0, 0, 8, len(shape)]) + b"".join(struct.pack(">I", size) for size in shape)
    (tmp_path / "a.idx").write_bytes(header + bytes(range(n)))
    np.testing.assert_array_equal(datasets.read_idx(str(tmp_path / "a.idx")), np.arange(n).reshape(shape))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"not an IDX file.*\(none\)"),
        (b"\x89PNG1234", "not an IDX file.*89 50 4e 47"),
        (bytes([0, 0, 0x0A, 1, 0, 0, 0, 0]), "not an IDX file.*00 00 0a 01"),
        (bytes([0, 0, 8, 3, 0, 0, 0, 1]), "truncated: its header needs 16 bytes, it has 8"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 4, 1, 2, 3]), r"truncated: shape \(4,\) of uint8 needs 12 bytes, it has 11"),
        (bytes([0, 0, 8, 2]) + b"\xff" * 8, "is truncated"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 2, 1, 2, 3]), "trailing bytes.*needs 10 bytes, it has 11"),
        (gzip.compress(bytes(1000), mtime=0)[:-6], "damaged gzip"),
        (gzip.compress(bytes(1000), mtime=0)[:-8] + b"12345678", "damaged gzip"),
    ],
)
def test_read_idx_errors_name_the_file(tmp_path, content, message):
    (tmp_path / "odd.idx").write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s)odd\.idx.*{message}"):
        datasets.read_idx(tmp_path / "odd.idx")


def test_read_idx_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.idx"):
        datasets.read_idx(tmp_path / "none.idx")


# mnist, fashion_mnist: the same code on tiny files

TRAIN = np.arange(5 * 6, dtype=np.uint8).reshape(5, 2, 3) * 8
TEST = 255 - np.arange(3 * 6, dtype=np.uint8).reshape(3, 2, 3)
CONTENT = {
    "train-images-idx3-ubyte.gz": bytes([0, 0, 8, 3]) + struct.pack(">III", 5, 2, 3) + TRAIN.tobytes(),
    "train-labels-idx1-ubyte.gz": bytes([0, 0, 8, 1]) + struct.pack(">I", 5) + bytes([3, 9, 0, 3, 1]),
    "t10k-images-idx3-ubyte.gz": bytes([0, 0, 8, 3]) + struct.pack(">III", 3, 2, 3) + TEST.tobytes(),
    "t10k-labels-idx1-ubyte.gz": bytes([0, 0, 8, 1]) + struct.pack(">I", 3) + bytes([7, 8, 9]),
}


def _write_tiny(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, content in CONTENT.items():
        (folder / name).write_bytes(gzip.compress(content))


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Expect the tiny files, an empty cache, and no data folder; return the cache."""
    import pooch

    sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}
    with socket.socket() as free:  # closed again: connections to this port are refused at once
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"
    for name in ("MNIST", "FASHION_MNIST"):
        monkeypatch.setattr(_images, name, replace(getattr(_images, name), sha256=sha256, url=url))
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    monkeypatch.delenv("SCCVAE_DATA_DIR", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "cache" / "sccvae"


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A web server on this machine; return its root folder, from which ``mnist()`` downloads."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    root = tmp_path / "www"
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=root)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setattr(_images, "MNIST", replace(_images.MNIST, url=f"http://127.0.0.1:{server.server_port}/"))
        yield root
        server.shutdown()
        thread.join()


def test_mnist_from_data_dir(monkeypatch, tmp_path, tiny):
    _write_tiny(tmp_path / "data" / "mnist")
    monkeypatch.setenv("SCCVAE_DATA_DIR", str(tmp_path / "data"))
    adata = datasets.mnist()
    assert adata.X.dtype == np.float32
    np.testing.assert_array_equal(adata.X, (np.concatenate([TRAIN, TEST]) / 255).astype(np.float32).reshape(8, 6))
    assert adata.X.max() == 1
    assert list(adata.obs_names) == [*(f"train-{i}" for i in range(5)), *(f"test-{i}" for i in range(3))]
    assert list(adata.obs["label"]) == list("39031789")
    assert list(adata.obs["label"].cat.categories) == list("0123456789")
    assert list(adata.obs["split"]) == ["train"] * 5 + ["test"] * 3
    assert list(adata.uns["image_shape"]) == [2, 3]
    assert adata.var_names.is_unique
    assert adata.var_names[4] == "pixel-1-1"
    assert not tiny.exists()

    adata.write_h5ad(tmp_path / "tiny.h5ad")
    again = ad.read_h5ad(tmp_path / "tiny.h5ad")
    np.testing.assert_array_equal(again.X, adata.X)
    assert list(again.uns["image_shape"]) == [2, 3]


def test_fashion_mnist_and_split_from_cache(tiny):
    _write_tiny(tiny / "fashion-mnist")
    train, test = datasets.fashion_mnist("train"), datasets.fashion_mnist(split="test")
    np.testing.assert_array_equal(np.concatenate([train.X, test.X]), datasets.fashion_mnist().X)
    assert list(test.obs["label"]) == ["Sneaker", "Bag", "Ankle boot"]
    assert list(test.obs["split"].cat.categories) == ["test"]
    assert list(test.obs_names) == ["test-0", "test-1", "test-2"]
    with pytest.raises(ValueError, match="split='valid' is unknown: choose 'train', 'test', or None"):
        datasets.mnist(split="valid")


def test_a_split_needs_only_its_own_files(tiny):
    _write_tiny(tiny / "mnist")
    for name in CONTENT:
        if name.startswith("train"):
            (tiny / "mnist" / name).unlink()
    assert datasets.mnist(split="test").n_obs == 3


def test_plain_file_under_the_gz_name(tiny):
    _write_tiny(tiny / "mnist")
    for name, content in CONTENT.items():
        (tiny / "mnist" / name).write_bytes(content)
    assert datasets.mnist().n_obs == 8


def test_download_verifies_and_fills_the_cache(tiny, server, capsys):
    _write_tiny(server)
    adata = datasets.mnist()
    assert adata.n_obs == 8
    assert sorted(path.name for path in (tiny / "mnist").iterdir()) == sorted(CONTENT)
    assert "100%" in capsys.readouterr().err  # the progress bar
    for path in server.iterdir():
        path.unlink()
    np.testing.assert_array_equal(datasets.mnist().X, adata.X)  # from the cache


@pytest.mark.parametrize(
    "served", [b"<html>Please log in</html>", gzip.compress(b"other", mtime=0), b"\x1f\x8b broken"]
)
def test_download_that_does_not_verify_is_not_kept(tiny, server, served):
    _write_tiny(server)
    (server / "train-labels-idx1-ubyte.gz").write_bytes(served)
    expected = hashlib.sha256(CONTENT["train-labels-idx1-ubyte.gz"]).hexdigest()
    with pytest.raises(ValueError, match=rf"http.*train-labels-idx1-ubyte\.gz returned.*{expected}"):
        datasets.mnist()
    assert [path.name for path in (tiny / "mnist").iterdir()] == ["train-images-idx3-ubyte.gz"]


def test_download_not_found(tiny, server):
    server.mkdir()
    with pytest.raises(FileNotFoundError, match="404"):
        datasets.mnist()
    assert list((tiny / "mnist").iterdir()) == []


@pytest.mark.parametrize("data_dir", [None, "data"])
def test_without_network_or_file_the_error_says_what_to_do(monkeypatch, tmp_path, tiny, data_dir):
    if data_dir:
        monkeypatch.setenv("SCCVAE_DATA_DIR", str(tmp_path / data_dir))
    with pytest.raises(FileNotFoundError) as caught:
        datasets.mnist()
    looked_in = str(tmp_path / "data" / "mnist") if data_dir else "SCCVAE_DATA_DIR is not set"
    url = _images.MNIST.url + "train-images-idx3-ubyte.gz"
    for part in ("train-images-idx3-ubyte.gz is neither", looked_in, str(tiny / "mnist"), url, "Copy the file into"):
        assert part in str(caught.value)
    assert "set the environment variable SCCVAE_DATA_DIR" in str(caught.value)
    assert list((tiny / "mnist").iterdir()) == []


def test_corrupt_file_is_named_with_both_hashes(monkeypatch, tmp_path, tiny):
    _write_tiny(tmp_path / "data" / "mnist")
    monkeypatch.setenv("SCCVAE_DATA_DIR", str(tmp_path / "data"))
    path = tmp_path / "data" / "mnist" / "t10k-labels-idx1-ubyte.gz"
    changed = CONTENT[path.name][:-1] + b"\0"
    path.write_bytes(gzip.compress(changed))
    with pytest.raises(ValueError, match="is not the expected file") as caught:
        datasets.mnist()
    for part in (str(path), hashlib.sha256(changed).hexdigest(), _images.MNIST.sha256[path.name], "Delete it"):
        assert part in str(caught.value)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged gzip"):
        datasets.mnist()


# the real files


def _needs(folder):
    data_dir = os.environ.get("SCCVAE_DATA_DIR")
    there = data_dir and all((Path(data_dir) / folder / name).is_file() for name in CONTENT)
    return pytest.mark.skipif(not there, reason=f"no {folder} files in SCCVAE_DATA_DIR")


@_needs("mnist")
def test_real_mnist():
    adata = datasets.mnist()
    assert adata.shape == (70_000, 784)
    assert list(adata.obs["label"][:10]) == list("5041921314")
    assert list(adata.obs["label"][60_000:60_010]) == list("7210414959")
    assert adata.obs["label"][:60_000].value_counts()["1"] == 6742
    assert list(adata.obs["split"].value_counts()[["train", "test"]]) == [60_000, 10_000]
    assert (adata.X.min(), adata.X.max()) == (0, 1)
    assert adata.X[:60_000].mean(dtype=np.float64) == pytest.approx(0.1307, abs=1e-4)  # the published mean
    assert list(adata.uns["image_shape"]) == [28, 28]


@_needs("fashion-mnist")
def test_real_fashion_mnist():
    adata = datasets.fashion_mnist("test")
    assert adata.shape == (10_000, 784)
    assert set(adata.obs["label"].value_counts()) == {1000}
    assert list(adata.obs["label"][:3]) == ["Ankle boot", "Pullover", "Trouser"]


# blobs


def test_blobs_geometry():
    adata = datasets.blobs(n_per_group=100, seed=3)
    assert adata.shape == (1000, 16)
    assert adata.X.dtype == np.float32
    assert set(adata.obs.groupby(["class", "condition"], observed=False).size()) == {100}
    assert len(adata.obs["class"].cat.categories) == 5
    assert list(adata.obs["condition"].cat.categories) == ["control", "treated"]

    assert _knn_accuracy(adata.X, adata.obs["class"]) > 0.99
    assert _knn_accuracy(adata.X, adata.obs["condition"]) > 0.95
    assert _knn_accuracy(adata.obsm["truth"], adata.obs["class"]) > 0.99
    assert _knn_accuracy(adata.obsm["truth"], adata.obs["condition"]) < 0.6

    centers, shift = adata.uns["blobs"]["class_centers"], adata.uns["blobs"]["condition_shift"]
    between = np.linalg.norm(centers[:, None] - centers[None], axis=2)[~np.eye(5, dtype=bool)]
    assert np.linalg.norm(shift) < between.min()
    treated = (adata.obs["condition"] == "treated").to_numpy()
    np.testing.assert_allclose(adata.X - adata.obsm["truth"], treated[:, None] * shift, atol=1e-5)
    noise = adata.obsm["truth"] - centers[adata.obs["class"].cat.codes]
    assert np.abs(noise.mean(axis=0)).max() < 0.2
    assert noise.std() == pytest.approx(1, abs=0.02)


def test_blobs_seed_and_error():
    np.testing.assert_array_equal(datasets.blobs(5, seed=1).X, datasets.blobs(5, seed=1).X)
    assert not np.array_equal(datasets.blobs(5, seed=1).X, datasets.blobs(5, seed=2).X)
    with pytest.raises(ValueError, match="n_per_group=0"):
        datasets.blobs(0)


# pbmc68k_reduced


@pytest.fixture(scope="module")
def pbmc():
    return datasets.pbmc68k_reduced()


def test_pbmc68k_reduced_recovers_counts(pbmc):
    import scanpy as sc

    counts = pbmc.layers["counts"]
    assert pbmc.shape == (700, 765)
    assert isinstance(counts, sparse.csr_matrix)
    assert counts.dtype == pbmc.X.dtype == np.float32
    np.testing.assert_array_equal(counts.data, np.round(counts.data))
    assert counts.data.min() == 1

    original = sc.datasets.pbmc68k_reduced()
    # Another way: the smallest value of a cell is one molecule
    for i, row in enumerate(np.expm1(original.raw.X.toarray().astype(np.float64))):
        ratio = row / row[row > 0].min()
        np.testing.assert_allclose(ratio, counts[i].toarray().ravel(), rtol=2e-3)
    # And forward again: the file's own values, which are rounded to three decimals
    total = original.obs["n_counts"].to_numpy()[:, None]
    np.testing.assert_allclose(np.log1p(counts.toarray() / total * 1e4), original.raw.X.toarray(), atol=6e-4)
    assert np.all(total.ravel() > counts.sum(axis=1).A1)


def test_pbmc68k_reduced_rest(pbmc, tmp_path):
    dense = pbmc.layers["counts"].toarray()
    expected = np.log1p(dense / dense.sum(axis=1, keepdims=True) * 1e4)
    np.testing.assert_allclose(pbmc.X.toarray(), expected, rtol=1e-5)
    assert {"bulk_labels", "louvain", "phase", "n_counts"} <= set(pbmc.obs)
    assert pbmc.obs["bulk_labels"].nunique() == 10
    assert len(pbmc.obsm) == len(pbmc.obsp) == 0
    pbmc.write_h5ad(tmp_path / "pbmc.h5ad")
    assert (ad.read_h5ad(tmp_path / "pbmc.h5ad").layers["counts"] != pbmc.layers["counts"]).nnz == 0


def test_pbmc68k_reduced_refuses_another_file(monkeypatch):
    import scanpy as sc

    original = sc.datasets.pbmc68k_reduced()
    original.raw.X.data *= 1.1
    monkeypatch.setattr(sc.datasets, "pbmc68k_reduced", lambda: original)
    with pytest.raises(RuntimeError, match="not integers"):
        datasets.pbmc68k_reduced()


# plant_batch_effect


@pytest.fixture(scope="module")
def poisson():
    rng = np.random.default_rng(0)
    mean = rng.gamma(2, 2, size=40)
    adata = ad.AnnData(np.zeros((3000, 40), dtype=np.float32))
    adata.layers["counts"] = sparse.csr_matrix(rng.poisson(mean, size=adata.shape).astype(np.float32))
    return adata


def test_planted_counts_have_the_stated_mean_and_variance(poisson):
    planted = datasets.plant_batch_effect(poisson, n_batches=3, strength=0.5, seed=1)
    depth, log_effect = planted.uns["planted_batch_effect"]["depth"], planted.varm["batch_log_effect"]
    assert log_effect.shape == (40, 3)
    assert depth[0] == 1
    assert np.all(log_effect[:, 0] == 0)
    assert np.all((depth[1:] >= 0.6) & (depth[1:] <= 0.9))
    assert log_effect[:, 1:].std() == pytest.approx(0.5, rel=0.25)

    y, x = planted.layers["counts"].toarray().astype(np.float64), planted.layers["truth"].toarray()
    for b in (1, 2):
        rows = (planted.obs["batch"] == f"batch{b}").to_numpy()
        ratio = depth[b] * np.exp(log_effect[:, b])
        total = x[rows].sum(axis=0)
        variance = total * np.where(ratio <= 1, ratio * (1 - ratio), ratio - 1)
        z = (y[rows].sum(axis=0) - ratio * total) / np.sqrt(variance)
        assert np.abs(z).max() < 5
        assert 0.5 < z.std() < 1.5
        thinned = ratio < 1
        fano = y[rows].var(axis=0) / y[rows].mean(axis=0)
        assert np.abs(fano[thinned] - 1).max() < 0.25  # a thinned Poisson is Poisson


def test_planted_layout(poisson, tmp_path):
    before = poisson.layers["counts"].copy()
    planted = datasets.plant_batch_effect(poisson, batch_key="lane", seed=4)
    assert (poisson.layers["counts"] != before).nnz == 0
    assert "lane" not in poisson.obs
    assert (planted.layers["truth"] != before).nnz == 0
    counts = planted.layers["counts"]
    assert isinstance(counts, sparse.csr_matrix)
    assert counts.dtype == np.float32
    assert np.all(counts.data >= 1)
    assert np.all(counts.data == np.round(counts.data))
    reference = (planted.obs["lane"] == "batch0").to_numpy()
    assert reference.sum() == 1500
    assert (counts[reference] != before[reference]).nnz == 0
    dense = counts.toarray()
    expected = np.log1p(dense / dense.sum(axis=1, keepdims=True) * 1e4)
    np.testing.assert_allclose(planted.X.toarray(), expected, rtol=1e-5)

    planted.write_h5ad(tmp_path / "planted.h5ad")
    again = ad.read_h5ad(tmp_path / "planted.h5ad")
    assert again.uns["planted_batch_effect"]["strength"] == 0.5
    np.testing.assert_array_equal(again.varm["batch_log_effect"], planted.varm["batch_log_effect"])


def test_planted_is_the_same_for_dense_sparse_and_views(poisson):
    first = datasets.plant_batch_effect(poisson, seed=2)
    expected = first.layers["counts"].toarray()
    x = poisson.layers["counts"]
    for other in (x.toarray(), x.toarray().astype(np.int32), x.tocsc(), sparse.csr_array(x), x.toarray().astype("u1")):
        planted = datasets.plant_batch_effect(ad.AnnData(other), layer=None, seed=2)
        assert sparse.issparse(planted.X) == sparse.issparse(other)
        got = planted.X.toarray() if sparse.issparse(planted.X) else planted.X
        np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(planted.obs["batch"], first.obs["batch"])
    view = datasets.plant_batch_effect(poisson[:100, :10], seed=2)
    assert view.shape == (100, 10)
    assert (datasets.plant_batch_effect(poisson, seed=3).layers["counts"] != first.layers["counts"]).nnz > 0


def test_planted_effect_is_visible_and_types_stay(pbmc):
    planted = datasets.plant_batch_effect(pbmc)
    clean = PCA(20, random_state=0).fit_transform(pbmc.X.toarray())
    mixed = PCA(20, random_state=0).fit_transform(planted.X.toarray())
    assert _knn_accuracy(clean, planted.obs["batch"]) < 0.6
    assert _knn_accuracy(mixed, planted.obs["batch"]) > 0.9
    assert list(planted.uns["bulk_labels_colors"]) == list(pbmc.uns["bulk_labels_colors"])
    assert planted.layers["counts"].sum(axis=1).min() > 100


def test_planted_label_key_confounds_types(pbmc):
    import pandas as pd

    planted = datasets.plant_batch_effect(pbmc, label_key="bulk_labels", seed=0)
    shares = pd.crosstab(planted.obs["bulk_labels"], planted.obs["batch"], normalize="index")["batch0"]
    assert shares.max() - shares.min() > 0.3
    balanced = datasets.plant_batch_effect(pbmc, seed=0)
    assert list(balanced.obs["batch"].value_counts()) == [350, 350]


def test_planted_errors(poisson):
    plant = datasets.plant_batch_effect
    with pytest.raises(KeyError, match=r"no layer 'raw', only \['counts'\]"):
        plant(poisson, layer="raw")
    with pytest.raises(KeyError, match="no column 'cell_type'"):
        plant(poisson, label_key="cell_type")
    with pytest.raises(ValueError, match="n_batches=1"):
        plant(poisson, n_batches=1)
    with pytest.raises(ValueError, match=r"strength=-0\.1"):
        plant(poisson, strength=-0.1)
    with pytest.raises(ValueError, match="batch_key='type' is the column of the labels"):
        plant(poisson, batch_key="type", label_key="type")
    named = ad.AnnData(poisson.X, layers={"truth": poisson.layers["counts"]})
    with pytest.raises(ValueError, match="layer='truth' is where the counts before the effect are written"):
        plant(named, layer="truth")
    with pytest.raises(ValueError, match="batch3 got none of the 3 cells"):
        plant(poisson[:3], n_batches=5)
    labelled = poisson[:5].copy()
    labelled.obs["type"] = ["a", "b", None, "a", None]
    with pytest.raises(ValueError, match="2 missing labels"):
        plant(labelled, label_key="type")


@pytest.mark.parametrize("value", [-1, 0.5, np.nan, np.inf])
@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
def test_planted_refuses_what_are_no_counts(value, form):
    x = np.ones((4, 3), dtype=np.float32)
    x[1, 2] = value
    adata = ad.AnnData(np.zeros((4, 3), dtype=np.float32), layers={"counts": form(x)})
    with pytest.raises(ValueError, match=rf"adata\.layers\['counts'\] holds 1 values that are no counts.*{value}"):
        datasets.plant_batch_effect(adata)
