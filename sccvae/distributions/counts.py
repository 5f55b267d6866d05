"""Poisson, negative binomial and zero-inflated negative binomial for counts."""

from __future__ import annotations

from functools import cached_property
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from sccvae._rows import SparseRows, dense
from sccvae.distributions import kernels
from sccvae.distributions._base import Likelihood, Observation, register
from sccvae.distributions.masses import log_nb, log_poisson, nb_zero, sum_over_genes, zinb_seen, zinb_zero

#: Bound of a log inverse dispersion given by a network: beyond it a negative binomial is a Poisson (or all zeros) to
#: six digits, while exp would overflow and lgamma lose its digits.
MAX_LOG_THETA = 15.0


def _log1p(x: Tensor) -> Tensor:
    """Give log(1 + x) in half the time of torch.log1p, to 1e-7: as exact as an encoder needs it, though x be small."""
    return (1 + x).log_()


class CountObservation(Observation):
    """Counts with mean = proportion x library; the base of the three families.

    Parameters
    ----------
    scores
        Their softmax over genes is the proportion of each gene, (..., n, G).
    library
        Library size of each cell, (n, 1), counts.
    """

    def __init__(self, scores: Tensor, library: Tensor) -> None:
        self._scores: Tensor | None = scores.to(library.dtype)  # less precise under autocast
        self.library = library

    def restrict(self, features: Tensor) -> Self:
        """The distribution of some genes alone, with their proportions among all: :meth:`Observation.restrict`."""
        self.log_scale  # noqa: B018  made, to be restricted too
        some = super().restrict(features)
        some._scores = None
        return some

    @cached_property
    def log_scale(self) -> Tensor:
        """Log proportion of each gene, (..., n, G)."""
        return torch.log_softmax(self._scores, dim=-1)

    @cached_property
    def log_mu(self) -> Tensor:
        """Log of the mean of the (negative binomial) counts, (..., n, G)."""
        return self.log_scale + self.library.log()

    def _log_means(self) -> tuple[Tensor, Tensor | None]:
        """What the kernels take: log means, or scores and log library sizes where the former are not made."""
        if self._scores is None or "log_mu" in vars(self):
            return self.log_mu, None
        return self._scores, self.library.log()

    @property
    def mean(self) -> Tensor:
        """Expected counts, (..., n, G)."""
        return self.log_mu.exp()

    def expression(self, library_size: Tensor | float = 1.0, out: Tensor | None = None) -> Tensor:
        """Proportion of each gene times ``library_size`` (a number or (n, 1)), (..., n, G), in ``out`` if given."""
        if self._scores is None or "log_scale" in vars(self):
            shares = self.log_scale.exp() * library_size
        else:
            shares = kernels.shares(self._scores, library_size, out)
        return shares if out is None or shares is out else out.copy_(shares)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log mass of x (n, G) in nats, summed over genes, (..., n)."""
        return sum_over_genes(-self.mean, x, log_poisson, self.log_mu)

    @torch.no_grad()
    def sample(self) -> Tensor:
        """Draw counts, (..., n, G)."""
        return torch.poisson(self.mean)


class NBObservation(CountObservation):
    """Negative binomial counts; ``log_theta`` (broadcastable to (..., n, G)) is the log inverse dispersion.

    With ``rows`` (n,) int64 the cells share dispersions: it is (r, G), and ``rows`` says whose row is whose.
    """

    takes_rows = True

    def __init__(self, scores: Tensor, library: Tensor, log_theta: Tensor, rows: Tensor | None = None) -> None:
        super().__init__(scores, library)
        self._log_theta, self._rows = log_theta.to(library.dtype), rows

    @cached_property
    def log_theta(self) -> Tensor:
        """Log inverse dispersion, broadcastable to (..., n, G)."""
        return self._log_theta if self._rows is None else self._log_theta[self._rows]

    def log_prob(self, x: Tensor | SparseRows) -> Tensor:
        """Log mass of x (n, G) in nats, summed over genes, (..., n)."""
        log_mu, log_depth = self._log_means()
        if kernels.applies(x, log_mu, self._log_theta):
            return kernels.nb_sum(x, log_mu, self._log_theta, log_depth, self._rows)
        parameters = (self.log_mu, self.log_theta)
        return sum_over_genes(nb_zero(*parameters), dense(x), log_nb, *parameters)

    @torch.no_grad()
    def sample(self) -> Tensor:
        """Draw counts as a gamma mixture of Poissons, (..., n, G)."""
        theta = self.log_theta.exp().expand_as(self.log_mu)
        rate = torch._standard_gamma(theta) * (self.mean / theta)
        return torch.poisson(rate)


class ZINBObservation(NBObservation):
    """Zero-inflated negative binomial counts; ``logits`` (..., n, G) are the log odds of a structural zero."""

    def __init__(
        self, scores: Tensor, library: Tensor, log_theta: Tensor, logits: Tensor, rows: Tensor | None = None
    ) -> None:
        super().__init__(scores, library, log_theta, rows)
        self.logits = logits.to(library.dtype)

    @property
    def mean(self) -> Tensor:
        """Expected counts, structural zeros included, (..., n, G)."""
        return self.log_mu.exp() * torch.sigmoid(-self.logits)

    def log_prob(self, x: Tensor | SparseRows) -> Tensor:
        """Log mass of x (n, G) in nats, summed over genes, (..., n)."""
        log_mu, log_depth = self._log_means()
        if kernels.applies(x, log_mu, self._log_theta, self.logits):
            return kernels.zinb_sum(x, log_mu, self._log_theta, self.logits, log_depth, self._rows)
        parameters = (self.log_mu, self.log_theta, self.logits)
        return sum_over_genes(zinb_zero(*parameters), dense(x), zinb_seen, *parameters)

    @torch.no_grad()
    def sample(self) -> Tensor:
        """Draw counts, (..., n, G)."""
        theta = self.log_theta.exp().expand_as(self.log_mu)
        rate = torch._standard_gamma(theta) * (self.log_mu.exp() / theta)
        return torch.poisson(rate) * torch.bernoulli(torch.sigmoid(-self.logits))


class _CountLikelihood(Likelihood):
    """Heads shared by the count families: a softmax over genes."""

    support, zero_stays_zero, reads_library = "counts", True, False

    def build(self, n_in: int, n_features: int, n_batch: int | None = None) -> Self:
        self.scale_head = nn.Linear(n_in, n_features)
        return self

    def initialise(self, mean: Tensor) -> None:
        """Start every cell at the mean proportions (a gene never seen starts at a tenth of the rarest)."""
        floor = mean[mean > 0].min() / 10
        with torch.no_grad():
            self.scale_head.bias.copy_(mean.clamp(min=floor).log())

    def encoder_input(self, x: Tensor, library: Tensor | None = None) -> Tensor:
        """log(1 + x), (n, G): counts on a scale that a network can read."""
        del library
        return _log1p(x)


@register("poisson")
class Poisson(_CountLikelihood):
    """Poisson counts: x ~ Poisson(library x softmax(head(h)))."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, h: Tensor, library: Tensor | None = None, batch_index: Tensor | None = None) -> CountObservation:
        """Distribution of counts; see :meth:`Likelihood.forward`."""
        return CountObservation(self.scale_head(h), library)


