"""Laws of the bounds, against closed forms and quadrature; little here is sampled."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal
from torch.fx.experimental.proxy_tensor import make_fx

from pgen.algorithms import bounds


@pytest.fixture
def log_weights():
    return (
        torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        .mul(2)
        .requires_grad_()
    )


def gradient(loss, *tensors):
    return torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True, retain_graph=True)


# One latent, one observation: p(z) = N(0, 1), p(x | z) = N(theta z, s), q(z) = N(m, exp(r)). Its expectations
# over two particles are integrals over two standard normals, done by Gauss-Hermite quadrature to about 1e-10.
NODES, NODE_WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(64))
PAIRS = torch.cartesian_prod(NODES, NODES).T  # [2 particles, 4096]
PAIR_WEIGHTS = torch.outer(NODE_WEIGHTS, NODE_WEIGHTS).reshape(-1) / (2 * math.pi)
OBSERVED, NOISE = torch.tensor(0.7, dtype=torch.float64), 0.8


def parameters():
    return [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.3, 0.2, -0.3)]  # theta, m, r


def pair_weights(theta, m, r, z):
    prior, likelihood = Normal(0.0, 1.0, validate_args=False), Normal(theta * z, NOISE, validate_args=False)
    return (
        prior.log_prob(z)
        + likelihood.log_prob(OBSERVED)
        - Normal(m, r.exp(), validate_args=False).log_prob(z)
    )


def expected_gradient(estimator):
    """The mean over both particles' noise of an estimator's gradient: the nodes are rows, weighed."""
    theta, m, r = parameters()
    loss = estimator(theta, m, r, PAIRS)
    return torch.stack(gradient(loss, theta, m, r))


def weigh(bound_of):
    """A bound whose rows (the quadrature nodes) are weighed: autograd sees `sum_i weight_i loss_i`."""

    def loss(theta, m, r, noise):
        copies = [p.expand(noise.shape[1]).clone() for p in (theta, m, r)]
        for copy in copies:
            copy.register_hook(lambda g: g * PAIR_WEIGHTS)
        return bound_of(*copies, noise).loss

    return loss


def test_a_bound_has_a_value_per_row_and_a_scalar_loss(log_weights):
    for bound in (bounds.elbo(log_weights), bounds.iwae(log_weights), bounds.renyi(log_weights, 0.5)):
        assert bound.value.shape == (5,)
        assert not bound.value.requires_grad
        torch.testing.assert_close(bound.loss, -bound.value.sum())


def test_renyi_has_the_elbo_and_the_importance_weighted_bound_as_special_cases(log_weights):
    for alpha, other in ((1.0, bounds.elbo), (0.0, bounds.iwae)):
        ours, theirs = bounds.renyi(log_weights, alpha), other(log_weights)
        torch.testing.assert_close(ours.value, theirs.value)
        torch.testing.assert_close(gradient(ours.loss, log_weights), gradient(theirs.loss, log_weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6, 1e-9])
def test_renyi_tends_to_the_elbo_without_losing_digits(log_weights, gap, dtype):
    w = log_weights.detach().to(dtype).requires_grad_()
    for alpha in (1 - gap, 1 + gap):
        near, limit = bounds.renyi(w, alpha), bounds.elbo(w)
        slope = w.var(0).max() * gap  # the bound moves by half the variance per unit of alpha
        assert (near.value - limit.value).abs().max() <= slope + 4 * torch.finfo(dtype).eps * w.abs().max()
        torch.testing.assert_close(
            gradient(near.loss, w), gradient(limit.loss, w), atol=10 * gap + 1e-6, rtol=0
        )


def test_the_naive_formula_does_lose_the_digits(log_weights):
    """The broken specimen of the test above: without care, single precision fails near alpha = 1."""
    w, power = log_weights.detach().float(), 1e-6
    naive = bounds.log_mean_exp(power * w) / power
    assert (naive - w.mean(0)).abs().max() > 0.01


def test_renyi_falls_with_alpha_and_starts_at_the_largest_weight(log_weights):
    orders = [-math.inf, -20.0, -1.0, 0.0, 0.5, 0.95, 1.0, 1.05, 2.0, 20.0, math.inf]
    values = torch.stack([bounds.renyi(log_weights, alpha).value for alpha in orders])
    assert (values.diff(dim=0) <= 1e-12).all()
    torch.testing.assert_close(values[0], log_weights.detach().amax(0))
    torch.testing.assert_close(values[-1], log_weights.detach().amin(0))


def test_more_particles_never_hurt(log_weights):
    """Burda's theorem, draw by draw: the mean bound over subsets of k - 1 particles is at most that of k."""
    w = log_weights.detach()
    mean = [
        torch.stack([bounds.iwae(w[list(some)]).value for some in combinations(range(6), k)]).mean(0)
        for k in range(1, 7)
    ]
    assert (torch.stack(mean).diff(dim=0) >= -1e-12).all()
    torch.testing.assert_close(mean[0], bounds.elbo(w).value)
    torch.testing.assert_close(mean[-1], bounds.iwae(w).value)


