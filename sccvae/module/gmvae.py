"""Gaussian-mixture variational autoencoder with a Dirichlet prior (DESIGN: source text, chapter 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn.functional import one_hot, softplus

from sccvae.distributions import (
    Likelihood,
    Observation,
    expected_log_probability,
    kl_categorical,
    kl_dirichlet,
    kl_normal,
    kl_standard_normal,
)
from sccvae.module._base import Batch, EvidenceModule, StandardNormal, kl_of
from sccvae.module._batches import PARTED, Alignment, aligned, likelihood_of, one_of
from sccvae.module._factorization import Factorization
from sccvae.module._input import InputDropout, encoder_input
from sccvae.nn import (
    MLP,
    CellKinds,
    Conditions,
    GaussianEncoder,
    Masking,
    SparseRows,
    check_sizes,
    untracked_statistics,
    virtual_adversarial_penalty,
)
from sccvae.nn.adversarial import RELATIVE_LENGTH


class GMVAE(EvidenceModule):
    """Gaussian-mixture VAE: p(x|z,c) p(z|w,y) p(y|d) p(d) p(w), with y of K components summed out exactly.

    A cell's class y picks a normal N(z; mu_y(w), sigma_y(w)); w, a second latent vector, bends the components, so that
    a cluster need not be a normal. Conditions c enter as in the CVAE: with ``w_prior="fixed"`` the decoder knows c, and
    z and w forget it; with ``w_prior="learned"`` c enters through p(w|c) alone, and w tells the conditions apart.

    A batch with labels is (semi-)supervised: rows with a label take its component, the others sum y out.

    Parameters
    ----------
    n_features
        Number G of features.
    n_components
        Number K of components.
    n_categories, n_continuous
        Conditions, as for :class:`sccvae.module.CVAE`; none by default.
    prior
        ``"dirichlet"``: y ~ Cat(d), d ~ Dir(alpha), both for each cell. ``"uniform"``: y ~ Cat(1/K).
    alpha
        Concentration of the symmetric Dirichlet. A small one wants cells in a single component each; a large one leaves
        them between components.
    w_prior
        p(w) = N(0, I) (``"fixed"``) or p(w|c) by a network (``"learned"``).
    classifier
        ``"zx"``: q(y|z,x) by a network of its own; ``"z"``: q(y|z).
    consistency
        Weight of the virtual adversarial penalty on q(y|z,x): a small change of x must not change the class.
    masking
        Probability with which an input of the encoder is set to zero while training (a denoising encoder).
    alignment
        As for :class:`sccvae.module.CVAE`, a penalty on the distance between the batches in z, where the decoder knows
        them (not with ``w_prior="learned"``); but None is always 0.2 for each feature, at most 200.
    likelihood
        As for :class:`sccvae.module.CVAE`; None for the negative binomial, batchwise if the decoder knows a batch.
    n_latent, n_hidden, n_layers, activation, norm, dropout, skip
        As for :class:`sccvae.module.VAE`.
    n_w
        Dimension of w.
    input_dropout
        Probability that a value of x is hidden from q(z|x,c) and q(w|x,c) in training, those left are scaled up; q(y|.)
        sees all. None for 0.

    Attributes
    ----------
    kinds
        As for :class:`sccvae.module.CVAE`; they count only where the batches share few (an overlap below 0.5).
    stage
        ``"mixture"``; ``"warmup"``: a VAE with p(z) = N(0, I), whose other terms are zero; ``"classifier"``: q(y|.)
        learns the labels of the batch, and ``kl_y`` is the only term that is not zero: -log q(y|.) of the cells with a
        label, whose mean over the batch is that over these cells. ``"labels"``: the same by x alone, whatever z.
        ``"given"``: the mixture, with q(y|.) as it is.

    Raises
    ------
    ValueError
        If an option is not known or a number is out of range.
    """

    #: What begins the names of the weights that a stage learns.
    LEARNED: ClassVar = {
        "warmup": ("encoder", "decoder", "likelihood"),
        "classifier": ("y_",),
        "labels": ("y_",),
        "mixture": ("",),
        "given": ("encoder", "w_", "z_", "decoder", "likelihood"),
    }
    #: The consistency penalty: length of the small change, as a share of that of x, and which cells have it. Batches
    #: are shuffled, and it needs three more passes: every second cell will do. True labels tell where the borders
    #: are, and let it be shorter (Fashion-MNIST with 10 %, the classifier alone: 0.881, not 0.875) and on every cell.
    PENALTY: ClassVar = {"classifier": (RELATIVE_LENGTH, 2), "mixture": (RELATIVE_LENGTH, 2), "labels": (0.1, 1)}
    #: Smallest standard deviation of a component: none can shrink onto a single cell.
    MIN_SCALE = 0.05
    nets_of_c = ("w_net",)
    classifiers = ("y_body",)

    def __init__(
        self,
        n_features: int,
        n_components: int = 10,
        n_categories: Sequence[int] = (),
        n_continuous: int = 0,
        *,
        prior: Literal["dirichlet", "uniform"] = "dirichlet",
        alpha: float = 1.0,
        w_prior: Literal["fixed", "learned"] = "fixed",
        classifier: Literal["zx", "z"] = "zx",
        consistency: float = 1.0,
        masking: float = 0.0,
        alignment: float | None = None,
        likelihood: str | dict | Likelihood | None = None,
        n_latent: int = 10,
        n_w: int = 10,
        n_hidden: int = 128,
        n_layers: int = 1,
        activation: str = "relu",
        norm: Literal["batch", "layer"] | None = "batch",
        dropout: float = 0.0,
        skip: bool = False,
        input_dropout: float | None = None,
    ) -> None:
        super().__init__()
        for name, value, known in [
            ("prior", prior, ("dirichlet", "uniform")),
            ("w_prior", w_prior, ("fixed", "learned")),
            ("classifier", classifier, ("zx", "z")),
        ]:
            if value not in known:
                msg = f"{name}={value!r} is not known; choose one of {known}."
                raise ValueError(msg)
        check_sizes(n_components=n_components, n_w=n_w)
        if alpha <= 0 or consistency < 0:
            msg = f"alpha={alpha} must be positive, consistency={consistency} not negative."
            raise ValueError(msg)
        self.conditions = Conditions(n_categories, n_continuous)
        n_cond = self.conditions.width
        self.learned_w = w_prior == "learned"
        if self.learned_w and not n_cond:
            msg = "w_prior='learned' is p(w|c): it needs a condition; use w_prior='fixed' without one."
            raise ValueError(msg)
        self.dirichlet, self.alpha = prior == "dirichlet", alpha
        self.classifier_sees_x, self.consistency = classifier == "zx", consistency
        self.n_latent, self.n_w = n_latent, n_w
        self.stage: Literal["warmup", "classifier", "labels", "mixture", "given"] = "mixture"
        self.factors = self._factors(bool(n_cond))

        mlp = {"activation": activation, "norm": norm, "dropout": dropout, "skip": skip}
        mlp["n_hidden"] = [n_hidden] * n_layers
        n_decoder_cond = 0 if self.learned_w else n_cond
        self.masking = Masking(masking)
        self.input_dropout = InputDropout(input_dropout or 0.0)
        self.encoder = GaussianEncoder(n_features, n_latent, n_cond=n_cond, **mlp)
        self.w_head = nn.Linear(self.encoder.body.n_out, 2 * n_w)
        self.y_body = MLP(n_features if self.classifier_sees_x else n_latent, n_cond=n_cond, **mlp)
        self.decoder = MLP(n_latent, n_cond=n_decoder_cond, **mlp)
        self.w_net = GaussianEncoder(n_cond, n_w, n_hidden=[n_hidden], norm=None) if self.learned_w else None
        self.z_body = MLP(n_w, [n_hidden], norm=None)
        n_batch = self.conditions.n_categories[0] if n_categories and n_decoder_cond else None
        self.likelihood = likelihood_of(likelihood, n_batch).build(self.decoder.n_out, n_features, n_batch)
        self.alignment = Alignment(alignment, n_batch, n_features)
        self.kinds: CellKinds | None = None
        self.set_components(n_components)

    def _factors(self, conditional: bool) -> Factorization:
        c = ",c" if conditional else ""
        y = "p(y|d) p(d)" if self.dirichlet else "p(y)"
        x = f"p(x|z) p(z|w,y) {y} p(w|c) p(c)" if self.learned_w else f"p(x|z{c}) p(z|w,y) {y} p(w)"
        seen = ("z,x" if self.classifier_sees_x else "z") + c
        q = f"q(z|x{c}) q(w|x{c}) q(y|{seen})" + (f" q(d|{seen})" if self.dirichlet else "")
        return Factorization(p=x, q=q)

    def set_components(self, n_components: int) -> None:
        """Make the heads that depend on K anew: the components of p(z|w,y) and the classes of q(y|.)."""
        check_sizes(n_components=n_components)
        self.n_components = n_components
        n_y = self.y_body.n_out + (self.n_latent if self.classifier_sees_x else 0)
        device = self.device
        self.y_head = nn.Linear(n_y, n_components).to(device)
        self.z_head = nn.Linear(self.z_body.n_out, n_components * 2 * self.n_latent).to(device)

    @torch.no_grad()
    def place(self, loc: Tensor, scale: Tensor) -> None:
        """Put the components at ``loc`` with standard deviations ``scale``, both (K, d)."""
        if loc.shape != (self.n_components, self.n_latent) or scale.shape != loc.shape:
            msg = f"loc {tuple(loc.shape)} and scale {tuple(scale.shape)}: {(self.n_components, self.n_latent)} needed."
            raise ValueError(msg)
        raw = (scale - self.MIN_SCALE).clamp(min=1e-3)
        raw = raw + torch.log(-torch.expm1(-raw))  # the inverse of softplus
        self.z_head.bias.copy_(torch.stack([loc, raw], 1).reshape(-1))
        self.z_head.weight.mul_(0.1)

    def c(self, batch: Batch) -> Tensor:
        """The vector of conditions, (n, C)."""
        return self.conditions(batch.codes, batch.covariates)

    # ---- q

    def inference(self, batch: Batch) -> dict[str, Normal]:
        """q(z|x,c) and q(w|x,c), from one network."""
        x = self.input_dropout(self.masking(encoder_input(self.likelihood, batch)))
        h = self.encoder.body(x, self.c(batch))
        loc, scale = self.w_head(h).chunk(2, -1)
        return {"z": self.encoder.head(h), "w": Normal(loc, softplus(scale) + GaussianEncoder.MIN_SCALE, False)}

    def log_q_y(self, x: Tensor | SparseRows, z: Tensor, c: Tensor) -> Tensor:
        """Log-probabilities of q(y|z,x,c) or q(y|z,c), (n, K), for encoder input x (n, G), z (n, d) and c (n, C)."""
        h = torch.cat([self.y_body(x, c), z], -1) if self.classifier_sees_x else self.y_body(z, c)
        return self.y_head(h).log_softmax(-1)

    def classify(self, batch: Batch, *, log: bool = False) -> Tensor:
        """Probability of each component at the mean of q(z|x,c), (n, K), or its logarithm."""
        unknown = batch.library.new_zeros(len(batch), self.n_latent)
        z = unknown if self.stage == "labels" else self.inference(batch)["z"].loc
        log_q = self.log_q_y(encoder_input(self.likelihood, batch), z, self.c(batch))
        return log_q if log else log_q.exp()

    def class_features(self, batch: Batch) -> Tensor:
        """What q(y|.) decides by: the last hidden layer of its network, (n, n_hidden)."""
        seen = encoder_input(self.likelihood, batch) if self.classifier_sees_x else self.inference(batch)["z"].loc
        return self.y_body(seen, self.c(batch))

    @torch.no_grad()
    def forget_z(self) -> None:
        """Let q(y|z,x) be q(y|x): its weights on z become zero, and stay so at the stage ``"labels"``."""
        self.y_head.weight[:, -self.n_latent :] = 0

    def reset_classifier(self) -> None:
        """Start q(y|.) anew."""
        for layer in [*self.y_body.modules(), self.y_head]:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()

    def q_d(self, q_y: Tensor) -> Tensor:
        """Concentration of q(d|z,x), (n, K): alpha + q(y), the Dirichlet with the largest ELBO (y unseen)."""
        return self.alpha + q_y

    # ---- p

    def components(self, w: Tensor) -> Normal:
        """p(z|w,y) for every y at once: loc and scale (..., n, K, d) for w (..., n, n_w)."""
        loc, scale = self.z_head(self.z_body(w)).unflatten(-1, (self.n_components, 2, self.n_latent)).unbind(-2)
        scale = softplus(scale.contiguous()) + self.MIN_SCALE  # contiguous: in a sixth of the time
        return Normal(loc, scale, False)

    def prior_w(self, batch: Batch) -> Normal:
        """p(w) = N(0, I), or p(w|c)."""
        return self.w_net(self.c(batch)) if self.learned_w else StandardNormal(batch.library)

    def generative(self, latents: dict[str, Tensor], batch: Batch) -> Observation:
        """p(x|z,c), or p(x|z) if c enters through p(w|c)."""
        return self.likelihood(self.decoder(latents["z"], self.c(batch)), batch.library, batch.batch_index)

    # ---- the terms

    def elbo_terms(self, batch: Batch) -> dict[str, Tensor]:
        """``reconstruction``, ``kl_z``, ``kl_w``, ``kl_y`` and, with the Dirichlet, ``kl_d``; each (n,) in nats.

        Where y is seen, ``kl_z`` is that of its component, and ``kl_y`` is -log q(y|.) - E[log d_y].
        """
        batch = batch.observed(self.likelihood)
        if self.stage in ("classifier", "labels"):
            log_q = self.classify(batch, log=True)
            seen, y = self._seen(batch, log_q)
            zero = log_q.new_zeros(len(log_q))
            # The mean over those with a label: however few they are, they count as much as the penalty.
            by_label = -(seen * y * log_q).sum(-1) * (len(seen) / seen.sum().clamp(min=1))
            return dict.fromkeys(self.factors.terms, zero) | {"kl_y": by_label}
        q, p_w = self.inference(batch), self.prior_w(batch)
        z, w = q["z"].rsample(), q["w"].rsample()
        terms = {"reconstruction": -batch.log_prob(self.generative({"z": z}, batch))}
        if self.stage == "warmup":
            zero = z.new_zeros(len(z))
            kl_z = kl_standard_normal(q["z"].loc, q["z"].scale)
            return terms | {"kl_z": kl_z} | {f"kl_{v}": zero for v in ("w", "y", "d")[: 3 if self.dirichlet else 2]}
        log_q = self.log_q_y(encoder_input(self.likelihood, batch), z, self.c(batch))
        seen, y = self._seen(batch, log_q)
        if self.training:
            self.alignment.note(z, torch.where(seen, y, log_q.exp()))
        p_z = self.components(w)
        kl_z = kl_normal(q["z"].loc[:, None], q["z"].scale[:, None], p_z.loc, p_z.scale)  # (n, K)
        terms["kl_z"] = (torch.where(seen, y, log_q.exp()) * kl_z).sum(-1)
        terms["kl_w"] = kl_of(q["w"], p_w)
        if self.dirichlet:
            d = self.q_d(log_q.exp())
            log_p_y = expected_log_probability(d)
        else:
            log_p_y = torch.full_like(log_q, -math.log(self.n_components))
        supervised = -(y * (log_q + log_p_y)).sum(-1)
        terms["kl_y"] = torch.where(seen[:, 0], supervised, kl_categorical(log_q, log_p_y))
        if self.dirichlet:
            terms["kl_d"] = kl_dirichlet(d, torch.full_like(d, self.alpha))
        return terms

    def weighted(self, name: str, term: Tensor, batch: Batch, kl_weight: float | Tensor) -> Tensor:
        """As for every model; but where y is seen, ``kl_y`` is how well q(y|.) knows it, whatever the KL weight."""
        if name != "kl_y" or batch.labels is None:
            return super().weighted(name, term, batch, kl_weight)
        return (torch.where(batch.labels >= 0, 1.0, kl_weight) * term).mean()

    def _seen(self, batch: Batch, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows have a label, (n, 1) bool, and their classes, (n, K) one-hot."""
        if batch.labels is None:
            return torch.zeros_like(log_q[:, :1], dtype=torch.bool), torch.zeros_like(log_q)
        return (batch.labels >= 0)[:, None], one_hot(batch.labels.clamp(min=0), self.n_components).to(log_q.dtype)

    def log_weights(self, batch: Batch, n_samples: int) -> Tensor:
        """Log importance weights of draws of z and w, (n_samples, n) in nats; y and d are summed out: p(y) = 1/K."""
        q = self.inference(batch)
        z, w = q["z"].sample((n_samples,)), q["w"].sample((n_samples,))
        log_w = batch.log_prob(self.generative({"z": z}, batch)) + self.log_p_z(z, w)
        log_w = log_w + (self.prior_w(batch).log_prob(w) - q["w"].log_prob(w)).sum(-1)
        return log_w - q["z"].log_prob(z).sum(-1)

    def log_p_z(self, z: Tensor, w: Tensor) -> Tensor:
        """Log-density log sum_y p(z|w,y) / K of the mixture, (..., n) in nats, for z (..., n, d), w (..., n, n_w)."""
        log_p = self.components(w).log_prob(z.unsqueeze(-2)).sum(-1)
        return log_p.logsumexp(-1) - math.log(self.n_components)

    @torch.no_grad()
    def draw_like(self, z: Tensor, kinds: Tensor) -> Tensor:
        """Draws of z from components, (n, d), w from N(0, I): for each cell of one that it may be of, by q(y|.)."""
        p_z = self.components(torch.randn(len(z), self.n_w, device=z.device))
        return p_z.rsample()[torch.arange(len(z), device=z.device), one_of(kinds)]

    @property
    def has_late_penalty(self) -> bool:
        """Whether batches are aligned."""
        return bool(self.alignment.weight)

    def penalties(self, batch: Batch, late: float | Tensor) -> dict[str, Tensor]:
        """``alignment`` as in the CVAE; ``consistency``: the virtual adversarial penalty on q(y|z,x), z moving with x.

        Miyato et al. 2018, equation 6.
        """
        # Components are kinds as well, and better ones but where batches have types of their own: laid on one another
        # in the warm-up, these are in the same component.
        found = aligned(self, batch, late, by_kinds=self.kinds is not None and self.kinds.overlap < PARTED)
        if self.stage not in self.PENALTY or not self.consistency or not self.classifier_sees_x:
            return found
        length, every = self.PENALTY[self.stage]
        some = batch.every(every if len(batch) > every else 1)  # batch norm needs two cells
        x, c = encoder_input(self.likelihood, some), self.c(some)

        def log_q(v: Tensor | SparseRows) -> Tensor:
            z = some.library.new_zeros(len(some), self.n_latent) if self.stage == "labels" else self.encoder.mean(v, c)
            return self.log_q_y(v, z, c)

        with untracked_statistics(self):  # what batch norms learn of changed cells spoils them for cells as they are
            return found | {"consistency": self.consistency * virtual_adversarial_penalty(log_q, x, length)}
