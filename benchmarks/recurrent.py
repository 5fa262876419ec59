"""What packing costs a bidirectional GRU on a CPU: the same states from `RecurrentModel`, packed and not.

    python benchmarks/recurrent.py

Forward and backward over 32 rows of words, interleaved, the fastest of six; as a ratio, not as a time.
"""

from __future__ import annotations

import random
import time

import setting
import torch
from torch import Tensor

from rankfold.models import RecurrentConfig, RecurrentModel

ROWS = {"20 to 26 words": (20, 26), "4 to 60 words": (4, 60), "200 to 256 words": (200, 256)}


def main() -> None:
    chosen = setting.arguments(__doc__)
    torch.manual_seed(0)
    draw = random.Random(0)
    model = RecurrentModel(RecurrentConfig(embedding_size=200, hidden_size=100))
    lines, found = [], {}
    for name, (least, most) in ROWS.items():
        lengths = torch.tensor([draw.randint(least, most) for _ in range(32)])
        x = torch.randn(32, int(lengths.max()), 200)
        words = (torch.arange(x.shape[1]) < lengths[:, None]).unsqueeze(-1)

        def run(packed: bool, x: Tensor = x, lengths: Tensor = lengths, words: Tensor = words) -> float:
            began = time.process_time()
            states = (model._packed if packed else model._gathered)(x, lengths)
            (states * words).sum().backward()
            return time.process_time() - began

        times = [(run(True), run(False)) for _ in range(6)]
        packed, gathered = (min(column) for column in zip(*times, strict=True))
        found[name] = packed / gathered
        lines.append(f"| {name} | {found[name]:.2f} |")
    text = "\n".join(["| rows | CPU time packed / not packed |", "|---|---|", *lines])
    setting.finish("Packing", found, text, chosen)


if __name__ == "__main__":
    main()
