"""Files: written whole or not at all, read strictly or not at all."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from damage import damaged, manifest_of, nested
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rankfold
from rankfold import checkpoint, hosts
from rankfold.atomic import check_folder, writing

IDS = torch.arange(24).view(2, 12)


class Net(nn.Module):
    """No transformer of anyone's: convolutions, batch norm, attention, a tied pair of tables."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2)
        )
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)
        self.encode = nn.Linear(24, 40)
        self.decode = nn.Linear(24, 40)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.features(x).flatten(2).mT
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.encode(tokens) - self.decode(tokens).relu()


X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def net(seed: int) -> Net:
    torch.manual_seed(seed)
    made = Net()
    made(X)  # moves the running statistics of the batch norm
    return made.eval()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Net, Path]:
    model = net(0)
    report = rankfold.factorize_(model, rankfold.recipes.svd_llm, budget=0.6, batches=[X])
    assert {row.name: row.reason for row in report.skipped}.keys() >= {"attention.in_proj_weight"}
    return model, rankfold.save(model, tmp_path_factory.mktemp("plain") / "net", report=report)


@pytest.fixture(scope="module")
def llama(tiny_llama: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model = tiny_llama()
    rankfold.factorize_(model, rankfold.recipes.svd, budget=0.6)
    return model, rankfold.save(model, tmp_path_factory.mktemp("llama") / "model")


# Plain modules.


def test_plain_module_round_trips(plain: tuple[Net, Path]) -> None:
    model, folder = plain
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "model.safetensors",
        "rankfold.json",
        "rankfold_report.json",
        "report.html",
    }
    other = net(1)
    with torch.no_grad():
        assert not torch.equal(other(X), model(X))
        assert rankfold.load_(other, folder) is other
        assert torch.equal(other(X), model(X))
    assert hosts.hosts(other).keys() == hosts.hosts(model).keys() == {
        "features.0", "features.3", "encode", "decode"
    }  # fmt: skip
    assert other.encode.weight is other.decode.weight
    assert type(other.attention) is nn.MultiheadAttention
    assert all(not t.is_meta for t in (*other.parameters(), *other.buffers()))
    rankfold.verify(other, folder)


def test_save_load_save_changes_no_byte(plain: tuple[Net, Path], tmp_path: Path) -> None:
    _, folder = plain
    rankfold.save(rankfold.load_(net(1), folder), tmp_path / "again")
    for name in ("model.safetensors", "rankfold.json"):
        mine, theirs = (json_or_bytes(path / name) for path in (folder, tmp_path / "again"))
        assert mine == theirs, name


def json_or_bytes(path: Path) -> Any:
    """A manifest is compared without the recipe, which is the report's and not the model's."""
    if path.suffix == ".json":
        return {k: v for k, v in json.loads(path.read_text()).items() if k != "recipe"}
    return path.read_bytes()


def test_tensors_outside_structures_may_be_shared(tmp_path: Path) -> None:
    model = net(0)
    rankfold.factorize_(model, rankfold.recipes.svd, budget=0.6, skip=["encode", "decode"])
    rankfold.save(model, tmp_path / "out")
    assert "decode.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    other = rankfold.load_(net(1), tmp_path / "out")
    assert other.decode.weight is other.encode.weight
    assert torch.equal(other(X), model(X))


