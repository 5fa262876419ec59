"""Images: what can be read, what is refused and where, what is held out, packaged sets."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from toy_images import blob, photos, picture, read

from rankfold.classify.examples import held_out, warnings_of
from rankfold.data_images import folder, idx, packaged_images


def test_a_folder_a_table_and_a_saved_set_are_the_same(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    photos(tmp_path / "photos", 3)
    (tmp_path / "photos" / "red" / "notes.txt").write_text("x")
    (tmp_path / "photos" / ".DS_Store").write_text("x")
    found = read(tmp_path / "photos")
    assert found.labels == ["green"] * 3 + ["red"] * 3 and len(found) == 6
    assert found.at(4) == f"'{tmp_path / 'photos' / 'red' / '001.png'}'"
    assert found.warnings == [f"left out, as no image: '{tmp_path / 'photos' / 'red' / 'notes.txt'}'"]
    rows = [("red", at) for at in range(3)] + [("green", at) for at in range(3)]
    lines = [f"photos/{label}/{at:03}.png,{label}" for label, at in rows]
    (tmp_path / "list.csv").write_text("file,label\n" + "\n".join(lines))
    table = read(tmp_path / "list.csv", image_column="file")
    assert sorted(table.texts) == sorted(found.texts) and table.at(1).startswith(
        f"'{tmp_path / 'list.csv'}', line 3"
    )
    objects = [{"image": f"photos/{label}/{at:03}.png", "kind": label} for label, at in rows]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, objects)))
    assert read(tmp_path / "list.jsonl", label_column="kind").hash == table.hash
    features = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(names=["red", "green"]))
    files = [str(tmp_path / "photos" / label / f"{at:03}.png") for label, at in rows]
    made = datasets.Dataset.from_dict({"img": files, "label": [0] * 3 + [1] * 3}, features)
    datasets.DatasetDict(train=made).save_to_disk(tmp_path / "saved")
    saved = read(f"{tmp_path / 'saved'}:train")
    assert saved.hash == table.hash and saved.names == ["red", "green"]
    assert np.array_equal(np.asarray(saved.open(5, 3)), np.asarray(table.open(5, 3)))
    with pytest.raises(
        ValueError, match=r"'label' is no column of images; those are 'img'. .*--image-column"
    ):
        read(f"{tmp_path / 'saved'}:train", image_column="label")
    with pytest.raises(ValueError, match=r"no column 'kind'; it has 'img', 'label'"):
        read(f"{tmp_path / 'saved'}:train", label_column="kind")
    with pytest.raises(ValueError, match="it has the splits train"):
        read(f"{tmp_path / 'saved'}:test")


def test_what_is_held_out_depends_on_the_images_alone(tmp_path: Path) -> None:
    photos(tmp_path / "one", 10)
    found = read(tmp_path / "one")
    train, held = held_out(found, 0.2)
    assert held.labels == ["green"] * 2 + ["red"] * 2 and not set(train.texts) & set(held.texts)
    for path in (tmp_path / "one").rglob("*.png"):  # other names, another order
        path.rename(path.with_name(f"{999 - int(path.stem):03}.png"))
    again: Any = held_out(read(tmp_path / "one"), 0.2)[1]
    assert set(again.texts) == set(held.texts)
    assert (
        "20 of the 20 images of the test data are in the training data too"
        in warnings_of(found, {"test": found})[0]
    )


def spoil(home: Path, how: str) -> Path:
    """A folder of photos with one thing wrong."""
    photos(home, 2, suffix="jpg")
    file = home / "red" / "001.jpg"
    if how == "empty":
        file.write_bytes(b"")
    elif how == "text":
        file.write_text("<html>not found</html>")
    elif how == "cut":
        picture(0, 1, 200, 200).save(file)
        file.write_bytes(file.read_bytes()[:-2000])
    elif how == "checksum":
        held = bytearray(blob(picture(0, 1)))
        held[60] ^= 255
        file.with_suffix(".png").write_bytes(held)
    elif how == "float":
        Image.fromarray(np.ones((4, 4), np.float32)).save(file.with_suffix(".tif"))
    elif how == "class":
        (home / "blue").mkdir()
    elif how == "stray":
        picture(0, 0).save(home / "loose.png")
    elif how == "flat":
        return home / "red"
    elif how == "splits":
        photos(home / "more" / "train", 1)
        photos(home / "more" / "test", 1)
        return home / "more"
    return home


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("empty", r"red.001\.jpg': the file is empty; mend it, or take it out"),
        ("text", r"red.001\.jpg': it is no picture of a kind that is read here \(JPEG, PNG"),
        ("cut", r"red.001\.jpg': it is damaged or cut short \(.*truncated"),
        ("checksum", r"red.001\.png': it is damaged or cut short"),
        ("class", r"class folder '.*blue' has no image in it \(\.jpg"),
        ("stray", r"loose\.png' lies beside the class folders"),
        ("flat", r"red' has no class folders in it: it should hold .*red/CLASS/IMAGE"),
        ("splits", r"more' holds splits, not classes \(test, train\): name one, such as .*more:test"),
    ],
)
def test_what_is_wrong_is_named(how: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read(spoil(tmp_path / "photos", how))


@pytest.mark.parametrize(
    ("spec", "body", "message"),
    [
        ("x.csv", "image,label\ngone.png,a\n", r"x\.csv', line 2, 'gone\.png': there is no such file"),
        ("x.csv", "image,label\n,a\n", "line 2: the path of the image is empty"),
        ("x.csv", "path,label\na.png,a\n", "column 'image' is not there; .* Name one with --image-column"),
        ("x.csv:train", "image,label\n", "has no splits, but 'train'"),
        ("x.txt", "x", r"images are listed in \.csv"),
        ("y.csv", None, "no file '.*y.csv'"),
        ("fotos/", None, "no folder '.*fotos/'"),
        ("fashoin:train", None, "Did you mean 'fashion'"),
        ("fashion:dev", None, "'fashion' has no split 'dev': choose"),
        ("movie:train", None, "'movie' is text, and the model reads images"),
        ("digits:train:3x4", None, r"images have not: leave out ':3x4' \(--per-class"),
    ],
)
def test_names_that_cannot_be_read(spec: str, body: str | None, message: str, tmp_path: Path) -> None:
    if body is not None:
        (tmp_path / spec.partition(":")[0]).write_text(body)
    with pytest.raises(ValueError, match=message):
        read(spec if spec.startswith(("fash", "movie", "digits")) else str(tmp_path) + "/" + spec)


def test_packaged_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    even, odd, whole = (packaged_images("digits", split) for split in ("test", "train", "all"))
    assert len(even.labels) + len(odd.labels) == len(whole.labels) == 1797
    counts = [[found.labels.count(str(digit)) for digit in range(10)] for found in (even, odd)]
    assert all(0 <= a - b <= 1 for a, b in zip(*counts, strict=True))
    first = whole.pictures.read(0)
    assert isinstance(first, np.ndarray) and first.dtype == np.uint8 and first.shape == (8, 8)
    assert max(int(whole.pictures.read(row).max()) for row in range(9)) == 255  # type: ignore[union-attr]
    monkeypatch.setenv("RANKFOLD_DATA", str(tmp_path))
    monkeypatch.setattr("rankfold.data_images._INSTALLED", tmp_path)
    with pytest.raises(ValueError, match="apt-get download dataset-fashion-mnist"):
        packaged_images("fashion")
    with pytest.raises(ValueError, match=r"conformal-clip-data==0\.1\.4"):
        packaged_images("textile")
    make_deb(tmp_path / "dataset-fashion-mnist_0_all.deb")
    found = packaged_images("fashion", "test")
    assert found.labels == ["Dress", "Sandal"] and np.array_equal(found.pictures.read(1), [[4, 5], [6, 7]])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is not an idx file"):
        packaged_images("fashion", "train")


def make_deb(path: Path) -> None:
    """A Debian package with the test half of a set of two images of 2 x 2."""
    import tarfile

    images = (2051).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in (2, 2, 2)) + bytes(range(8))
    labels = (2049).to_bytes(4, "big") + (2).to_bytes(4, "big") + bytes([3, 5])
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w:xz") as archive:
        for name, blob_ in (("t10k-images-idx3", images), ("t10k-labels-idx1", labels)):
            packed = gzip.compress(blob_)
            item = tarfile.TarInfo(f"./usr/share/datasets/fashion-mnist/{name}-ubyte.gz")
            item.size = len(packed)
            archive.addfile(item, io.BytesIO(packed))
    body = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0"), ("data.tar.xz", held.getvalue())):
        body += f"{name:<16}{0:<12}{0:<6}{0:<6}{644:<8}{len(content):<10}`\n".encode() + content
        body += b"\n" * (len(content) % 2)
    path.write_bytes(body)


@pytest.mark.parametrize(
    "blob_", [None, b"no gzip", gzip.compress(b"x" * 20)], ids=["none", "no gzip", "no idx"]
)
def test_an_idx_file_is_what_it_says(blob_: bytes | None) -> None:
    with pytest.raises(ValueError, match="labels is not an idx file"):
        idx(blob_, "labels")


def test_folders_below_a_class_are_part_of_it(tmp_path: Path) -> None:
    photos(tmp_path / "photos", 1)
    (tmp_path / "photos" / "red" / "more").mkdir()
    picture(1, 5).save(tmp_path / "photos" / "red" / "more" / "x.PNG")
    assert folder(tmp_path / "photos").labels == ["green", "red", "red"]
