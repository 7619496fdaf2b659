"""The help of `dino` and of its verbs. Imports the standard library alone, because it must answer at once.

Options of groups are the files under `conf/`; keys with their documentation are read from the source of the dataclass.
"""

import ast
import re
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1]
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parents[1] / "conf"
WIDTH = 110
"""Columns of the help."""


class Verb(NamedTuple):
    """What `dino VERB` does and reads. The module `dino_lightning.cli.VERB` has its function `main`."""

    summary: str
    usage: str
    plain_words: str
    """What words without `=` mean."""
    examples: str
    keys: tuple[str, str] | None = None
    """File and name of the dataclass with its keys; None if `groups` say enough."""
    root: str | None = None
    """The file under `conf/` that Hydra composes; None for verbs without Hydra's flags."""
    groups: tuple[str, ...] = ()


TRAIN_GROUPS = (
    *("backbone", "method", "crops", "data", "optim", "trainer", "compute", "logger", "callbacks"),
    *("preset", "experiment", "sweep"),
)

VERBS = {
    "train": Verb(
        summary="train a network",
        usage="dino train [PATH] [group=option] [group.key=value]",
        plain_words="PATH is data.path: a folder, zip, tar, file list or parquet of your images. Settings are then "
        "chosen for them and for this machine. Without PATH: small built-in images.",
        examples="""
            dino train                                       the built-in images, a few minutes on a CPU
            dino train ~/photos                              your images, settings chosen for them and this machine
            dino train experiment=vits16_100ep data.path=DIR     the paper's recipe on ImageNet
            dino train ~/photos backbone=resnet50 trainer.devices=8     any key can be changed
            dino train --multirun seed=0,1,2                 several runs; dino table compares them
            dino train --multirun sweep=table7 preset=quick  the paper's ablations, small
            dino train output_dir=SAME_FOLDER resume=true    continue a run
            eval "$(dino train -sc install=bash)"            completion of all verbs by Tab; also zsh, fish""",
        root="config",
        groups=TRAIN_GROUPS,
    ),
    "eval": Verb(
        summary="evaluate a network: k-NN, linear, fine-tuning, retrieval, copies, video, attention",
        usage="dino eval CHECKPOINT [group=option] [group.key=value]",
        plain_words="CHECKPOINT is checkpoint: a run's folder, a weights file, timm:NAME, hf:OWNER/NAME or "
        "untrained:NAME.",
        examples="""
            dino eval outputs/RUN                            k-NN on the built-in images
            dino eval FILE.pth eval=linear data=imagenet data.path=DIR
            dino eval timm:vit_small_patch16_224.dino eval=video data.path=DIR
            dino eval outputs/RUN eval=attention data=pictures data.path=photo.jpg
            dino eval outputs/RUN baseline=true              and the untrained network for comparison
            dino eval A,B --multirun eval=knn,linear_grid    several evaluations""",
        root="evaluate",
        groups=("eval", "data", "trainer", "logger"),
    ),
    "embed": Verb(
        summary="write the features of many images to a file",
        usage="dino embed CHECKPOINT PATH output=FILE [group=option] [key=value]",
        plain_words="CHECKPOINT is checkpoint, as for dino eval; PATH is data.path.",
        examples="""
            dino embed outputs/RUN ~/photos output=photos.parquet
            dino embed timm:vit_small_patch16_224.dino photos.zip data=archive output=photos.npy
            dino embed outputs/RUN ~/photos output=x.npy features=mean_patch    the mean patch token
            dino embed outputs/RUN ~/photos output=x.npy trainer.devices=8      repeat the command to continue""",
        keys=("config/embedding.py", "EmbedConfig"),
        root="embed",
        groups=("data", "trainer"),
    ),
    "export": Verb(
        summary="convert a network to another format: timm, transformers, ONNX, torch, the original's",
        usage="dino export CHECKPOINT format=FORMAT output=PATH",
        plain_words="CHECKPOINT is checkpoint, as for dino eval.",
        examples="""
            dino export outputs/RUN format=timm output=FOLDER           timm.create_model("local-dir:FOLDER")
            dino export outputs/RUN format=huggingface output=FOLDER    transformers.AutoModel.from_pretrained
            dino export outputs/RUN format=onnx output=backbone.onnx    images of any number and size
            dino export outputs/RUN format=torch output=backbone.pt2    torch.export.load
            dino export outputs/RUN format=original output=backbone.pth     facebookresearch/dino""",
        keys=("config/export.py", "ExportConfig"),
    ),
    "data": Verb(
        summary="inspect a data set before training on it",
        usage="dino data [check|stats] PATH [key=value] [group=option] [group.key=value]",
        plain_words="check (default): what the images are, which are broken or duplicates, a sheet of sample crops. "
        "stats: mean and standard deviation of each channel, for crops.mean and crops.std. PATH: a folder, a list "
        "(.csv, .tsv, .txt), .zip, .tar or parquet. Other words are keys and groups of dino train. Exit status: 0, 1 "
        "if check found broken images, 2 for wrong settings.",
        examples="""
            dino data ~/photos
            dino data ~/photos experiment=vits16_100ep       sample crops of that experiment
            dino data check scans data.value_range=[0,65535]
            dino data stats data=cifar10""",
        keys=("cli/data.py", "Options"),
    ),
    "table": Verb(
        summary="the runs of a sweep in one table, next to the paper's figures",
        usage="dino table FOLDER... [key=value]",
        plain_words="FOLDER is the folder of a sweep (--multirun) or of a run, finished or not.",
        examples="""
            dino table outputs/table7-20261124-154205
            dino table outputs/optuna-20261124-154205 plot=true     k-NN over what was swept: FOLDER/sweep.svg
            dino table FOLDER FOLDER format=markdown                for a document
            dino table outputs/collapse-20261124-154205 curves=collapse.svg     entropy and KL, as in figure 7""",
        keys=("cli/table.py", "Options"),
    ),
    "report": Verb(
        summary="an HTML page about a run, or about several",
        usage="dino report RUN... [key=value]",
        plain_words="RUN is the folder of a run or of a sweep, or a pattern of such folders.",
        examples="""
            dino report outputs/quick-20261124-154205        its report.html, with the evaluations done since
            dino report outputs/a outputs/b                  both in one page, outputs/report.html
            dino report 'outputs/quick-*' output=compare.html""",
        keys=("cli/report.py", "Options"),
    ),
    "wandb": Verb(
        summary="a saved view of a project at Weights & Biases",
        usage="dino wandb [PROJECT] [key=value]",
        plain_words="PROJECT is project. Each call adds a view; existing views stay as they are.",
        examples="""
            dino wandb                                       project dino-lightning of the key's user or team
            dino wandb project=photos entity=my-team
            dino wandb report=true                           and a report that compares its runs""",
        keys=("cli/wandb.py", "Options"),
    ),
    "replay": Verb(
        summary="repeat a saved non-finite step, to see where it begins",
        usage="dino replay FILE [key=value]",
        plain_words="FILE is nonfinite/stepNNNNNN-rankR.pt in the folder of a run. Exit status: 0 if something is "
        "non-finite again, 3 if not.",
        examples="""
            dino replay outputs/RUN/nonfinite/step000130-rank0.pt
            dino replay outputs/RUN/nonfinite/step000130-rank0.pt layers=true device=cuda""",
        keys=("cli/replay.py", "Options"),
    ),
    "docs": Verb(
        summary="write docs/configuration.md, the page of all keys (in a checkout)",
        usage="dino docs [check=true]",
        plain_words="",
        examples="""
            dino docs
            dino docs check=true                             exit with 1 if the page is out of date""",
        keys=("cli/docs.py", "Options"),
    ),
}

