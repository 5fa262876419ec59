"""Runs of `pretrain`, small: what they train, what they leave, how they are stopped and go on."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_pretrain import RANKS, RUN, config, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankfold.hosts import hosts
from rankfold.pretrain.model import build, override, read_config
from rankfold.pretrain.run import seal
from rankfold.pretrain.trainer import Stopped, validate
from rankfold.report import Report


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report, list[str]]:
    """One finished run of sltrain: its home, its report, what it said. The run's folder is kept."""
    home, said = tmp_path_factory.mktemp("home"), []
    report, _ = run(home, said=said, keep_run=True)
    assert report is not None
    return home, report, said


def test_an_ordinary_folder_is_left(done: tuple[Path, Report, list[str]]) -> None:
    home, report, said = done
    model = AutoModelForCausalLM.from_pretrained(home / "out")
    tokenizer = AutoTokenizer.from_pretrained(home / "out")
    assert len(tokenizer) == 300 == model.config.vocab_size and model.config.use_cache
    assert tokenizer.decode(tokenizer("a naïve\n test")["input_ids"]) == "a naïve\n test"
    assert len(hosts(model)) == 14 and {host.weight.kind for host in hosts(model).values()} == {"sum"}
    assert model.generate(**tokenizer("a", return_tensors="pt"), max_new_tokens=3).shape == (1, 4)
    assert json.loads((home / "out/config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id
    assert [line.split(":")[0] for line in said] == ["step 3", "step 6"]
    assert Report.load(home / "out").to_json() == report.to_json()


def test_the_report_tells_the_training(done: tuple[Path, Report, list[str]]) -> None:
    home, report, _ = done
    facts = report.training
    assert facts is not None and report.data is not None
    train, held = facts["train"], facts["validation"]
    assert [step for step, _ in train] == [1, 2, 3, 4, 5, 6] and [step for step, _ in held] == [3, 6]
    assert abs(train[0][1] - math.log(300)) < 0.1 and facts["perplexity"] == math.exp(held[-1][1])
    assert (
        facts["tokens"] == 6 * 2 * 16 and report.data["documents"] + report.data["validation_documents"] == 40
    )
    model = build(read_config(config(home)), 0, "meta")
    assert facts["params"]["dense"] == sum(p.numel() for p in model.parameters())
    memory = facts["memory"]["training"]
    assert memory["weights"] == 4 * facts["params"]["trained"] == memory["gradients"]
    assert memory["optimizer"] == 2 * memory["weights"]  # two moments
    places = sum(row.spec["terms"][1]["nonzeros"] for row in report.layers if row.spec)
    assert memory["indices"] == 4 * places
    for shown in (report.to_text(), report.to_html(), (home / "out/README.md").read_text()):
        assert ("Validation perplexity" in shown and "from scratch" in shown) or "Training" in shown
    assert "<polyline" in report.to_html() and report.to_html() == (home / "out/report.html").read_text()


def test_the_same_seed_gives_the_same_bytes(done: tuple[Path, Report, list[str]], tmp_path: Path) -> None:
    _, report, _ = done
    again, _ = run(tmp_path)
    assert again.training["train"] == report.training["train"]  # type: ignore[index]
    assert again.weights_hash == report.weights_hash
    assert not (tmp_path / "out.run").exists()  # nothing is left of a finished run


def test_a_finished_run_goes_on_to_its_end(done: tuple[Path, Report, list[str]]) -> None:
    home, report, _ = done  # as after a crash between training and writing
    again, _ = run(home, overwrite=True, keep_run=True)
    assert again.weights_hash == report.weights_hash
    assert again.training["train"] == report.training["train"]  # type: ignore[index]


KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}]
from pathlib import Path
from toy_pretrain import run

def say(words):
    if words.startswith("step 5:"):  # after the checkpoint of step 4
        os.kill(os.getpid(), signal.SIGKILL)

