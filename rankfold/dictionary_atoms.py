"""Atoms of a dictionary: where they start, and how they move while the supports of the codes stay.

Starts: the leading eigenvectors of YᵀY, or rows of Y. Steps, none of which raises ‖Y − S D‖²: least squares
for all atoms at once (`mod`), one atom and its codes after the other (`ksvd_`), the best orthonormal
dictionary (`procrustes`).

Shapes: Y and the residual E = Y − S D (..., rows, in), D (..., atoms, in), S (..., rows, atoms) dense with
zeros; leading dimensions are independent problems. Eigenvectors and small solves in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankfold.metric import symmetric_eigen
from rankfold.pursuit import Codes

FULL_RANK = 1e-10  # smallest eigenvalue of M Mᵀ, relative to the largest, that is not rounding
RIDGE = 1e-6  # of an atom's own code energy, towards the dictionary as it was


def eigenvectors(target: Tensor, atoms: int) -> Tensor:
    """The `atoms` leading eigenvectors of YᵀY as orthonormal rows (..., atoms, in), atoms <= min(rows, in).

    From the Gram of the smaller side; where Y has no further direction, any that completes the basis.
    """
    rows, inner = target.shape[-2:]
    assert atoms <= min(rows, inner), (atoms, rows, inner)
    matrix = target.double()
    if rows < inner:
        vectors = symmetric_eigen(matrix @ matrix.mT)[1]
        leading = matrix.mT @ vectors[..., -atoms:].flip(-1)  # orthogonal columns, to be normalised
        leading = torch.linalg.qr(leading / matrix.abs().amax((-2, -1), keepdim=True).clamp_min(1e-300)).Q
    else:
        leading = symmetric_eigen(matrix.mT @ matrix)[1][..., -atoms:].flip(-1)
    return leading.mT.to(target.dtype).contiguous()


def sampled_rows(target: Tensor, atoms: int, seed: int) -> Tensor:
    """`atoms` rows of Y at unit length, drawn without replacement, the same rows in every problem. A zero row
    gives a random direction."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(target.shape[-2], generator=generator)[:atoms].to(target.device)
    drawn = target[..., chosen, :]
    spare = torch.randn(drawn.shape, generator=generator, dtype=torch.float64).to(drawn)
    drawn = torch.where(drawn.any(-1, keepdim=True), drawn, spare)
    drawn = drawn / drawn.abs().amax(-1, keepdim=True)
    return drawn / drawn.norm(dim=-1, keepdim=True)


def resized(target: Tensor, dictionary: Tensor, codes: Codes, atoms: int) -> tuple[Tensor, Tensor]:
    """A dictionary (..., atoms, in) and its dense codes made from ones of another size: the atoms of least
    energy in the codes go, eigenvectors of the residual come."""
    had, full = dictionary.shape[-2], codes.dense(dictionary.shape[-2])
    if atoms < had:
        kept = full.square().sum(-2).topk(atoms, dim=-1).indices.sort(dim=-1).values[..., None, :]
        full = full.gather(-1, kept.expand(*full.shape[:-1], atoms))
        dictionary = dictionary.gather(
            -2, kept.mT.expand(*dictionary.shape[:-2], atoms, dictionary.shape[-1])
        )
    elif atoms > had:
        more = min(atoms - had, *target.shape[-2:])
        new = [dictionary, eigenvectors(target - full @ dictionary, more)]
        if had + more < atoms:
            new.append(sampled_rows(target, atoms - had - more, seed=0))
        dictionary = torch.cat(new, dim=-2)
        full = torch.nn.functional.pad(full, (0, atoms - had))
    return dictionary, full


def mod(dictionary: Tensor, codes: Tensor, residual: Tensor, *, relaxation: float = 1.0) -> Tensor:
    """The least-squares dictionary (..., atoms, in) for fixed codes: D + relaxation · (SᵀS + ridge)⁻¹ Sᵀ E.

    The ridge, relative to each atom's own energy in the codes, pulls towards D, not towards zero: the error
    never rises for a relaxation below 2, and an atom that nobody uses stays. Solved in float64. [MOD, Engan
    et al. 1999]
    """
    square = (codes.mT @ codes).double()
    energy = square.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(energy > 0, energy.clamp_min(torch.finfo(torch.float64).tiny).rsqrt(), 0.0)[..., None]
    square = square * scale * scale.mT
    square.diagonal(dim1=-2, dim2=-1).add_(RIDGE + (scale[..., 0] == 0))
    factor, failed = torch.linalg.cholesky_ex(square)
    if failed.any():  # rounding of a float32 product: a ridge at its level decides
        square.diagonal(dim1=-2, dim2=-1).add_(1e3 * RIDGE)
        factor = torch.linalg.cholesky(square)
    change = torch.cholesky_solve((codes.mT @ residual).double() * scale, factor) * scale
    return dictionary + relaxation * change.to(dictionary.dtype)


