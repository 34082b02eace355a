"""The public surface: the names, what they load, and who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pronk

ROOT = Path(pronk.__file__).parent
HEAVY = {
    "torch",
    "transformers",
    "fastapi",
    "grpc",
    "numpy",
    "tokenizers",
    "jinja2",
    "rich",
    "gguf",
}


def test_the_public_names():
    assert pronk.__all__ == [
        "BudgetError",
        "CheckpointError",
        "Model",
        "Piece",
        "PronkError",
        "RequestError",
        "SamplingParams",
        "SourceError",
        "__version__",
        "load",
        "resolve",
    ]
    for name in pronk.__all__:
        assert getattr(pronk, name) is not None
    assert dir(pronk) == sorted(pronk.__all__)


def loaded(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules, file=sys.stderr)"],
        capture_output=True, text=True, check=True)  # fmt: skip
    return {name.split(".")[0] for name in done.stderr.split()}


def test_importing_is_light():
    assert not loaded("import pronk") & HEAVY


def test_help_is_light():
    modules = loaded("from pronk.cli import main; assert main(['--help']) == 0")
    assert not modules & HEAVY


def test_loading_a_path_imports_nothing_that_fetches():
    modules = loaded("import pronk.model, pronk.checkpoint.sources, pronk.checkpoint.gguf")
    assert not modules & {"hashlib", "subprocess", "tempfile", "asyncio", "jinja2"}


def test_running_loads_no_framework(tmp_path):
    from checkpoints import tiny_llama_dir

    path = tiny_llama_dir(tmp_path / "tiny")
    code = f"from pronk.cli import main; main(['run', {str(path)!r}, 'hello', '--max-tokens', '3'])"
    assert not loaded(code) & {"torch", "transformers", "fastapi", "grpc", "gguf", "rich"}


# room -> rooms it may import; the modules at the top level are rooms of their own.
ARROWS = {
    "errors": set(),
    "units": {"errors"},
    "aside": set(),
    "spec": {"errors"},
    "graph": {"spec", "errors"},
    "checkpoint": {"spec", "errors", "units"},
    "device": {"spec", "errors", "units", "graph", "checkpoint"},
    "engine": {"aside", "spec", "errors", "graph", "checkpoint"},
    # Requests become ids, and ids text, by the tokenizer that came with the checkpoint.
    "serve": {"spec", "errors", "units", "checkpoint", "engine"},
    "model": {
        "aside", "spec", "errors", "units", "checkpoint", "graph", "device", "engine", "serve",
    },
    # A profile sets what ops cost, which the graph counts, against the time they took.
    # lm-eval makes its models itself, from a path, so the harness has to load one.
    "evaluate": {"spec", "errors", "units", "graph", "model"},
    # Calibration reads texts as measuring does.
    "compress": {"spec", "errors", "units", "checkpoint", "graph", "device", "evaluate"},
    "commands": {
        "spec", "errors", "units", "checkpoint", "graph", "device", "engine", "serve", "model",
        "evaluate", "compress",
    },
    "cli": {"errors", "commands"},
    "__main__": {"cli"},
}  # fmt: skip


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = (
                [node.module] if node.module != "pronk" else [f"pronk.{a.name}" for a in node.names]
            )
            found |= set(names)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("pronk.")}


def test_the_arrows():
    wrong = []
    for file in sorted(ROOT.rglob("*.py")):
        room = file.relative_to(ROOT).parts[0].removesuffix(".py")
        if room == "__init__":
            continue  # the table of public names
        outside = imports(file) - ARROWS[room] - {room, "_native", "__version__"}
        wrong += [f"{file.relative_to(ROOT)} imports {name}" for name in sorted(outside)]
    assert not wrong


def test_torch_stays_in_its_rooms():
    for file in ROOT.rglob("*.py"):
        if file.relative_to(ROOT).parts[0] in ("compress", "adapt"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not {n.split(".")[0] for n in names} & {"torch", "transformers"}, file
