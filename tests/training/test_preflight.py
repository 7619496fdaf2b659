"""`preflight.py` is the only caller of the checks of a run."""

import ast
from pathlib import Path

import dino_lightning
from dino_lightning.training import preflight

PACKAGE = Path(dino_lightning.__file__).parent
PREFLIGHT = Path(preflight.__file__)
LEVELS = {"check_combinations", "check_settings", "check_built"}
"""The functions that a run, automatic configuration and `compose` call."""
CHECKED = ["training", "runtime/environment.py", "loggers/checks.py", "config/checks/training.py"]
"""The folders and files that define checks of a run."""


def files(*names: str) -> list[Path]:
    paths = [PACKAGE / name for name in names]
    return [file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]


def called(path: Path) -> set[str]:
    """The functions named `check_*` that a file calls, by plain name or as an attribute of a module."""
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    names = {func.attr if isinstance(func, ast.Attribute) else ast.unparse(func) for func in calls}
    return {name for name in names if name.startswith("check_")}


def defined(path: Path) -> set[str]:
    names = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
    return {name for name in names if name.startswith("check_")}


def test_preflight_calls_every_check_of_a_run() -> None:
    checks = {name for path in files(*CHECKED) for name in defined(path)} - LEVELS
    assert len(checks) >= 12
    assert checks <= called(PREFLIGHT)


def test_nothing_else_calls_them() -> None:
    checks = called(PREFLIGHT) - LEVELS
    callers = {
        path.name: names
        for path in files("training", "cli/train.py", "cli/compose.py")
        if path != PREFLIGHT and path.parent.name != "debug" and (names := called(path) & checks - defined(path))
    }
    assert not callers
