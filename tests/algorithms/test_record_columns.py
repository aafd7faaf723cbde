"""Chains last in memory: the same numbers, and no operation on the way that forgets the layout."""

import pytest
import torch

from pgen.algorithms.record import columns
from pgen.algorithms.record.columns import columned
from pgen.algorithms.record.cost import cost
from pgen.algorithms.record.recorder import Recorder, recorded_run
from pgen.algorithms.record.simplify import fastest, guarded_in
from pgen.algorithms.record.verify import Trial

C, K, T = 64, 3, 16


def tables(x):
    """Small tables of every chain, [C, T, K, K]."""
    return x[:, :, None, None] * torch.arange(1.0, 1 + K * K).view(K, K).to(x) / 10


def rounds(x):
    """A product of matrices of logs, two by two."""
    product = tables(x)
    while product.shape[1] > 1:
        left, right = product.unflatten(1, (-1, 2)).unbind(2)
        terms = left.unsqueeze(-1) + right.unsqueeze(-3)
        largest = terms.amax(-2, keepdim=True)
        product = (terms - largest).exp().sum(-2).log() + largest.squeeze(-2)
    return product.sum((1, 2, 3))


def across(x):
    """Everything that is done with chains last, along dimensions on both sides and from the end."""
    t = tables(x)
    some = torch.stack([t.amax(1), t.amin(-3), t.logsumexp(1)], 1) + torch.stack(
        [t[:, 0], t[:, 1], t[:, 2]], -3
    )
    kept = t - t.sum(-1, keepdim=True) - t.sum((1, 3), keepdim=True)
    chosen = kept.index_select(1, torch.tensor([3, 1, 1])) + some
    signs = (t > 0.1).any(2) & (t > -5).all(-1)
    last = torch.stack([chosen, chosen.exp()], -1).sum((1, -1)) + torch.cat([t[:, 4, :1], t[:, 5, 1:]], -2)
    return last.sum((1, 2)) + signs.double().sum((1, 2))


def taped(fn):
    x = torch.randn(C, T, dtype=torch.float64)
    tape, _ = recorded_run(fn, Recorder([x], ()))
    return tape, Trial.on(tape, [x])


@pytest.mark.parametrize("fn", [rounds, across])
def test_the_same_numbers(fn):
    tape, trial = taped(fn)
    values = trial.values(tape)
    way = columned(tape, values, set())
    found = trial.values(way)
    for one, other in zip(tape.outputs, way.outputs, strict=True):
        torch.testing.assert_close(found[other], values[one], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("fn", [rounds, across])
def test_results_of_many_numbers_a_chain_have_the_chains_last_in_memory(fn):
    tape, trial = taped(fn)
    way = columned(tape, trial.values(tape), set())
    found = trial.values(way)
    (copy,) = [
        op for op in way.ops if op.name == "aten.clone.default"
    ]  # of what comes in, and of nothing else
    assert copy is way.ops[1]
    made = [found[i] for op in way.ops[1:] for i in op.gives()]
    large = [v for v in made if C in v.shape and v.numel() > C * K]
    assert len(large) > 20
    assert all(v.stride(v.shape.index(C)) == 1 for v in large)


def test_it_is_taken_where_rows_are_short():
    tape, trial = taped(rounds)
    values = trial.values(tape)
    way, trouble = fastest(tape, values, trial)
    assert trouble is None
    assert cost(way, trial.values(way)) < 0.7 * cost(tape, values)
    assert any(op.name == "aten.permute.default" for op in way.ops)


def test_a_wrong_turn_is_found(monkeypatch):
    monkeypatch.setattr(columns._Columns, "back", lambda self, it, order: it)
    tape, trial = taped(rounds)
    way, trouble = fastest(tape, trial.values(tape), trial)
    assert trouble is not None
    torch.testing.assert_close(trial.outcome(way.results).results, trial.outcome(tape.results).results)


def test_a_sum_whose_result_lies_otherwise_is_dear():
    rows = torch.randn(C, T, 5, 5, dtype=torch.float64)
    turned = rows.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)

    def price(x):
        tape, _ = recorded_run(lambda x: x.sum(1), Recorder([x], ()))
        return cost(tape, Trial.on(tape, [x]).values(tape))

    assert price(turned) > 2 * price(rows)


def test_what_has_effects_is_not_performed():
    seen = torch.zeros(C, K)

    def fn(x):
        seen.add_(1)
        noise = torch.randn(C, T, dtype=x.dtype)
        return rounds(x + noise) + seen.sum()

    tape, trial = taped(fn)
    values, before, state = trial.values(tape), seen.clone(), torch.get_rng_state()
    guarded = guarded_in(tape, values)
    assert columned(tape, values, guarded) is not None
    assert torch.equal(seen, before)
    assert torch.equal(torch.get_rng_state(), state)
