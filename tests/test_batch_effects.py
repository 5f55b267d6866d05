"""What the CVAE does about batches: offsets and dispersions that start at the data, and the alignment penalty."""

from __future__ import annotations

import copy
import itertools

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from scipy.stats import nbinom, norm
from sklearn.linear_model import PoissonRegressor

from sccvae import model as models
from sccvae._rows import SparseRows
from sccvae.data import Cells, CellStore, batch_moments
from sccvae.data.moments import zero_share
from sccvae.distributions import LIKELIHOODS, ZINB, NegativeBinomial, Poisson, log_nb
from sccvae.model import CVAE
from sccvae.module import CVAE as Module
from sccvae.module import GMVAE, VAE, Batch
from sccvae.module._batches import anchored, one_of
from sccvae.nn import CellKinds, batch_discrepancy
from sccvae.nn.alignment import LEAST, WIDTHS
from sccvae.train import batch_effects, effects

FAST = {"accelerator": "cpu", "progress_bar": False}


def store_of(x, batch):
    x = np.asarray(x, np.float32)
    codes = np.asarray(batch, np.int64)[:, None]
    return CellStore(Cells(x, codes, np.zeros((len(x), 0), np.float32), x.sum(1, keepdims=True)))


def test_discrepancy_is_its_definition():
    """Every pair of cells by itself; a batch of one cell, and one without a cell, are left out."""
    torch.manual_seed(0)
    n, d = 24, 3
    z, batch = torch.randn(n, d, dtype=torch.float64), torch.randint(0, 2, (n,))
    batch[0] = 2

    def kernel(a, b):
        return sum(torch.exp(-((a - b) ** 2).sum() / d / w) for w in WIDTHS) / len(WIDTHS)

    def mean(pairs):
        return sum(kernel(z[i], z[j]) for i, j in pairs) / len(pairs)

    expected = 0.0
    for b in (0, 1):
        own, rest = ([i for i in range(n) if (batch[i] == b) == inside] for inside in (True, False))
        within = mean(list(itertools.permutations(own, 2))) + mean(list(itertools.permutations(rest, 2)))
        expected += len(own) / n * (within - 2 * mean(list(itertools.product(own, rest))))
    torch.testing.assert_close(batch_discrepancy(z, batch, 4), expected)


def test_discrepancy_is_zero_on_average_and_grows_with_a_shift():
    torch.manual_seed(1)
    same = [batch_discrepancy(torch.randn(60, 5), torch.arange(60) % 3, 3) for _ in range(200)]
    mean, error = torch.stack(same).mean(), torch.stack(same).std() / 200**0.5
    assert abs(mean) < 3 * error
    z, batch = torch.randn(300, 5), torch.arange(300) % 3
    far = [batch_discrepancy(z + shift * (batch == 0)[:, None], batch, 3) for shift in (0.0, 0.5, 1.0, 2.0)]
    assert far == sorted(far)
    assert far[-1] > 0.1
    one = batch_discrepancy(z, torch.zeros(300, dtype=torch.long), 1)
    assert float(one) == 0.0


def test_discrepancy_keeps_its_digits_under_autocast():
    torch.manual_seed(8)
    z, batch = torch.randn(60, 5), torch.arange(60) % 3
    with torch.autocast("cpu", torch.bfloat16):
        found = batch_discrepancy(z, batch, 3)
    assert torch.equal(found, batch_discrepancy(z, batch, 3))


@pytest.mark.parametrize("with_kinds", [False, True])
def test_discrepancy_has_its_gradient(with_kinds):
    torch.manual_seed(3)
    z, batch = torch.randn(15, 3, dtype=torch.float64, requires_grad=True), torch.arange(15) % 3
    kinds = torch.rand(15, 4, dtype=torch.float64).softmax(1) if with_kinds else None
    assert torch.autograd.gradcheck(lambda v: batch_discrepancy(v, batch, 4, kinds), z)
    (wanted,) = torch.autograd.grad(batch_discrepancy(z, batch, 4, kinds), z)
    far = (z.detach().float() + 100).requires_grad_()
    (got,) = torch.autograd.grad(batch_discrepancy(far, batch, 4, kinds), far)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-5)


def test_discrepancy_has_a_finite_gradient_at_equal_points():
    z = torch.zeros(6, 2, requires_grad=True)
    batch_discrepancy(z, torch.arange(6) % 2, 2).backward()
    assert torch.isfinite(z.grad).all()


def test_moments_find_planted_proportions_and_dispersions():
    rng = np.random.default_rng(0)
    n, rho = 16_000, np.array([[0.1, 0.3, 0.6], [0.5, 0.3, 0.2]])
    theta = np.array([[1.0, 4.0, 10.0], [0.5, 2.0, 6.0]])
    batch = rng.integers(2, size=n)
    library = rng.uniform(100, 300, size=(n, 1)).astype(np.float32)
    mu = library * rho[batch]
    x = nbinom.rvs(theta[batch], theta[batch] / (theta[batch] + mu), random_state=rng).astype(np.float32)
    store = store_of(x, batch)
    store.cells.library = library
    found_rho, found_theta = batch_moments(store, 3)
    np.testing.assert_allclose(found_rho[:2], rho, rtol=0.05)
    np.testing.assert_allclose(found_theta[:2], theta, rtol=0.2)
    everything = batch_moments(store_of(x, np.zeros(n)), 1)[0]
    np.testing.assert_allclose(found_rho[2], x.sum(0) / library.sum(), rtol=1e-5)  # no cell: that of all cells
    assert everything.shape == (1, 3)
    assert np.isfinite(found_theta).all()


def test_moments_of_silent_genes_stay_within_bounds():
    x = np.zeros((8, 3))
    x[:, 0], x[0, 1] = 5, 1
    rho, theta = batch_moments(store_of(x, np.arange(8) % 2), 2)
    assert (rho[:, 2] == 0).all()
    assert ((theta >= 0.01) & (theta <= 20)).all()


def test_more_zeros_than_the_variance_tells_of():
    """Half of the cells have nothing: the dispersion found is the one that expects so many zeros."""
    rng = np.random.default_rng(1)
    n = 4_000
    library = rng.uniform(100, 300, size=(n, 1)).astype(np.float32)
    x = rng.poisson(library * [0.001, 0.05, 0.9]) * (rng.uniform(size=(n, 3)) < [0.5, 0.5, 1])
    store = store_of(x.astype(np.float32), np.zeros(n))
    store.cells.library = library
    rho, theta = batch_moments(store, None)
    _, plain = batch_moments(store, None, zeros=False)
    assert (theta <= plain).all()
    assert theta[0, 1] < plain[0, 1] / 2
    assert theta[0, 2] == plain[0, 2]
    mean = library * rho
    expected = ((1 + mean / theta) ** -theta).sum(0)
    assert expected[1] == pytest.approx((x[:, 1] == 0).sum(), rel=0.01)
    one = batch_moments(store, 1)
    assert np.array_equal(one[0], rho)
    assert np.array_equal(one[1], theta)


