"""Which layers are selected, what is said of the others, and how they are replaced."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankfold import recipes
from rankfold.factorize import factorize_
from rankfold.hosts import Embedding, Linear, hosts
from rankfold.layers import Layer, excluded, left_dense, replace_, select, why_not
from rankfold.structures import LowRank


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(8, 8), "up": nn.Linear(8, 16)}) for _ in range(2)
        )
        self.table = nn.Parameter(torch.randn(4, 8))
        self.experts = nn.Parameter(torch.randn(3, 4, 8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(16, 12, bias=False)

    def forward(self, ids):
        x = self.norm(self.embed(ids))
        return self.head(self.blocks[1]["up"](self.blocks[0]["q_proj"](x)))


def test_globs_choose_by_name() -> None:
    model = Tower()
    assert set(select(model, ["*.q_proj"])) == {"blocks.0.q_proj", "blocks.1.q_proj"}
    assert set(select(model, ["blocks.0.*", "head"])) == {"blocks.0.q_proj", "blocks.0.up", "head"}
    assert set(select(model, ["*"], skip=["*.up", "embed"])) == {"blocks.0.q_proj", "blocks.1.q_proj", "head"}
    assert set(select(model, skip=["blocks.?.up"])) == {"blocks.0.q_proj", "blocks.1.q_proj", "head"}


def test_without_targets_embeddings_and_what_they_share_are_left() -> None:
    model = Tower()
    assert "embed" not in select(model) and "head" in select(model)
    model.head = nn.Linear(8, 12, bias=False)
    model.head.weight = model.embed.weight
    assert "head" not in select(model)
    assert excluded(model) == {"embed": "embedding", "head": "shares its weight with an embedding"}


def test_heads_outside_the_base_model_are_left(tiny_llama) -> None:
    model = tiny_llama(tie_word_embeddings=False)
    chosen = select(model)
    assert len(chosen) == 14 and all(name.startswith("model.layers.") for name in chosen)
    assert excluded(model) == {"model.embed_tokens": "embedding", "lm_head": "head"}


@pytest.mark.parametrize(
    ("targets", "skip", "says"),
    [
        (["*.qproj"], (), r"No layer matches '\*\.qproj'\. Did you mean '\*\.q_proj'.*Layers are e\.g\."),
        (["blocks.0.q_prj"], (), "Did you mean .*blocks.0.q_proj"),
        (["zzz"], (), r"No layer matches 'zzz'\. Layers are e\.g\. \['embed', .*and 2 more"),
        (None, ["*.uq"], r"No layer matches '\*\.uq'"),
        (["norm"], (), "No layer matches 'norm'"),
        (["head"], ["head"], "no layer is left to factorize; the model has"),
        ("*.q_proj", (), "targets and skip are lists of globs"),
        (["*"], "head", "targets and skip are lists of globs"),
    ],
)
def test_a_pattern_that_matches_nothing(targets, skip, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        select(Tower(), targets, skip)


def test_an_unknown_reading_of_convolutions() -> None:
    with pytest.raises(ValueError, match="conv='depth' is not a reading"):
        select(Tower(), conv="depth")


@pytest.mark.parametrize("layer", [nn.Linear(3, 4), nn.Conv2d(3, 4, 3), nn.Embedding(3, 4)])
def test_a_bare_layer_cannot_be_replaced_in_place(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"itself a single layer.*nn\.Sequential\(layer\)"):
        select(layer)


def test_a_model_without_layers() -> None:
    with pytest.raises(ValueError, match="no linear layer"):
        select(nn.Sequential(nn.LayerNorm(3)))


def test_only_exact_types_are_layers() -> None:
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert why_not(nn.Linear(2, 2)) is None
    assert why_not(Scaled(2, 2)) == "Scaled is not nn.Linear, Conv1D, nn.Conv2d or nn.Embedding"
    assert why_not(nn.Embedding(3, 2, max_norm=1.0)) == "the embedding renormalises its rows (max_norm)"
    model = nn.Sequential(Scaled(4, 4), nn.Linear(4, 4))
    assert list(select(model)) == ["1"]
    assert [(name, why) for name, _, why in left_dense(model, select(model))] == [
        ("0.weight", why_not(Scaled(2, 2)))
    ]


def test_everything_left_dense_is_named_with_its_reason() -> None:
    model = Tower()
    reasons = {name: reason for name, _, reason in left_dense(model, select(model, skip=["*.up"]))}
    assert reasons == {
        "table": "a bare parameter of Tower, not a layer",
        "experts": "a stack of 3 matrices (experts) in Tower, not a layer",
        "embed.weight": "embedding",
        "blocks.0.up.weight": "not among the targets",
        "blocks.1.up.weight": "not among the targets",
    }


def test_the_report_accounts_for_every_matrix() -> None:
    model = Tower()
    matrices = {name for name, p in model.named_parameters() if p.dim() >= 2}
    report = factorize_(model, recipes.svd, budget=0.7, targets=["*.up"])
    told = {row.name for row in report.skipped} | {f"{row.name}.weight" for row in report.layers}
    assert told == matrices
    assert report.totals["model_before"] == sum(p.numel() * 4 for p in Tower().parameters())
    assert report.totals["model_after"] == sum(p.numel() * 4 for p in model.parameters())


def test_what_is_factorized_is_not_selected_again() -> None:
    model = Tower()
    factorize_(model, recipes.svd, budget=0.5, targets=["*.up"])
    assert set(select(model)) == {"blocks.0.q_proj", "blocks.1.q_proj", "head"}


def test_replacing_reaches_every_name_of_a_shared_module() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared})})
    host = Layer(shared).wrap(LowRank((4, 4), rank=1))
    replace_(model, "a", host)
    assert model["a"] is host and model["b"]["c"] is host


def test_a_tied_embedding_and_head_are_one_matrix() -> None:
    model = Tower()
    model.head = nn.Linear(8, 12, bias=False)
    model.head.weight = model.embed.weight
    model.forward = lambda ids: model.head(model.norm(model.embed(ids)))
    ids = torch.arange(12)[None]
    report = factorize_(model, recipes.svd_llm, budget=0.6, targets=["embed", "head"], batches=[ids])
    assert isinstance(model.embed, Embedding) and isinstance(model.head, Linear)
    assert model.embed.weight is model.head.weight
    assert len(report.layers) == 1 and report.layers[0].note == "one matrix, shared with embed"
    assert report.totals["model_after"] == sum(p.numel() * 4 for p in model.parameters())
    x = torch.randn(3, 8)
    torch.testing.assert_close(model.head(x), x @ model.embed(torch.arange(12)).mT)


def test_half_of_a_tied_pair_is_refused() -> None:
    model = Tower()
    model.head = nn.Linear(8, 12, bias=False)
    model.head.weight = model.embed.weight
    with pytest.raises(ValueError, match="'head' shares its weight with 'embed', which is not selected"):
        factorize_(model, recipes.svd, budget=0.6, targets=["head"])
    assert not hosts(model)
