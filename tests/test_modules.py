"""Plates on bare tensors: declared factors against behaviour, terms of the ELBO against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from sccvae.distributions import Bernoulli, NegativeBinomial, Normal
from sccvae.module import AE, CVAE, VAE, Batch, Factor, Factorization

N, G = 6, 8
LIKELIHOODS = ["normal", "bernoulli", "poisson", "nb", "zinb"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def a_batch(n=N, g=G, dtype=torch.float32, *, unit=False):
    x = torch.rand(n, g, dtype=dtype) if unit else torch.poisson(torch.full((n, g), 2.0, dtype=dtype))
    codes = torch.stack([torch.arange(n) % 2, torch.arange(n) % 3], 1)
    return Batch(x, codes, torch.randn(n, 1, dtype=dtype), x.sum(1, keepdim=True) + 1)


def modules():
    small = {"n_latent": 2, "n_hidden": 5}
    found = {
        "ae": AE(G, **small),
        "ae-linear": AE(G, n_latent=2, linear=True),
        "ae-denoising": AE(G, noise="mask", noise_level=0.5, **small),
        "vae-k": VAE(G, n_samples=3, kl="monte_carlo", **small),
        "vae-skip": VAE(G, n_layers=3, skip=True, dropout=0.1, norm="layer", **small),
        "vae-linear": VAE(G, n_layers=0, n_latent=2, likelihood="normal"),
    }
    found |= {f"vae-{name}": VAE(G, likelihood=name, **small) for name in LIKELIHOODS}
    for prior in ("fixed", "learned"):
        for encode in (True, False):
            found[f"cvae-{prior}-{encode}"] = CVAE(G, [2, 3], 1, prior=prior, encode_condition=encode, **small)
    found["cvae-continuous"] = CVAE(G, [], 1, **small)
    found["cvae-gene-batch"] = CVAE(G, [2, 3], 1, likelihood=NegativeBinomial(dispersion="gene-batch"), **small)
    return found


MODULES = list(modules())


@pytest.fixture(params=MODULES)
def module(request):
    return modules()[request.param]


def suited(module, **options):
    batch = a_batch(unit=module.likelihood.support == "unit", **options)
    if hasattr(module, "conditions") and not module.conditions.n_categories:
        batch.codes = batch.codes[:, :0]
    return batch


# Factorisations


def test_factorization_reads_the_text():
    f = Factorization(p="p(x|z,c) p(z)", q="q(z|x,c)")
    assert f.generative == (Factor("p", "x", ("z", "c")), Factor("p", "z"))
    assert f.inference == (Factor("q", "z", ("x", "c")),)
    assert f.latent == ("z",)
    assert f.observed == ("x", "c")
    assert f.terms == ("reconstruction", "kl_z")
    assert [str(factor) for factor in f.generative] == ["p(x|z,c)", "p(z)"]
    assert str(f) == "p: p(x|z,c) p(z)\nq: q(z|x,c)"
    spaced = Factorization(p=" p( x | z , c )p(z) ", q="q(z|x,c)")
    assert spaced.generative == f.generative


def test_factorization_of_the_gmvae():
    f = Factorization(p="p(x|z,c) p(z|w,y,c) p(y|d) p(d) p(w)", q="q(z|x,c) q(w|x,c) q(y|z) q(d|z)")
    assert f.latent == ("z", "w", "y", "d")
    assert f.observed == ("x", "c")
    assert set(f.terms) == {"reconstruction", "kl_z", "kl_w", "kl_y", "kl_d"}


def test_a_deterministic_map_has_no_divergence():
    f = Factorization(p="p(x|z)", q="delta(z|x)")
    assert f.terms == ("reconstruction",)
    assert f.latent == ("z",)


@pytest.mark.parametrize(
    "p",
    [
        "",
        "x",
        "p(x|z) junk",
        "p(x|z",
        "p()",
        "p(x|)",
        "p(x|z,)",
        "p(x|,z)",
        "p(x|z c)",
        "p(x|z,,c)",
        "q(x|z)",
        "r(x)",
        "p(x,z)",
    ],
)
def test_factorization_refuses_what_is_no_factor(p):
    with pytest.raises(ValueError, match=r"Cannot read .* as factors p or delta"):
        Factorization(p=p, q="q(z|x)")


def test_factorization_refuses_two_factors_of_one_variable():
    with pytest.raises(ValueError, match="two factors"):
        Factorization(p="p(x|z) p(x|w)", q="q(z|x)")
    with pytest.raises(ValueError, match="two factors"):
        Factorization(p="p(x|z)", q="q(z|x) delta(z|x)")


def test_terms_are_those_declared(module):
    terms = module.elbo_terms(suited(module))
    assert set(terms) == set(module.factors.terms)
    for term in terms.values():
        assert term.shape == (N,)
        assert torch.isfinite(term).all()


def parents(factors, variable):
    return next((set(f.parents) for f in factors if f.variable == variable), set())


def differs(a, b):
    return not torch.allclose(a, b)


@pytest.mark.parametrize("change", ["codes", "covariates"])
def test_networks_see_what_the_factors_declare(module, change):
    """Changing the conditions changes exactly those distributions that declare c among their parents."""
    module.eval()
    batch = suited(module)
    other = Batch(batch.x, batch.codes.clone(), batch.covariates.clone(), batch.library)
    if change == "codes":
        other.codes[:, -1:] = (other.codes[:, -1:] + 1) % 2
    else:
        other.covariates += 1
    can_change = hasattr(module, "conditions") and bool(getattr(batch, change).shape[1])
    latents = [module.inference(b)["z"] for b in (batch, other)]
    values = latents if isinstance(latents[0], torch.Tensor) else [q.loc for q in latents]
    assert differs(*values) == (can_change and "c" in parents(module.factors.inference, "z"))
    generated = [module.generative({"z": values[0]}, b).mean for b in (batch, other)]
    assert differs(*generated) == (can_change and "c" in parents(module.factors.generative, "x"))
    if hasattr(module, "prior"):
        priors = [module.prior(b)["z"].loc.expand(N, 2) for b in (batch, other)]
        assert differs(*priors) == (can_change and "c" in parents(module.factors.generative, "z"))


def test_every_parameter_gets_a_gradient(module):
    objective, _ = module.loss(suited(module))
    objective.backward()
    idle = [name for name, p in module.named_parameters() if p.grad is None]
    assert not idle


def test_loss_weights_sums_and_reports(module):
    module.eval()  # no dropout or noise; draws repeat with the seed
    batch = suited(module)

    def seeded(call):
        torch.manual_seed(3)
        return call()

    terms = seeded(lambda: module.elbo_terms(batch))
    for weight in (0.0, 0.3, 1.0):
        objective, report = seeded(lambda w=weight: module.loss(batch, kl_weight=w))
        wanted = sum((weight if k.startswith("kl_") else 1) * t.mean() for k, t in terms.items())
        torch.testing.assert_close(objective, wanted)
        assert objective.requires_grad
        assert set(report) == {*terms, "elbo", "loss"}
        assert not any(value.requires_grad for value in report.values())
        torch.testing.assert_close(report["elbo"], sum(t.mean() for t in terms.values()).detach())
        torch.testing.assert_close(report["loss"], objective.detach())
        for name, term in terms.items():
            torch.testing.assert_close(report[name], term.mean().detach())


def test_batch_of_tensors():
    x = torch.arange(6.0).reshape(3, 2)
    plain = Batch.of(x)
    assert plain.library[:, 0].tolist() == [1, 5, 9]
    assert plain.codes.shape == plain.covariates.shape == (3, 0)
    assert plain.codes.dtype == torch.int64
    assert plain.batch_index is None
    given = Batch.of(x, codes=torch.tensor([1, 0, 1]), covariates=torch.ones(3, 2))
    assert given.codes.shape == (3, 1)
    assert given.batch_index.tolist() == [1, 0, 1]


# The autoencoder


def test_ae_square_error():
    ae = AE(G, n_latent=2, n_hidden=5).eval()
    batch = a_batch()
    z = ae.inference(batch)["z"]
    error = (batch.x - ae.generative({"z": z}, batch).mean).square().sum(1)
    torch.testing.assert_close(ae.elbo_terms(batch)["reconstruction"], error)


def test_linear_ae_is_affine():
    ae = AE(G, n_latent=2, linear=True, norm="batch", activation="relu")
    x = torch.randn(3, G)
    mixed = Batch.of(torch.stack([x[0], x[1], 0.3 * x[0] + 0.7 * x[1]]))
    z = ae.inference(mixed)["z"]
    torch.testing.assert_close(z[2], 0.3 * z[0] + 0.7 * z[1])
    out = ae.generative({"z": z}, mixed).mean
    torch.testing.assert_close(out[2], 0.3 * out[0] + 0.7 * out[1])


@pytest.mark.parametrize("noise", ["gaussian", "mask"])
def test_denoising_corrupts_the_input_and_keeps_the_target(noise):
    ae = AE(G, n_latent=2, linear=True, noise=noise, noise_level=0.5)
    batch = a_batch(400)
    before = batch.x.clone()
    noisy, again = (ae.inference(batch)["z"] for _ in range(2))
    assert differs(noisy, again)
    assert torch.equal(batch.x, before)
    with torch.no_grad():  # D(E(x)) = 0 whatever the noise: the error is then that of the clean target
        ae.likelihood.mean_head.weight.zero_()
        ae.likelihood.mean_head.bias.zero_()
    torch.testing.assert_close(ae.elbo_terms(batch)["reconstruction"], batch.x.square().sum(1))
    ae.eval()
    assert torch.equal(ae.inference(batch)["z"], ae.inference(batch)["z"])


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
    batch = a_batch(dtype=torch.float64)
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
    ae.latent.linear.load_state_dict(vae.encoder.loc.state_dict())
    ae.decoder.load_state_dict(vae.decoder.state_dict())
    ae.likelihood.mean_head.load_state_dict(vae.likelihood.mean_head.state_dict())
    batch = a_batch(dtype=torch.float64)
    loss, _, _ = scaled_loss(vae, batch, sigma)
    torch.testing.assert_close(2 * loss, ae.elbo_terms(batch)["reconstruction"], rtol=1e-3, atol=0)


# Monte Carlo


def test_analytic_kl_equals_torch():
    for vae in (VAE(G, n_latent=3), CVAE(G, [2, 3], 1, n_latent=3, prior="learned")):
        vae.double().eval()
        batch = a_batch(dtype=torch.float64)
        kl = kl_divergence(vae.inference(batch)["z"], vae.prior(batch)["z"]).sum(-1)
        torch.testing.assert_close(vae.elbo_terms(batch)["kl_z"], kl)


@pytest.mark.parametrize("prior", ["fixed", "learned"])
def test_monte_carlo_kl_converges_to_the_analytic_one(prior):
    torch.manual_seed(0)
    batch = a_batch(300, dtype=torch.float64)
    cvae = CVAE(G, [2, 3], 1, n_latent=3, prior=prior, kl="monte_carlo").double().eval()
    with torch.no_grad():
        q, p = cvae.inference(batch)["z"], cvae.prior(batch)["z"]
        exact = kl_divergence(q, p).sum(-1)
        errors = {}
        for k in (4, 64, 1024):
            cvae.n_samples = k
            errors[k] = (cvae.elbo_terms(batch)["kl_z"] - exact).square().mean().sqrt().item()
    assert errors[4] / errors[64] == pytest.approx(4, rel=0.25)  # 1 / sqrt(k)
    assert errors[64] / errors[1024] == pytest.approx(4, rel=0.25)


def test_k_sample_elbo_is_a_mean_over_draws():
    """Same expectation whatever k, and 1/sqrt(k) the spread."""
    batch = a_batch(2, dtype=torch.float64)
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


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_importance_bound_is_above_the_elbo(likelihood):
    vae = VAE(G, n_latent=2, n_hidden=5, likelihood=likelihood).eval()
    batch = suited(vae)
    with torch.no_grad():
        elbo = -torch.stack([sum(vae.elbo_terms(batch).values()) for _ in range(200)]).mean(0)
        assert (vae.marginal_ll(batch, 500, 100) > elbo).all()


# Learning and settings


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


def test_dynamic_binarisation_gives_encoder_and_decoder_the_same_pixels():
    vae = VAE(G, n_latent=2, n_hidden=5, likelihood=Bernoulli(resample=True))
    seen = []
    vae.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    inner = vae.generative

    def spy(latents, batch):
        seen.append(batch.x)
        return inner(latents, batch)

    vae.generative = spy
    batch = a_batch(unit=True)
    grey = batch.x.clone()
    vae.elbo_terms(batch)
    assert torch.equal(*seen)
    assert set(seen[0].unique().tolist()) == {0.0, 1.0}
    assert torch.equal(batch.x, grey)
    seen.clear()
    vae.eval().elbo_terms(batch)
    assert torch.equal(seen[0], grey)


def test_modules_refuse_bad_settings():
    with pytest.raises(ValueError, match=r"kl='exact', n_samples=1: choose kl='analytic' or 'monte_carlo'"):
        VAE(G, kl="exact")
    with pytest.raises(ValueError, match=r"n_samples=0: .*n_samples >= 1"):
        VAE(G, n_samples=0)
    with pytest.raises(ValueError, match=r"prior='flat' is not known; choose 'fixed' .* or 'learned'"):
        CVAE(G, [2], prior="flat")
    with pytest.raises(ValueError, match=r"needs at least one condition .*use a VAE"):
        CVAE(G, [])
    with pytest.raises(ValueError, match=r"conditions .*n_layers"):
        CVAE(G, [2], n_layers=0)
    for make in (lambda: AE(G, n_latent=0), lambda: VAE(G, n_latent=0), lambda: CVAE(G, [2], n_latent=0)):
        with pytest.raises(ValueError, match="n_latent=0 must be at least 1"):
            make()
    with pytest.raises(ValueError, match="n_hidden=0 must be at least 1"):
        VAE(G, n_hidden=0)
