"""The import graph against the table of layers in docs/architecture.md; the shape of a method file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
PACKAGE = SRC / "pegbox"
LAYERS = [  # from the top; a module imports from its own layer and from those below
    ("cli", "__main__"),
    ("recipes",),
    ("pretrain",),
    ("evaluate",),
    ("train",),
    ("zoo",),
    ("checks",),
    ("objectives", "data"),
    ("api", "catalogue"),
    ("methods", "peft_bridge"),
    ("updates",),
    ("anatomy",),
    ("core",),
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FREE = {"pegbox"}  # the package itself: a version, and names imported when first used

MODULES = {
    ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(path: Path, *, at_import: bool) -> Iterator[str]:
    """Names of pegbox's modules that a file imports; with `at_import`, only what runs when it is imported."""
    tree = ast.parse(path.read_text())
    for node in _statements(tree, at_import=at_import):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pegbox":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "pegbox")


def _statements(node: ast.AST, *, at_import: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if at_import and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        yield child
        yield from _statements(child, at_import=at_import)


def layer(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "pegbox"


@pytest.mark.parametrize("module", [m for m in MODULES if m not in FREE])
def test_imports_point_downwards(module: str) -> None:
    for imported in imports(MODULES[module], at_import=False):
        if imported not in FREE:
            assert RANK[layer(module)] <= RANK[layer(imported)], f"{module} imports {imported}, which lies above it"


def test_no_cycles() -> None:
    graph = {m: {i for i in imports(path, at_import=True) if i != m} for m, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"import cycle: {' -> '.join((*trail, module))}"
        if module not in done:
            for imported in graph.get(module, ()):
                visit(imported, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


METHODS = [p for p in sorted((PACKAGE / "methods").glob("*.py")) if not p.name.startswith("_")]


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_a_method_file_reads_well(path: Path) -> None:
    text = path.read_text()
    imported = set(imports(path, at_import=False))
    beneath = ("pegbox.core", "pegbox.updates", "pegbox.methods.lora", "pegbox.methods.dora")  # EVA is a LoRA, say
    assert all(i.startswith(beneath) for i in imported), imported
    assert text.count("\n") <= 150, "a method fits in one file that a person reads in a sitting"
    opening = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
    assert path.stem == "full" or re.search(r"\(.+\d{4}\)", opening), "the first line names the paper and its year"
    assert path.stem == "full" or re.search(r"arXiv:\d{4}\.\d{4,5}", opening), "and its number"


FORBIDDEN = {"utils", "helpers", "common", "misc"}


@pytest.mark.parametrize("module", MODULES)
def test_a_file_holds_one_thing(module: str) -> None:
    assert MODULES[module].stem not in FORBIDDEN
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 100, f"{module}.{node.name} has {length} lines"
