"""The Trainer of a healing: its loss is the distance to the original, and it keeps the best state it saw.

    loss = (1 - lm) · mean over tokens of KL(original ‖ healed) + lm · mean of -log p(next token)

In float32, over all tokens of a window and the whole vocabulary. What the original says is worked out for
each batch, without gradients, and dropped: nothing of it is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rankfold.atomic import writing_file
from rankfold.evaluate import kl_to
from rankfold.generate import accepts, logits_of
from rankfold.metrics import Progress
from rankfold.pretrain.trainer import LOSS, PretrainTrainer, Watch
from rankfold.refine_state import Trainable

CHUNK = 2**24  # logits turned into float32 probabilities at a time: 64 MiB
BEST = "best.safetensors"


def divergence(original: Tensor, healed: Tensor, ids: Tensor, lm: float = 0.0) -> Tensor:
    """(1 - lm) · mean KL(original ‖ healed) over B·L tokens + lm · mean -log p over B·(L - 1) targets.

    original, healed  logits (B, L, V) of any floating dtype; ids (B, L). Returns a float32 scalar, which is
    differentiable in `healed` once. Beside the two, it holds the gradient, in healed's dtype.
    """
    if original.shape != healed.shape:
        raise ValueError(
            f"logits {tuple(original.shape)} of the original and {tuple(healed.shape)} of the model: their "
            "vocabularies must be equal"
        )
    targets = torch.cat((ids[:, 1:], ids.new_full((len(ids), 1), -1)), 1)  # the last token has none
    apply: Any = _Divergence.apply
    return apply(healed.flatten(0, 1), original.flatten(0, 1), targets.flatten(), float(lm))


class _Divergence(torch.autograd.Function):
    """Value and gradient in one pass over chunks of tokens: softmax(healed) - target, the target being what
    the original says and, by `lm`, the next token."""

    @staticmethod
    def forward(ctx: Any, healed: Tensor, original: Tensor, targets: Tensor, lm: float) -> Tensor:
        count, scored = len(healed), int((targets >= 0).sum())
        on_kl, on_lm = (1 - lm) / count, lm / max(scored, 1)
        total = torch.zeros((), dtype=torch.float64)
        grad = torch.empty_like(healed) if healed.requires_grad else None
        rows = max(1, CHUNK // healed.shape[-1])
        for low in range(0, count, rows):
            part = slice(low, low + rows)
            log_q = healed[part].float().log_softmax(-1)
            log_p = original[part].float().log_softmax(-1)
            p = log_p.exp()
            # 0 · log 0 = 0, which logits of minus infinity need said
            kl = (p * (log_p - log_q)).masked_fill_(p == 0, 0.0).sum(-1)
            total += on_kl * kl.double().sum().cpu()
            known = (targets[part] >= 0)[:, None]
            here = targets[part].clamp_min(0)[:, None]
            if lm:
                total -= on_lm * log_q.gather(-1, here)[known].double().sum().cpu()
            if grad is not None:
                q = log_q.exp_()
                found = q * (on_kl + on_lm * known) - p.mul_(on_kl)
                if lm:
                    found.scatter_add_(-1, here, -on_lm * known.to(found.dtype))
                grad[part] = found
        ctx.save_for_backward(grad)
        return total.to(healed.device, torch.float32)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return (None if grad is None else grad * grads[0].to(grad.dtype)), None, None, None


class HealTrainer(PretrainTrainer):
    """`PretrainTrainer` with the loss above, validated by KL(original ‖ healed) on the held-out windows.

    autocast  products in bfloat16 while training; validation is in the models' own dtypes
    before    the held-out KL at the start; a state below it, and below all others so far, goes to `best`
    """

    def __init__(
        self,
        *options: Any,
        original: nn.Module,
        opened: Trainable,
        autocast: bool,
        lm: float,
        before: float,
        best: Path,
        **more: Any,
    ) -> None:
        super().__init__(*options, **more)
        self.original, self.opened, self.autocast, self.lm = original, opened, autocast, lm
        self.before, self.best = before, best

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        ids = inputs["input_ids"]
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.autocast):
            with torch.no_grad():
                wanted = said(self.original, ids)
            found = said(model, ids)
        loss = divergence(wanted, found, ids, self.lm)
        return (loss, {"logits": found}) if return_outputs else loss

    def held_out(self) -> float:
        loss = kl_to(self.original, self.opened.model, self.windows, batch_size=self.args.eval_batch_size)
        if loss < min([self.before, *(kl for _, kl in held_out_losses(self.state.log_history))]):
            tensors = {name: p.detach().contiguous() for name, p in self.opened.parameters().items()}
            with writing_file(self.best) as beside:
                save_file(tensors, beside, metadata={"step": str(self.state.global_step)})
        return loss

    def take_best_(self) -> int:
        """Load the best state of the run into the model, and return its step; 0 where none was better than
        the start."""
        found = [(kl, step) for step, kl in held_out_losses(self.state.log_history) if kl < self.before]
        if not found:
            return 0
        step = int(min(found)[1])
        with safe_open(self.best, framework="pt") as file:
            if file.metadata()["step"] != str(step):
                raise ValueError(
                    f"{self.best} holds step {file.metadata()['step']}, the best of the run is step {step}: "
                    "start anew with --restart"
                )
            with torch.no_grad():
                for name, parameter in self.opened.parameters().items():
                    parameter.copy_(file.get_tensor(name))
        return step


def held_out_losses(history: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(step, KL) of every validation in a Trainer's log."""
    return [(item["step"], item["eval_loss"]) for item in history if "eval_loss" in item]


def said(model: Any, ids: Tensor) -> Tensor:
    """The logits (B, L, V) for ids (B, L)."""
    options = {"use_cache": False} if accepts(model, "use_cache") else {}
    return logits_of(model(ids, **options))


def check_pair(model: nn.Module, original: nn.Module, length: int, lm: float) -> None:
    """Raise ValueError where the model cannot learn from the original."""
    if model is original:
        raise ValueError("the model and the original are one object: open the original a second time")
    if not 0 <= lm < 1:
        raise ValueError(f"--lm {lm:g}: the share of the language model's own loss, at least 0 and below 1")
    sizes = []
    for which, one in (("the model", model), ("the original", original)):
        config = getattr(one, "config", None)
        if getattr(config, "is_encoder_decoder", False) or not hasattr(one, "get_output_embeddings"):
            raise ValueError(f"{which} ({type(one).__name__}) is not a causal language model of transformers")
        longest = getattr(config, "max_position_embeddings", None) or length
        if not 2 <= length <= longest:
            raise ValueError(f"windows of {length} tokens (--length): {which} reads from 2 to {longest}")
        place, before = next(one.parameters()).device, one.training
        with torch.no_grad():
            sizes.append(said(one.eval(), torch.zeros(1, 2, dtype=torch.int64, device=place)).shape)
        one.train(before)
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the model gives logits {tuple(sizes[0])} for two tokens, the original {tuple(sizes[1])}: "
            "healing compares them token by token, so their vocabularies must be equal"
        )


class HealWatch(Watch):
    """The watch of pre-training, which speaks of KL."""

    def __init__(self, tell: Progress, say: Callable[[str], None], before: float) -> None:
        super().__init__(tell, say, per_layer=False)
        self.before = before

    def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        last = next(item[LOSS] for item in reversed(state.log_history) if LOSS in item)
        kl = more["metrics"]["eval_loss"]
        self.say(
            f"step {state.global_step}: training loss {last:.4f}, held-out KL {kl:.4f} nats a token "
            f"({self.before:.4f} before)"
        )
