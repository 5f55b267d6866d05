"""Models on disk: the same bits in a new process, nothing foreign is read, nothing is half written."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from _models import FAST, TINY
from _toys import toy_counts, toy_values
from safetensors.torch import load_file, save_file

import sccvae
from sccvae import model as models
from sccvae.distributions import NegativeBinomial, Normal
from sccvae.model import AE, CVAE, VAE, _saving

FIXTURES = Path(__file__).parent / "fixtures"


def make(cls=CVAE, adata=None, setup=None, **options):
    adata = toy_counts() if adata is None else adata
    cls.setup_anndata(adata, **({"batch_key": "batch"} if setup is None else setup))
    model = cls(adata, **(TINY | options))
    model.train(**FAST)
    return model


@pytest.fixture(scope="module")
def trained():
    return make()


@pytest.fixture
def saved(trained, tmp_path):
    trained.save(tmp_path / "model")
    return tmp_path / "model"


def files_of(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


# Round trip


def test_a_new_process_gives_the_same_bits(trained, tmp_path):
    adata = trained.adata.copy()
    del adata.uns, adata.obs["_scvi_batch"]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    autoencoder = make(AE, toy_values())
    toy_values().write_h5ad(tmp_path / "values.h5ad")
    trained.save(tmp_path / "cvae")
    autoencoder.save(tmp_path / "ae")
    script = """
import anndata, numpy, sccvae
for name, data in (("cvae", "cells.h5ad"), ("ae", "values.h5ad")):
    adata = anndata.read_h5ad(data)
    model = sccvae.model.load(name)
    numpy.save(name + ".npy", model.get_latent_representation(adata))
    numpy.save(name + "-error.npy", model.get_reconstruction_error(adata, return_mean=False))
