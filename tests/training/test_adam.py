"""Our Adam is torch's."""

import pytest
import torch

from pgen.training.adam import Adam
from pgen.training.optimizers import make_optimizer


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_gives_what_the_fused_adam_of_torch_gives(decoupled, dtype):
    source = torch.Generator().manual_seed(0)
    mine = [torch.randn(5, 3, generator=source, dtype=dtype), torch.randn(7, generator=source, dtype=dtype)]
    theirs = [t.clone() for t in mine]
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    other = kind(theirs, lr=0.01, weight_decay=0.1, fused=True)
    adam = Adam(mine, 0.01, 0.1, decoupled)
    for step in range(20):
        found = [torch.randn(t.shape, generator=source, dtype=dtype) for t in mine]
        if step % 3 == 0:
            found[1] = None
        for tensor, gradient in zip(theirs, found, strict=True):
            tensor.grad = gradient
        other.step()
        adam.step(found)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    twin = kind([t.clone() for t in mine], lr=0.01, weight_decay=0.1, fused=True)
    saved = {**other.state_dict(), "state": adam.state_dict()["state"]}
    twin.load_state_dict(saved)  # the layouts are the same
    again = Adam([t.clone() for t in mine], 0.01, 0.1, decoupled)
    again.load_state_dict(other.state_dict())
    found = [torch.randn(t.shape, generator=source, dtype=dtype) for t in mine]
    again.step(found)
    adam.step(found)
    assert all(torch.equal(a, b) for a, b in zip(mine, again.tensors, strict=True))


def test_the_default_weight_decay_is_that_of_torch():
    x = [torch.zeros(1)]
    for name, kind in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        (group,) = make_optimizer(name, x).param_groups
        assert group["weight_decay"] == kind(x).param_groups[0]["weight_decay"]


def test_a_state_of_another_shape_is_refused():
    adam, other = Adam([torch.zeros(3)], 0.1), Adam([torch.zeros(4)], 0.1)
    with pytest.raises(
        ValueError, match=r"'exp_avg' of a tensor of shape \(3,\): expected shape \(3,\), found \(4,\)"
    ):
        adam.load_state_dict(other.state_dict())
