"""Predictions on disk: what comes back, and which files are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from toy_hoi import table
from toy_hoi_pairs import H, T, annotations, predicted, random_set

from rankfold.hoi.classes import ClassTable
from rankfold.hoi.evaluation import evaluate
from rankfold.hoi.prediction_file import load_predictions, save_predictions

GOOD = (H, T, 0, 0.5)


def test_a_prediction_file_gives_back_rows_in_order(tmp_path: Path) -> None:
    scenes, predictions = random_set(1, images=12)
    truth = annotations(*scenes)
    path = save_predictions(iter(predictions), tmp_path / "new" / "p.safetensors", table(), {"split": "UV"})
    held = load_predictions(path, table())
    assert held.filenames == [one.filename for one in predictions] and held.facts == {"split": "UV"}
    for one, back in zip(predictions, held, strict=True):
        for name in ("boxes_h", "boxes_o", "interactions", "scores"):
            assert torch.equal(getattr(one, name), getattr(back, name)), name
    assert held[-1].filename == held.of(held.filenames[-1]).filename == predictions[-1].filename
    assert [one.filename for one in held[2:4]] == held.filenames[2:4]
    before, after = (evaluate(rows, truth).to_json() for rows in (predictions, held))
    assert before == after
    with pytest.raises(IndexError):
        held[12]
    with pytest.raises(ValueError, match="y is not among the 12 images"):
        held.of("y")
    assert len(load_predictions(save_predictions([], path, table()))) == 0


def test_bad_prediction_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    with pytest.raises(ValueError, match="is no file of predictions"):
        load_predictions(path)
    with pytest.raises(ValueError, match="a is predicted twice"):
        save_predictions([predicted("a"), predicted("a")], path, table())
    with pytest.raises(ValueError, match="predicted interaction 10"):
        save_predictions([predicted("a", (H, T, 10, 0.5))], path, table())
    assert not list(tmp_path.iterdir()), "nothing half written is left"
    save_predictions([predicted("a", GOOD)], path, table())
    known = table()
    other = ClassTable(known.verbs, (*known.objects[:3], "knife"), known.interactions)
    with pytest.raises(ValueError, match=r"class table of .*objects\[3\] is 'cup', expected 'knife'"):
        load_predictions(path, other)
    whole = path.read_bytes()
    for damaged, message in (
        (whole[:-1], "not a readable"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "damaged"),
        (whole.replace(b'\\"a\\"', b'\\"b\\"'), "damaged"),
        (b"not at all", "not a readable"),
    ):
        assert damaged != whole
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            load_predictions(path)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="does not hold rankfold predictions of format 1"):
        load_predictions(path)
