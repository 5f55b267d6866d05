"""The compiled loops behind ``kernels``: importing this file imports numba; each loop compiles once for a machine.

They are functions of a module, not of a function: only those does numba find again in its cache in the next session.
"""

from __future__ import annotations

import math

import numpy as np

from sccvae._compiled import compiled

#: Whole counts up to this one have their log-gamma and digamma differences by recurrence.
SMALL = 20

f = np.float32


# Sums may be reordered, so that they become vector instructions; infinity and NaN stay what they are.
FAST = {"fastmath": {"contract", "reassoc", "nsz"}}


@compiled(inline="always", **FAST)
def exp_minus(v):
    """exp(-v) for float32 v >= 0, down to exp(-87); Cody and Waite's reduction, polynomial of Cephes' expf."""
    v = -min(v, f(87.0))
    n = np.floor(v * f(1.44269504) + f(0.5))
    r = v - n * f(0.693359375) + n * f(2.12194440e-4)
    p = f(1.9875691500e-4)
    p = p * r + f(1.3981999507e-3)
    p = p * r + f(8.3334519073e-3)
    p = p * r + f(4.1665795894e-2)
    p = p * r + f(1.6666665459e-1)
    p = p * r + f(5.0000001201e-1)
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)  # 2 ** n
    return (p * r * r + r + f(1.0)) * power


@compiled(inline="always", **FAST)
def twice_artanh(u):
    """2 artanh(u) for float32 u in [0, 1/3]: half the log of (1 + u) / (1 - u), twice, by its series."""
    s = u * u
    p = f(1 / 15)
    for k in (13, 11, 9, 7, 5, 3):
        p = p * s + f(1) / f(k)
    return f(2.0) * u * (p * s + f(1.0))


@compiled(inline="always", **FAST)
def log1p_unit(e):
    """log(1 + e) for float32 e in [0, 1]: 2 artanh(e / (2 + e)) by its series."""
    return twice_artanh(e / (f(2.0) + e))


@compiled(inline="always", **FAST)
def log1p_ratio(r, log_r):
    """log(1 + r) for float32 r >= 0 and its logarithm: 2 artanh(r / (2 + r)), or log(r) + log(1 + 1 / r)."""
    small = r <= f(1.0)
    u = (r if small else f(1.0)) / (f(2.0) + r if small else f(2.0) * r + f(1.0))
    return twice_artanh(u) + (f(0.0) if small else log_r)


@compiled(**FAST)
def ratios_of_shares(share, depth, theta, ratio):
    """Fill mu / theta, at most 1e30, with mu = share * depth. All (G,) but ``depth``."""
    for j in range(len(share)):
        r = share[j] * depth / theta[j]
        ratio[j] = f(1e30) if r > f(1e30) else r


@compiled(**FAST)
def ratios_of_logs(log_mu, log_theta, ratio):
    """Fill mu / theta, at most 1e30. All (G,)."""
    for j in range(len(log_mu)):
        a = log_mu[j] - log_theta[j]
        e = exp_minus(abs(a))
        r = e if a < 0 else f(1.0) / e
        ratio[j] = f(1e30) if r > f(1e30) else r


@compiled(**FAST)
def nb_zeros(seen, log_mu, log_theta, theta, ratio, d_mu, d_theta):
    """Derivatives of one cell as if all its counts were zero; the log mass, summed where they are. All (G,).

    ``ratio`` is mu / theta; ``seen`` is 1 where the count is not zero, else 0.
    """
    total = f(0.0)
    for j in range(len(seen)):
        r = ratio[j]
        zero = -theta[j] * log1p_ratio(r, log_mu[j] - log_theta[j])
        d_mu[j] = -theta[j] * (r / (f(1.0) + r))
        d_theta[j] = zero - d_mu[j]
        total += f(0.0) if seen[j] > 0 else zero
    return total


@compiled(**FAST)
def zinb_zeros(seen, log_mu, log_theta, theta, ratio, logits, d_mu, d_theta, d_logits):
    """As ``nb_zeros``; with log P(no structural zero) where the count is not zero."""
    total = f(0.0)
    for j in range(len(seen)):
        r, b = ratio[j], logits[j]
        nb_zero = -theta[j] * log1p_ratio(r, log_mu[j] - log_theta[j])
        by_mu = -theta[j] * (r / (f(1.0) + r))
        e = exp_minus(abs(b))
        tail = log1p_unit(e)
        structural, expressed = (f(0.0) if b >= 0 else b) - tail, (f(0.0) if b <= 0 else -b) - tail  # logs
        share = (e if b < 0 else f(1.0)) / (f(1.0) + e)  # P(structural zero)
        c = b - nb_zero
        e = exp_minus(abs(c))
        either = (structural if c > 0 else expressed + nb_zero) + log1p_unit(e)
        one = f(1.0) / (f(1.0) + e)
        from_nb = e * one if c > 0 else one  # P(a zero is no structural one)
        d_mu[j], d_theta[j] = from_nb * by_mu, from_nb * (nb_zero - by_mu)
        d_logits[j] = (f(0.0) if seen[j] > 0 else f(1.0) - from_nb) - share
        total += expressed if seen[j] > 0 else either
    return total


