"""The GMVAE on bare tensors: divergences, every term by slow independent computation, bounds, and the VAT penalty."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from scipy.special import digamma
from torch.distributions import Categorical, Dirichlet, Normal, Poisson, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from sccvae.distributions import Normal as NormalLikelihood
from sccvae.distributions import expected_log_probability, kl_categorical, kl_dirichlet
from sccvae.module import GMVAE, Batch
from sccvae.nn import virtual_adversarial_penalty
from sccvae.nn.adversarial import RELATIVE_LENGTH

N, G, K = 6, 8, 4
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float64: {"rtol": 1e-10, "atol": 1e-10}}
LABELS = {"none": None, "all": [0, 3, 1, 2, 0, 1], "some": [0, -1, 3, -1, -1, 1], "unknown": [-1] * N}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def a_batch(conditions=True, labels=None, dtype=torch.float64, n=N):
    x = torch.poisson(torch.full((n, G), 2.0, dtype=dtype))
    codes = torch.arange(n) % 2 if conditions else None
    return Batch.of(x, codes, labels=None if labels is None else torch.tensor(labels))


def a_gmvae(n_components=K, conditions=True, **options):
    settings = {"n_latent": 3, "n_w": 2, "n_hidden": 7, "likelihood": "poisson"} | options
    return GMVAE(G, n_components, [2] if conditions else [], **settings).double()


# Closed forms


def log_p(*shape, dtype):
    return torch.randn(*shape, dtype=dtype).log_softmax(-1)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_divergences_are_those_of_torch(dtype):
    q, p = log_p(5, 3, K, dtype=dtype), log_p(3, K, dtype=dtype)
    wanted = kl_divergence(Categorical(logits=q), Categorical(logits=p.expand_as(q)))
    torch.testing.assert_close(kl_categorical(q, p), wanted, **TOLERANCE[dtype])
    a, b = 3 * torch.rand(5, 3, K, dtype=dtype) + 0.1, 3 * torch.rand(3, K, dtype=dtype) + 0.1
    wanted = kl_divergence(Dirichlet(a), Dirichlet(b.expand_as(a)))
    torch.testing.assert_close(kl_dirichlet(a, b), wanted, **TOLERANCE[dtype])
    assert kl_dirichlet(a, a).abs().max() < TOLERANCE[dtype]["atol"]
    assert kl_categorical(q, q).abs().max() == 0
    wanted = torch.from_numpy(digamma(a.double().numpy()) - digamma(a.double().sum(-1, keepdim=True).numpy()))
    torch.testing.assert_close(expected_log_probability(a).double(), wanted, **TOLERANCE[dtype])


def test_expected_log_probability_by_sampling():
    a = torch.tensor([0.7, 1.5, 4.0], dtype=torch.float64)
    draws = Dirichlet(a).sample((200_000,)).log()
    error = (draws.mean(0) - expected_log_probability(a)).abs() / (draws.std(0) / 200_000**0.5)
    assert error.max() < 4


def test_gradients_of_the_closed_forms():
    a, b = (torch.rand(2, K, dtype=torch.float64).add(0.2).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(kl_dirichlet, (a, b))
    assert torch.autograd.gradcheck(expected_log_probability, (a,))
    q, p = (log_p(2, K, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(kl_categorical, (q, p))


# The terms of the ELBO


def slow_terms(module, batch, seed):
    """Each term by torch.distributions and scipy, cell by cell and component by component, for one draw."""
    c = module.c(batch)
    q = module.inference(batch)
    torch.manual_seed(seed)
    z = q["z"].loc + q["z"].scale * torch.randn_like(q["z"].loc)
    w = q["w"].loc + q["w"].scale * torch.randn_like(q["w"].loc)
    h = module.decoder(z, c)
    rate = module.likelihood(h, batch.library, batch.batch_index).mean
    found = {"reconstruction": -Poisson(rate).log_prob(batch.x).sum(1)}
    if module.learned_w:
        prior_w = module.w_net(c)
        prior_w = Normal(prior_w.loc, prior_w.scale)
    else:
        prior_w = Normal(torch.zeros_like(w), torch.ones_like(w))
    found["kl_w"] = kl_divergence(Normal(q["w"].loc, q["w"].scale), prior_w).sum(1)
    log_q = module.log_q_y(batch.x.log1p(), z, c)
    hidden = module.z_body(w)
    size = 2 * module.n_latent
    kl_z, kl_y, kl_d = [], [], []
    for i in range(len(batch.x)):
        divergences = []
        for j in range(module.n_components):
            weight = module.z_head.weight[j * size : (j + 1) * size]
            out = weight @ hidden[i] + module.z_head.bias[j * size : (j + 1) * size]
            loc, raw = out[: module.n_latent], out[module.n_latent :]
            component = Normal(loc, torch.log1p(raw.exp()) + module.MIN_SCALE)
            divergences.append(kl_divergence(Normal(q["z"].loc[i], q["z"].scale[i]), component).sum())
        probability = log_q[i].exp()
        concentration = (module.alpha + probability).detach().numpy()
        expected = torch.from_numpy(digamma(concentration) - digamma(concentration.sum()))
        if not module.dirichlet:
            expected = torch.full_like(log_q[i], 1 / module.n_components).log()
        label = -1 if batch.labels is None else int(batch.labels[i])
        if label >= 0:
            kl_z.append(divergences[label])
            kl_y.append(-log_q[i, label] - expected[label])
        else:
            kl_z.append(sum(p * d for p, d in zip(probability, divergences, strict=True)))
            kl_y.append(sum(p * (p.log() - e) for p, e in zip(probability, expected, strict=True)))
        alpha = torch.full((module.n_components,), float(module.alpha), dtype=torch.float64)
        kl_d.append(kl_divergence(Dirichlet(torch.from_numpy(concentration)), Dirichlet(alpha)))
    found |= {"kl_z": torch.stack(kl_z), "kl_y": torch.stack(kl_y)}
    return found | ({"kl_d": torch.stack(kl_d)} if module.dirichlet else {})


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.3},
        {"prior": "uniform", "conditions": False},
        {"w_prior": "learned", "classifier": "z", "alpha": 2.5},
        {"prior": "uniform", "w_prior": "learned"},
    ],
    ids=["dirichlet", "uniform", "learned-z", "uniform-learned"],
)
def test_terms_are_those_of_a_slow_computation(options, labels):
    module = a_gmvae(**options).eval()
    batch = a_batch(options.get("conditions", True), LABELS[labels])
    if options.get("classifier") == "z":
        module.log_q_y, inner = lambda x, z, c: inner(None, z, c), module.log_q_y  # it must not look at x
    torch.manual_seed(11)
    terms = module.elbo_terms(batch)
    wanted = slow_terms(module, batch, seed=11)
    assert terms.keys() == wanted.keys()
    for name, term in terms.items():
        torch.testing.assert_close(term, wanted[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_warmup_is_a_vae():
    module = a_gmvae().eval()
    module.stage = "warmup"
    batch = a_batch()
    q = module.inference(batch)["z"]
    terms = module.elbo_terms(batch)
    wanted = kl_divergence(Normal(q.loc, q.scale), Normal(torch.zeros_like(q.loc), torch.ones_like(q.loc))).sum(1)
    torch.testing.assert_close(terms["kl_z"], wanted)
    assert all((terms[f"kl_{v}"] == 0).all() for v in "wyd")


COMBINATIONS = list(product(["dirichlet", "uniform"], ["fixed", "learned"], ["zx", "z"], [True, False]))


@pytest.mark.parametrize(("prior", "w_prior", "classifier", "conditions"), COMBINATIONS)
def test_declared_factors_are_those_that_act(prior, w_prior, classifier, conditions):
    options = {"prior": prior, "w_prior": w_prior, "classifier": classifier, "conditions": conditions}
    if w_prior == "learned" and not conditions:
        with pytest.raises(ValueError, match="needs a condition"):
            a_gmvae(**options)
        return
    module = a_gmvae(**options).eval()
    batch = a_batch(conditions)
    for stage in ("warmup", "mixture"):
        module.stage = stage
        terms = module.elbo_terms(batch)
        assert set(terms) == set(module.factors.terms)
        assert all(term.shape == (N,) and torch.isfinite(term).all() for term in terms.values())
    if not conditions:
        assert "c" not in module.factors.observed
        return
    other = Batch.of(batch.x, 1 - batch.codes)
    q, changed = module.inference(batch), module.inference(other)
    given = {f.variable: f.parents for f in (*module.factors.generative, *module.factors.inference) if f.kind == "p"}
    seen = {f.variable: f.parents for f in module.factors.inference}
    latents = {"z": q["z"].loc}
    for name, a, b in [
        ("z", q["z"].loc, changed["z"].loc),
        ("w", q["w"].loc, changed["w"].loc),
        ("y", *(module.log_q_y(batch.x, q["z"].loc, module.c(b)) for b in (batch, other))),
    ]:
        assert torch.allclose(a, b) == ("c" not in seen[name])
    rates = [module.generative(latents, b).mean for b in (batch, other)]
    assert torch.allclose(*rates) == ("c" not in given["x"])
    priors = [module.prior_w(b).loc.expand(N, 2) for b in (batch, other)]
    assert torch.allclose(*priors) == ("c" not in given["w"])
    by_x = [module.log_q_y(x, q["z"].loc, module.c(batch)) for x in (batch.x, batch.x + 1)]
    assert torch.allclose(*by_x) == ("x" not in seen["y"])


@pytest.mark.parametrize("alpha", [0.1, 1.0, 7.0])
def test_no_other_dirichlet_gives_a_larger_elbo(alpha):
    q = torch.rand(20, K, dtype=torch.float64).pow(3).log().log_softmax(-1)
    prior = torch.full((K,), alpha, dtype=torch.float64)

    def cost(d):
        return kl_categorical(q, expected_log_probability(d)) + kl_dirichlet(d, prior)

    best = a_gmvae(alpha=alpha).q_d(q.exp())
    torch.testing.assert_close(best, alpha + q.exp())
    assert (cost(alpha * torch.rand(500, 20, K, dtype=torch.float64) * 3 + 1e-3) > cost(best)).all()
    nearby = best * (1 + 1e-3 * torch.randn(500, 20, K, dtype=torch.float64))
    assert (cost(nearby) >= cost(best) - 1e-12).all()
    variable = best.clone().requires_grad_()
    cost(variable).sum().backward()
    assert variable.grad.abs().max() < 1e-10


def test_gradients_of_the_terms():
    """The whole loss against differences, by the parameters of the mixture and the classifier."""
    module = a_gmvae(3, alpha=0.5, n_hidden=4, activation="elu").eval()
    batch = a_batch(labels=[0, -1, 2, -1, -1, 1])
    names = ["z_head.bias", "y_head.weight", "w_head.weight"]

    def loss(*values):
        torch.manual_seed(4)
        return torch.func.functional_call(
            _Loss(module), dict(zip([f"m.{n}" for n in names], values, strict=True)), batch
        )

    parameters = dict(module.named_parameters())
    assert torch.autograd.gradcheck(loss, tuple(parameters[n].detach().clone().requires_grad_() for n in names))


class _Loss(torch.nn.Module):
    def __init__(self, m):
        super().__init__()
        self.m = m

    def forward(self, batch):
        return self.m.loss(batch)[0]


# Bounds


@pytest.mark.parametrize("options", [{}, {"prior": "uniform"}, {"w_prior": "learned"}], ids=str)
def test_importance_bound_is_above_the_elbo(options):
    module = a_gmvae(**options).eval()
    batch = a_batch()
    with torch.no_grad():
        elbo = -torch.stack([sum(module.elbo_terms(batch).values()) for _ in range(100)]).mean(0)
        assert module.log_weights(batch, 7).shape == (7, N)
        assert (module.marginal_ll(batch, 2000, 500) > elbo).all()


def test_importance_bound_is_the_evidence():
    """One-dimensional z and w: p(x) by a grid over both."""
    options = {"n_latent": 1, "n_w": 1, "n_hidden": 4, "likelihood": NormalLikelihood(sigma="unit")}
    module = GMVAE(2, 3, alpha=0.4, **options).double().eval()
    batch = Batch.of(torch.tensor([[0.5, -0.3], [1.0, 0.2]], dtype=torch.float64))
    with torch.no_grad():
        w = torch.linspace(-7, 7, 401, dtype=torch.float64)
        z = torch.linspace(-12, 12, 1201, dtype=torch.float64)
        p = module.components(w[:, None])  # (401, 3, 1)
        density = sum(Normal(p.loc[:, j], p.scale[:, j]).log_prob(z).exp() for j in range(3)) / 3  # (401, 1201)
        density = (density * Normal(0.0, 1.0).log_prob(w).exp()[:, None]).sum(0) * (w[1] - w[0])
        assert float(density.sum() * (z[1] - z[0])) == pytest.approx(1, abs=1e-4)
        for i in range(2):
            row = Batch.of(batch.x[i].expand(len(z), 2))
            likelihood = module.generative({"z": z[:, None]}, row).log_prob(row.x).exp()
            evidence = torch.log((density * likelihood).sum() * (z[1] - z[0]))
            log_w = module.log_weights(Batch.of(batch.x[i : i + 1]), 40_000)[:, 0]
            ratio = (log_w - evidence).exp()
            error = float(ratio.std() / 200)
            assert float(ratio.mean()) == pytest.approx(1, abs=5 * error)
            assert error < 0.02


def test_mixture_density():
    module = a_gmvae()
    z, w = torch.randn(5, N, 3, dtype=torch.float64), torch.randn(5, N, 2, dtype=torch.float64)
    p = module.components(w)
    assert p.loc.shape == p.scale.shape == (5, N, K, 3)
    assert p.scale.min() > module.MIN_SCALE
    wanted = torch.stack([Normal(p.loc[..., j, :], p.scale[..., j, :]).log_prob(z).sum(-1) for j in range(K)]).exp()
    torch.testing.assert_close(module.log_p_z(z, w), wanted.mean(0).log())


# Components


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[str(function)] += 1
        return function(*args, **kwargs or {})


def test_no_loop_over_components():
    """As many calls of networks, and of tensor operations forwards and backwards, for 30 components as for 5."""
    counts = []
    for k in (5, 30):
        module = a_gmvae(k)
        calls = Counter()
        for name, part in module.named_modules():
            part.register_forward_hook(lambda *_, n=name, calls=calls: calls.update([n]))
        batch = a_batch(labels=[0, -1, 2, -1, -1, 1])
        with Count() as mode:
            module.loss(batch)[0].backward()
        counts.append((calls, mode.calls))
    assert counts[0] == counts[1]
    assert counts[0][0]["z_head"] == 1


def test_components_are_placed():
    module = a_gmvae()
    loc, scale = 5 * torch.randn(K, 3, dtype=torch.float64), torch.rand(K, 3, dtype=torch.float64) + 0.1
    module.place(loc, scale)
    p = module.components(torch.randn(50, 2, dtype=torch.float64))
    assert (p.loc - loc).abs().max() < 0.3  # w bends them a little
    assert (p.scale - scale).abs().max() < 0.3
    with torch.no_grad():
        module.z_head.weight.zero_()
    p = module.components(torch.randn(5, 2, dtype=torch.float64))
    torch.testing.assert_close(p.loc, loc.expand(5, K, 3))
    torch.testing.assert_close(p.scale, scale.expand(5, K, 3))
    with pytest.raises(ValueError, match=r"\(4, 3\) needed"):
        module.place(loc[:3], scale[:3])


def test_a_placed_component_has_a_smallest_scale():
    module = a_gmvae()
    module.place(torch.zeros(K, 3, dtype=torch.float64), torch.zeros(K, 3, dtype=torch.float64))
    with torch.no_grad():
        module.z_head.weight.zero_()
    scale = module.components(torch.zeros(1, 2, dtype=torch.float64)).scale
    assert torch.isfinite(scale).all()
    assert (scale > module.MIN_SCALE).all()
    assert (scale < module.MIN_SCALE + 2e-3).all()


@pytest.mark.parametrize("classifier", ["zx", "z"])
def test_new_number_of_components(classifier):
    module = a_gmvae(classifier=classifier)
    module.set_components(9)
    module.double().eval()
    assert module.n_components == 9
    assert module.classify(a_batch()).shape == (N, 9)
    torch.testing.assert_close(module.classify(a_batch()).sum(1), torch.ones(N, dtype=torch.float64))
    assert module.elbo_terms(a_batch(labels=[8] * N))["kl_z"].shape == (N,)


def test_one_component_costs_nothing_to_choose():
    module = a_gmvae(1).eval()
    terms = module.elbo_terms(a_batch())
    for name in ("kl_y", "kl_d"):
        torch.testing.assert_close(terms[name], torch.zeros(N, dtype=torch.float64))


def test_every_parameter_gets_a_gradient():
    module = a_gmvae(w_prior="learned")
    module.loss(a_batch())[0].backward()
    assert not [name for name, p in module.named_parameters() if p.grad is None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": "flat"}, "prior='flat' is not known"),
        ({"w_prior": "none"}, "w_prior='none' is not known"),
        ({"classifier": "x"}, "classifier='x' is not known"),
        ({"alpha": 0}, "alpha=0 must be positive"),
        ({"consistency": -1}, "consistency=-1 not negative"),
        ({"masking": 1}, "masking=1 must be at least 0 and below 1"),
        ({"n_w": 0}, "n_w=0 must be at least 1"),
        ({"n_components": 0}, "n_components=0 must be at least 1"),
        ({"w_prior": "learned", "conditions": False}, "needs a condition"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        a_gmvae(**options)


# The penalty on what changes the class


def linear_classifier(n=G, k=3):
    weight = 2 * torch.randn(n, k, dtype=torch.float64)
    return lambda x: (x @ weight).log_softmax(-1)


def penalty_of(log_q, x, direction):
    r = RELATIVE_LENGTH * x.norm(dim=1, keepdim=True) * torch.nn.functional.normalize(direction, dim=1)
    return kl_categorical(log_q(x), log_q(x + r)).mean()


def test_adversarial_penalty_of_a_constant_classifier_is_zero():
    x = torch.randn(N, G, dtype=torch.float64)
    penalty = virtual_adversarial_penalty(lambda v: (0 * v[:, :3]).log_softmax(-1), x)
    assert float(penalty) == 0
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    virtual_adversarial_penalty(lambda v: (0 * v[:, :3] + bias).log_softmax(-1), x).backward()
    assert torch.isfinite(bias.grad).all()


def test_adversarial_penalty_is_the_worst_of_all_directions():
    log_q = linear_classifier()
    x = 0.2 * torch.randn(200, G, dtype=torch.float64)
    penalty = float(virtual_adversarial_penalty(log_q, x))
    random = [float(penalty_of(log_q, x, torch.randn_like(x))) for _ in range(50)]
    assert penalty > 2 * np.mean(random)
    assert penalty > max(random)


def test_adversarial_penalty_finds_the_direction_that_matters():
    """A class that depends on one feature: the perturbation lies along it, one way or the other."""
    x = torch.rand(100, G, dtype=torch.float64)
    seen = []

    def log_q(v):
        seen.append(v.detach())
        return torch.stack([5 * v[:, 0] - 2.5, -5 * v[:, 0] + 2.5], 1).log_softmax(-1)

    penalty = virtual_adversarial_penalty(log_q, x)
    r = seen[-1] - x
    assert r[:, 1:].abs().max() == 0
    torch.testing.assert_close(r[:, 0].abs(), RELATIVE_LENGTH * x.norm(dim=1))
    assert float(penalty) > 0


def test_adversarial_penalty_trains_the_classifier_alone():
    network = torch.nn.Linear(G, 3).double()
    x = torch.randn(N, G, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    penalty = virtual_adversarial_penalty(lambda v: network(v).log_softmax(-1), x)
    before = penalty.item()
    assert before >= 0
    penalty.backward()
    assert network.weight.grad.abs().max() > 0
    assert x.grad is None
    with torch.no_grad():
        network.weight -= 0.1 * network.weight.grad / network.weight.grad.norm()
    torch.manual_seed(0)
    assert virtual_adversarial_penalty(lambda v: network(v).log_softmax(-1), x).item() < before


@pytest.mark.parametrize("stage", ["mixture", "classifier", "labels"])
def test_batch_norms_take_no_note_of_disturbed_cells(stage):
    """They normalise cells as they are by what they saw of those; the cells of the penalty are changed ones."""
    module, batch = a_gmvae(norm="batch").train(), a_batch()
    module.stage = stage
    before = {k: v.clone() for k, v in module.state_dict().items()}
    assert module.penalties(batch, 1.0)["consistency"] > 0
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    module.classify(batch)
    assert any(not torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_empty_cells_are_not_disturbed():
    penalty = virtual_adversarial_penalty(linear_classifier(), torch.zeros(N, G, dtype=torch.float64))
    assert float(penalty) == 0


def test_where_the_penalty_applies():
    batch = a_batch()
    assert set(a_gmvae().penalties(batch, 1.0)) == {"consistency"}
    assert a_gmvae(consistency=0).penalties(batch, 1.0) == {}
    assert a_gmvae(classifier="z").penalties(batch, 1.0) == {}
    module = a_gmvae()
    module.stage = "warmup"
    assert module.penalties(batch, 1.0) == {}
    module = a_gmvae(masking=0.0)  # the weight is a factor
    heavy = a_gmvae(masking=0.0, consistency=5.0)
    heavy.load_state_dict(module.state_dict())
    values = []
    for m in (module.eval(), heavy.eval()):
        torch.manual_seed(2)
        values.append(m.penalties(batch, 1.0)["consistency"].item())
    assert values[1] == pytest.approx(5 * values[0])
    assert values[0] > 0


# The classifier by itself


@pytest.mark.parametrize("classifier", ["zx", "z"])
def test_the_classifier_stage_is_a_cross_entropy(classifier):
    module, batch = a_gmvae(classifier=classifier).eval(), a_batch(labels=LABELS["some"])
    module.stage = "classifier"
    terms = module.elbo_terms(batch)
    assert set(terms) == set(module.factors.terms)
    known = batch.labels >= 0
    log_q = module.classify(batch).log()[known]
    wanted = torch.nn.functional.cross_entropy(log_q, batch.labels[known], reduction="none")
    torch.testing.assert_close(terms["kl_y"][known] * known.sum() / len(known), wanted)  # the mean is over the known
    assert terms["kl_y"][~known].abs().max() == 0
    assert all(terms[name].abs().max() == 0 for name in set(terms) - {"kl_y"})
    torch.testing.assert_close(module.classify(batch, log=True).exp(), module.classify(batch))


def test_labels_are_learned_by_x_alone():
    """The classifier's loss at z = 0, as good as q(y|z,x) that forgot z; nothing of it moves the encoder."""
    module, batch = a_gmvae(masking=0.0).eval(), a_batch(labels=LABELS["some"])
    module.forget_z()
    module.stage = "classifier"
    with_z = module.elbo_terms(batch)["kl_y"]
    module.stage = "labels"
    terms = module.elbo_terms(batch)
    torch.testing.assert_close(terms["kl_y"], with_z)
    (terms["kl_y"].sum() + module.penalties(batch, 1.0)["consistency"]).backward()
    assert {name.split(".")[0] for name, p in module.named_parameters() if p.grad is not None} == {"y_body", "y_head"}
    assert module.y_head.weight.grad[:, -3:].abs().max() == 0  # its weights on z stay where they are: at zero


