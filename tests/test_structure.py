"""The package is thirteen rooms in order: a file imports only rooms before its own. Files stay readable in length."""

import ast
import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
PACKAGE = PROJECT / "src" / "dino_lightning"
ROOMS = [
    "runtime",
    "config",
    "models",
    "losses",
    "optim",
    "data",
    "methods",
    "checkpoints",
    "loggers",
    "report",
    "evaluation",
    "training",
    "cli",
]
ORDER = ["errors", *ROOMS]
ROOT_FILES = {"__init__.py", "__main__.py", "errors.py", "py.typed"}
LONGEST_FILE_LINES = 350

MODULES = sorted(PACKAGE.rglob("*.py"))
INSIDE_ROOMS = [path for path in MODULES if path.parent != PACKAGE]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            module = node.module or ""
            names |= {f"{module}.{alias.name}" for alias in node.names} if module == "dino_lightning" else {module}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("dino_lightning.")}


def test_the_root_has_rooms_only() -> None:
    entries = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert {name for name in entries if not (PACKAGE / name).is_dir()} <= ROOT_FILES
    assert {name for name in entries if (PACKAGE / name).is_dir()} == set(ROOMS)


def purpose_of(room: str) -> str:
    docstring = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or ""
    return docstring.split("\n\n")[0].replace("\n", " ")


def test_the_architecture_page_lists_the_rooms() -> None:
    page = (PROJECT / "docs" / "architecture.md").read_text()
    block = page.split("<!-- rooms:begin -->")[1].split("<!-- rooms:end -->")[0]
    assert block.strip().splitlines() == [f"- `{room}/`: {purpose_of(room)}" for room in ROOMS]


PAGES = [
    path
    for path in (PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").rglob("*.md")))
    if path.name != "log.md"
]  # it names former files


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_pages_name_files_that_exist(page: Path) -> None:
    text = page.read_text()
    ours = re.findall(rf"(?<![\w/.])(?:{'|'.join(ROOMS)})/[a-z_/]+\.py", text)
    others = re.findall(
        r"(?<![\w/.])(?:src|conf|tests|benchmarks|examples|notebooks)/[a-z0-9_/]+\.(?:py|yaml|ipynb)", text
    )
    missing = {path for path in ours if not (PACKAGE / path).exists() and not (PROJECT / path).exists()}
    assert not missing | {path for path in others if not (PROJECT / path).exists()}


def test_every_module_says_its_purpose() -> None:
    docstrings = {path: ast.get_docstring(ast.parse(path.read_text())) or "" for path in MODULES}
    assert not [path for path, text in docstrings.items() if len(text) < 15 or "TODO" in text]


def test_the_script_for_integration_names_tests_that_exist() -> None:
    script = (PROJECT / ".ci" / "run").read_text()
    tests = re.findall(r"(tests/[a-z_/]+\.py)::(\w+)", script)
    assert tests
    assert not [test for file, test in tests if f"\ndef {test}(" not in (PROJECT / file).read_text()]


def test_the_architecture_page_names_modules_that_exist() -> None:
    page = (PROJECT / "docs" / "architecture.md").read_text()
    paths = re.findall(rf"(?<![\w/.])(?:{'|'.join(ROOMS)})/[a-z_/]+", page)
    assert len(paths) > 20
    assert not {path for path in paths if not any((PACKAGE / f"{path}{end}").exists() for end in ("", ".py"))}


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_a_purpose(room: str) -> None:
    assert len(purpose_of(room)) > 20


@pytest.mark.parametrize("room", ROOMS)
def test_files_import_only_rooms_before_their_own(room: str) -> None:
    files = [path for path in INSIDE_ROOMS if room_of(path) == room]
    later = set(ORDER[ORDER.index(room) + 1 :])
    assert files
    assert not [(str(path), rooms) for path in files if (rooms := imported_rooms(path) & later)]


def test_the_test_sees_an_upward_import(tmp_path: Path) -> None:
    module = tmp_path / "cross_view.py"
    module.write_text("from dino_lightning.methods.dino import DINO\nfrom dino_lightning import training\n")
    assert imported_rooms(module) == {"methods", "training"}
    assert ORDER.index("methods") > ORDER.index("losses")


def test_no_file_is_long() -> None:
    folders = ("src", "benchmarks", "tests", "examples", "notebooks")
    files = [path for folder in folders for path in (PROJECT / folder).rglob("*.py")]
    lengths = {str(path.relative_to(PROJECT)): len(path.read_text().splitlines()) for path in files}
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FILE_LINES}


def test_final_methods_are_short() -> None:
    """A method fits on a screen, because the base class has the code that all methods share."""
    lengths = {
        node.name: (node.end_lineno or 0) - node.lineno + 1
        for path in (PACKAGE / "methods").glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and any(ast.unparse(d) == "final" for d in node.decorator_list)
    }
    assert {"DINO", "BYOL", "MoCo", "SwAV", "Supervised"} <= set(lengths)
    assert max(lengths.values()) < 150, lengths