@pytest.mark.parametrize("family", [NegativeBinomial, ZINB])
@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-cell"])
def test_dispersions_start_at_the_data(cells, dispersion, family):
    """Twice what the counts say; zeros have no say where they are explained otherwise."""
    CVAE.setup_anndata(cells, batch_key="batch")
    model = CVAE(cells, n_latent=2, n_hidden=4, likelihood=family(dispersion))
    n_batch = cells.obs["batch"].nunique() if dispersion == "gene-batch" else None
    theta = batch_moments(model._store(None), n_batch, zeros=family is NegativeBinomial)[1]
    likelihood = model.module.likelihood
    found = likelihood.theta_head.bias[None] if dispersion == "gene-cell" else likelihood.log_theta
    np.testing.assert_allclose(found.detach().exp(), 2 * theta, rtol=1e-5)


@pytest.mark.parametrize("family", [NegativeBinomial, ZINB])
def test_offsets_start_each_batch_at_its_data(family):
    mean = torch.tensor([0.5, 0.3, 0.2, 0.0])
    by_batch = torch.tensor([[0.2, 0.3, 0.5, 0.0], [0.8, 0.1, 0.0, 0.1]])
    built = family("gene-batch", batch_offset=True).build(3, 4, 2)
    built.initialise(mean)
    overall = built.scale_head.bias.detach().exp()
    built.initialise_batches(((by_batch + overall / 20) / (overall * 1.05)).log())
    built.initialise_dispersion(torch.full((2, 4), 3.0))
    torch.testing.assert_close(built.log_theta.exp(), torch.full((2, 4), 6.0))
    h, batch = torch.zeros(2, 2, 3), torch.tensor([0, 1])
    rho = built(h, torch.ones(2, 1), batch).expression()
    assert rho.shape == (2, 2, 4)
    assert (rho[0] - by_batch).abs().max() < 0.05
    assert (rho > 0).all()


def test_offset_enters_the_mass():
    torch.manual_seed(2)
    built = NegativeBinomial("gene-batch", batch_offset=True).build(3, 5, 2)
    torch.nn.init.normal_(built.offset)
    torch.nn.init.normal_(built.log_theta)
    h, library, batch = torch.randn(4, 3), torch.full((4, 1), 50.0), torch.tensor([0, 1, 1, 0])
    x = torch.poisson(torch.full((4, 5), 8.0))
    logits = h @ built.scale_head.weight.T + built.scale_head.bias + built.offset[batch]
    expected = log_nb(x, logits.log_softmax(-1) + library.log(), built.log_theta[batch]).sum(-1)
    torch.testing.assert_close(built(h, library, batch).log_prob(x), expected)
    with pytest.raises(ValueError, match="batch_offset=True needs a model whose decoder sees the batch"):
        NegativeBinomial(batch_offset=True).build(3, 5)


def test_encoder_sees_proportions_at_the_median_depth(cells):
    CVAE.setup_anndata(cells, batch_key="batch")
    module = CVAE(cells, n_latent=2, n_hidden=4).module
    depth = np.median(cells.X.sum(1))
    x = torch.tensor([[0.0, 3.0, 7.0], [0.0, 30.0, 70.0]])
    seen = module.likelihood.encoder_input(x, x.sum(1, keepdim=True))
    expected = np.log1p(np.array([0.0, 0.3, 0.7]) * depth)
    np.testing.assert_allclose(seen, np.stack([expected, expected]), rtol=1e-5)
    assert torch.equal(NegativeBinomial().encoder_input(x, x.sum(1, keepdim=True)), x.log1p())


def test_defaults_follow_the_plate():
    assert Module(6, [2]).likelihood.batchwise == ("log_theta", "offset")
    for plain in (Module(6, [2], prior="learned"), Module(6, [], 1), Module(6, [2], likelihood="nb")):
        assert plain.likelihood.batchwise == ()
    assert Module(6, [], 1).alignment.weight == Module(6, [2], prior="learned").alignment.weight == 0.0
    assert GMVAE(6, 3, [2]).likelihood.batchwise == ("log_theta", "offset")
    assert GMVAE(6, 3, [2], w_prior="learned").likelihood.batchwise == GMVAE(6, 3).likelihood.batchwise == ()
    for n_features, weight in [(30, 6.0), (1_000, 200.0), (5_000, 200.0)]:
        assert GMVAE(n_features, 3, [2]).alignment.weight == weight
        assert Module(n_features, [2]).alignment.weight == pytest.approx(1.5 * weight)
        assert Module(n_features, [2], likelihood="nb").alignment.weight == weight
    assert GMVAE(6, 3, [2], w_prior="learned").alignment.weight == GMVAE(6, 3).alignment.weight == 0.0
    with pytest.raises(ValueError, match="alignment=-1"):
        Module(6, [2], alignment=-1.0)


def test_discrepancy_of_what_both_sides_hold_is_its_definition():
    """Sums over pairs, one batch against the others at a time."""
    torch.manual_seed(7)
    z, batch = torch.randn(12, 3, dtype=torch.float64), torch.arange(12) % 3
    kinds = torch.rand(12, 4, dtype=torch.float64).pow(3)
    kinds /= kinds.sum(1, keepdim=True)

    def k(i, j):
        return np.mean([np.exp(-float((z[i] - z[j]).square().sum()) / (3 * w)) for w in WIDTHS])

    def mean(pairs, weight):
        total = sum(weight[i] * weight[j] for i, j in pairs)
        return sum(weight[i] * weight[j] * k(i, j) for i, j in pairs) / total

    expected = 0.0
    for b in range(3):
        own, rest = (np.flatnonzero(side) for side in (batch == b, batch != b))
        share_own, share_rest = (kinds[rows].mean(0).numpy() for rows in (own, rest))
        both = np.minimum(share_own, share_rest)
        weight = {i: LEAST + (1 - LEAST) * float(kinds[i].numpy() @ (both / share_own)) for i in own}
        weight |= {i: LEAST + (1 - LEAST) * float(kinds[i].numpy() @ (both / share_rest)) for i in rest}
        inside = [mean(list(itertools.permutations(rows, 2)), weight) for rows in (own, rest)]
        between = mean(list(itertools.product(own, rest)), weight)
        expected += (LEAST + (1 - LEAST) * both.sum()) * len(own) / 12 * (sum(inside) - 2 * between)
    assert float(batch_discrepancy(z, batch, 3, kinds)) == pytest.approx(expected, rel=1e-9)
    alike = torch.full((12, 2), 0.5, dtype=torch.float64)
    torch.testing.assert_close(batch_discrepancy(z, batch, 3, alike), batch_discrepancy(z, batch, 3))


