"""The folder of a run: config.json, metrics.jsonl, summary.json, model.safetensors, log.txt and the checkpoints.

Nothing but the log is written before there is something worth keeping: the first checkpoint or the end of an epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from brim.io import append_jsonl, read_json, save_arrays, save_checkpoint, truncate_jsonl, write_json

__all__ = ["RunFolder"]


class RunFolder:
    """Files of one run.

    Arguments:
        path: the folder; made with the first file.
        config: every hyper-parameter of the run.
    """

    def __init__(self, path: str | Path, config: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        self.config = dict(config or {})
        self._begun = False

    def begin(self) -> None:
        """Make the folder and write config.json, once."""
        if not self._begun:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / "config.json", self.config)
            self._begun = True

    def log(self, line: str) -> None:
        """Append a line to log.txt."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / "log.txt", "a", encoding="utf-8", newline="\n") as file:
            file.write(line + "\n")

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Append the line of an epoch to metrics.jsonl."""
        self.begin()
        append_jsonl(self.path / "metrics.jsonl", record)

    def keep_metrics(self, epochs: int) -> None:
        """Drop what was written after the checkpoint from which the run continues."""
        truncate_jsonl(self.path / "metrics.jsonl", epochs)

    def checkpoint(
        self,
        series: str,
        arrays_by_part: Mapping[str, Mapping[str, np.ndarray[Any, Any]]],
        state: Mapping[str, Any],
        step: int,
        keep: int,
    ) -> Path:
        """Save a checkpoint of a series ("last", "best")."""
        self.begin()
        return save_checkpoint(self.path, series, arrays_by_part, state, step=step, keep=keep)

    def finish(self, arrays: Mapping[str, np.ndarray[Any, Any]], summary: Mapping[str, Any]) -> None:
        """Write model.safetensors and summary.json."""
        self.begin()
        save_arrays(self.path / "model.safetensors", arrays, {"format": "pt"})
        write_json(self.path / "summary.json", summary)

    @staticmethod
    def read_config(path: str | Path) -> dict[str, Any]:
        """The config.json of a run. Raises CheckpointError if it is missing or damaged."""
        config: dict[str, Any] = read_json(Path(path) / "config.json")
        return config
