"""A model's layers on their way into straight-through training: structures become masters, in place.

What a Trainer saves on the way is a model in training and says so (`draft_`); what it saves after `finish_`
is an ordinary factorized model.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from rankfold.hosts import hosts
from rankfold.manifest import recipe_of, stamp_, unstamp_
from rankfold.masters import CodeMaster, Master, WeightMaster
from rankfold.method import Method, Size
from rankfold.methods.dictionary import least_squares
from rankfold.pursuit import omp
from rankfold.sparse_code import SparseCode
from rankfold.structure import Structure


def masters_of(model: nn.Module, reading: str, dense: Mapping[str, Tensor]) -> dict[str, Master]:
    """The master of every host's structure: {layer: master}. Layers that share a structure share the
    master. `dense` gives by layer the weight (out, in) that the structure stands for, where it is known.

    Raises ValueError where there is no host, for a layer that cannot train so, and for a weight that is not
    finite or of another shape.
    """
    made: dict[int, Master] = {}
    masters: dict[str, Master] = {}
    for name, host in hosts(model).items():
        held = host.weight
        weight = dense.get(name)
        if weight is not None and (tuple(weight.shape) != held.shape or not bool(weight.isfinite().all())):
            raise ValueError(
                f"layer {name!r}: the dense weight must be finite and of shape {held.shape}; got "
                f"{tuple(weight.shape)}"
            )
        if id(held) not in made:
            made[id(held)] = master_of(name, held, reading, weight)
        masters[name] = made[id(held)]
    if not masters:
        raise ValueError(
            "the model has no factorized layer to train: factorize it first, e.g. with recipes.dsformer, or "
            "call start_(model, budget=...), the share of the bytes that is kept"
        )
    return masters


def master_of(name: str, held: Structure, reading: str, dense: Tensor | None = None) -> Master:
    """The master of one structure; a master stays as it is. Raises ValueError naming the layer."""
    wanted = CodeMaster if reading == "coefficient" else WeightMaster
    if isinstance(held, Master):
        if not isinstance(held, wanted):
            raise ValueError(
                f"layer {name!r} was trained in the other reading (it is a {held.kind}); go on in that one"
            )
        return held
    if held.dtype.itemsize < 4:
        raise ValueError(
            f"layer {name!r} is {held.dtype}: a training step is lost in its rounding. Load the model in "
            "float32, and train under autocast where 16 bits are wanted"
        )
    if reading == "weight":
        return WeightMaster.of(held.to_dense() if dense is None else dense, held)
    if not isinstance(held, SparseCode):
        raise ValueError(
            f"layer {name!r} is of kind {held.kind!r}, but the coefficient reading trains sparse codes; use "
            "reading='weight', or factorize with recipes.dsformer"
        )
    if held.storage != "float":
        raise ValueError(
            f"layer {name!r} stores its values as {held.storage!r}, which do not train; train "
            "storage='float', and pack the values afterwards (SparseCode.with_storage)"
        )
    return CodeMaster.of(held, dense)


def size_of(method: Method, name: str, structure: Structure) -> Size:
    """The size on the method's menu that a structure has. Raises ValueError where it is not there."""
    spec = structure.spec()
    for size in method.menu(structure.shape):
        if method.empty(structure.shape, size).spec() == spec:
            return size
    raise ValueError(f"layer {name!r}: {spec} is not among the sizes that {method} offers")


def coded_again(code: SparseCode, weight: Tensor) -> SparseCode:
    """A sparse code of `weight` (out, in) from that of a weight nearby: one pursuit with its dictionary, one
    least-squares dictionary. In the plain metric: another one enters at the start, then the task speaks."""
    matrix = weight if code.orient == "in" else weight.mT
    target = matrix.reshape(len(matrix), code.blocks, -1).transpose(0, 1).contiguous()
    found = omp(target, code.dictionary.detach(), code.nonzeros)
    atoms = least_squares(target.double(), found.values.double(), found.index, code.atoms)
    return SparseCode.of(
        atoms.to(weight.dtype),
        found.values.transpose(0, 1),
        found.index.transpose(0, 1),
        orient=code.orient,
        storage=code.storage,
    )


def draft_(model: nn.Module) -> None:
    """Let a transformers model say that it holds masters, in the checkpoints that a Trainer writes: opened as
    a model, they are one in training, never one with random layers."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "save_pretrained"):
        return
    recipe = recipe_of(model)
    unstamp_(model)
    masters = [host.weight for host in hosts(model).values() if isinstance(host.weight, Master)]
    for master in masters:
        master.draft = True
    stamp_(model, recipe)
    for master in masters:
        master.draft = False
