"""Training HOLa, small: what a run leaves, that a stopped run goes on the same, and that it can learn."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_hoi import UNSEEN, drawn, quiet, run
from safetensors.torch import load_file
from toy_hoi import needs_consnet, table, texts, unit

from rankfold.hoi.build import Choice
from rankfold.hoi.facts import read_facts, split_of
from rankfold.hoi.model import HolaModel
from rankfold.hoi.scoring import score
from rankfold.hoi.settings import Training
from rankfold.hoi.text_file import save_features
from rankfold.hoi.trainer import epochs_of
from rankfold.pretrain.trainer import Stopped


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn(tmp_path_factory.mktemp("home") / "data")


@pytest.fixture(scope="module")
def done(data: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """One finished run: its folder, what hoi.json says, what it said."""
    said: list[str] = []
    facts, folder = run(data, data.parent / "done", say=said.append)
    return folder, facts, said


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, two: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_a_folder_that_needs_nothing_else_is_left(done: tuple[Path, dict[str, Any], list[str]]) -> None:
    folder, facts, said = done
    model = HolaModel.from_pretrained(folder)
    assert model.table.hash == table().hash and not model.training
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "model.safetensors", "text.safetensors", "hoi.json", "report.html")
    }
    assert not folder.with_name("done.run").exists()
    assert json.loads((folder / "hoi.json").read_text()) == json.loads(json.dumps(facts))
    assert [words.split(":")[0] for words in said] == ["epoch 1", "epoch 2", "test"]
    found = split_of(read_facts(folder), model.table)
    assert found.unseen == tuple(UNSEEN) and found.unseen_verbs == (table().verbs.index("hug"),)
    assert "no hug" in (folder / "report.html").read_text()


def test_hoi_json_says_what_was_done(data: Path, done: tuple[Path, dict[str, Any], list[str]]) -> None:
    _, facts, _ = done
    assert facts["data"]["train"]["images"] == 7 and facts["data"]["test"]["images"] == 4
    assert facts["trained_on"]["images"] <= 7 and facts["training"]["steps"] == 2 * math.ceil(
        facts["trained_on"]["images"] / 3
    )
    held = json.loads((data / "instances_train2015.json").read_text())["annotation"]
    left = [[i for i in image["hoi"] if i not in UNSEEN] for image in held]
    assert facts["trained_on"] == {"images": sum(map(bool, left)), "pairs": sum(map(len, left))}
    first, second = facts["training"]["epochs"]
    for row in (first, second):
        assert math.isclose(row["loss"], sum(row["parts"].values()), rel_tol=1e-4)
    means = facts["metrics"]["test"]["mAP"]
    assert means["full"] is not None and means["seen"] is not None
    assert facts["model"]["trained"] < facts["model"]["parameters"] and facts["versions"]["torch"]


def test_only_what_is_to_train_has_changed(data: Path, done: tuple[Path, dict[str, Any], list[str]]) -> None:
    folder = done[0]
    _, other = run(data, data.parent / "longer", epochs=3, score=False)
    one, two = weights(folder), weights(other)
    moved = {name for name in one if not torch.equal(one[name], two[name])}
    assert moved and not any(".tower." in name or ".projection." in name for name in moved)
    texts = ("language.decomposition.target", "language.objects")
    assert not any(name.startswith(texts) for name in moved)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    data: Path, done: tuple[Path, dict[str, Any], list[str]]
) -> None:
    torch.manual_seed(5)
    run(data, data.parent / "again", score=False)
    assert same(done[0], data.parent / "again")
    run(data, data.parent / "other", score=False, seed=1)
    assert not same(done[0], data.parent / "other")


def test_a_run_that_is_stopped_goes_on_to_the_same_bytes(
    data: Path, done: tuple[Path, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    def stop(words: str) -> None:
        if words.startswith("epoch 1:"):
            os.kill(os.getpid(), signal.SIGTERM)

    out = tmp_path / "out"
    with pytest.raises(Stopped, match="the same command goes on"):
        run(data, out, say=stop)
    assert not out.exists() and list(tmp_path.glob("out.run/checkpoint-*"))
    with pytest.raises(ValueError, match=r"training\.lr: 0\.001 -> 0\.1"):
        run(data, out, lr=0.1)
    with pytest.raises(ValueError, match=r"losses\.sem: 150\.0 -> 0"):
        run(data, out, weights={"sem": 0.0})
    said: list[str] = []
    facts, folder = run(data, out, resume=True, say=said.append)
    assert said[0].startswith("going on from") and len(facts["training"]["sessions"]) == 2
    assert same(folder, done[0])
    assert facts["training"]["epochs"] == done[1]["training"]["epochs"]
    with pytest.raises(ValueError, match="there is no run"):
        run(data, out, resume=True, overwrite=True)


def test_a_run_on_other_data_is_not_gone_on_with(data: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "data"))

    def stop(words: str) -> None:
        if words.startswith("epoch 1:"):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        run(copy, tmp_path / "out", say=stop)
    path = copy / "instances_train2015.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(ValueError, match=r"differs from this one \(data\.annotations"):
        run(copy, tmp_path / "out")
    shutil.copy(data / path.name, path)
    save_features(replace(texts(seed=5), hash="other"), copy / "text.safetensors")
    with pytest.raises(ValueError, match=r"differs from this one \(data\.texts"):
        run(copy, tmp_path / "out")


def test_a_loss_that_is_no_number_stops_the_run(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"diverged: .*Lower --lr"):
        run(data, tmp_path / "out", lr=1e30, clip=0.0, epochs=8)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["free", "frozen"])
def test_other_forms_of_the_texts_train(form: str, data: Path, tmp_path: Path) -> None:
    facts, _ = run(data, tmp_path / "out", set=(f"form={form}",), score=False, epochs=1)
    assert set(facts["training"]["epochs"][0]["parts"]) == {"interaction", "sem"}
    assert facts["training"]["residual"] is None


def test_upstream_switches_every_departure(data: Path, tmp_path: Path) -> None:
    facts, folder = run(data, tmp_path / "out", choice={"upstream": True}, epochs=1, score=False)
    assert facts["losses"]["clamped"] is False and facts["losses"]["last_image"] is True
    config = HolaModel.from_pretrained(folder).config
    assert (config.init, config.count, config.dead) == ("upstream", "all", True)
    described, _ = run(data, tmp_path / "two", epochs=1, score=False)
    assert facts["model"]["trained"] > described["model"]["trained"]


def test_the_rate_falls_once_and_batches_are_accumulated(data: Path, tmp_path: Path) -> None:
    facts, _ = run(
        data, tmp_path / "out", epochs=4, drop=4, batch_size=1, accumulate=2, score=False, keep_run=True
    )
    images = facts["trained_on"]["images"]
    assert facts["training"]["steps"] == math.ceil(4 * images / 2)
    rates = {}
    for path in (tmp_path / "out.run").glob("checkpoint-*"):
        step = int(path.name.split("-")[1])
        [rate] = torch.load(path / "scheduler.pt", weights_only=True)["_last_lr"]
        assert rate == pytest.approx(1e-4 if 2 * step // images >= 4 else 1e-3)
        rates[step] = rate
    assert len(set(rates.values())) == 2  # the last two, with the rate of the next step


def test_epochs_are_counted_in_images() -> None:
    log = [{"step": n, "step_loss": float(n), "parts": {"interaction": float(n)}} for n in range(1, 7)]
    rows = epochs_of(log, per_epoch=4, accumulate=2)  # two steps an epoch
    assert [row["loss"] for row in rows] == [1.5, 3.5, 5.5]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert Training(epochs=3).drop == 10


def test_eval_of_the_folder_gives_what_training_found(
    data: Path, done: tuple[Path, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    folder, facts, _ = done
    file, page = tmp_path / "p.safetensors", tmp_path / "p.html"
    found, held = score(str(folder), str(data), save=str(file), html=str(page), device="cpu", progress=quiet)
    assert found.to_json()["mAP"] == facts["metrics"]["test"]["mAP"] and len(held) == 4
    assert file.is_file() and "taken for" in page.read_text()
    seen, few = score(
        str(folder), str(data), part="train", seen_images=True, device="cpu", progress=quiet, batch_size=2
    )
    assert seen.images == len(few) == facts["trained_on"]["images"] and seen.unseen is None


def test_texts_of_another_width_are_refused_before_anything_is_trained(data: Path, tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    kind = CLIPVisionConfig(**sizes, image_size=32, patch_size=16, projection_dim=24)
    CLIPVisionModelWithProjection(kind).save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"width 16, image features of .*clip 24"):
        run(data, tmp_path / "out", choice={"vision": str(tmp_path / "clip")})
    assert not (tmp_path / "out").exists()
    kind.projection_dim = 16
    CLIPVisionModelWithProjection(kind).save_pretrained(tmp_path / "fits")
    facts, _ = run(data, tmp_path / "out", choice={"vision": str(tmp_path / "fits")}, epochs=1, score=False)
    assert facts["model"]["vision"].endswith("fits")


@needs_consnet
def test_a_step_of_the_real_setting_with_twenty_verbs_without_examples() -> None:
    """Trap 20, with the 600 classes: two scenes of seen classes, and everything stays a number."""
    from rankfold.hoi.build import build
    from rankfold.hoi.classes import from_consnet
    from rankfold.hoi.regime import HolaRegime
    from rankfold.hoi.splits import split
    from rankfold.hoi.text import TextFeatures

    classes = from_consnet()
    hidden = split(classes, "UV")
    assert len(hidden.unseen_verbs) == 20
    text = TextFeatures(
        unit(600, 16),
        unit(117, 16, seed=1),
        unit(81, 16, seed=2),
        tuple(unit(2, 16, seed=i) for i in range(80)),
    )
    net = build(Choice(settings=("rank=12",)), text, classes, query_width=8, seed=0).train()
    regime = HolaRegime(hidden.unseen)
    regime.start_(net)
    seen = hidden.seen[0]
    thing = classes.interactions[seen][1]
    boxes = torch.tensor([[4.0, 4, 30, 60], [20.0, 20, 60, 60]])[None]
    batch = {
        "pixel_values": torch.randn(1, 3, 64, 64),
        "boxes": boxes,
        "scores": torch.tensor([[0.9, 0.8]]),
        "labels": torch.tensor([[classes.human, thing]]),
        "queries": torch.randn(1, 2, 8),
        "counts": torch.tensor([2]),
        "gt_boxes_h": boxes[:, :1],
        "gt_boxes_o": boxes[:, 1:],
        "gt_interactions": torch.tensor([[seen]]),
    }
    loss, parts = regime.loss(net, batch)
    loss.backward()
    assert math.isfinite(float(loss.detach())) and float(parts["interaction"]) > 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    rows = dict(net.named_parameters())["language.decomposition.classes.left.weight"].grad
    assert rows is not None and rows[list(hidden.unseen)].isfinite().all()
