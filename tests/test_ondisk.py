"""Cells that stay on disk: the same numbers as from memory, every cell once, nothing half-written."""

from __future__ import annotations

import ctypes
import logging
import sys
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pytest
import zarr
from _models import FAST, TINY, make
from _toys import toy_counts, toy_values
from _training import Raise
from scipy import sparse
from torch import distributed

from sccvae import tl
from sccvae._rows import dense
from sccvae.data import (
    BlockLoader,
    CellStore,
    DiskMatrix,
    Schema,
    open_anndata,
    read_cells,
    shuffled_loader,
    split_indices,
)
from sccvae.data.matrix import survey
from sccvae.data.ondisk import free_memory, give_back
from sccvae.model import CVAE, GMVAE, IDEC, VAE

N, G = 48, 12
KINDS = ["backed", "h5ad", "zarr", "zarr dense", "h5ad dense"]


def on_disk(adata, kind, folder):
    """The same cells in a file, opened so that its matrices stay there."""
    adata = adata.copy()
    if kind.endswith("dense"):
        adata.X = adata.X.toarray() if sparse.issparse(adata.X) else adata.X
    path = folder / f"cells{len([*folder.iterdir()])}.{'zarr' if 'zarr' in kind else 'h5ad'}"
    if "zarr" in kind:
        ad.io.write_elem(zarr.open_group(path, mode="w", zarr_format=3), "/", adata, dataset_kwargs={"shards": None})
    else:
        adata.write_h5ad(path)
    return ad.read_h5ad(path, backed="r") if kind == "backed" else open_anndata(path)


