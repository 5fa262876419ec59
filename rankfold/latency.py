"""What a model costs to run: time, memory and multiply-adds.

Times are only comparable inside one run, so `latency` takes *all* models at once and interleaves them: every
repeat visits every model, in rotated order, and the medians are reported. Decoding is greedy and of fixed
length (the end-of-text token is ignored), with the model's own key/value cache. Models of different dtypes
are refused: a float16 model against a float32 one measures the dtype, not the compression.
"""

from __future__ import annotations

import ctypes
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rankfold.generate import accepts, device_of, evaluating, logits_of

# ratios within 1 ± this are called "same": repeated medians of one model differ by that much
TOLERANCE = 0.05
FAQ = "docs/evaluation.md#when-is-a-compressed-model-not-faster"


def latency(
    models: Mapping[str, nn.Module],
    *,
    batch_sizes: Sequence[int] = (1,),
    prompt_length: int = 128,
    new_tokens: int = 32,
    repeats: int = 5,
    warmup: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Median prefill and decode times of causal language models, interleaved; the first model is the
    reference.

    Prefill is one forward pass over `prompt_length` random tokens that returns the last logits only (what
    generation needs); decode is `new_tokens` greedy single-token passes on the cache. Returns a JSON-able
    dict: the conditions (`dtype`, `device`, `threads`, ...), `rows` with one entry per model and batch size
    (`prefill_ms`, `prefill_tokens_per_s`, `decode_ms_per_token` (milliseconds a step), `decode_tokens_per_s`
    (all sequences of the batch together), `prefill_ratio`, `decode_ratio`: time / the first model's time,
    `verdict`: "faster" | "same" | "slower" by the decode ratio), and `notes` in words, one for every row that
    is slower than the reference.

    Raises ValueError for models of differing dtypes or devices (names both), a prompt longer than the model's
    positions, counts below one, and models that return no key/value cache.
    """
    counts = {"prompt_length": prompt_length, "new_tokens": new_tokens, "repeats": repeats}
    for name, value in [*counts.items(), *(("batch_sizes", size) for size in batch_sizes)]:
        if value < 1:
            raise ValueError(f"{name}={value}: latency needs at least 1")
    if not models or not batch_sizes:
        raise ValueError("latency needs at least one model and one batch size")
    reference, first = next(iter(models.items()))
    for name, model in models.items():
        _comparable(reference, first, name, model)
    for name, model in models.items():
        longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        if longest is not None and prompt_length + new_tokens > longest:
            raise ValueError(
                f"prompt_length={prompt_length} + new_tokens={new_tokens} exceeds the {longest} positions of "
                f"{name!r}: lower one of them"
            )
    facts: dict[str, Any] = {"dtype": "+".join(_dtypes(first)), "device": str(device_of(first))}
    facts |= {"threads": torch.get_num_threads(), **counts, "warmup": warmup, "rows": [], "notes": []}
    vocabulary = min(
        int(getattr(getattr(model, "config", None), "vocab_size", 2)) for model in models.values()
    )
    generator = torch.Generator().manual_seed(0)
    order, total = list(models), len(batch_sizes) * (warmup + repeats)
    with evaluating(*models.values()):
        for batch in batch_sizes:
            prompt = torch.randint(vocabulary, (batch, prompt_length), generator=generator)
            prompt = prompt.to(device_of(first))
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
            for turn in range(warmup + repeats):
                if progress:
                    progress(len(facts["rows"]) // len(models) * (warmup + repeats) + turn, total)
                shift = turn % len(order)  # rotated, so that no model always runs after the same neighbour
                for name in order[shift:] + order[:shift]:
                    sample = _time(name, models[name], prompt, new_tokens)
                    if turn >= warmup:
                        times[name].append(sample)
            facts["rows"] += _rows(times, batch, prompt_length, new_tokens)
    if progress:
        progress(total, total)
    for row in facts["rows"]:
        slow = [k for k in ("prefill", "decode") if row[f"{k}_ratio"] > 1 + TOLERANCE]
        for kind in slow:
            facts["notes"].append(
                f"{row['model']}: {kind} is slower than {reference} at batch size {row['batch_size']} "
                f"(x{row[f'{kind}_ratio']:.2f} its time); see {FAQ}"
            )
    return facts


def _rows(
    times: dict[str, list[tuple[float, float]]], batch: int, prompt_length: int, new_tokens: int
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, samples in times.items():
        prefill, decode = (1e3 * statistics.median(column) for column in zip(*samples, strict=True))
        decode /= new_tokens
        base = rows[0] if rows else {"prefill_ms": prefill, "decode_ms_per_token": decode}
        ratio = decode / base["decode_ms_per_token"]
        verdict = "slower" if ratio > 1 + TOLERANCE else "faster" if ratio < 1 - TOLERANCE else "same"
        rows.append(
            {
                "model": name,
                "batch_size": batch,
                "prefill_ms": prefill,
                "prefill_tokens_per_s": 1e3 * batch * prompt_length / prefill,
                "decode_ms_per_token": decode,
                "decode_tokens_per_s": 1e3 * batch / decode,
                "prefill_ratio": prefill / base["prefill_ms"],
                "decode_ratio": ratio,
                "verdict": verdict,
            }
        )
    return rows


def _time(name: str, model: nn.Module, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of one prefill and of `new_tokens` decode steps."""
    last: dict[str, Any] = {"logits_to_keep": 1} if accepts(model, "logits_to_keep") else {}
    start = _clock(prompt.device)
    output = model(input_ids=prompt, use_cache=True, **last)
    middle = _clock(prompt.device)
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        raise ValueError(
            f"{name!r} returns no past_key_values: decode latency needs a model with a key/value cache"
        )
    for _ in range(new_tokens):
        token = logits_of(output)[:, -1].argmax(-1, keepdim=True)
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
    return middle - start, _clock(prompt.device) - middle


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _dtypes(model: nn.Module) -> list[str]:
    found = {tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()}
    return sorted(str(dtype).removeprefix("torch.") for dtype in found)


def _comparable(reference: str, first: nn.Module, name: str, model: nn.Module) -> None:
    ours, theirs = "+".join(_dtypes(model)), "+".join(_dtypes(first))
    if ours != theirs:
        raise ValueError(
            f"latency compares models of one dtype: {reference!r} is {theirs}, {name!r} is {ours}. "
            f"Cast one of them with .to(dtype)"
        )
    if device_of(model) != device_of(first):
        raise ValueError(
            f"{reference!r} is on {device_of(first)}, {name!r} on {device_of(model)}: use one device"
        )


class Peak(NamedTuple):
    """The largest memory seen while a function ran, in bytes."""

    bytes: int  # absolute peak: resident set of the process (CPU), or tensors allocated on the device (CUDA)
    before: int  # the same quantity when the function started
    method: (
        str  # "cuda" | "high-water mark" (kernel, exact) | "sampled" (lower bound) | "lifetime" (upper bound)
    )
    result: Any  # what the function returned


def peak_memory(fn: Callable[[], Any], *, device: str | torch.device = "cpu") -> Peak:
    """Run `fn` and report the peak memory while it ran.

    CUDA: `torch.cuda.max_memory_allocated` after a reset. Linux: the kernel's high-water mark of the resident
    set, cleared first; where it cannot be cleared, a thread samples every 2 ms and short peaks may be missed.
    Elsewhere (macOS) the peak over the life of the process, an upper bound. Raises OSError where none of
    these exists.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = fn()
        torch.cuda.synchronize(device)
        return Peak(torch.cuda.max_memory_allocated(device), before, "cuda", result)
    if not Path("/proc/self/status").exists():
        before = _lifetime_peak()
        result = fn()
        return Peak(_lifetime_peak(), before, "lifetime", result)
    _return_freed_memory()
    before = _status("VmRSS")
    if _clear_high_water_mark():
        result = fn()
        return Peak(max(_status("VmHWM"), before), before, "high-water mark", result)
    peak, done = before, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _status("VmRSS"))

    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    try:
        result = fn()
    finally:
        done.set()
        watcher.join()
    return Peak(max(peak, _status("VmRSS")), before, "sampled", result)


def _status(field: str) -> int:
    """A size in bytes from /proc/self/status (0 where the kernel does not list the field)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    return 0


def _return_freed_memory() -> None:
    """Give the system what the allocator holds after earlier work: `fn` would otherwise use that, unseen."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass  # glibc alone has it


def _clear_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    # Some sandboxes accept the write and ignore it: only a mark that came down to the current size counts.
    return 0 < _status("VmHWM") <= _status("VmRSS") + 2**22


def _lifetime_peak() -> int:
    try:
        import resource
    except ImportError as error:
        raise OSError("peak memory of the CPU cannot be read on this platform; use a CUDA device") from error
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
