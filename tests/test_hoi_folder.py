"""What stands where in a data folder: HICO-DET's names, V-COCO's, and files that are named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from drawn_hoi import drawn
from PIL import Image
from toy_hoi import table

from rankfold.hoi.annotations import Annotations
from rankfold.hoi.folder import has_part, open_part
from rankfold.hoi.hicodet import read_hicodet, write_hicodet

IMAGES = "hico_20160224_det/images"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn(tmp_path_factory.mktemp("home") / "data", images=4, test_images=2)


def vcoco(folder: Path) -> Path:
    (folder / "mscoco2014/train2014").mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(folder / "mscoco2014/train2014/1.png")
    image = {
        "file_name": "1.png",
        "boxes_h": [[0, 0, 10, 20]],
        "boxes_o": [[5, 5, 15, 15]],
        "actions": [1],
        "objects": [2],
    }
    body = {
        "annotations": [image],
        "classes": ["hold obj", "drink instr"],
        "objects": ["background", "person", "cup"],
        "images": [1],
        "action_to_object": [[1, 2], [2]],
    }
    (folder / "instances_vcoco_trainval.json").write_text(json.dumps(body))
    return folder


def test_hicodet(data: Path) -> None:
    part = open_part(data, "train")
    assert len(part.annotations) == 4 and part.images == data / IMAGES / "train2015"
    assert part.detections == data / "detections_train.safetensors"
    assert has_part(data, "test") and not has_part(data / IMAGES, "test")
    assert part.annotations.table.rare == table().rare  # the file says which


def test_what_is_rare_is_counted_where_the_file_does_not_say(data: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    path = copy / "instances_train2015.json"
    held = read_hicodet(path)
    write_hicodet(path, Annotations(replace(held.table, rare=frozenset()), held.scenes, "x"))
    part = open_part(copy, "train")
    assert part.annotations.table.rare == frozenset(range(10))  # nobody has ten pairs among four images
    assert open_part(copy, "train", table=held.table).annotations.table.rare == held.table.rare


def test_vcoco(tmp_path: Path) -> None:
    part = open_part(vcoco(tmp_path), "train")
    [scene] = part.annotations.scenes
    assert scene.size == (40, 30) and part.annotations.table.name == "V-COCO"
    assert part.annotations.table.words(int(scene.interactions[0])) == "drink instr cup"
    assert not part.annotations.table.rare and not has_part(tmp_path, "test")


def test_files_that_are_named(data: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    vcoco(tmp_path / "v")
    for home, where, count in ((data, IMAGES + "/train2015", 4), (tmp_path / "v", "mscoco2014/train2014", 1)):
        [file] = home.glob("instances_*train*.json")
        found = open_part(
            tmp_path / "empty", "test", annotations=file, images=home / where, detections="d.safetensors"
        )
        assert len(found.annotations) == count and found.detections == Path("d.safetensors")
    with pytest.raises(ValueError, match="name their folder with --images"):
        open_part(tmp_path / "empty", "train", annotations=data / "instances_train2015.json")
    with pytest.raises(ValueError, match="no part 'val'; there are train, test"):
        open_part(data, "val")
    with pytest.raises(ValueError, match="disagrees"):
        open_part(vcoco(tmp_path / "w"), "train", table=table())