@compiled()
def digamma(v):
    """Derivative of log-gamma at v > 0: its asymptotic series (Abramowitz and Stegun, 6.3.18) from 8 on."""
    below = 0.0
    while v < 8.0:  # psi(v) = psi(v + 1) - 1 / v
        below -= 1.0 / v
        v += 1.0
    i = 1.0 / (v * v)
    tail = i * (1 / 12 - i * (1 / 120 - i * (1 / 252 - i * (1 / 240 - i / 132))))
    return below + math.log(v) - 0.5 / v - tail


@compiled(inline="always", **FAST)
def exp_minus_double(v):
    """exp(-v) for float64 v >= 0, down to exp(-700), to eleven digits; a form of which vectors can be made."""
    v = -min(v, 700.0)
    n = np.floor(v * 1.4426950408889634 + 0.5)
    r = v - n * 0.693145751953125 - n * 1.42860682030941723212e-6
    p = 1 / 3628800
    p = p * r + 1 / 362880
    p = p * r + 1 / 40320
    p = p * r + 1 / 5040
    p = p * r + 1 / 720
    p = p * r + 1 / 120
    p = p * r + 1 / 24
    p = p * r + 1 / 6
    p = p * r + 1 / 2
    p = p * r + 1.0
    p = p * r + 1.0
    power = np.int64((np.int64(n) + np.int64(1023)) << np.int64(52)).view(np.float64)  # 2 ** n
    return p * power


@compiled(inline="always", **FAST)
def log1p_unit_double(e):
    """log(1 + e) for float64 e in [0, 1], to eleven digits: as ``log1p_unit``, by a longer series."""
    u = e / (2.0 + e)
    s = u * u
    p = 1 / 23
    p = p * s + 1 / 21
    p = p * s + 1 / 19
    p = p * s + 1 / 17
    p = p * s + 1 / 15
    p = p * s + 1 / 13
    p = p * s + 1 / 11
    p = p * s + 1 / 9
    p = p * s + 1 / 7
    p = p * s + 1 / 5
    p = p * s + 1 / 3
    p = p * s + 1.0
    return 2.0 * u * p


# Columns are unsigned: for signed ones numba asks at each whether it counts from the end, and no vectors are made.


@compiled()
def mark(at, counts, seen, value):
    """Put a value into ``seen`` (G,) at the columns ``at`` of counts above zero, both (nnz,)."""
    for k in range(len(at)):
        if counts[k] > 0:
            seen[at[k]] = value


@compiled(**FAST)
def nb_without_ways(at, counts, log_mu, log_theta, theta, plus, slope, gap):
    """What the log mass of counts x > 0 needs at the columns ``at``, of all places (nnz,), by vectors in float64.

    Fills log(1 + mu / theta) into ``plus``; theta (x - mu) / (theta + mu) into ``slope``; the difference of digammas
    for a count of one, 1 / theta, into ``gap``. Gives the sum of the log mass, short of the number of ways to a count.
    """
    total = 0.0
    for k in range(len(at)):  # gathered first, so that the second loop runs on vectors
        plus[k] = np.float64(log_mu[at[k]]) - np.float64(log_theta[at[k]])
        gap[k] = theta[at[k]]
    for k in range(len(at)):
        a, t, count = plus[k], gap[k], np.float64(counts[k])
        e = exp_minus_double(abs(a))
        ratio = e if a < 0 else 1.0 / e
        more = log1p_unit_double(e) + (0.0 if a <= 0 else a)
        plus[k] = more
        slope[k] = (count - t * ratio) / (1.0 + ratio)
        gap[k] = 1.0 / t
        total -= t * more + count * (more - a) if count > 0.0 else 0.0
    return total


