"""Likelihoods and divergences against torch.distributions, scvi.distributions and their own definitions."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.distributions as td
from torch.func import functional_call

from sccvae import _compiled, _rows
from sccvae._recording import _room_for
from sccvae._rows import SparseRows
from sccvae.distributions import (
    LIKELIHOODS,
    ZINB,
    Bernoulli,
    NegativeBinomial,
    Normal,
    NormalMixture,
    Poisson,
    as_likelihood,
    kernels,
    kl_dirichlet,
    kl_normal,
    kl_standard_normal,
    log_bernoulli,
    log_nb,
    log_normal,
    log_poisson,
    log_zinb,
)
from sccvae.distributions.counts import NBObservation

DTYPES = [torch.float64, torch.float32]
COUNTS = [0, 1, 2, 7, 60, 1e3, 1e4, 4e4]
MEANS = [1e-8, 1e-4, 0.03, 1, 20, 1e3, 1e4, 1e6]
THETAS = [1e-3, 0.05, 1, 30, 1e3, 1e4]
LOGITS = [-30, -3, 0, 2, 15]
COUNT_FAMILIES = [
    Poisson(),
    *(family(dispersion=d) for family in (NegativeBinomial, ZINB) for d in ("gene", "gene-batch", "gene-cell")),
]
REAL_FAMILIES = [Normal(sigma="gene"), Normal(sigma="shared"), Normal(sigma="latent"), Normal(sigma=0.3), Bernoulli()]


def grid(*values, dtype):
    """All combinations as one column each."""
    table = torch.tensor(list(itertools.product(*values)), dtype=torch.float64)
    return table.to(dtype).unbind(1)


def nb_reference(x, log_mu, log_theta):
    return td.NegativeBinomial(log_theta.exp(), logits=log_mu - log_theta, validate_args=False).log_prob(x)


def zinb_reference(x, log_mu, log_theta, logits):
    structural = -torch.nn.functional.softplus(-logits)
    seen = -torch.nn.functional.softplus(logits) + nb_reference(x, log_mu, log_theta)
    return torch.where(x == 0, torch.logaddexp(structural, seen), seen)


def close(got, wanted, relative=1e-5, absolute=1e-12):
    assert got.shape == wanted.shape
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got.double(), wanted.double(), rtol=relative, atol=absolute)


def id_of(likelihood):
    return "-".join(map(str, likelihood.config.values()))


# Element by element


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_poisson_equals_torch(dtype):
    x, mu = grid(COUNTS, MEANS, dtype=dtype)
    log_mu = mu.log()
    got = log_poisson(x, log_mu)
    assert got.dtype == dtype
    close(got, td.Poisson(log_mu.double().exp()).log_prob(x.double()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_nb_equals_torch(dtype):
    x, mu, theta = grid(COUNTS, MEANS, THETAS, dtype=dtype)
    log_mu, log_theta = mu.log(), theta.log()
    got = log_nb(x, log_mu, log_theta)
    assert got.dtype == dtype
    close(got, nb_reference(x.double(), log_mu.double(), log_theta.double()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_zinb_equals_torch_mixture(dtype):
    x, mu, theta, logits = grid(COUNTS, MEANS, THETAS, LOGITS, dtype=dtype)
    log_mu, log_theta = mu.log(), theta.log()
    got = log_zinb(x, log_mu, log_theta, logits)
    assert got.dtype == dtype
    close(got, zinb_reference(x.double(), log_mu.double(), log_theta.double(), logits.double()))


def test_count_log_masses_equal_scvi():
    """scvi-tools adds 1e-8 inside its logarithms, so the means stay well above that."""
    from scvi.distributions import NegativeBinomial as ScviNB
    from scvi.distributions import ZeroInflatedNegativeBinomial as ScviZINB

    x, mu, theta, logits = grid(COUNTS, [0.03, 1, 20, 1e3, 1e4], [0.05, 1, 30, 1e3, 1e4], LOGITS, dtype=torch.float64)
    close(log_nb(x, mu.log(), theta.log()), ScviNB(mu=mu, theta=theta).log_prob(x))
    zinb = ScviZINB(mu=mu[:, None], theta=theta[:, None], zi_logits=logits[:, None]).log_prob(x[:, None])[:, 0]
    torch.testing.assert_close(log_zinb(x, mu.log(), theta.log(), logits), zinb, rtol=1e-5, atol=1e-7)


def test_log_masses_sum_to_one():
    x = torch.arange(4000, dtype=torch.float64)
    log_mu, log_theta, logits = torch.tensor([3.0, 0.4, -1.0], dtype=torch.float64)
    for log_mass in (log_poisson(x, log_mu), log_nb(x, log_mu, log_theta), log_zinb(x, log_mu, log_theta, logits)):
        assert math.isclose(float(log_mass.logsumexp(0)), 0, abs_tol=1e-9)


def test_nb_with_large_theta_is_poisson():
    x = torch.arange(30, dtype=torch.float64)
    log_mu = torch.tensor(2.0, dtype=torch.float64)
    got = log_nb(x, log_mu, torch.tensor(18.0, dtype=torch.float64))
    torch.testing.assert_close(got, log_poisson(x, log_mu), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_normal_and_bernoulli_equal_torch(dtype):
    x, loc, scale = grid([-30, 0, 0.2, 1e4], [-2, 0, 9e3], [1e-3, 1, 70], dtype=dtype)
    close(log_normal(x, loc, scale), td.Normal(loc.double(), scale.double()).log_prob(x.double()))
    x, logits = grid([0, 1], [-80, -3, 0, 2, 40], dtype=dtype)
    close(log_bernoulli(x, logits), td.Bernoulli(logits=logits.double()).log_prob(x.double()))
    x, logits = grid([0.25, 0.9], [-8, 0, 5], dtype=dtype)
    p = torch.sigmoid(logits.double())
    close(log_bernoulli(x, logits), x.double() * p.log() + (1 - x.double()) * (1 - p).log())
    assert log_bernoulli(x, logits).dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_equals_torch(dtype):
    generator = torch.Generator().manual_seed(0)
    loc_q, loc_p = torch.randn(2, 50, 6, generator=generator, dtype=dtype) * 3
    scale_q, scale_p = torch.exp(torch.randn(2, 50, 6, generator=generator, dtype=dtype) * 2)
    q = td.Normal(loc_q.double(), scale_q.double())
    close(
        kl_normal(loc_q, scale_q, loc_p, scale_p),
        td.kl_divergence(q, td.Normal(loc_p.double(), scale_p.double())).sum(-1),
    )
    standard = td.Normal(torch.zeros(6, dtype=torch.float64), 1.0)
    close(kl_standard_normal(loc_q, scale_q), td.kl_divergence(q, standard).sum(-1))
    zero, one = loc_q.new_zeros(()), loc_q.new_ones(())
    torch.testing.assert_close(kl_normal(loc_q, scale_q, zero, one), kl_standard_normal(loc_q, scale_q))


def test_kl_of_equal_normals_is_zero():
    loc, scale = torch.randn(4, 3, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64) + 0.1
    assert kl_normal(loc, scale, loc, scale).abs().max() < 1e-12


def test_kl_of_large_concentrations_does_not_cancel():
    """What 1,000 and one more cell differ by, beside log-gammas of 100,000; and its gradient, in float32."""
    torch.manual_seed(0)
    alpha = 1000.0
    a = (alpha + (3 * torch.randn(50, 100)).softmax(-1)).requires_grad_()
    wide = a.detach().double().requires_grad_()
    found = kl_dirichlet(a, torch.full_like(a, alpha))
    wanted = td.kl_divergence(td.Dirichlet(wide), td.Dirichlet(torch.full_like(wide, alpha)))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-9)
    (got,), (exact,) = torch.autograd.grad(found.sum(), a), torch.autograd.grad(wanted.sum(), wide)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-9)


# Sums over genes, as the modules use them


def observation(likelihood, *, n=5, n_in=3, n_genes=40, samples=(), dtype=torch.float64, library=1e4, seed=0):
    """A built likelihood's observation with parameters spread over orders of magnitude, and its pieces."""
    torch.manual_seed(seed)
    built = as_likelihood(likelihood).build(n_in, n_genes, n_batch=2)
    with torch.no_grad():
        for p in built.parameters():
            p.normal_(0, 1.5)
    built = built.to(dtype)
    h = torch.randn(*samples, n, n_in, dtype=dtype)
    size = library * torch.rand(n, 1, dtype=dtype).add(0.5)
    batch = torch.arange(n) % 2
    return built, h, size, batch


