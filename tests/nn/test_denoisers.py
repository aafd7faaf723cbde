"""Laws of denoising networks: scales, shapes, conditions, energies, and transforms that they pass through."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, vmap

from pgen.algorithms.diffusion.predictions import preconditioned
from pgen.errors import DataError, OptionError
from pgen.nn.denoisers import DenoiserMLP, EnergyDenoiser, Preconditioned
from pgen.nn.embedding import NoiseEmbedding
from pgen.nn.unet import UNet


def awake(module, std=0.3):
    """With no layer left at its zero."""
    for name, parameter in module.named_parameters():
        if not parameter.abs().sum():
            nn.init.normal_(parameter, std=std if name.endswith("weight") else 0.1)
    return module


def networks():
    return {
        "mlp": (DenoiserMLP((2, 3), hidden=(16, 16), context=4), (2, 3)),
        "mlp of numbers": (DenoiserMLP((), hidden=(16,), context=4), ()),
        "unet": (UNet(2, width=8, context=4, attention=(1,)), (2, 8, 8)),
        "odd unet": (UNet(1, width=8, multipliers=(1, 2, 2), context=4), (1, 9, 11)),
    }


NAMES = list(networks())


def inputs(event, rows=3, dtype=torch.float32):
    return (
        torch.randn(rows, *event, dtype=dtype),
        torch.rand(rows, dtype=dtype) + 0.1,
        torch.randn(rows, 4, dtype=dtype),
    )


@pytest.mark.parametrize("name", NAMES)
def test_networks_begin_at_zero_and_keep_rows_apart(name):
    network, event = networks()[name]
    x, noise, context = inputs(event)
    assert not network(x, noise, context).any()
    awake(network)
    out = network(x, noise, context)
    assert out.shape == x.shape
    assert out.abs().sum() > 0
    torch.testing.assert_close(network(x[1:2], noise[1:2], context[1:2])[0], out[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_noise_and_context_are_heard_and_a_row_of_nan_is_no_condition(name):
    network, event = networks()[name]
    awake(network)
    x, noise, context = inputs(event)
    out = network(x, noise, context)
    assert not torch.allclose(network(x, noise + 0.5, context), out)
    assert not torch.allclose(network(x, noise, context + 1), out)
    partly = context.clone()
    partly[1, 2] = torch.nan
    without = network(x, noise, partly)
    torch.testing.assert_close(without[[0, 2]], out[[0, 2]], atol=1e-5, rtol=1e-4)
    null = network(x, noise, torch.full_like(context, torch.nan))
    torch.testing.assert_close(without[1], null[1], atol=1e-5, rtol=1e-4)
    null.square().sum().backward()
    gradients = [p.grad for p in network.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert network.embedding.null.grad.abs().sum() > 0  # what stands for no condition is learned


@pytest.mark.parametrize("name", NAMES)
def test_networks_follow_dtype_and_pass_through_vmap(name):
    network, event = networks()[name]
    awake(network).double()
    x, noise, context = inputs(event, dtype=torch.float64)
    out = network(x, noise, context)
    assert out.dtype == torch.float64
    parameters = {k: v.detach() for k, v in network.named_parameters()}

    def one(parameters, x, noise, context):
        return functional_call(network, parameters, (x[None], noise[None], context[None]))[0]

    torch.testing.assert_close(vmap(one, (None, 0, 0, 0))(parameters, x, noise, context), out)
    per_row = vmap(grad(lambda *a: one(*a).square().sum()), (None, 0, 0, 0))(parameters, x, noise, context)
    network(x, noise, context).square().sum().backward()
    for key, parameter in network.named_parameters():
        torch.testing.assert_close(per_row[key].sum(0), parameter.grad)


@pytest.mark.parametrize("event", [(), (3,), (2, 1, 4)])
def test_preconditioning_is_the_prediction_of_that_name(event):
    s, mean = 0.3, 1.5
    network = awake(DenoiserMLP(event, hidden=(16,))).double()
    denoiser = Preconditioned(network, s, mean=mean)
    x, sigma, _ = inputs(event, 5, torch.float64)
    level = sigma.reshape(-1, *[1] * len(event))
    found = preconditioned(denoiser.sigma_data.item()).of(denoiser(x, sigma) - mean, x - mean, sigma)
    raw = network((x - mean) / torch.sqrt(level**2 + denoiser.sigma_data.item() ** 2), sigma.log() / 4)
    torch.testing.assert_close(found, raw)


def test_without_noise_nothing_is_denoised_and_one_level_serves_all_rows():
    denoiser = Preconditioned(awake(DenoiserMLP(2, hidden=(16,))))
    x = torch.randn(4, 2)
    torch.testing.assert_close(denoiser(x, torch.zeros(4)), x)
    torch.testing.assert_close(denoiser(x, torch.tensor(0.7)), denoiser(x, torch.full((4,), 0.7)))


@pytest.mark.parametrize("make", [Preconditioned, EnergyDenoiser])
def test_untrained_it_is_the_denoiser_of_a_gaussian(make):
    mean = torch.tensor([3.0, -1.0])
    denoiser = make(DenoiserMLP(2), 0.5, mean=mean)
    x, sigma = torch.randn(5, 2), torch.rand(5) + 0.1
    expected = mean + (0.25 / (0.25 + sigma**2))[:, None] * (x - mean)
    torch.testing.assert_close(denoiser(x, sigma), expected)


class Scalar(nn.Module):
    """An energy of its own: one number for each row."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.Softplus(), nn.Linear(16, 1))

    def forward(self, x, noise, context=None):
        return self.layers(torch.cat([x, noise.unsqueeze(-1)], -1)).squeeze(-1)


