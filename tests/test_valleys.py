"""Whether a valley of density parts two clusters."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from sccvae.train.valleys import GRID, LOOKED_AT, NARROWEST, _density, united, valley


def two(distance, sizes=(1000, 1000), d=4, seed=0):
    """Unit normals so far apart along the first axis."""
    rng = np.random.default_rng(seed)
    a, b = (rng.normal(size=(n, d)) for n in sizes)
    b[:, 0] += distance
    return a, b


@pytest.mark.parametrize("distance", [3.0, 4.0, 6.0])
def test_between_two_normals_it_is_as_the_density_says(distance):
    """Smoothed by a normal of width h, unit normals have the standard deviation sqrt(1 + h^2)."""
    spread = np.hypot(1, 1.06 * 1000**-0.2)
    x = np.linspace(0, distance, 2001)
    density = norm.pdf(x, 0, spread) + norm.pdf(x, distance, spread)
    assert valley(*two(distance, d=1)) == pytest.approx(density.min() / density.max(), abs=0.04)
    assert valley(*two(distance)) == pytest.approx(density.min() / density.max(), abs=0.08)


@pytest.mark.parametrize("spread", [0.01, 0.1, 0.3])
def test_density_is_a_sum_of_normals(spread):
    at = np.random.default_rng(0).normal(np.repeat([0, 1], 500), spread)
    wide = max(1.06 * at.std() * 1000**-0.2, NARROWEST)
    wanted = norm.pdf(GRID[:, None], at, wide).mean(1) * (GRID[1] - GRID[0])
    np.testing.assert_allclose(_density(at), wanted, atol=0.005 * wanted.max())


def test_halves_of_one_normal_have_none():
    x = np.random.default_rng(0).normal(size=(2000, 6))
    assert valley(x[x[:, 0] < 0], x[x[:, 0] >= 0]) > 0.9
    assert valley(x[x[:, 0] < -1], x[x[:, 0] >= -1]) > 0.75  # a sixth is as many as the rest


def test_medians_that_nearly_meet_have_none():
    """A line of 1e9 spreads, which took more memory than there is."""
    x = np.random.default_rng(0).normal(size=(60, 3))
    assert valley(x, x + 1e-9) > 0.9


@pytest.mark.parametrize("sizes", [(1000, 1000), (5000, 40), (40, 5000)])
def test_sizes_do_not_matter(sizes):
    assert valley(*two(8, sizes)) < 0.1
    assert valley(*two(4, sizes)) == pytest.approx(0.3, abs=0.2)
    assert valley(*two(0.5, sizes)) > 0.8


def test_where_the_cells_are_and_which_is_first_does_not_matter():
    a, b = two(3)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
    wanted = valley(a, b)
    assert valley(b, a) == pytest.approx(wanted, abs=1e-9)
    assert valley(7 * a @ turn + 100, 7 * b @ turn + 100) == pytest.approx(wanted, abs=1e-6)
    assert valley(a.astype(np.float32), b.astype(np.float32)) == pytest.approx(wanted, abs=1e-3)


def test_a_line_made_for_the_cells_does_not_part_them():
    """In many dimensions cells of one normal lie apart on the discriminant that was made for them, others do not."""
    rng = np.random.default_rng(0)
    heights = [valley(rng.normal(size=(25, 40)), rng.normal(size=(25, 40))) for _ in range(10)]
    assert np.median(heights) > 0.9
    assert min(heights) > 0.6


def test_a_direction_of_much_noise_does_not_hide_it():
    a, b = two(8)
    noise = np.random.default_rng(2).normal(size=(2000, 1)) * 30
    assert valley(np.hstack([a, noise[:1000]]), np.hstack([b, noise[1000:]])) < 0.5


def test_points_and_few_cells():
    point = np.ones((5, 3))
    assert valley(point, point) == 1
    assert valley(point, 2 * point) < 1e-9
    assert valley(point, np.random.default_rng(0).normal(size=(50, 3)) + 9) < 0.1
    assert valley(point[:1], 2 * point[:1]) < 1e-9
    assert 0 <= valley(*two(1, (2, 3))) <= 1


def test_scattered_cells_without_a_peak_are_apart():
    """No cell lies near the median: there is no peak to compare with, and nothing to unite."""
    a = np.array([[-100.0], [-100], [100], [100]])
    b = a + 1
    assert valley(a, b) == 0
    z, labels = np.vstack([a, b]), np.repeat([0, 1], 4)
    assert (united(labels, z, np.ones((2, 2), bool)) == labels).all()


def test_of_many_cells_some_are_looked_at():
    a, b = two(3, (50 * LOOKED_AT, 50 * LOOKED_AT))
    assert valley(a, b) == pytest.approx(valley(*two(3)), abs=0.1)


def pieces():
    """Two normals, the first cut into three; cells without a cluster between."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(1600, 3))
    z[1200:1500, 1] += 12
    labels = np.digitize(z[:, 0], [-0.5, 0.5])
    labels[1200:1500] = 3
    labels[1500:] = -1
    return z, labels


def test_pieces_of_one_are_united():
    z, labels = pieces()
    found = united(labels, z, np.ones((4, 4), bool))
    assert set(found[:1200]) == {0}
    assert set(found[1200:1500]) == {3}
    assert (found[1500:] == -1).all()
    assert (labels == pieces()[1]).all()  # the given ones are left alone


def test_those_that_do_not_hang_together_stay():
    z, labels = pieces()
    links = np.zeros((4, 4), bool)
    links[0, 1] = links[1, 0] = True
    assert set(united(labels, z, links)) == {-1, 0, 2, 3}
    assert (united(labels, z, np.zeros((4, 4), bool)) == labels).all()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_until_so_many_are_left(n):
    """What valleys part least is united first: the pieces, then the two normals."""
    z, labels = pieces()
    found = united(labels, z, np.ones((4, 4), bool), deep=0, n_clusters=n)
    assert len(np.unique(found[labels >= 0])) == min(n, 4)
    if n >= 2:
        assert (found[1200:1500] == 3).all()


def test_how_deep_is_deep():
    z, labels = np.vstack(two(3)), np.repeat([0, 1], 1000)
    links = np.ones((2, 2), bool)
    height = valley(z[:1000], z[1000:])
    assert set(united(labels, z, links, deep=height + 0.01)) == {0, 1}
    assert set(united(labels, z, links, deep=height - 0.01)) == {0}
    nothing = np.full(5, -1)
    assert (united(nothing, z[:5], np.zeros((0, 0), bool)) == nothing).all()
