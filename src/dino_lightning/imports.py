"""`imports=[FILE]`: Python files of one's own, read before the configuration is composed.

A file registers what the configuration then knows by name, such as a method (docs/new_method.md).
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from dino_lightning.config.paths import usable_path
from dino_lightning.errors import UserError

KEY = "imports="


def with_imports(overrides: list[str]) -> list[str]:
    """Import what the words `imports=…` name; returns the words in the form that Hydra reads.

    A name is a file, or a module that Python finds. Raises `UserError` for one that is neither, or that fails.
    """
    return [_imported(word) if word.startswith(KEY) else word for word in overrides]


def _imported(word: str) -> str:
    names = [name.strip("\"' ") for name in word.removeprefix(KEY).strip("[]").split(",")]
    for name in filter(None, names):
        import_one(name)
    quoted = ",".join(f'"{name}"' for name in names if name)
    return f"{KEY}[{quoted}]"


def import_one(name: str) -> None:
    """Import a file or module, once."""
    path = usable_path("imports", name)
    if path.suffix != ".py":
        _run(name, lambda: importlib.import_module(name))
        return
    if not path.is_file():
        near = sorted(str(other) for other in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise UserError(f"imports={name}: there is no such file; in its folder there are {', '.join(near) or 'none'}.")
    loaded = sys.modules.get(path.stem)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path.resolve()):
        return
    if loaded is not None or path.stem in sys.stdlib_module_names:
        raise UserError(f"imports={name}: '{path.stem}' is the name of another Python module; rename the file.")
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec is not None
    loader, module = spec.loader, importlib.util.module_from_spec(spec)
    assert loader is not None
    # Dataclasses look their module up by name; loader processes import it by name, too.
    sys.modules[path.stem] = module
    _run(name, lambda: loader.exec_module(module))


def _run(name: str, read: Callable[[], object]) -> None:
    try:
        read()
    except ModuleNotFoundError as error:
        sys.modules.pop(Path(name).stem, None)  # half of it
        raise UserError(f"imports={name}: {error}; name a file that ends in .py, or an installed module.") from error