class TestPPCA:
    """x = W z + mu + noise, whose evidence and posterior are known."""

    latent, features, rows, noise = 2, 5, 7, 0.6

    def setup_method(self):
        source = torch.Generator().manual_seed(1)
        self.W = torch.randn(self.features, self.latent, dtype=torch.float64, generator=source)
        self.x = torch.randn(self.rows, self.features, dtype=torch.float64, generator=source)
        eye = torch.eye(self.features, dtype=torch.float64)
        self.evidence = MultivariateNormal(
            torch.zeros(self.features), self.W @ self.W.T + self.noise**2 * eye
        ).log_prob(self.x)
        precision = torch.eye(self.latent, dtype=torch.float64) + self.W.T @ self.W / self.noise**2
        self.posterior = MultivariateNormal(
            self.x @ self.W @ torch.linalg.inv(precision) / self.noise**2, precision_matrix=precision
        )

    def weights(self, guide, particles):
        torch.manual_seed(2)
        z = guide.rsample((particles,))
        joint = Normal(0.0, 1.0).log_prob(z).sum(-1) + Normal(z @ self.W.T, self.noise).log_prob(self.x).sum(
            -1
        )
        return joint - guide.log_prob(z)

    def test_the_exact_posterior_leaves_no_gap_and_no_variance(self):
        w = self.weights(self.posterior, 16)
        for bound in (bounds.elbo, bounds.iwae, lambda w: bounds.renyi(w, 0.3)):
            torch.testing.assert_close(bound(w).value, self.evidence, rtol=0, atol=1e-9)
        assert w.std(0).max() < 1e-9
        estimate = bounds.log_evidence(w)
        assert estimate.stderr.max() < 1e-9

    def test_any_other_guide_leaves_a_gap(self):
        """The broken specimen: half the posterior's spread; the gap is the divergence, in closed form."""
        narrow = MultivariateNormal(self.posterior.mean, self.posterior.covariance_matrix / 4)
        divergence = torch.distributions.kl_divergence(narrow, self.posterior)
        w = self.weights(narrow, 200_000)
        error = w.std(0) / math.sqrt(len(w))
        assert (
            (w.mean(0) - (self.evidence - divergence)).abs() < 6 * error
        ).all()  # one in 1e8 per row by chance
        assert (divergence > 0.5).all()


class TestGradients:
    """Two-particle estimators against the gradient of the expected bound, both by quadrature."""

    def expected_bound(self, alpha=0.0):
        theta, m, r = parameters()
        z = m + r.exp() * PAIRS
        value = bounds.power_mean(pair_weights(theta, m, r, z), 1 - alpha)
        return -(PAIR_WEIGHTS * value).sum(), (theta, m, r)

    def true_gradient(self, alpha=0.0):
        loss, leaves = self.expected_bound(alpha)
        return torch.stack(gradient(loss, *leaves))

    @pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
    def test_renyi(self, alpha):
        ours = expected_gradient(
            weigh(lambda t, m, r, e: bounds.renyi(pair_weights(t, m, r, m + r.exp() * e), alpha))
        )
        torch.testing.assert_close(ours, self.true_gradient(alpha))

    def test_the_doubly_reparameterised_gradient_has_the_same_mean(self):
        def estimator(theta, m, r, noise):
            z = m + r.exp() * noise
            return bounds.dreg(lambda zs: pair_weights(theta, m.detach(), r.detach(), zs[0]), [z])

        torch.testing.assert_close(
            expected_gradient(weigh(estimator)), self.true_gradient(), rtol=1e-6, atol=1e-8
        )

    def test_without_the_second_weight_or_with_the_score_term_it_has_not(self):
        """Broken specimens: weights to the first power, and a guide whose parameters were not detached."""

        def single(theta, m, r, noise):
            z = m + r.exp() * noise
            log_w = pair_weights(theta, m.detach(), r.detach(), z)
            return bounds.Bound(log_w[0], -(log_w.softmax(0).detach() * log_w).sum())

        def attached(theta, m, r, noise):
            return bounds.dreg(lambda zs: pair_weights(theta, m, r, zs[0]), [m + r.exp() * noise])

        for broken in (single, attached):
            assert (expected_gradient(weigh(broken)) - self.true_gradient()).abs().max() > 0.01

    def test_the_wake_step_of_the_program_is_the_importance_weighted_gradient(self):
        def estimator(theta, m, r, noise):
            z = m + r.exp() * noise
            guide = Normal(m, r.exp()).log_prob(z)
            return bounds.wake_theta(pair_weights(theta, m, r, z) + guide, guide)

        torch.testing.assert_close(expected_gradient(weigh(estimator))[0], self.true_gradient()[0])

    def test_dreg_has_no_noise_at_the_exact_posterior(self):
        theta, _, _ = parameters()
        precision = 1 + theta**2 / NOISE**2
        m = (theta * OBSERVED / NOISE**2 / precision).detach().requires_grad_()
        r = (-0.5 * precision.log()).detach().requires_grad_()
        noise = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        bound = bounds.dreg(
            lambda z: pair_weights(theta, m.detach(), r.detach(), z[0]), [m + r.exp() * noise]
        )
        assert torch.stack(gradient(bound.loss, m, r)).abs().max() < 1e-12
        plain = bounds.iwae(pair_weights(theta, m, r, m + r.exp() * noise))
        assert torch.stack(gradient(plain.loss, m, r)).abs().max() > 0.01
        torch.testing.assert_close(bound.value, plain.value)