def test_other_shares_of_the_same_kinds_are_no_discrepancy():
    torch.manual_seed(8)
    kind = torch.tensor([0] * 90 + [1] * 10 + [0] * 10 + [1] * 90)
    batch, kinds = torch.arange(200) // 100, torch.nn.functional.one_hot(kind, 2).float()
    draws = [torch.randn(200, 2) + 3.0 * kind[:, None] for _ in range(100)]
    plain = np.mean([float(batch_discrepancy(z, batch, 2)) for z in draws])
    aware = np.mean([float(batch_discrepancy(z, batch, 2, kinds)) for z in draws])
    moved = np.mean([float(batch_discrepancy(z + 2.0 * batch[:, None], batch, 2, kinds)) for z in draws])
    assert plain > 0.3
    assert abs(aware) < 0.2 * plain
    assert moved > 2 * aware
    nothing_shared = torch.nn.functional.one_hot(batch, 2).float()
    found = batch_discrepancy(draws[0], batch, 2, nothing_shared)
    torch.testing.assert_close(found, LEAST * batch_discrepancy(draws[0], batch, 2))


def test_responsibilities_are_bayes_rule():
    torch.manual_seed(9)
    mixture = Module(6, [2], n_latent=2, n_hidden=4, n_components=3).mixture
    for p in mixture.parameters():
        torch.nn.init.normal_(p)
    z = torch.randn(5, 2)
    loc, scale = mixture.loc.detach().numpy(), mixture.log_scale.exp().detach().numpy()
    weights = mixture.logits.softmax(0).detach().numpy()
    joint = weights * np.stack([norm.pdf(z.numpy(), m, s).prod(1) for m, s in zip(loc, scale, strict=True)], 1)
    found = mixture().responsibilities(z).detach().numpy()
    np.testing.assert_allclose(found, joint / joint.sum(1, keepdims=True), rtol=1e-4)


MAKERS = [
    lambda: Module(6, [2], n_latent=2, n_hidden=4, alignment=7.0),
    lambda: GMVAE(6, 3, [2], n_latent=2, n_w=2, n_hidden=4, alignment=7.0, consistency=0.0),
]


@pytest.mark.parametrize("make", MAKERS, ids=["CVAE", "GMVAE"])
def test_penalty_is_weighted_and_no_part_of_the_elbo(make):
    torch.manual_seed(3)
    module = make()
    batch = Batch.of(torch.poisson(torch.full((20, 6), 3.0)), torch.arange(20) % 2)
    torch.manual_seed(4)
    loss, report = module.loss(batch)
    torch.manual_seed(4)
    module.alignment.weight = 0.0
    plain, without = module.loss(batch)
    assert "alignment" not in without
    torch.testing.assert_close(loss - plain, report["alignment"])
    torch.testing.assert_close(report["elbo"], without["elbo"])
    torch.manual_seed(4)
    z = module.inference(batch)["z"].rsample((1,))[0]
    if isinstance(module, Module):
        kinds = module.mixture().responsibilities(z)
    else:
        kinds = module.log_q_y(module.likelihood.encoder_input(batch.x, batch.library), z, module.c(batch)).exp()
    torch.testing.assert_close(report["alignment"], 7.0 * batch_discrepancy(z, batch.batch_index, 2, kinds))
    module.alignment.weight = 7.0
    torch.manual_seed(4)
    torch.testing.assert_close(module.loss(batch, late=0.25)[1]["alignment"], report["alignment"] / 4)
    assert module.loss(batch, late=0)[1]["alignment"] == 0
    assert module.has_late_penalty
    module.eval()
    assert "alignment" not in module.loss(batch)[1]


FIXED = [lambda: Module(6, [2], n_latent=2, n_hidden=4, prior="fixed", alignment=7.0)]


@pytest.mark.parametrize("make", [*MAKERS, *FIXED], ids=["CVAE", "GMVAE", "fixed prior"])
def test_anchored_batches_are_aligned_with_the_prior(make):
    """A single batch has nothing to be aligned with, but for draws from p(z), which are a batch of their own."""
    torch.manual_seed(6)
    module, n = make(), 20
    batch = Batch.of(torch.poisson(torch.full((n, 6), 3.0)), torch.ones(n, dtype=torch.int64))
    assert module.loss(batch)[1]["alignment"] == 0
    noted, drawn = [], module.draw_like
    module.draw_like = lambda z, kinds: noted.append((z, drawn(z, kinds))) or noted[-1][1]
    with anchored(module):
        found = module.loss(batch)[1]["alignment"]
    ((z, z_p),) = noted
    assert z.shape == z_p.shape == (n, 2)
    side = torch.arange(2).repeat_interleave(n)
    torch.testing.assert_close(found, 7.0 * batch_discrepancy(torch.cat([z, z_p]), side, 2))
    assert module.loss(batch)[1]["alignment"] == 0  # and no longer


def test_indices_are_drawn_by_their_probabilities():
    torch.manual_seed(1)
    p = torch.tensor([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0]]).repeat_interleave(50_000, 0)
    drawn = one_of(p).view(2, -1)
    torch.testing.assert_close(drawn[0].bincount() / 50_000, p[0], atol=0.01, rtol=0)
    assert (drawn[1] == 0).all()
    assert one_of(torch.full((4, 3), torch.nan)).shape == (4,)


@pytest.mark.parametrize("make", MAKERS, ids=["CVAE", "GMVAE"])
def test_draws_are_of_the_kinds_of_the_cells(make):
    torch.manual_seed(8)
    module, n, k = make(), 2_000, 2
    z = module.draw_like(torch.zeros(n, 2), torch.nn.functional.one_hot(torch.full((n,), k), 3).float())
    if isinstance(module, GMVAE):
        loc = module.components(torch.randn(n, 2)).loc[:, k].mean(0)
    else:
        loc, scale = module.mixture.loc[k], module.mixture.log_scale[k].exp()
        torch.testing.assert_close(z.std(0), scale.detach(), atol=0.05, rtol=0.05)
    torch.testing.assert_close(z.mean(0), loc.detach(), atol=0.1, rtol=0)


def test_each_new_batch_is_aligned_with_its_own_draws():
    """Batches of different cells are not drawn to each other."""
    torch.manual_seed(9)
    module = MAKERS[0]()
    z, other = torch.randn(16, 2), torch.randn(16, 2) + 5
    drawn = [torch.randn(16, 2), torch.randn(16, 2) + 5]
    index = torch.arange(2).repeat_interleave(16)
    alignment = module.alignment
    alignment.anchor = lambda *_: torch.cat(drawn)
    alignment.note(torch.cat([z, other]))
    found = alignment.penalty(Batch.of(torch.ones(32, 6), index), 1.0)["alignment"]
    side = torch.arange(2).repeat_interleave(16)
    each = [batch_discrepancy(torch.cat([a, b]), side, 2) for a, b in zip((z, other), drawn, strict=True)]
    torch.testing.assert_close(found, 7.0 * sum(each) / 2)


