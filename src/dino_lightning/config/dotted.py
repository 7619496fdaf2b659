"""Nested settings by dotted keys such as `optim.lr`, and values as they are typed on the command line."""

from collections.abc import Mapping
from typing import Any

MAX_LENGTH = 200
"""Characters of a value in a message."""


def get_dotted(config: Any, key: str) -> Any:
    """The value at a dotted key of a nested dataclass or mapping, or None if there is no such key."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else getattr(config, part, None)
    return config


def flatten(settings: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dictionary with dotted keys. An empty mapping stays a value."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        key = f"{prefix}{name}"
        flat |= flatten(value, prefix=f"{key}.") if isinstance(value, Mapping) and value else {key: value}
    return flat


def format_value(value: Any) -> str:
    """A value as it is typed on the command line, such as `true`, `null` or `[1,0.5]`, cut to `MAX_LENGTH`."""
    text = _format(value).replace("\0", "\\0")
    return text if len(text) <= MAX_LENGTH else f"{text[:MAX_LENGTH]}…"


def _format(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case list() | tuple():
            return f"[{','.join(map(_format, value))}]"
        case Mapping():
            return f"{{{','.join(f'{key}:{_format(each)}' for key, each in value.items())}}}"
        case _:
            return str(value)
