"""Where a model is opened: the device, for commands of one process."""

from __future__ import annotations

import pytest
import torch

from rankfold.loading import one_device


def test_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert one_device(None, "adapt") == one_device("cpu", "adapt") == "cpu"
    with pytest.raises(ValueError, match="there is no CUDA device here"):
        one_device("cuda", "adapt")
    with pytest.raises(ValueError, match=r"--device 'cuda:1': cpu or cuda"):
        one_device("cuda:1", "adapt")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert one_device(None, "adapt") == "cuda"


@pytest.mark.parametrize("command", ["classify", "adapt", "hoi"])
def test_one_process(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=f"rankfold {command} runs in one process"):
        one_device("cpu", command)