def test_a_model_without_alignment_can_be_anchored():
    module = VAE(6, n_latent=2, n_hidden=4)
    with anchored(module):
        assert set(module.loss(Batch.of(torch.ones(4, 6)))[1]) == {"reconstruction", "kl_z", "elbo", "loss"}


@pytest.mark.parametrize("make", [*MAKERS, *FIXED], ids=["CVAE", "GMVAE", "fixed prior"])
def test_draws_from_the_prior_have_its_moments(make):
    """First and second moments, by the density on a grid, of draws for cells of all kinds."""
    torch.manual_seed(7)
    module, n = make(), 40_000
    if isinstance(module, GMVAE):
        prior = torch.full((3,), 1 / 3)
    elif module.mixture is None:
        prior = None
    else:
        torch.nn.init.normal_(module.mixture.logits)
        prior = module.mixture.logits.detach().softmax(0)
    kinds = None if prior is None else prior.expand(n, -1)
    z = module.draw_like(torch.zeros(n, 2), kinds)
    axis = torch.linspace(-9, 9, 181)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        if isinstance(module, GMVAE):
            w = torch.randn(400, 1, 2)  # p(z) = E p(z|w)
            density = sum(module.log_p_z(grid, v).exp() for v in w) / len(w)
        elif module.mixture is None:
            density = (-(grid**2).sum(1) / 2).exp() / (2 * np.pi)
        else:
            density = module.mixture().log_prob(grid).exp()
    density = density / density.sum()
    for power in (1, 2):
        torch.testing.assert_close((z**power).mean(0), density @ grid**power, atol=0.05, rtol=0.03)


def test_mixture_prior_is_its_definition():
    """The KL of a draw, term by term; and with one standard normal it is the fixed prior."""
    torch.manual_seed(5)
    mixed = Module(6, [2], n_latent=2, n_hidden=4, n_components=3, likelihood="nb", kl="monte_carlo").double().eval()
    for p in mixed.mixture.parameters():
        torch.nn.init.normal_(p)
    x = torch.poisson(torch.full((9, 6), 3.0)).double()
    batch = Batch.of(x, torch.arange(9) % 2)
    q = mixed.inference(batch)["z"]
    torch.manual_seed(6)
    z = q.rsample((1,))[0].detach().numpy()
    loc, scale = mixed.mixture.loc.detach().numpy(), mixed.mixture.log_scale.exp().detach().numpy()
    weights = mixed.mixture.logits.softmax(0).detach().numpy()
    p_z = sum(w * norm.pdf(z, m, s).prod(1) for w, m, s in zip(weights, loc, scale, strict=True))
    log_q = norm.logpdf(z, q.loc.detach().numpy(), q.scale.detach().numpy()).sum(1)
    torch.manual_seed(6)
    np.testing.assert_allclose(mixed.elbo_terms(batch)["kl_z"].detach().numpy(), log_q - np.log(p_z), rtol=1e-8)
    bound = mixed.marginal_ll(batch, 50, 10)
    assert bound.shape == (9,)
    one = Module(6, [2], n_latent=2, n_hidden=4, n_components=1, likelihood="nb", kl="monte_carlo").double().eval()
    torch.nn.init.zeros_(one.mixture.loc)
    plain = Module(6, [2], n_latent=2, n_hidden=4, prior="fixed", likelihood="nb", kl="monte_carlo").double().eval()
    plain.load_state_dict(one.state_dict(), strict=False)
    found = []
    for module in (one, plain):
        torch.manual_seed(7)
        found.append(module.elbo_terms(batch)["kl_z"])
    torch.testing.assert_close(*found)


@pytest.fixture(scope="module")
def cells():
    """Three types in two batches; each batch multiplies the genes by factors of its own."""
    rng = np.random.default_rng(0)
    n, g = 300, 15
    kind, batch = rng.integers(3, size=n), rng.integers(2, size=n)
    rates = rng.gamma(1.0, 4.0, size=(3, g))[kind] * np.exp(rng.normal(0, 1.0, size=(2, g)))[batch]
    obs = pd.DataFrame({"batch": np.array(["a", "b"])[batch]}, index=[f"cell{i}" for i in range(n)])
    return ad.AnnData(rng.poisson(rates * 3).astype(np.float32), obs=obs)


def test_batches_meet_in_training(cells):
    CVAE.setup_anndata(cells, batch_key="batch")
    far = {}
    for weight in (0.0, 300.0):
        model = CVAE(cells, n_latent=3, n_hidden=16, likelihood="nb", prior="fixed", alignment=weight)
        model.train(20, lr=5e-3, early_stopping=False, **FAST)
        z = torch.from_numpy(model.get_latent_representation())
        far[weight] = float(batch_discrepancy(z, torch.from_numpy(model._store(None).cells.codes[:, 0]), 2))
        assert ("alignment_train" in model.history) == bool(weight)
    assert far[300.0] < far[0.0]


def test_offsets_and_depth_are_saved(cells, tmp_path):
    CVAE.setup_anndata(cells, batch_key="batch")
    model = CVAE(cells, n_latent=3, n_hidden=4)
    model.train(1, **FAST)
    model.save(tmp_path / "model")
    again = models.load(tmp_path / "model", cells)
    assert np.array_equal(again.get_latent_representation(), model.get_latent_representation())
    for name in ("offset", "log_theta", "depth"):
        assert torch.equal(getattr(again.module.likelihood, name), getattr(model.module.likelihood, name))


def test_effects_are_looked_for_where_something_starts_at_them_alone(cells, monkeypatch):
    class ByBatch(Poisson):
        batchwise = ("offset",)  # one of a user, which starts where it likes

    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr("sccvae.model._base.batch_effects", never)
    monkeypatch.setitem(LIKELIHOODS, "ByBatch", ByBatch)
    CVAE.setup_anndata(cells, batch_key="batch")
    for likelihood in (NegativeBinomial(dispersion="gene-batch"), ByBatch()):
        CVAE(cells, n_latent=2, n_hidden=4, likelihood=likelihood)
    with pytest.raises(AssertionError):
        CVAE(cells, n_latent=2, n_hidden=4)


def test_cells_are_drawn_from_the_mixture(cells):
    CVAE.setup_anndata(cells, batch_key="batch")
    model = CVAE(cells, n_latent=2, n_hidden=4, n_components=2)
    model.is_trained = True
    with torch.no_grad():
        model.module.mixture.loc.copy_(torch.tensor([[50.0, 0.0], [-50.0, 0.0]]))
        model.module.mixture.logits.copy_(torch.tensor([0.8, 0.2]).log())
    z = model.sample(1000, seed=1).obsm["z"]
    assert np.isclose((z[:, 0] > 0).mean(), 0.8, atol=0.04)
    assert np.isclose(z[z[:, 0] > 0, 0].mean(), 50, atol=0.2)


