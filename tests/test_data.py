"""From AnnData to mini-batches: storage formats, gene order, categories, splits, loaders."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from _toys import toy_counts, toy_values
from scipy import sparse

from sccvae import _rows
from sccvae.data import Cells, CellStore, ChunkLoader, Schema, read_cells, split_indices
from sccvae.data import store as store_module
from sccvae.data.categories import is_label, match, of_cells
from sccvae.data.read import check_support
from sccvae.model import CVAE

N, G = 48, 12


@pytest.fixture
def adata():
    return toy_counts(N, G)


def schema_of(adata, **options):
    return Schema(var_names=np.asarray(adata.var_names), **options)


FULL = {
    "categories": {"batch": np.array(["a", "b"], object), "donor": np.array(["d1", "d2", "d3"], object)},
    "continuous": ("dose",),
    "batch_key": "batch",
}


def dense(x):
    return x.toarray() if sparse.issparse(x) else x


def in_format(adata, kind, tmp_path):
    """The same counts in another storage."""
    x = adata.X.toarray()
    converters = {
        "csr": sparse.csr_matrix,
        "csc": sparse.csc_matrix,
        "coo": lambda x: sparse.csr_matrix(sparse.coo_matrix(x)),
        "csr_array": sparse.csr_array,
        "csc_array": sparse.csc_array,
        "dense": np.array,
        "fortran": np.asfortranarray,
        "int32": lambda x: x.astype(np.int32),
        "int64": lambda x: sparse.csr_matrix(x.astype(np.int64)),
        "uint8": lambda x: x.astype(np.uint8),
        "float64": lambda x: x.astype(np.float64),
        "float16": lambda x: x.astype(np.float16),
        "csc float64": lambda x: sparse.csc_matrix(x.astype(np.float64)),
    }
    if kind in converters:
        other = adata.copy()
        other.X = converters[kind](x)
        return other
    if kind == "view":
        twice = ad.concat([adata, adata], index_unique="-")
        return twice[:N]
    if kind == "reversed view":
        other = adata[::-1].copy()
        return other[::-1]
    if kind.startswith("backed"):
        other = adata.copy()
        other.X = {"backed csr": sparse.csr_matrix, "backed csc": sparse.csc_matrix, "backed dense": np.array}[kind](x)
        other.write_h5ad(tmp_path / "cells.h5ad")
        return ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    if kind == "view of backed":
        adata.write_h5ad(tmp_path / "cells.h5ad")
        return ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")[np.arange(N)]
    raise AssertionError(kind)


FORMATS = [
    "csr", "csc", "coo", "csr_array", "csc_array", "dense", "fortran", "int32", "int64", "uint8", "float64", "float16",
    "csc float64", "view", "reversed view", "backed csr", "backed csc", "backed dense", "view of backed",
]  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
def test_every_storage_gives_the_same_cells(adata, kind, tmp_path):
    wanted = adata.X.toarray()
    other = in_format(adata, kind, tmp_path)
    before = dense(other.X[:]).copy()
    cells = read_cells(other, schema_of(adata, **FULL))
    assert cells.x.dtype == np.float32
    assert isinstance(cells.x, np.ndarray | sparse.csr_matrix)
    np.testing.assert_array_equal(dense(cells.x), wanted)
    np.testing.assert_array_equal(cells.library[:, 0], wanted.sum(1))
    assert cells.library.dtype == cells.covariates.dtype == np.float32
    assert cells.codes.dtype == np.int64
    np.testing.assert_array_equal(cells.codes[:, 0], np.arange(N) % 2)
    np.testing.assert_array_equal(cells.codes[:, 1], np.arange(N) % 3)
    np.testing.assert_allclose(cells.covariates[:, 0], adata.obs["dose"], rtol=1e-6)
    tensors = CellStore(cells).gather(np.arange(N)[::-1])
    np.testing.assert_array_equal(_rows.dense(tensors["x"]).numpy(), wanted[::-1])
    np.testing.assert_array_equal(dense(other.X[:]), before)  # nothing was written to the user's matrix


@pytest.mark.parametrize("make", [np.array, sparse.csr_matrix, sparse.csc_matrix])
def test_bool_values(make):
    x = np.random.default_rng(0).random((6, 4)) < 0.5
    adata = ad.AnnData(make(x), var=pd.DataFrame(index=list("abcd")))
    np.testing.assert_array_equal(dense(read_cells(adata, schema_of(adata)).x), x.astype(np.float32))


def test_unordered_and_repeated_sparse_entries():
    """CSR allows unsorted columns and the same entry in parts; the value is their sum."""
    x = sparse.csr_matrix(
        (np.array([1, 2, 0.5, 0.5], np.float32), np.array([2, 0, 1, 1]), np.array([0, 2, 4])), shape=(2, 3)
    )
    adata = ad.AnnData(x, var=pd.DataFrame(index=list("abc")))
    cells = read_cells(adata, schema_of(adata))
    check_support(cells, "counts", "adata.X")  # 0.5 + 0.5 is a count
    np.testing.assert_array_equal(dense(cells.x), [[2, 0, 1], [0, 1, 0]])
    assert cells.library[:, 0].tolist() == [3, 1]


def test_in_memory_float32_is_not_copied(adata):
    assert np.shares_memory(read_cells(adata, schema_of(adata)).x.data, adata.X.data)
    values = toy_values()
    assert np.shares_memory(read_cells(values, schema_of(values)).x, values.X)


def test_layer(adata):
    adata.layers["counts"] = sparse.csc_matrix(adata.X * 2)
    x = read_cells(adata, schema_of(adata, layer="counts")).x
    np.testing.assert_array_equal(dense(x), adata.X.toarray() * 2)
    del adata.layers["counts"]
    with pytest.raises(KeyError, match=r"layers\['counts'\], which this AnnData lacks"):
        read_cells(adata, schema_of(adata, layer="counts"))


@pytest.mark.parametrize("make", [np.array, sparse.csr_matrix, sparse.csc_matrix])
def test_genes_in_another_order_or_among_others(adata, make):
    schema = schema_of(adata)
    wanted = adata.X.toarray()
    more = ad.AnnData(np.full((N, 3), 99, np.float32), obs=adata.obs, var=pd.DataFrame(index=["x", "y", "z"]))
    wide = ad.concat([adata, more], axis=1)
    rng = np.random.default_rng(0)
    for source in (adata, wide):
        shuffled = source[:, rng.permutation(source.n_vars)].copy()
        shuffled.X = make(dense(shuffled.X))
        cells = read_cells(shuffled, schema)
        np.testing.assert_array_equal(dense(cells.x), wanted)
        np.testing.assert_array_equal(cells.library[:, 0], wanted.sum(1))  # of the model's genes only


def test_one_cell_of_each_class_trains():
    for seed in range(20):
        plain = split_indices(60, 0.9, seed=seed)
        classes = np.full(60, -1)
        classes[[plain[1][0], plain[1][1], plain[0][3]]] = 2, 0, 1
        parts = split_indices(60, 0.9, seed=seed, classes=classes)
        assert set(classes[parts[0]]) == {-1, 0, 1, 2}
        assert [len(p) for p in parts] == [54, 6, 0]
        assert sorted(np.concatenate(parts)) == list(range(60))
        assert len(np.setdiff1d(plain[0], parts[0])) == 2
        classes[:] = np.arange(60) % 2  # enough of each: nothing changes
        for one, other in zip(plain, split_indices(60, 0.9, seed=seed, classes=classes), strict=True):
            assert np.array_equal(one, other)
    crowded = split_indices(4, 0.5, classes=np.arange(4))  # no room for all
    assert [len(p) for p in crowded] == [2, 2, 0]
    named = split_indices(4, 0.5, classes=np.array([0, 0, 1, 1]))
    assert len(np.unique(np.array([0, 0, 1, 1])[named[0]])) == 2


def test_values_of_cells_by_name():
    names = pd.Index(["a", "b", "c"])
    for values in (pd.Series([3, 1, 2], index=["c", "a", "b"]), pd.Series([1, 2, 3]), [1, 2, 3]):
        assert list(of_cells(values, names, "guide")) == [1, 2, 3]
    for index in (["a", "b", "x"], ["a", "b", "b"]):
        with pytest.raises(ValueError, match=r"guide is a Series whose index .* is not that of the cells.*to_numpy"):
            of_cells(pd.Series([1, 2, 3], index=index), names, "guide")
    with pytest.raises(ValueError, match="guide has 2 values for 3 cells"):
        of_cells([1, 2], names, "guide")


def test_missing_genes_are_named(adata):
    schema = schema_of(adata)
    with pytest.raises(ValueError, match=r"2 of the model's 12 genes are missing .*\['gene3', 'gene5'\]"):
        read_cells(adata[:, ~adata.var_names.isin(["gene3", "gene5"])], schema)


def test_ambiguous_genes_are_refused(adata):
    schema = schema_of(adata)
    other = adata.copy()
    other.var_names = ["gene1", *adata.var_names[1:]]
    with pytest.raises(ValueError, match="not unique"):
        read_cells(other, schema)


def test_size_factor_in_place_of_the_sum(adata):
    cells = read_cells(adata, schema_of(adata, size_factor_key="size"))
    np.testing.assert_allclose(cells.library[:, 0], adata.obs["size"], rtol=1e-6)


# Categories


@pytest.mark.parametrize(
    ("known", "column"),
    [
        (["a", "b"], ["b", "a", "b"]),
        (["a", "b"], pd.Categorical(["b", "a", "b"], categories=["b", "unused", "a"])),
        (["a", "b"], pd.array(["b", "a", "b"], dtype="string")),
        ([0, 1], [1, 0, 1]),
        ([0, 1], pd.Categorical([1, 0, 1])),
        ([0, 1], ["1", "0", "1"]),
        (["0", "1"], [1, 0, 1]),
        (["0", "1"], pd.Categorical([1, 0, 1])),
        ([False, True], [True, False, True]),
        ([False, True], ["True", "False", "True"]),
        ([0, 1], [1.0, 0.0, 1.0]),
        ([0, 1], pd.array([1, 0, 1], dtype="Int64")),
    ],
)
def test_codes_of_categories(known, column):
    schema = Schema(
        var_names=np.array(["g"]), categories={"k": np.array(known, dtype=object if known == ["a", "b"] else None)}
    )
    codes = schema.codes("k", pd.Series(column))
    assert codes.dtype == np.int64
    assert codes.tolist() == [1, 0, 1]
    assert schema.code("k", known[1]) == 1
    assert schema.n_categories == (2,)


def test_unknown_categories_are_named():
    schema = Schema(var_names=np.array(["g"]), categories={"site": np.array(["a", "b"], object)})
    with pytest.raises(ValueError, match=r"obs\['site'\] is \['x', 'y'\] in 3 cells.*it knows \['a', 'b'\]"):
        schema.codes("site", pd.Series(["a", "x", "y", "x"]))
    with pytest.raises(ValueError, match=r"obs\['site'\] is missing \(NaN\) in 1 cells"):
        schema.codes("site", pd.Series(["a", None, "b"]))
    with pytest.raises(ValueError, match=r"obs\['site'\] is missing \(NaN\) in 1 cells"):
        schema.codes("site", pd.Series(pd.Categorical(["a", None, "b"])))


@pytest.mark.parametrize(
    ("known", "values", "codes"),
    [
        ([0.0, 1.0], [1, 0, 2], [1, 0, -1]),
        ([0, 1], [1.0, np.nan, 0.5], [1, -1, -1]),
        ([0, 1], ["1", "x", None], [1, -1, -1]),
        (["nan", "b"], ["b", "nan", np.nan], [1, 0, -1]),
        (["None", "b"], ["None", None, "b"], [0, -1, 1]),
    ],
)
def test_values_are_matched_by_value_then_by_text(known, values, codes):
    assert match(np.array(known), pd.Series(values, dtype=object)).tolist() == codes


@pytest.mark.parametrize(
    ("values", "unlabeled", "labels"),
    [
        ([-1, 0, 1], -1.0, [False, True, True]),
        ([-1.0, np.nan, 1.0], -1, [False, False, True]),
        ([-1, 0, 1], "-1", [False, True, True]),
        (["Unknown", None, "unknown"], "Unknown", [False, False, True]),
        (["a", None, "b"], None, [True, False, True]),
    ],
)
def test_what_stands_for_no_label_is_matched_by_value(values, unlabeled, labels):
    for dtype in (None, object, "category"):
        assert is_label(pd.Series(values, dtype=dtype), unlabeled).tolist() == labels


def test_a_missing_label_is_not_a_class_of_that_name(adata):
    adata.obs["type"] = pd.Series(["nan", "None", None, np.nan] * 12, index=adata.obs_names, dtype=object)
    with pytest.warns(UserWarning, match="'nan' .12 cells. counts as a class"):
        CVAE.setup_anndata(adata, batch_key="donor", labels_key="type")
    schema = CVAE(adata, n_latent=2, n_hidden=4).schema
    assert schema.classes.tolist() == ["None", "nan"]
    assert schema.label_codes(adata.obs["type"])[:4].tolist() == [1, 0, -1, -1]


def test_one_category_is_found_by_value(adata):
    schema = schema_of(adata, categories={"dose": np.array([0.0, 1.0])})
    assert schema.code("dose", 1) == 1
    for other in (2, None, [0.0]):
        with pytest.raises(ValueError, match="is no category of"):
            schema.code("dose", other)


@pytest.mark.parametrize("key", ["batch_key", "labels_key"])
def test_categories_that_cannot_be_saved_are_refused(adata, key):
    adata.obs["bin"] = pd.cut(adata.obs["dose"], 3)
    with pytest.raises(TypeError, match=r"obs\['bin'\] holds Interval.*neither text nor a number.*astype\(str\)"):
        CVAE.setup_anndata(adata, **{key: "bin"})


def test_missing_columns_are_named(adata):
    schema = schema_of(adata, **FULL)
    del adata.obs["donor"]
    with pytest.raises(KeyError, match=r"obs\['donor'\], which this AnnData lacks"):
        read_cells(adata, schema)


@pytest.mark.parametrize(
    ("column", "first"),
    [
        ([1.0, np.nan, 2.0], "nan"),
        ([1.0, np.inf, 2.0], "inf"),
        ([1.0, "high", 2.0], "high"),
        ([1.0, None, 2.0], "nan"),
    ],
)
def test_covariates_must_be_finite_numbers(column, first):
    adata = toy_counts(3, 4)
    adata.obs["age"] = column
    with pytest.raises(ValueError, match=rf"obs\['age'\] must hold finite numbers; 1 of 3 .*{first} in cell 'cell1'"):
        read_cells(adata, schema_of(adata, continuous=("age",)))


@pytest.mark.parametrize(
    "column", [[1, 2, 3], [True, False, True], pd.array([1, 2, 3], dtype="Int64"), pd.Categorical([1, 2, 3])]
)
def test_covariates_of_other_types(column):
    adata = toy_counts(3, 4)
    adata.obs["age"] = column
    cells = read_cells(adata, schema_of(adata, continuous=("age",)))
    assert cells.covariates[:, 0].tolist() == [float(v) for v in column]


# Values


@pytest.mark.parametrize("make", [np.array, sparse.csr_matrix])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, (np.inf, -np.inf), 1e300])
def test_values_must_be_finite(make, bad):
    x = np.ones((5, 4))
    x[2, 1] = np.ravel(bad)[0]
    x[3, 0] = np.ravel(bad)[-1] if np.size(bad) > 1 else 1
    adata = ad.AnnData(make(x), var=pd.DataFrame(index=list("abcd")))
    with pytest.raises(
        ValueError, match=rf"adata.X holds NaN or infinite values in {np.size(bad)} cells \(first: row 2\)"
    ):
        read_cells(adata, schema_of(adata))


def test_large_values_are_not_infinite():
    x = np.full((50, 40), 3e38, np.float32)
    adata = ad.AnnData(x)
    with np.errstate(over="ignore"):  # the library size of such cells overflows, and does not matter here
        assert len(read_cells(adata, schema_of(adata))) == 50


def cells_of(x):
    x = np.asarray(x, np.float32)
    return Cells(x, np.zeros((len(x), 0), np.int64), np.zeros((len(x), 0), np.float32), x.sum(1, keepdims=True))


@pytest.mark.parametrize("make", [np.array, sparse.csr_matrix])
def test_support(make):
    def check(x, support):
        cells = cells_of(x)
        cells.x = make(cells.x)
        check_support(cells, support, "adata.layers['c']")
        return cells

    check([[0, 3], [2, 1]], "counts")
    check([[0, 0.5], [1, 1]], "unit")
    check([[-3, 0.5], [1, 1]], "real")
    with pytest.raises(
        ValueError, match=r"adata.layers\['c'\] holds negative values \(smallest -2\).*likelihood='normal'"
    ):
        check([[0, -2], [2, 1]], "counts")
    with pytest.raises(
        ValueError, match=r"adata.layers\['c'\] holds values that are not whole numbers, such as 1.5.*raw counts"
    ):
        check([[0, 1.5], [2, 1]], "counts")
    with pytest.raises(ValueError, match=r"from -1 to 7; a Bernoulli likelihood needs \[0, 1\]"):
        check([[7, -1], [2, 1]], "unit")
    with pytest.warns(UserWarning, match=r"1 of 2 cells have no counts at all in adata.layers\['c'\]"):
        cells = check([[0, 0], [2, 1]], "counts")
    assert cells.library[:, 0].tolist() == [1, 3]


# Splits


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 25, 100, 1001])
@pytest.mark.parametrize(
    ("train", "validation"), [(0.9, None), (1.0, None), (0.5, 0.2), (0.7, 0.3), (0.1, 0), (1 / 3, 2 / 3)]
)
def test_split_holds_every_cell_once(n, train, validation):
    parts = split_indices(n, train, validation, seed=3)
    assert sorted(np.concatenate(parts)) == list(range(n))
    for part in parts:
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()
    assert len(parts[0]) == max(1, round(n * train))
    if validation is None and train == 1:
        assert len(parts[1]) == 0
    if validation is None:
        assert len(parts[2]) == 0
    if n > 50:
        assert abs(len(parts[1]) - n * (1 - train if validation is None else validation)) <= 1


def test_split_follows_the_seed():
    a, b, c = (split_indices(100, 0.5, seed=s)[0] for s in (0, 0, 1))
    assert (a == b).all()
    assert set(a) != set(c)


@pytest.mark.parametrize(
    ("train", "validation"), [(0, None), (-0.1, None), (1.2, None), (0.9, 0.2), (0.5, -0.1), (float("nan"), None)]
)
def test_split_refuses_shares_that_do_not_fit(train, validation):
    with pytest.raises(
        ValueError, match=rf"train_size={train} and validation_size=.* do not fit: train_size must be in \(0, 1\]"
    ):
        split_indices(10, train, validation)


# Loaders


def numbered_store(n):
    """Each cell carries its own row number."""
    x = np.arange(n, dtype=np.float32).reshape(-1, 1)
    return CellStore(Cells(sparse.csr_matrix(x), np.arange(n).reshape(-1, 1), x.copy(), x.copy()))


def epoch(loader):
    return [batch for chunk in loader for batch in chunk]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("n", [2, 3, 4, 5, 9, 10, 11, 16, 17, 33, 100])
@pytest.mark.parametrize("batch_size", [3, 4, 8, 16, 1000])
def test_loader_gives_every_cell_once_in_even_batches(n, batch_size, shuffle, monkeypatch):
    monkeypatch.setattr(store_module, "CHUNK_VALUES", 3 * batch_size)  # three mini-batches a chunk
    loader = ChunkLoader(numbered_store(n), np.arange(n), batch_size, shuffle=shuffle)
    chunks = list(loader)
    assert len(chunks) == len(loader)
    assert all(len(chunk) <= 3 for chunk in chunks)
    batches = [b for chunk in chunks for b in chunk]
    assert len(batches) == loader.n_batches == -(-n // batch_size)
    sizes = [len(b["x"]) for b in batches]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 2  # batch norm cannot work on one cell
    values = [_rows.dense(b["x"]) for b in batches]
    seen = torch.cat(values)[:, 0]
    assert Counter(seen.tolist()) == Counter(map(float, range(n)))
    for x, b in zip(values, batches, strict=True):  # the parts of a cell stay together
        assert torch.equal(x, b["covariates"])
        assert torch.equal(x, b["library"])
        assert torch.equal(x.long(), b["codes"])
    if not shuffle:
        assert seen.tolist() == list(range(n))


def test_loader_of_some_rows():
    some = np.array([7, 3, 5, 3])
    found = torch.cat([_rows.dense(b["x"]) for b in epoch(ChunkLoader(numbered_store(10), some, 3))])
    assert found[:, 0].tolist() == [7, 3, 5, 3]
    assert len(epoch(ChunkLoader(numbered_store(10), np.array([4]), 3))) == 1
    assert epoch(ChunkLoader(numbered_store(10), np.array([], np.int64), 3)) == []


def order(loader):
    return torch.cat([_rows.dense(b["x"]) for b in epoch(loader)])[:, 0].tolist()


def test_shuffle_differs_by_epoch_and_repeats_by_seed():
    def loader(seed=0):
        return ChunkLoader(numbered_store(50), np.arange(50), 8, shuffle=True, seed=seed)

    first, same, other = loader(), loader(), loader(seed=1)
    epochs = [order(first) for _ in range(3)]
    assert epochs == [order(same) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != order(other)
    resumed = loader()
    resumed.epoch = 2
    assert order(resumed) == epochs[2]


def test_shuffle_mixes_across_chunks(monkeypatch):
    monkeypatch.setattr(store_module, "CHUNK_VALUES", 8)
    chunks = list(ChunkLoader(numbered_store(1000), np.arange(1000), 8, shuffle=True))
    means = [float(torch.cat([_rows.dense(b["x"]) for b in chunk]).mean()) for chunk in chunks]
    assert 300 < np.mean(means[: len(means) // 2]) < 700
    assert max(means) - min(means) < 800


def test_loader_leaves_global_random_states_alone():
    state, torch_state = np.random.get_state()[1].copy(), torch.random.get_rng_state()  # noqa: NPY002
    epoch(ChunkLoader(numbered_store(50), np.arange(50), 8, shuffle=True))
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    assert torch.equal(torch.random.get_rng_state(), torch_state)


@pytest.mark.parametrize("batch_size", [0, -3])
def test_batch_size_must_be_positive(batch_size):
    with pytest.raises(ValueError, match=f"batch_size={batch_size} must be at least 1"):
        ChunkLoader(numbered_store(5), np.arange(5), batch_size)


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
@pytest.mark.parametrize("rows", [np.arange(5), np.arange(3, 8), np.array([4]), np.array([5, 3, 4]), np.array([2, 2])])
def test_gathered_values_are_those_of_the_rows_and_not_shared(form, rows):
    values = toy_values()
    values.X = form(values.X)
    before = np.asarray(values[rows].X.todense() if form is sparse.csr_matrix else values[rows].X)
    gathered = CellStore(read_cells(values, schema_of(values))).gather(rows)
    assert (_rows.dense(gathered["x"]).numpy() == before).all()
    (gathered["x"].values if form is sparse.csr_matrix else gathered["x"]).zero_()
    for name in ("codes", "covariates", "library"):
        gathered[name].zero_()
    after = CellStore(read_cells(values, schema_of(values))).gather(rows)
    assert before.any()
    assert (_rows.dense(after["x"]).numpy() == before).all()
    assert (after["library"] > 0).all()


def test_cells_that_cannot_be_written_to_are_gathered():
    cells = numbered_store(10).cells  # a warning of torch would fail
    for array in (cells.x.data, cells.x.indices, cells.x.indptr):
        array.flags.writeable = False
    assert _rows.dense(CellStore(cells).gather(np.arange(2, 5))["x"])[:, 0].tolist() == [2, 3, 4]


def test_means_of_genes():
    x = sparse.random(50, 7, density=0.3, format="csr", dtype=np.float32, random_state=0)
    cells = Cells(x, *(np.zeros((50, 1), t) for t in (np.int64, np.float32, np.float32)))
    assert np.allclose(cells.gene_means, x.toarray().mean(0))
    assert np.allclose(replace(cells, x=x.toarray()).gene_means, x.toarray().mean(0))
    assert (replace(cells, x=x[:0]).gene_means == 0).all()


@pytest.mark.parametrize(
    ("known", "column", "wanted"),
    [
        (["-1", "2"], [-1.0, 2.0, np.nan, 3.0], [0, 1, -1, -1]),  # as on a command line
        ([-1.0, 2.0], ["-1", "2", "x", None], [0, 1, -1, -1]),
        (["1", "01"], ["1", "01", "001"], [0, 1, -1]),  # text is text
        (["1", "1.0"], [1, 2], [0, -1]),
        (["a", "b"], [1.0, 2.0], [-1, -1]),
    ],
)
def test_text_and_numbers_match_as_numbers(known, column, wanted):
    known = np.array(known, dtype=object if isinstance(known[0], str) else float)
    assert match(known, pd.Series(column)).tolist() == wanted
