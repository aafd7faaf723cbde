"""Which discrete elements each term of a program's density depends on, read off one run of the program.

Every element is marked, and the marks are followed through the program (`Provenance`): what a term has no mark of, it does
not depend on. With more than a few hundred elements a mark is not that of an element, but of all whose index leaves one
remainder; three moduli together leave hardly more elements to a term than there are.

What was read is tried: a change of some elements must leave all other terms as they are. If it does not, or if a value left
torch on its way, every term is taken to depend on everything, which is slow and right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pgen.backends.mcmc.flips import Flips
from pgen.density import Density
from pgen.isolation import validating
from pgen.provenance import Marks, Provenance

_FEW = 400  # elements of a site that are marked one by one
_MODULI = (127, 131, 137)
_CHUNK = 20_000_000  # numbers in one table
_TRIED = 6  # groups


@dataclass(frozen=True)
class Blankets:
    """Terms of a density, added up where they depend on the same elements.

    Attributes:
        sites: whose terms depend on any element; the others are constant.
        place: `[n]`; for every element of these terms, which sum it goes to.
        scopes: for every sum, the elements that it depends on.
    """

    sites: tuple[str, ...]
    place: Tensor
    scopes: tuple[tuple[int, ...], ...]

    def summed(self, terms: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """The sums `[T]` of the terms of one vector."""
        flat = torch.cat([terms[site].reshape(-1) for site in self.sites]).to(like.dtype)
        # A sum that depends on nothing, the last one, is dropped.
        return like.new_zeros(len(self.scopes) + 1).index_add(0, self.place, flat)[:-1]


def blankets(density: Density, flips: Flips, q: Tensor, z: Tensor) -> Blankets:
    """The terms of a density with held latents.

    Args:
        density: of the program.
        flips: its held latents.
        q: a vector, `[d]`.
        z: indices of the held latents, `[C, m]`: the program is followed at the first; changes are tried from one row to
            another.
    """
    device = z.device
    values = flips.values(z[0])
    provenance = Provenance()
    with validating(False), torch.no_grad():
        for name, value in values.items():
            values[name] = value = value.clone()
            provenance.write(value, _marks(name, flips.shapes[name], value))
        with provenance:
            terms = density.terms(q.to(density.dtype), values)
    known = {site: provenance.read(term) for site, term in terms.items()}
    sizes = {site: term.numel() for site, term in terms.items()}
    everything = _everything(sizes, z.shape[1], device)
    if provenance.leaks or density.finite:
        return everything
    found = _grouped(known, {s: t.shape for s, t in terms.items()}, flips, device)
    return found if _holds(found, density, flips, q, z) else everything


def _everything(sizes: Mapping[str, int], count: int, device: torch.device) -> Blankets:
    place = torch.zeros(sum(sizes.values()), dtype=torch.long, device=device)
    return Blankets(tuple(sizes), place, (tuple(range(count)),))


# --- marks ---


def _moduli(count: int) -> tuple[int, ...]:
    return (count,) if count <= _FEW else _MODULI


def _marks(name: str, shape: torch.Size, value: Tensor) -> Marks:
    """A mark for each remainder of an element's index, by each modulus."""
    index = torch.arange(shape.numel(), device=value.device)
    index = index.reshape((*shape, *[1] * (value.dim() - len(shape))))
    return {
        f"{name}|{modulus}|{remainder}": (index % modulus == remainder).expand(value.shape)
        for modulus in _moduli(shape.numel())
        for remainder in range(min(modulus, shape.numel()))
    }


def _grouped(
    known: Mapping[str, Marks], shapes: Mapping[str, torch.Size], flips: Flips, device: torch.device
) -> Blankets:
    """Terms of all sites, by the set of elements that they depend on."""
    sites = tuple(site for site, marks in known.items() if marks)
    count = sum(flips.sizes.values())
    # A random code for each set: equal codes mean, but for a chance of 2^-63 a pair, equal sets.
    hashes = torch.randint(2**62, (count,), device=device) * 2 + 1
    codes: list[Tensor] = []
    scopes: dict[int, tuple[int, ...]] = {}
    for site in sites:
        n = shapes[site].numel()
        step = max(1, _CHUNK // max(1, count))
        for start in range(0, n, step):
            rows = slice(start, min(n, start + step))
            depends = torch.cat(
                [
                    _depends(known[site], name, size, shapes[site], rows, device)
                    for name, size in flips.sizes.items()
                ],
                1,
            )
            code = (depends * hashes).sum(1)
            codes.append(code)
            new, first = _firsts(code)
            for key, row in zip(new.tolist(), first.tolist(), strict=True):
                if key not in scopes:
                    scopes[key] = tuple(depends[row].nonzero()[:, 0].tolist())
    kept = [key for key, scope in scopes.items() if scope]
    everywhere = {key: i for i, key in enumerate(kept)}
    code = torch.cat(codes) if codes else torch.zeros(0, dtype=torch.long, device=device)
    order, back = code.unique(return_inverse=True)
    lookup = torch.tensor(
        [everywhere.get(key, len(kept)) for key in order.tolist()], dtype=torch.long, device=device
    )
    return Blankets(sites, lookup[back] if len(code) else code, tuple(scopes[key] for key in kept))


def _depends(
    marks: Marks, name: str, size: int, shape: torch.Size, rows: slice, device: torch.device
) -> Tensor:
    """Whether the terms in `rows` may depend on each element of a site, `[rows, size]`."""
    every = torch.arange(size, device=device)
    found = torch.ones(rows.stop - rows.start, size, dtype=torch.bool, device=device)
    for modulus in _moduli(size):
        table = torch.zeros(rows.stop - rows.start, min(modulus, size), dtype=torch.bool, device=device)
        for remainder in range(table.shape[1]):
            mark = marks.get(f"{name}|{modulus}|{remainder}", False)
            if isinstance(mark, Tensor):
                table[:, remainder] = mark.expand(shape).reshape(-1)[rows]
            elif mark:
                table[:, remainder] = True
        found &= table[:, every % modulus]
    return found


def _firsts(code: Tensor) -> tuple[Tensor, Tensor]:
    """The different codes, and a place where each is found."""
    new, back = code.unique(return_inverse=True)
    place = torch.zeros_like(new).scatter_(0, back, torch.arange(len(code), device=code.device))
    return new, place


# --- trying what was read ---


def _holds(found: Blankets, density: Density, flips: Flips, q: Tensor, z: Tensor) -> bool:
    """Whether a change of some elements leaves alone every term that is said not to depend on them."""
    if not found.scopes:
        return True
    count = z.shape[1]
    with validating(False), torch.no_grad():

        def at(row: Tensor) -> Tensor:
            return found.summed(density.terms(q.to(density.dtype), flips.values(row)), q)

        for start in range(min(_TRIED, count)):
            changed = torch.arange(count, device=z.device) % _TRIED == start
            one, other = z[0], torch.where(changed, z[-1], z[0])
            within = {int(i) for i in changed.nonzero()[:, 0]}
            alone = torch.tensor([within.isdisjoint(scope) for scope in found.scopes], device=z.device)
            if not torch.allclose(at(one)[alone], at(other)[alone], rtol=1e-5, atol=1e-5, equal_nan=True):
                return False
    return True
