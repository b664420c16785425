"""Who may import whom, read from the imports themselves."""

from __future__ import annotations

import ast
import re
from collections.abc import Container, Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from lorazip_cli.wording import OPTIONS

ROOT = Path(__file__).parent.parent
CORE, CLI = ROOT / "lorazip_core", ROOT / "cli"

# From the ground up: a file imports from its own floor and from those below it.
FLOORS = (
    "base",
    "maths",
    "schemes",
    "adapter",
    "bundle",
    "fetch",
    "reading",
    "model",
    "serving",
    "clustering",
    "planning",
    "compress",
    "maintain",
    "verify",
    "export",
    "vllm",
    "report",
    "sample",
    "info",
)
ENCODER = (
    "maths.chunks",
    "maths.cores",
    "maths.part",
    "maths.batch",
    "maths.tucker",
    "maths.cp",
    "maths.encode",
    "clustering",
    "planning",
    "compress",
    "maintain",
)
DECODER = ("bundle.decoder", "serving", "export", "verify", "vllm", "info")

# What PEFT calls its files, tensors and fields: adapter/formats alone knows it.
FORMATS = "adapter.formats"
PEFT_NAMES = re.compile(
    r"adapter_config|adapter_model\b|base_model\.model|base_layer|lora_(?:[AB]\b|embedding|magnitude|bias|alpha)"
    r"|modules_to_save|peft_type|(?:rank|alpha)_pattern|target_(?:modules|parameters)|use_(?:rslora|dora)"
)
EXCEPT = {
    # A feature that a manifest requires, so a word of bundles.
    "bundle.contradictions": {"target_parameters"},
    "bundle.manifest": {"target_parameters"},
    # What of PEFT's vLLM refuses or ignores is known of vLLM.
    "export.vllm": {"base_layer", "lora_bias", "modules_to_save", "target_parameters", "use_dora"},
    # The model card says to people how the factors are scaled.
    "export.readme": {"lora_alpha"},
}
# Who needs to know of one form only: export writes PEFT's, and a bundle has its biases with their scales.
OF_ONE_FORM = {"export.exporter", "verify.compare"}
OF_ALL_FORMS = {f"{FORMATS}.{name}" for name in ("foreign", "format", "names", "registry")}


def sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


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


def module(path: Path) -> str:
    """The dotted name of a file of the core, below the core."""
    return ".".join(path.relative_to(CORE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {module(path): path for path in sources(CORE)}


def core_imports(path: Path, lines: Container[int] | None = None) -> set[str]:
    """The modules of the core that a file of the core imports, wherever in it, or on some ``lines``."""
    found = set()
    for name, line in imports(path, CORE):
        if lines is not None and line not in lines:
            continue
        inner = name.removeprefix("lorazip_core").lstrip(".")
        if name.startswith("lorazip_core.") and inner != "__version__":
            found.add(inner if inner in MODULES else inner.rpartition(".")[0])
    return found - {"", module(path)}


def floor(name: str) -> int:
    return FLOORS.index(name.split(".")[0])


def test_every_module_of_the_core_has_a_floor() -> None:
    assert {name.split(".")[0] for name in MODULES} - {""} == set(FLOORS)


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {""}))
def test_a_module_imports_only_from_its_floor_and_those_below(name: str) -> None:
    wrong = {other for other in core_imports(MODULES[name]) if floor(other) > floor(name)}
    assert not wrong, f"{name} imports {wrong}"


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


def imported_at_once(name: str) -> set[str]:
    """The modules of the core that are imported with this one: not within functions, and not for types alone."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return core_imports(MODULES[name], {line for node in top for line in range(node.lineno, node.end_lineno + 1)})


def reached_from(names: Iterable[str]) -> set[str]:
    """All that these modules, or those in these packages, import, by whatever way.

    Schemes import what encodes when they encode, and that is the one way that is not followed.
    """
    reached: set[str] = set()
    todo = [name for name in MODULES if name.startswith(tuple(names))]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += imported_at_once(name) if name.startswith("schemes.") else core_imports(MODULES[name])
    return reached


def test_the_decoder_never_imports_the_encoder() -> None:
    reached = reached_from(DECODER)
    assert {"schemes.joint", "maths.factored"} <= reached
    assert not {name for name in reached if name.startswith(ENCODER)}


def test_no_two_modules_import_each_other() -> None:
    """A circle would make the order of imports matter; a package stands for its modules only where it is imported."""
    direct = {name: core_imports(path) - {name.rpartition(".")[0]} for name, path in MODULES.items()}
    order = TopologicalSorter(direct)
    order.prepare()


def said(path: Path) -> Iterator[str]:
    """The texts and the names of attributes in a file, but for its docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