def ksvd_(dictionary: Tensor, codes: Tensor, residual: Tensor, power_iterations: int = 8) -> None:
    """One K-SVD sweep over the atoms, in place. Supports stay; the residual stays Y − S D; the error never
    rises.

    Atom by atom, with R = E + s d on the rows that use it: the leading right singular vector of R by power
    iterations from d, and its codes. An atom that nobody uses becomes the worst-coded row. [CoSpaDi,
    algorithm 1]
    """
    lead = dictionary.shape[:-2]
    d, s, e = (x.reshape(-1, *x.shape[-2:]) for x in (dictionary, codes, residual))
    assert d.data_ptr() == dictionary.data_ptr() and lead.numel() == len(d)
    used = (s != 0).mT  # (problems, atoms, rows)
    counts = used.sum(-1)
    order = used.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    order += torch.arange(len(d), device=s.device)[:, None, None] * s.shape[1]  # rows of all problems in one
    flat, columns = e.reshape(-1, e.shape[-1]), s.reshape(-1, s.shape[-1])
    assert flat.data_ptr() == residual.data_ptr() and columns.data_ptr() == codes.data_ptr()
    seeded = torch.zeros(s.shape[:2], dtype=torch.bool, device=s.device)
    for atom, (least, most) in enumerate(zip(counts.amin(0).tolist(), counts.amax(0).tolist(), strict=True)):
        if most:
            rows = order[:, atom, :most].reshape(-1)
            old = flat[rows].view(len(d), most, -1)
            code = columns[rows, atom].view(len(d), most, 1)
            mine = old + code * d[:, atom, None]
            valid = None
            if least < most:  # problems differ: filled up with rows that do not use the atom, and stay
                valid = (torch.arange(most, device=s.device) < counts[:, atom, None])[..., None]
                mine = mine * valid
            new = d[:, atom]
            for _ in range(power_iterations):
                turned, norm = _unit(_times(mine.mT, _times(mine, new)))
                new = torch.where(norm > 0, turned, new)
            values = _times(mine, new)[..., None]
            rest = mine - values * new[:, None]
            if valid is not None:
                values, rest = torch.where(valid, values, code), torch.where(valid, rest, old)
            flat[rows] = rest.view(len(rows), -1)
            columns[rows, atom] = values.view(-1)
            d[:, atom] = new
        if not least:
            _reseed(d, e, counts[:, atom] == 0, atom, seeded)


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """(problems, n, m) times (problems, m); a single problem by the faster matrix-vector product."""
    if len(matrices) == 1:
        return (matrices[0] @ vectors[0])[None]
    return (matrices @ vectors[..., None])[..., 0]


def _reseed(dictionary: Tensor, residual: Tensor, dead: Tensor, atom: int, seeded: Tensor) -> None:
    """In the problems `dead`, atom ← the worst-coded row not used so before, if it has an error at all."""
    size, worst = residual.square().sum(-1).masked_fill(seeded, -1.0).max(-1)
    each = torch.arange(len(dead), device=dead.device)
    candidate, norm = _unit(residual[each, worst])
    taken = dead & (size > 0) & (norm[..., 0] > 0)
    dictionary[:, atom] = torch.where(taken[:, None], candidate, dictionary[:, atom])
    seeded[each, worst] |= taken


def reseeded(dictionary: Tensor, codes: Tensor, residual: Tensor) -> Tensor:
    """The dictionary with every atom that no code uses replaced by a worst-coded row of its problem, at unit
    length: the first such atom by the worst row, and so on."""
    dead = ~(codes != 0).any(-2)  # (..., atoms)
    if not dead.any():
        return dictionary
    order = residual.square().sum(-1).argsort(dim=-1, descending=True)
    turn = (dead.cumsum(-1) - 1).clamp(0, residual.shape[-2] - 1)
    row = order.gather(-1, turn)
    candidate, norm = _unit(residual.gather(-2, row[..., None].expand(*row.shape, residual.shape[-1])))
    return torch.where((dead[..., None] & (norm > 0)), candidate, dictionary)


def _unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors (..., in) at unit length, and their norms (..., 1); zero stays zero."""
    norm = vectors.norm(dim=-1, keepdim=True)
    return vectors / norm.clamp_min(torch.finfo(vectors.dtype).tiny), norm


def procrustes(target: Tensor, codes: Tensor) -> Tensor:
    """The D (..., atoms, in) with orthonormal rows that minimises ‖Y − S D‖: U Vᵀ of M = SᵀY = U Σ Vᵀ,
    atoms <= in. It is (M Mᵀ)^-½ M, which costs a fraction of the decomposition, where M has full rank; one
    Newton-Schulz step takes away what squaring M has cost."""
    product = (codes.mT @ target).double()
    values, vectors = symmetric_eigen(product @ product.mT)
    if bool((values[..., 0] > FULL_RANK * values[..., -1]).all()):
        found = ((vectors * values.rsqrt()[..., None, :]) @ (vectors.mT @ product)).to(target.dtype)
        return 1.5 * found - 0.5 * (found @ found.mT) @ found
    left, _, right = torch.linalg.svd(product, full_matrices=False)
    return (left @ right).to(target.dtype)
