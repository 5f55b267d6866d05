"""Networks: conditioned layers, encoders, corruption."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sccvae.nn import (
    ACTIVATIONS,
    MLP,
    ConditionedLinear,
    Conditions,
    GaussianEncoder,
    GaussianNoise,
    Masking,
    as_corruption,
)
from sccvae.nn.conditions import _ThinLinear


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_conditioned_linear_is_a_linear_layer_on_the_concatenation():
    layer = ConditionedLinear(4, 3, 2)
    joint = nn.Linear(6, 3)
    with torch.no_grad():
        joint.weight.copy_(torch.cat([layer.linear.weight.T, layer.condition.weight], dim=1))
        joint.bias.copy_(layer.linear.bias)
    h, c = torch.randn(7, 4), torch.randn(7, 2)
    torch.testing.assert_close(layer(h, c), joint(torch.cat([h, c], dim=1)))
    many = torch.randn(5, 7, 4)
    torch.testing.assert_close(layer(many, c), joint(torch.cat([many, c.expand(5, 7, 2)], dim=-1)))


def test_conditioned_linear_without_conditions():
    layer = ConditionedLinear(4, 3)
    h = torch.randn(7, 4)
    assert torch.equal(layer(h), layer.linear(h))
    assert torch.equal(layer(h, torch.randn(7, 2)), layer.linear(h))


def test_mlp_by_hand():
    mlp = MLP(4, [5, 3], n_cond=2, activation="tanh", norm=None)
    x, c = torch.randn(6, 4), torch.randn(6, 2)
    first, second = mlp.linears
    wanted = torch.tanh(second(torch.tanh(first(x, c)), c))
    torch.testing.assert_close(mlp(x, c), wanted)
    assert mlp.n_out == 3


def test_mlp_without_layers_is_the_identity():
    mlp = MLP(4, [])
    x = torch.randn(3, 2, 4)
    assert torch.equal(mlp(x), x)
    assert mlp.n_out == 4


def test_mlp_without_layers_cannot_take_conditions():
    with pytest.raises(ValueError, match=r"conditions .*n_layers"):
        MLP(4, [], n_cond=2)


def test_skip_connections_give_the_input_to_every_later_layer():
    mlp = MLP(4, [5, 6, 3], n_cond=2, norm=None, skip=True, activation="identity")
    assert [len(layer.linear.weight) for layer in mlp.linears] == [4, 5 + 4, 6 + 4]
    assert [layer.condition.in_features for layer in mlp.linears] == [2, 2, 2]
    x, c = torch.randn(6, 4), torch.randn(6, 2)
    a, b, d = mlp.linears
    h = b(torch.cat([a(x, c), x], -1), c)
    torch.testing.assert_close(mlp(x, c), d(torch.cat([h, x], -1), c))
    several = torch.randn(5, 6, 4)
    torch.testing.assert_close(mlp(several, c)[2], mlp(several[2], c))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_trains(activation):
    mlp = MLP(4, [5, 3], activation=activation)
    mlp(torch.randn(8, 4)).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in mlp.parameters())


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_norm_of_sampled_input_equals_flattened(norm):
    mlp = MLP(4, [5], norm=norm)
    x = torch.randn(3, 7, 4)
    flat = mlp(x.reshape(21, 4))
    torch.testing.assert_close(mlp(x), flat.reshape(3, 7, 5))
    if norm == "batch":  # the running mean has seen the same values twice
        assert mlp.afters[0][0].norm.running_mean.shape == (5,)
    mlp.eval()
    torch.testing.assert_close(mlp(x)[1], mlp(x[1]))


def test_batch_norm_standardises_while_training():
    mlp = MLP(4, [5], norm="batch", activation="identity")
    y = mlp(100 * torch.randn(50, 4) + 7)
    torch.testing.assert_close(y.mean(0), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.std(0, correction=0), torch.ones(5), atol=1e-2, rtol=0)


def test_dropout_while_training_only():
    mlp = MLP(4, [100], dropout=0.5, norm=None, activation="softplus")
    x = torch.randn(50, 4)
    share = float((mlp(x) == 0).float().mean())
    assert 0.4 < share < 0.6
    mlp.eval()
    assert (mlp(x) > 0).all()
    assert torch.equal(mlp(x), mlp(x))


def test_mlp_refuses_unknown_names():
    with pytest.raises(ValueError, match=r"activation='swish' is not known; choose one of .*'relu'"):
        MLP(4, [3], activation="swish")
    with pytest.raises(ValueError, match="norm='group' is not known; choose 'batch', 'layer' or None"):
        MLP(4, [3], norm="group")


def test_gaussian_encoder_has_positive_scales():
    encoder = GaussianEncoder(4, 2, n_hidden=[5], n_cond=3)
    with torch.no_grad():
        encoder.scale.bias.fill_(-200.0)
    q = encoder(torch.randn(2, 6, 4), torch.randn(6, 3))
    assert q.loc.shape == q.scale.shape == (2, 6, 2)
    assert (q.scale >= GaussianEncoder.MIN_SCALE).all()
    assert torch.isfinite(q.scale.log()).all()


# Conditions


def test_conditions_are_one_hot_then_standardised():
    conditions = Conditions([2, 3], n_continuous=2)
    assert conditions.width == 7
    covariates = torch.tensor([[10.0, 0.1], [20.0, 0.3], [60.0, 0.5]])
    conditions.standardise(covariates)
    c = conditions(torch.tensor([[0, 2], [1, 0], [1, 1]]), covariates)
    hot = [[1, 0, 0, 0, 1], [0, 1, 1, 0, 0], [0, 1, 0, 1, 0]]
    assert c[:, :5].tolist() == hot
    torch.testing.assert_close(c[:, 5:].mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(c[:, 5:].std(0, correction=0), torch.ones(2))
    other = conditions(torch.tensor([[0, 0]]), torch.tensor([[30.0, 0.3]]))  # centre and spread stay those of training
    torch.testing.assert_close(other[0, 5:], torch.zeros(2), atol=1e-6, rtol=0)


def test_conditions_of_one_kind_only():
    none = torch.zeros(3, 0)
    assert Conditions([2])(torch.tensor([[0], [1], [1]]), none).tolist() == [[1, 0], [0, 1], [0, 1]]
    assert Conditions([], 1)(none.long(), torch.ones(3, 1)).tolist() == [[1], [1], [1]]
    empty = Conditions([], 0)
    empty.standardise(none)
    assert empty(none.long(), none).shape == (3, 0)


@pytest.mark.parametrize("value", [0.1, 37.3, 1e6 + 0.1])
def test_a_constant_covariate_is_not_blown_up(value):
    """In float32 the mean of a constant is off by its last digit: that rounding must not become the spread."""
    conditions = Conditions([], 1)
    conditions.standardise(torch.full((997, 1), value))
    nearby = conditions(torch.zeros(1, 0).long(), torch.tensor([[value * 1.1]]))
    assert abs(float(nearby)) <= abs(value)


def test_conditions_travel_with_the_state():
    conditions = Conditions([2], 1)
    conditions.standardise(torch.tensor([[1.0], [3.0]]))
    copy = Conditions([2], 1)
    copy.load_state_dict(conditions.state_dict())
    assert float(copy.center) == 2
    assert float(copy.spread) == 1


# Corruption


def test_gaussian_noise():
    noise = as_corruption("gaussian", 0.5)
    x = torch.ones(100, 50)
    noisy = noise(x)
    assert abs(float((noisy - x).std()) - 0.5) < 0.02
    assert abs(float((noisy - x).mean())) < 0.03
    assert (x == 1).all()
    assert torch.equal(noise.eval()(x), x)
    assert isinstance(noise, GaussianNoise)


def test_masking():
    mask = as_corruption("mask", 0.3)
    x = torch.full((100, 50), 2.0)
    masked = mask(x)
    assert set(masked.unique().tolist()) == {0.0, 2.0}
    assert abs(float((masked == 0).float().mean()) - 0.3) < 0.03
    assert torch.equal(mask.eval()(x), x)
    assert isinstance(mask, Masking)


@pytest.mark.parametrize("level", [1, -0.1])
def test_masking_all_or_less_than_nothing_is_refused(level):
    with pytest.raises(ValueError, match=f"masking={level} must be at least 0 and below 1"):
        Masking(level)


def test_no_corruption():
    x = torch.ones(3, 2)
    assert torch.equal(as_corruption(None, 0.1)(x), x)


@pytest.mark.parametrize(("noise", "level"), [("blur", 0.1), ("mask", 1.0), ("mask", -0.1), ("gaussian", -1.0)])
def test_corruption_is_checked(noise, level):
    with pytest.raises(
        ValueError, match=rf"noise='{noise}' with noise_level={level}: choose 'gaussian'.*'mask'.*or None"
    ):
        as_corruption(noise, level)


@pytest.mark.parametrize(("m", "k"), [(2, 5), (5, 2)])
def test_a_thin_product_has_the_gradients_of_any(m, k):
    """Of first and second order; they are taken another way on a GPU alone."""
    torch.manual_seed(0)
    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((4, m), (m, k), (k,))]
    assert torch.equal(_ThinLinear.apply(*inputs), torch.addmm(inputs[2], inputs[0], inputs[1]))
    assert torch.autograd.gradcheck(_ThinLinear.apply, inputs)
    assert torch.autograd.gradgradcheck(_ThinLinear.apply, inputs)
    given = inputs[0].detach()  # an input without gradient
    assert torch.autograd.gradcheck(lambda *w: _ThinLinear.apply(given, *w), inputs[1:])
