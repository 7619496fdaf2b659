"""Reads offline runs of W&B from their `.wandb` files."""

import json
from pathlib import Path
from typing import Any


def offline_records(folder: Path) -> list[Any]:
    """The records of the only offline run in a folder."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return records_of(path)


def records_of(path: Path) -> list[Any]:
    """The records of a file, after waiting for W&B's process, which in silent mode nobody else does."""
    import wandb
    from wandb.proto import wandb_internal_pb2 as pb

    wandb.teardown()

    content, position, parts, records = path.read_bytes()[7:], 0, b"", []
    # A LevelDB log: blocks of 32 KiB, chunks of crc (4), length (2), type (1: complete, 2: first, 3: middle, 4: last).
    while position + 7 <= len(content):
        left = 32768 - (position + 7) % 32768
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = pb.Record()
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    return records


def history(records: list[Any]) -> list[dict[str, Any]]:
    """The logged rows."""
    rows = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
    ]
    return [row for row in rows if row]


def logged(records: list[Any]) -> dict[str, list[Any]]:
    """Name -> logged values, in order."""
    names: dict[str, list[Any]] = {}
    for row in history(records):
        for name, value in row.items():
            names.setdefault(name, []).append(value)
    return names


def configuration(records: list[Any]) -> dict[str, Any]:
    """The run's configuration by top-level keys."""
    updates = [update for record in records for update in (*record.config.update, *record.run.config.update)]
    return {update.key or "/".join(update.nested_key): json.loads(update.value_json) for update in updates}


def maxima(records: list[Any]) -> set[str]:
    """Names of the metrics whose maximum is in the summary."""
    return {record.metric.name for record in records if record.metric.summary.max}


def description(records: list[Any]) -> Any:
    """The run's record: `display_name`, `run_group`, `job_type`, `tags`, `project`, `run_id`."""
    return next(record.run for record in records if record.HasField("run"))


def artifacts(records: list[Any]) -> list[Any]:
    """Records of artifacts: `type`, `name`, `metadata` (JSON), `manifest`."""
    return [record.artifact for record in records if record.HasField("artifact")] + [
        record.request.log_artifact.artifact
        for record in records
        if record.HasField("request") and record.request.HasField("log_artifact")
    ]
