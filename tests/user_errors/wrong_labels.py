"""Rows: labels, lists and parquet files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from wrong_files import HTML, cut, filled, image, parquet, photos, touch
from wrong_images import folder
from wrong_inputs import Wrong

Make = Callable[[Path], list[str]]
TWO_CLASSES = "method=supervised needs labels of at least two classes, but this data has"
LABELS = "data.label_column=label"


def paths(*labels: str, delimiter: str = ",") -> str:
    """A table of the images of `photos`, which cycles through these labels."""
    rows = [f"{'ab'[index % 2]}/{index}.jpg{delimiter}{labels[index % len(labels)]}\n" for index in range(16)]
    return f"path{delimiter}label\n{''.join(rows)}"


def listed(content: str | bytes, *words: str, name: str = "list.csv") -> Make:
    """A list in a folder with good images."""

    def make(path: Path) -> list[str]:
        photos(path)
        file = touch(path / name, content.encode() if isinstance(content, str) else content)
        return ["data=listing", f"data.path={file}", *words]

    return make


def rows(*words: str, **options: Any) -> Make:
    """A folder with a parquet file."""
    return lambda path: ["data=parquet", f"data.path={parquet(path / 'in', **options)}", *words]


def spoilt(spoil: Callable[[Path], Path]) -> Make:
    """A damaged parquet file."""

    def make(path: Path) -> list[str]:
        spoil(parquet(path / "in", labels=[0, 1] * 8) / "train.parquet")
        return ["data=parquet", f"data.path={path / 'in'}"]

    return make


def numbers_for_images(path: Path) -> list[str]:
    (path / "in").mkdir()
    pq.write_table(pa.table({"image": [1] * 16, "label": [0, 1] * 8}), path / "in" / "train.parquet")
    return ["data=parquet", f"data.path={path / 'in'}"]


ROWS = [
    Wrong(
        "method=supervised with one class folder",
        lambda path: folder(photos(path / "in", classes=1), "method=supervised"),
        f"{TWO_CLASSES} 0 (no labels: 'DIR/in' has only one class folder); choose method=dino.",
    ),
    Wrong(
        "method=supervised with images without folders",
        lambda path: folder(filled(path / "in", image()), "method=supervised"),
        f"{TWO_CLASSES} 0 (no labels: 'DIR/in' has no class folders); choose method=dino.",
    ),
    Wrong(
        "method=supervised with a list of one class",
        listed(paths("x"), LABELS, "method=supervised"),
        f"{TWO_CLASSES} 1; choose method=dino.",
    ),
    Wrong(
        "method=supervised with labels that are all -1",
        rows("method=supervised", labels=[-1] * 16),
        f"{TWO_CLASSES} 0 (no labels: no k-NN evaluation); choose method=dino.",
    ),
    Wrong(
        "a label below -1",
        rows("method=supervised", labels=[-3, 0] * 8),
        "data.label_column=label contains the label -3; expected class numbers from 0, and -1 or an empty cell for an "
        "unlabeled image",
    ),
    Wrong(
        "a label without a class name",
        rows(labels=[0, 1, 2, 3] * 4, classes=["cat", "dog"]),
        "data.label_column=label contains the label 3, but there are 2 class names",
    ),
    Wrong(
        "large identifiers as labels",
        rows(labels=[0, 10**9] * 8),
        "data.label_column=label contains the label 1000000000; expected class numbers from 0",
    ),
    Wrong(
        "text labels in a parquet file",
        rows(labels=["cat", "dog"] * 8),
        "data.label_column=label of 'DIR/in/train.parquet' contains string values; expected integers",
    ),
    Wrong(
        "fractional labels in a parquet file",
        rows(labels=[0.5, 1.0] * 8),
        "data.label_column=label of 'DIR/in/train.parquet' contains float64 values; expected integers",
    ),
    Wrong(
        "a parquet file without the label column",
        rows(),
        "data.label_column=label is not a column of 'DIR/in/train.parquet'; choose one of image, or null for no labels",
    ),
    Wrong(
        "a misspelled image column",
        rows("data.image_column=imge", labels=[0, 1] * 8),
        "data.image_column=imge is not a column of 'DIR/in/train.parquet'; did you mean 'image'?",
    ),
    Wrong(
        "numbers in the image column",
        numbers_for_images,
        "data.image_column=image of 'DIR/in/train.parquet' contains int64 values; expected encoded images",
    ),
    Wrong(
        "a parquet file without rows",
        rows("data.label_column=null", images=[]),
        "data.path: 'DIR/in/train.parquet' has no rows",
    ),
    Wrong(
        "rows without an image",
        rows(images=[None] * 16, labels=[0, 1] * 8),
        "data: none of the tested images can be read (train.parquet row 0: ValueError: the row has no image)",
    ),
    Wrong(
        "web pages in the image column",
        rows(images=[HTML] * 16, labels=[0, 1] * 8),
        "data: none of the tested images can be read (train.parquet row 0: not an image format that PIL supports; the "
        "file begins with b'<!DOCTYPE ht')",
    ),
    Wrong(
        "a truncated parquet file",
        spoilt(cut),
        "data.path: 'DIR/in/train.parquet' is not a readable parquet file (…)",
    ),
    Wrong(
        "a web page saved as .parquet",
        spoilt(lambda file: touch(file, HTML)),
        "data.path: 'DIR/in/train.parquet' is not a readable parquet file (…)",
    ),
    Wrong(
        "CIFAR-10 as parquet without its training split",
        rows(labels=[0, 1] * 8, name="test.parquet"),
        "data.path=DIR/in contains no train*.parquet, only other files such as 'test.parquet'",
    ),
    Wrong(
        "a folder without parquet files",
        lambda path: ["data=parquet", f"data.path={photos(path / 'in')}"],
        "data.path=DIR/in contains neither *.parquet files nor a folder written by save_to_disk",
    ),
    Wrong(
        "a list without the path column",
        listed("file,label\na/0.jpg,1\n"),
        "data.path_column=path is not a column of 'DIR/list.csv'; choose one of file, label",
    ),
    Wrong(
        "a list without the label column",
        listed(paths("x", "y"), "data.label_column=labels"),
        "data.label_column=labels is not a column of 'DIR/list.csv'; did you mean 'label'? Use null for no labels",
    ),
    Wrong(
        "an empty list file",
        listed(""),
        "data.path_column=path is not a column of 'DIR/list.csv': the file is empty; expected a header and "
        "one row per image",
    ),
    Wrong("a list with only a header", listed("path,label\n"), "data.path=DIR/list.csv lists no images"),
    Wrong(
        "a list whose files are all missing",
        listed("path\nx/1.jpg\nx/2.jpg\n"),
        "data.path: row 1 of the list names 'x/1.jpg', but none of the 2 tested files exists, such as 'DIR/x/1.jpg'; "
        "set data.root to the folder that the paths are relative to",
    ),
    Wrong(
        "a list with some missing files",
        listed(paths("x") + "".join(f"gone/{index}.jpg,x\n" for index in range(4)), "experiment=quick"),
        "data.max_bad_share=0.05: 2 of 20 images cannot be read (DIR/gone/….jpg: no such file or directory; "
        "DIR/gone/….jpg: no such file or directory), see DIR/run/bad_images.txt; repair or remove them, or set "
        "data.max_bad_share=1 to continue without them",
        while_training=True,
    ),
    Wrong(
        "a row with too few columns",
        listed("path,label\na/0.jpg\na/2.jpg,1\n"),
        "data.path: 'DIR/list.csv' cannot be read as a table (CSV parse error: Expected 2 columns, got 1: a/0.jpg)",
    ),
    Wrong(
        "a row without a path",
        listed("path,label\na/0.jpg,1\n,2\n", LABELS),
        "data.path=DIR/list.csv: row 2 has no path",
    ),
    Wrong(
        "semicolons in a .csv",
        listed(paths("x", delimiter=";")),
        "data.path: the columns of 'DIR/list.csv' are separated by ';', but .csv files need ','; save it with commas",
    ),
    Wrong(
        "a list in UTF-16, as Excel saves it",
        listed(paths("x").encode("utf-16")),
        "data.path: 'DIR/list.csv' is UTF-16; save the list as UTF-8 text",
    ),
    Wrong(
        "an image instead of a list",
        listed(image(), name="x.jpg"),
        "data.path: 'DIR/x.jpg' is not a text file; save the list as UTF-8 text",
    ),
    Wrong(
        "a web page instead of a list",
        listed(HTML, name="list.txt"),
        "data.path: 'DIR/list.txt' is a web page; download the list itself",
    ),
    Wrong(
        "a folder instead of a list",
        lambda path: ["data=listing", f"data.path={photos(path / 'in')}"],
        "data.path=DIR/in is a folder; expected a list file, or use data=folder",
    ),
    Wrong(
        "data.label_column for a list without columns",
        listed("a/0.jpg\n", LABELS, name="list.txt"),
        "data.label_column=label needs a table (.csv or .tsv), but data.path=DIR/list.txt is not a table",
    ),
]
