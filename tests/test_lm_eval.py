"""lm-eval runs on a folder through its own `hf` model, offline, from local tasks; dense or compressed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

# lm-eval and the libraries under it warn about each other's interfaces; none of that is ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

QUESTIONS = [  # of words that the tiny tokenizer knows, so that a word is a token
    {"q": "the first part of the", "choices": ["city", "year"], "answer": 0},
    {"q": "after the war the new", "choices": ["water", "state", "page"], "answer": 1},
    {"q": "at the rank of this", "choices": ["matrix", "day"], "answer": 0},
    {"q": "she would have", "choices": ["such", "a small house"], "answer": 1},
]


def write_tasks(folder: Path) -> None:
    """A multiple-choice and a rolling-perplexity task over local files, as docs/evaluation.md shows them."""
    folder.mkdir()
    questions, texts = folder / "questions.jsonl", folder / "texts.jsonl"
    questions.write_text("".join(json.dumps(item) + "\n" for item in QUESTIONS), encoding="utf-8")
    texts.write_text("".join(json.dumps({"text": item["q"]}) + "\n" for item in QUESTIONS), encoding="utf-8")
    (folder / "local_choice.yaml").write_text(
        f"""\
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}, cache_dir: {folder / "cache"}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""",
        encoding="utf-8",
    )
    (folder / "local_text.yaml").write_text(
        f"""\
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {texts}}}, cache_dir: {folder / "cache"}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}]
""",
        encoding="utf-8",
    )


def run(tasks: Path, model: Any, **options: Any) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model=model,
        tasks=["local_choice", "local_text"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        **options,
    )
    assert results is not None
    return {
        "accuracy": results["results"]["local_choice"]["acc,none"],
        "perplexity": results["results"]["local_text"]["word_perplexity,none"],
        "samples": [sample["resps"] for sample in results["samples"]["local_choice"]],
    }


def run_folder(tasks: Path, folder: Path) -> dict[str, Any]:
    where = {"pretrained": str(folder), "tokenizer": str(folder), "dtype": "float32"}
    return run(tasks, "hf", model_args=where, device="cpu", batch_size=2)


def by_hand(model: Any, tokenizer: Any) -> tuple[float, float]:
    """(accuracy, word perplexity): one word is one token here, and lm-eval puts the BOS before a text."""
    import torch

    right, total, count = 0, 0.0, 0
    with torch.no_grad():
        for item in QUESTIONS:
            start = tokenizer(item["q"])["input_ids"]
            scores = []
            for choice in item["choices"]:
                ids = torch.tensor([[*start, *tokenizer(choice)["input_ids"]]])
                logs = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
                scores.append(float(logs[len(start) - 1 :].sum()))
            right += scores.index(max(scores)) == item["answer"]
            ids = torch.tensor([[tokenizer.bos_token_id, *start]])
            logs = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
            total, count = total + float(logs.sum()), count + len(start)
    return right / len(QUESTIONS), float(torch.tensor(-total / count).exp())


def test_a_dense_folder_gives_the_hand_computed_numbers(
    tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    model = tiny_llama()
    write_tasks(tmp_path / "tasks")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    got = run_folder(tmp_path / "tasks", tmp_path / "model")
    accuracy, perplexity = by_hand(model, tiny_tokenizer)
    assert got["accuracy"] == accuracy
    assert got["perplexity"] == pytest.approx(perplexity, rel=1e-5)


def test_a_compressed_folder_gives_what_the_model_in_memory_gives(
    tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    pytest.importorskip("rankfold.hf")
    from lm_eval.models.huggingface import HFLM

    import rankfold

    model = tiny_llama()
    dense_accuracy_and_perplexity = by_hand(model, tiny_tokenizer)
    rankfold.factorize_(model, rankfold.recipes.svd, budget=0.6)
    assert any(type(module).__name__ == "LowRank" for module in model.modules())
    rankfold.save(model, tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    write_tasks(tmp_path / "tasks")

    got = run_folder(tmp_path / "tasks", tmp_path / "model")
    memory = run(tmp_path / "tasks", HFLM(pretrained=model, tokenizer=tiny_tokenizer, batch_size=2))
    assert got == memory  # bit for bit: the same factors, the same batches
    accuracy, perplexity = by_hand(model, tiny_tokenizer)
    assert (got["accuracy"], got["perplexity"]) == (accuracy, pytest.approx(perplexity, rel=1e-5))
    assert perplexity != pytest.approx(
        dense_accuracy_and_perplexity[1], rel=1e-4
    )  # not silently the dense model


@pytest.mark.slow
def test_the_command_line_of_lm_eval_needs_no_import_of_ours(
    tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    pytest.importorskip("rankfold.hf")
    import rankfold

    model = tiny_llama()
    rankfold.factorize_(model, rankfold.recipes.svd, budget=0.6)
    rankfold.save(model, tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    write_tasks(tmp_path / "tasks")
    command_line(tmp_path)
    (results,) = (tmp_path / "results").rglob("results_*.json")
    got = json.loads(results.read_text(encoding="utf-8"))["results"]
    assert got["local_text"]["word_perplexity,none"] == pytest.approx(
        by_hand(model, tiny_tokenizer)[1], rel=1e-5
    )


def command_line(folder: Path) -> None:
    """lm-eval as a user calls it; rankfold must register itself when torch is imported."""
    model = folder / "model"
    # No --include_path: it would index lm-eval's bundled tasks first, for half a minute.
    options = [
        *("--model", "hf", "--model_args", f"pretrained={model},tokenizer={model},dtype=float32"),
        *("--tasks", f"{folder / 'tasks' / 'local_choice.yaml'},{folder / 'tasks' / 'local_text.yaml'}"),
        *("--device", "cpu", "--batch_size", "2", "--output_path", str(folder / "results")),
    ]
    subprocess.run([sys.executable, "-m", "lm_eval", "run", *options], check=True, timeout=600, cwd=folder)
