"""A detector of transformers, as a source of detections: on the fly, or once for a whole data set.

Made for DETR (`DetrForObjectDetection`): logits and boxes of each query, and the decoder's last states,
which the interaction model reads as query vectors. The processor is the one that needs no torchvision where
none is there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from rankfold.hoi.annotations import Annotations
from rankfold.hoi.classes import ClassTable
from rankfold.hoi.detection_file import write_detections
from rankfold.hoi.detections import Detections, Selection, columns_of, from_outputs
from rankfold.hoi.loader import open_image


class Detector:
    """Images to `Detections` of a class table.

    model      gives logits (B, Q, C), pred_boxes (B, Q, 4) and last_hidden_state (B, Q, d); eval mode, its
    device
    processor  makes the model's inputs of PIL images
    name       what files and reports call it
    known      the object ids that it has a class for
    width      d of the query vectors
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        table: ClassTable,
        name: str,
        selection: Selection | None = None,
    ) -> None:
        self.model, self.processor, self.table, self.name = model.eval(), processor, table, name
        self.selection = selection or Selection()
        config: Any = model.config
        names = {int(column): name for column, name in (config.id2label or {}).items()}
        # A last column "no object" comes on top of the classes that the configuration names.
        self.columns = columns_of(len(names) + 1, table, names)
        self.known = tuple(i for i, column in enumerate(self.columns[:-1].tolist()) if column >= 0)
        self.width = int(config.hidden_size)

    @classmethod
    def open(
        cls,
        name: str,
        table: ClassTable,
        device: torch.device | str = "cpu",
        *,
        revision: str | None = None,
        selection: Selection | None = None,
    ) -> Detector:
        """A folder or hub id of a DETR with its processor. `facebook/detr-resnet-50` has a `revision`,
        "no_timm", that needs no other package. ValueError where there is none, or it cannot be opened."""
        from transformers import AutoImageProcessor, DetrForObjectDetection

        options: dict[str, Any] = {} if revision is None else {"revision": revision}
        try:
            model: Any = DetrForObjectDetection.from_pretrained(name, **options)
            processor = AutoImageProcessor.from_pretrained(name, **options)
        except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
            first = str(error).strip().partition("\n")[0]
            remedy = "; try another revision (--revision no_timm)" if isinstance(error, ImportError) else ""
            raise ValueError(
                f"no detector {name!r}: it is no folder with a DETR and its image processor, and the hub has "
                f"none, could not be asked, or it cannot be opened here ({first}){remedy}"
            ) from error
        return cls(model.to(device), processor, table, name, selection)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[Detections]:
        """The detections of RGB images, in the pixels of each. ValueError as `from_outputs`."""
        model: Any = self.model
        inputs = self.processor(images=list(images), return_tensors="pt").to(model.device)
        found = model(**inputs)
        columns, human = self.columns, self.table.human
        rows = zip(images, found.logits, found.pred_boxes, found.last_hidden_state, strict=True)
        return [
            from_outputs(logits, boxes, queries, image.size, columns, human, self.selection)
            for image, logits, boxes, queries in rows
        ]

    def of(self, filename: str, image: Image.Image) -> Detections:
        """What a source of detections is asked for; errors name the file."""
        try:
            return self([image])[0]
        except ValueError as error:
            raise ValueError(f"{filename}: {error}") from error


def extract(
    detector: Detector,
    annotations: Annotations,
    images: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    batch: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Write the detections of every annotated image in the folder `images` to `path`, whole or not at all.

    `batch`: images at a time; they are padded to one size, so results differ in the last digits. `progress`
    is called with (stage, images done, images in all). ValueError names an image that is missing or
    unreadable.
    """
    folder, names = annotations.check_images(images), [scene.filename for scene in annotations.scenes]

    def found() -> Iterator[tuple[str, tuple[int, int], Detections]]:
        for at in range(0, len(names), batch):
            taken = names[at : at + batch]
            opened = [open_image(folder / name) for name in taken]
            for name, image, one in zip(taken, opened, detector(opened), strict=True):
                yield name, image.size, one
            if progress is not None:
                progress("detect", at + len(taken), len(names))

    return write_detections(path, found(), detector.table, detector.name, detector.selection, detector.known)