HIDDEN = {
    "train": {"data": {"copydays", "davis", "pictures", "revisited", "voc"}, "trainer": {"devices"}},
    "eval": {"trainer": {"default"}},
    "embed": {"data": {"copydays", "davis", "pictures", "revisited", "voc"}, "trainer": {"default"}},
}
"""Verb -> group -> options of the group that are for other verbs."""
WITHOUT_FILE = {
    "backbone": {"timm", "vit_small"},
    "method": {"byol", "dino", "supervised", "swav"},
    "crops": {"pil"},
    "data": {"archive", "builtin", "copydays", "davis", "folder", "gldv2", "huggingface", "listing", "parquet"}
    | {"pictures", "revisited", "torchvision", "voc", "webdataset"},
    "optim": {"adamw", "lars", "sgd"},
    "trainer": {"default", "devices"},
    "compute": {"default"},
    "logger": {"csv", "tensorboard", "wandb"},
    "callbacks": {"standard"},
    "eval": {"finetune", "knn", "linear", "linear_grid", "logistic", "neighbors"},
}
"""Group -> options that only a dataclass defines, without a file under `conf/`. Tests compare with `SCHEMAS`."""


def overview() -> str:
    """The help of `dino`."""
    width = max(map(len, VERBS))
    return "\n".join(
        [
            "DINO, self-distillation with no labels, on PyTorch Lightning.",
            "",
            "usage: dino VERB [key=value ...]",
            "",
            *(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items()),
            "",
            "Examples:",
            "  dino train ~/photos                   train on your images",
            "  dino eval outputs/RUN                 evaluate the network",
            "  dino embed outputs/RUN ~/photos output=photos.parquet",
            "",
            "dino VERB --help says more.",
        ]
    )


