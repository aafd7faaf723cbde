"""Log probabilities less those of their parts, and of different rows as one: what becomes of errors and bounds."""

import pytest
import torch

from pgen.capability import Estimate
from pgen.completion import joined, less
from pgen.errors import Unanswerable


def of(*values, kind="estimate", **more):
    return Estimate(torch.tensor(values), kind, **more)


def test_errors_of_the_whole_and_the_rest_add():
    whole = of(-3.0, stderr=torch.tensor([0.3]), shared=torch.tensor(0.3), dims=3)
    found = less(whole, of(-1.0, stderr=torch.tensor([0.4]), solver_error=torch.tensor([0.01]), dims=1))
    torch.testing.assert_close(found.value, torch.tensor([-2.0]))
    torch.testing.assert_close(found.stderr, torch.tensor([0.5]))
    assert (float(found.shared), float(found.solver_error), found.dims) == pytest.approx((0.3, 0.01, 2))
    assert (found.kind, less(whole, of(-1.0, kind="exact")).kind) == ("estimate", "estimate")


def test_ends_are_those_of_the_whole_less_the_other_ends_of_the_rest():
    ends = {"lower": torch.tensor([-4.0]), "upper": torch.tensor([-2.5])}
    rest = of(-1.0, lower=torch.tensor([-1.5]), upper=torch.tensor([-0.5]))
    found = less(of(-3.0, **ends), rest)
    assert (found.lower.item(), found.upper.item()) == (-3.5, -1.0)
    exact = less(of(-3.0, **ends), of(-1.0, kind="exact"))
    assert (exact.lower.item(), exact.upper.item()) == (-3.0, -1.5)
    # No end of the rest, and so none of what is left.
    random = less(of(-3.0, **ends), of(-1.0, stderr=torch.tensor([0.1])))
    assert (random.lower, random.upper) == (None, None)


@pytest.mark.parametrize("kind", ["lower bound", "upper bound"])
def test_a_bound_less_another_is_none(kind):
    with pytest.raises(Unanswerable, match=f"{kind}.*mcmc"):
        less(of(-3.0, kind=kind), of(-1.0))
    with pytest.raises(Unanswerable, match=kind):
        less(of(-3.0), of(-1.0, kind=kind))


def test_rows_come_back_in_their_order():
    one = of(1.0, 2.0, kind="exact", dims=2)
    two = of(0.0, stderr=torch.tensor([0.1]), shared=torch.tensor(0.1), dims=1)
    found = joined([one, two], torch.tensor([2, 0, 1]))
    assert found.value.tolist() == [0.0, 1.0, 2.0]
    torch.testing.assert_close(found.stderr, torch.tensor([0.1, 0.0, 0.0]))
    assert (found.kind, found.dims, found.shared) == ("estimate", None, None)