def test_a_new_batch_starts_between_the_known(cells):
    CVAE.setup_anndata(cells, batch_key="batch")
    model = CVAE(cells, n_latent=3, n_hidden=8)
    model.train(1, **FAST)
    query = cells[:40].copy()
    query.obs["batch"] = "new"
    mapped = model.load_query(query)
    old, new = model.module.likelihood, mapped.module.likelihood
    for name in ("offset", "log_theta"):
        before, after = getattr(old, name).detach(), getattr(new, name).detach()
        assert torch.equal(after[:2], before)
        if name == "offset":  # its dispersions start at its own cells (test_mapping)
            torch.testing.assert_close(after[2], before.mean(0))
    mapped.train(**FAST)
    assert torch.equal(mapped.module.mixture.loc, model.module.mixture.loc)
    assert torch.equal(mapped.module.likelihood.offset[:2], old.offset)
    assert not torch.equal(mapped.module.likelihood.offset[2], old.offset.mean(0))


def planted(n, share, *, seed=0, n_genes=300):
    """Counts of three kinds in batches that hold them in these shares, with the true log factors of the batches."""
    rng = np.random.default_rng(seed)
    batch = np.sort(rng.integers(len(share), size=n))
    kind = np.array([rng.choice(3, p=share[b]) for b in batch])
    of_kind = np.exp(rng.normal(0, 1.2, (3, n_genes)) * (rng.random((3, n_genes)) < 0.25))
    effect = rng.normal(0, 0.5, (len(share), n_genes))
    rate = rng.lognormal(0, 1, n_genes) * of_kind[kind] * np.exp(effect[batch])
    library = rng.lognormal(np.log(2000), 0.3, (n, 1))
    x = rng.poisson(library * rate / rate.sum(1, keepdims=True)).astype(np.float32)
    store = store_of(x, batch)
    store.cells.library = x.sum(1, keepdims=True)
    return store, batch, effect


def centred(effect, x, batch):
    """Apart from a constant of each batch, and from what all batches have in common."""
    effect = effect - np.average(effect, axis=1, weights=x.mean(0))[:, None]
    return effect - np.bincount(batch) / len(batch) @ effect


@pytest.mark.parametrize("seed", range(4))
def test_effects_of_batches_are_apart_from_their_composition(seed):
    share = [[0.75, 0.2, 0.05], [0.2, 0.6, 0.2], [0.02, 0.23, 0.75]]
    store, batch, effect = planted(1500, share, seed=seed)
    x = store.cells.x
    common = x.mean(0) > 0.5
    truth = centred(effect, x, batch)[:, common]
    proportion = np.stack([x[batch == b].sum(0) / x[batch == b].sum() for b in range(3)])
    by_means = centred(np.log(proportion + 1e-6), x, batch)[:, common]
    found = centred(batch_effects(store, 3)[0], x, batch)[:, common]
    error, error_of_means = ((np.square(f - truth).mean()) ** 0.5 for f in (found, by_means))
    assert error < 0.12
    assert error < error_of_means / 2


def test_effects_are_those_of_a_poisson_regression(monkeypatch):
    monkeypatch.setattr(effects, "PRIOR", 0.0)
    store, batch, _ = planted(400, [[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]], n_genes=12)
    cells = store.cells
    x, kind = sparse.csr_array(cells.x, dtype=float), np.arange(400) % 3
    found = effects._factors(
        x, cells.library.astype(float), *(effects._members(g, n) for g, n in ((batch, 2), (kind, 3)))
    )
    design = np.stack([kind == 0, kind == 1, kind == 2, batch == 1], axis=1).astype(float)
    for gene in range(12):
        rate = cells.x[:, gene] / cells.library[:, 0]
        fit = PoissonRegressor(alpha=0, fit_intercept=False, tol=1e-9, max_iter=10_000)
        fit.fit(design, rate / rate.mean(), sample_weight=cells.library[:, 0])
        got = np.exp(found[1, gene] - found[0, gene])
        np.testing.assert_allclose(got, np.exp(fit.coef_[3]), rtol=1e-3)


def test_effects_of_an_empty_batch_and_of_silent_genes_are_none():
    store, _, _ = planted(90, [[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]], n_genes=20)
    store.cells.x[:, 3] = 0
    found, _ = batch_effects(store, 3)
    assert found.shape == (3, 20)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert found[:2].std() > 0.1
    assert (found[2] == 0).all()
    np.testing.assert_allclose(found[:, 3], 0, atol=1e-6)
    assert np.isfinite(batch_effects(store.subset(np.arange(4)), 3)[0]).all()


def test_effects_are_the_same_of_sparse_and_dense_cells():
    store, _, _ = planted(200, [[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]], n_genes=40)
    dense, kinds = batch_effects(store, 2)
    assert batch_effects(store, 2, with_kinds=False)[1] is None
    np.testing.assert_array_equal(batch_effects(store, 2, with_kinds=False)[0], dense)
    x = torch.from_numpy(store.cells.x).log1p()
    store.cells.x = sparse.csr_matrix(store.cells.x)
    found, of_sparse = batch_effects(store, 2)
    np.testing.assert_array_equal(found, dense)
    batch = torch.from_numpy(store.cells.codes[:, 0])
    weights = kinds(x, batch)
    torch.testing.assert_close(of_sparse(SparseRows.of(x), batch), weights)
    assert (weights.sum(1) <= 1 + 1e-6).all()
    assert weights.sum(1).mean() > 0.7  # both batches hold all kinds