def schema_of(adata, **names):
    return Schema(np.asarray(adata.var_names), **names)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several reads, buffers and chunks for a few cells."""
    monkeypatch.setattr("sccvae.data.matrix.BLOCK_BYTES", 500)
    monkeypatch.setattr("sccvae.data.ondisk.BLOCK_BYTES", 500)
    monkeypatch.setattr("sccvae.data.ondisk.GAP_BYTES", 1)
    monkeypatch.setattr("sccvae.data.blocks.BUFFER_BYTES", 1500)
    monkeypatch.setattr("sccvae.data.blocks.FEWEST_BLOCKS", 4)
    monkeypatch.setattr("sccvae.data.store.CHUNK_VALUES", 8 * G)


# Reading


@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_any_order_are_those_of_the_matrix(kind, tmp_path, small_blocks):
    adata = toy_counts()
    other = on_disk(adata, kind, tmp_path)
    genes = np.random.default_rng(1).permutation(G)[:7]
    for columns in (None, genes):
        wanted = adata.X.toarray() if columns is None else adata.X.toarray()[:, columns]
        x = DiskMatrix(other.X, "adata.X", columns)
        assert x.shape == wanted.shape
        for rows in (np.arange(N), np.array([5]), np.array([40, 3, 3, 17, 4]), np.array([], int), slice(3, 20)):
            found = x[rows]
            assert found.dtype == np.float32
            found = found.toarray() if sparse.issparse(found) else found
            np.testing.assert_array_equal(found, wanted[rows])


@pytest.mark.parametrize("kind", KINDS)
def test_the_look_at_all_values_is_that_of_numpy(kind, tmp_path, small_blocks):
    adata = toy_counts()
    adata.X.data[adata.X.indptr[3] : adata.X.indptr[4]] = 0  # an empty cell; zeros may be stored
    cells = read_cells(on_disk(adata, kind, tmp_path), schema_of(adata), "disk")
    assert isinstance(cells.x, DiskMatrix)
    x = adata.X.toarray()
    np.testing.assert_array_equal(cells.library[:, 0], x.sum(1))
    np.testing.assert_allclose(cells.survey.mean, x.mean(0), rtol=1e-6)
    assert cells.survey.largest == x.max()
    assert cells.survey.fractional is None


def test_values_that_cannot_be_modelled_are_refused_alike(tmp_path, small_blocks):
    def spoiled(value):
        adata = toy_counts()
        adata.X.data[[100, 200]] = value
        return adata

    for value in (np.nan, np.inf, -1, 1.5):
        errors = []
        adata = spoiled(value)
        for cells in (adata, on_disk(adata, "backed", tmp_path)):
            with pytest.raises(ValueError, match=r"adata\.X holds") as error:
                make(VAE, cells, train=False, setup={})
            errors.append(str(error.value))
        assert errors[0] == errors[1]
    adata = spoiled(2)
    adata.X.data[adata.X.indptr[5] : adata.X.indptr[6]] = 0
    with pytest.warns(UserWarning, match="1 of 48 cells have no counts at all"):
        make(VAE, on_disk(adata, "zarr", tmp_path), train=False, setup={})


def test_the_file_is_looked_at_once(tmp_path, monkeypatch):
    other = on_disk(toy_counts(), "backed", tmp_path)
    looks = []
    monkeypatch.setattr("sccvae.data.ondisk.survey", lambda *args, **more: looks.append(args) or survey(*args, **more))
    model = make(VAE, other, train=False, setup={})
    model.train(**FAST, data="disk")
    model.get_latent_representation()
    assert len(looks) == 1


def test_columns_of_genes_on_disk(tmp_path, caplog, monkeypatch):
    adata = toy_counts()
    adata.X = sparse.csc_matrix(adata.X)
    other = on_disk(adata, "h5ad", tmp_path)
    with caplog.at_level(logging.INFO, "sccvae"):
        cells = read_cells(other, schema_of(adata), "disk")
    assert (cells.x != sparse.csr_matrix(adata.X)).nnz == 0
    assert "stored by genes (CSC)" in caplog.text
    monkeypatch.setattr("sccvae.data.ondisk.free_memory", lambda: 1000)
    with pytest.raises(ValueError, match=r"CSC.*Write it by cells"):
        read_cells(other, schema_of(adata), "disk")


# The choice


def test_the_path_is_chosen_by_the_free_memory_and_told(tmp_path, caplog, monkeypatch, capsys):
    adata = toy_counts()
    other = on_disk(adata, "backed", tmp_path)
    needed = 8 * adata.X.nnz + 8 * N
    for free, matrix, words in [
        (2 * needed, sparse.csr_matrix, "into memory"),
        (2 * needed - 2, DiskMatrix, "block by block"),
    ]:
        monkeypatch.setattr("sccvae.data.ondisk.free_memory", lambda free=free: free)
        caplog.clear()
        with caplog.at_level(logging.INFO, "sccvae"):
            assert isinstance(read_cells(other, schema_of(adata), "auto").x, matrix)
        assert words in caplog.text
        assert "0.00 GB are free" in caplog.text
        assert not capsys.readouterr().err
        read_cells(other, schema_of(adata), "auto")  # and nobody reads a log
        assert words in capsys.readouterr().err
    monkeypatch.setattr("sccvae.data.ondisk.free_memory", lambda: 10)
    assert sparse.issparse(read_cells(other, schema_of(adata), "memory").x)
    assert sparse.issparse(read_cells(adata, schema_of(adata), "disk").x)  # what is in memory stays there
    with pytest.raises(ValueError, match="data='tape' must be"):
        read_cells(adata, schema_of(adata), "tape")


def test_the_limit_of_a_job_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("sccvae.data.ondisk.CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr("sccvae.data.ondisk.OWN_GROUP", tmp_path / "own")
    assert free_memory() > 10_000  # no control groups
    (tmp_path / "own").write_text("0::/job/task\n")
    (tmp_path / "job" / "task").mkdir(parents=True)
    for group, most in [("job/task", "max"), ("job", "9000")]:
        for name, value in [("max", most), ("current", "5000"), ("stat", "anon 1\ninactive_file 300\n")]:
            (tmp_path / group / f"memory.{name}").write_text(value)
    assert free_memory() == 9000 - 5000 + 300


# Training


def a_loader(tmp_path, rows=None, batch_size=4, seed=3, kind="backed"):
    adata = toy_counts()
    cells = read_cells(on_disk(adata, kind, tmp_path), schema_of(adata), "disk")
    cells.covariates = np.arange(N, dtype=np.float32).reshape(-1, 1)  # so that each cell can be told
    store = CellStore(cells, np.arange(N))
    return shuffled_loader(store, np.arange(N) if rows is None else rows, batch_size, seed), adata


def seen(loader):
    batches = [b for chunk in loader for b in chunk]
    return [b["covariates"][:, 0].numpy().astype(int) for b in batches], batches


@pytest.mark.parametrize(("n", "batch_size"), [(48, 4), (47, 4), (45, 4), (33, 8), (41, 8), (17, 16), (48, 100)])
def test_every_cell_comes_once_in_each_epoch(n, batch_size, tmp_path, small_blocks):
    rows = np.sort(np.random.default_rng(0).permutation(N)[:n])
    loader, adata = a_loader(tmp_path, rows, batch_size)
    assert isinstance(loader, BlockLoader)
    for _ in range(2):
        order, batches = seen(loader)
        assert len(order) == loader.n_batches
        assert 1 < min(map(len, order)) <= max(map(len, order)) <= batch_size
        np.testing.assert_array_equal(np.sort(np.concatenate(order)), rows)
        for at, batch in zip(order, batches, strict=True):
            np.testing.assert_array_equal(dense(batch["x"]), adata.X[at].toarray())
            np.testing.assert_array_equal(batch["labels"], at)
            np.testing.assert_array_equal(batch["library"], adata.X[at].sum(1))
        assert len([*loader]) == len(loader)


def test_the_order_is_new_in_each_epoch_and_that_of_its_number(tmp_path, small_blocks):
    loader, _ = a_loader(tmp_path)
    assert loader.chunks_in_buffer > 1
    first, second = (np.concatenate(seen(loader)[0]) for _ in range(2))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, np.arange(N))
    again, _ = a_loader(tmp_path)
    again.epoch = 1
    np.testing.assert_array_equal(np.concatenate(seen(again)[0]), second)
    other, _ = a_loader(tmp_path, seed=4)
    assert not np.array_equal(np.concatenate(seen(other)[0]), first)


def test_mini_batches_are_mixed_from_the_whole_file(tmp_path, monkeypatch):
    """With 512 blocks in a buffer of 2,048 cells, a mini-batch of 128 comes from over a hundred places."""
    n = 4096
    x = np.zeros((n, 4), np.float32)
    x[:, 0] = 1
    path = tmp_path / "many.h5ad"
    ad.AnnData(sparse.csr_matrix(x)).write_h5ad(path)
    other = ad.read_h5ad(path, backed="r")
    monkeypatch.setattr("sccvae.data.blocks.BUFFER_BYTES", 8 * 2048)
    monkeypatch.setattr("sccvae.data.store.CHUNK_VALUES", 4 * 512)
    cells = read_cells(other, schema_of(other), "disk")
    cells.x.chunk_rows = 1
    cells.covariates = np.arange(n, dtype=np.float32).reshape(-1, 1)
    loader = BlockLoader(CellStore(cells), np.arange(n), 128)
    assert loader.block == 4
    for at in seen(loader)[0]:
        assert len(np.unique(at // 4)) > 100
        assert at.min() < n / 8 < 7 * n / 8 < at.max()


def test_a_row_may_come_more_often(tmp_path, small_blocks):
    loader, _ = a_loader(tmp_path, np.concatenate([np.arange(N), [7, 7, 30]]))
    counts = np.bincount(np.concatenate(seen(loader)[0]))
    assert counts.sum() == N + 3
    assert (counts[7], counts[30], counts[0]) == (3, 2, 1)


@pytest.mark.parametrize("kind", ["backed", "zarr"])
def test_results_of_a_trained_model_are_the_same_bits_from_disk(kind, tmp_path, small_blocks):
    adata = toy_counts()
    model = make(CVAE, adata)
    other = on_disk(adata[:, ::-1], kind, tmp_path)
    rows = np.random.default_rng(0).permutation(N)[:20]
    for indices in (None, rows):
        z = model.get_latent_representation(indices=indices)
        assert (model.get_latent_representation(other, indices) == z).all()
        assert model.get_elbo(other, indices) == model.get_elbo(indices=indices)
        wanted = model.get_normalized_expression(indices=indices, transform_batch="a")
        assert model.get_normalized_expression(other, indices, transform_batch="a").equals(wanted[other.var_names])


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_starts_alike_and_trains_alike(kind, tmp_path):
    """All cells in one mini-batch: the order matters no longer, up to rounding."""
    adata = toy_counts()
    other = on_disk(adata, kind, tmp_path)
    options = FAST | {"batch_size": N, "max_epochs": 3}
    models = [make(VAE, cells, train=False, setup={}, n_samples=1) for cells in (adata, other)]
    for (name, a), b in zip(models[0].module.state_dict().items(), models[1].module.state_dict().values(), strict=True):
        assert (a == b).all(), name
    for model in models:
        model.train(**options, data="disk")
    losses = [m.history["elbo_train"].iloc[:, 0] for m in models]
    np.testing.assert_allclose(*losses, rtol=0.1)  # the noise of z falls on other cells


def test_layer_size_factor_and_genes_in_another_file(tmp_path, small_blocks):
    adata = toy_counts()
    adata.layers["counts"] = adata.X.copy()
    adata.X = np.log1p(adata.X)
    setup = {"layer": "counts", "batch_key": "batch", "size_factor_key": "size"}
    other = on_disk(adata, "zarr", tmp_path)
    for cells in (adata, other):
        model = make(CVAE, cells, train=False, setup=setup)
        assert model.reference["library_unit"] == pytest.approx(adata.layers["counts"].sum() / adata.obs["size"].sum())
    model.train(**FAST, data="disk")
    assert other.layers["counts"].shape == (N, G)
    assert isinstance(other.layers["counts"], ad.abc.CSRDataset)


@pytest.mark.parametrize("size_factor_key", [None, "size"])
def test_a_query_that_lacks_genes_stays_on_disk(size_factor_key, tmp_path, small_blocks, monkeypatch):
    """Mapped alike from a file, looked at once, and trained in blocks where that is asked for."""
    setup = {"batch_key": "batch", "size_factor_key": size_factor_key}
    reference = make(CVAE, toy_counts(), setup=setup)
    cells = toy_counts(seed=3)[:, [7, 0, 3, 2, 11, 5, 9, 10]].copy()
    cells.obs["batch"] = "new"
    looked = []
    monkeypatch.setattr("sccvae.data.ondisk.survey", lambda *args, **kw: looked.append(1) or survey(*args, **kw))
    queries = [reference.load_query(c) for c in (cells, on_disk(cells, "h5ad", tmp_path))]
    for query in queries:
        query.train(max_epochs=2, batch_size=16, accelerator="cpu", progress_bar=False)
    in_memory, from_disk = queries
    assert (from_disk.get_latent_representation() == in_memory.get_latent_representation()).all()
    assert (from_disk.get_normalized_expression() == in_memory.get_normalized_expression()).all(axis=None)
    assert isinstance(from_disk._store(None).cells.x, DiskMatrix)
    assert isinstance(from_disk._training_store("memory").cells.x, sparse.csr_matrix)
    assert looked == [1]
    from_disk.train(max_epochs=2, batch_size=16, data="disk", accelerator="cpu", progress_bar=False)
    np.testing.assert_allclose(from_disk.get_elbo(), in_memory.get_elbo(), rtol=0.1)
    with pytest.raises(ValueError, match="data='nonsense' must be 'auto', 'disk' or 'memory'"):
        in_memory.train(max_epochs=2, data="nonsense")


def test_a_resumed_training_from_disk_equals_an_uninterrupted_one(tmp_path, small_blocks):
    other = on_disk(toy_counts(), "backed", tmp_path)

    def new():
        return make(VAE, other, train=False, setup={})

    whole, first, second = new(), new(), new()
    options = FAST | {"max_epochs": 4, "batch_size": 8, "data": "disk"}
    whole.train(**options)

    with pytest.raises(RuntimeError, match="power cut"):
        first.train(**options, checkpoint_dir=tmp_path / "run", callbacks=[Raise(RuntimeError("power cut"))])
    second.train(**options, checkpoint_dir=tmp_path / "run")
    assert second.history["elbo_train"].equals(whole.history["elbo_train"])
    assert (second.get_latent_representation() == whole.get_latent_representation()).all()


@pytest.mark.parametrize("cls", [GMVAE, IDEC])
def test_models_that_train_in_phases(cls, tmp_path, small_blocks):
    adata = toy_counts() if cls is GMVAE else toy_values()
    other = on_disk(adata, "backed", tmp_path)
    cls.setup_anndata(other)
    model = cls(other, n_components=2, **TINY)
    model.train(**FAST, data="disk")
    memory = adata.copy()
    cls.setup_anndata(memory)
    assert (model.predict() == model.predict(memory)).all()
    assert len(model.train_indices) == len(split_indices(N)[0])


def test_without_scdataset_the_error_names_the_extra(tmp_path, monkeypatch):
    other = on_disk(toy_counts(), "backed", tmp_path)
    model = make(VAE, other, train=False, setup={})
    monkeypatch.setitem(sys.modules, "scdataset", None)
    with pytest.raises(ImportError, match=r"sccvae\[ondisk\]"):
        model.train(**FAST, data="disk")
    model.train(**FAST, data="memory")


# Corrected layers in a file


@pytest.mark.parametrize("suffix", [".zarr", ".h5ad"])
def test_correct_to_a_file(suffix, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("sccvae.data.out.CHUNK_BYTES", 4 * G * 7)
    adata = toy_counts()
    model = make(CVAE, adata)
    wanted = tl.correct(adata, model, reference="a", copy=True)
    other = on_disk(adata, "backed", tmp_path)
    monkeypatch.setattr("sccvae.model._base.MOST", 10)
    out = tmp_path / f"corrected{suffix}"
    with caplog.at_level(logging.INFO, "sccvae"):
        tl.correct(other, model, reference="a", out=out)
    assert "takes 0.00 GB on disk" in caplog.text
    found = ad.read_zarr(out) if suffix == ".zarr" else ad.read_h5ad(out)
    np.testing.assert_allclose(found.layers["corrected"], wanted.layers["corrected"], rtol=1e-5)
    np.testing.assert_allclose(found.obsm["X_cvae"], wanted.obsm["X_cvae"], rtol=1e-4, atol=1e-6)
    assert found.obs["dose"].equals(adata.obs["dose"])
    assert list(found.var_names) == list(adata.var_names)
    assert found.uns["corrected"]["reference"] == ["a"]
    assert found.X is None
    assert "corrected" not in other.layers
    assert other.uns["corrected"]["embedding"] == "X_cvae"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    with pytest.raises(FileExistsError, match="exists; choose another file"):
        tl.correct(other, model, out=out)


@pytest.mark.parametrize("suffix", [".zarr", ".h5ad"])
def test_a_failure_leaves_nothing_half_written(suffix, tmp_path, monkeypatch):
    adata = toy_counts()
    model = make(CVAE, adata)
    calls = []

    def fail(self, rows, values):
        calls.append(rows)
        msg = "disk full"
        raise OSError(msg)

    monkeypatch.setattr("sccvae.data.out.InChunks.__setitem__", fail)
    before = adata.copy()
    with pytest.raises(OSError, match="disk full"):
        tl.correct(adata, model, out=tmp_path / f"corrected{suffix}")
    assert calls
    assert not [*tmp_path.iterdir()]
    assert set(adata.obsm) == set(before.obsm)
    assert set(adata.uns) == set(before.uns)


def test_correct_trains_from_a_file(tmp_path):
    adata = toy_counts()
    options = {"batch_key": "batch", "n_latent": 2, "train_options": FAST | {"data": "disk"}}
    other = on_disk(adata, "zarr", tmp_path)
    tl.correct(other, **options, out=tmp_path / "corrected.h5ad")
    assert isinstance(other.X, ad.abc.CSRDataset)
    assert ad.read_h5ad(tmp_path / "corrected.h5ad").layers["corrected"].shape == (N, G)


def test_room_and_place_are_checked_before_any_training(tmp_path, monkeypatch):
    adata = toy_counts()
    for out, error, words in [
        ("corrected.csv", ValueError, "must end in"),
        ("no/corrected.zarr", FileNotFoundError, "There is no folder"),
    ]:
        with pytest.raises(error, match=words):
            tl.correct(adata, batch_key="batch", out=tmp_path / out)
    monkeypatch.setattr("sccvae.data.out.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"on disk, 0\.00 GB are free"):
        tl.correct(adata, batch_key="batch", out=tmp_path / "corrected.zarr")
    with pytest.raises(ValueError, match="leave copy=True out"):
        tl.correct(adata, batch_key="batch", out=tmp_path / "a.zarr", copy=True)
    monkeypatch.setattr("sccvae.data.out.free_memory", lambda: 1000)
    with pytest.raises(ValueError, match=r"of memory, 0\.00 GB are free.*out="):
        tl.correct(adata, batch_key="batch")


def test_open_anndata_is_lazy_and_whole(tmp_path):
    adata = toy_counts()
    adata.layers["dense"] = adata.X.toarray()
    adata.obsm["X_pca"] = np.ones((N, 2), np.float32)
    adata.uns["note"] = "x"
    for kind in ("h5ad", "zarr"):
        other = on_disk(adata, kind, tmp_path)
        assert isinstance(other.X, ad.abc.CSRDataset)
        assert not isinstance(other.layers["dense"], np.ndarray)
        assert other.obs["dose"].equals(adata.obs["dose"])
        assert other.uns["note"] == "x"
        assert other.obsm["X_pca"].shape == (N, 2)
    with pytest.raises(ValueError, match="must end in"):
        open_anndata(tmp_path / "cells.loom")
    with pytest.raises(FileNotFoundError, match="There is no"):
        open_anndata(tmp_path / "none.h5ad")


@pytest.mark.parametrize("disk", [True, False])
@pytest.mark.parametrize("n", [28, 37, 40, 41])  # of 28, two have 9: a chunk of 8 would leave one
def test_processes_share_every_epoch(n, disk, tmp_path, small_blocks, monkeypatch):
    """Each cell in one of three; all take the same number of chunks and steps, or they would wait for ever."""
    loader, adata = a_loader(tmp_path)
    cells = loader.store.cells
    if not disk:
        monkeypatch.setattr(cells, "x", adata.X)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        loader = shuffled_loader(CellStore(cells), np.arange(n), 4, 0, n_processes=3)
        assert isinstance(loader, BlockLoader) == disk
        shares.append([[b["covariates"][:, 0].tolist() for b in chunk] for chunk in loader])
    assert len({tuple(len(chunk) for chunk in share) for share in shares}) == 1
    together = [c for share in shares for chunk in share for batch in chunk for c in batch]
    assert sorted(together) == list(range(n))
    assert min(len(b) for share in shares for chunk in share for b in chunk) > 1


@pytest.mark.parametrize("library", [SimpleNamespace(), None], ids=["another C library", "none to be found"])
def test_memory_is_given_back_where_that_can_be_asked(library, monkeypatch):
    """A million cells leave 190 MB of freed blocks behind, which glibc keeps if it is not asked."""
    give_back()
    asked = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(malloc_trim=asked.append))
    give_back()
    assert asked == [0]

    def missing(name):
        if library is None:
            raise OSError("no such library")
        return library

    monkeypatch.setattr(ctypes, "CDLL", missing)
    give_back()
