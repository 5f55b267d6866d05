"""The GMVAE on AnnData: clusters and what is read from them, labels, guides, saving, resuming."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
import pytest
import torch
from _training import Raise
from anndata import AnnData
from lightning import Callback
from lightning.pytorch.callbacks import EarlyStopping
from scipy.stats import multivariate_normal

from sccvae import datasets, metrics
from sccvae.model import GMVAE, load
from sccvae.train import mixture

FAST = {"progress_bar": False, "accelerator": "cpu", "batch_size": 32, "lr": 3e-3}
TINY = {"likelihood": "normal", "n_latent": 5, "n_hidden": 32, "n_w": 2}


def make_cells(n_per_group: int = 30):
    """Five classes under two conditions; ``some`` holds the class of every fifth cell, else NaN or "Unknown"."""
    adata = datasets.blobs(n_per_group=n_per_group)
    some = adata.obs["class"].astype(object)
    rest = np.arange(adata.n_obs) % 5
    some[rest > 0] = np.nan
    some[rest == 1] = "Unknown"
    adata.obs["some"] = some
    return adata


def make(adata, *, setup=None, train=True, max_epochs=2, guide=None, **options) -> GMVAE:
    GMVAE.setup_anndata(adata, **({"batch_key": "condition"} if setup is None else setup))
    model = GMVAE(adata, **TINY | options)
    if train:
        model.train(max_epochs=max_epochs, guide=guide, **FAST)
    return model


@pytest.fixture(scope="module")
def gmvae() -> GMVAE:
    """Five components, trained until they are the classes."""
    return make(make_cells(), max_epochs=30, n_components=5)


@pytest.fixture(scope="module")
def taught() -> GMVAE:
    """Semi-supervised; the number of components was chosen by the training."""
    setup = {"batch_key": "condition", "labels_key": "some", "unlabeled_category": "Unknown"}
    return make(make_cells(), setup=setup, max_epochs=30)


# what is read from the clusters


def test_the_classes_are_found(gmvae):
    assert metrics.clustering(gmvae.adata.obs["class"], gmvae.predict())["ari"] > 0.9


def test_predictions_agree_with_each_other(gmvae):
    names = ["0", "1", "2", "3", "4"]
    hard, soft, q = gmvae.predict(), gmvae.predict(soft=True), gmvae.predict_proba()
    assert (hard.name, list(hard.cat.categories)) == ("gmvae", names)
    assert list(hard.index) == list(soft.index) == list(gmvae.adata.obs_names)
    assert (list(soft.columns), soft.to_numpy().dtype) == (names, np.float32)
    np.testing.assert_array_equal(soft, q)
    np.testing.assert_allclose(q.sum(1), 1, atol=1e-5)
    np.testing.assert_array_equal(hard.astype(int), q.argmax(1))
    rows = [7, 3, 11]
    assert list(gmvae.predict(indices=rows).index) == list(gmvae.adata.obs_names[rows])
    np.testing.assert_allclose(gmvae.predict_proba(indices=rows, batch_size=2), q[rows], atol=1e-6)
    mask = np.zeros(300, dtype=bool)
    mask[rows] = True
    np.testing.assert_allclose(gmvae.predict_proba(indices=mask), q[sorted(rows)], atol=1e-6)


def test_entropy_and_effective_number(gmvae):
    q = gmvae.predict_proba().astype(float)
    found = gmvae.get_entropy()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, -(q * np.log(np.maximum(q, 1e-12))).sum(1), atol=1e-5)
    assert (found >= -1e-6).all()
    assert (found <= np.log(5) + 1e-5).all()
    share = q.mean(0)
    assert gmvae.effective_n_components() == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-5)
    assert 1 <= gmvae.effective_n_components(indices=[0]) <= gmvae.effective_n_components() <= 5


def test_components_lie_amid_their_cells(gmvae):
    mean, variance = gmvae.get_components()
    assert mean.shape == variance.shape == (5, 5)
    assert list(mean.index) == gmvae.component_names
    assert (variance.to_numpy() > 0).all()
    z, found = gmvae.get_latent_representation(), gmvae.predict()
    distance = np.linalg.norm(z[:, None] - mean.to_numpy(), axis=2)
    assert (distance.argmin(1) == found.astype(int)).mean() > 0.9


def test_outlier_score_is_the_density_of_the_mixture(gmvae):
    score = gmvae.get_outlier_score()
    assert (score.dtype, score.shape) == (np.float32, (300,))
    module = gmvae.module
    with torch.no_grad():
        (batch,) = gmvae._stream(None, range(3))
        q = module.inference(batch)
        p = module.components(q["w"].loc)
    for i in range(3):
        parts = [
            multivariate_normal.pdf(q["z"].loc[i], p.loc[i, k].numpy(), np.diag(p.variance[i, k].numpy()))
            for k in range(5)
        ]
        assert score[i] == pytest.approx(-np.log(np.mean(parts)), rel=1e-3)
    strange = gmvae.adata.copy()
    strange.X = strange.X + 30
    assert gmvae.get_outlier_score(strange).min() > np.median(score)


def test_components_merge_step_by_step(gmvae):
    levels = gmvae.merge_components()
    assert list(levels.columns) == [1, 2, 3, 4, 5]
    assert list(levels.nunique()) == [1, 2, 3, 4, 5]
    for n in (1, 2, 3, 4):  # each level joins groups of the one below
        assert (levels.groupby(n + 1)[n].nunique() == 1).all()
    one = gmvae.merge_components(3)
    assert list(one.columns) == [3]
    mapped = gmvae.predict().map(one[3])
    assert mapped.nunique() <= 3
    for wrong, message in {0: "at least 1", 6: "between 1 and the number of components, 5"}.items():
        with pytest.raises(ValueError, match=f"n_clusters={wrong} must be {message}"):
            gmvae.merge_components(wrong)
    with pytest.raises(TypeError, match="n_clusters='3' must be a whole number"):
        gmvae.merge_components("3")


def test_samples_of_a_component_are_of_its_class(gmvae):
    truth = pd.crosstab(gmvae.predict(), gmvae.adata.obs["class"])
    for name in gmvae.component_names:
        made = gmvae.sample(40, component=name, batch="treated", seed=1)
        assert set(made.obs["component"]) == {name}
        assert set(made.obs["condition"]) == {"treated"}
        again = gmvae.predict(made)
        assert (again == name).mean() > 0.6, truth
    assert gmvae.sample(3, component=int(gmvae.component_names[1])).obs["component"].eq("1").all()
    for made in (gmvae.sample(5, seed=2), gmvae.sample(5, seed=2)):
        np.testing.assert_array_equal(made.X, gmvae.sample(5, seed=2).X)
    with pytest.raises(ValueError, match=r"component='9' is not one of \['0', '1'"):
        gmvae.sample(2, component="9")
    with pytest.raises(ValueError, match="n=0 must be at least 1"):
        gmvae.sample(0)


def test_components_are_drawn_as_often_as_in_the_training_data(gmvae):
    drawn = gmvae.sample(2_000).obs["component"].value_counts(normalize=True, sort=False)
    expected = gmvae.predict_proba(indices=gmvae.train_indices).mean(0)
    np.testing.assert_allclose(gmvae.reference["component_shares"], expected, rtol=1e-4)
    np.testing.assert_allclose(drawn, expected, atol=0.04)


def test_correction_moves_cells_to_the_other_condition(gmvae):
    adata = gmvae.adata
    treated = (adata.obs["condition"] == "treated").to_numpy()
    to = gmvae.get_normalized_expression(transform_batch="control", return_numpy=True)
    own = gmvae.get_normalized_expression(return_numpy=True)
    shift = adata.uns["blobs"]["condition_shift"]
    np.testing.assert_allclose(to[~treated], own[~treated], atol=1e-5)
    moved = (own[treated] - to[treated]).mean(0)
    assert moved @ shift / (shift @ shift) > 0.5
    with pytest.raises(ValueError, match="drug"):
        gmvae.get_normalized_expression(transform_batch="drug")


def test_importance_bound_is_above_the_elbo(gmvae):
    rows = gmvae.validation_indices
    few = gmvae.get_marginal_ll(indices=rows, n_mc_samples=1)
    many = gmvae.get_marginal_ll(indices=rows, n_mc_samples=200)
    assert np.isfinite([few, many]).all()
    assert many > few
    assert many > gmvae.get_elbo(indices=rows)
    assert gmvae.get_marginal_ll(indices=rows[:3], n_mc_samples=5, return_mean=False).shape == (3,)


# labels


def test_labels_name_components_and_reach_all_cells(taught):
    assert taught.classes == taught.component_names == list("ABCDE")
    assert taught.n_components == taught.settings["n_components"] == 5
    found, truth = taught.predict().astype(str), taught.adata.obs["class"].astype(str)
    assert (found == truth)[taught.adata.obs["some"].isin(list("ABCDE"))].all()
    assert (found == truth).mean() > 0.95


def test_cells_without_the_labels_column_are_predicted(taught):
    new = datasets.blobs(n_per_group=5, seed=1)
    new.X = taught.adata.X[: new.n_obs].copy()
    new.obs["condition"] = taught.adata.obs["condition"].to_numpy()[: new.n_obs]
    np.testing.assert_allclose(taught.predict_proba(new), taught.predict_proba()[: new.n_obs], atol=1e-6)


def test_more_components_than_classes_take_numbers():
    model = make(make_cells(), setup={"labels_key": "some", "unlabeled_category": "Unknown"}, n_components=7)
    assert model.component_names == [*"ABCDE", "5", "6"]
    assert set(model.predict(soft=True).columns) == set(model.component_names)


def test_components_without_a_class_take_numbers_that_no_class_has():
    adata = make_cells()
    adata.obs["class"] = adata.obs["class"].astype("category").cat.codes.astype(str).replace({"0": "5", "4": "6"})
    model = make(adata, setup={"labels_key": "class"}, n_components=7)
    assert model.component_names == ["1", "2", "3", "5", "6", "7", "8"]
    assert model.predict(soft=True).columns.is_unique
    assert set(model.predict().cat.categories) == set(model.component_names)
    assert set(model.sample(5, component="5").obs["component"]) == {"5"}


def test_no_component_is_refused():
    with pytest.raises(ValueError, match="n_components=0 must be at least 1"):
        make(make_cells(), n_components=0, train=False)


def test_the_weight_of_the_divergences_is_not_that_of_the_labels(taught):
    """A class that is known is learned as well with a tiny KL weight."""
    adata = make_cells()
    setup = {"batch_key": "condition", "labels_key": "some", "unlabeled_category": "Unknown"}
    model = make(adata, setup=setup, train=False)
    model.train(max_epochs=30, kl_weight=0.01, **FAST)
    found = [(m.predict().astype(str) == adata.obs["class"].astype(str)).mean() for m in (taught, model)]
    assert min(found) > 0.9


class Strike(Callback):
    """Ctrl-C or a long wait where a phase begins or an epoch ends."""

    def __init__(self, stage, hook, what):
        self.stage, self.what = stage, what
        setattr(self, hook, self._strike)

    def _strike(self, trainer, pl_module):
        if pl_module.module.stage == self.stage and not pl_module.rows:
            self.what()


def ctrl_c():
    raise KeyboardInterrupt


def test_time_is_that_of_all_phases_and_a_resumed_training_is_the_same(tmp_path):
    adata = make_cells()
    options = FAST | {"max_epochs": 4, "checkpoint_dir": tmp_path}
    for stage, phases in (("warmup", {0.0}), ("mixture", {0.0, 1.0, 2.0})):
        model = make(adata, train=False, n_components=5)
        slow = Strike(stage, "on_train_epoch_start", lambda: time.sleep(2.1))
        model.train(callbacks=[slow], max_time={"seconds": 2}, **options)
        assert set(model.history["phase"]["phase"]) == phases
    rest, whole = (make(adata, train=False, n_components=5) for _ in range(2))
    rest.train(**options)
    whole.train(max_epochs=4, **FAST)
    assert all(torch.equal(v, rest.module.state_dict()[k]) for k, v in whole.module.state_dict().items())
    assert set(rest.history) == set(whole.history)
    for name, frame in whole.history.items():
        pd.testing.assert_frame_equal(rest.history[name], frame)


@pytest.mark.parametrize("where", ["between", "at the end of an epoch"])
def test_ctrl_c_wherever_it_strikes(where, monkeypatch):
    model = make(make_cells(), train=False, n_components=5)
    if where == "between":
        monkeypatch.setattr(mixture, "_moments", lambda *_: ctrl_c())
        model.train(max_epochs=3, **FAST)
    else:
        strike = Strike("mixture", "on_train_epoch_end", ctrl_c)
        model.train(max_epochs=3, callbacks=[strike], **FAST)
    assert model.is_trained
    assert len(model.history["elbo_train"]) >= 3
    assert np.isfinite(model.get_latent_representation()).all()


def test_lightnings_early_stopping_is_of_the_warm_up():
    model = make(make_cells(), train=False, n_components=5)
    stop = EarlyStopping("elbo_validation", patience=1, min_delta=1e6)
    model.train(max_epochs=8, callbacks=[stop], **FAST)
    phases = model.history["phase"]["phase"].value_counts()
    assert phases[0.0] == 2
    assert phases[2.0] > 2


def test_a_checkpoint_is_of_one_guide_and_one_set_of_labels(tmp_path):
    adata = make_cells()
    adata.obs["other"] = np.arange(adata.n_obs) % 5
    options = FAST | {"max_epochs": 2, "checkpoint_dir": tmp_path}
    make(adata, train=False, n_components=5).train(guide="class", **options)
    for guide in ("other", None):
        with pytest.raises(ValueError, match=r"other settings .*model's guide"):
            make(adata, train=False, n_components=5).train(guide=guide, **options)
    with pytest.raises(ValueError, match=r"other settings .*model's setup"):
        make(adata, train=False, n_components=5, setup={"labels_key": "other"}).train(**options)


def test_a_loaded_model_chooses_the_number_again(tmp_path):
    adata = make_cells()
    model = make(adata, train=False)
    model.train(max_epochs=3, checkpoint_dir=tmp_path / "run", **FAST)
    model.save(tmp_path / "m")
    again = load(tmp_path / "m", adata)
    again.train(max_epochs=3, checkpoint_dir=tmp_path / "run", **FAST)
    assert all(torch.equal(v, again.module.state_dict()[k]) for k, v in model.module.state_dict().items())
    assert again._choose_components


def test_a_training_that_fails_leaves_the_split():
    model = make(make_cells())
    before = model.train_indices
    with pytest.raises(ValueError, match="learning rate"):
        model.train(max_epochs=1, seed=5, **FAST | {"lr": -1.0})
    assert model.train_indices is before


def test_a_training_that_chose_the_number_of_components_can_be_called_again(tmp_path):
    adata = make_cells()
    model = make(adata, train=False)
    for _ in range(2):
        model.train(max_epochs=3, checkpoint_dir=tmp_path, **FAST)
        weights = {k: v.clone() for k, v in model.module.state_dict().items()}
    fresh = make(adata, train=False)
    fresh.train(max_epochs=3, checkpoint_dir=tmp_path, **FAST)
    assert model.n_components == fresh.n_components > 1
    assert all(torch.equal(v, weights[k]) for k, v in fresh.module.state_dict().items())


def test_labels_that_cannot_be_used_raise():
    adata = make_cells(6)
    GMVAE.setup_anndata(adata, labels_key="class")
    with pytest.raises(ValueError, match=r"n_components=4, but adata.obs\['class'\] has 5 classes .* Raise"):
        GMVAE(adata, n_components=4, **TINY)
    adata.obs["none"] = np.nan
    with pytest.raises(ValueError, match=r"obs\['none'\] has no label at all"):
        GMVAE.setup_anndata(adata, labels_key="none")
    adata.obs["none"] = "Unknown"
    with pytest.raises(ValueError, match="has no label at all: 60 of 60 cells are 'Unknown'"):
        GMVAE.setup_anndata(adata, labels_key="none", unlabeled_category="Unknown")


def test_a_label_that_was_not_there_at_the_setup_raises():
    adata = make_cells(6)
    model = make(adata, setup={"labels_key": "some", "unlabeled_category": "Unknown"}, train=False)
    adata.obs["some"] = "F"
    with pytest.raises(ValueError, match=r"holds \['F'\], which are not among the classes of the model: \['A', 'B'"):
        model.train(max_epochs=1, **FAST)


# guides


def test_a_guide_starts_the_clusters_also_with_gaps():
    adata = make_cells()
    guide = adata.obs["class"].astype(object)
    guide[np.arange(adata.n_obs) % 2 == 0] = np.nan
    model = make(adata, max_epochs=20, guide=guide)
    assert model.n_components == 5  # as many as the guide has
    assert model.component_names == ["0", "1", "2", "3", "4"]  # a guide gives no names
    expected = adata.obs["class"].cat.codes.astype(str)
    assert (model.predict().astype(str) == expected).mean() > 0.9


def test_a_guide_is_a_column_or_an_array():
    adata = make_cells(6)
    model = make(adata, train=False)
    codes = adata.obs["class"].cat.codes.to_numpy()
    for guide in ("class", adata.obs["class"], adata.obs["class"].to_numpy(), list(codes)):
        np.testing.assert_array_equal(model._guide_labels(guide), codes)
    holes = np.where(codes == 2, np.nan, codes)
    np.testing.assert_array_equal(model._guide_labels(holes), [[0, 1, -1, 2, 3][c] for c in codes])
    taught = make(adata, setup={"labels_key": "class"}, train=False)
    named = np.array(["new", "E"], dtype=object)[codes % 2]
    np.testing.assert_array_equal(taught._guide_labels(named), codes)  # what is known stays
    adata.obs["first"] = adata.obs["class"].astype(object).where(codes < 2)
    half = make(adata, setup={"labels_key": "first"}, train=False)
    numbers = np.array(["9", "8", "7", "7", "B"], dtype=object)[codes]  # of class A, of B, of none, and B by its name
    numbers[np.flatnonzero(codes == 0)[:3]] = "8"
    np.testing.assert_array_equal(half._guide_labels(numbers), np.array([0, 1, 2, 2, 1])[codes])
    shuffled = adata.obs["class"].sample(frac=1, random_state=0)
    np.testing.assert_array_equal(model._guide_labels(shuffled), codes)  # by the names of the cells
    adata.obs["number"] = codes.astype(int)
    numbered = make(adata, setup={"labels_key": "number"}, train=False)
    for guide in (codes.astype(float), codes.astype(str), list(codes)):  # the same classes, by value
        np.testing.assert_array_equal(numbered._guide_labels(guide), codes)


def test_guides_that_cannot_be_used_raise():
    adata = make_cells(6)
    model = make(adata, train=False, n_components=3)
    for guide, error, message in [
        ("kind", KeyError, "guide='kind': there is no adata.obs"),
        (["a", "b"], ValueError, "guide has 2 values for 60 cells"),
        (np.full(60, np.nan), ValueError, "guide has no value at all"),
        ("class", ValueError, "guide has 5 clusters, n_components=3; make it at least 5"),
    ]:
        with pytest.raises(error, match=message):
            model.train(max_epochs=1, guide=guide, **FAST)


@pytest.mark.parametrize("better", [True, False])
def test_many_labels_guide_alone_where_they_find_more(better, monkeypatch):
    """Then q(y|x) learns them alone and stays to the last bit, while the mixture is fitted to it."""
    from lightning import Callback

    from sccvae.train import mixture

    seen, classifiers = [], []

    class Watch(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(pl_module.module.stage)

        def on_train_end(self, trainer, pl_module):
            state = pl_module.module.state_dict()
            classifiers.append({k: v.clone() for k, v in state.items() if k.startswith("y_")})

    monkeypatch.setattr(mixture, "mean_recall", lambda *_: 1.0 if better else 0.0)  # of held-back labels
    monkeypatch.setattr("sccvae.train.few_labels.mean_recall", lambda *_: 0.5)
    adata = make_cells(60)
    known = adata.obs["class"].astype(object)
    known[np.arange(600) % 6 == 0] = np.nan
    adata.obs["known"] = known
    model = make(adata, setup={"labels_key": "known"}, train=False)
    model.train(max_epochs=4, callbacks=[Watch()], **FAST)
    if better:
        assert seen == ["warmup", "labels", "labels", "given"]
        assert (model.module.y_head.weight[:, -model.module.n_latent :] == 0).all()
        *_, learned, last = classifiers
        assert all(torch.equal(last[name], value) for name, value in learned.items())  # statistics of batch norm, too
    else:
        assert seen == ["warmup", "labels", "classifier", "classifier", "mixture", "mixture"]
    missing = model.adata.obs["known"].isna()
    assert (model.predict().astype(str) == adata.obs["class"].astype(str))[missing].mean() > 0.9


# on disk


def test_saved_and_loaded_it_is_the_same(gmvae, taught, tmp_path):
    for name, model in (("a", gmvae), ("b", taught)):
        model.save(tmp_path / name)
        back = load(tmp_path / name)
        assert (back.n_components, back.component_names) == (model.n_components, model.component_names)
        np.testing.assert_array_equal(back.predict_proba(model.adata), model.predict_proba())
        np.testing.assert_array_equal(back.sample(4).X, model.sample(4).X)
        assert list(back.history["phase"]["phase"]) == list(model.history["phase"]["phase"])
    attached = GMVAE.load(tmp_path / "b", taught.adata.copy())
    pd.testing.assert_series_equal(attached.predict(), taught.predict())


def test_the_number_that_training_chose_is_kept(tmp_path):
    model = make(make_cells(20), max_epochs=30)
    assert model.settings["n_components"] == model.n_components > 1
    model.save(tmp_path / "m")
    back = GMVAE.load(tmp_path / "m", make_cells(20))
    assert back.n_components == model.n_components
    np.testing.assert_array_equal(back.predict_proba(), model.predict_proba())


def test_cells_of_one_kind_are_one_cluster(caplog):
    rng = np.random.default_rng(0)
    adata = AnnData(rng.poisson(3.0, (300, 20)).astype(np.float32))
    model = make(adata, setup={}, max_epochs=10, likelihood="nb")
    assert model.n_components == 1
    assert "All cells are one cluster: no valley parts them." in caplog.text
    assert set(model.predict()) == {"0"}
    np.testing.assert_allclose(model.predict_proba(), 1)


class StopAt:
    """Ctrl-C at the start of an epoch of a phase."""

    def __new__(cls, stage: str, epoch: int):
        from lightning import Callback

        class Stop(Callback):
            def on_train_epoch_start(self, trainer, pl_module):
                if pl_module.module.stage == stage and trainer.current_epoch == epoch:
                    raise KeyboardInterrupt

        return Stop()


@pytest.mark.parametrize(("stage", "epoch"), [("warmup", 2), ("mixture", 1)])
def test_resumed_training_gives_the_same_weights(tmp_path, stage, epoch):
    options = {"max_epochs": 6, **FAST}
    whole = make(make_cells(6), train=False, n_components=3)
    whole.train(**options)
    part = make(make_cells(6), train=False, n_components=3)
    part.train(**options, checkpoint_dir=tmp_path / "state", callbacks=[StopAt(stage, epoch)])
    assert len(part.history["phase"]) < len(whole.history["phase"])
    rest = make(make_cells(6), train=False, n_components=3)
    rest.train(**options, checkpoint_dir=tmp_path / "state")
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, rest.module.state_dict()[name]), name
    assert len(rest.history["phase"]) == len(whole.history["phase"])


def test_the_rounds_of_the_guide_train_the_classifier_alone():
    from lightning import Callback

    seen: dict[str, list[dict[str, torch.Tensor]]] = {"warmup": [], "classifier": [], "mixture": []}

    first: dict[str, dict[str, torch.Tensor]] = {}

    class Watch(Callback):
        def on_train_start(self, trainer, pl_module):
            first.setdefault(pl_module.module.stage, {k: v.clone() for k, v in pl_module.module.named_parameters()})

        def on_train_epoch_end(self, trainer, pl_module):
            seen[pl_module.module.stage].append({k: v.clone() for k, v in pl_module.module.named_parameters()})

    model = make(make_cells(6), train=False, n_components=3)
    model.train(max_epochs=3, callbacks=[Watch()], **FAST)  # one round of three epochs, or two
    assert len(seen["warmup"]) == 3
    last = first["classifier"]  # the best weights of the warm-up
    for weights in seen["classifier"]:
        moved = {name for name, value in weights.items() if not torch.equal(value, last[name])}
        assert moved <= {name for name in last if name.startswith("y_")}
        assert moved
    assert all(p.requires_grad for p in model.module.parameters())
    phase = model.history["phase"]["phase"]
    assert (phase == 1).sum() == len(seen["classifier"]) > 2
    assert set(phase) >= {0, 1, 2, 3}


@pytest.mark.parametrize("labelled", [False, True])
def test_communities_of_counts_are_not_made_again(labelled):
    """Classes from a few labels are, of counts too."""
    rng = np.random.default_rng(0)
    classes = np.repeat(["a", "b"], 60)
    x = rng.poisson(np.where(classes[:, None] == "a", [1.0, 6.0] * 10, [6.0, 1.0] * 10)).astype(np.float32)
    adata = AnnData(x)
    adata.obs["some"] = np.where(np.arange(120) % 6 > 0, "Unknown", classes)
    setup = {"labels_key": "some", "unlabeled_category": "Unknown"} if labelled else {}
    model = make(adata, setup=setup, max_epochs=6, likelihood="nb", n_components=2)
    assert set(model.history["phase"]["phase"]) == {0, 2, 3} | ({1} if labelled else set())
    assert metrics.clustering(classes, model.predict())["ari"] > 0.9


@pytest.mark.parametrize(("ones", "even"), [(0.2, True), (0.03, False)])
def test_only_what_is_like_images_has_classes_of_even_sizes(monkeypatch, ones, even):
    """Not accessibility, of which few values are 1."""
    seen, guide = [], mixture._guide
    monkeypatch.setattr(mixture, "_guide", lambda *args, **more: seen.append(more["even"]) or guide(*args, **more))
    x = np.random.default_rng(0).random((60, 40)) < ones
    make(AnnData(x.astype(np.float32)), setup={}, likelihood="bernoulli", n_components=2)
    assert set(seen) == {even}


def test_no_epoch_is_an_error():
    with pytest.raises(ValueError, match="max_epochs=0 must be at least 1"):
        make(make_cells(6), max_epochs=0, n_components=3)


def test_genes_that_differ_between_classes(gmvae):
    """Differential expression and correction for a mixture; every class has both conditions."""
    adata = gmvae.adata.copy()
    table = gmvae.differential_expression(adata, "class", silent=True)
    x = pd.DataFrame(np.asarray(adata.X), columns=adata.var_names)
    for name, part in table.groupby("group1"):
        inside = (adata.obs["class"].astype(str) == name).to_numpy()
        wanted = (x[inside].mean() - x[~inside].mean())[part.index]
        assert np.corrcoef(part["lfc_raw"], wanted)[0, 1] > 0.8
    gmvae.correct(adata, transform_batch="all")
    batches = adata.obs["condition"].unique().tolist()
    wanted = gmvae.get_normalized_expression(transform_batch=batches, return_numpy=True)
    np.testing.assert_allclose(adata.layers["corrected"], wanted, rtol=1e-4, atol=1e-5)


def test_a_condition_called_component():
    adata = make_cells()
    adata.obs["component"] = adata.obs["condition"]
    model = make(adata, setup={"batch_key": "component"}, n_components=3)
    drawn = model.sample(4, batch=adata.obs["component"].iloc[0])
    assert set(drawn.obs["drawn_component"]) <= set(model.component_names)
    model.get_latent_representation(drawn)


def test_merging_to_no_whole_number(gmvae):
    with pytest.raises(TypeError, match=r"n_clusters=2\.5 must be a whole number"):
        gmvae.merge_components(2.5)


@pytest.mark.parametrize("n_components", [None, 6])
def test_few_labels_among_more_cells_than_a_graph_takes(monkeypatch, n_components):
    """The graph was of cells drawn without a look at labels, and a class whose labels it missed had no component."""
    adata = make_cells()
    few = adata.obs["class"].astype(object)
    few[~adata.obs.groupby("class", observed=True).cumcount().isin(range(4)).to_numpy()] = np.nan
    adata.obs["few"] = few
    monkeypatch.setattr(mixture, "MAX_CELLS", 80)
    setup = {"batch_key": "condition", "labels_key": "few"}
    model = make(adata, setup=setup, max_epochs=30, n_components=n_components)
    assert (model.predict().astype(str) == adata.obs["class"].astype(str)).mean() > 0.95


def test_a_guide_of_more_cells_than_a_graph_takes_counts_whole(monkeypatch):
    adata = make_cells()
    monkeypatch.setattr(mixture, "MAX_CELLS", 30)
    seen = {}
    moments = mixture._on_cells
    monkeypatch.setattr(mixture, "_on_cells", lambda *given: seen.setdefault("labels", moments(*given)))
    model = make(adata, guide="class", n_components=5)
    assert (seen["labels"][model.train_indices] >= 0).all()


def test_a_guide_of_no_training_cell_is_refused():
    adata = make_cells()
    model = make(adata, n_components=None)
    before, k = model.get_latent_representation(), model.n_components
    guide = np.full(adata.n_obs, None, dtype=object)
    guide[model.validation_indices[:3]] = "a"
    with pytest.raises(ValueError, match=r"guide= has no value for any of the \d+ training cells"):
        model.train(max_epochs=2, guide=guide, **FAST)
    assert model.n_components == k
    assert (model.get_latent_representation() == before).all()


@pytest.mark.parametrize("epochs", [1.4, True])
def test_epochs_are_whole(epochs):
    with pytest.raises(TypeError, match=r"max_epochs=.* must be a whole number"):
        make(make_cells(), max_epochs=epochs)


def test_a_training_that_fails_leaves_a_trained_model_as_it_was():
    model = make(make_cells(), n_components=None)
    before = model.get_latent_representation(), model.predict_proba(), model.n_components, model.history
    random = torch.random.get_rng_state()
    for error in (RuntimeError("boom"), FloatingPointError("no number")):
        with pytest.raises(type(error), match=str(error)):
            model.train(max_epochs=4, **FAST, seed=5, callbacks=[Raise(error, after=3)])
        assert (model.get_latent_representation() == before[0]).all()
        assert (model.predict_proba() == before[1]).all().all()
        assert model.n_components == model.settings["n_components"] == before[2]
        assert model.history is before[3]
        assert torch.equal(torch.random.get_rng_state(), random)
        model.sample(3)


def test_time_that_is_over_between_phases_is_no_interruption(monkeypatch, caplog):
    slow = mixture._guide_rows
    monkeypatch.setattr(mixture, "_guide_rows", lambda *given: (time.sleep(4), slow(*given))[1])
    adata = make_cells()
    model = make(adata, train=False, n_components=5)
    model.train(max_epochs=2, max_time={"seconds": 3}, **FAST)
    assert model.is_trained
    assert not model.was_interrupted
    assert "ended before its guided phase, so no component has its place yet" in caplog.text