class TestWakeSleep:
    """Four states, each a particle of a uniform guide: the weights are then the exact posterior."""

    def setup_method(self):
        source = torch.Generator().manual_seed(3)
        self.joint = torch.randn(4, 1, dtype=torch.float64, generator=source).requires_grad_()
        self.logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        self.guide = self.logits.log_softmax(0).unsqueeze(1)
        self.posterior = self.joint.detach().softmax(0)

    def test_wake_phi_descends_the_divergence_from_the_posterior(self):
        (ours,) = gradient(bounds.wake_phi(self.joint, self.guide).loss, self.logits)
        (exact,) = gradient((self.posterior * (self.posterior.log() - self.guide)).sum(), self.logits)
        torch.testing.assert_close(ours, exact)

    def test_wake_theta_ascends_the_evidence(self):
        (ours,) = gradient(bounds.wake_theta(self.joint, self.guide).loss, self.joint)
        (exact,) = gradient(-self.joint.logsumexp(0).sum(), self.joint)
        torch.testing.assert_close(ours, exact)

    def test_neither_reaches_the_other_player(self):
        assert not gradient(bounds.wake_phi(self.joint, self.guide).loss, self.joint)[0].any()
        assert not gradient(bounds.wake_theta(self.joint, self.guide).loss, self.logits)[0].any()

    def test_both_report_the_importance_weighted_bound(self):
        expected = bounds.iwae(self.joint - self.guide).value
        torch.testing.assert_close(bounds.wake_phi(self.joint, self.guide).value, expected)
        torch.testing.assert_close(bounds.wake_theta(self.joint, self.guide).value, expected)

    def test_sleep_phi_is_maximum_likelihood_on_simulations(self):
        (ours,) = gradient(bounds.sleep_phi(self.guide).loss, self.logits)
        (exact,) = gradient(-self.guide.mean(), self.logits)
        torch.testing.assert_close(ours, exact)


def test_beta_changes_the_loss_and_not_the_value():
    likelihood, kl = (
        torch.tensor([-3.0, -4.0], requires_grad=True),
        torch.tensor([1.0, 2.0], requires_grad=True),
    )
    bound = bounds.beta_elbo(likelihood, kl, beta=0.25)
    torch.testing.assert_close(bound.value, torch.tensor([-4.0, -6.0]))
    assert [g.tolist() for g in gradient(bound.loss, likelihood, kl)] == [[-1.0, -1.0], [0.25, 0.25]]
    torch.testing.assert_close(bounds.beta_elbo(likelihood, kl).loss, -bound.value.sum())


def test_free_bits_press_only_what_carries_more_than_the_floor():
    kl = torch.tensor([0.1, 0.5, 2.0], requires_grad=True)
    total = bounds.free_bits(kl, floor=0.3)
    torch.testing.assert_close(total, torch.tensor(2.8))
    assert gradient(total, kl)[0].tolist() == [0.0, 1.0, 1.0]
    torch.testing.assert_close(bounds.free_bits(kl, floor=0.0), kl.sum())


def test_warm_up_rises_once_to_one():
    betas = [bounds.warmup(i, steps=100, fraction=0.3) for i in range(100)]
    assert betas == sorted(betas)
    assert 0 < betas[0] <= 1 / 30
    assert betas[29] == betas[-1] == 1.0
    assert bounds.warmup(0, steps=100, fraction=0.0) == 1.0


def test_the_standard_error_is_the_delta_method(log_weights):
    w = log_weights.detach().exp()
    estimate = bounds.log_evidence(log_weights.detach() - 1000)  # weights that underflow
    torch.testing.assert_close(estimate.value + 1000, w.mean(0).log())
    torch.testing.assert_close(estimate.stderr, w.std(0) / len(w) ** 0.5 / w.mean(0))


def test_every_bound_can_be_recorded():
    """Nothing reads a number out of a tensor; the hook of the doubly reparameterised gradient is recorded."""
    noise = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def doubly(m):
        theta, _, r = parameters()
        bound = bounds.dreg(lambda z: pair_weights(theta, m.detach(), r, z[0]), [m + noise])
        return bound.value, *torch.autograd.grad(bound.loss, m)

    def others(m):
        w = m + noise
        found = [
            bounds.elbo(w),
            bounds.iwae(w),
            bounds.renyi(w, 0.98),
            bounds.renyi(w, 3.0),
            bounds.wake_theta(w, w / 2),
        ]
        return *(b.value for b in found), *torch.autograd.grad(sum(b.loss for b in found), m)

    for step in (doubly, others):
        start = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        recorded = make_fx(step)(start)
        elsewhere = torch.full((4,), 0.3, dtype=torch.float64, requires_grad=True)
        torch.testing.assert_close(recorded(elsewhere), step(elsewhere))
