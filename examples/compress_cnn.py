"""Any nn.Module: factorize the convolutions of a small CNN, save it, load it into a fresh one.

    python examples/compress_cnn.py

`Activation` needs a batch of inputs and no labels. The folder holds rankfold.json and one safetensors file.
"""

import tempfile

import torch
from torch import nn

import rankfold


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


torch.manual_seed(0)
model = cnn().eval()
images = torch.randn(64, 3, 16, 16)

report = rankfold.factorize_(model, rankfold.recipes.svd_llm, budget=0.5, batches=[images], skip=["7"])
report.print(layers=True)

with tempfile.TemporaryDirectory() as folder:
    rankfold.save(model, f"{folder}/cnn", report=report)
    again = rankfold.load_(cnn().eval(), f"{folder}/cnn")
    assert torch.equal(model(images), again(images))
    print("saved, loaded, and equal bit for bit")