def test_loads_in_the_dtype_of_the_model(plain: tuple[Net, Path]) -> None:
    model, folder = plain
    other = rankfold.load_(net(1).double(), folder)
    assert {p.dtype for p in other.parameters()} == {torch.float64}
    torch.testing.assert_close(other(X.double()).float(), model(X), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("features.1.running_mean"), r"missing tensors \['features.1.running_mean'\]"),
        (lambda t: t.pop("encode.weight.left.weight"), "missing.*encode.weight.left.weight"),
        (lambda t: t.update(more=torch.zeros(1)), r"left-over tensors \['more'\]"),
        (
            lambda t: t.update({"features.0.bias": torch.zeros(7)}),
            r"features.0.bias' is torch.float32 \(7,\)",
        ),
        (lambda t: t.update({"encode.bias": t["encode.bias"].to(torch.int8)}), "encode.bias' is torch.int8"),
    ],
    ids=["missing", "missing factor", "extra", "shape", "dtype"],
)
def test_load_is_strict_and_leaves_the_model_alone(
    change: Any, message: str, plain: tuple[Net, Path], tmp_path: Path
) -> None:
    other = net(1)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=message):
        rankfold.load_(other, damaged(plain[1], tmp_path / "damaged", change))
    assert not hosts.hosts(other)
    after = other.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_load_refuses_what_is_not_a_folder_of_ours(
    plain: tuple[Net, Path], llama: tuple[Any, Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="nothing to load"):
        rankfold.load_(net(1), tmp_path)
    with pytest.raises(ValueError, match="use from_pretrained"):
        rankfold.load_(net(1), llama[1])
    with pytest.raises(ValueError, match="cannot hold a structure: it is factorized already"):
        rankfold.load_(copy.deepcopy(plain[0]), plain[1])
    with torch.device("meta"), pytest.raises(ValueError, match="meta device"):
        rankfold.load_(Net(), plain[1])
    broken = Path(shutil.copytree(plain[1], tmp_path / "broken"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
        rankfold.load_(net(1), broken)
    weights.unlink()
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
        rankfold.load_(net(1), broken)
    for text in ("{", "[" * 100_000):
        (broken / "rankfold.json").write_text(text)
        with pytest.raises(ValueError, match=r"rankfold.json is not JSON"):
            rankfold.load_(net(1), broken)
    shutil.copy(plain[1] / "model.safetensors", weights)
    (broken / "rankfold.json").write_text(json.dumps(manifest_of({"encode": nested(400)})))
    with pytest.raises(ValueError, match=r"encode.*nested too deeply"):
        rankfold.load_(net(1), broken)


# Saving.


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def old(tmp_path: Path, llama: tuple[Any, Path]) -> Path:
    return Path(shutil.copytree(llama[1], tmp_path / "work" / "out"))


def test_refuses_a_folder_that_is_in_use(old: Path, llama: tuple[Any, Path], tmp_path: Path) -> None:
    before = contents(old)
    with pytest.raises(ValueError, match=r"not empty.*--overwrite"):
        rankfold.save(llama[0], old)
    with pytest.raises(ValueError, match="is a file"):
        rankfold.save(llama[0], old / "config.json", overwrite=True)
    assert contents(old) == before
    (old / "stale.txt").write_text("of the old model")
    rankfold.save(llama[0], old, overwrite=True)
    assert contents(old) == before  # the old folder is replaced, not mixed with the new one
    (tmp_path / "empty").mkdir()
    rankfold.save(llama[0], tmp_path / "empty")
    rankfold.save(llama[0], tmp_path / "deep" / "er" / "out")


def test_a_full_disk_is_seen_before_writing(
    old: Path, llama: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(old)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"need [0-9,]+ bytes, the disk has 1,000"):
        rankfold.save(llama[0], old, overwrite=True)
    assert contents(old) == before
    assert [path.name for path in old.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("moment", ["weights", "tokenizer", "sync", "first rename", "second rename"])
def test_an_interrupt_while_writing_leaves_the_old_folder(
    moment: str,
    error: BaseException,
    old: Path,
    llama: tuple[Any, Path],
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = contents(old)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    def half(tensors: Any, path: Any, **_: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise error

    if moment == "weights":
        import transformers.modeling_utils

        monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", half)
    elif moment == "tokenizer":
        tiny_tokenizer = SimpleNamespace(save_pretrained=fail)
    elif moment == "sync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        rename = Path.rename
        wanted = ".out.old" if moment == "first rename" else "out"

        def renamed(self: Path, target: Path) -> Path:
            if target.name == wanted and self.name != ".out.old":
                raise error
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", renamed)
    with pytest.raises(type(error)):
        rankfold.save(llama[0], old, tokenizer=tiny_tokenizer, overwrite=True)
    assert contents(old) == before
    assert [path.name for path in old.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("exists", [True, False])
def test_an_interrupted_plain_module_leaves_nothing_new(
    exists: bool, plain: tuple[Net, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if exists:
        shutil.copytree(plain[1], out)
    before = contents(tmp_path)

    def half(tensors: Any, path: Any, **_: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(OSError, match="No space left"):
        rankfold.save(plain[0], out, overwrite=True)
    assert contents(tmp_path) == before
    assert out.exists() == exists


def test_a_crash_between_the_renames_is_mended(old: Path, llama: tuple[Any, Path]) -> None:
    """The machine stopped after the old folder had been put aside: nothing is at its place."""
    before = contents(old)
    old.rename(old.with_name(".out.old"))
    with pytest.raises(ValueError, match="not empty"):
        check_folder(old, overwrite=False)
    assert contents(old) == before
    (old.with_name(".out.old")).mkdir()  # the machine stopped before the last clean-up
    rankfold.save(llama[0], old, overwrite=True)
    assert [path.name for path in old.parent.iterdir()] == ["out"]


def test_writing_leaves_files_of_others_alone(tmp_path: Path) -> None:
    (tmp_path / ".out.1.partial").mkdir()  # another process writes there
    with writing(tmp_path / "out") as beside:
        (beside / "sub").mkdir()
        (beside / "sub" / "file").write_text("x")
    assert {path.name for path in tmp_path.iterdir()} == {".out.1.partial", "out"}
    assert contents(tmp_path / "out") == {os.path.join("sub", "file"): b"x"}


def test_saves_no_adapters(llama: tuple[Any, Path], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(copy.deepcopy(llama[0]), LoraConfig(target_modules=["left", "right"], r=2))
    with pytest.raises(ValueError, match="merge_and_unload"):
        rankfold.save(adapted, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_pickled(
    plain: tuple[Net, Path], llama: tuple[Any, Path], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    rankfold.save(llama[0], tmp_path / "out", tokenizer=tiny_tokenizer, max_shard_size="100KB")
    for folder in (plain[1], tmp_path / "out"):
        for path in folder.rglob("*"):
            assert path.suffix in {".json", ".safetensors", ".html", ".md", ".jinja"}, path
            assert not path.read_bytes().startswith((b"\x80", b"PK")), path


# Verifying.

FACTOR = "model.layers.1.mlp.up_proj.weight.left.weight"


@pytest.mark.parametrize("name", [FACTOR, "model.embed_tokens.weight"])
def test_verify_finds_one_perturbed_number(name: str, llama: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = llama
    rankfold.verify(model, folder, {"input_ids": IDS})

    def perturb(tensors: dict[str, Tensor]) -> None:
        tensors[name][-1, -1] += 1e-6

    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        rankfold.verify(model, damaged(folder, tmp_path / "damaged", perturb))


def test_verify_finds_another_dtype(llama: tuple[Any, Path], tmp_path: Path) -> None:
    model = copy.deepcopy(llama[0]).half()
    rankfold.save(copy.deepcopy(model).float(), tmp_path / "float")
    rankfold.save(model, tmp_path / "half")
    rankfold.verify(model, tmp_path / "half")
    with pytest.raises(ValueError, match="on disk differs"):
        rankfold.verify(model, tmp_path / "float")


def test_verify_works_where_autoload_is_off(llama: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKFOLD_AUTOLOAD", "0")
    rankfold.verify(llama[0], llama[1], {"input_ids": IDS})


def test_verify_plain_module(plain: tuple[Net, Path], tmp_path: Path) -> None:
    model, folder = plain
    rankfold.verify(model, folder)
    broken = damaged(
        folder, tmp_path / "damaged", lambda tensors: tensors["encode.weight.right.weight"].mul_(1.01)
    )
    with pytest.raises(ValueError, match=r"encode\.weight\.right\.weight"):
        rankfold.verify(model, broken)
    tensors = safetensors.torch.load_file(broken / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "encode" not in k}, broken / "model.safetensors")
    with pytest.raises(ValueError, match="encode"):
        rankfold.verify(model, broken)
