"""Interactions drawn into an image: boxes, a numbered line from human to object, and what the human does.

Humans have solid blue boxes, objects dashed orange ones: the two differ by line as well as by hue, and every
line has a second, light or dark one beneath it, so that it shows on any ground. A number ties line and label.
Labels stand beside their line where there is room, else below the image; no label covers another or leaves
the picture. Small images are drawn larger, so that the text can be read at any size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw, ImageFont

from rankfold.hoi.evaluation import Predicted
from rankfold.report_format import clean, percent

if TYPE_CHECKING:
    from rankfold.hoi.annotations import Scene
    from rankfold.hoi.classes import ClassTable

HUMAN, OBJECT = "#0072b2", "#e69f00"  # of the colours of Okabe and Ito, told apart by everybody
GROUND, INK = "#12161c", "#ffffff"  # of labels: contrast 18
SIDES = (720, 1600)  # the longer side of a drawing, in pixels
_NARROW = 420  # a drawing with labels below is at least so wide
_COVERED = 0.3  # of the image, by labels; the others stand below

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Pair:
    """One human with one object, and the lines of its label, the surest first."""

    human: Box
    object: Box
    lines: tuple[str, ...]


def phrase(table: ClassTable, interaction: int) -> str:
    """ "riding a bicycle" of an interaction id."""
    verb, thing = table.name_of(interaction)
    return f"{'no interaction with' if verb == 'and' else verb} {thing}"


def pairs_of(shown: Predicted | Scene, table: ClassTable, top: int, least: float = 0.0) -> list[Pair]:
    """The pairs of the `top` surest triplets with a score of at least `least`; of a Scene the
    first `top`, without scores. Triplets with the same boxes are one pair, in the order of their best."""
    ids = shown.interactions
    scores = shown.scores if isinstance(shown, Predicted) else None
    order = torch.arange(len(ids)) if scores is None else scores.argsort(descending=True, stable=True)
    if scores is not None:
        order = order[scores[order] >= least]
    lines: dict[tuple[Box, Box], list[str]] = {}
    for row in order[:top].tolist():
        human, thing = tuple(shown.boxes_h[row].tolist()), tuple(shown.boxes_o[row].tolist())
        text = clean(phrase(table, int(ids[row])))
        text += f" {percent(float(scores[row]), 0)}" if scores is not None else ""
        lines.setdefault((human, thing), []).append(text)
    return [Pair(human, thing, tuple(text)) for (human, thing), text in lines.items()]


def draw(
    image: Image.Image,
    shown: Predicted | Scene,
    table: ClassTable,
    *,
    top: int = 10,
    least: float = 0.0,
    sides: tuple[int, int] = SIDES,
) -> Image.Image:
    """A new RGB picture: `image` with the `top` surest interactions of a score of at least `least`.

    image  any mode and size; its pixels are those that the boxes of `shown` count
    sides  the longer side of the result lies between these: the image is scaled if it does not

    Raises ValueError for top < 1 and sides that are not in order.
    """
    if top < 1:
        raise ValueError(f"top={top} must be at least 1")
    if not 1 <= sides[0] <= sides[1]:
        raise ValueError(f"sides={sides} must be two lengths, the smaller first")
    longest = max(image.size)
    scale = min(max(longest, sides[0]), sides[1]) / longest
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    picture = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    pairs = [
        Pair(_scaled(pair.human, scale, size), _scaled(pair.object, scale, size), pair.lines)
        for pair in pairs_of(shown, table, top, least)
    ]
    drawing = _Drawing(picture)
    drawing.boxes(pairs)
    marks = drawing.links(pairs)
    below = [
        (number, pair.lines)
        for number, (pair, mark) in enumerate(zip(pairs, marks, strict=True), 1)
        if not drawing.label(number, pair, mark)
    ]
    return drawing.with_panel(below)


def _scaled(box: Box, scale: float, size: tuple[int, int]) -> Box:
    """`box` in the drawing, cut at its border, where its lines still show."""
    cut = [min(max(at * scale, 0.0), size[i % 2] - 1.0) for i, at in enumerate(box)]
    return cut[0], cut[1], cut[2], cut[3]


def _middle(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


class _Drawing:
    """The picture so far, and the places that are taken in it."""

    def __init__(self, picture: Image.Image) -> None:
        self.picture, self.canvas = picture, ImageDraw.Draw(picture)
        longest = max(picture.size)
        self.line = max(3, longest // 280)
        self.font = ImageFont.load_default(max(15, longest // 48))
        _, top, _, bottom = self.font.getbbox("1|gÅ")
        self.height, self.lift = math.ceil(bottom - top), top
        self.pad = max(4, longest // 180)
        self.taken: list[Box] = []
        self.room = _COVERED * picture.size[0] * picture.size[1]

    def boxes(self, pairs: Sequence[Pair]) -> None:
        """Humans first, so that the dashes of a human who is an object too lie over the solid line."""
        humans = dict.fromkeys(pair.human for pair in pairs)
        for box in humans:
            self.canvas.rectangle(box, outline=INK, width=self.line + 2)
            self.canvas.rectangle(_inset(box, 1), outline=HUMAN, width=self.line)
        for box in dict.fromkeys(pair.object for pair in pairs):
            if box not in humans:
                self.canvas.rectangle(box, outline=INK, width=self.line + 2)
            self._dashes(_inset(box, 1))

    def _dashes(self, box: Box) -> None:
        left, top, right, bottom = box
        half, step = (self.line - 1) / 2, 4 * self.line
        corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
        for (x, y), (u, v), inward in zip(corners, [*corners[1:], corners[0]], (1, -1, -1, 1), strict=True):
            length = abs(u - x) + abs(v - y)
            for start in range(0, max(1, math.ceil(length)), 2 * step):
                a, b = (min(t, length) / length if length else 0.0 for t in (start, start + step))
                ends = [(x + (u - x) * t, y + (v - y) * t) for t in (a, b)]
                shift = (0.0, half * inward) if y == v else (half * inward, 0.0)
                self.canvas.line(
                    [(p + shift[0], q + shift[1]) for p, q in ends], fill=OBJECT, width=self.line
                )

    def links(self, pairs: Sequence[Pair]) -> list[Box]:
        """A line with its number for each pair; the places of the numbers."""
        for pair in pairs:
            ends = [_middle(pair.human), _middle(pair.object)]
            self.canvas.line(ends, fill=GROUND, width=self.line + 2)
            self.canvas.line(ends, fill=INK, width=self.line)
        for pair in pairs:
            for middle, colour in ((_middle(pair.human), HUMAN), (_middle(pair.object), OBJECT)):
                self._disc(middle, 1.5 * self.line, colour, INK)
        return [self._mark(number, pair) for number, pair in enumerate(pairs, 1)]

    def _disc(self, middle: tuple[float, float], radius: float, fill: str, edge: str) -> None:
        x, y = middle
        place = (x - radius, y - radius, x + radius, y + radius)
        self.canvas.ellipse(place, fill=fill, outline=edge, width=max(1, self.line // 2))

    def _mark(self, number: int, pair: Pair) -> Box:
        side = max(self.font.getlength(str(number)), self.height) + self.pad
        (x, y), (u, v) = _middle(pair.human), _middle(pair.object)
        spots = [(x + (u - x) * t, y + (v - y) * t) for t in (0.5, 0.38, 0.62, 0.26, 0.74)]
        spots += [(p + i * side, q + j * side) for p, q in spots[:3] for i in (0, 1, -1) for j in (0, 1, -1)]
        places = [self._inside((p - side / 2, q - side / 2, p + side / 2, q + side / 2)) for p, q in spots]
        place = next((p for p in places if not self._meets(p)), None)
        place = place or min(places, key=lambda p: sum(_common(p, other) for other in self.taken))
        self.taken.append(place)
        self._disc(_middle(place), side / 2, GROUND, INK)
        self.canvas.text(_middle(place), str(number), font=self.font, fill=INK, anchor="mm")
        return place

    def label(self, number: int, pair: Pair, mark: Box) -> bool:
        """Write the label of a pair near its number; whether there was room."""
        step = self.height + self.pad
        width = max(map(self.font.getlength, pair.lines)) + self._indent(number) + 2 * self.pad
        height = len(pair.lines) * step + self.pad
        across, down = self.picture.size
        if width > across or height > down or width * height > self.room:
            return False
        x, y = _middle(mark)
        gap = (mark[2] - mark[0]) / 2 + self.pad
        near = [(x + gap, y - height / 2), (x - gap - width, y - height / 2)]
        near += [(x - width / 2, y + gap), (x - width / 2, y - gap - height)]
        far = [
            (left, top)
            for left in _steps(across - width, self.height)
            for top in _steps(down - height, self.height)
        ]
        far.sort(key=lambda at: math.hypot(at[0] + width / 2 - x, at[1] + height / 2 - y))
        reach = 0.4 * max(across, down)
        for left, top in (*near, *far):
            place = (left, top, left + width, top + height)
            if math.hypot(left + width / 2 - x, top + height / 2 - y) > reach + width / 2:
                return False
            if place == self._inside(place) and not self._meets(place):
                break
        else:
            return False
        self.taken.append(place)
        self.room -= width * height
        self.canvas.rounded_rectangle(place, self.pad, fill=GROUND, outline=INK)
        self._lines(number, pair.lines, left + self.pad, top + self.pad, width)
        return True

    def _indent(self, number: int) -> float:
        return self.font.getlength(f"{number}  ")

    def _lines(self, number: int, lines: Sequence[str], left: float, top: float, width: float) -> None:
        """`number`, and beside it the lines, what is wider than `width` cut."""
        indent = self._indent(number)
        self.canvas.text((left, top - self.lift), str(number), font=self.font, fill=INK)
        for i, line in enumerate(lines):
            at = (left + indent, top + i * (self.height + self.pad) - self.lift)
            self.canvas.text(at, self._cut(line, width - indent), font=self.font, fill=INK)

    def _inside(self, place: Box) -> Box:
        """`place` moved into the picture, by as little as it takes."""
        across, down = self.picture.size
        x = min(max(place[0], 0.0), max(across - 1 - (place[2] - place[0]), 0.0))
        y = min(max(place[1], 0.0), max(down - 1 - (place[3] - place[1]), 0.0))
        return x, y, x + place[2] - place[0], y + place[3] - place[1]

    def _meets(self, place: Box) -> bool:
        return any(_common(place, other) > 0 for other in self.taken)

    def with_panel(self, labels: Sequence[tuple[int, tuple[str, ...]]]) -> Image.Image:
        """The picture, with the labels that had no room in it below."""
        across, down = self.picture.size
        if not labels:
            return self.picture
        step, top = self.height + self.pad, down + 2 * self.pad
        high = sum(len(lines) for _, lines in labels) * step + 3 * self.pad
        whole = Image.new("RGB", (max(across, _NARROW), down + high), GROUND)
        whole.paste(self.picture, ((whole.width - across) // 2, 0))
        self.canvas = ImageDraw.Draw(whole)
        for number, lines in labels:
            self._lines(number, lines, 2 * self.pad, top, whole.width - 4 * self.pad)
            top += len(lines) * step
        return whole

    def _cut(self, text: str, width: float) -> str:
        """`text`, its end replaced by an ellipsis where it is wider than `width`."""
        if self.font.getlength(text) <= width:
            return text
        while text and self.font.getlength(text + "…") > width:
            text = text[:-1]
        return text + "…"


def _inset(box: Box, by: float) -> Box:
    left, top, right, bottom = box
    return left + by, top + by, max(right - by, left + by), max(bottom - by, top + by)


def _common(a: Box, b: Box) -> float:
    """The area that two boxes share."""
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0.0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)


def _steps(most: float, step: float) -> list[float]:
    return [i * step for i in range(int(max(most, 0) // step) + 1)]
