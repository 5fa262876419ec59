"""An adapter on a grid of tokens, in the wavelet domain of the image: the second reading of WaRA.

    y = host(x) + s · IDWT( B φ(A C_s) for every band s of C = DWT(x over the grid's rows and columns) )

One pair of factors (A, B) serves all bands. Linear, with all bands and no scales, the transform cancels,
IDWT(B A DWT(x)) = B A x: plain LoRA on the grid's tokens. What makes it more is φ (GELU), a scale for each
band, or leaving bands out; and then it cannot be merged into a weight. [arXiv 2506.24092, v2]
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rankfold.layers import replace_
from rankfold.wavelet_transform import analyze2, check_levels, filters, names, synthesize2

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, None: nn.Identity}


class TokenWara(nn.Module):
    """A layer on tokens (batch, tokens, features), frozen, and an adapter beside it.

    host        any module with `in_features` and `out_features` from (B, N, in) to (B, N, out)
    rank, alpha the factors are (rank, in) and (out, rank), times alpha / rank (alpha None: 1)
    leading     tokens before the grid (a class token, registers): they pass, and get nothing added
    grid        (rows, columns) of the other tokens; None: square, of whatever size comes. May be set anew
                between calls
    activation  φ between the factors: "gelu", "relu" or None
    bands       the bands that are adapted, by name ("LL1", …: first letter rows); None: all
    scales      a trained factor for each band, 1 at the start
    seed        of A; B is zero, so that outputs start as they were

    Raises ValueError for options that do not fit; UserWarning where they make it plain LoRA.
    """

    def __init__(
        self,
        host: nn.Module,
        rank: int,
        alpha: float | None = None,
        *,
        wavelet: str = "db1",
        levels: int = 1,
        leading: int = 1,
        grid: tuple[int, int] | None = None,
        activation: str | None = "gelu",
        bands: Sequence[str] | None = None,
        scales: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        inner, out = getattr(host, "in_features", None), getattr(host, "out_features", None)
        if not isinstance(inner, int) or not isinstance(out, int):
            raise ValueError(f"TokenWara: {type(host).__name__} has no in_features and out_features")
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= min(inner, out):
            raise ValueError(f"TokenWara(rank={rank!r}): 1 to {min(inner, out)} for a layer {(out, inner)}")
        if alpha is not None and not (alpha > 0 and math.isfinite(alpha)):
            raise ValueError(f"TokenWara(alpha={alpha!r}): a number above 0; None: scale 1")
        if activation not in ACTIVATIONS:
            raise ValueError(f"TokenWara(activation={activation!r}): choose one of 'gelu', 'relu', None")
        if not isinstance(levels, int) or isinstance(levels, bool) or levels < 1:
            raise ValueError(f"TokenWara(levels={levels!r}): an integer of at least 1")
        if not isinstance(leading, int) or isinstance(leading, bool) or leading < 0:
            raise ValueError(f"TokenWara(leading={leading!r}): the number of tokens before the grid")
        self.active = tuple(names(levels) if bands is None else bands)
        unknown = [band for band in self.active if band not in names(levels)]
        if unknown or not self.active or len(set(self.active)) < len(self.active):
            raise ValueError(f"TokenWara(bands={bands!r}): each once, out of {', '.join(names(levels))}")
        if activation is None and not scales and len(self.active) == len(names(levels)):
            warnings.warn(
                "TokenWara without activation, with all bands and no scales: the transform cancels, this is "
                "plain LoRA on the grid's tokens (recipes.lora, which can be merged)",
                stacklevel=2,
            )
        self.taps, self.levels, self.leading, self.grid = filters(wavelet), levels, leading, grid
        self.scale = 1.0 if alpha is None else alpha / rank
        self.host = host.requires_grad_(False)
        like = next(host.parameters())
        place = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
        random = torch.Generator().manual_seed(seed)
        drawn = torch.rand(rank, inner, generator=random).mul_(2).sub_(1).mul_(inner**-0.5)
        self.right = nn.Parameter(drawn.to(**place))
        self.left = nn.Parameter(torch.zeros(out, rank, **place))
        self.activation = ACTIVATIONS[activation]()
        self.scales = nn.Parameter(torch.ones(len(self.active), **place)) if scales else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, leading + rows·columns, in) to (B, …, out). Raises ValueError for other numbers of tokens."""
        y = self.host(x)
        rows, columns = self._sides(x)
        tokens = x[:, self.leading :].to(self.right.dtype)
        image = tokens.mT.unflatten(-1, (rows, columns))  # (B, in, rows, columns)
        bands = analyze2(image, self.taps, self.levels)
        adapted = {}
        for place, name in enumerate(self.active):
            inside = self.activation(bands[name].movedim(1, -1) @ self.right.mT)
            band = (inside @ self.left.mT).to(tokens.dtype)
            adapted[name] = (band if self.scales is None else band * self.scales[place]).movedim(-1, 1)
        image = synthesize2(adapted, self.taps, self.levels, (rows, columns))
        update = (image.flatten(2).mT * self.scale).to(y.dtype)
        return torch.cat([y[:, : self.leading], y[:, self.leading :] + update], 1)

    def _sides(self, x: Tensor) -> tuple[int, int]:
        if x.dim() != 3:
            raise ValueError(f"TokenWara takes (batch, tokens, features); got {tuple(x.shape)}")
        count = x.shape[1] - self.leading
        if self.grid is None:
            side = math.isqrt(max(count, 0))
            grid, how = (side, side), f"{count} tokens are no square; set grid=(rows, columns)"
        else:
            grid, how = self.grid, f"grid={self.grid} has {self.grid[0] * self.grid[1]} tokens, not {count}"
        if count < 1 or grid[0] * grid[1] != count:
            raise ValueError(f"TokenWara: {x.shape[1]} tokens, {self.leading} of them before the grid: {how}")
        check_levels(self.levels, grid)
        return grid

    def extra_repr(self) -> str:
        return (
            f"rank={self.left.shape[1]}, wavelet={self.taps.name}, bands={self.active}, scale={self.scale:g}"
        )


def token_wara_(
    model: nn.Module, layers: Sequence[str], rank: int, alpha: float | None = None, **options: object
) -> dict[str, TokenWara]:
    """Freeze `model` and put a TokenWara around each of the named layers, in place; returns them by name.

    `options` are those of `TokenWara`; `seed` is drawn on by each layer's name. Raises ValueError as that
    does, naming the layer; the model is then as it was.
    """
    seed, made = options.pop("seed", 0), {}
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        for name in layers:
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            own: dict = {**options, "seed": int.from_bytes(digest[:7], "big")}
            made[name] = TokenWara(model.get_submodule(name), rank, alpha, **own)
    except (ValueError, AttributeError) as error:
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(trains[key])
        raise ValueError(f"layer {name!r}: {error}") from error
    model.requires_grad_(False)
    for name, module in made.items():
        replace_(model, name, module)
    return made
