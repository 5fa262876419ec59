"""Bytes, parameters and multiply-adds against counts made by hand or by another counter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from toy_language import llama

from rankfold import evaluate, hosts, structures


def test_bytes_on_disk_equals_the_tensor_payload(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(3, 5),
        "b": torch.zeros(7, dtype=torch.bfloat16),
        "c": torch.zeros((), dtype=torch.int32),
    }
    save_file(tensors, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    save_file({"stray": torch.zeros(100)}, str(tmp_path / "old.safetensors"))
    got = evaluate.bytes_on_disk(tmp_path)
    assert got["tensors"] == {name: tensor.nbytes for name, tensor in tensors.items()}
    assert got["payload"] == 60 + 14 + 4
    assert got["files"] == {"model.safetensors": (tmp_path / "model.safetensors").stat().st_size}


def test_bytes_on_disk_of_a_sharded_and_tied_model(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    got = evaluate.bytes_on_disk(tmp_path)
    assert got["payload"] == 4 * evaluate.params(model)
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="which is missing"):
        evaluate.bytes_on_disk(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234",
        (2**60).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (3).to_bytes(8, "little") + b"{}}",
        (2).to_bytes(8, "little") + b"{}trailing",
        (9).to_bytes(8, "little") + b'{"a": {}}',
    ],
)
def test_a_damaged_safetensors_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        evaluate.bytes_on_disk(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no safetensors"):
        evaluate.bytes_on_disk(tmp_path)


def test_shared_parameters_count_once() -> None:
    one = nn.Linear(4, 6, bias=False)
    two = nn.Linear(4, 6, bias=False)
    two.weight = nn.Parameter(one.weight.detach())  # another parameter, the same storage
    assert evaluate.params(nn.Sequential(one, two, one)) == 24
    with torch.device("meta"):
        assert evaluate.params(nn.Sequential(nn.Linear(4, 6), nn.Linear(4, 6))) == 60


def test_macs_of_hosts_and_dense_layers() -> None:
    low = structures.LowRank((6, 8), rank=2)
    table = hosts.Embedding(structures.LowRank((50, 8), rank=3))
    model = nn.Sequential(table, hosts.Linear(low), nn.Linear(6, 5), nn.LayerNorm(5))
    expected = 3 * 8 + 2 * (6 + 8) + 6 * 5
    assert evaluate.macs_per_token(model) == expected
    assert evaluate.macs_per_token(model, example=torch.randint(50, (3, 7))) == expected
    assert evaluate.macs_per_token(nn.Sequential(hosts.Embedding(structures.Dense((50, 8))))) == 0


def test_macs_of_transformers_models_agree_with_and_without_an_example() -> None:
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(50, (2, 5))
    model = llama()
    per_block = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24
    assert evaluate.macs_per_token(model) == 2 * per_block + 16 * 50
    assert evaluate.macs_per_token(model, {"input_ids": ids}) == evaluate.macs_per_token(model)
    ends = {"bos_token_id": None, "eos_token_id": None}
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32, **ends)
    )
    assert evaluate.macs_per_token(gpt2) == 12 * 16 * 16 + 16 * 50
    assert evaluate.macs_per_token(gpt2, ids) == evaluate.macs_per_token(gpt2)


def test_macs_of_convolutions_need_an_example_and_equal_the_flop_counter() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    dense = nn.Conv2d(3, 8, 3, padding=1, stride=2)
    image = torch.randn(2, 3, 9, 11)
    assert evaluate.macs_per_token(nn.Sequential(dense), image) == 8 * 27 * 5 * 6
    grouped = nn.Conv2d(6, 8, 3, groups=2)
    assert evaluate.macs_per_token(nn.Sequential(grouped), torch.randn(1, 6, 9, 9)) == 8 * 27 * 49
    with pytest.raises(ValueError, match="pass example="):
        evaluate.macs_per_token(nn.Sequential(dense))
    for shape in ((8, 27), (24, 9)):  # the two readings of a factored convolution
        host = hosts.Conv2d(structures.LowRank(shape, rank=4), dense.bias, vars(dense))
        model = nn.Sequential(host)
        with FlopCounterMode(display=False) as flops:
            model(image)
        assert evaluate.macs_per_token(model, image) == flops.get_total_flops() // 2 // len(image)
