"""Shared ground: no hub, a fixed seed, one thread a worker; the smallest model and tokenizer that work."""

from __future__ import annotations

import os

# Before torch and transformers are imported, and inherited by the fresh processes that some tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: more threads would only fight
    os.environ["OMP_NUM_THREADS"] = "1"

import random
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# Laws are checked on the same examples in every run: a failure here is a failure everywhere.
hypothesis.settings.register_profile("rankfold", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.load_profile("rankfold")

WORDS = (
    "the of and to in a is was that for it as on by with he at from his an be were are which this or had "
    "have not but one their also they has its who two first all new other been she her after when there "
    "more about time up out most into some no years than then can him would may made only over such "
    "during these between later many under made part where will city state world war year life house day "
    "water small large light word model paper matrix rank table page "
)


@pytest.fixture(scope="session")
def seed() -> int:
    """The one seed of the test session."""
    return 0


@pytest.fixture(autouse=True)
def _seeded(seed: int) -> None:
    """Every test starts from the same random state, in whatever order and process it runs."""
    random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(scope="session")
def tiny_llama(seed: int) -> Callable[..., Any]:
    """Factory of a 2-layer Llama in eval mode, the same at every call; arguments override its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(**overrides: Any) -> LlamaForCausalLM:
        options: dict[str, Any] = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 128,
            "max_position_embeddings": 256,
            "pad_token_id": 1,
            "bos_token_id": 2,
            "eos_token_id": 3,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**(options | overrides))).eval()

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A fast tokenizer of 128 entries for `tiny_llama`: whole words, ids 0..3 = <unk> <pad> <s> </s>."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<pad>", "<s>", "</s>", *dict.fromkeys(WORDS.split())]
    words += [f"w{i}" for i in range(128 - len(words))]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=256,
    )
