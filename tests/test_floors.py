"""A module imports only from lower floors or its own folder; files stay readable in length."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "dino_lightning"

# fmt: off
FLOORS = [
    {"config", "schedules", "distributed", "numerics", "sharding", "errors", "records", "quiet",
     "factors", "ops", "restarts", "processes", "outside_training", "held_folder"},
    {"heads", "losses", "centering", "ema", "optim", "lars", "readings", "prototype_loss", "activations",
     "pictures", "pictures_tokens", "feature_queue", "collapse", "masking"},
    {"backbones", "vit", "networks", "data"},
    {"methods", "evaluation", "checkpoints", "strategy", "launcher"},
    {"callbacks"},
    {"build", "run", "run_evaluation", "checks", "checks_step", "checks_method", "checks_evaluation",
     "checks_environment", "checks_resources", "checks_resume", "checks_initial", "checks_sweep",
     "report", "replay", "suggest", "suggest_machine", "suggested", "trial"},
    {"cli", "evaluate", "export", "report_runs", "explain", "imports", "inspect_data", "reference", "sweeps", "compare",
     "quick_start", "completion", "command_line", "use", "dashboard"},
]
# fmt: on
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}

# The entry points of a floor, which import their neighbors on purpose.
WITHIN = {
    ("replay", "build"),
    ("replay", "checks"),
    ("run", "build"),
    ("run", "checks"),
    ("checks", "checks_step"),
    ("checks", "checks_sweep"),
    ("checks", "checks_method"),
    ("run", "checks_environment"),
    ("run", "checks_resources"),
    ("run", "checks_resume"),
    ("run", "checks_initial"),
    ("run_evaluation", "checks_environment"),
    ("run", "report"),
    ("run", "suggested"),
    ("suggested", "suggest"),
    ("suggested", "suggest_machine"),
    ("suggested", "trial"),
    ("suggest_machine", "suggest"),
    ("trial", "build"),
    ("suggested", "checks_resources"),
    ("cli", "quick_start"),
    ("cli", "completion"),
    ("cli", "command_line"),
    ("evaluate", "command_line"),
    ("use", "command_line"),
    ("evaluate", "completion"),
    ("use", "completion"),
    ("export", "command_line"),
    ("suggested", "checks"),
    ("cli", "explain"),
    ("cli", "imports"),
    ("cli", "sweeps"),
    ("evaluate", "cli"),
    ("evaluate", "sweeps"),
    ("export", "cli"),
    ("export", "explain"),
    ("run_evaluation", "checks_evaluation"),
    ("pictures_tokens", "pictures"),
    ("prototype_loss", "losses"),
    ("backbones", "vit"),
    ("optim", "lars"),
    ("inspect_data", "cli"),
    ("inspect_data", "explain"),
    ("strategy", "launcher"),
    ("use", "cli"),
    ("use", "explain"),
    ("use", "quick_start"),
    ("inspect_data", "quick_start"),
}

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def top(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("dino_lightning.")}
    return found


def test_every_module_has_a_floor() -> None:
    assert {top(path) for path in MODULES} == set(FLOOR)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    here = top(path)
    for other in imports_of(path) - {here}:
        # Floor 0's parts know each other; so do a run and what it consists of.
        neighbor = FLOOR[here] == FLOOR[other] and (FLOOR[here] == 0 or (here, other) in WITHIN)
        assert FLOOR[other] < FLOOR[here] or neighbor, f"{here} (floor {FLOOR[here]}) imports {other} ({FLOOR[other]})"


def test_the_test_sees_an_upward_import(tmp_path: Path) -> None:
    module = tmp_path / "losses.py"
    module.write_text("from dino_lightning.methods.dino import DINO\n")
    assert imports_of(module) == {"methods"}
    assert FLOOR["methods"] > FLOOR["losses"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350


def test_final_methods_are_short() -> None:
    """A method is read in one go: what all share stands in their base."""
    lengths = {
        node.name: (node.end_lineno or 0) - node.lineno + 1
        for path in (PACKAGE / "methods").glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and any(ast.unparse(d) == "final" for d in node.decorator_list)
    }
    assert {"DINO", "BYOL", "MoCo", "SwAV", "Supervised"} <= set(lengths)
    assert max(lengths.values()) < 150, lengths