run(Path({home!r}), eval_every=5, say=say, **{more!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sltrain", "maestro", "trp"])
def test_a_killed_run_goes_on_to_the_same_losses(recipe: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {"recipe": recipe}
    if recipe != "sltrain":
        more["options"] = {"penalty": 1e-3, "every": 3}
    code = KILLED.format(tests=str(Path(__file__).parent), home=str(tmp_path), more=more)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == -signal.SIGKILL, found.stderr
    assert not (tmp_path / "out").exists()
    half = tmp_path / "out.run/checkpoint-6"  # and another one that was cut short
    half.mkdir()
    (half / "trainer_state.json").write_text("{")
    said: list[str] = []
    resumed, _ = run(tmp_path, eval_every=5, said=said, resume=True, **more)
    assert "checkpoint-4" in said[0]
    whole, _ = run(tmp_path, "whole", eval_every=5, **more)
    assert resumed.training["sessions"] == [0, 4]
    for which in ("train", "validation", "ranks"):
        assert resumed.training[which] == whole.training[which]
    assert resumed.weights_hash == whole.weights_hash


def interrupt(words: str) -> None:
    """Ctrl-C at the validation after step 3."""
    if words.startswith("step 3"):
        os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_stops_with_a_checkpoint(done: tuple[Path, Report, list[str]], tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match="stopped after step 4 of 6"):
        run(tmp_path, say=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    report, _ = run(tmp_path)
    whole = done[1].training
    assert whole is not None and report.training["sessions"] == [0, 4]
    assert report.training["train"] == whole["train"] and report.training["validation"] == whole["validation"]
    assert report.weights_hash == done[1].weights_hash
    with pytest.raises(ValueError, match="no run in"):
        run(tmp_path, "new", resume=True)


def test_another_run_in_the_folder_is_refused(done: tuple[Path, Report, list[str]], tmp_path: Path) -> None:
    home, _, _ = done
    texts = tmp_path / "notes.jsonl"
    for options, said in (
        ({"options": RANKS | {"rank": 5}}, "recipe.method.rank: 4 -> 5"),
        ({"steps": 8}, "training.steps: 6 -> 8"),
        ({"seed": 1}, "training.seed: 0 -> 1"),
        ({"sets": ["num_hidden_layers=1"]}, "model.num_hidden_layers: 2 -> 1"),
        ({"data": ["pydoc"]}, r"data.text.pydoc: null -> \"\w+\""),
    ):
        with pytest.raises(ValueError, match=said):
            run(home, overwrite=True, **options)
    for words in ("the first\n", "the second\n"):
        texts.write_text("".join(json.dumps({"text": words * 9 * i}) + "\n" for i in range(1, 60)))
        if words == "the first\n":
            with pytest.raises(Stopped):
                run(tmp_path, data=[str(texts)], say=interrupt)
    with pytest.raises(ValueError, match=r"notes.jsonl: \"\w+\" -> \"\w+\""):  # the same name, another text
        run(tmp_path, data=[str(texts)])
    assert run(tmp_path, data=[str(texts)], restart=True)[0].training["sessions"] == [0]


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"diverged: .* at step \d.*last good checkpoint is .*checkpoint-2"):
        run(tmp_path, "out", lr=1e30, clip=0.0, warmup=0.7, options=RANKS | {"init": "torch"}, steps=9)
    kept = tmp_path / "out.run/checkpoint-2"
    assert (kept / "model.safetensors").is_file() and not (tmp_path / "out").exists()


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("dense", "low_rank", "lrt", "trp")]


@pytest.mark.parametrize("recipe", ["maestro", *SLOW])
def test_every_recipe(recipe: str, tmp_path: Path) -> None:
    options = {
        "low_rank": {"rank": 0.5},
        "maestro": {"penalty": 1e-4, "every": 2},
        "trp": {"energy": 0.5, "every": 2},
    }
    report, folder = run(tmp_path, recipe=recipe, options=options.get(recipe, {}), steps=4)
    assert report.recipe["name"] == recipe and report.training["params"]["dense"] == 37_792
    model = AutoModelForCausalLM.from_pretrained(folder)
    small = report.training["params"]["trained"] < 37_792
    assert small == bool(hosts(model)) == (recipe in ("low_rank", "lrt", "trp"))
    assert sum(p.numel() for p in model.parameters()) == report.training["params"]["trained"]


@pytest.mark.slow
def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    one, _ = run(tmp_path, "one", batch_size=4, steps=3)
    two, _ = run(tmp_path, "two", batch_size=2, accumulate=2, steps=3)
    assert one.training["tokens"] == two.training["tokens"] == 3 * 4 * 16
    for (_, a), (_, b) in zip(one.training["train"], two.training["train"], strict=True):
        assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.slow
def test_memory_options(tmp_path: Path) -> None:
    whole, _ = run(tmp_path, "whole", steps=3, clip=0.0)
    layer, _ = run(tmp_path, "layer", steps=3, per_layer=True)
    assert layer.training["train"] == whole.training["train"]
    held = [report.training["memory"]["training"]["gradients"] for report in (whole, layer)]
    assert held[1] == 4 * 300 * 32 < held[0]  # the embedding alone
    spared, _ = run(tmp_path, "spared", steps=3, dtype="bfloat16", gradient_checkpointing=True)
    assert spared.dtype == "float32"
    for (_, a), (_, b) in zip(spared.training["train"], whole.training["train"], strict=True):
        assert a == pytest.approx(b, abs=0.05)


def test_sizes_that_are_set_take_along_what_follows_them(tmp_path: Path) -> None:
    from transformers import LlamaConfig, Qwen3Config

    wide = override(LlamaConfig(hidden_size=64, num_attention_heads=4), ["hidden_size=128"])
    assert wide.head_dim == 32 and wide.hidden_size == 128
    asked = override(LlamaConfig(hidden_size=64, num_attention_heads=4), ["hidden_size=128", "head_dim=16"])
    assert asked.head_dim == 16
    deep = override(Qwen3Config(num_hidden_layers=2), ["num_hidden_layers=3"])
    assert len(deep.layer_types) == 3
    same = LlamaConfig()
    assert override(same, []) is same


@pytest.mark.slow
def test_a_disk_that_is_full_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rankfold.pretrain import trainer

    def full(path: Path) -> None:
        if path.name == "checkpoint-4":
            raise OSError(28, "No space left on device")
        seal(path)

    monkeypatch.setattr(trainer, "seal", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path)
    monkeypatch.undo()
    left = sorted(path.name for path in (tmp_path / "out.run").glob("checkpoint-*"))
    assert left == ["checkpoint-2", "checkpoint-4"] and not (tmp_path / "out").exists()
    said: list[str] = []
    run(tmp_path, said=said)
    assert said[0].endswith("checkpoint-2")


def test_validation_is_the_mean_over_tokens(tmp_path: Path) -> None:
    model = build(read_config(config(tmp_path)), 0)
    windows = torch.randint(300, (5, 16))
    each = [float(model(input_ids=row[None], labels=row[None]).loss.detach()) for row in windows]
    for size in (1, 2, 5):  # batches of unequal sizes change nothing
        assert validate(model, windows, size) == pytest.approx(sum(each) / 5, abs=1e-5)


@pytest.mark.slow
def test_two_processes_share_a_run(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]\nfrom pathlib import Path\n"
        f"from toy_pretrain import run\nrun(Path({str(tmp_path)!r}), batch_size=1)\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(script)]
    found = subprocess.run(
        torchrun, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert found.returncode == 0, found.stderr[-3000:]
    two = Report.load(tmp_path / "out").training
    one, _ = run(tmp_path, "one", batch_size=RUN["batch_size"])
    assert two is not None and two["settings"]["processes"] == 2 and two["tokens"] == one.training["tokens"]
    for (_, a), (_, b) in zip(two["train"], one.training["train"], strict=True):
        assert a == pytest.approx(b, abs=1e-5)
