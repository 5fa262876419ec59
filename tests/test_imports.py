"""The shape of the package: which module may import which, what an import costs, and what may not be there.

These tests read the source, so they also speak about code that no other test reaches.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import rankfold

PACKAGE = Path(rankfold.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = [path for path in FILES if path != PACKAGE / "__init__.py"]

# Left to right. A module may import its own tier and those to the left of it.
TIERS = (
    ("atomic", "optimizers", "step_in_backward", "packing", "kernels", "codes"),
    ("structure", "autoload"),  # autoload stands outside: it imports nothing of ours, anyone may import it
    ("structures", "sparse", "sparse_code", "masters", "ordered", "wavelet*", "low_rank_form", "cored"),
    (
        "hosts",
        "layers",
        "compressed",
        "token_wavelet",
        "token_layer",
        "ties",
        "adapted",
        "manifest",
        "batches",
        "sums",
        "observe",
        "metric",
        "metrics",
        "method",
        "groups",
        "attention",
        "linformer",
        "masked",
        "pooling",
        "poolers",
        "batch_norm",
    ),
    ("pursuit*", "dictionary*"),
    ("methods",),
    ("multiple_choice", "allocate*", "report*"),
    ("recipe",),
    ("fits", "storage", "outcome", "factorize", "adapters"),
    ("recipes", "automatic"),
    ("regime", "straight_through*", "ordered_dropout", "truncate*", "trainer_callback", "cut*"),
    (
        "card",
        "calibration_file",
        "provenance",
        "evaluate",
        "generate",
        "footprint",
        "latency",
        "data*",
        "testing*",
    ),
    ("checkpoint*", "adapter_*", "extract", "lora*", "convert"),
    ("hf", "gguf", "models", "peft*"),
    ("loading",),
    ("inputs",),
    (
        "judge",
        "journey",
        "progress",
        "pretrain",
        "export*",
        "onnx",
        "classify",
        "refine*",
        "heal*",
        "adapt",
        "hoi",
    ),
    ("cli*",),
)

# Families of architectures, by which other compressors dispatch. Only gguf.py may: it reads a file format.
FAMILIES = frozenset(
    "albert bert bloom deberta deepseek distilbert electra falcon gemma gpt gptj gptneox granite llama mamba "
    "mistral mixtral mpt olmo phi3 qwen roberta t5 vit".split()
)
WORD = re.compile(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z]+\d*")  # LlamaConfig -> Llama, Config; gpt2_lm -> gpt2, lm


def module(path: Path) -> str:
    """'rankfold/methods/svd.py' -> 'methods'; the tier is that of the first name below the package."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


NAMES = {module(path) for path in MODULES}


def relative(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def tier(name: str) -> int:
    """Position of a module in TIERS."""
    for position, patterns in enumerate(TIERS):
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            return position
    pytest.fail(f"rankfold/{name} has no place in the import order: add it to TIERS in {Path(__file__).name}")


def nodes(tree: ast.AST, lazy: bool = True) -> Iterator[ast.AST]:
    """Every node that can run: not what stands under `if TYPE_CHECKING`, and functions only if `lazy`."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        if not lazy and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield child
        yield from nodes(child, lazy)


def imports(path: Path, lazy: bool = True) -> set[str]:
    """Absolute dotted names that a file imports, relative ones resolved; `from a import b` gives 'a.b'."""
    package = ("rankfold", *path.relative_to(PACKAGE).parts[:-1])
    found: set[str] = set()
    for node in nodes(ast.parse(path.read_text(encoding="utf-8")), lazy):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{origin}.{alias.name}" for alias in node.names}
    return found


def siblings(path: Path, lazy: bool = True) -> set[str]:
    """First names below the package that a file imports; 'rankfold' where it imports the public names."""
    found = set()
    for name in imports(path, lazy):
        parts = name.split(".")
        if parts[0] == "rankfold":
            found.add(next((part for part in parts[1:2] if part in NAMES), "rankfold"))
    return found - {module(path)}


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_nothing_imports_rightward(path: Path) -> None:
    mine = tier(module(path))
    for name in sorted(siblings(path)):
        assert name != "rankfold", f"{path.name} imports the package: import the module that defines the name"
        assert tier(name) <= mine, f"{path.name} imports {name}, which stands to its right"


def test_imports_at_module_level_have_no_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        graph.setdefault(module(path), set()).update(siblings(path, lazy=False))
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_autoload_imports_nothing_of_ours_at_module_level() -> None:
    """torch imports it inside `import torch`, on every start of every program of the user."""
    path = PACKAGE / "autoload.py"
    assert siblings(path, lazy=False) == set()
    assert {name.split(".")[0] for name in imports(path, lazy=False)} <= sys.stdlib_module_names


PROBE = """
import sys
{code}
heavy = ["transformers", "peft", "datasets", "accelerate", "matplotlib", "lm_eval", "typer", "rich", "gguf"]
print([name for name in heavy if name in sys.modules])
print("torch" in sys.modules and sys.modules["torch"].cuda.is_initialized())
"""


@pytest.mark.parametrize(
    "code", ["import torch", "import rankfold", "from rankfold import factorize_, recipes"]
)
def test_import_is_light(code: str) -> None:
    """Neither the core nor the hook that `import torch` calls brings in the ecosystem or touches a GPU."""
    run = subprocess.run(
        [sys.executable, "-c", PROBE.format(code=code)], capture_output=True, text=True, timeout=300
    )
    assert (run.stdout.split("\n"), run.returncode) == (["[]", "False", ""], 0), run.stderr


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_are_short_and_named_for_what_they_hold(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 300, f"{path.name} has {lines} lines: split it along an idea"
    assert path.stem not in {"utils", "util", "helpers", "common", "misc"}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_no_pickle_and_no_remote_code(path: Path) -> None:
    unsafe = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    assert not {name.split(".")[0] for name in imports(path)} & unsafe
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            where = f"{path.name}:{node.lineno}"
            assert options.get("trust_remote_code", "False") == "False", where
            loads = ast.unparse(node.func) == "torch.load"
            assert not loads or options.get("weights_only") == "True", f"{where}: without weights_only"


def code_words(path: Path) -> Iterator[tuple[int, str]]:
    """(line, word) of the identifiers and strings of a file; its docstrings and comments may name anyone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if id(node) in bare:
            continue
        line = getattr(node, "lineno", 0)
        for _, value in ast.iter_fields(node):
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str):
                    yield from ((line, word.lower()) for word in WORD.findall(text))


def family(word: str) -> bool:
    return word in FAMILIES or word.rstrip("0123456789") in FAMILIES


def test_family_names_are_recognised(tmp_path: Path) -> None:
    source = tmp_path / "x.py"
    source.write_text('"""llama"""\n# bert\nfor_gpt2 = f("t5-small")\nMistralConfig = vitality = phi = 3\n')
    assert {word for _, word in code_words(source) if family(word)} == {"mistral", "gpt2", "t5"}


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "gguf.py"], ids=relative)
def test_no_architecture_is_named(path: Path) -> None:
    """What a layer is decides what happens to it, not its model's name (gguf.py reads one family's files)."""
    named = [f"{path.name}:{line}: {word}" for line, word in code_words(path) if family(word)]
    assert not named, named
