"""The untrained model of a run: somebody's configuration, with own sizes, and random weights from a seed.

Nothing of the named model but its configuration and its tokenizer is taken.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

END = "<|endoftext|>"


def read_config(name: str) -> Any:
    """The configuration of a folder, a hub id, a config.json, or a packaged .gguf model. Raises ValueError
    where there is none, or not of a causal language model."""
    import transformers

    from rankfold.gguf import PACKAGED, packaged_model

    options: dict[str, Any] = {}
    try:
        if name in PACKAGED:
            path = packaged_model(name)
            source = str(path.parent if path.suffix == ".gguf" else path)
            options = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
        elif name.endswith(".gguf"):
            source, options = str(Path(name).parent), {"gguf_file": Path(name).name}
        else:
            source = name
        if name.endswith(".json"):
            config = _from_json(Path(name))
        else:
            config = transformers.AutoConfig.from_pretrained(source, **options)
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(
            f"no configuration at {name!r}: a folder with config.json, a config.json, a hub id, or packaged "
            f"({', '.join(PACKAGED)}) ({(str(error) or type(error).__name__).splitlines()[0]})"
        ) from error
    if getattr(config, "is_encoder_decoder", False) or type(config) not in (
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    ):
        raise ValueError(
            f"{name!r} is a {type(config).__name__}, not of a causal language model: pre-training "
            "predicts the next token"
        )
    if hasattr(config, "quantization_config"):  # of a compressed folder: this model starts dense
        delattr(config, "quantization_config")
    config.name_or_path = ""
    return config


def _from_json(path: Path) -> Any:
    import transformers

    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(body, dict) or "model_type" not in body:
        raise ValueError(f"{path} is no configuration of a model: it has no 'model_type'")
    return transformers.AutoConfig.for_model(**body)


def override(config: Any, settings: Iterable[str]) -> Any:
    """A configuration with `KEY=VALUE` set, each of the type that it has. Raises ValueError for unknown keys
    (with near names) and for other types."""
    body = config.to_dict()
    known = sorted(key for key in body if not key.startswith("_"))
    given: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {setting!r}: write KEY=VALUE, such as hidden_size=256")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else f" Known: {', '.join(known)}"
            raise ValueError(f"--set {key}: {type(config).__name__} has no such option.{hint}")
        given[key] = _typed(key, text, body[key])
    if not given:
        return config
    heads, layers = body.get("num_attention_heads"), body.get("num_hidden_layers")
    follows = heads and body.get("head_dim") == body.get("hidden_size", 0) // heads
    for key, value in list(body.items()):  # what was written down of the old sizes follows the new ones
        if isinstance(value, list) and len(value) == layers and "num_hidden_layers" in given:
            del body[key]
    body |= given
    if follows and "head_dim" not in given:
        body["head_dim"] = body["hidden_size"] // body["num_attention_heads"]
    try:
        return type(config).from_dict(body)
    except Exception as error:  # each configuration class checks itself, and raises its own kinds
        raise ValueError(f"--set {' '.join(settings)}: {_last_line(error)}") from error


def _typed(key: str, text: str, old: Any) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    kinds = {bool: (bool,), int: (int,), float: (int, float), str: (str,), list: (list,), dict: (dict,)}
    wanted = kinds.get(type(old))
    if wanted and (not isinstance(value, wanted) or (bool not in wanted and isinstance(value, bool))):
        raise ValueError(f"--set {key}={text}: it is {old!r} now, of type {type(old).__name__}")
    return float(value) if isinstance(old, float) else value


def open_tokenizer(name: str) -> Any:
    """The tokenizer beside a model. Raises ValueError where there is none."""
    import transformers

    from rankfold.gguf import PACKAGED, packaged_model

    path = packaged_model(name) if name in PACKAGED else Path(name)
    options = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = path.parent if path.suffix in (".gguf", ".json") else name if name not in PACKAGED else path
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), **options)
    except Exception as error:  # each file format of a tokenizer raises its own kinds
        raise ValueError(
            f"{name!r} has no tokenizer beside it ({_last_line(error)}): name one with --tokenizer, or "
            "--train-tokenizer 8000"
        ) from error


def train_tokenizer(documents: Iterable[str], size: int) -> Any:
    """A byte-level BPE of at most `size` entries, learned from `documents`: the same text, the same one. Its
    only special token ends a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    check_size(size)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END)