def reference_sum(built, h, size, batch, x):
    """Log p(x), from the heads' own weights and the element-wise references, in float64."""
    x, h = x.double(), h.double()

    def head(layer):
        return h @ layer.weight.double().T + layer.bias.double()

    if isinstance(built, Bernoulli):
        return td.Bernoulli(logits=head(built.logit_head)).log_prob(x).sum(-1)
    if isinstance(built, Normal):
        sigma = built.settings["sigma"]
        if sigma == "latent":
            scale = head(built.sigma_head).exp() + built.settings["min_sigma"]
        elif isinstance(sigma, float):
            scale = torch.tensor(sigma, dtype=torch.float64)
        else:
            scale = built.log_sigma.double().exp() + built.settings["min_sigma"]
        return td.Normal(head(built.mean_head), scale).log_prob(x).sum(-1)
    log_mu = (torch.softmax(head(built.scale_head), -1) * size.double()).log()
    if isinstance(built, Poisson):
        return td.Poisson(log_mu.exp()).log_prob(x).sum(-1)
    log_theta = {
        "gene": lambda: built.log_theta.double(),
        "gene-batch": lambda: built.log_theta.double()[batch],
        "gene-cell": lambda: head(built.theta_head).clamp(-15, 15),
    }[built.settings["dispersion"]]()
    log_theta = log_theta.expand_as(log_mu)
    if isinstance(built, ZINB):
        return zinb_reference(x.expand_as(log_mu), log_mu, log_theta, head(built.zero_head)).sum(-1)
    return nb_reference(x, log_mu, log_theta).sum(-1)


