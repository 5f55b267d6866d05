"""What every plate has in common. Only this file weights, sums and reports the terms of an ELBO."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, reduce
from operator import add
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal

from sccvae._rows import SparseRows, dense, few
from sccvae.distributions import Likelihood, Observation, kl_normal, kl_standard_normal
from sccvae.module._factorization import Factorization


@dataclass
class Batch:
    """A mini-batch of n observations as tensors on one device.

    Attributes
    ----------
    x
        Observed values, (n, G) floating: a tensor, or rows of what is not zero as they came from sparse data. A plate
        reads :attr:`dense`, or :attr:`entries` where these are faster.
    codes
        Category of each categorical condition, (n, n_keys) int64; the batch comes first. (n, 0) if there is none.
    covariates
        Continuous covariates, (n, n_continuous) floating. (n, 0) if there is none.
    library
        Library size of each observation, (n, 1) floating; counts.
    labels
        Class of each observation, (n,) int64, -1 where it is not known; None if no class is.
    present
        Which features were measured, (n, G) bool, each row the same: the others hold a stand-in for the encoder and do
        not count in p(x|...). None if all were.
    usual
        With ``present``: what cells have of each feature in the mean, (n, G), each row the same.
    read
        A likelihood and what an encoder reads of x by it (``encoder_input``), once that was made.
    """

    x: Tensor | SparseRows
    codes: Tensor
    covariates: Tensor
    library: Tensor
    labels: Tensor | None = None
    present: Tensor | None = None
    usual: Tensor | None = None
    read: tuple[Likelihood | None, Any] = field(default=(None, None), init=False, repr=False, compare=False)

    @classmethod
    def on(cls, device: torch.device, tensors: dict[str, Tensor | SparseRows]) -> Batch:
        """Make a batch of what a loader of cells gives, by name, on a device."""
        return cls(**{name: t.to(device) for name, t in tensors.items()})

    @classmethod
    def of(
        cls, x: Tensor, codes: Tensor | None = None, covariates: Tensor | None = None, labels: Tensor | None = None
    ) -> Batch:
        """Make a batch from data (n, G) and, optionally, codes (n,) or (n, n_keys), covariates (n, m), labels (n,)."""
        empty = x.new_zeros(len(x), 0)
        codes = empty.long() if codes is None else codes.reshape(len(x), -1)
        return cls(x, codes, empty if covariates is None else covariates, x.sum(-1, keepdim=True), labels)

    def __len__(self) -> int:
        return len(self.x)

    @property
    def dense(self) -> Tensor:
        """The observed values as a tensor, (n, G)."""
        return dense(self.x)

    @cached_property
    def entries(self) -> SparseRows | None:
        """The values of x that are not zero, where that is a faster way to read it; else None."""
        return few(self.x)

    def observed(self, likelihood: Likelihood) -> Batch:
        """With x as the likelihood observes it, such as binarised."""
        x = likelihood.observe(self.x)
        return self if x is self.x else replace(self, x=x)

    def every(self, step: int) -> Batch:
        """Each so-many-th observation, from the first on."""
        parts = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        if self.entries is None or self.x.device.type != "cpu":  # a GPU does not tell at once how many values are left
            parts["x"] = self.dense
        return Batch(**{name: None if t is None else t[::step] for name, t in parts.items()})

    @property
    def batch_index(self) -> Tensor | None:
        """First condition, (n,) int64, or None."""
        return self.codes[:, 0] if self.codes.shape[1] else None

    def log_prob(self, p_x: Observation) -> Tensor:
        """Log density or mass of the measured features in nats, (..., n), under p(x|...) of all features."""
        if self.present is not None:
            measured = self.present[0]
            return p_x.restrict(measured).log_prob(self.dense[:, measured])
        rows = (self.x if isinstance(self.x, SparseRows) else self.entries) if p_x.takes_rows else None
        return p_x.log_prob(self.dense if rows is None else rows)


class GenerativeModule(nn.Module, ABC):
    """A model: what it declares (``factors``), its inference, its generation, and the terms of its negative ELBO.

    Attributes
    ----------
    factors
        The declared factorisation. Its ``terms`` are the names that :meth:`elbo_terms` returns (a test holds this).
    nets_of_c
        Attributes that hold a network whose input is c alone, or None.
    classifiers
        Attributes that hold a network that tells classes.
    """

    factors: Factorization
    nets_of_c: ClassVar[tuple[str, ...]] = ()
    classifiers: ClassVar[tuple[str, ...]] = ()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def has_late_penalty(self) -> bool:
        """Whether a penalty comes after the KL terms: the best weights are then looked for after both."""
        return False

    @abstractmethod
    def inference(self, batch: Batch) -> dict[str, Normal | Tensor]:
        """Give q of each latent variable: a normal over (n, d), or the value itself (n, d) if deterministic."""

    @abstractmethod
    def generative(self, latents: dict[str, Tensor], batch: Batch) -> Observation:
        """Give p(x | latents, conditions) for latents (..., n, d)."""

    @torch.no_grad()
    def completed(self, batch: Batch) -> Batch:
        """With stand-ins for each cell where features were not measured; the batch itself if all were.

        The same ones for all cells draw z to the middle. A first z, by these, tells what the cell has of the feature
        (as Rezende et al. 2014 impute, in one step with means in place of draws). Of counts an encoder reads the
        logarithm, so the stand-in, which is right for its mean, is multiplied by what the cell has more than usual.
        """
        if batch.present is None:
            return batch
        training = self.training
        self.eval()
        z = {name: q if isinstance(q, Tensor) else q.loc for name, q in self.inference(batch).items()}
        x = self.generative(z, batch).mean
        self.train(training)
        if self.likelihood.support == "counts":
            share, usual = (of / of.sum(-1, keepdim=True) for of in (x, batch.usual))
            x = batch.dense * share / usual.clamp(min=1e-12)
        return replace(batch, x=torch.where(batch.present, batch.dense, x))

    @abstractmethod
    def elbo_terms(self, batch: Batch) -> dict[str, Tensor]:
        """Terms of the negative ELBO, each (n,) in nats, by name; their sum is the loss of a cell (equation 4.8)."""

    def loss(
        self, batch: Batch, kl_weight: float | Tensor = 1.0, late: float | Tensor = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Objective of a mini-batch, and a report of its parts.

        Parameters
        ----------
        batch
            The observations.
        kl_weight
            Factor of every ``kl_*`` term: 1 gives the negative ELBO. What a GMVAE learns of a known class is no
            divergence, and has none.
        late
            Factor of those penalties that come after the KL terms (``has_late_penalty``). A tensor, as ``kl_weight``
            may be one too, is taken not to be zero: nobody waits for a device to see it.

        Returns
        -------
        The mean over the batch of the weighted sum of terms (rule 2.2), a scalar with gradient; and the batch means of
        every term, of ``elbo`` (the unweighted sum, a negative ELBO), of every penalty and of ``loss``, detached.
        """
        terms = self.elbo_terms(batch)
        means = {name: term.mean() for name, term in terms.items()}
        weighted = {n: self.weighted(n, t, batch, kl_weight) for n, t in terms.items() if n.startswith("kl_")}
        objective = reduce(add, (means | weighted).values())
        report = {name: m.detach() for name, m in means.items()}
        report["elbo"] = reduce(add, report.values())
        if self.training:
            penalties = self.penalties(batch, late)
            objective = sum(penalties.values(), objective)
            report |= {name: p.detach() for name, p in penalties.items()}
        report["loss"] = objective.detach()
        return objective, report

    def weighted(self, name: str, term: Tensor, batch: Batch, kl_weight: float | Tensor) -> Tensor:
        """The mean over the batch of a ``kl_*`` term (n,), as it counts in the loss."""
        del name, batch
        return kl_weight * term.mean()

    def penalties(self, batch: Batch, late: float | Tensor) -> dict[str, Tensor]:
        """Weighted scalars that are added to the loss in training and are no part of the ELBO; none by default."""
        del batch, late
        return {}


