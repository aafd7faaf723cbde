"""Trees over binary variables: one in closed form from data, or a mixture of them as a program."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import logsigmoid
from torch.types import _size

from pgen.capability import Capability
from pgen.errors import DataError, OptionError


class _Forest(constraints.Constraint):
    """Parents that lead, from everybody, to somebody without one."""

    is_discrete = True
    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        """Whether they do: shape `[*batch]`."""
        above = _tops(value)
        for _ in _doublings(value):
            above = above.gather(-1, above)
        return ((value >= -1) & (value < value.shape[-1]) & (value.gather(-1, above) < 0)).all(-1)


class Tree(TorchDistribution):
    r"""Binary variables, each of which depends on at most one other, its parent.

    .. math:: P(x) = \prod_i P(x_i \mid x_{\text{pa}(i)}),
        \qquad P(x_i = 1 \mid x_{\text{pa}(i)} = v) = \sigma(\ell_{i v})

    Without parents it is a product of Bernoullis. A batch may hold trees of different shapes.

    Args:
        logits: shape `[*batch, D, 2]`: of `x_i = 1` where the parent is 0, and where it is 1. A variable without
            a parent takes the first.
        parents: whole numbers of shape `[*batch, D]` or `[D]`; -1 for none.
        validate_args: whether parents form trees and values are zeros and ones; None for torch's default.

    Raises:
        OptionError: shapes do not fit.
        ValueError: the parents go round in a circle, or a value is neither zero nor one.

    Example:
        >>> chain = Tree(torch.tensor([[0.0, 0.0], [-2.0, 2.0]]), torch.tensor([-1, 0]))
        >>> float(chain.log_prob(torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])).exp().sum())
        1.0
    """

    capabilities = frozenset({Capability.SAMPLE, Capability.LOG_PROB})
    arg_constraints: Mapping[str, constraints.Constraint] = {  # type: ignore[override]
        "logits": constraints.independent(constraints.real, 2),
        "parents": _Forest(),
    }
    support = constraints.independent(constraints.boolean, 1)
    has_rsample = False

    def __init__(self, logits: Tensor, parents: Tensor, *, validate_args: bool | None = None) -> None:
        if logits.ndim < 2 or logits.shape[-1] != 2 or parents.shape[-1:] != logits.shape[-2:-1]:
            raise OptionError(
                f"Tree got logits of shape {tuple(logits.shape)} and parents of shape {tuple(parents.shape)}; "
                "expected [*batch, D, 2] and [*batch, D]"
            )
        batch = torch.broadcast_shapes(logits.shape[:-2], parents.shape[:-1])
        features = logits.shape[-2]
        self.logits, self.parents = logits, parents
        super().__init__(batch, Size((features,)), validate_args=validate_args)

    def expand(self, batch_shape: _size, _instance: Any = None) -> Tree:
        """The same laws, their batch shape broadcast to another."""
        new: Any = self._get_checked_instance(Tree, _instance)
        new.logits, new.parents = self.logits, self.parents  # which broadcast by themselves
        TorchDistribution.__init__(new, Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Exact log probability in nats: shape `[..., *batch]` for values of shape `[..., *batch, D]`."""
        if self._validate_args:
            self._validate_sample(value)
        value = value.to(self.logits.dtype)
        above = self._above(value)
        low, high = self.logits.unbind(-1)
        logit = low + (high - low) * above
        scores = (logsigmoid(logit) - (1 - value) * logit).sum(-1)  # log s(-l) = log s(l) - l
        return scores.expand(torch.broadcast_shapes(scores.shape, self.batch_shape))

    @torch.no_grad()
    def sample(self, sample_shape: _size = ()) -> Tensor:
        """Draw values, from the tops of the trees down: shape `[*sample_shape, *batch, D]`."""
        # Once its noise is drawn, a variable is a function of its parent, given by its two values. Functions
        # of functions, ways up doubled each time, tell it from the top in log2(D) rounds.
        shape = self._extended_shape(Size(sample_shape))
        noise = torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device)
        zero, one = (noise < p for p in self.logits.sigmoid().unbind(-1))
        one = torch.where(self.parents < 0, zero, one)
        above = _tops(self.parents).expand(shape)
        for _ in _doublings(self.parents):
            zero, one = (torch.where(end.gather(-1, above), one, zero) for end in (zero, one))
            above = above.gather(-1, above)
        return zero.to(noise.dtype)

    def _above(self, value: Tensor) -> Tensor:
        """The value of everybody's parent, 0 for none: `[..., *batch, D]`."""
        shape = torch.broadcast_shapes(value.shape, self.parents.shape)
        found = value.expand(shape).gather(-1, self.parents.clamp(min=0).expand(shape))
        return found * (self.parents >= 0)