@pytest.fixture(params=["numba", "torch"])
def path(request, monkeypatch):
    """Log masses of counts by the compiled loop, and by torch alone."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "has_numba", lambda: False)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("samples", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("likelihood", [*COUNT_FAMILIES, *REAL_FAMILIES], ids=id_of)
def test_log_prob_of_observation(likelihood, dtype, samples):
    built, h, size, batch = observation(likelihood, samples=samples, dtype=dtype)
    if built.support == "counts":
        x = torch.poisson(torch.full((5, 40), 0.2, dtype=dtype))
        x[0] = 0  # a cell without counts
        x[1, :4] = torch.tensor([1, 30, 1e4, 4e4], dtype=dtype)
        x[2] = 3  # a cell without zeros
    else:
        x = torch.rand(5, 40, dtype=dtype)
        if built.support == "unit":
            x = x.round()
    got = built(h, size, batch).log_prob(x)
    assert got.shape == (*samples, 5)
    assert got.dtype == dtype
    close(got, reference_sum(built, h, size, batch, x))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_prob_where_large_counts_cancel(dtype):
    """Counts near a large mean: log p(0) and the correction are thousands each, their sum a few nats."""
    built, h, _, batch = observation(NegativeBinomial(), n_genes=200, dtype=dtype)
    with torch.no_grad():
        built.scale_head.weight.mul_(0.1)
        built.scale_head.bias.zero_()
        built.log_theta.fill_(math.log(1e4))
    size = torch.full((5, 1), 200 * 3e3, dtype=dtype)
    p = built(h, size, batch)
    x = p.mean.detach().round()
    close(p.log_prob(x), reference_sum(built, h, size, batch, x))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("likelihood", COUNT_FAMILIES, ids=id_of)
def test_observation_of_a_single_cell(likelihood):
    built, h, size, batch = observation(likelihood, n=1, samples=(4,))
    x = torch.poisson(torch.full((1, 40), 0.5, dtype=torch.float64))
    close(built(h, size, batch).log_prob(x), reference_sum(built, h, size, batch, x))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("likelihood", [*COUNT_FAMILIES, *REAL_FAMILIES], ids=id_of)
def test_gradients_of_observation(likelihood):
    """Gradients with respect to the decoder output, the library size and every parameter of the likelihood."""
    built, h, size, batch = observation(likelihood, n=3, n_in=2, n_genes=5, samples=(2,), library=30.0)
    x = torch.tensor([[0, 0, 1, 0, 9], [2, 0, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.float64)
    if built.support != "counts":
        x = torch.rand(3, 5, dtype=torch.float64)
    names = [name for name, _ in built.named_parameters()]

    def log_prob(h, size, *parameters):
        return functional_call(built, dict(zip(names, parameters, strict=True)), (h, size, batch)).log_prob(x)

    inputs = [t.detach().clone().requires_grad_() for t in (h, size, *built.parameters())]
    assert torch.autograd.gradcheck(log_prob, inputs)


def test_gradients_of_elementwise_functions():
    x, log_mu, log_theta, logits = grid(
        [0, 1, 40], [-6.0, 0.5, 5.0], [-3.0, 0.0, 4.0], [-4.0, 1.0], dtype=torch.float64
    )
    log_mu, log_theta, logits = (t.detach().clone().requires_grad_() for t in (log_mu, log_theta, logits))
    assert torch.autograd.gradcheck(lambda m: log_poisson(x, m), [log_mu])
    assert torch.autograd.gradcheck(lambda m, t: log_nb(x, m, t), [log_mu, log_theta])
    assert torch.autograd.gradcheck(lambda m, t, z: log_zinb(x, m, t, z), [log_mu, log_theta, logits])
    scale = log_theta.exp().detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda m, s: log_normal(x, m, s), [log_mu, scale])
    assert torch.autograd.gradcheck(lambda z: log_bernoulli(x.clamp(max=1), z), [logits])
    q = [t.detach().clone().requires_grad_() for t in (log_mu, scale, log_theta, scale + 0.3)]
    assert torch.autograd.gradcheck(kl_normal, q)
    assert torch.autograd.gradcheck(kl_standard_normal, q[:2])


@pytest.mark.parametrize("likelihood", [*COUNT_FAMILIES, *REAL_FAMILIES], ids=id_of)
def test_float32_gradients_stay_finite_at_extremes(likelihood):
    built, h, size, batch = observation(likelihood, dtype=torch.float32, library=1e6)
    x = torch.zeros(5, 40)
    x[:, ::3] = 1.0 if built.support != "counts" else 2e4
    h = (40 * h).requires_grad_()  # far out: softmax, exp and sigmoid saturate
    log_prob = built(h, size, batch).log_prob(x)
    log_prob.sum().backward()
    assert torch.isfinite(log_prob).all()
    for gradient in (h.grad, *(p.grad for p in built.parameters())):
        assert torch.isfinite(gradient).all()


# Draws


@pytest.mark.parametrize("likelihood", [*COUNT_FAMILIES, *REAL_FAMILIES], ids=id_of)
def test_draws_have_the_stated_moments(likelihood):
    built, h, size, batch = observation(likelihood, n=2, n_in=2, n_genes=3, library=60.0, seed=3)
    with torch.no_grad():
        for p in built.parameters():
            p.mul_(0.5)
    n = 40_000
    p = built(h.expand(n, *h.shape), size, batch)
    torch.manual_seed(5)
    x = p.sample()
    assert x.shape == (n, 2, 3)
    assert not x.requires_grad
    mean = p.mean.detach()
    if isinstance(built, Bernoulli):
        variance = mean * (1 - mean)
    elif isinstance(built, Normal):
        variance = p.scale.detach().expand_as(mean) ** 2
    else:
        mu = p.log_mu.detach().exp()
        variance = mu if isinstance(built, Poisson) else mu + mu**2 / p.log_theta.detach().exp()
        if isinstance(built, ZINB):
            seen = torch.sigmoid(-p.logits.detach())
            variance = seen * (variance + (1 - seen) * mu**2)
    mean, variance = mean[0], variance.expand_as(x)[0]
    standard_error = (variance / n).sqrt()
    assert ((x.mean(0) - mean).abs() < 5 * standard_error).all()
    squares = (x - mean) ** 2
    assert ((squares.mean(0) - variance).abs() < 6 * squares.std(0) / math.sqrt(n)).all()
    if built.support == "counts":
        assert (x == x.round()).all()
        assert (x >= 0).all()


def test_a_seed_fixes_the_draws():
    for likelihood in (*COUNT_FAMILIES, *REAL_FAMILIES):
        built, h, size, batch = observation(likelihood)
        p = built(h, size, batch)
        draws = []
        for _ in range(2):
            torch.manual_seed(1)
            draws.append(p.sample())
        assert torch.equal(*draws)


# Families


def test_expression_is_proportions_times_library():
    built, h, size, batch = observation(ZINB())
    p = built(h, size, batch)
    torch.testing.assert_close(p.expression().sum(-1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(p.expression(1e4).sum(-1), torch.full((5,), 1e4, dtype=torch.float64))
    torch.testing.assert_close(p.expression(size), p.log_mu.exp())
    assert (p.mean < p.log_mu.exp()).all()
    built, h, size, batch = observation(Normal())
    p = built(h, size, batch)
    assert torch.equal(p.expression(), p.mean)
    for family in (Normal(), Poisson()):
        built, h, size, batch = observation(family)
        p, out = built(h, size, batch), torch.empty(5, p.mean.shape[-1], dtype=torch.float32)
        assert p.expression(1e4, out) is out
        torch.testing.assert_close(out, p.expression(1e4).float())


def test_heads_start_at_the_data():
    mean = torch.tensor([0.5, 0.3, 0.2, 0.0])
    h = torch.zeros(2, 3)
    for family in (Poisson(), NegativeBinomial(), ZINB()):
        built = family.build(3, 4)
        built.initialise(mean)
        proportions = built(h, torch.ones(2, 1)).expression()
        torch.testing.assert_close(proportions[0, :3], mean[:3], rtol=0.05, atol=0)
        assert 0 < proportions[0, 3] < 0.2
    normal = Normal().build(3, 4)
    normal.initialise(mean - 3)
    torch.testing.assert_close(normal(h).mean[0], mean - 3)
    bernoulli = Bernoulli().build(3, 4)
    bernoulli.initialise(torch.tensor([0.5, 0.25, 0.0, 1.0]))
    torch.testing.assert_close(bernoulli(h).mean[0], torch.tensor([0.5, 0.25, 0.0, 1.0]), rtol=0, atol=2e-3)


def test_learned_sigma_is_bounded_below():
    for sigma in ("gene", "shared", "latent"):
        built = Normal(sigma=sigma, min_sigma=0.2).build(3, 4)
        with torch.no_grad():
            for p in built.parameters():
                p.fill_(-50.0)
        scale = built(torch.ones(2, 3)).scale
        assert (scale >= 0.2 * (1 - 1e-6)).all()
        assert (scale < 0.21).all()
    assert float(Normal(sigma="unit").build(3, 4)(torch.ones(2, 3)).scale) == 1.0
    assert math.isclose(float(Normal(sigma=1e-3).build(3, 4)(torch.ones(2, 3)).scale), 1e-3, rel_tol=1e-6)


def test_dynamic_binarisation_while_training_only():
    built = Bernoulli(resample=True).build(2, 3)
    grey = torch.full((200, 3), 0.3)
    drawn = built.observe(grey)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert abs(float(drawn.mean()) - 0.3) < 0.1
    assert torch.equal(built.eval().observe(grey), grey)
    assert torch.equal(Bernoulli().build(2, 3).observe(grey), grey)


@pytest.mark.parametrize("likelihood", [*COUNT_FAMILIES, *REAL_FAMILIES, Bernoulli(resample=True)], ids=id_of)
def test_configuration_makes_an_equal_likelihood(likelihood):
    config = json.loads(json.dumps(likelihood.config))
    copy = as_likelihood(config)
    assert type(copy) is type(likelihood)
    assert copy.config == likelihood.config
    built = likelihood.build(2, 3, 2)
    other = as_likelihood(built)
    assert not list(other.parameters())  # unbuilt: two models never share parameters


def test_names_of_likelihoods():
    assert {"normal", "bernoulli", "poisson", "nb", "zinb"} <= set(LIKELIHOODS)
    assert isinstance(as_likelihood("nb"), NegativeBinomial)
    assert not isinstance(as_likelihood("nb"), ZINB)
    with pytest.raises(ValueError, match=r"No likelihood is called 'gauss'; choose one of .*'normal'"):
        as_likelihood("gauss")


@pytest.mark.parametrize("lead", [(), (5,), (2, 5)])
def test_mixture_of_normals(lead):
    """Against torch's own, with gradients; draws by their moments."""
    torch.manual_seed(0)
    given = [torch.randn(*lead, 3), torch.randn(4, 3), 0.5 * torch.randn(4, 3), torch.randn(4)]
    z, *parameters = (t.double().requires_grad_() for t in given)
    p, (loc, log_scale, logits) = NormalMixture(*parameters), parameters
    normals = td.Independent(td.Normal(loc, log_scale.exp()), 1)
    wanted = td.MixtureSameFamily(td.Categorical(logits=logits), normals)
    assert p.event_shape == wanted.event_shape
    close(p.log_prob(z), wanted.log_prob(z))
    assert torch.autograd.gradcheck(lambda z, *q: NormalMixture(*q).log_prob(z), [z, *parameters])
    joint = wanted.mixture_distribution.logits + wanted.component_distribution.log_prob(z[..., None, :])
    close(p.responsibilities(z), joint.softmax(-1))
    close(p.mean, wanted.mean)
    close(p.variance, wanted.variance)
    draws = p.sample((40_000,))
    torch.testing.assert_close(draws.mean(0), wanted.mean, atol=0.05, rtol=0)
    torch.testing.assert_close(draws.var(0), wanted.variance, atol=0.0, rtol=0.05)


