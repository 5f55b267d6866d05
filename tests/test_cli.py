"""The sccvae command: exit codes, one clear line for an error, files whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import sccvae
from sccvae import _demo, cli, datasets, model, tl
from sccvae.cli import main
from sccvae.pl import _scatter

ROOT = Path(__file__).parents[1]
FAST = ["--max-epochs", "2"]
COUNTS = ["--layer", "counts", "--batch-key", "batch"]


def make_cells() -> ad.AnnData:
    rng = np.random.default_rng(0)
    batch = rng.integers(0, 2, 200)
    rate = rng.gamma(1.0, 1.0, (2, 100))[batch]
    adata = ad.AnnData(
        np.log1p(rate).astype(np.float32),
        obs=pd.DataFrame(
            {"batch": pd.Categorical.from_codes(batch, ["1", "2"]), "donor": rng.choice(["x", "y"], 200)},
            index=[f"cell{i}" for i in range(200)],
        ),
        var=pd.DataFrame(index=[f"gene{i}" for i in range(100)]),
    )
    adata.layers["counts"] = sparse.csr_matrix(rng.poisson(rate).astype(np.float32))
    return adata


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that holds cells.h5ad."""
    make_cells().write_h5ad(tmp_path / "cells.h5ad")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of these cells."""
    adata = make_cells()
    model.CVAE.setup_anndata(adata, layer="counts", batch_key="batch")
    cvae = model.CVAE(adata)
    cvae.train(max_epochs=2, progress_bar=False)
    path = tmp_path_factory.mktemp("models") / "cvae"
    cvae.save(path)
    return path


def names(folder: Path) -> set[str]:
    """All that lies in a folder, hidden files included."""
    return set(os.listdir(folder))


# help


def test_help_is_fast_and_loads_nothing_heavy():
    code = """