def test_given_classes_are_only_used():
    """The stage has the terms of the mixture, no penalty on q(y|.), and leaves q(y|.) out of what it learns."""
    module, batch = a_gmvae().eval(), a_batch(labels=LABELS["some"])
    torch.manual_seed(1)
    wanted = module.elbo_terms(batch)
    module.stage = "given"
    torch.manual_seed(1)
    found = module.elbo_terms(batch)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert module.penalties(batch, 1.0) == {}
    names = [name for name, _ in module.named_parameters()]
    learned = {name for name in names if name.startswith(module.LEARNED["given"])}
    assert set(names) - learned == {name for name in names if name.startswith(("y_body", "y_head"))}


@pytest.mark.parametrize("classifier", ["zx", "z"])
def test_the_head_decides_by_the_class_features(classifier):
    module, batch = a_gmvae(classifier=classifier).eval(), a_batch()
    features = module.class_features(batch)
    assert features.shape == (N, 7)
    h = torch.cat([features, module.inference(batch)["z"].loc], -1) if classifier == "zx" else features
    torch.testing.assert_close(module.y_head(h).softmax(-1), module.classify(batch))


def test_only_the_classifier_is_started_anew():
    module = a_gmvae()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    module.reset_classifier()
    changed = {k.split(".")[0] for k, v in module.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"y_body", "y_head"}


@pytest.mark.parametrize(("n", "penalised"), [(2, 2), (3, 2), (4, 2), (9, 5)])
def test_every_second_cell_is_penalised(n, penalised, monkeypatch):
    """Of two both are: batch norm cannot work on one."""
    seen = []

    def penalty(log_q, x, length):
        seen.append(len(x))
        return virtual_adversarial_penalty(log_q, x, length)

    monkeypatch.setattr("sccvae.module.gmvae.virtual_adversarial_penalty", penalty)
    plate = GMVAE(G, 3, likelihood="normal").train()
    loss, report = plate.loss(Batch.of(torch.randn(n, G)))
    assert torch.isfinite(loss)
    assert "consistency" in report
    assert seen == [penalised]