def check_size(size: int) -> None:
    """Raises ValueError below 258 entries: 256 bytes, the special token, and one merge."""
    if size < 258:
        raise ValueError(f"--train-tokenizer {size}: a byte-level BPE has at least 258 entries, e.g. 8000")


def fit_tokenizer(config: Any, tokenizer: Any, trained: bool) -> Any:
    """The configuration for this tokenizer: the vocabulary of one that was trained, the ids of its special
    tokens. Raises ValueError where the vocabulary of the model is too small."""
    size = len(tokenizer)
    if trained:
        config.vocab_size = size
        config.bos_token_id = config.pad_token_id = None
    elif size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {size} entries, the model vocab_size={config.vocab_size}: --set "
            f"vocab_size={size}"
        )
    config.eos_token_id = tokenizer.eos_token_id
    if config.pad_token_id is not None and not 0 <= config.pad_token_id < config.vocab_size:
        config.pad_token_id = None
    return config


def check_length(config: Any, length: int) -> None:
    """Raises ValueError where windows are longer than the model reads, or shorter than two tokens."""
    longest = getattr(config, "max_position_embeddings", None) or length
    if not 2 <= length <= longest:
        raise ValueError(
            f"--length {length}: windows have from 2 to {longest} tokens in this model "
            f"(max_position_embeddings; raise it with --set max_position_embeddings={length})"
        )


def build(config: Any, seed: int, device: str = "cpu") -> nn.Module:
    """The model with random float32 weights, the same for the same seed; on "meta" without any. Raises
    ValueError for sizes that do not fit each other."""
    import transformers

    torch.manual_seed(seed)
    try:
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # each architecture has its own ways to refuse sizes
        raise ValueError(f"this {type(config).__name__} builds no model: {_last_line(error)}") from error
    if device == "cpu":
        check_causal(model)
    return model


class NotCausal(ValueError):
    """A model in which a later token changes an earlier prediction."""


def check_kind(config: Any) -> None:
    """`check_causal` on one layer with few words, before any text is read. Says nothing where this
    configuration cannot be made so small: `build` asks again."""
    sizes = ("vocab_size=64", "num_hidden_layers=1")
    try:
        small = override(config, [size for size in sizes if hasattr(config, size.partition("=")[0])])
        small.bos_token_id = small.eos_token_id = small.pad_token_id = None
        build(small, 0)
    except NotCausal:
        raise
    except ValueError:
        return


@torch.no_grad()
def check_causal(model: nn.Module) -> None:
    """Raises NotCausal where a token changes predictions before it (an encoder with a head for language),
    which would make the next token known."""
    size: int = model.config.vocab_size  # type: ignore
    ids = torch.arange(8)[None] % size
    other = torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % size], 1)
    was = model.training
    one, two = (model.eval()(input_ids=x).logits[:, :-1] for x in (ids, other))
    model.train(was)
    if not torch.allclose(one, two, atol=1e-4, rtol=1e-4):
        raise NotCausal(
            f"{type(model).__name__} looks at later tokens, so it cannot learn to predict them; name a "
            "causal language model (of some: --set is_decoder=true)"
        )


def check_settings(settings: Sequence[str], trained: bool) -> None:
    """Raises ValueError for overrides that the tokenizer decides."""
    for setting in settings:
        if trained and setting.partition("=")[0] == "vocab_size":
            raise ValueError(
                f"--set {setting}: the tokenizer that is trained decides it: --train-tokenizer SIZE"
            )


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[-2:]) if lines else type(error).__name__
