"""Who may import whom, read from the imports themselves."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE, CLI = ROOT / "lorazip_core", ROOT / "cli"

# Lowest first. A module imports from rows below its own (smaller numbers) or from its own row.
ROWS = [
    {"errors", "progress", "files", "text", "workers", "device", "sample", "stopping", "linalg"},
    {"adapter", "bundle", "assignment", "lock", "kinds", "places"},
    {
        *{"stack", "batch", "packs", "updates", "summary", "quality", "plan"},
        *{"joint", "cp", "diag", "similarity", "assign", "factorise", "reconstruct"},
    },
    {
        "reading",
        "memory",
        "scan",
        "measure",
        "originals",
        "fetch",
        "cluster",
        "compress",
        "verify",
        "export",
        "info",
        "report",
    },
]
ENCODER = {"batch", "joint", "cp", "diag", "factorise", "similarity", "assign", "cluster", "compress", "plan"}
DECODER = {"reconstruct", "export", "verify", "info", "originals", "measure"}


def sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def unit(path: Path) -> str:
    """The module or package of the core, one level deep, that a file belongs to."""
    return path.relative_to(CORE).parts[0].removesuffix(".py")


def imports(path: Path, package: Path) -> Iterator[tuple[str, int]]:
    """(absolute dotted name, line) of everything that a file imports, wherever in it."""
    dotted = (package.name, *path.relative_to(package).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(dotted[: len(dotted) - node.level + 1]) if node.level else ""
            stem = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                yield f"{stem}.{alias.name}", node.lineno


def core_imports(path: Path) -> set[str]:
    """The units of the core that a file of the core imports, its own aside."""
    units = {name.split(".")[1] for name, _ in imports(path, CORE) if name.startswith("lorazip_core.")}
    return units - {unit(path), "__version__"}


def test_every_module_of_the_core_has_a_row() -> None:
    placed = set().union(*ROWS)
    assert {unit(path) for path in sources(CORE)} - {"__init__"} <= placed
    assert sum(map(len, ROWS)) == len(placed)


@pytest.mark.parametrize("path", sources(CORE), ids=lambda path: path.relative_to(CORE).as_posix())
def test_a_module_imports_only_from_its_row_and_those_above(path: Path) -> None:
    row = {name: number for number, names in enumerate(ROWS) for name in names}
    own = row.get(unit(path), -1)
    wrong = {name for name in core_imports(path) if row.get(name, len(ROWS)) > own}
    assert not wrong, f"{path.name} imports {wrong}"


def test_the_reader_of_imports_reads_them(tmp_path: Path) -> None:
    package = tmp_path / "lorazip_core"
    (package / "bundle").mkdir(parents=True)
    file = package / "bundle" / "reader.py"
    file.write_text(
        "import os.path\nfrom ..errors import X\nfrom .manifest import Y\nfrom .. import plan\ndef f():\n import torch"
    )
    assert {name for name, _ in imports(file, package)} == {
        "os.path",
        "lorazip_core.errors.X",
        "lorazip_core.bundle.manifest.Y",
        "lorazip_core.plan",
        "torch",
    }


def test_the_decoder_never_imports_the_encoder() -> None:
    direct: dict[str, set[str]] = {}
    for path in sources(CORE):
        direct.setdefault(unit(path), set()).update(core_imports(path))
    reached, todo = set(), list(DECODER & direct.keys())
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += direct.get(name, ())
    assert not reached & ENCODER


def test_only_the_command_line_prints_or_exits() -> None:
    calls = []
    for path in sources(CORE):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {
                "print",
                "sys.exit",
                "exit",
                "quit",
                "os._exit",
            }:
                calls.append(f"{path.name}:{node.lineno}")
            if isinstance(node, ast.Attribute) and ast.unparse(node) in {"sys.stdout", "sys.stderr"}:
                calls.append(f"{path.name}:{node.lineno}")
    assert not calls


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("huggingface_hub", {"lorazip_core/fetch"}),
        ("jinja2", {"lorazip_core/report"}),
        ("plotly", {"lorazip_core/report"}),
        ("rich", {"cli"}),
        ("transformers", set()),
        ("typer", {"cli"}),
    ],
)
def test_who_imports_what_from_outside(module: str, allowed: set[str]) -> None:
    for package in (CORE, CLI):
        for path in sources(package):
            place = path.relative_to(ROOT).as_posix()
            if not any(place.startswith(prefix) for prefix in allowed):
                lines = [line for name, line in imports(path, package) if name.split(".")[0] == module]
                assert not lines, f"{place} imports {module}"


def test_the_core_does_not_know_the_command_line() -> None:
    for path in sources(CORE):
        assert not [name for name, _ in imports(path, CORE) if name.split(".")[0] in {"cli", "lorazip_cli"}]


def test_the_command_line_imports_itself_relatively() -> None:
    """It is the folder `cli` and the package `lorazip_cli`; only relative imports are right under both names."""
    for path in sources(CLI):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert (node.module or "").split(".")[0] not in {"cli", "lorazip_cli"}, path
