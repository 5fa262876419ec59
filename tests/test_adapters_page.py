"""The page on adapters runs as it is printed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).resolve().parent.parent / "docs" / "adapters.md"


def test_the_python_blocks_run(
    tiny_llama: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    base = tiny_llama()
    base.save_pretrained("base")
    with torch.no_grad():
        for name, p in base.named_parameters():
            if "_proj" in name:
                p += 0.02 * torch.randn(p.shape[0], 2) @ torch.randn(2, p.shape[1])
            elif "norm" in name:
                p += 0.1
    base.save_pretrained("tuned")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 14
    held: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"adapters.md, block {number}", "exec"), held)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        served, ours = (m.eval()(ids).logits for m in (held["served"], held["again"]))
    torch.testing.assert_close(served, ours, atol=1e-5, rtol=1e-5)
    x = torch.randn(2, 17, 16)
    with torch.no_grad():
        assert torch.equal(held["plain"](x), held["vision"](x))
    assert all(
        torch.equal(one.right, two.right) for one, two in zip(held["plain"], held["vision"], strict=True)
    )
    for folder in ("adapter", "lora", "wara", "wara-as-lora", "extracted"):
        assert (tmp_path / folder).is_dir(), folder
