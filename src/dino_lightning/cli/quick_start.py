"""`dino train data.path=~/photos`: what reads the path, and which experiment fits the machine.

The words that are put in are overrides like any other: Hydra shows them, and `config.yaml` keeps what they mean.
"""

from hydra.core.override_parser.overrides_parser import OverridesParser

from dino_lightning.data.sources.detect import detect_source

DECIDED = ("data", "experiment", "preset", "sweep")
"""Groups with any of which a command says for itself what it wants."""
SMALL, ON_CPU = "small_data", "photos32"
"""Experiments: a ViT with settings by number and size of the images, and minutes on a CPU."""


def with_quick_start(words: list[str], *, fast: bool | None = None) -> list[str]:
    """The words of a command line and, where they give `data.path` but neither data nor experiment, what is missing.

    `fast` says whether there is a GPU; None looks. Raises `UserError` for what cannot be a path.
    """
    given = {word.partition("=")[0]: word.partition("=")[2] for word in words if "=" in word}
    if "data.path" not in given or any(group in given for group in DECIDED):
        return words
    path = given["data.path"]
    if path[:1] in "\"'":  # Hydra's quotes
        read = OverridesParser.create().parse_override(f"data.path={path}").value()
        path = str(read)
    # A network of the user's own wants crops of its own, which the rule for small data chooses.
    if fast is None:
        fast = "backbone" in given or has_accelerator(given.get("trainer.accelerator", "auto"))
    chosen = [f"data={detect_source(path)}", f"experiment={SMALL if fast else ON_CPU}"]
    if "auto.machine" not in given:
        chosen.append("auto.machine=true")
    # Beside its cause: Hydra refuses overrides that do not stand together, such as one behind `--multirun`.
    place = next(index for index, word in enumerate(words) if word.startswith("data.path="))
    return [*words[:place], *chosen, *words[place:]]


def has_accelerator(accelerator: str) -> bool:
    """Whether Lightning's `accelerator` means another device than the CPU on this machine."""
    from dino_lightning.runtime.devices import trains_on_cpu

    return not trains_on_cpu(accelerator)
