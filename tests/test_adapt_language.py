"""`rankfold adapt` of a language model, on text and on conversations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_adapt import LANGUAGE, TEMPLATE, chats, language_model, run, same, text
from toy_heal import windows

from rankfold import factorize_, recipes, save
from rankfold.adapt.chat import IGNORED, Padded, answer_loss, encode_chat
from rankfold.evaluate import perplexity


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> Path:
    home = tmp_path_factory.mktemp("home")
    language_model(home, tiny_llama, tiny_tokenizer)
    text(home / "notes.jsonl")
    chats(home / "chats.jsonl")
    chats(home / "more.jsonl", 8)
    return home


@pytest.fixture
def chatty(home: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> Any:
    """A tokenizer with a template; home/chat is the model with it."""
    tiny_tokenizer.chat_template = TEMPLATE
    language_model(home, tiny_llama, tiny_tokenizer, "chat")
    yield tiny_tokenizer
    tiny_tokenizer.chat_template = None


def adapt(home: Path, out: Path, recipe: str = "lora", **more: Any) -> tuple[dict[str, Any], Path]:
    data = more.pop("data", [str(home / "notes.jsonl")])
    return run(more.pop("model", str(home / "lm")), out, recipe, **{**LANGUAGE, "data": data, **more})


@pytest.mark.parametrize("recipe", ["wara", "full", pytest.param("lora", marks=pytest.mark.slow)])
def test_text(recipe: str, home: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    facts, folder = adapt(home, tmp_path / "out", recipe, lr=5e-3, test=["pydoc:test:2x16"])
    assert facts["training"]["steps"] == 6 and facts["data"]["tokens"] == 192
    held = [loss for _, loss in facts["training"]["validation"]]
    assert len(held) == 3 and min(held[1:]) < held[0]
    best = facts["training"]["best_step"]
    kept = facts["metrics"]["held out"]["after"]["loss"]
    assert kept == dict(map(tuple, facts["training"]["validation"]))[best] == min(held)
    assert set(facts["metrics"]) == {"held out", "pydoc:test:2x16"}
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.use_cache and "perplexity" in facts["metrics"]["pydoc:test:2x16"]["after"]
    assert "Loss in nats per token" in (folder / "report.html").read_text()
    if recipe != "full":
        assert facts["trained"]["others"] == 0 and facts["memory"]["training"]["optimizer"] > 0


def test_a_kill_changes_nothing(home: Path, tmp_path: Path) -> None:
    """It dies after step 3, past the checkpoint of step 2."""
    whole_facts, whole = adapt(home, tmp_path / "whole", "wara")

    def dies(words: str) -> None:
        if words.startswith("step 3"):
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        adapt(home, tmp_path / "out", "wara", say=dies)
    assert not (tmp_path / "out").exists()
    (checkpoint,) = (tmp_path / "out.run").glob("checkpoint-*")
    assert {path.name for path in checkpoint.glob("*.safetensors")} == {"trained.safetensors"}
    with pytest.raises(ValueError, match=r"recipe.method.rank: 2 -> 3"):
        adapt(home, tmp_path / "out", "wara", options={"rank": 3})
    facts, folder = adapt(home, tmp_path / "out", "wara")
    assert facts["training"]["train"] == whole_facts["training"]["train"]
    assert facts["training"]["sessions"] == [0, 2] and same(whole, folder)


def test_a_run_that_died_while_writing_only_writes(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_facts, whole = adapt(home, tmp_path / "whole")

    def dies(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("rankfold.adapt.job.write_form", dies)
        with pytest.raises(OSError, match="disk full"):
            adapt(home, tmp_path / "out")
    facts, folder = adapt(home, tmp_path / "out")
    assert facts["metrics"] == whole_facts["metrics"] and same(whole, folder)


@pytest.mark.parametrize("recipe", [recipes.svd, recipes.rocket], ids=["low rank", "codes"])
def test_a_compressed_model(
    recipe: Any, home: Path, tmp_path: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_llama()
    batches = [{"input_ids": windows(8, 3)}] if recipe.metric.needs_data else None
    factorize_(model, recipe, budget=0.7, batches=batches)
    save(model, tmp_path / "small", tokenizer=tiny_tokenizer)
    small = str(tmp_path / "small")
    facts, folder = adapt(home, tmp_path / "out", model=small, lr=5e-3)
    first = next(t for key, t in model.state_dict().items() if "q_proj" in key)
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert any(torch.equal(first, t) for key, t in state.items() if "q_proj.weight.terms.0" in key)
    assert facts["trained"]["others"] == 0
    if recipe is recipes.svd:
        _, merged = adapt(home, tmp_path / "merged", model=small, lr=5e-3, merge=True)
        ids = windows(4, 1)
        both = [perplexity(AutoModelForCausalLM.from_pretrained(path), ids) for path in (folder, merged)]
        assert both[0] == pytest.approx(both[1], rel=1e-4)
    else:
        with pytest.raises(ValueError, match=r"--merge: layer .* no exact merged form; leave out --merge"):
            adapt(home, tmp_path / "merged", model=small, merge=True)
        assert not (tmp_path / "merged.run").exists()


def test_the_loss_of_a_chat_falls_on_answers_alone(home: Path, chatty: Any) -> None:
    rows, cut, out = encode_chat(str(home / "chats.jsonl"), chatty, 32)
    assert (cut, out, len(rows)) == (0, 0, 24)
    first = json.loads((home / "chats.jsonl").read_text().splitlines()[0])["messages"]
    taught = [i for i, mine in zip(rows[0].ids, rows[0].answer, strict=True) if mine]
    assert chatty.decode(taught) == f"{first[1]['content']} </s> {first[3]['content']} </s>"
    batch = Padded(1)(rows[:2])
    assert int((batch["labels"] != IGNORED).sum()) == 8 and batch["attention_mask"].sum() == sum(
        len(row.ids) for row in rows[:2]
    )
    _, cut, out = encode_chat(str(home / "chats.jsonl"), chatty, 12)
    assert (cut, out) == (24, 0)
    with pytest.raises(ValueError, match="no answer begins within --length 4"):
        encode_chat(str(home / "chats.jsonl"), chatty, 4)


def test_padding_and_batches_do_not_change_the_loss_of_answers(
    home: Path, chatty: Any, tiny_llama: Callable[..., Any]
) -> None:
    rows, _, _ = encode_chat(str(home / "more.jsonl"), chatty, 32)
    rows = [*rows[:3], *encode_chat(str(home / "more.jsonl"), chatty, 12)[0][:2]]
    model = tiny_llama()
    one, all_ = (answer_loss(model, rows, Padded(1), size) for size in (1, 5))
    assert one == pytest.approx(all_, rel=1e-5)


def test_chat(home: Path, chatty: Any, tmp_path: Path) -> None:
    data = {"data": [str(home / "chats.jsonl")], "test": [str(home / "more.jsonl")], "tokens": None}
    facts, _ = adapt(home, tmp_path / "out", model=str(home / "chat"), epochs=4, length=32, lr=2e-2, **data)
    kept = facts["data"]["conversations"]
    assert facts["training"]["steps"] == 2 * kept and kept + facts["data"]["held_out_conversations"] == 24
    found = facts["metrics"][str(home / "more.jsonl")]
    assert found["after"]["perplexity"] < found["before"]["perplexity"] / 2


def test_a_template_that_rewrites_earlier_turns_is_refused(home: Path, chatty: Any) -> None:
    chatty.chat_template = "{% for m in messages %}{{ m['content'] if loop.last else '' }} {% endfor %}"
    with pytest.raises(ValueError, match="line 1: the chat template writes earlier turns otherwise"):
        encode_chat(str(home / "chats.jsonl"), chatty, 32)


@pytest.mark.slow
def test_sixteen_bits(
    home: Path, tmp_path: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    """Adapters of a bfloat16 base are float32 beside it; what trains itself trains in float32."""
    from transformers import AutoModelForCausalLM

    tiny_llama().to(torch.bfloat16).save_pretrained(home / "half")
    tiny_tokenizer.save_pretrained(home / "half")
    _, folder = adapt(home, tmp_path / "out", model=str(home / "half"))
    kinds = {key.rpartition("q_proj.")[2]: t.dtype for key, t in _tensors(folder).items() if "q_proj" in key}
    assert set(kinds.values()) == {torch.bfloat16, torch.float32}
    assert AutoModelForCausalLM.from_pretrained(folder) is not None
    facts, _ = adapt(home, tmp_path / "full", "full", model=str(home / "half"))
    assert "trains in float32" in facts["warnings"][0]


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from toy_adapt import tensors

    return tensors(folder)
