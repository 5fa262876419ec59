"""Prose of the tiny tokenizer's own words, with enough structure that a model can be calibrated on it."""

import random

from conftest import WORDS


def prose(words: int, seed: int) -> str:
    draw = random.Random(seed)
    known = list(dict.fromkeys(WORDS.split()))
    return " ".join(draw.choice(known) for _ in range(words))