class TreeMixture(nn.Module):
    r"""Each row comes from one of a few trees of binary variables (Meila and Jordan 2000).

    .. math:: k \sim \text{Categorical}(\pi), \qquad x \mid k \sim \text{Tree}_k

    Sites: `component`, latent; `x`, the data. Weights and conditional probabilities are learned, the shapes of
    the trees are given. Without edges it is a mixture of products of Bernoullis; started from
    `[chow_liu(x)]` it is the one tree of greatest likelihood; and started from a Chow-Liu tree for each part
    of the data it may follow what no single tree can.

    Args:
        features: binary variables of one row.
        components: trees in the mixture.
        trees: those to start from, as many as there are components; None for products of Bernoullis near one
            half, drawn at random so that components differ.

    Raises:
        OptionError: trees of another size, or not as many as components.

    Example:
        >>> from pyro import poutine
        >>> poutine.trace(TreeMixture(features=4, components=3)).get_trace(5).nodes["x"]["value"].shape
        torch.Size([5, 4])
    """

    parents: Tensor

    def __init__(self, features: int = 64, components: int = 16, trees: Sequence[Tree] | None = None) -> None:
        super().__init__()
        if trees is None:
            logits = torch.randn(components, features, 1).expand(-1, -1, 2).clone()
            parents = torch.full((components, features), -1)
        else:
            if len(trees) != components or any(tree.event_shape != (features,) for tree in trees):
                raise OptionError(
                    f"TreeMixture(features={features}, components={components}) got {len(trees)} trees of "
                    f"{sorted({tree.event_shape[0] for tree in trees})} variables"
                )
            logits = torch.stack([tree.logits for tree in trees])
            parents = torch.stack([tree.parents for tree in trees])
        self.weights = nn.Parameter(torch.zeros(components, dtype=logits.dtype))
        self.logits = nn.Parameter(logits)
        self.register_buffer("parents", parents)

    def forward(self, n: int) -> Tensor:
        """The program: `n` rows."""
        with pyro.plate("data", n):
            k = pyro.sample("component", dist.Categorical(logits=self.weights))
            return pyro.sample("x", Tree(self.logits[k], self.parents[k]))


def chow_liu(x: Tensor, smoothing: float = 0.5, weights: Tensor | None = None) -> Tree:
    r"""The tree of greatest likelihood for binary data (Chow and Liu 1968).

    It joins all variables by those pairs whose mutual information adds up to the most, found by Prim's
    algorithm from the first variable on; its conditional probabilities are those of the (smoothed) counts.

    Args:
        x: zeros and ones, shape `[n, D]`.
        smoothing: rows added to the count of each of the four values of a pair, above 0.
        weights: how much each row counts, shape `[n]`, not negative; None for one each.

    Raises:
        DataError: `x` has another shape or holds something else than zeros and ones.
        OptionError: `smoothing` is not positive.

    Example:
        >>> x = torch.tensor([[0.0, 0, 1], [1, 1, 0], [0, 0, 0], [1, 1, 1]])
        >>> chow_liu(x).parents.tolist()
        [-1, 0, 0]
    """
    if not smoothing > 0:
        raise OptionError(f"chow_liu(smoothing={smoothing!r}): expected a number above 0, such as 0.5")
    if x.ndim != 2 or not bool(((x == 0) | (x == 1)).all()):
        raise DataError(
            f"chow_liu got data of shape {tuple(x.shape)}; expected [rows, variables] of zeros and ones"
        )
    pairs = _pairs(x.double(), smoothing, weights)
    one = pairs.sum(1)[:, :, 0]  # P(x_i = a), [2, D]
    gain = (pairs * (pairs / (one[:, None, :, None] * one[None, :, None, :])).log()).sum((0, 1))
    parents = _prim(gain)
    top = parents < 0
    joint = pairs[
        1, :, torch.arange(len(top), device=x.device), parents.clamp(min=0)
    ].mT  # P(x_i = 1, parent = v)
    above = torch.where(top[:, None], 1.0, one.mT[parents.clamp(min=0)])
    ones = torch.where(top[:, None], one[1, :, None], joint)
    return Tree((ones / above).logit().to(x.dtype), parents)


def _pairs(x: Tensor, smoothing: float, weights: Tensor | None) -> Tensor:
    """Smoothed shares of the rows in which the pair (i, j) has the values (a, b): `[2, 2, D, D]`."""
    w = torch.ones_like(x[:, 0]) if weights is None else weights.to(x.dtype)
    values = torch.stack([1 - x, x])  # [2, n, D]
    counts = (values * w[:, None]).mT[:, None] @ values[None]
    return (counts + smoothing) / (w.sum() + 4 * smoothing)


def _prim(gain: Tensor) -> Tensor:
    """Parents of the spanning tree of greatest gain, which grows from place 0: `[D]`, -1 at the top."""
    count = len(gain)
    parents = torch.full((count,), -1, device=gain.device)
    best, outside = gain[0].clone(), torch.ones(count, dtype=torch.bool, device=gain.device)
    near = torch.zeros_like(parents)  # who of those inside is nearest
    outside[0] = False
    for _ in range(count - 1):
        new = torch.where(outside, best, -math.inf).argmax()
        parents[new], outside[new] = near[new], False
        nearer = gain[new] > best
        best, near = torch.where(nearer, gain[new], best), torch.where(nearer, new, near)
    return parents


def _tops(parents: Tensor) -> Tensor:
    """Whose child everybody is, the top of a tree its own: `[*batch, D]`."""
    count = parents.shape[-1]
    return torch.where(parents < 0, torch.arange(count, device=parents.device), parents.clamp(max=count - 1))


def _doublings(parents: Tensor) -> range:
    """How often a way up must be doubled to reach every top."""
    return range((parents.shape[-1] - 1).bit_length())
