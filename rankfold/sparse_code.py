"""Codes times a dictionary: each row of W is a combination of a few atoms of its own choice.

    W[:, block b] = C_b D_b     D_b (atoms, width) dense, C_b (out, atoms) with `nonzeros` entries a row

A low-rank matrix lies in one subspace; here every row may lie in another, so the same bytes reach further.
One block and a dictionary learned in the activation metric is CoSpaDi; blocks of 64 columns are DSFormer.
Places take a bit mask or bit-packed indices in memory and on disk, so that the file has the bytes that the
sizes say; nothing multiplies the codes as a dense matrix unless `codes.path` says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.codes import Codes, factored, path_of, per_block
from rankfold.packing import bytes_for, pack_14, pack_support, packing_for, support_bytes, unpack_14
from rankfold.structure import Structure, check_size

STORAGES = ("float", "bf14", "int8")


class SparseCode(Structure, kind="sparse_code"):
    """W = codes dictionary, block by block. [CoSpaDi, ROCKET, COMPOT, DSFormer]

    dictionary  (blocks, atoms, width), a parameter; layers of a group may share it
    values      (rows, blocks, nonzeros), a parameter: the entries of the codes by ascending place
    support     flat uint8 buffer: which places are taken, as a bit mask or as bit-packed indices, whichever
                is the smaller (`rankfold.packing`)

    orient   "in": the blocks divide the input side, rows = out, width = in / blocks. "out": the same for Wᵀ,
             rows = in, width = out / blocks
    storage  "float": values in the structure's dtype. "bf14": `packed`, 14-bit floats in a flat uint8 buffer.
             "int8": `quantized` (rows, blocks, nonzeros) int8 and `scale` (rows, 1, 1). The last two are
             final: their values do not train, the dictionary does
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        atoms: int,
        nonzeros: int,
        blocks: int = 1,
        orient: str = "in",
        storage: str = "float",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(shape)
        if orient not in ("in", "out") or storage not in STORAGES:
            raise ValueError(
                f"sparse code: orient={orient!r} must be 'in' or 'out', storage={storage!r} one of {STORAGES}"
            )
        self.orient, self.storage = orient, storage
        rows, across = self.shape if orient == "in" else (self.shape[1], self.shape[0])
        where = f"sparse code of shape {self.shape}"
        self.blocks = check_size(f"{where}: blocks", blocks, across)
        if across % self.blocks:
            raise ValueError(f"{where}: {across} columns do not divide into blocks={blocks} equal blocks")
        self.code_rows, self.width = rows, across // self.blocks
        self.atoms = check_size(f"{where}: atoms", atoms, max(rows, self.width))
        self.nonzeros = check_size(f"{where}: nonzeros of atoms={atoms}", nonzeros, self.atoms)
        self.packing = packing_for(self.atoms, self.nonzeros)

        options: Any = {"dtype": dtype, "device": device}
        self.dictionary = nn.Parameter(torch.empty(self.blocks, self.atoms, self.width, **options))
        count, size = rows * self.blocks * self.nonzeros, (rows, self.blocks, self.nonzeros)
        if storage == "float":
            self.values = nn.Parameter(torch.empty(size, **options))
        elif storage == "bf14":
            self.packed: Tensor
            self.register_buffer(
                "packed", torch.zeros(bytes_for(14 * count), dtype=torch.uint8, device=device)
            )
        else:
            self.quantized: Tensor
            self.scale: Tensor
            self.register_buffer("quantized", torch.zeros(size, dtype=torch.int8, device=device))
            self.register_buffer("scale", torch.ones(rows, 1, 1, **options))
        self.support: Tensor
        taken = support_bytes(self.packing, rows * self.blocks, self.atoms, self.nonzeros)
        self.register_buffer("support", torch.empty(taken, dtype=torch.uint8, device=device))
        self._plan: Codes | None = None  # derived from the support and the stored values; never saved
        if not self.support.is_meta:
            self._reset()

    def _reset(self) -> None:
        """Random numbers at the first places, as a fresh layer has them."""
        nn.init.normal_(self.dictionary, std=self.width**-0.5)
        if self.storage == "float":
            nn.init.normal_(self.values, std=self.nonzeros**-0.5)
        first = torch.arange(self.nonzeros, device=self.support.device).expand(
            self.code_rows * self.blocks, -1
        )
        self.support.copy_(pack_support(self.packing, first, self.atoms))

    @classmethod
    def of(
        cls,
        dictionary: Tensor,
        values: Tensor,
        index: Tensor,
        *,
        orient: str = "in",
        storage: str = "float",
    ) -> SparseCode:
        """From a dictionary (blocks, atoms, width) and values and index (rows, blocks, nonzeros), an index
        being that of an atom within its block, in any order but each at most once. The dictionary's dtype is
        the structure's. Raises ValueError for indices out of range or twice in a row, and for values that
        are not finite where they are to be packed."""
        rows, blocks, nonzeros = index.shape
        if dictionary.shape[0] != blocks or values.shape != index.shape:
            raise ValueError(
                f"a dictionary {tuple(dictionary.shape)} does not fit values {tuple(values.shape)} and "
                f"index {tuple(index.shape)}"
            )
        index, order = index.long().sort(-1)
        atoms, width = dictionary.shape[1:]
        twice = nonzeros > 1 and bool((index[..., 1:] == index[..., :-1]).any())
        if twice or int(index.min()) < 0 or int(index.max()) >= atoms:
            raise ValueError(
                f"indices lie between {int(index.min())} and {int(index.max())} for {atoms} atoms"
                + (", and a row takes one of them twice" if twice else "")
            )
        side = (rows, blocks * width)
        structure = cls(
            side if orient == "in" else (side[1], side[0]),
            atoms=atoms,
            nonzeros=nonzeros,
            blocks=blocks,
            orient=orient,
            storage=storage,
            dtype=dictionary.dtype,
            device="meta",
        )
        structure.dictionary = (
            dictionary if isinstance(dictionary, nn.Parameter) else nn.Parameter(dictionary.contiguous())
        )
        structure.support = pack_support(structure.packing, index.reshape(rows * blocks, -1), atoms)
        structure._store(values.gather(-1, order))
        return structure

    def _store(self, values: Tensor) -> None:
        """Keep values (rows, blocks, nonzeros) in the form that `storage` names."""
        if self.storage == "float":
            self.values = nn.Parameter(values.to(self.dictionary.dtype).contiguous())
        elif self.storage == "bf14":
            self.packed = pack_14(values)
        else:
            if not bool(torch.isfinite(values).all()):
                raise ValueError("int8 storage needs finite values")
            largest = values.detach().abs().amax((1, 2), keepdim=True)
            self.scale = (largest / 127).to(self.dictionary.dtype).clamp_min(1e-30).contiguous()
            steps = (values.detach().double() / self.scale.double()).round().clamp(-127, 127)
            self.quantized = steps.to(torch.int8).contiguous()
        self._plan = None

    def with_storage(self, storage: str) -> SparseCode:
        """The same codes with their values stored as "float", "bf14" or "int8"; shares the dictionary."""
        with torch.no_grad():
            return SparseCode.of(
                self.dictionary, self.coefficients(), self.index(), orient=self.orient, storage=storage
            )

    def coefficients(self) -> Tensor:
        """The entries of the codes (rows, blocks, nonzeros) in the structure's dtype, by ascending place."""
        if self.storage == "float":
            return self.values
        if self.storage == "int8":
            return self.quantized.to(self.dtype) * self.scale.to(self.dtype)
        size = (self.code_rows, self.blocks, self.nonzeros)
        return unpack_14(self.packed, math.prod(size)).view(size).to(self.dtype)

    def index(self) -> Tensor:
        """The places (rows, blocks, nonzeros) int32 that the support stores: atoms of the row's block.

        Raises ValueError where the support is damaged.
        """
        flat = self.codes().index()
        offsets = self.atoms * torch.arange(self.blocks, dtype=flat.dtype, device=flat.device)
        return flat.view(self.code_rows, self.blocks, self.nonzeros) - offsets[:, None]

    def codes(self) -> Codes:
        """What the products need (`rankfold.codes`). Raises ValueError where the support is damaged."""
        plan = self._plan
        if plan is None:
            plan = self._plan = Codes(
                rows=self.code_rows,
                blocks=self.blocks,
                atoms=self.atoms,
                nonzeros=self.nonzeros,
                packing=self.packing,
                support=self.support,
                values=None if self.storage == "float" else self.coefficients().flatten(1).detach(),
            )
        return plan if self.storage != "float" else plan.with_values(self.values.flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return factored(x, self.dictionary, self.codes(), self.orient)

    def rows(self, index: Tensor) -> Tensor:
        if self.orient == "out":
            turned = per_block(self.codes().dense(), self.dictionary)
            return nn.functional.embedding(index, turned.mT)
        return per_block(self.codes().dense(index), self.dictionary)

    @property
    def macs(self) -> int:
        return self.blocks * (self.atoms * self.width + self.code_rows * self.nonzeros)

    def sizes(self) -> dict[str, Any]:
        return {
            "atoms": self.atoms,
            "nonzeros": self.nonzeros,
            "blocks": self.blocks,
            "orient": self.orient,
            "storage": self.storage,
        }

    @property
    def dtype(self) -> torch.dtype:
        return self.dictionary.dtype

    def validate(self) -> None:
        self._plan = None
        self.codes().index()
        self.coefficients()

    def split(self, rows: Sequence[int]) -> list[Structure]:
        if self.orient == "out":
            raise ValueError("codes with orient='out' do not split by rows: each atom spans several outputs")
        pieces = zip(self.coefficients().split(list(rows)), self.index().split(list(rows)), strict=True)
        with torch.no_grad():
            return [
                SparseCode.of(self.dictionary, values, index, storage=self.storage)
                for values, index in pieces
            ]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        self._plan = None  # it holds tensors of the old device and dtype
        return super()._apply(fn, recurse)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *others: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *others)
        self._plan = None
        missing_keys, _, error_msgs = others
        if not self.support.is_meta and not error_msgs and not missing_keys:
            try:
                self.validate()
            except ValueError as error:
                error_msgs.append(f"{prefix.rstrip('.')}: {error}")


def how_applied(model: nn.Module) -> list[str]:
    """How the model's sparse codes are multiplied, in words: for one token at a time, and for 512 at once."""
    held = [module for module in model.modules() if isinstance(module, SparseCode)]
    found = {
        tokens: sorted({path_of(one.codes(), tokens, dtype=one.dtype) for one in held}) for tokens in (1, 512)
    }
    return [
        f"sparse codes, {'one token' if tokens == 1 else f'{tokens} tokens'} at a time: {'; '.join(paths)}"
        for tokens, paths in found.items()
        if paths
    ]