class EvidenceModule(GenerativeModule, ABC):
    """A model whose evidence can be bounded by importance sampling."""

    @abstractmethod
    def log_weights(self, batch: Batch, n_samples: int) -> Tensor:
        """Log importance weights log p(x,latents|c) - log q(latents|x,c) of draws from q, (n_samples, n) in nats.

        Their log-mean-exp is a lower bound of log p(x|c) that tightens with the number of samples (Burda et al. 2016).
        """

    def marginal_ll(self, batch: Batch, n_samples: int, chunk: int) -> Tensor:
        """Importance-weighted bound of log p(x|c), (n,) in nats, with at most ``chunk`` draws in memory at a time."""
        if n_samples < 1:
            msg = f"The bound needs at least one draw of z, not {n_samples}."
            raise ValueError(msg)
        total = batch.library.new_full((len(batch),), -math.inf)
        for start in range(0, n_samples, chunk):
            log_w = self.log_weights(batch, min(chunk, n_samples - start))
            total = torch.logaddexp(total, log_w.logsumexp(0))
        return total - math.log(n_samples)


class LatentVariableModule(EvidenceModule, ABC):
    """A model whose latent variables all have a normal posterior, and a normal prior or one of known density.

    A plate gives ``inference``, ``prior`` and ``generative``; the ELBO (equation 4.8) follows.

    Parameters
    ----------
    kl
        ``"analytic"`` (equation 4.13) or ``"monte_carlo"``, the mean of log q - log p over the draws (equation 4.10),
        which is also taken where the prior is not normal.
    n_samples
        Number k of draws from q for each observation.

    Raises
    ------
    ValueError
        If ``kl`` is not known or ``n_samples`` is not positive.
    """

    def __init__(self, kl: Literal["analytic", "monte_carlo"] = "analytic", n_samples: int = 1) -> None:
        super().__init__()
        if kl not in ("analytic", "monte_carlo") or n_samples < 1:
            msg = f"kl={kl!r}, n_samples={n_samples}: choose kl='analytic' or 'monte_carlo' and n_samples >= 1."
            raise ValueError(msg)
        self.kl = kl
        self.n_samples = n_samples

    @abstractmethod
    def prior(self, batch: Batch) -> dict[str, Distribution]:
        """Give p of each latent variable: a normal broadcastable to (n, d), or a distribution of vectors (d,)."""

    def elbo_terms(self, batch: Batch) -> dict[str, Tensor]:
        """``reconstruction`` and one ``kl_<variable>`` for each latent variable, each (n,) in nats."""
        batch = batch.observed(self.likelihood)
        q, p = self.inference(batch), self.prior(batch)
        draws = self.draw(q)
        log_p_x = batch.log_prob(self.generative(draws, batch))  # (k, n)
        reconstruction = -(log_p_x.mean(0) if self.n_samples > 1 else log_p_x.squeeze(0))
        return {"reconstruction": reconstruction} | {f"kl_{v}": self._kl(q[v], p[v], draws[v]) for v in q}

    def draw(self, q: dict[str, Normal]) -> dict[str, Tensor]:
        """``n_samples`` draws of each latent variable, (k, n, d); a plate may note them for its penalties."""
        return {v: d.rsample((self.n_samples,)) for v, d in q.items()}

    def _kl(self, q: Normal, p: Distribution, draws: Tensor) -> Tensor:
        if self.kl == "analytic" and isinstance(p, Normal):
            return kl_of(q, p)
        return (log_density_of_draws(q, draws) - log_density(p, draws)).mean(0)

    def log_weights(self, batch: Batch, n_samples: int) -> Tensor:
        """Log importance weights log p(x,z|c) - log q(z|x,c) of draws from q, (n_samples, n) in nats."""
        q, p = self.inference(batch), self.prior(batch)
        z = {name: d.sample((n_samples,)) for name, d in q.items()}
        log_w = batch.log_prob(self.generative(z, batch))
        return log_w + sum(log_density(p[v], z[v]) - log_density(q[v], z[v]) for v in z)


