"""Plates on bare tensors: declared factors against behaviour, terms of the ELBO against closed forms."""

from __future__ import annotations

import pytest
import torch

from sccvae.distributions import Bernoulli, NegativeBinomial, kernels
from sccvae.module import AE, CVAE, GMVAE, IDEC, VAE, Batch, Factor, Factorization
from sccvae.module._input import InputDropout

N, G = 6, 8
LIKELIHOODS = ["normal", "bernoulli", "poisson", "nb", "zinb"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def a_batch(n=N, g=G, dtype=torch.float32, *, unit=False):
    x = torch.rand(n, g, dtype=dtype) if unit else torch.poisson(torch.full((n, g), 2.0, dtype=dtype))
    codes = torch.stack([torch.arange(n) % 2, torch.arange(n) % 3], 1)
    return Batch(x, codes, torch.randn(n, 1, dtype=dtype), x.sum(1, keepdim=True) + 1)


SMALL = {"n_latent": 2, "n_hidden": 5}
MODULES = {
    "ae": (AE, [G], {}),
    "ae-linear": (AE, [G], {"linear": True}),
    "ae-denoising": (AE, [G], {"noise": "mask", "noise_level": 0.5}),
    "idec": (IDEC, [G, 3], {}),
    "vae-k": (VAE, [G], {"n_samples": 3, "kl": "monte_carlo"}),
    "vae-skip": (VAE, [G], {"n_layers": 3, "skip": True, "dropout": 0.1, "norm": "layer"}),
    "vae-linear": (VAE, [G], {"n_layers": 0, "likelihood": "normal"}),
    "cvae-continuous": (CVAE, [G, [], 1], {}),
    "cvae-gene-batch": (CVAE, [G, [2, 3], 1], {"likelihood": NegativeBinomial(dispersion="gene-batch")}),
}
MODULES |= {f"vae-{name}": (VAE, [G], {"likelihood": name}) for name in LIKELIHOODS}
for prior in ("fixed", "learned"):
    for encode in (True, False):
        options = {"prior": prior, "encode_condition": encode}
        MODULES[f"cvae-{prior}-q(z|x{',c' if encode else ''})"] = (CVAE, [G, [2, 3], 1], options)


@pytest.fixture(params=MODULES)
def module(request):
    cls, sizes, options = MODULES[request.param]
    return cls(*sizes, **SMALL, **options)


def suited(module, **options):
    batch = a_batch(unit=module.likelihood.support == "unit", **options)
    if hasattr(module, "conditions") and not module.conditions.n_categories:
        batch.codes = batch.codes[:, :0]
    return batch


@pytest.mark.parametrize("numba", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_input_dropout(dtype, numba, monkeypatch):
    monkeypatch.setattr(kernels, "has_numba", lambda: numba)
    torch.manual_seed(0)
    x, drop = torch.rand(999, 333, dtype=dtype) + 1, InputDropout(0.3)
    out = drop(x)
    assert out.dtype == dtype
    kept = out != 0
    torch.testing.assert_close(out[kept], x[kept] * (256 / 179))
    for rate in (kept.float().mean(), kept[::2, ::2].float().mean(), kept.flatten()[7::8].float().mean()):
        assert abs(rate - 179 / 256) < 0.005
    agree = (kept.flatten()[1:] == kept.flatten()[:-1]).float().mean()
    assert abs(agree - (0.699**2 + 0.301**2)) < 0.005  # neighbours are independent
    if dtype == torch.float32:  # the two ways draw the same bytes
        torch.manual_seed(0)
        again = torch.rand(999, 333) + 1
        assert torch.equal(drop(again.requires_grad_()), out)
    assert torch.equal(drop.eval()(x), x)
    assert torch.equal(InputDropout(0.001)(x), x)


@pytest.mark.parametrize("level", [1, -0.1])
def test_all_inputs_or_less_than_none_cannot_be_dropped(level):
    with pytest.raises(ValueError, match=f"input_dropout={level} must be at least 0 and below 1"):
        InputDropout(level)


@pytest.mark.parametrize(
    ("likelihood", "genes", "level"),
    [("nb", 300, 0.5), ("nb", 299, 0), ("normal", 800, 0), ("nb", 699, 0.5), ("poisson", 2000, 0.6)],
)
def test_counts_of_many_genes_are_dropped_by_default(likelihood, genes, level):
    assert VAE(genes, likelihood=likelihood).input_dropout.level == level
    assert CVAE(genes, [2], likelihood=likelihood).input_dropout.level == level
    assert CVAE(genes, [2], likelihood=likelihood, input_dropout=0.25).input_dropout.level == 0.25


@pytest.mark.parametrize(
    ("genes", "zeros", "level"),
    [(2000, 1, 0.6), (2000, 0.5, 0.6), (2000, 0.25, 0.3), (400, 0.1, 0.1), (299, 0.1, 0), (2000, 0, 0)],
)
def test_where_few_counts_are_zero_fewer_are_dropped(genes, zeros, level):
    assert InputDropout.of(None, "counts", genes, zeros).level == pytest.approx(level)
    assert InputDropout.of(None, "real", genes, zeros).level == 0
    assert InputDropout.of(0.45, "counts", genes, zeros).level == 0.45


@pytest.mark.parametrize(("cls", "sizes"), [(VAE, [200]), (CVAE, [200, [2, 3], 1]), (GMVAE, [200, 4, [2, 3], 1])])
def test_input_dropout_is_the_encoders_and_of_training_alone(cls, sizes):
    module, batch, seen = cls(*sizes, input_dropout=0.3), a_batch(g=200), []
    module.encoder.body.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    whole = module.likelihood.encoder_input(batch.x, batch.library)
    module.inference(batch)
    kept = seen[-1] != 0
    assert abs(float(kept[whole > 0].float().mean()) - 0.7) < 0.05
    torch.testing.assert_close(seen[-1][kept], whole[kept] * (256 / 179))  # 77 of 256 are dropped
    module.eval().inference(batch)
    assert torch.equal(seen[-1], whole)


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
        priors = [module.prior(b)["z"].mean.expand(N, 2) for b in (batch, other)]
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


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_importance_bound_is_above_the_elbo(likelihood):
    vae = VAE(G, n_latent=2, n_hidden=5, likelihood=likelihood).eval()
    batch = suited(vae)
    with torch.no_grad():
        elbo = -torch.stack([sum(vae.elbo_terms(batch).values()) for _ in range(200)]).mean(0)
        assert (vae.marginal_ll(batch, 500, 100) > elbo).all()


# Settings


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
    with pytest.raises(ValueError, match=r"prior='flat' is not known; choose 'mixture' or 'fixed' .* or 'learned'"):
        CVAE(G, [2], prior="flat")
    with pytest.raises(ValueError, match=r"needs at least one condition .*use a VAE"):
        CVAE(G, [])
    with pytest.raises(ValueError, match=r"conditions .*n_layers"):
        CVAE(G, [2], n_layers=0)
    for make in (lambda: AE(G, n_latent=0), lambda: VAE(G, n_latent=0), lambda: CVAE(G, [2], n_latent=0)):
        with pytest.raises(ValueError, match="n_latent=0 must be at least 1"):
            make()
    batchwise = NegativeBinomial(dispersion="gene-batch")  # its decoder would not be p(x|z)
    for make in (lambda: VAE(G, likelihood=batchwise), lambda: CVAE(G, [2], prior="learned", likelihood=batchwise)):
        with pytest.raises(ValueError, match=r"dispersion='gene-batch' needs .* decoder sees the batch"):
            make()
    with pytest.raises(ValueError, match="n_hidden=0 must be at least 1"):
        VAE(G, n_hidden=0)
