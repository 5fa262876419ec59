"""`rankfold hoi` at the command line: what it prints, and bad input, refused before anything is trained."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_hoi import FAST, drawn
from PIL import Image
from toy_hoi import table, texts
from typer.testing import CliRunner, Result

from rankfold.cli import app
from rankfold.hoi.annotations import Annotations
from rankfold.hoi.detection_file import DetectionFile, write_detections
from rankfold.hoi.detections import none_found
from rankfold.hoi.folder import TEXT
from rankfold.hoi.hicodet import write_hicodet
from rankfold.hoi.text_file import save_features

IMAGES = "hico_20160224_det/images"
UNSEEN = "--setting mine --unseen {data}/unseen.json"


def call(words: str) -> Result:
    return CliRunner().invoke(app, ["hoi", *shlex.split(words)])


def message(said: Result) -> str:
    assert said.exit_code == 2, said.output
    last = said.stderr.strip().split("rankfold: ")[-1]
    assert "\n" not in last
    return last


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn(tmp_path_factory.mktemp("home") / "data", images=5, test_images=2)


@pytest.fixture(scope="module")
def model(data: Path) -> Path:
    """A trained folder."""
    out = data.parent / "model"
    said = call(f"train {data} {out} {UNSEEN.format(data=data)} --epochs 1 --device cpu")
    assert said.exit_code == 0, said.output
    assert ("mAP, 11-point" in said.stdout and "harmonic mean" in said.stdout) or "seen" in said.stdout
    assert "setting: mine: unseen 2, unseen verbs 1" in said.stdout
    assert f"options of {data}/settings.json" in said.stderr and "epoch 1: loss" in said.stderr
    return out


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> Path:
    """The data set, to be damaged."""
    return Path(shutil.copytree(data, tmp_path / "data"))


def test_synthetic_writes_what_the_others_read(tmp_path: Path) -> None:
    classes, text = tmp_path / "classes.json", tmp_path / "text.safetensors"
    write_hicodet(classes, Annotations(table(), [], "x"))
    save_features(texts(), text)
    words = (
        f"synthetic {tmp_path}/d --images 3 --test-images 2 --size 64x48 --classes {classes} --text {text}"
    )
    said = call(words)
    assert said.exit_code == 0, said.output
    assert "3 and 2 images, 10 interactions of 6 verbs and 4 objects" in said.stderr
    there = {path.name for path in (tmp_path / "d").iterdir()}
    assert {"settings.json", TEXT, "instances_train2015.json", "detections_test.safetensors"} <= there
    assert message(call(words)).startswith(f"{tmp_path}/d exists and is not empty")
    body = json.loads(call(f"{words} --overwrite --json").stdout)
    assert body["interactions"] == 10 and body["width"] == 16
    assert "--size '64'" in message(call(f"synthetic {tmp_path}/e --size 64"))
    assert "at least 48 x 48" in message(call(f"synthetic {tmp_path}/e --size 9x9"))
    assert "--images 0" in message(call(f"synthetic {tmp_path}/e --images 0"))
    assert not (tmp_path / "e").exists()


def test_eval_predict_visualise(model: Path, data: Path, tmp_path: Path) -> None:
    said = call(f"eval {model} {data} --device cpu --html {tmp_path}/e.html --save {tmp_path}/p.safetensors")
    assert said.exit_code == 0 and "mAP, 11-point" in said.stdout, said.output
    assert (tmp_path / "e.html").is_file() and (tmp_path / "p.safetensors").is_file()
    body = json.loads(call(f"eval {model} {data} --points all --device cpu --json").stdout)
    assert body["points"] == "all" and body["images"] == 2 and len(body["ap"]) == 10
    folder = data / IMAGES / "test2015"
    first, second = sorted(folder.iterdir())
    said = call(f"predict {model} {first} {second} --top 3 --device cpu")
    rows = [line.split("\t") for line in said.stdout.splitlines()]
    assert said.exit_code == 0 and len(rows) == 6, said.output
    assert {row[1] for row in rows} <= set(table().verbs) and rows[0][-1] == str(first)
    body = json.loads(call(f"predict {model} {first} --top 3 --device cpu --json").stdout)
    scores = [one["score"] for one in body["images"][0]["triplets"]]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    said = call(f"visualise {model} {data} --limit 1 --out {tmp_path}/v.html --device cpu")
    assert said.exit_code == 0 and "1 images" in said.stderr, said.output
    assert "annotated" in (tmp_path / "v.html").read_text()
    said = call(f"visualise {model} {first} --out {tmp_path}/v.png --top 2 --device cpu")
    assert said.exit_code == 0, said.output
    with Image.open(tmp_path / "v.png") as picture:
        assert max(picture.size) >= 720
    assert "a picture holds one image" in message(call(f"visualise {model} {data} --out {tmp_path}/v.jpg"))
    assert "--out x.gif" in message(call(f"visualise {model} {first} --out x.gif"))


def test_predict_refuses_what_it_cannot_look_at(model: Path, data: Path, tmp_path: Path) -> None:
    first = min((data / IMAGES / "test2015").iterdir())
    Image.new("RGB", (64, 48)).save(tmp_path / "other.png")
    shutil.copy(tmp_path / "other.png", tmp_path / first.name)
    (tmp_path / "none.png").write_bytes(b"none")
    for words, part in {
        f"{tmp_path}/other.png": "no detections of other.png",
        f"{tmp_path}/missing.png": f"no image {tmp_path}/missing.png",
        f"{tmp_path}/none.png": "none.png cannot be read as an image",
        f"{first} --top 0": "--top 0",
        f"{first} --detector {tmp_path}": "no detector",
        f"{first} --detector a --detections b": "one of them",
        f"{first} --detections {tmp_path}/none.png": "is damaged",
        f"{first} --device tpu": "--device 'tpu'",
    }.items():
        assert part in message(call(f"predict {model} {words}")), words
    assert "hoi.json cannot be read" in message(call(f"predict {data} {first}"))
    Image.new("RGB", (10, 10)).save(tmp_path / first.name)
    assert "10 x 10 pixels" in message(call(f"predict {model} {tmp_path / first.name}"))


def test_an_image_without_a_person_has_no_triplet(model: Path, copy: Path) -> None:
    """And one detection alone makes no pair: nothing is predicted, in training nothing is learned of it."""
    held = DetectionFile(copy / "detections_train.safetensors", table())
    rows = []
    for place, (name, size) in enumerate(zip(held.filenames, held.sizes, strict=True)):
        found = held[name]
        if place == 0:
            found = found.take(found.labels != table().human)
        if place == 1:
            found = found.take(torch.tensor([0]))
        if place == 2:
            found = none_found()
        rows.append((name, size, found))
    del held
    write_detections(copy / "detections_train.safetensors", rows, table(), "annotations", None)
    out = copy.parent / "out"
    said = call(f"train {copy} {out} --epochs 1 --batch-size 1 --no-evaluate --device cpu")
    assert said.exit_code == 0, said.output
    names = " ".join(str(copy / IMAGES / "train2015" / name) for name, _, _ in rows[:3])
    said = call(f"predict {out} {names} --device cpu")
    assert said.exit_code == 0 and said.stdout.count("no person with another thing") == 3, said.output
    body = json.loads(call(f"eval {out} {copy} --part train --device cpu --json").stdout)
    assert body["images"] == 5 and body["mAP"]["full"] is not None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--setting UV", "defined for HICO-DET"),
        ("--setting RF-UC", "comes with the data"),
        ("--setting mine", "no setting 'mine'"),
        ("--unseen none.json", "none.json cannot be read"),
        ("--config none.json", "no settings none.json"),
        ("--vision nowhere/nothing", "no image encoder 'nowhere/nothing'"),
        ("--text none.safetensors", "none.safetensors is no file"),
        ("--text nowhere/nothing", "no text encoder 'nowhere/nothing'"),
        ("--text t.safetensors --descriptions d.json", "are made already"),
        ("--descriptions none.json", "none.json is no file"),
        ("--set rank=0", "rank"),
        ("--set rank=99", "--set rank=99"),
        ("--set rnk=3", "Did you mean 'rank'"),
        ("--set rank", "write KEY=VALUE"),
        ("--set classes=1", "decided by the data"),
        ("--set form=other", "form='other'"),
        ("--weight sem", "write TERM=NUMBER"),
        ("--weight sem=x", "--weight sem='x'"),
        ("--weight sme=1", "did you mean 'sem'"),
        ("--weight sem=-1", "loss sem=-1"),
        ("--epochs 0", "--epochs 0"),
        ("--lr nan", "--lr nan"),
        ("--batch-size 0", "--batch-size 0"),
        ("--accumulate 0", "--accumulate 0"),
        ("--drop -1", "--drop -1"),
        ("--clip -1", "--clip -1"),
        ("--seed -1", "--seed -1"),
        ("--workers -1", "--workers -1"),
        ("--images none", "none is no folder"),
        ("--annotations none.json", "none.json is no file"),
        ("--detections none", "no detections none"),
        ("--detector nowhere/nothing", "no detector 'nowhere/nothing'"),
        ("--resume --restart", "one of them"),
        ("--resume", "there is no run"),
        ("--device tpu", "--device 'tpu'"),
        ("--points 12", "12"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(words: str, said: str, data: Path, tmp_path: Path) -> None:
    found = call(f"train {data} {tmp_path}/out --device cpu {words}")
    assert said in message(found)
    assert not list(tmp_path.iterdir())


def test_a_data_folder_that_is_none(model: Path, tmp_path: Path) -> None:
    for words in ("train {} {}/out", "eval " + str(model) + " {}", "detect {}"):
        assert "no data folder" in message(call(words.format(tmp_path / "none", tmp_path)))
    assert "has no instances_train2015.json or" in message(call(f"train {tmp_path} {tmp_path}/out"))
    assert "no part 'val'" in message(call(f"detect {tmp_path} --part val"))


def test_detect_makes_what_training_reads(data: Path, tmp_path: Path) -> None:
    """A detector of random weights: its detections are nonsense, and the whole path holds."""
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig
    from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil

    torch.manual_seed(0)
    body: dict[str, Any] = {"hidden_sizes": [8, 8, 8, 16], "depths": [1] * 4, "out_features": ["stage4"]}
    sizes: dict[str, Any] = {
        f"{side}_{name}": size
        for side in ("encoder", "decoder")
        for name, size in (("layers", 1), ("ffn_dim", 8), ("attention_heads", 2))
    }
    kind = DetrConfig(
        backbone_config=ResNetConfig(embedding_size=8, layer_type="basic", **body),
        d_model=16,
        num_queries=12,
        id2label=dict(enumerate(table().objects)),
        **sizes,
    )
    DetrForObjectDetection(kind).save_pretrained(tmp_path / "detr")
    DetrImageProcessorPil(size={"shortest_edge": 48, "longest_edge": 64}).save_pretrained(tmp_path / "detr")
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    assert "exists: --overwrite" in message(call(f"detect {copy} --detector {tmp_path}/detr"))
    said = call(f"detect {copy} --detector {tmp_path}/detr --overwrite --score 0 --device cpu --json")
    assert said.exit_code == 0, said.output
    files = json.loads(said.stdout)["files"]
    assert [Path(file).name for file in files] == [
        "detections_train.safetensors",
        "detections_test.safetensors",
    ]
    assert DetectionFile(files[0], table()).width == 16
    out = tmp_path / "out"
    said = call(f"train {copy} {out} --epochs 1 --device cpu")
    assert said.exit_code == 0, said.output
    Image.effect_noise((70, 50), 40).save(tmp_path / "any.png")
    found = call(f"predict {out} {tmp_path}/any.png --device cpu")  # hoi.json knows the detector
    assert found.exit_code == 0 and found.stdout.strip(), found.output
    looked = call(f"train {copy} {tmp_path}/two --epochs 1 --device cpu --detector {tmp_path}/detr")
    assert looked.exit_code == 0, looked.output
    assert json.loads((tmp_path / "two/hoi.json").read_text())["data"]["train"]["detections"] is None
    words = f"eval {out} {data} --device cpu"
    assert "queries of 256 numbers, the model expects 16" in message(call(words))
    assert call(f"{words} --detector {tmp_path}/detr").exit_code == 0
    assert "--workers 1" in message(call(f"{words} --detector {tmp_path}/detr --workers 1"))


def test_the_fast_settings_are_those_of_the_toy(data: Path) -> None:
    held = json.loads((data / "settings.json").read_text())
    assert held["epochs"] == FAST["epochs"] and held["set"]["rank"] == 6
