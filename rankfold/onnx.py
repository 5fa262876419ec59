"""Text classifiers and encoders as ONNX files, for any batch and any length.

    input_ids, attention_mask (batch, length)  →  logits (batch, classes), or states (batch, length, d)

What is factorized stays factorized: a layer of rank r is two small products in the file too. The file is
written whole or not at all, and onnxruntime, where it is installed, must agree with the model at other sizes
than those that were traced.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.atomic import writing_file
from rankfold.batches import is_causal

LARGEST = 2**31 - 2**20  # one file is one protobuf message, which ends at 2 GiB
TRACED = (2, 6)  # (batch, length)
CHECKED = ((1, 1), (3, 4), (2, 11))
NOISE = (  # what the exporter and what it calls say of themselves
    (FutureWarning, "_check_is_size will be removed"),
    (FutureWarning, r"`isinstance\(treespec, LeafSpec\)` is deprecated"),
    (UserWarning, "# The axis name: .* will not be used"),
    (DeprecationWarning, ".*"),
)


@dataclass(frozen=True)
class Exported:
    """What was written: the file, its size in bytes, the names of its outputs, and the largest difference
    between onnxruntime and the model (None where it was not checked)."""

    path: Path
    nbytes: int
    outputs: tuple[str, ...]
    difference: float | None


class _Traced(nn.Module):
    """A model as a function of two tensors."""

    def __init__(self, model: nn.Module, attentions: bool) -> None:
        super().__init__()
        self.model, self.attentions = model, attentions

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        asked = {"output_attentions": True} if self.attentions else {}
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, **asked)
        main = out.logits if hasattr(out, "logits") else out.last_hidden_state
        return (main, *out.attentions) if self.attentions else (main,)


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    attentions: bool = False,
    check: bool = True,
    overwrite: bool = False,
) -> Exported:
    """Write `model`, a transformers classifier or encoder of text, as it is in eval mode.

    attentions  also write the pooler's weights (batch, heads, length), for a model that pools
    check       compare with onnxruntime, if it is installed, before the file takes its place
    overwrite   replace a file that exists

    A classifier's `id2label` is in the file's metadata, as JSON. Raises ValueError where the packages of
    `rankfold[onnx]` are missing, for a file that exists, a model of another kind or above 2 GiB, one that
    torch.onnx cannot export, and one whose file computes something else.
    """
    path = check_place(path, overwrite)
    _check_kind(model, attentions)
    longest = _longest(model)
    was = model.training
    traced = _Traced(model, attentions).eval()
    try:
        ids = _ids(*TRACED, model)
        with torch.no_grad():
            main = "logits" if hasattr(model(ids), "logits") else "states"
        names = (main, "attentions") if attentions else (main,)
        program = _program(traced, ids, names, longest)
        labels = getattr(model.config, "id2label", None)
        if main == "logits" and labels:
            program.model.metadata_props["id2label"] = json.dumps(labels)
        with writing_file(path) as beside:
            program.save(beside)
            run = check and importlib.util.find_spec("onnxruntime") is not None
            difference = _compare(traced, beside, longest) if run else None
    finally:
        model.train(was)
    return Exported(path, path.stat().st_size, names, difference)


def check_place(path: str | os.PathLike[str], overwrite: bool) -> Path:
    """`path` as a file that may be written, with the packages that write it. Raises ValueError as
    `export_onnx`."""
    path = Path(path)
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"no package {' and '.join(missing)} here: pip install 'rankfold[onnx]'")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the path of a file, such as model.onnx")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists; pass overwrite=True (--overwrite) or choose another file")
    return path


def _check_kind(model: Any, attentions: bool) -> None:
    from rankfold.models import PooledForSequenceClassification

    name = type(model).__name__
    if getattr(model, "main_input_name", None) != "input_ids" or not hasattr(model, "config"):
        raise ValueError(f"{name} does not read token ids; only transformers models of text are exported")
    if is_causal(model) or model.config.is_encoder_decoder:
        raise ValueError(f"{name} writes text; only classifiers and encoders are exported to ONNX")
    if attentions and not isinstance(model, PooledForSequenceClassification):
        raise ValueError(f"{name} has no pooler, whose weights could be written; leave attentions out")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if size > LARGEST:
        raise ValueError(f"the weights of {name} are {size:,} bytes; one ONNX file holds {LARGEST:,}")


def _longest(model: Any) -> int | None:
    config = getattr(model.config, "encoder", model.config)
    return getattr(config, "max_position_embeddings", None)


def _ids(batch: int, length: int, model: Any) -> Tensor:
    """Ids that every vocabulary has, and two of them that differ."""
    ids = torch.arange(batch * length, device=next(model.parameters()).device) % 7
    return ids.clamp(max=model.get_input_embeddings().num_embeddings - 1).view(batch, length)


def _program(traced: _Traced, ids: Tensor, names: tuple[str, ...], longest: int | None) -> Any:
    batch = torch.export.Dim("batch", min=1, max=2**20)
    length = torch.export.Dim("length", min=1, max=2**20 if longest is None else longest)
    shape = {0: batch, 1: length}
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                traced,
                (ids, torch.ones_like(ids)),
                dynamo=True,
                dynamic_shapes=(shape, shape),
                input_names=["input_ids", "attention_mask"],
                output_names=list(names),
                custom_translation_table={torch.ops.rankfold.gru_direction.default: _gru},
                verbose=False,
            )
        except Exception as error:  # the exporter wraps what a model, or a translation, raised
            cause = error.__cause__ or error
            reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
            raise ValueError(f"torch.onnx cannot export {type(traced.model).__name__}: {reason}") from error
    assert program is not None
    # Where in which file each node came from: larger than a small model, and of no use to who runs it.
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    return program


def _gru(x: Any, weight_ih: Any, weight_hh: Any, bias_ih: Any, bias_hh: Any) -> Any:
    """`rankfold::gru_direction` as the standard's GRU, which orders its gates otherwise: torch has reset,
    update, new; ONNX has update, reset, new. `linear_before_reset` is torch's formula."""
    import onnxscript

    op: Any = onnxscript.opset18
    size = weight_hh.shape[1]

    def ordered(joint: Any) -> Any:
        reset, update, new = (op.Slice(joint, [i * size], [i * size + size], [0]) for i in range(3))
        return op.Unsqueeze(op.Concat(update, reset, new, axis=0), [0])

    states, _ = op.GRU(
        op.Transpose(x, perm=[1, 0, 2]),
        ordered(weight_ih),
        ordered(weight_hh),
        op.Concat(ordered(bias_ih), ordered(bias_hh), axis=1),
        hidden_size=size,
        linear_before_reset=1,
    )
    return op.Transpose(op.Squeeze(states, [1]), perm=[1, 0, 2])