def verb_help(name: str) -> str:
    """The help of `dino VERB`."""
    verb = VERBS[name]
    parts = [f"{verb.summary[0].upper()}{verb.summary[1:]}.", f"usage: {verb.usage}"]
    if verb.plain_words:
        parts.append(textwrap.fill(verb.plain_words, WIDTH))
    if verb.groups:
        options = group_options(name)
        parts.append(
            "Groups (group=option):\n" + "\n".join(_entry(group, _listed(options[group])) for group in options)
        )
    if verb.keys:
        file, schema = verb.keys
        entries = [_entry(key, text) for key, text in documented_keys(PACKAGE / file, schema) if key not in verb.groups]
        parts.append("Keys (key=value):\n" + "\n".join(entries))
    parts.append("Examples:\n" + textwrap.indent(textwrap.dedent(verb.examples.strip("\n")), "  "))
    if verb.root:
        flags = "Flags: --cfg job prints all settings"
        flags += "." if name == "embed" else "; -m, --multirun starts a run for each value of key=A,B."
        parts.append(f"{flags}\nAll keys with defaults and units: docs/configuration.md")
    return "\n\n".join(parts)


def group_options(verb: str) -> dict[str, list[str]]:
    """Group -> its options for this verb; those in a folder of the group as FOLDER/NAME, at the end."""
    options = {}
    for group in VERBS[verb].groups:
        files = {path.relative_to(CONF / group).with_suffix("") for path in (CONF / group).rglob("*.yaml")}
        names = {path.as_posix() for path in files if path.parent not in files}  # preset/quick/ has parts of one
        names = (names | WITHOUT_FILE.get(group, set())) - HIDDEN[verb].get(group, set())
        options[group] = sorted(names, key=lambda name: (name.count("/"), name))
    return options


def documented_keys(file: Path, schema: str) -> list[tuple[str, str]]:
    """Name and documentation of each field of a dataclass, with its default, from the source."""
    module = ast.parse(file.read_text("utf-8"))
    body = next(node.body for node in module.body if isinstance(node, ast.ClassDef) and node.name == schema)
    keys = []
    for node, below in pairwise(body):
        match node, below:
            case ast.AnnAssign(target=ast.Name(id=name), value=value), ast.Expr(value=ast.Constant(value=str(doc))):
                keys.append((name, f"{' '.join(doc.split())}{_default(value)}"))
    return keys


def _default(value: ast.expr | None) -> str:
    if not isinstance(value, ast.Constant) or value.value in (None, ""):
        return ""
    text = str(value.value)
    return f" Default: {text.lower() if isinstance(value.value, bool) else text}."


def _listed(options: list[str]) -> str:
    """Options in a line; those in a folder as FOLDER/…"""
    return ", ".join(dict.fromkeys(re.sub(r"/.*", "/…", option) for option in options))


def _entry(name: str, text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=f"  {name:<22} ", subsequent_indent=" " * 25)
