"""`imports=[FILE]`: your Python files, imported before the configuration is composed.

A file registers what the configuration then knows by name, such as a method (docs/new_method.md). It becomes the module
`dino_lightning.cli.plugins.NAME`, which processes that launchers start find by this name, too.
"""

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from dino_lightning.config.paths import usable_path
from dino_lightning.config.registry import import_component
from dino_lightning.errors import UserError

KEY = "imports="
FILES = "DINO_LIGHTNING_IMPORTS"
"""Environment variable with the files that this process or the one that started it has imported, the latest first."""

__path__: list[str] = []  # Python looks for modules in a package only


class _Files(MetaPathFinder):
    """Finds a file by the name of its module: a pickled class has no more than that."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Where `dino_lightning.cli.plugins.NAME` is; None for other modules."""
        file = next((file for file in _files() if _module(Path(file)) == fullname), None)
        return None if file is None else importlib.util.spec_from_file_location(fullname, file)


sys.meta_path.append(_Files())


def with_imports(overrides: list[str]) -> list[str]:
    """Import what the words `imports=…` name; returns the words in the form that Hydra reads.

    A name is a file, or a module that Python finds. Raises `UserError` for one that is neither, or that fails. Also
    imports a method or backbone of the package that defines its configuration in its own file.
    """
    for group, _, names in (word.partition("=") for word in overrides if word.startswith(("method=", "backbone="))):
        for name in names.split(","):
            import_component(group, name)
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
        _import(name, module=name)
        return
    if not path.is_file():
        near = sorted(str(other) for other in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise UserError(f"imports={name}: there is no such file; in its folder there are {', '.join(near) or 'none'}.")
    file = path.resolve()
    for known in (path.stem, _module(path)):
        loaded = sys.modules.get(known)
        if loaded is not None and getattr(loaded, "__file__", None) == str(file):
            return
        if loaded is not None or path.stem in sys.stdlib_module_names:
            raise UserError(f"imports={name}: '{path.stem}' is the name of another Python module; rename the file.")
    os.environ[FILES] = os.pathsep.join(dict.fromkeys([str(file), *_files()]))
    _import(name, module=_module(file))


def _files() -> list[str]:
    return [file for file in os.environ.get(FILES, "").split(os.pathsep) if file]


def _module(file: Path) -> str:
    return f"{__name__}.{re.sub(r'[^0-9A-Za-z_]', '_', file.stem)}"


def _import(name: str, *, module: str) -> None:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"imports={name}: {error}; name a file that ends in .py, or an installed module.") from error
