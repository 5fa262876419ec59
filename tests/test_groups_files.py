"""Files of models whose layers share a factor: one tensor stays one, wherever the model goes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import damaged, edited
from safetensors.torch import load_file
from torch import Tensor, nn
from toy_groups import LOW, SPARSE, Tower, stored, tower
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

import rankfold
from rankfold import LowRank, recipes
from rankfold.evaluate import bytes_on_disk
from rankfold.factorize import factorize_
from rankfold.hosts import Linear, hosts
from rankfold.manifest import check_manifest, manifest

IDS = torch.arange(24).view(2, 12)

# Files of plain modules.


@pytest.fixture(scope="module", params=[LOW, SPARSE], ids=["low rank", "sparse"])
def plain(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tower, Path]:
    model = tower()
    report = factorize_(model, request.param, budget=0.6)
    folder = rankfold.save(model, tmp_path_factory.mktemp("plain") / "net", report=report)
    assert bytes_on_disk(folder)["payload"] == report.totals["model_after"]
    return model, folder


def key_of(model: Tower) -> str:
    return "right.weight" if isinstance(model.blocks[0].weight, LowRank) else "dictionary"


def test_plain_module_round_trips(plain: tuple[Tower, Path], tmp_path: Path) -> None:
    (model, folder), x, key = plain, torch.randn(5, 24), key_of(plain[0])
    structures = json.loads((folder / "rankfold.json").read_text())["structures"]
    assert [structures[f"blocks.{i}"].get("tied") for i in range(4)] == [
        None, {key: "blocks.0"}, None, {key: "blocks.2"}
    ]  # fmt: skip
    again = rankfold.load_(tower(1), folder)
    assert torch.equal(again(x), model(x))
    rankfold.verify(again, folder)
    for other in (again, copy.deepcopy(again), copy.deepcopy(again).half(), copy.deepcopy(again).to("cpu")):
        for i in (0, 2):
            one, two = (other.get_submodule(f"blocks.{j}.weight") for j in (i, i + 1))
            assert one.get_parameter(key) is two.get_parameter(key)
        assert stored(other) <= stored(model)
    twice = rankfold.save(again, tmp_path / "twice") / "model.safetensors"
    assert twice.read_bytes() == (folder / "model.safetensors").read_bytes()
    assert manifest(again)["structures"] == structures
    dense = rankfold.to_dense_(again)
    torch.testing.assert_close(dense(x), model(x), rtol=1e-4, atol=1e-4)
    assert not hosts(dense) and rankfold.save(dense, tmp_path / "dense").exists()


def test_json_may_reorder_the_layers(plain: tuple[Tower, Path], tmp_path: Path) -> None:
    def turn(data: dict[str, Any]) -> None:
        data["structures"] = dict(reversed(data["structures"].items()))

    again = rankfold.load_(tower(1), edited(plain[1], tmp_path / "turned", turn))
    x = torch.randn(5, 24)
    assert torch.equal(again(x), plain[0](x))
    assert manifest(again) == {**manifest(plain[0])}


def test_training_sees_each_tensor_once(plain: tuple[Tower, Path]) -> None:
    model, key = copy.deepcopy(plain[0]), key_of(plain[0])
    parameters = list(model.parameters())
    assert len({id(p) for p in parameters}) == len(parameters)
    assert stored(model) == sum(p.nbytes for p in parameters) + sum(b.nbytes for b in model.buffers())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    before = model.get_parameter(f"blocks.0.weight.{key}").detach().clone()
    model(torch.randn(5, 24)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.get_parameter(f"blocks.1.weight.{key}"), before)


def test_load_stays_strict(plain: tuple[Tower, Path], tmp_path: Path) -> None:
    _, folder = plain
    key = key_of(plain[0])
    other = tower(1)
    before = copy.deepcopy(other.state_dict())
    owner, borrower = f"blocks.0.weight.{key}", f"blocks.1.weight.{key}"
    assert borrower not in load_file(folder / "model.safetensors")
    bad: dict[str, tuple[Any, str]] = {
        "missing": (lambda t: t.pop(owner), rf"missing tensors .*{owner}"),
        "extra": (lambda t: t.update({f"{borrower}s": t[owner].clone()}), "left-over tensors"),
        "shape": (
            lambda t: t.update({owner: t[owner][..., :-1].contiguous()}),
            rf"{owner}' is torch.float32",
        ),
    }
    if key == "dictionary":
        # One place too many in a row, or too few: what each packing refuses.
        bad["support"] = (lambda t: t["blocks.1.weight.support"].bitwise_not_(), "blocks.1")
    for name, (change, message) in bad.items():
        with pytest.raises(ValueError, match=message):
            rankfold.load_(other, damaged(folder, tmp_path / name, change))
        assert not hosts(other)
        assert all(torch.equal(tensor, before[k]) for k, tensor in other.state_dict().items())
    # The borrower's name is as good as the owner's.
    renamed = damaged(folder, tmp_path / "renamed", lambda t: t.update({borrower: t.pop(owner)}))
    x = torch.randn(5, 24)
    assert torch.equal(rankfold.load_(other, renamed)(x), plain[0](x))


def tie(**ties: Any) -> Callable[[dict[str, Any]], Any]:
    """Ties of blocks.1 to what the names of the layers say; dots are not allowed in names, so `b0` is one."""
    named = {key.replace("_", "."): value for key, value in ties.items()}
    return lambda data: data["structures"]["blocks.1"].update(tied=named)


def chain(data: dict[str, Any]) -> None:
    data["structures"]["blocks.2"]["tied"] = {"right.weight": "blocks.1"}


def cycle(data: dict[str, Any]) -> None:
    data["structures"]["blocks.0"]["tied"] = {"right.weight": "blocks.1"}


def same(data: dict[str, Any]) -> None:
    data["structures"]["blocks.1"] = {"same_as": "blocks.0", "tied": {"right.weight": "blocks.0"}}


def narrow(data: dict[str, Any]) -> None:
    data["structures"]["blocks.0"]["rank"] -= 1


TIES: dict[str, tuple[Any, str]] = {
    "unknown layer": (tie(right_weight="nobody"), "'blocks.1' has its 'right.weight' from 'nobody', which"),
    "itself": (tie(right_weight="blocks.1"), "from 'blocks.1', which has no structure of its own"),
    "a list": (tie(right_weight=["blocks.0"]), "which has no structure of its own"),
    "null": (tie(right_weight=None), "which has no structure of its own"),
    "no mapping": (lambda d: d["structures"]["blocks.1"].update(tied=["x"]), "'tied' maps parameters"),
    "unknown key": (tie(middle_weight="blocks.0"), r"'blocks.1' has no such parameter; it has \['right.weig"),
    "a module": (tie(right="blocks.0"), "'blocks.1' has no such parameter"),
    "empty key": (lambda d: d["structures"]["blocks.1"].update(tied={"": "blocks.0"}), "no such parameter"),
    "another shape": (narrow, r"needs torch.float32 \(\d+, 24\) where that is torch.float32 \(\d+, 24\)"),
    "another width": (tie(left_weight="last.blocks.4"), r"needs torch.float32 \(24, \d+\) where"),
    "chain": (chain, "from 'blocks.1', which has it from 'blocks.0'; name the layer that owns it"),
    "cycle": (cycle, "which has it from"),
    "same and tied": (same, "'tied' maps parameters"),
}


@pytest.mark.parametrize(("change", "message"), TIES.values(), ids=TIES.keys())
def test_ties_edited_by_hand(change: Any, message: str, tmp_path: Path) -> None:
    model = tower()
    factorize_(model, LOW, budget=0.6)
    folder = rankfold.save(model, tmp_path / "net")
    other = tower(1)
    with pytest.raises(ValueError, match=message):
        rankfold.load_(other, edited(folder, tmp_path / "edited", change))
    assert not hosts(other)


def test_tensors_of_two_names_cannot_be_one() -> None:
    model = nn.Sequential(*(Linear(LowRank((8, 8), rank=8)) for _ in range(2)))
    model[1].weight.left.weight = model[0].weight.right.weight  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"'1' holds as 'left.weight' the tensor that is 'right.weight' of"):
        manifest(model)


# transformers.


@pytest.fixture(scope="module", params=["low rank", "sparse", "tied tables"])
def llama(request: Any, tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    tables = request.param == "tied tables"
    model = tiny_llama(num_hidden_layers=4, tie_word_embeddings=tables)
    recipe = SPARSE if request.param == "sparse" else LOW
    report = factorize_(model, recipe, budget=0.6, targets=["*"] if tables else None)
    folder = rankfold.save(model, tmp_path_factory.mktemp("llama") / "model", report=report)
    assert bytes_on_disk(folder)["payload"] == report.totals["model_after"] == stored_weights(model)
    return model.eval(), folder


def stored_weights(model: Any) -> int:
    """As `stored`, without the buffers of transformers that are not saved."""
    held = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    return sum(t.numel() * t.element_size() for t in held.values())


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def shares(model: Any) -> bool:
    pairs = [
        [model.get_submodule(f"model.layers.{i}.mlp.up_proj.weight") for i in (j, j + 1)] for j in (0, 2)
    ]
    return all(
        one.get_parameter(key) is two.get_parameter(key)
        for one, two in pairs
        for key in (["right.weight"] if isinstance(one, LowRank) else ["dictionary"])
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "auto"}, {"device_map": "auto"}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}],
    ids=str,
)
def test_every_way_of_opening(options: Any, llama: tuple[Any, Path]) -> None:
    model, folder = llama
    again, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(logits(again), logits(model)) and shares(again)
    assert again.num_parameters() == model.num_parameters()
    again.tie_weights()
    assert shares(again.half()) and shares(copy.deepcopy(again))


def test_another_dtype(llama: tuple[Any, Path]) -> None:
    again = AutoModelForCausalLM.from_pretrained(llama[1], dtype=torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16} and shares(again)
    torch.testing.assert_close(logits(again).float(), logits(llama[0]), atol=0.1, rtol=0.1)


def test_saving_what_was_loaded_changes_no_byte(llama: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = llama
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "twice")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "twice" / name).read_bytes() == (folder / name).read_bytes(), name
    rankfold.save(model, tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    rankfold.verify(model, tmp_path / "shards", {"input_ids": IDS})
    assert shares(AutoModelForCausalLM.from_pretrained(tmp_path / "shards"))
    dense = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    assert not hosts(dense)
    dense.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-4)


def test_opens_as_the_bare_model_and_back(llama: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = llama
    bare = AutoModel.from_pretrained(folder)
    bare.save_pretrained(tmp_path / "bare")
    again = AutoModel.from_pretrained(tmp_path / "bare")
    with torch.no_grad():
        expected = model.model(IDS).last_hidden_state
        assert torch.equal(bare(IDS).last_hidden_state, expected)
        assert torch.equal(again(IDS).last_hidden_state, expected)
    if isinstance(model.lm_head, nn.Linear):  # else the config speaks of a head that the inner model has not
        copy.deepcopy(model.model).save_pretrained(tmp_path / "inner")
        with torch.no_grad():
            inner = AutoModel.from_pretrained(tmp_path / "inner")
            assert torch.equal(inner(IDS).last_hidden_state, expected)
    one, two = (again.layers[i].mlp.up_proj.weight for i in (2, 3))
    assert {id(p) for p in one.parameters()} & {id(p) for p in two.parameters()}


def test_offloads_both_layers_or_neither(llama: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = llama
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "cpu" if i < 2 else "disk" for i in range(4)}
    again = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
    assert torch.equal(again(IDS).logits, logits(model))
    for layer in (2, 3):
        apart = places | {f"model.layers.{layer}": "cpu"}
        with pytest.raises(
            ValueError, match=r"device_map puts 'model.layers.3.*offload both layers, or neither"
        ):
            AutoModelForCausalLM.from_pretrained(folder, device_map=apart, offload_folder=tmp_path)


UP = "model.layers.{}.mlp.up_proj"


def test_damaged_folders_do_not_open(llama: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = llama
    one, two = (UP.format(i) for i in (0, 1))
    tied = json.loads((folder / "config.json").read_text())["quantization_config"]["structures"][two]["tied"]
    ((key, owner),) = tied.items()
    assert owner == one
    stored_key, absent = f"{one}.weight.{key}", f"{two}.weight.{key}"
    changes: dict[str, tuple[Any, str]] = {
        "missing": (lambda t: t.pop(stored_key), "lacks"),
        "apart": (lambda t: t.update({absent: t[stored_key] + 1}), f"{absent}.*one tensor, with different"),
        "reshaped": (lambda t: t.update({stored_key: t[stored_key][..., :-1].contiguous()}), stored_key),
    }
    if key == "dictionary":
        changes["support"] = (lambda t: t[f"{two}.weight.support"].bitwise_not_(), f"layer '{two}'")
    for name, (change, message) in changes.items():
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(damaged(folder, tmp_path / name, change))

    def rename(tensors: dict[str, Tensor]) -> None:
        tensors[absent] = tensors.pop(stored_key)

    again = AutoModelForCausalLM.from_pretrained(damaged(folder, tmp_path / "renamed", rename))
    assert torch.equal(logits(again), logits(llama[0])) and shares(again)
    for owner, message in (
        ("nobody", "nobody"),
        (two, "no structure of its own"),
        ("model.norm", "no struct"),
    ):
        change = lambda d, owner=owner: d["structures"][two].update(tied={key: owner})  # noqa: E731
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(edited(folder, tmp_path / owner.replace(".", ""), change))
    other = lambda d: d["structures"][two].update(tied={key: UP.format(0).replace("up", "down")})  # noqa: E731
    with pytest.raises(ValueError, match=f"'{two}' has its '{key}'"):
        AutoModelForCausalLM.from_pretrained(edited(folder, tmp_path / "other", other))


def test_a_grouped_model_can_be_factorized_further(llama: tuple[Any, Path], tmp_path: Path) -> None:
    again = AutoModelForCausalLM.from_pretrained(llama[1])
    if isinstance(again.lm_head, nn.Linear):
        factorize_(again, recipes.svd, targets=["lm_head"], budget=0.5)
        rankfold.save(again, tmp_path / "out")
        third = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(logits(third), logits(again)) and shares(third)


def test_trains_and_resumes(llama: tuple[Any, Path], tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(4, 128, (8, 16))]

    def run(steps: int, resume: Any = None) -> Any:
        options: dict[str, Any] = {"per_device_train_batch_size": 2, "max_steps": steps, "save_steps": 1}
        options |= {"lr_scheduler_type": "constant", "report_to": [], "disable_tqdm": True, "use_cpu": True}
        arguments = TrainingArguments(output_dir=str(tmp_path / "run"), learning_rate=1e-2, **options)
        model = AutoModelForCausalLM.from_pretrained(llama[1])
        Trainer(model=model, args=arguments, train_dataset=rows).train(resume_from_checkpoint=resume)
        return model

    whole = run(2)
    assert shares(whole) and not torch.equal(logits(whole), logits(llama[0]))
    assert shares(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-1"))
    assert torch.equal(logits(run(2, str(tmp_path / "run" / "checkpoint-1"))), logits(whole))


def test_the_manifest_of_a_model_is_a_manifest(llama: tuple[Any, Path]) -> None:
    structures = manifest(llama[0])["structures"]
    assert check_manifest(manifest(llama[0])) == structures
    assert (
        sum("tied" in spec for spec in structures.values()) == 10
    )  # five kinds of layers, two pairs of each