import sys, time
start = time.perf_counter()
from sccvae.cli import main
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
print(time.perf_counter() - start)
print(*({"anndata", "h5py", "lightning", "matplotlib", "numpy", "scanpy", "scvi", "torch"} & set(sys.modules)))
"""
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
        *text, took, heavy = done.stdout.splitlines()
        assert heavy == ""
        seconds.append(float(took))
    assert "usage: sccvae" in text[0]
    assert min(seconds) < 1  # the others tell what else the machine was doing


@pytest.mark.parametrize("command", ["train", "embed", "correct", "counterfactual", "cluster", "map", "demo"])
def test_every_command_explains_itself_with_an_example(capsys, command):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert f"\n  sccvae {command}" in out
    trains = command not in ("map", "demo")
    for option in ("--debug", "--quiet", *(["--layer", "--batch-key", "--seed"] if trains else [])):
        assert option in out


def test_labels_belong_to_the_data_of_every_model(capsys):
    """Label transfer needs them of any model, not of gmvae alone; embed and correct make no use of them."""
    for command, wanted in [("train", True), ("cluster", True), ("embed", False), ("correct", False)]:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        out = capsys.readouterr().out
        data = out.split("data to train on:")[1].split("\nmodel:")[0]
        assert ("--labels-key" in data) == ("--unlabeled-category" in data) == wanted
        assert ("--labels-key" in out) == wanted
        assert not wanted or "label transfer by `sccvae map`" in " ".join(data.split())


def test_default_likelihood_is_not_the_plain_one(capsys):
    with pytest.raises(SystemExit):
        main(["embed", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "for cvae and gmvae with a batch, nb with an offset and a dispersion for each gene and batch" in text
    assert "naming nb gives the plain one" in text


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"sccvae {sccvae.__version__}\n"


def test_script_is_declared():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert scripts == {"sccvae": "sccvae.cli:main"}


# the jobs


def test_train_then_embed_and_correct_with_the_model(folder, capsys):
    assert main(["train", "cells.h5ad", "--out", "m", *COUNTS, *FAST, "--n-latent", "3", "--labels-key", "donor"]) == 0
    said = capsys.readouterr()
    assert "m: CVAE of 200 cells x 100 genes, −ELBO" in said.out
    assert "nats per cell, of epoch " in said.out
    assert "cells/s" in said.err
    assert main(["embed", "cells.h5ad", "e.h5ad", "--model-dir", "m", "--key", "z"]) == 0
    assert "e.h5ad: obsm['z'], 200 cells x 3 dimensions" in capsys.readouterr().out
    assert (
        main(["correct", "cells.h5ad", "c.h5ad", "--model-dir", "m", "--reference", "2", "--library-size", "100"]) == 0
    )
    assert "c.h5ad: layers['corrected'] (as in 2) and obsm['X_cvae']" in capsys.readouterr().out
    e, c = ad.read_h5ad("e.h5ad"), ad.read_h5ad("c.h5ad")
    loaded = model.load("m")
    assert loaded.registry_["setup_args"]["labels_key"] == "donor"
    assert np.array_equal(e.obsm["z"], loaded.get_latent_representation(e))
    assert np.array_equal(c.obsm["X_cvae"], e.obsm["z"])
    np.testing.assert_allclose(c.layers["corrected"].sum(1), 100, rtol=1e-4)
    assert not [key for key in [*e.obs, *e.uns, *e.obsm] if "scvi" in key]
    assert names(folder) == {"cells.h5ad", "m", "e.h5ad", "c.h5ad"}


def test_map(folder, capsys):
    assert main(["train", "cells.h5ad", "--out", "m", *COUNTS, *FAST, "--labels-key", "donor"]) == 0
    cells = make_cells()[:80, 10:].copy()
    cells.obs["batch"] = "3"
    cells.write_h5ad("new.h5ad")
    assert main(["map", "new.h5ad", "o.h5ad", "--model-dir", "m"]) == 0
    said = capsys.readouterr()
    assert "o.h5ad: obsm['X_mapped'], 80 cells; new: {'batch': ['3']}" in said.out
    assert "10 genes masked" in said.out
    mapped = ad.read_h5ad("o.h5ad")
    wanted = tl.map_query(cells, "m", copy=True, train_options={"progress_bar": False})
    assert np.array_equal(mapped.obsm["X_mapped"], wanted.obsm["X_mapped"])
    assert set(mapped.obs["mapped_label"]) <= {"x", "y", "unknown"}
    assert names(folder) == {"cells.h5ad", "m", "new.h5ad", "o.h5ad"}


def test_embed_trains_on_the_fly_as_tl_does(folder, capsys):
    options = ["--seed", "4", "--likelihood", "poisson", "--n-hidden", "16", "--categorical-covariate", "donor"]
    assert main(["embed", "cells.h5ad", "out.h5ad", *COUNTS, *FAST, *options, "--quiet"]) == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")
    adata = make_cells()
    tl.embed(
        adata,
        layer="counts",
        batch_key="batch",
        categorical_covariate_keys=["donor"],
        likelihood="poisson",
        model_options={"n_hidden": 16},
        seed=4,
        train_options={"max_epochs": 2, "progress_bar": False},
    )
    assert np.array_equal(ad.read_h5ad("out.h5ad").obsm["X_cvae"], adata.obsm["X_cvae"])


def test_counterfactual(folder, saved, capsys):
    command = ["counterfactual", "cells.h5ad"]
    assert main([*command, "a.h5ad", "--model-dir", str(saved), "--condition", "batch=2"]) == 0
    assert "a.h5ad: layers['counterfactual'] (batch = 2) and obsm['X_cvae']" in capsys.readouterr().out
    values = ad.read_h5ad("a.h5ad").layers["counterfactual"]
    wanted = model.load(saved).predict_counterfactual(make_cells(), condition={"batch": "2"}, library_size=1e4)
    np.testing.assert_allclose(values, wanted, rtol=1e-4)
    donor = ["--layer", "counts", "--condition", "donor=x", "--library-size", "100", "--key", "as_x"]
    assert main([*command, "b.h5ad", *donor, *FAST]) == 0
    np.testing.assert_allclose(ad.read_h5ad("b.h5ad").layers["as_x"].sum(1), 100, rtol=1e-4)
    assert main([*command, "c.h5ad", "--layer", "counts", "--condition", "donor=z", *FAST]) == 1
    assert "it knows ['x', 'y']" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "c.h5ad", "--condition", "donor"])
    assert "'donor' must be KEY=VALUE" in capsys.readouterr().err
    for more, message in [
        (["--condition", "batch=1", "--condition", "batch=2"], "--condition names a column twice"),
        (["--condition", "n=old", "--continuous-covariate", "n"], "--condition n=old: n is a continuous covariate"),
        (["--condition", "batch=1", "--seed", "-1"], "'-1' is not a whole number, 0 or more"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            main([*command, "c.h5ad", *more])
        assert message in capsys.readouterr().err


def test_correct_trains_on_the_fly(folder):
    source = Path("cells.h5ad").read_bytes()
    assert main(["correct", "cells.h5ad", "out.h5ad", *COUNTS, *FAST, "--key", "new"]) == 0
    out = ad.read_h5ad("out.h5ad")
    assert list(out.uns["new"]["reference"]) == ["1", "2"]
    np.testing.assert_allclose(out.layers["new"].sum(1), 1e4, rtol=1e-4)
    assert Path("cells.h5ad").read_bytes() == source


def test_correct_leaves_out_batches_that_no_cell_has(folder, capsys):
    cells = make_cells()
    cells.obs["batch"] = cells.obs["batch"].cat.add_categories("zzz")
    cells.write_h5ad("more.h5ad")
    assert main(["correct", "more.h5ad", "out.h5ad", *COUNTS, *FAST]) == 0
    assert "(as in 1, 2)" in capsys.readouterr().out
    assert main(["correct", "more.h5ad", "o.h5ad", *COUNTS, "--reference", "zzz"]) == 1
    assert "reference=['zzz'] must be of the batches in obs['batch']: ['1', '2']" in capsys.readouterr().err


def test_correct_leaves_the_matrices_on_disk(folder):
    assert main(["train", "cells.h5ad", "--out", "m", *COUNTS, *FAST]) == 0
    assert main(["correct", "cells.h5ad", "all.h5ad", "--model-dir", "m"]) == 0
    assert main(["correct", "cells.h5ad", "new.h5ad", "--model-dir", "m", "--backed"]) == 0
    whole, new = ad.read_h5ad("all.h5ad"), ad.read_h5ad("new.h5ad")
    assert np.array_equal(new.layers["corrected"], whole.layers["corrected"])
    assert np.array_equal(new.obsm["X_cvae"], whole.obsm["X_cvae"])
    assert new.X is None
    assert list(new.layers) == ["corrected"]
    assert main(["correct", "cells.h5ad", "new.h5ad", "--model-dir", "m", "--backed"]) == 1
    assert main(["correct", "cells.h5ad", "new.h5ad", "--model-dir", "m", "--backed", "--force"]) == 0
    assert names(folder) == {"cells.h5ad", "m", "all.h5ad", "new.h5ad"}


def test_training_goes_on_from_a_checkpoint(folder, capsys):
    arguments = ["train", "cells.h5ad", "--out", "m", *COUNTS, *FAST, "--checkpoint-dir", "state"]
    assert main(arguments) == 0
    assert names(folder / "state") == {"training.safetensors"}
    first = (folder / "m" / "weights.safetensors").read_bytes()
    assert main([*arguments, "--force"]) == 0
    assert (folder / "m" / "weights.safetensors").read_bytes() == first


# errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["fit"], "invalid choice: 'fit'"),
        (["train", "cells.h5ad"], "--out"),
        (["train", "cells.h5ad", "--out", "m", "--max-epochs", "0"], "'0' is not a whole number above 0"),
        (["train", "cells.h5ad", "--out", "m", "--checkpoint-dir", "m/state"], "--checkpoint-dir must not be --out"),
        (["embed", "cells.h5ad", "out.zarr"], "'out.zarr' must end in .h5ad"),
        (["embed", "cells.h5ad", "o.h5ad", "--model-dir", "m", "--batch-key", "b", "--categorical-covariate", "d",
          "--seed", "0"], "--batch-key, --categorical-covariate, --seed: the model in --model-dir"),
        (["correct", "cells.h5ad", "o.h5ad"], "--batch-key is needed"),
        (["map", "cells.h5ad", "o.h5ad"], "are required: --model-dir"),
        (["correct", "cells.h5ad", "o.h5ad", "--model", "vae"], "invalid choice: 'vae'"),
        (["correct", "cells.h5ad", "o.h5ad", "--library-size", "none"], "neither a number above 0 nor 'latent'"),
    ],
)  # fmt: skip
def test_wrong_usage_is_2(folder, capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert names(folder) == {"cells.h5ad"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embed", "none.h5ad", "o.h5ad"], "there is no file none.h5ad."),
        (["embed", ".", "o.h5ad"], ". is a folder, but the input must be a .h5ad file."),
        (["embed", "cells.h5ad", "none/o.h5ad"], "there is no folder none; make it first."),
        (["embed", "cells.h5ad", "cells.h5ad", "--force"], "is the input, which is never overwritten"),
        (["embed", "text.h5ad", "o.h5ad"], "text.h5ad cannot be read as .h5ad: "),
        (["embed", "cells.h5ad", "text.h5ad"], "text.h5ad exists; pass --force"),
        (["embed", "cells.h5ad", "o.h5ad", *COUNTS[:2]], "'cvae' needs a condition: pass batch_key="),
        (["embed", "cells.h5ad", "o.h5ad", "--batch-key", "plate"], "There is no adata.obs['plate']; the columns are"),
        (["embed", "cells.h5ad", "o.h5ad", "--batch-key", "batch"], "adata.X holds values that are not whole numbers"),
        (["embed", "cells.h5ad", "o.h5ad", "--model-dir", "none"], "none is no saved sccvae model"),
        (["embed", "cells.h5ad", "o.h5ad", *COUNTS, "--key", "a/b"], "'a/b' cannot be the key of the results"),
        (["correct", "cells.h5ad", "o.h5ad", *COUNTS, "--key", "a/b"], "'a/b' cannot be the key of the results"),
        (["correct", "cells.h5ad", "o.h5ad", *COUNTS, "--reference", "3"], "must be of the batches in obs['batch']"),
        (["train", "cells.h5ad", "--out", "none/m", *COUNTS], "there is no folder"),
        (["train", "cells.h5ad", "--out", ".", *COUNTS, "--force"], "is not a saved model, so --force does not"),
        (["train", "cells.h5ad", "--out", "text.h5ad", *COUNTS], "text.h5ad exists; pass --force"),
        (["train", "cells.h5ad", "--out", "m", *COUNTS, "--model", "vae"], "'vae' takes no account of ['batch_key']"),
    ],
)
def test_an_error_is_1_and_one_line(folder, capsys, arguments, message):
    Path("text.h5ad").write_text("not HDF5")
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("sccvae: error: ")
    assert message in said.err
    assert said.err.count("\n") == 1
    assert names(folder) == {"cells.h5ad", "text.h5ad"}
    assert Path("text.h5ad").read_text() == "not HDF5"


@pytest.mark.parametrize("arguments", [["embed", "c.zarr", "o.h5ad"], ["train", "c.zarr", "--out", "m"]])
def test_a_zarr_folder_is_to_be_converted(folder, capsys, arguments):
    Path("c.zarr").mkdir()
    assert main([*arguments, *COUNTS]) == 1
    message = "c.zarr is a folder, but the input must be a .h5ad file. Convert it in Python first: `"
    cure = "anndata.read_zarr('c.zarr').write_h5ad('c.h5ad')"
    assert capsys.readouterr().err == f"sccvae: error: {message}{cure}`.\n"
    assert names(folder) == {"cells.h5ad", "c.zarr"}


def test_unexpected_errors_name_their_kind_and_debug_shows_where(folder, capsys, monkeypatch):
    monkeypatch.setattr(tl, "embed", lambda *_, **__: {}.no_such_method())
    assert main(["embed", "cells.h5ad", "o.h5ad"]) == 1
    text = "error: AttributeError: 'dict' object has no attribute 'no_such_method'"
    assert capsys.readouterr().err == f"sccvae: {text} (--debug shows where)\n"
    assert main(["embed", "cells.h5ad", "o.h5ad", "--debug"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert text in said


def test_warnings_are_one_line_and_those_for_developers_are_hidden(folder, capsys, monkeypatch):
    def warn(*_, **__):
        warnings.simplefilter("always")
        warnings.warn("look\nhere", UserWarning, stacklevel=1)
        warnings.warn("will change", FutureWarning, stacklevel=1)
        raise ValueError("end")

    monkeypatch.setattr(tl, "embed", warn)
    main(["embed", "cells.h5ad", "o.h5ad"])
    assert capsys.readouterr().err == "sccvae: warning: look here\nsccvae: error: end\n"
    main(["embed", "cells.h5ad", "o.h5ad", "--debug"])
    assert "FutureWarning: will change" in capsys.readouterr().err


# whole or not at all


def test_force_replaces_and_keeps_the_usual_permissions(folder, saved):
    Path("o.h5ad").write_text("old")
    usual = Path("o.h5ad").stat().st_mode
    assert main(["embed", "cells.h5ad", "o.h5ad", "--model-dir", str(saved), "--force"]) == 0
    assert "X_cvae" in ad.read_h5ad("o.h5ad").obsm
    assert Path("o.h5ad").stat().st_mode == usual
    assert names(folder) == {"cells.h5ad", "o.h5ad"}


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_failure_while_writing_leaves_the_old_file(folder, saved, capsys, monkeypatch, error):
    Path("o.h5ad").write_text("old")

    def write(self, path):
        Path(path).write_text("half")
        raise error

    monkeypatch.setattr(ad.AnnData, "write_h5ad", write)
    code = main(["embed", "cells.h5ad", "o.h5ad", "--model-dir", str(saved), "--force"])
    said = capsys.readouterr().err
    if isinstance(error, OSError):
        assert (code, said) == (1, "sccvae: error: disk full\n")
    else:
        assert (code, said) == (130, "sccvae: interrupted; no output written\n")
    assert Path("o.h5ad").read_text() == "old"
    assert names(folder) == {"cells.h5ad", "o.h5ad"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("training", [True, False])
def test_interrupted_training_writes_nothing_and_goes_on(folder, capsys, monkeypatch, number, code, training):
    loss, calls = sccvae.module.CVAE.loss, []

    def interrupt(self, *args, **kwargs):
        calls.append(self.training)
        if calls[-1] == training and calls.count(True) == 4:  # two steps in an epoch: at the end of the second
            signal.raise_signal(number)
        return loss(self, *args, **kwargs)

    monkeypatch.setattr(sccvae.module.CVAE, "loss", interrupt)
    handler = signal.getsignal(number)
    arguments = ["train", "cells.h5ad", "--out", "m", *COUNTS, "--max-epochs", "3", "--checkpoint-dir", "state"]
    assert main(arguments) == code
    assert "sccvae: interrupted; no output written; run it again to go on from state\n" in capsys.readouterr().err
    assert names(folder) == {"cells.h5ad", "state"}
    assert signal.getsignal(number) is handler
    monkeypatch.undo()
    os.chdir(folder)
    assert main(arguments) == 0
    assert len(model.load("m").history["elbo_train"]) == 3


# demo


def test_demo(folder, capsys, monkeypatch):
    few = datasets.pbmc68k_reduced()[::3, ::5].copy()
    monkeypatch.setattr(datasets, "pbmc68k_reduced", lambda: few.copy())
    monkeypatch.setattr(_demo, "MAX_EPOCHS", 2)
    monkeypatch.setattr(_scatter, "compute_umap", lambda x, **_: x[:, :2])  # compiling it takes 20 s
    assert main(["demo", "--out", "new/results"]) == 0
    said = capsys.readouterr().out
    for text in ("batches mixed", "accuracy of neighbours", "Correlation with the truth", "profiles of cell types"):
        assert text in said
    assert names(folder / "new" / "results") == {"demo.h5ad", "umap.png", "history.png", "plate.png"}
    adata = ad.read_h5ad("new/results/demo.h5ad")
    assert {"X_pca", "X_pca_umap", "X_cvae", "X_cvae_umap"} <= set(adata.obsm)
    assert {"counts", "truth", "corrected"} == set(adata.layers)
    assert not [key for key in [*adata.obs, *adata.uns, *adata.obsm] if "scvi" in key]
    assert _demo.table(adata) in said
    assert "likelihood" not in adata.uns["X_cvae"]["params"]["model"]  # the model's own default


def test_demo_table_of_perfect_correction():
    """Where the truth itself is given as corrected, its correlations are 1 and those of the counts are not."""
    adata = datasets.plant_batch_effect(datasets.pbmc68k_reduced()[:, ::5].copy(), strength=1.0)
    adata.layers["corrected"] = _demo._per_10k(adata.layers["truth"])
    adata.obsm["X_pca"] = adata.obsm["X_cvae"] = adata.X[:, :50].toarray()
    lines = {line[:38].strip(): line[38:].split() for line in _demo.table(adata).splitlines()}
    for name in ("profiles of cell types in batch1", "genes, single cells (*)"):
        before, after, truth = map(float, lines[name])
        assert after == truth == 1
        assert 0.5 < before < 0.99
    assert len(set(lines["genes, cells against their type"][1:])) == 1
    before, after, truth = map(float, lines["batches mixed (1: as at random)"])
    assert before == after < truth
    assert truth == pytest.approx(1, abs=0.05)


def test_temporary_files_lie_beside_the_output(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(ad.AnnData, "write_h5ad", lambda self, path: (seen.append(Path(path)), Path(path).touch()))
    cli.write_h5ad(make_cells(), folder / "o.h5ad")
    assert seen[0].parent.parent == folder
    assert names(folder) == {"cells.h5ad", "o.h5ad"}