def test_effects_of_cells_that_are_all_alike_are_those_of_their_batches():
    x = np.repeat([[1.0] * 10, [2.0] * 5 + [3.0] * 5], 50, axis=0)
    assert np.isfinite(batch_effects(store_of(x, np.arange(100) // 50), 2)[0]).all()
    alike, kinds = batch_effects(store_of(np.ones((100, 10)), np.arange(100) % 2), 2)
    np.testing.assert_allclose(alike, 0, atol=1e-6)
    assert kinds is None


def weights_of(kinds, store):
    """For each kind that was found, (n, K)."""
    x = torch.from_numpy(store.cells.x * (np.median(store.cells.library) / store.cells.library)).log1p()
    return kinds(x, torch.from_numpy(store.cells.codes[:, 0])).numpy()


@pytest.mark.parametrize("depth", [1, 3])
def test_cells_that_are_the_same_have_no_effects(depth):
    x = np.ones((90, 20))
    x[:40] *= depth  # the same but for the depth
    effect, kinds = batch_effects(store_of(x, np.repeat([0, 1], [40, 50])), 2)
    np.testing.assert_allclose(effect, 0, atol=1e-6)
    assert kinds is None


def test_kinds_are_the_same_in_all_batches_though_a_batch_changes_one_kind_more():
    """Kind 0 answers batch 1 with genes of its own, as a type answers a treatment."""
    rng = np.random.default_rng(5)
    n, n_genes = 1200, 300
    batch, kind = np.arange(n) % 2, rng.integers(3, size=n)
    log_rate = rng.normal(0, 1.2, (3, n_genes)) * (rng.random((3, n_genes)) < 0.2)
    answer = rng.normal(0, 1.0, n_genes) * (rng.random(n_genes) < 0.15)
    rate = rng.lognormal(0, 1, n_genes) * np.exp(log_rate[kind] + answer * ((batch == 1) & (kind == 0))[:, None])
    rate *= np.exp(rng.normal(0, 0.4, (2, n_genes)))[batch]
    store = store_of(rng.poisson(2000 * rate / rate.sum(1, keepdims=True)), batch)
    found = weights_of(batch_effects(store, 2)[1], store)
    shares = np.array([[found[(batch == b) & (kind == k)].mean(0) for k in range(3)] for b in range(2)])
    overlap = np.minimum(shares[0], shares[1]).sum(-1)  # of a planted kind, between the batches
    assert (overlap > 0.6).all()
    assert np.minimum(shares[:, [0, 0, 1]], shares[:, [1, 2, 2]]).sum(-1).max() < 0.05  # kinds do not mix


def test_a_kind_of_one_batch_has_its_own():
    rng = np.random.default_rng(2)
    batch = np.arange(900) % 2
    kind = np.where(batch == 0, rng.integers(2, size=900), rng.integers(3, size=900))  # the third in batch 1 alone
    rate = rng.lognormal(0, 1, 300) * np.exp(rng.normal(0, 1.2, (3, 300)) * (rng.random((3, 300)) < 0.25))[kind]
    rate *= np.exp(rng.normal(0, 0.5, (2, 300)))[batch]
    store = store_of(rng.poisson(2000 * rate / rate.sum(1, keepdims=True)), batch)
    found = weights_of(batch_effects(store, 2)[1], store)
    assert np.minimum(found[kind == 2].mean(0), found[batch == 0].mean(0)).sum() < 0.05
    assert found[kind == 2].sum(1).mean() < 0.05  # and it counts for little
    assert found[kind < 2].sum(1).mean() > 0.7


@pytest.mark.parametrize("seed", range(3))
def test_a_sort_of_one_batch_counts_for_little_whatever_its_kind(seed):
    """It is like a sort that both batches have, but for a few genes."""
    rng = np.random.default_rng(seed)
    batch = np.arange(900) % 2
    sort = np.where(batch == 0, rng.integers(2, size=900), rng.integers(3, size=900))  # the third in batch 1 alone
    log_rate = rng.normal(0, 1.2, (3, 300)) * (rng.random((3, 300)) < 0.25)
    log_rate[2] = log_rate[1] + rng.normal(0, 1.0, 300) * (rng.random(300) < 0.1)
    rate = rng.lognormal(0, 1, 300) * np.exp(log_rate)[sort] * np.exp(rng.normal(0, 0.3, (2, 300)))[batch]
    store = store_of(rng.poisson(2000 * rate / rate.sum(1, keepdims=True)), batch)
    found = weights_of(batch_effects(store, 2)[1], store).sum(1)
    of_sort = np.array([found[sort == s].mean() for s in range(3)])
    assert of_sort[2] < 0.4
    assert (of_sort[:2] > 0.6).all()


def of_six_types(shares, seed=0, n=1200):
    """Counts of 500 genes, batches and types: these shares of the types in each batch, which differ a little."""
    rng = np.random.default_rng(seed)
    batch = np.arange(n) % 2
    sort = np.array([rng.choice(6, p=np.array(shares[b]) / sum(shares[b])) for b in batch])
    log_rate = rng.normal(0, 1.5, 500) + rng.normal(0, 0.9, (6, 500)) * (rng.random((6, 500)) < 0.15)
    rate = np.exp(log_rate[sort] + rng.normal(0, 0.2, (2, 500))[batch])
    return rng.poisson(3000 * rate / rate.sum(1, keepdims=True)), batch, sort


#: Each batch holds two types of its own, five sixths of its cells; of two others both hold a few.
PARTED = [5, 5, 1, 1, 0, 0], [0, 0, 1, 1, 5, 5]


@pytest.mark.parametrize("seed", range(3))
def test_types_that_batches_do_not_share_are_not_taken_for_each_other(seed):
    x, batch, sort = of_six_types(PARTED, seed)
    store = store_of(x, batch)
    kinds = batch_effects(store, 2)[1]
    assert kinds.overlap == pytest.approx(1 / 6, abs=0.05)
    found = weights_of(kinds, store)
    alone = (sort < 2) | (sort > 3)
    assert found[alone].sum(1).mean() < 0.1
    assert found[~alone].sum(1).mean() > 0.6
    for own in (0, 1):
        for other in (4, 5):
            assert np.minimum(found[sort == own].mean(0), found[sort == other].mean(0)).sum() < 0.02


@pytest.mark.parametrize("parted", [True, False])
def test_a_gmvae_of_batches_with_types_of_their_own_drops_inputs_and_aligns_kinds_of_the_data(parted, tmp_path):
    x, batch, _ = of_six_types(PARTED if parted else [[1] * 6] * 2, n=300)
    adata = ad.AnnData(
        x.astype(np.float32), obs=pd.DataFrame({"batch": batch.astype(str)}, index=np.arange(300).astype(str))
    )
    models.GMVAE.setup_anndata(adata, batch_key="batch")
    model = models.GMVAE(adata, n_components=6, n_latent=2, n_hidden=4)
    assert (model.module.kinds.overlap < 0.5) == parted
    assert model.settings["input_dropout"] == model.module.input_dropout.level
    assert model.module.input_dropout.level == pytest.approx((x == 0).mean() if parted else 0, abs=0.01)  # 0.5 at half
    asked = models.GMVAE(adata, n_components=6, n_latent=2, n_hidden=4, input_dropout=0.1)
    assert asked.module.input_dropout.level == 0.1
    module = model.module.train()
    cells = Batch(**model._store(None).gather(np.arange(60)))
    torch.manual_seed(0)
    found = module.loss(cells)[1]["alignment"]
    torch.manual_seed(0)
    q = module.inference(cells)
    z = q["z"].rsample()
    seen = module.likelihood.encoder_input(cells.dense, cells.library)
    of_data, of_z = module.kinds(seen, cells.batch_index), module.log_q_y(seen, z, module.c(cells)).exp()
    kinds = of_data if parted else of_z
    wanted = batch_discrepancy(z, cells.batch_index, 2, kinds, within=parted)
    torch.testing.assert_close(found, module.alignment.weight * wanted)
    model.train(max_epochs=1, **FAST)
    model.save(tmp_path / "model")
    loaded = models.GMVAE.load(tmp_path / "model")
    assert loaded.settings == model.settings
    assert loaded.module.input_dropout.level == model.module.input_dropout.level
    loaded = models.GMVAE.load(tmp_path / "model", adata=adata)
    loaded.train(max_epochs=1, **FAST)
    assert loaded.module.kinds.overlap == model.module.kinds.overlap


def test_overlap_is_what_shares_of_kinds_have_in_common():
    batch, kind = np.repeat([0, 1, 2], [4, 4, 2]), np.array([0, 0, 0, 1, 0, 1, 1, 1, 2, 2])
    found = effects._alike(batch, 4, effects._members(kind, 3))  # a batch without cells as well
    shares = (
        [[0.75, 0.25, 0], [1 / 6, 3 / 6, 2 / 6]],
        [[0.25, 0.75, 0], [3 / 6, 1 / 6, 2 / 6]],
        [[0, 0, 1], [0.5, 0.5, 0]],
    )
    each = [np.minimum(*both).sum() for both in shares]
    assert found == pytest.approx(0.4 * each[0] + 0.4 * each[1] + 0.2 * each[2])


@pytest.mark.parametrize("within", [False, True])
def test_discrepancy_of_many_batches_is_that_of_those_in_the_mini_batch(within):
    torch.manual_seed(0)
    z, kinds, batch = torch.randn(40, 3), torch.rand(40, 4), torch.randint(0, 3, (40,))
    few = batch_discrepancy(z, batch, 3, kinds, within=within)
    many = batch_discrepancy(z, batch * 700 + 5, 5_000, kinds, within=within)
    torch.testing.assert_close(many, few)


def test_a_module_with_noted_draws_can_be_copied():
    module = Module(8, [2], n_latent=2, n_hidden=4).train()
    module.elbo_terms(Batch.of(torch.ones(6, 8), torch.zeros(6, dtype=torch.long)))
    assert module.alignment.has_noted
    assert not copy.deepcopy(module).alignment.has_noted


def test_overlap_is_one_where_batches_differ_by_chance():
    rng = np.random.default_rng(1)
    kind = effects._members(rng.integers(10, size=600), 10)
    for n_batch in (1, 2, 30, 150):  # down to four cells each
        batch = rng.integers(n_batch, size=600)
        assert effects._overlap(batch, n_batch, kind) > 0.9
    assert effects._overlap(np.full(600, 1), 3, kind) == 1  # one batch that has cells


@pytest.mark.parametrize("of_sparse", [True, False])
def test_fewer_inputs_are_dropped_by_default_where_few_counts_are_zero(of_sparse, tmp_path):
    rng = np.random.default_rng(0)
    x = (rng.random((200, 400)) < 0.8) * rng.integers(1, 9, (200, 400)).astype(np.float32)  # a fifth are zero
    obs = pd.DataFrame({"batch": np.arange(200) % 2}, index=np.arange(200).astype(str)).astype(str)
    adata = ad.AnnData(sparse.csr_matrix(x) if of_sparse else x, obs=obs)
    CVAE.setup_anndata(adata, batch_key="batch")
    model = CVAE(adata, n_latent=2, n_hidden=4)
    assert model.settings["input_dropout"] == model.module.input_dropout.level == pytest.approx(0.2, abs=0.01)
    model.train(max_epochs=1, **FAST)
    model.save(tmp_path / "model")
    loaded = CVAE.load(tmp_path / "model", adata=adata)
    assert loaded.module.input_dropout.level == model.module.input_dropout.level
    assert CVAE(adata, input_dropout=0.6).module.input_dropout.level == 0.6


def test_cells_are_moved_to_those_near_enough_and_no_farther_than_their_nearest():
    """On a line: a type of both batches, 1 apart; one of batch 0 alone, 9 from the nearest; one that changes by 4."""
    rng = np.random.default_rng(0)
    z = np.repeat([0.0, 1.0, -8.0, 20.0, 24.0], 40)[:, None] + rng.normal(0, 0.1, (200, 1))
    batch = np.repeat([0, 1, 0, 0, 1], 40)

    def gaps(farthest):
        means = effects._joined(z, batch, 2, farthest)[:, 0].reshape(5, 40).mean(1)
        return abs(means[0] - means[1]), abs(means[2] - means[1]), abs(means[3] - means[4])

    near, apart, changed = gaps(6.0)
    assert near < 0.4
    assert apart > 7.5
    assert changed < 0.5
    assert gaps(2.0)[2] > 3
    assert gaps(np.inf)[1] > 7.5  # batch 1 has what is nearer to its cells


def test_the_distance_between_kinds_is_that_within_a_batch():
    z = np.array([0.0, 0, 0, 3, 3, 3, 100, 100, 100, 110, 110, 110, 500])[:, None]
    batch, kind = np.repeat([0, 1], [6, 7]), np.repeat([0, 1, 0, 1, 2], [3, 3, 3, 3, 1])
    kinds = effects._members(kind, 3)
    assert effects._between_kinds(z, batch, 2, kinds) == pytest.approx(6.5)  # of 3 and 10; one cell is no kind
    assert effects._between_kinds(z, batch, 2, effects._members(np.zeros(13, int), 1)) == np.inf


def test_kinds_are_those_of_the_nearest_landmark_of_the_batch():
    torch.manual_seed(0)
    axes, landmarks, weights = torch.randn(5, 2), torch.randn(2, 3, 2), torch.rand(2, 3, 4)
    x, batch = torch.rand(6, 5), torch.arange(6) % 2
    kinds = CellKinds(axes, landmarks, weights)
    found = kinds(x, batch)
    z = (x @ axes).numpy()
    for i, b in enumerate(batch):
        nearest = np.argmin([np.linalg.norm(z[i] - point) for point in landmarks[b].numpy()])
        torch.testing.assert_close(found[i], weights[b, nearest])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kinds(x, batch), found)
    assert kinds.to("cpu") is kinds
    moved = kinds.to("meta")
    assert moved.axes.is_meta
    assert moved.landmarks.is_meta
    assert moved.weights.is_meta


def test_landmarks_stand_for_the_cells_around_them():
    """Batches of three sizes and an empty one: as many landmarks as the largest needs, those of the others repeated."""
    rng = np.random.default_rng(0)
    batch = np.repeat([0, 1, 2], [64, 16, 3])
    z = rng.normal(size=(83, 2)) + 20 * np.eye(2)[np.arange(83) % 2]
    weight = rng.random((83, 3))
    kinds = effects._landmarks(z, batch, 4, weight, np.eye(2))
    assert kinds.landmarks.shape == (4, 8, 2)
    assert (kinds.weights[3] == 0).all()
    found = kinds(torch.from_numpy(z.astype(np.float32)), torch.from_numpy(batch)).numpy()
    np.testing.assert_allclose(found[80:], np.repeat(weight[80:].mean(0)[None], 3, 0), rtol=1e-5)
    for group in (0, 1):  # of the second batch, two landmarks for cells far from each other
        rows = np.flatnonzero((batch == 1) & (np.arange(83) % 2 == group))
        np.testing.assert_allclose(found[rows], np.repeat(weight[rows].mean(0)[None], 8, 0), rtol=1e-5)


def test_cells_of_a_batch_without_landmarks_are_compared_with_nothing():
    axes, landmarks, weights = torch.randn(5, 2), torch.randn(3, 2, 2), torch.rand(3, 2, 4)
    landmarks[2], weights[2] = 0, 0  # so small a batch that none of its cells was looked at
    batch = torch.arange(30) % 3
    kinds = CellKinds(axes, landmarks, weights)(torch.rand(30, 5), batch)
    assert (kinds[batch == 2] == 0).all()
    z = torch.randn(30, 4, requires_grad=True)
    batch_discrepancy(z, batch, 3, kinds, within=True).backward()
    assert torch.isfinite(z.grad).all()
    assert (z.grad[batch == 2] == 0).all()


def test_shared_is_what_other_batches_hold_among_the_nearest(monkeypatch):
    monkeypatch.setattr(effects, "NEAREST", 4)
    z = np.concatenate([np.zeros(20), np.full(10, 5.0), np.full(10, 10.0)])[:, None] + 0.01 * np.arange(40)[:, None]
    batch = np.concatenate([np.arange(20) % 2, np.zeros(10, int), np.repeat([0, 1], 5)])
    kind = np.repeat([0, 1], [20, 20])
    found = effects._shared(z, batch, 3, effects._members(kind, 2))
    assert (found[20:30] == 0).all()  # batch 0 alone
    for i in (7, 32, 36):
        near = np.argsort(np.abs(z[:, 0] - z[i, 0]), kind="stable")[1:5]
        others = (batch != batch[i])[kind == kind[i]].mean()
        assert found[i] == pytest.approx(min(1, (batch[near] != batch[i]).mean() / others))
    everything = effects._members(np.zeros(40, int), 1)
    assert (effects._shared(z, np.zeros(40, int), 3, everything) == 0).all()  # of one batch


@pytest.mark.parametrize("seed", range(3))
def test_a_kind_that_is_rare_in_a_batch_has_counterparts_there(seed):
    """Of one kind a batch has a twentieth, of the other the rest: all are shared. Of all cells that is not seen."""
    rng = np.random.default_rng(seed)
    kind = np.repeat([0, 1], 500)
    batch = np.where(rng.random(1000) < np.where(kind == 0, 0.1, 0.9), 1, 0)
    z = rng.normal(size=(1000, 2)) + 20 * kind[:, None]
    found = effects._shared(z, batch, 2, effects._members(kind, 2))
    many = batch == kind  # those whose kind is rare in the other batch
    assert found[many].mean() > 0.7
    assert effects._shared(z, batch, 2, effects._members(np.zeros(1000, int), 1))[many].mean() < 0.25


def test_every_batch_is_looked_at_whatever_the_order_of_the_cells():
    for batch in (np.arange(400) % 4, np.arange(400) // 100):
        rows = store_of(np.zeros((400, 1)), batch).some_rows(100)
        assert (np.bincount(batch[rows]) == 25).all()
        assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(store_of(np.zeros((90, 1)), np.arange(90) % 2).some_rows(100), np.arange(90))


def test_moments_and_zeros_do_not_depend_on_the_order_of_the_cells():
    """Batches in turn: of every other cell all would be of one batch."""
    rng = np.random.default_rng(0)
    n, theta = 40_000, np.array([15.0, 0.5])
    for batch in (np.arange(n) % 2, rng.permutation(np.arange(n) % 2)):
        x = rng.poisson(20 * rng.gamma(theta[batch], 1 / theta[batch], size=(2, n)).T)
        x[batch == 1] *= rng.random((n // 2, 2)) < 0.2
        store = store_of(x.astype(np.float32), batch)
        store.cells.library = np.full((n, 1), 60, np.float32)
        assert zero_share(store) == pytest.approx((x == 0).mean(), abs=0.05)
        found = batch_moments(store, 2, zeros=False)[1]
        np.testing.assert_allclose(found[0], theta[0], rtol=0.2)
        assert (found[1] < 0.5).all()


def test_discrepancy_within_kinds_is_its_definition():
    """With kinds that are certain: of each batch and kind the plain discrepancy, by pairs."""
    torch.manual_seed(7)
    z, batch, kind = torch.randn(30, 3, dtype=torch.float64), torch.arange(30) % 2, (torch.arange(30) // 2) % 3
    batch[kind == 2] = 0  # of one batch alone: compared with nothing
    kinds = torch.nn.functional.one_hot(kind, 3).double()
    expected = 0.0
    for b in (0, 1):
        for k in (0, 1):
            here = kind == k
            one = float(batch_discrepancy(z[here], (batch[here] == b).long(), 2))  # two sides, each weighs its share
            share = min(float(kinds[side][:, k].mean()) for side in (batch == b, batch != b))
            expected += share * float((batch == b).sum()) / 30 * one
    assert float(batch_discrepancy(z, batch, 2, kinds, within=True)) == pytest.approx(expected, rel=1e-9)
    alike = torch.ones(30, 1, dtype=torch.float64)
    torch.testing.assert_close(batch_discrepancy(z, batch, 2, alike, within=True), batch_discrepancy(z, batch, 2))


def test_a_model_aligns_the_kinds_of_its_data_also_after_loading(cells, tmp_path):
    CVAE.setup_anndata(cells, batch_key="batch")
    model = CVAE(cells, n_latent=2, n_hidden=4)
    kinds = model.module.kinds
    assert kinds.axes.shape[0] == cells.n_vars
    module, store = model.module.train(), model._store(None)
    batch = Batch(**store.gather(np.arange(60)))
    torch.manual_seed(0)
    found = module.loss(batch)[1]["alignment"]
    torch.manual_seed(0)
    z = module.draw(module.inference(batch))["z"][0]
    x = module.likelihood.encoder_input(batch.dense, batch.library)
    of_data = kinds(x, batch.batch_index)
    wanted = module.alignment.weight * batch_discrepancy(z, batch.batch_index, 2, of_data, within=True)
    torch.testing.assert_close(found, wanted)
    model.save(tmp_path / "model")
    loaded = CVAE.load(tmp_path / "model", adata=cells)
    loaded.train(max_epochs=1, **FAST)
    torch.testing.assert_close(loaded.module.kinds.landmarks, kinds.landmarks)
    for options in ({"alignment": 0}, {"likelihood": "nb"}):
        assert CVAE(cells, n_latent=2, n_hidden=4, **options).module.kinds is None
