"""Bounds of the evidence against closed forms: sigma to zero, Monte Carlo, importance sampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from sccvae.distributions import Normal
from sccvae.module import AE, CVAE, VAE, Batch

G = 8


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def a_batch(n=6):
    x = torch.poisson(torch.full((n, G), 2.0, dtype=torch.float64))
    codes = torch.stack([torch.arange(n) % 2, torch.arange(n) % 3], 1)
    return Batch(x, codes, torch.randn(n, 1, dtype=torch.float64), x.sum(1, keepdim=True) + 1)


# sigma -> 0: equation 4.15


def sigma_vae(sigma, g=G):
    torch.manual_seed(1)
    return VAE(g, n_latent=2, n_hidden=5, likelihood=Normal(sigma=sigma), norm=None).double().eval()


def scaled_loss(vae, batch, sigma):
    """sigma^2 (-ELBO without the normalising constant), and the half square error of the same draw of z."""
    torch.manual_seed(2)
    terms = vae.elbo_terms(batch)
    torch.manual_seed(2)
    z = vae.inference(batch)["z"].rsample((1,))
    half_error = 0.5 * (batch.x - vae.generative({"z": z}, batch).mean[0]).square().sum(1)
    constant = G * (math.log(sigma) + 0.5 * math.log(2 * math.pi))
    return sigma**2 * (sum(terms.values()) - constant), half_error, terms["kl_z"]


def test_sigma_to_zero_gives_the_square_error():
    """With standard deviation sigma the right factor is sigma^2; what is left over is sigma^2 KL."""
    batch = a_batch()
    gaps = []
    for sigma in (1, 2**-3, 2**-6, 2**-9):  # whole in float32 too, the type of a fixed sigma
        with torch.no_grad():
            loss, half_error, kl = scaled_loss(sigma_vae(sigma), batch, sigma)
        torch.testing.assert_close(loss - half_error, sigma**2 * kl, rtol=1e-4, atol=1e-12)
        gaps.append(float((loss - half_error).abs().mean()))
    ratios = np.divide(gaps[:-1], gaps[1:])
    np.testing.assert_allclose(ratios, 64, rtol=0.01)  # quadratic in sigma
    torch.testing.assert_close(loss, half_error, rtol=1e-4, atol=0)


def test_sigma_vae_without_encoder_noise_is_the_ae():
    """The AE with the same weights has twice the limit as its loss."""
    sigma = 1e-3
    vae = sigma_vae(sigma)
    with torch.no_grad():
        vae.encoder.scale.weight.zero_()
        vae.encoder.scale.bias.fill_(-60.0)
    ae = AE(G, n_latent=2, n_hidden=5, norm=None).double().eval()
    ae.encoder.load_state_dict(vae.encoder.body.state_dict())
    ae.latent.linear.load_state_dict({"weight": vae.encoder.loc.weight.T, "bias": vae.encoder.loc.bias})
    ae.decoder.load_state_dict(vae.decoder.state_dict())
    ae.likelihood.mean_head.load_state_dict(vae.likelihood.mean_head.state_dict())
    batch = a_batch()
    loss, _, _ = scaled_loss(vae, batch, sigma)
    torch.testing.assert_close(2 * loss, ae.elbo_terms(batch)["reconstruction"], rtol=1e-3, atol=0)


# Monte Carlo


def test_analytic_kl_equals_torch():
    for vae in (VAE(G, n_latent=3), CVAE(G, [2, 3], 1, n_latent=3, prior="learned")):
        vae.double().eval()
        batch = a_batch()
        kl = kl_divergence(vae.inference(batch)["z"], vae.prior(batch)["z"]).sum(-1)
        torch.testing.assert_close(vae.elbo_terms(batch)["kl_z"], kl)


@pytest.mark.parametrize("prior", ["fixed", "learned"])
def test_monte_carlo_kl_converges_to_the_analytic_one(prior):
    torch.manual_seed(0)
    batch = a_batch(300)
    cvae = CVAE(G, [2, 3], 1, n_latent=3, prior=prior, kl="monte_carlo").double().eval()
    with torch.no_grad():
        q, p = cvae.inference(batch)["z"], cvae.prior(batch)["z"]
        exact = kl_divergence(q, p).sum(-1)
        errors = {}
        for k in (4, 32, 256):
            cvae.n_samples = k
            errors[k] = (cvae.elbo_terms(batch)["kl_z"] - exact).square().mean().sqrt().item()
    assert errors[4] / errors[32] == pytest.approx(8**0.5, rel=0.2)  # 1 / sqrt(k)
    assert errors[32] / errors[256] == pytest.approx(8**0.5, rel=0.2)


def test_k_sample_elbo_is_a_mean_over_draws():
    """Same expectation whatever k, and 1/sqrt(k) the spread."""
    batch = a_batch(2)
    vae = VAE(G, n_latent=2, n_hidden=5, likelihood="poisson").double().eval()
    with torch.no_grad():
        vae.n_samples = 20_000
        wanted = vae.elbo_terms(batch)["reconstruction"]
        many = repeated(batch, 1000)
        vae.n_samples = 1
        single = vae.elbo_terms(many)["reconstruction"].reshape(1000, 2)
        vae.n_samples = 16
        several = vae.elbo_terms(many)["reconstruction"].reshape(1000, 2)
    for draws in (single, several):
        assert ((draws.mean(0) - wanted).abs() < 5 * draws.std(0) / math.sqrt(1000) + 5 * single.std(0) / 141).all()
    torch.testing.assert_close(single.std(0) / several.std(0), torch.full((2,), 4.0).double(), rtol=0.15, atol=0)


# The importance bound against exact evidence


def linear_gaussian(conditional):
    """A model with known evidence: x = W z + b + noise, z ~ N(0, I) or N(m(c), s(c)); q is not the posterior."""
    torch.manual_seed(4)
    sigma, g, d = 0.5, 5, 2
    if conditional:
        model = CVAE(
            g, [2], n_latent=d, n_hidden=4, prior="learned", likelihood=Normal(sigma=sigma), encode_condition=False
        )
        model.decoder = torch.nn.Identity()  # affine: body of the decoder left out
        model.decoder.forward = lambda z, c=None: z
        model.likelihood.mean_head = torch.nn.Linear(d, g)
    else:
        model = VAE(g, n_latent=d, n_layers=0, likelihood=Normal(sigma=sigma))
    model = model.double().eval()
    x = torch.randn(7, g, dtype=torch.float64) * 1.5
    batch = Batch.of(x, codes=torch.arange(7) % 2)
    with torch.no_grad():
        if not conditional:  # the posterior mean, too wide
            w, b = model.likelihood.mean_head.weight, model.likelihood.mean_head.bias
            posterior = torch.linalg.inv(torch.eye(d) + w.T @ w / sigma**2)
            model.encoder.loc.weight.copy_(posterior @ w.T / sigma**2)
            model.encoder.loc.bias.copy_(-model.encoder.loc.weight @ b)
            model.encoder.scale.weight.zero_()
            model.encoder.scale.bias.copy_(torch.log(torch.expm1(1.5 * posterior.diagonal().sqrt())))
        p = model.prior(batch)["z"]
        loc, scale = p.loc.expand(7, d), p.scale.expand(7, d)
        w, b = model.likelihood.mean_head.weight, model.likelihood.mean_head.bias
        covariance = w @ torch.diag_embed(scale**2) @ w.T + sigma**2 * torch.eye(g, dtype=torch.float64)
        evidence = MultivariateNormal(loc @ w.T + b, covariance).log_prob(x)
    return model, batch, evidence


def repeated(batch, times):
    return Batch.of(batch.x.repeat(times, 1), codes=batch.codes.repeat(times, 1))


@pytest.mark.parametrize("conditional", [False, True])
def test_importance_bound_equals_the_evidence(conditional):
    model, batch, evidence = linear_gaussian(conditional)
    with torch.no_grad():
        log_w = model.log_weights(batch, 40_000)
        weights = (log_w - evidence).exp()  # mean 1 if unbiased
        assert log_w.shape == (40_000, 7)
        error = weights.std(0) / math.sqrt(len(weights))
        assert ((weights.mean(0) - 1).abs() < 5 * error).all()
        assert (error < 0.1).all()
        bound = model.marginal_ll(batch, 40_000, chunk=3_000)
        assert bound.shape == (7,)
        assert ((bound - evidence).exp() - 1).abs().lt(5 * error).all()


@pytest.mark.parametrize("conditional", [False, True])
def test_importance_bound_tightens_from_the_elbo_to_the_evidence(conditional):
    model, batch, evidence = linear_gaussian(conditional)
    with torch.no_grad():
        model.n_samples = 20_000
        elbo = -sum(model.elbo_terms(batch).values())
        bounds = [model.marginal_ll(repeated(batch, 3000 // k), k, chunk=10).mean() for k in (1, 3, 20, 200)]
    assert (elbo < evidence).all()
    assert bounds == sorted(bounds)
    assert float(bounds[0]) == pytest.approx(float(elbo.mean()), rel=0.05)
    assert float(elbo.mean()) < float(bounds[1]) < float(evidence.mean()) + 0.05


def test_chunks_of_the_importance_bound():
    """The same draws give the same bound; the number of draws is right whatever the chunk, and so is their size."""
    model, batch, _ = linear_gaussian(False)
    drawn = []
    inner = model.log_weights

    def spy(batch, n_samples):
        drawn.append(inner(batch, n_samples))
        return drawn[-1]

    model.log_weights = spy
    with torch.no_grad():
        for n, chunk, sizes in ((10, 3, [3, 3, 3, 1]), (10, 10, [10]), (10, 64, [10]), (1, 1, [1])):
            drawn.clear()
            bound = model.marginal_ll(batch, n, chunk)
            assert [len(w) for w in drawn] == sizes
            torch.testing.assert_close(bound, torch.cat(drawn).logsumexp(0) - math.log(n))
    apart = {}
    for chunk in (7, 100):
        torch.manual_seed(0)
        with torch.no_grad():
            apart[chunk] = model.marginal_ll(repeated(batch, 300), 100, chunk).reshape(300, 7)
    error = (apart[7].var(0) + apart[100].var(0)).div(300).sqrt()
    assert ((apart[7].mean(0) - apart[100].mean(0)).abs() < 5 * error).all()


# Learning


def test_vae_learns_a_linear_gaussian_model():
    """At the optimum the ELBO of probabilistic PCA is its evidence: q can be the posterior."""
    torch.manual_seed(0)
    w = torch.randn(4, 1)
    x = torch.randn(500, 1) @ w.T + 0.3 * torch.randn(500, 4)
    vae = VAE(4, n_latent=1, n_layers=0, likelihood=Normal(sigma="shared"))
    batch = Batch.of(x)
    optimizer = torch.optim.Adam(vae.parameters(), lr=0.03)
    for _ in range(400):
        optimizer.zero_grad()
        vae.loss(batch)[0].backward()
        optimizer.step()
    covariance = torch.cov(x.T, correction=0)
    values = torch.linalg.eigvalsh(covariance)
    noise = values[:-1].mean()
    vectors = torch.linalg.eigh(covariance).eigenvectors
    best = noise * torch.eye(4) + (values[-1] - noise) * torch.outer(vectors[:, -1], vectors[:, -1])
    evidence = float(MultivariateNormal(x.mean(0), best).log_prob(x).mean())
    with torch.no_grad():
        elbo = -float(torch.stack([vae.loss(batch)[1]["elbo"] for _ in range(50)]).mean())
    assert evidence - 0.05 < elbo < evidence + 0.01
    assert float(vae.likelihood.sigma().detach()) == pytest.approx(float(noise.sqrt()), rel=0.05)