OUTSIDE_FORMATS = sorted(name for name in MODULES if name and not name.startswith(FORMATS))


@pytest.mark.parametrize("name", OUTSIDE_FORMATS)
def test_the_names_that_peft_gives_stand_with_the_formats(name: str) -> None:
    assert {match for text in said(MODULES[name]) for match in PEFT_NAMES.findall(text)} == EXCEPT.get(name, set())


@pytest.mark.parametrize("name", OUTSIDE_FORMATS)
def test_no_format_is_named_outside_of_the_registry(name: str) -> None:
    forms = {other for other in core_imports(MODULES[name]) if other.startswith(FORMATS)} - OF_ALL_FORMS
    assert not forms or name in OF_ONE_FORM
    if name.startswith("adapter."):
        assert not [
            text for text in said(MODULES[name]) if re.search(r"(?i)peft|dora\b|kohya|diffusers|mlx|tune\b", text)
        ]


def test_the_maths_knows_no_paths_threads_or_processes() -> None:
    foreign = {"concurrent", "io", "multiprocessing", "os", "pathlib", "shutil", "subprocess", "tempfile", "threading"}
    for name, path in MODULES.items():
        if name.startswith("maths."):
            found = {imported.split(".")[0] for imported, _ in imports(path, CORE)} & foreign
            assert not found, f"{name} imports {found}"


def test_the_page_on_the_architecture_lists_the_floors_and_their_modules() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    [listed] = re.findall(r"^```text\n(base/ .*?)^```", page, re.MULTILINE | re.DOTALL)
    floors: dict[str, set[str]] = {}
    for line in listed.splitlines():
        if not line.startswith(" "):
            here = line.split()[0].rstrip("/")
            floors[here] = set()
        else:
            words = line.split()
            within = words.pop(0) if words[0].endswith("/") else ""
            floors[here].update((within + word).replace("/", ".") for word in words)
    assert tuple(floors) == FLOORS
    for name, modules in floors.items():
        inside = {path.relative_to(CORE / name).with_suffix("").as_posix() for path in sources(CORE / name)}
        assert modules == {each.replace("/", ".") for each in inside if not each.endswith("__init__")}, name


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
        ("transformers", {"lorazip_core/model"}),
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


def texts(path: Path) -> Iterator[str]:
    """The texts in a file, but for its docstrings; those with fields as a whole, with {} for each field."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    within = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):  # from the outside in
        if isinstance(node, ast.JoinedStr):
            within.update(map(id, node.values))
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in within:
            yield node.value


COMMAND = re.compile(r"'lorazip [^']*'")  # in quotes, to be typed as it is
OPTION = re.compile(r"(?<![\w-])--[a-z]| -o\b")
# The pages are about a run of a command, and so have its options.
SPEAKS_OF_PARAMETERS = sorted(name for name in MODULES if name and not name.startswith("report"))
OPTIONS_OF_OTHERS = {"vllm.launch", "vllm.options", "vllm.options_file"}  # another program's, which it starts


@pytest.mark.parametrize("name", sorted(set(SPEAKS_OF_PARAMETERS) - OPTIONS_OF_OTHERS))
def test_the_core_names_no_option(name: str) -> None:
    assert not [text for text in texts(MODULES[name]) if OPTION.search(COMMAND.sub("", text)) or text == "-o"]


def test_every_parameter_that_the_core_names_has_an_option() -> None:
    """And the table has no other."""
    markdown = {"export.readme"}
    named = {
        match
        for name in set(SPEAKS_OF_PARAMETERS) - markdown
        for text in texts(MODULES[name])
        for match in re.findall("«([^«»{}()]+)»", text)
    }
    assert named == OPTIONS.keys()


def test_the_command_line_imports_itself_relatively() -> None:
    """It is the folder `cli` and the package `lorazip_cli`; only relative imports are right under both names."""
    for path in sources(CLI):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert (node.module or "").split(".")[0] not in {"cli", "lorazip_cli"}, path