@pytest.mark.parametrize(
    "make",
    [lambda: Normal(sigma="cell"), lambda: Normal(sigma=0), lambda: Normal(sigma=-1.0), lambda: Normal(min_sigma=0)],
)
def test_normal_refuses_bad_settings(make):
    with pytest.raises(ValueError, match=r"sigma must be .* positive"):
        make()


def test_dispersion_is_checked():
    with pytest.raises(ValueError, match=r"dispersion='cell' is not known; choose 'gene', 'gene-batch' or 'gene-cell'"):
        NegativeBinomial(dispersion="cell")


@pytest.mark.parametrize("cells", [576, 1], ids=["one gene", "one cell"])  # by itself, and in vectors
@pytest.mark.parametrize("family", ["nb", "zinb"])
@pytest.mark.parametrize("by", ["numba", "torch"])
def test_kernels_over_the_whole_range(family, cells, by, monkeypatch):
    """float32 against float64 autograd: counts 0 to 1e6, dispersions 1e-4 to 1e6, means at the counts and far off."""
    counts = torch.tensor([0, 1, 2, 3, 7, 20, 21, 100, 1e3, 2.5, 1e4, 1e6])
    log_theta = torch.linspace(math.log(1e-4), math.log(1e6), 12)
    x = counts[:, None].expand(12, 12).contiguous()
    shift = torch.tensor([-3.0, 0.0, 0.3, 2.0])[:, None, None]
    inputs = [(x.clamp(min=0.1).log() + shift), log_theta.expand(4, 12, 12), torch.randn(4, 12, 12)]
    inputs = [t.reshape(cells, -1).contiguous() for t in inputs[: 3 if family == "zinb" else 2]]
    x = x.expand(4, 12, 12).reshape(cells, -1).contiguous()
    slow = [t.double().requires_grad_() for t in inputs]
    fast = [t.clone().requires_grad_() for t in inputs]
    wanted = (log_zinb if family == "zinb" else log_nb)(x.double(), *slow).sum(-1)
    rows = SparseRows.of(x)
    monkeypatch.setattr(kernels, "has_numba", lambda: by == "numba")
    got = (kernels.zinb_sum if family == "zinb" else kernels.nb_sum)(rows, *fast)
    tiny = 2e-7  # what is next to zero is a difference of numbers of about one
    close(got, wanted, absolute=tiny)
    wanted.sum().backward()
    got.sum().backward()
    for a, b in zip(fast, slow, strict=True):
        close(a.grad, b.grad, absolute=tiny)