"""
    root = Path(sccvae.__file__).parents[1]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        check=True,
        env={**os.environ, "PYTHONPATH": path, **threads},
        timeout=200,
    )
    for name, model in (("cvae", trained), ("ae", autoencoder)):
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), model.get_latent_representation())
        found = np.load(tmp_path / f"{name}-error.npy")
        assert np.array_equal(found, model.get_reconstruction_error(return_mean=False))


def test_everything_comes_back(trained, saved):
    for loaded in (
        CVAE.load(saved),
        CVAE.load(str(saved)),
        models.load(saved),
        models.load(saved, trained.adata.copy()),
    ):
        assert type(loaded) is CVAE
        assert loaded.settings == trained.settings
        assert loaded.seed == trained.seed
        assert loaded.is_trained
        assert loaded.history.keys() == trained.history.keys()
        for name, frame in trained.history.items():
            pd.testing.assert_frame_equal(loaded.history[name], frame, check_index_type=False)
        for part in ("train_indices", "validation_indices", "test_indices"):
            assert np.array_equal(getattr(loaded, part), getattr(trained, part))
        state, wanted = loaded.module.state_dict(), trained.module.state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[k], wanted[k]) for k in wanted)
        assert not loaded.module.training
        assert loaded.get_elbo(trained.adata) == trained.get_elbo()
        assert loaded.get_marginal_ll(trained.adata, n_mc_samples=5) == trained.get_marginal_ll(n_mc_samples=5)
        assert (loaded.sample(9).X != trained.sample(9).X).nnz == 0
        frame = loaded.get_normalized_expression(trained.adata, transform_batch="b")
        pd.testing.assert_frame_equal(frame, trained.get_normalized_expression(transform_batch="b"))


def test_only_plain_files_are_written(saved):
    assert sorted(files_of(saved)) == ["README.md", "model.json", "weights.safetensors"]
    content = json.loads((saved / "model.json").read_text())
    assert content["format"] == 2
    assert content["class"] == "CVAE"
    assert content["sccvae_version"] == sccvae.__version__
    assert load_file(saved / "weights.safetensors")
    assert not list(saved.parent.glob(".*"))
    modes = {f.stat().st_mode for f in saved.iterdir()}
    assert len(modes) == 1  # the weights are no more private than the description


CASES = {
    "ae": (AE, toy_values, {"linear": True}, {}),
    "vae": (VAE, toy_values, {"likelihood": Normal(sigma="shared", min_sigma=0.1), "skip": True, "n_layers": 2}, {}),
    "bernoulli": (VAE, toy_values, {"likelihood": "bernoulli", "kl": "monte_carlo", "n_samples": 2}, {}),
    "learned": (
        CVAE,
        toy_counts,
        {"prior": "learned"},
        {"batch_key": "batch", "categorical_covariate_keys": ["treated"]},
    ),
    "gene-batch": (CVAE, toy_counts, {"likelihood": NegativeBinomial(dispersion="gene-batch")}, {"batch_key": "batch"}),
    "continuous": (CVAE, toy_counts, {}, {"batch_key": "batch", "continuous_covariate_keys": ["dose"]}),
    "size factor": (CVAE, toy_counts, {}, {"batch_key": "batch", "size_factor_key": "size"}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_model_comes_back(case, tmp_path):
    cls, data, options, setup = CASES[case]
    model = make(cls, data(), setup, **options)
    model.save(tmp_path / "model")
    loaded = models.load(tmp_path / "model", data())
    assert np.array_equal(loaded.get_latent_representation(), model.get_latent_representation())
    assert loaded.get_reconstruction_error() == model.get_reconstruction_error()
    options = {"library_size": "latent"} if model.module.likelihood.support == "counts" else {}
    pd.testing.assert_frame_equal(
        loaded.get_normalized_expression(**options), model.get_normalized_expression(**options)
    )
    if case == "learned":
        centers, wanted = CVAE.load(tmp_path / "model").prior_centers(), model.prior_centers()
        assert (centers.X != wanted.X).nnz == 0
        assert centers.obs.equals(wanted.obs)


@pytest.mark.parametrize(
    "known",
    [[0, 1], [10, 2], ["0", "1"], [False, True], [0.5, 1.5], ["é", "日本"]],
    ids=["int", "unsorted", "str", "bool", "float", "unicode"],
)
@pytest.mark.parametrize("key", ["batch_key", "categorical_covariate_keys"])
def test_categories_come_back_with_their_type(known, key, tmp_path):
    adata = toy_counts()
    adata.obs["k"] = np.array(known)[np.arange(48) % 2]
    model = make(CVAE, adata, {key: "k" if key == "batch_key" else ["k"]})
    model.save(tmp_path / "model")
    loaded = CVAE.load(tmp_path / "model")
    assert loaded.schema.categories["k"].tolist() == model.schema.categories["k"].tolist()
    assert loaded.schema.categories["k"].dtype == model.schema.categories["k"].dtype
    assert np.array_equal(loaded.get_latent_representation(adata), model.get_latent_representation())
    assert set(loaded.sample(20).obs["k"]) == set(known)
    attached = CVAE.load(tmp_path / "model", adata.copy())
    assert np.array_equal(attached.get_latent_representation(), model.get_latent_representation())


def test_train_more_after_loading(trained, saved, tmp_path):
    fresh = toy_counts()
    loaded = CVAE.load(saved, fresh)
    assert loaded.adata is fresh
    before = loaded.get_latent_representation()
    loaded.train(**FAST)
    assert not np.array_equal(loaded.get_latent_representation(), before)
    loaded.save(tmp_path / "more")
    again = CVAE.load(tmp_path / "more", toy_counts())
    assert np.array_equal(again.get_latent_representation(), loaded.get_latent_representation())
    twin = CVAE.load(saved, toy_counts())  # the same continuation, the same bits
    twin.train(**FAST)
    assert np.array_equal(twin.get_latent_representation(), loaded.get_latent_representation())


def test_attached_data_may_have_other_cells_and_gene_order(trained, saved):
    cells = trained.adata[:10, ::-1].copy()
    loaded = CVAE.load(saved, cells)
    assert np.array_equal(loaded.get_latent_representation(), trained.get_latent_representation(cells))
    loaded.train(**FAST)
    one = trained.adata[trained.adata.obs["batch"] == "b"].copy()  # a category is missing: codes stay those of training
    assert np.array_equal(CVAE.load(saved, one).get_latent_representation(), trained.get_latent_representation(one))


def test_attached_data_must_fit(trained, saved):
    with pytest.raises(ValueError, match=r"2 of the model's 12 genes are missing"):
        CVAE.load(saved, toy_counts(n_genes=10))
    with pytest.raises(ValueError, match=r"13 genes, the model 12: subset it first"):
        CVAE.load(saved, toy_counts(n_genes=13))
    other = toy_counts()
    other.obs["batch"] = "c"
    with pytest.raises(ValueError, match=r"obs\['batch'\] is \['c'\].*it knows \['a', 'b'\]"):
        CVAE.load(saved, other)
    with pytest.raises(ValueError, match="view"):
        CVAE.load(saved, toy_counts()[:20])
    del other.obs["batch"]
    with pytest.raises(KeyError, match="batch"):
        CVAE.load(saved, other)


def test_attached_data_are_not_warned_of(tmp_path):
    """What a set-up is warned of is about the training data: of a part of them donors can be those of the batches."""
    adata, setup = toy_counts(), {"batch_key": "batch", "categorical_covariate_keys": ["donor"]}
    make(adata=adata, setup=setup).save(tmp_path / "model")
    part = adata[((adata.obs["batch"] == "a") == (adata.obs["donor"] == "d1")).to_numpy()].copy()
    with pytest.warns(UserWarning, match="donor"):
        CVAE.setup_anndata(part.copy(), **setup)
    assert CVAE.load(tmp_path / "model", part).adata is part


def test_without_data_the_methods_say_what_to_do(saved):
    loaded = CVAE.load(saved)
    for name in ("get_latent_representation", "get_normalized_expression", "get_elbo"):
        with pytest.raises(ValueError, match="loaded without data; pass adata="):
            getattr(loaded, name)()
    with pytest.raises(ValueError, match=r"loaded without data.*CVAE.load\(folder, adata=adata\)"):
        loaded.train()


def test_an_untrained_model_stays_untrained(tmp_path):
    adata = toy_counts()
    VAE.setup_anndata(adata)
    VAE(adata, **TINY).save(tmp_path / "model")
    loaded = VAE.load(tmp_path / "model", toy_counts())
    assert not loaded.is_trained
    assert loaded.history is None
    with pytest.warns(UserWarning, match="untrained"):
        loaded.get_latent_representation()


def test_loading_leaves_the_global_random_state_alone(saved):
    before = torch.random.get_rng_state()
    CVAE.load(saved)
    assert torch.equal(torch.random.get_rng_state(), before)


# Refusals: nothing that could run code is read


class Bomb:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def pickled():
    return pickle.dumps(Bomb())


@pytest.mark.parametrize("name", ["model.pt", "attr.pkl", "weights.safetensors.bak", ".hidden"])
def test_a_foreign_file_is_refused(name, saved, monkeypatch):
    monkeypatch.chdir(saved)
    (saved / name).write_bytes(pickled())
    for load in (CVAE.load, models.load):
        with pytest.raises(ValueError, match=rf"not part of a sccvae model: \['{name}'\].*Nothing was loaded"):
            load(saved)
    assert not (saved / "pwned").exists()


def test_a_foreign_folder_is_refused(saved):
    (saved / "more").mkdir()
    with pytest.raises(ValueError, match=r"not part of a sccvae model: \['more'\]"):
        CVAE.load(saved)


@pytest.mark.parametrize("name", ["weights.safetensors", "model.json"])
@pytest.mark.parametrize(
    "content", [pickled(), b"", b"{}", b"[1]", b"\x00" * 40], ids=["pickle", "empty", "{}", "list", "zeros"]
)
def test_a_pickle_or_rubbish_under_our_names_is_refused(name, content, saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    (saved / name).write_bytes(content)
    for load in (CVAE.load, models.load):
        with pytest.raises(ValueError, match=rf"{name} is damaged"):
            load(saved)
    assert not (saved.parent / "pwned").exists()


def edit(saved, **changes):
    content = json.loads((saved / "model.json").read_text()) | changes
    (saved / "model.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


@pytest.mark.parametrize(
    "missing", ["class", "settings", "registry", "reference", "history", "splits", "seed", "trained"]
)
def test_an_incomplete_description_is_refused(missing, saved):
    edit(saved, **{missing: None})
    with pytest.raises(ValueError, match=rf"model.json is damaged.*{missing}"):
        models.load(saved)


def test_weights_of_another_model_are_refused(saved):
    weights = load_file(saved / "weights.safetensors")
    name = "encoder.loc.weight"
    for changed in (weights | {name: torch.zeros(3)}, {k: v for k, v in weights.items() if k != name}):
        save_file(changed, saved / "weights.safetensors")
        with pytest.raises(ValueError, match=r"weights.safetensors is damaged or does not belong to model.json"):
            CVAE.load(saved)


def test_a_newer_format_is_refused(saved):
    edit(saved, format=3, sccvae_version="9.9")
    wanted = rf"format 3 \(sccvae 9.9\); this sccvae {sccvae.__version__} reads formats 1 and 2"
    with pytest.raises(ValueError, match=wanted):
        CVAE.load(saved)


def test_another_class_is_refused(saved):
    with pytest.raises(ValueError, match=r"holds a CVAE; use sccvae.model.CVAE.load or sccvae.model.load"):
        VAE.load(saved)


@pytest.mark.parametrize("name", ["GMVAE9", "BaseModel", "load", "__builtins__", "_saving", ["CVAE"]])
def test_an_unknown_class_is_refused(name, saved):
    edit(saved, **{"class": name})
    with pytest.raises(ValueError, match="which this sccvae does not have"):
        models.load(saved)


def test_no_model_there(tmp_path, saved):
    for folder in (tmp_path / "nothing", tmp_path):
        with pytest.raises(
            FileNotFoundError, match=r"no saved sccvae model: it needs model.json and weights.safetensors"
        ):
            CVAE.load(folder)
    (saved / "weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no saved sccvae model"):
        models.load(saved)


def test_names_of_scvi_tools(trained, saved, tmp_path):
    assert CVAE.load(dir_path=saved, adata=False).adata is None
    assert models.load(saved, adata=False).adata is None
    with pytest.raises(TypeError, match="adata must be an AnnData object, not str"):
        CVAE.load(saved, "cells.h5ad")
    with pytest.raises(TypeError, match=r"save\(\) has no argument 'save_anndata': cells are not saved"):
        trained.save(tmp_path / "other", save_anndata=True)
    for load in (CVAE.load, models.load):
        with pytest.raises(TypeError, match=r"load\(\) has no argument 'device': .*to_device"):
            load(saved, device="cpu")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "model.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"\['model.pt'\], a model of scvi-tools, which sccvae cannot read"):
        models.load(tmp_path / "theirs")


# Whole or not at all


def test_overwriting(trained, saved):
    before = files_of(saved)
    with pytest.raises(FileExistsError, match=r"exists; pass overwrite=True"):
        trained.save(saved)
    assert files_of(saved) == before
    other = make(seed=5)
    other.save(saved, overwrite=True)
    assert files_of(saved) != before
    assert CVAE.load(saved).seed == 5
    assert [f.name for f in saved.parent.iterdir()] == ["model"]


def test_what_is_no_model_is_never_overwritten(trained, saved, tmp_path):
    (saved / "notes.txt").write_text("mine")
    before = files_of(saved)
    file = tmp_path / "file"
    file.write_text("mine too")
    for target in (saved, file):
        with pytest.raises(FileExistsError, match=r"holds other things than a saved model, so it is not replaced"):
            trained.save(target, overwrite=True)
    assert files_of(saved) == before
    assert file.read_text() == "mine too"


def test_the_parent_folder_must_exist(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        trained.save(tmp_path / "nowhere" / "model")


def failing(error, original, after=0):
    """``original``, but its call number ``after`` raises."""
    calls = itertools.count()

    def call(*args, **kwargs):
        if next(calls) == after:
            raise error
        return original(*args, **kwargs)

    return call


FAILURES = {
    "weights": ("save_file", 0, OSError("disk full")),
    "ctrl-c": ("save_file", 0, KeyboardInterrupt()),
    "moving the old away": ("os.replace", 0, OSError("busy")),
    "moving the new in": ("os.replace", 1, OSError("busy")),
    "ctrl-c between the moves": ("os.replace", 1, KeyboardInterrupt()),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_overwrite_leaves_the_old_model_whole(failure, trained, saved, monkeypatch):
    name, after, error = FAILURES[failure]
    before = files_of(saved)
    with monkeypatch.context() as patch:
        original = os.replace if name == "os.replace" else _saving.save_file
        patch.setattr(f"sccvae.model._saving.{name}", failing(error, original, after))
        with pytest.raises(type(error)):
            trained.save(saved, overwrite=True)
    assert files_of(saved) == before
    assert [f.name for f in saved.parent.iterdir()] == ["model"]
    CVAE.load(saved)


def test_a_failed_first_save_leaves_nothing(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(_saving, "save_file", failing(OSError("disk full"), None))
    with pytest.raises(OSError, match="disk full"):
        trained.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_what_json_cannot_hold_is_refused_and_leaves_nothing(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(trained, "registry_", {**trained.registry_, "odd": object()})
    with pytest.raises(TypeError, match="Cannot save a value of type object"):
        trained.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


# Format 1, as written by version 0.1


def test_a_model_of_format_1_is_read():
    sys.path.insert(0, str(FIXTURES))
    try:
        from make_model_v1 import cells_v1
    finally:
        sys.path.remove(str(FIXTURES))
    expected = json.loads((FIXTURES / "model_v1_expected.json").read_text())
    assert sum(len(c) for c in files_of(FIXTURES / "model_v1").values()) < 20_000
    adata = cells_v1()
    model = models.load(FIXTURES / "model_v1")
    np.testing.assert_allclose(model.get_latent_representation(adata), expected["latent"], rtol=1e-4, atol=1e-5)
    decoded = model.get_normalized_expression(adata, transform_batch="A", library_size=100, return_numpy=True)
    np.testing.assert_allclose(decoded, expected["decoded"], rtol=1e-4)
    assert model.get_elbo(adata) == pytest.approx(expected["elbo"], rel=1e-4)
    assert model.schema.categories["site"].tolist() == ["A", "B-côté"]
    assert model.schema.categories["plate"].tolist() == [0, 1, 2]
    attached = models.load(FIXTURES / "model_v1", adata)
    attached.train(1, batch_size=6, accelerator="cpu", progress_bar=False)