def _compare(traced: _Traced, path: Path, longest: int | None) -> float:
    """The largest difference of onnxruntime from the model, over batches of other sizes. Raises ValueError
    where it is more than rounding explains."""
    import onnxruntime

    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch, length in CHECKED:
        ids = _ids(batch, min(length, longest or length), traced.model)
        mask = torch.ones_like(ids)
        mask[-1, ids.shape[1] // 2 + 1 :] = 0
        with torch.no_grad():
            expected = traced(ids, mask)
        feed = {"input_ids": ids.cpu().numpy(), "attention_mask": mask.cpu().numpy()}
        for mine, theirs in zip(expected, session.run(None, feed), strict=True):
            theirs = torch.from_numpy(theirs)
            if theirs.shape != mine.shape:
                shapes = f"{tuple(theirs.shape)}, and the model {tuple(mine.shape)}"
                raise ValueError(f"onnxruntime gives shape {shapes}; the file was not written")
            # What an encoder writes at padding is nobody's business.
            keep = mask.bool().cpu() if mine.shape[:2] == mask.shape and mine.dim() == 3 else slice(None)
            mine = mine.float().cpu()[keep]
            gap = (mine - theirs.float()[keep]).abs()
            allowed = (1e-4 if traced.model.dtype == torch.float32 else 2e-2) * (1 + mine.abs())  # type: ignore[operator]
            if not bool((gap <= allowed).all()):
                raise ValueError(
                    f"the exported file gives other numbers than the model, by up to {float(gap.max()):.3g} "
                    f"for a batch of {tuple(ids.shape)}; it was not written"
                )
            worst = max(worst, float(gap.max()))
    return worst


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of itself, and of packages that are not installed."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for category, message in NOISE:
                warnings.filterwarnings("ignore", message, category)
            yield
    finally:
        logger.setLevel(level)