@pytest.mark.parametrize("make", [Scalar, lambda: DenoiserMLP(3, hidden=(16,))], ids=["scalar", "vector"])
def test_an_energy_denoiser_is_a_gradient(make):
    denoiser = EnergyDenoiser(awake(make()), 0.7).double()
    x, sigma = torch.randn(5, 3, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.2
    out = denoiser(x, sigma)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(denoiser.energy(leaf, sigma).sum(), leaf)
    torch.testing.assert_close(out, x - sigma[:, None] ** 2 * slope)
    with torch.no_grad():  # where solvers are
        torch.testing.assert_close(denoiser(x, sigma), out)
    jacobian = vmap(jacrev(lambda x, s: denoiser(x[None], s[None])[0]))(x, sigma)
    torch.testing.assert_close(jacobian, jacobian.mT)
    curvature = vmap(hessian(lambda x, s: denoiser.energy(x[None], s[None])[0]))(x, sigma)
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(jacobian, eye - sigma[:, None, None] ** 2 * curvature)
    plain = Preconditioned(awake(DenoiserMLP(3, hidden=(16,)))).double()
    other = vmap(jacrev(lambda x, s: plain(x[None], s[None])[0]))(x, sigma)
    assert (other - other.mT).abs().max() > 1e-3  # which a denoiser without an energy does not have


@pytest.mark.parametrize("name", ["mlp", "unet"])
def test_any_network_trains_as_an_energy(name):
    network, event = networks()[name]
    denoiser = EnergyDenoiser(awake(network))
    x, sigma, context = inputs(event)
    loss = (denoiser(x, sigma, context) - x).square().mean()
    found = torch.autograd.grad(loss, list(denoiser.parameters()), allow_unused=True)
    assert all(g is not None and g.isfinite().all() for g in found)
    assert denoiser.energy(x, sigma, context).shape == (3,)


def test_scales_are_saved_with_the_weights():
    first = Preconditioned(DenoiserMLP(2), 0.9, mean=torch.tensor([1.0, 2.0]))
    second = Preconditioned(DenoiserMLP(2), mean=torch.zeros(2))
    second.load_state_dict(first.state_dict())
    x, sigma = torch.randn(3, 2), torch.rand(3) + 0.1
    torch.testing.assert_close(second(x, sigma), first(x, sigma))


def test_features_tell_noise_levels_apart():
    embedding = NoiseEmbedding(8)
    levels = torch.linspace(-1.6, 1.1, 50)  # 0.002 to 80
    phase = levels[:, None] * embedding.frequencies
    features = torch.cat([levels[:, None], phase.sin(), phase.cos()], -1)
    apart = torch.cdist(features, features) + 10 * torch.eye(50)
    assert apart.min() > 0.3


@pytest.mark.parametrize("size", [(8, 8), (9, 9), (28, 28), (8, 13)])
def test_images_of_any_size(size):
    network = awake(UNet(1, width=8, multipliers=(1, 2, 2), blocks=2, attention=(2,)))
    x = torch.randn(2, 1, *size)
    assert network(x, torch.zeros(2)).shape == x.shape
    assert UNet(1, width=8, outputs=3)(x, torch.zeros(2)).shape == (2, 3, *size)


def test_wrong_inputs_are_named():
    with pytest.raises(DataError, match=r"expected \('B', 2\)"):
        DenoiserMLP(2)(torch.zeros(3, 1), torch.zeros(3))
    with pytest.raises(DataError, match="got none as context"):
        DenoiserMLP(2, context=1)(torch.zeros(3, 2), torch.zeros(3))
    with pytest.raises(DataError, match="without a context"):
        DenoiserMLP(2)(torch.zeros(3, 2), torch.zeros(3), torch.zeros(3, 1))
    with pytest.raises(DataError, match=r"expected \[B, 1, H, W\]"):
        UNet(1, width=8)(torch.zeros(3, 8, 8), torch.zeros(3))
    with pytest.raises(OptionError, match="blocks of one width"):
        DenoiserMLP(2, hidden=(3, 4))
    with pytest.raises(OptionError, match="attention at resolutions from 0 to 1"):
        UNet(1, attention=(2,))
    with pytest.raises(OptionError, match="positive standard deviation"):
        Preconditioned(DenoiserMLP(2), 0.0)
    with pytest.raises(OptionError, match="positive whole"):
        NoiseEmbedding(0)