def log_density(p: Distribution, z: Tensor) -> Tensor:
    """Log density of vectors z (..., n, d) in nats, (..., n), under normals of each value or a distribution of (d,)."""
    log_p = p.log_prob(z)
    return log_p if p.event_shape else log_p.sum(-1)


def log_density_of_draws(q: Normal, z: Tensor) -> Tensor:
    """Log density of draws z = loc + scale noise, (..., n, d), of q itself in nats, (..., n).

    With z moving with q it is -log scale and a constant: only this has a gradient, the same as autograd finds.
    """
    with torch.no_grad():
        constant = -0.5 * (((z - q.loc) / q.scale).square() + math.log(2 * math.pi)).sum(-1)
    return constant - q.scale.log().sum(-1)


class StandardNormal(Normal):
    """N(0, 1) as scalars of the type and device of ``x``, to broadcast over any latent variable."""

    def __init__(self, x: Tensor) -> None:
        super().__init__(x.new_zeros(()), x.new_ones(()), validate_args=False)


def kl_of(q: Normal, p: Normal) -> Tensor:
    """KL(q || p) in nats, summed over the latent dimensions, (..., n) (equation 4.13)."""
    if isinstance(p, StandardNormal):
        return kl_standard_normal(q.loc, q.scale)
    return kl_normal(q.loc, q.scale, p.loc, p.scale)