@pytest.mark.parametrize("threads", [1, 3, None], ids=["one thread", "three threads", "as on a device"])
@pytest.mark.parametrize("rows", [(1,), (7,), (2, 7), (3,)], ids=["of a gene", "of a cell", "of a draw", "of a batch"])
@pytest.mark.parametrize("inflated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_with_their_softmax(dtype, inflated, rows, threads, monkeypatch):
    """Scores and depths in place of log means, against float64 autograd; the cells parted between threads.

    As on a device: by torch, from rows that have room for more values.
    """
    monkeypatch.setattr(_compiled, "SHARE", 30)
    torch.manual_seed(0)
    x, depth = torch.poisson(torch.full((7, 40), 0.5)), torch.logspace(2, 5, 7)[:, None]
    x[0], x[6], depth = 0, 0, depth.to(dtype)
    x = counts = x.to(dtype)
    if threads is None:
        counts = _room_for(SparseRows.of(x))
        for place in (kernels, _rows):
            monkeypatch.setattr(place, "has_numba", lambda: False)
    else:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    inputs = [3 * torch.randn(2, 7, 40), torch.randn(*rows, 40)] + [torch.randn(2, 7, 40)] * inflated
    slow = [t.double().requires_grad_() for t in inputs]
    fast = [t.detach().to(dtype, copy=True).requires_grad_() for t in inputs]
    log_mu = slow[0].log_softmax(-1) + depth.double().log()
    batch = torch.tensor([0, 2, 2, 0, 2, 0, 2]) if rows == (3,) else None  # nothing of batch 1
    log_theta = slow[1] if batch is None else slow[1][batch]
    wanted = (log_zinb if inflated else log_nb)(x.double(), log_mu, log_theta, *slow[2:]).sum(-1)
    got = (kernels.zinb_sum if inflated else kernels.nb_sum)(counts, *fast, log_depth=depth.log(), rows=batch)
    close(got, wanted, absolute=1e-5)
    weight = torch.rand(2, 7)
    (wanted * weight.double()).sum().backward()
    (got * weight).sum().backward()
    for a, b in zip(fast, slow, strict=True):
        close(a.grad, b.grad, absolute=1e-4)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("factor", [1, 1e4, torch.logspace(2, 5, 7)[:, None]], ids=["one", "number", "of a cell"])
def test_shares_are_a_softmax(factor, threads, monkeypatch):
    monkeypatch.setattr(_compiled, "SHARE", 30)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    scores = 8 * torch.randn(2, 7, 40)
    scores[0, 3, 5], scores[1, 4, 6] = math.nan, math.inf
    given = scores.clone()
    wanted = scores.double().softmax(-1) * factor
    for got in (kernels.shares(scores, factor), kernels.shares(scores.clone().requires_grad_(), factor).detach()):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-12, equal_nan=True)
    assert torch.equal(scores.nan_to_num(), given.nan_to_num())
    for out in (torch.empty(2, 7, 40), torch.empty(2, 7, 40).double(), torch.empty(2, 40, 7).mT):
        got = kernels.shares(scores, factor, out)
        assert (got is out) == (out.dtype == torch.float32 and out.is_contiguous())
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("parameter", [0, 1, 2])
@pytest.mark.parametrize("count", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_do_not_hide_nan(parameter, count, dtype):
    """The training must see it: comparisons with NaN, as for a maximum, choose the other number."""
    x = torch.full((2, 9), count, dtype=dtype)
    inputs = [torch.zeros(2, 9, dtype=dtype) for _ in range(3)]
    inputs[parameter][1, 4] = math.nan
    depth = torch.zeros(2, 1, dtype=dtype)
    found = [kernels.zinb_sum(x, *inputs), kernels.zinb_sum(x, *inputs, depth)]
    if parameter < 2:
        found += [kernels.nb_sum(x, *inputs[:2]), kernels.nb_sum(x, *inputs[:2], depth)]
    for got in found:
        assert got.isnan().tolist() == [False, True]


def test_kernels_need_no_folder_for_their_cache(monkeypatch):
    import numba

    njit = numba.njit

    def refuse(*given, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*given, **options)

    monkeypatch.setattr(numba, "njit", refuse)
    loops = importlib.reload(importlib.import_module("sccvae.distributions._loops"))
    x, log_mu = torch.tensor([[0.0, 2.0]]), torch.zeros(1, 2)
    close(kernels.nb_sum(x, log_mu, log_mu), log_nb(x, log_mu, log_mu).sum(-1))
    monkeypatch.undo()
    importlib.reload(loops)


def test_kernels_are_compiled_once_for_a_machine(tmp_path):
    """A second Python finds them in the cache; each once wrote its own copy."""
    program = "import torch; from sccvae.distributions.kernels import *; x = torch.ones(1, 3); zinb_sum(x, x, x, x)"
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    written = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", program], check=True, env=environment)
        written.append(sorted(f.name for f in tmp_path.rglob("*.nbc")))
    assert written[0]
    assert written[0] == written[1]


@pytest.mark.parametrize("count", [1.0, 2.0, 3.0, 20.0])
@pytest.mark.parametrize("log_theta", [-20.0, 0.0, 32.0])
def test_many_counts_of_one_size_lose_nothing(count, log_theta):
    """Their numbers of ways are multiplied before a logarithm is taken, which must not overflow or vanish."""
    x, log_mu = torch.full((2, 300), count), torch.full((2, 300), 0.5)
    found = kernels.nb_sum(x, log_mu, torch.full((1, 300), log_theta))[0]
    mu, theta = math.exp(0.5), math.exp(log_theta)
    if log_theta > 20:  # a Poisson to float64
        one = count * 0.5 - mu - math.lgamma(count + 1)
    else:
        one = math.lgamma(count + theta) - math.lgamma(theta) - math.lgamma(count + 1)
        one += theta * (log_theta - math.log(theta + mu)) + count * (0.5 - math.log(theta + mu))
    assert float(found) == pytest.approx(300 * one, rel=1e-5)


def test_a_mean_of_zero_gives_no_counts_for_sure():
    x, mu, theta = torch.tensor([0.0, 2.0]), torch.tensor(-math.inf), torch.tensor(0.5)
    for log_p in (log_poisson(x, mu), log_nb(x, mu, theta)):
        assert log_p.tolist() == [0.0, -math.inf]


def test_dispersions_of_a_network_at_low_precision_are_read_by_the_kernels():
    """As under autocast: scores and dispersions are bfloat16, sizes float32."""
    scores, log_theta = torch.randn(2, 5, 30).bfloat16()
    x, library = torch.poisson(torch.rand(5, 30)), torch.full((5, 1), 30.0)
    p_x = NBObservation(scores, library, log_theta)
    assert kernels.applies(x, *p_x._log_means()[:1], p_x._log_theta)
    exact = NBObservation(scores.double(), library.double(), log_theta.double()).log_prob(x.double())
    torch.testing.assert_close(p_x.log_prob(x).double(), exact, rtol=1e-5, atol=1e-5)