@compiled()
def nb_seen(at, counts, log_mu, log_theta, theta, d_mu, d_theta, plus, slope, gap):
    """Replace the derivatives of one cell where its count is above zero; the log mass, summed there.

    ``at`` and ``counts`` (nnz,), all others (G,); the last three are room.
    """
    total, product = nb_without_ways(at, counts, log_mu, log_theta, theta, plus, slope, gap), 1.0
    for m in range(len(at)):
        if not counts[m] > 0:  # a zero that was stored
            continue
        j = at[m]
        count, t, differ = np.float64(counts[m]), theta[j], gap[m]
        if count == 1.0:
            total += np.float64(log_theta[j])
        elif count <= SMALL and count == math.floor(count):
            ways, by_t, other = t, 1.0, 1.0  # theta (theta + 1) ..., its derivative, and the factorial
            for k in range(1, int(count)):
                by_t = by_t * (t + k) + ways
                ways *= t + k
                other *= k + 1.0
            differ = by_t / ways
            product *= ways / other
            if not 1e-30 < product < 1e30:  # one logarithm for several counts
                total += math.log(product)
                product = 1.0
        else:
            total += math.lgamma(count + t) - math.lgamma(t) - math.lgamma(count + 1.0)
            differ = digamma(count + t) - digamma(t)
        d_mu[j] = slope[m]
        d_theta[j] = t * (differ - plus[m]) - slope[m]
    return total + math.log(product)


@compiled(**FAST)
def normalise(scores, top, log_depth, log_mu, share):
    """Log mean and softmax of the scores of one cell, whose largest is ``top``. All (G,)."""
    total = f(0.0)
    for j in range(len(scores)):
        share[j] = exp_minus(top - scores[j])
        total += share[j]
    shift, part = log_depth - top - np.log(total), f(1.0) / total
    for j in range(len(scores)):
        log_mu[j] = scores[j] + shift
        share[j] *= part


@compiled(**FAST)
def shares(start, stop, scores, top, factor, out):
    """Softmax of each row of scores (n, G), whose largest are ``top`` (n,), times ``factor`` (n,), into ``out``."""
    for i in range(start, stop):
        row, to, total = scores[i], out[i], f(0.0)
        for j in range(len(row)):
            to[j] = exp_minus(top[i] - row[j])
            total += to[j]
        part = factor[i] / total + f(0.0) * top[i]  # NaN stays NaN
        for j in range(len(row)):
            to[j] *= part


@compiled(**FAST)
def to_scores(share, derivative):
    """Turn the derivatives by the log means of one cell into those by its scores."""
    total = f(0.0)
    for j in range(len(share)):
        total += derivative[j]
    for j in range(len(share)):
        derivative[j] -= share[j] * total


# Over cells: m rows of counts, where row i has from starts[i] to starts[i + 1] (m + 1,), at the ``columns`` (nnz,);
# scores, d_* (n, G); log_theta, theta (r, G), with ``own`` (n,) the row of each; total (n,); n is a multiple of m.
# ``top`` (n,) and ``log_depth`` (m,) are empty where the scores are log means already. Each cell stays in the nearest
# cache through all its loops: they are many, as the compiler makes vectors of each by itself, but not of all in one.


@compiled()
def cells(
    start,
    stop,
    starts,
    columns,
    counts,
    scores,
    top,
    log_depth,
    log_theta,
    theta,
    theta_double,
    own,
    logits,
    d_scores,
    d_theta,
    d_logits,
    total,
):
    """Log mass in nats and its derivatives; float32 but ``theta_double``. Zero-inflated if ``logits`` is not empty."""
    n = scores.shape[1]
    plus, slope, gap, is_seen = np.empty(n), np.empty(n), np.empty(n), np.zeros(n, np.float32)
    log_mu, share, over = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.float32)
    for i in range(start, stop):
        row, k = i % (len(starts) - 1), own[i]
        at, x = columns[starts[row] : starts[row + 1]], counts[starts[row] : starts[row + 1]]
        u, t, by_mu, by_theta = log_theta[k], theta[k], d_scores[i], d_theta[i]
        if len(top):
            depth = log_depth[i % len(log_depth)]
            normalise(scores[i], top[i], depth, log_mu, share)
            ratios_of_shares(share, np.exp(depth), t, over)
        else:
            log_mu[:] = scores[i]
            ratios_of_logs(log_mu, u, over)
        mark(at, x, is_seen, f(1.0))
        if len(logits):
            total[i] = zinb_zeros(is_seen, log_mu, u, t, over, logits[i], by_mu, by_theta, d_logits[i])
        else:
            total[i] = nb_zeros(is_seen, log_mu, u, t, over, by_mu, by_theta)
        mark(at, x, is_seen, f(0.0))
        total[i] += nb_seen(at, x, log_mu, u, theta_double[k], by_mu, by_theta, plus, slope, gap)
        if len(top):
            to_scores(share, by_mu)


@compiled(**FAST)
def drop(x, random, below, factor, out):
    """Zero where the random byte is less than ``below``, ``factor`` times the value elsewhere; all flat, (n,)."""
    for i in range(len(x)):
        out[i] = x[i] * factor if random[i] >= below else f(0.0)