@register("nb")
class NegativeBinomial(_CountLikelihood):
    """Negative binomial counts with mean library x softmax(head(h)).

    Parameters
    ----------
    dispersion
        ``"gene"`` one inverse dispersion per gene; ``"gene-batch"`` per gene and batch; ``"gene-cell"`` by the network.
    batch_offset
        Add a learned log factor for each gene and batch to the network's: head(h) + offset of the batch. It starts at
        the data (:meth:`initialise_batches`), so that no other weight has to learn what a batch does to a gene.
    depth_free
        The encoder sees log(1 + x depth / library) in place of log(1 + x), with ``depth`` the median library size of
        the training cells: batches that differ in depth only look alike to it.

    Raises
    ------
    ValueError
        If ``dispersion`` is none of these.

    References
    ----------
    Lopez et al. 2018, Deep generative modeling for single-cell transcriptomics, Methods.
    """

    def __init__(
        self,
        dispersion: Literal["gene", "gene-batch", "gene-cell"] = "gene",
        batch_offset: bool = False,
        depth_free: bool = False,
    ) -> None:
        if dispersion not in ("gene", "gene-batch", "gene-cell"):
            msg = f"dispersion={dispersion!r} is not known; choose 'gene', 'gene-batch' or 'gene-cell'."
            raise ValueError(msg)
        super().__init__(dispersion=dispersion, batch_offset=batch_offset, depth_free=depth_free)
        if depth_free:
            self.register_buffer("depth", torch.tensor(1e4))

    def build(self, n_in: int, n_features: int, n_batch: int | None = None) -> Self:
        """Create the heads; see :meth:`Likelihood.build`."""
        super().build(n_in, n_features, n_batch)
        batchwise = self.settings["dispersion"] == "gene-batch"
        if self.batchwise and n_batch is None:
            asked = "dispersion='gene-batch'" if batchwise else "batch_offset=True"
            msg = (
                f"{asked} needs a model whose decoder sees the batch: use a CVAE with batch_key and any prior but "
                "'learned', or dispersion='gene' without batch_offset."
            )
            raise ValueError(msg)
        if self.settings["dispersion"] == "gene-cell":
            self.theta_head = nn.Linear(n_in, n_features)
        else:
            self.log_theta = nn.Parameter(torch.zeros(n_batch if batchwise else 1, n_features))
        if self.settings["batch_offset"]:
            self.offset = nn.Parameter(torch.zeros(n_batch, n_features))
        return self

    def encoder_input(self, x: Tensor, library: Tensor | None = None) -> Tensor:
        """log(1 + x), or with ``depth_free`` log(1 + x depth / library), (n, G)."""
        return _log1p(x * (self.depth / library) if self.settings["depth_free"] else x)

    @property
    def reads_library(self) -> bool:
        """With ``depth_free`` the encoder does."""
        return self.settings["depth_free"]

    @property
    def batchwise(self) -> tuple[str, ...]:
        """Its parameters that have a row for each batch."""
        theta = ("log_theta",) if self.settings["dispersion"] == "gene-batch" else ()
        return theta + (("offset",) if self.settings["batch_offset"] else ())

    @torch.no_grad()
    def initialise_batches(self, effect: Tensor) -> None:
        """Start the offsets at the data: the log factor by which each batch multiplies each gene, (n_batch, G)."""
        if "offset" in self.batchwise:
            self.offset.copy_(effect)

    @torch.no_grad()
    def initialise_dispersion(self, theta: Tensor) -> None:
        """Start inverse dispersions at the data.

        Parameters
        ----------
        theta
            Those of the counts as they are, positive: (n_batch, G) where each batch has its own (``batchwise``), else
            (1, G). Twice this is where they start, since part of a gene's variance is what z will explain.
        """
        start = (2 * theta).log()
        if self.settings["dispersion"] == "gene-cell":
            self.theta_head.bias.copy_(start[0])
        else:
            self.log_theta.copy_(start)

    def forward(self, h: Tensor, library: Tensor | None = None, batch_index: Tensor | None = None) -> NBObservation:
        """Distribution of counts; see :meth:`Likelihood.forward`."""
        log_theta, rows = self._log_theta(h, batch_index)
        return NBObservation(self._scores(h, batch_index), library, log_theta, rows)

    def _scores(self, h: Tensor, batch_index: Tensor | None) -> Tensor:
        if not self.settings["batch_offset"]:
            return self.scale_head(h)
        # A product with one-hot rows: its gradient is a product too, much faster than that of an index.
        scores = self.scale_head(h.reshape(-1, h.shape[-1]))
        own = one_hot(batch_index, len(self.offset)).to(scores.dtype).expand(*h.shape[:-1], -1)
        scores.addmm_(own.reshape(-1, len(self.offset)), self.offset.to(scores.dtype))
        return scores.reshape(*h.shape[:-1], scores.shape[-1])

    def _log_theta(self, h: Tensor, batch_index: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The log inverse dispersions and which row is whose, as an observation takes them."""
        match self.settings["dispersion"]:
            case "gene":
                return self.log_theta, None  # (1, G)
            case "gene-batch":
                return self.log_theta, batch_index  # (n_batch, G)
            case _:
                return self.theta_head(h).clamp(-MAX_LOG_THETA, MAX_LOG_THETA), None  # (..., n, G)


@register("zinb")
class ZINB(NegativeBinomial):
    """Zero-inflated negative binomial counts; the network also gives the log odds of a structural zero.

    Parameters
    ----------
    dispersion, batch_offset, depth_free
        As in :class:`NegativeBinomial`.

    References
    ----------
    Lopez et al. 2018, Deep generative modeling for single-cell transcriptomics, Methods.
    """

    def build(self, n_in: int, n_features: int, n_batch: int | None = None) -> Self:
        """Create the heads; see :meth:`Likelihood.build`."""
        super().build(n_in, n_features, n_batch)
        self.zero_head = nn.Linear(n_in, n_features)
        return self

    def forward(self, h: Tensor, library: Tensor | None = None, batch_index: Tensor | None = None) -> ZINBObservation:
        """Distribution of counts; see :meth:`Likelihood.forward`."""
        log_theta, rows = self._log_theta(h, batch_index)
        return ZINBObservation(self._scores(h, batch_index), library, log_theta, self.zero_head(h), rows)
