"""Test accuracies over seeds: do native kernels, or fast convolutions, train worse than NumPy's kernels?

    python -m brim_bench.accuracy [--data FOLDER] [--seeds 3] [--epochs mlp=5,cnn=2] [--samples cnn=6000] [--json F]

Trains an MLP and a small CNN with each seed in three ways, each in a process of its own: native kernels; native
kernels with ``set_conv_precision("fast")``; ``BRIM_NATIVE=0``. A seed fixes weights, order and dropout alike in all
three, so differences are rounding's, magnified by training. FOLDER holds Fashion-MNIST's four files;
without it brim's own 8 x 8 digits are used.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import brim
from brim import data, nn, optim
from brim.io.json_files import write_json
from brim_bench import environment, text_report
from brim_bench.players import environment_with_threads

__all__ = ["MODELS", "WAYS", "main", "summary", "train"]

WAYS = {
    "native": ({}, "exact"),
    "native, fast convolutions": ({}, "fast"),
    "NumPy (BRIM_NATIVE=0)": ({"BRIM_NATIVE": "0"}, "exact"),
}
"""Variables of the process, and the precision of convolutions, by the name of the way."""

MODELS = ("mlp", "cnn")
_BATCH = 128


def _load(folder: Path | None) -> list[np.ndarray[Any, Any]]:
    """Training images (N, 1, H, W), their classes, test images, their classes."""
    sets = data.load_digits() if folder is None else data.load_fashion_mnist(folder)
    (x, y), (test_x, test_y) = (one[np.arange(len(one))] for one in sets)
    return [x, y, test_x, test_y]


def _network(model: str, side: int) -> nn.Module:
    if model == "mlp":
        layers: list[nn.Module] = [nn.Flatten()]
        for a, b in ((side * side, 256), (256, 256)):
            layers += [nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(), nn.Dropout(0.2)]
        return nn.Sequential(*layers, nn.Linear(256, 10))
    small = side // 4
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * small * small, 10),
    )  # fmt: skip


def train(model: str, seed: int, epochs: int, arrays: list[np.ndarray[Any, Any]], precision: str) -> dict[str, Any]:
    """Train one network; its accuracy on the test set, the loss of the last step, and how long it took."""
    brim.manual_seed(seed)
    brim.set_conv_precision(precision)
    x, y, test_x, test_y = arrays
    network = _network(model, x.shape[-1])
    optimizer = optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    loader = data.DataLoader(data.ArrayDataset(x, y), batch_size=_BATCH, shuffle=True, drop_last=True)

    def step(x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(x), y)
        loss.backward()
        optimizer.step()
        return loss

    planned, start, loss = brim.compile(step), time.perf_counter(), float("nan")
    for _ in range(epochs):
        for images, classes in loader:
            loss = planned(images, classes)
    took_s = time.perf_counter() - start
    network.eval()
    right = 0
    with brim.no_grad():
        for at in range(0, len(test_y), 500):
            scores = network(brim.asarray(test_x[at : at + 500])).numpy()
            right += int((scores.argmax(1) == test_y[at : at + 500]).sum())
    return {"accuracy": right / len(test_y), "loss": float(loss), "seconds": took_s}


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, least and greatest accuracy of each model in each way, and the mean's difference from NumPy's."""
    rows = []
    for model in MODELS:
        for way in WAYS:
            found = [one["accuracy"] for one in runs if (one["model"], one["way"]) == (model, way)]
            if found:
                rows.append({"model": model, "way": way, "accuracies": found, "mean": float(np.mean(found)),
                             "range": [min(found), max(found)]})  # fmt: skip
    plain = {row["model"]: row["mean"] for row in rows if "NumPy" in row["way"]}
    for row in rows:
        row["difference"] = row["mean"] - plain[row["model"]] if row["model"] in plain else None
    return rows


def _text(rows: list[dict[str, Any]]) -> str:
    body = [
        [row["model"], row["way"], *[f"{one:.2%}" for one in row["accuracies"]], f"{row['mean']:.2%}",
         f"{row['range'][0]:.2%} to {row['range'][1]:.2%}",
         "" if row["difference"] is None else f"{100 * row['difference']:+.2f}"]
        for row in rows
    ]  # fmt: skip
    seeds = [f"seed {n}" for n in range(len(rows[0]["accuracies"]))]
    header = ["network", "kernels", *seeds, "mean", "range", "points from NumPy"]
    return text_report.table(header, body, left=(0, 1))


def _process(way: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All seeds of all models in one way, in a process that loads its kernels anew."""
    variables, _ = WAYS[way]
    command = [sys.executable, "-m", "brim_bench.accuracy", "--way", way, "--seeds", str(options.seeds)]
    command += ["--epochs", options.epochs, "--samples", options.samples, "--threads", str(options.threads)]
    command += ["--data", str(options.data)] if options.data else []
    environ = {name: value for name, value in os.environ.items() if name != "BRIM_NATIVE"}
    threads = environment_with_threads(options.threads)
    environ |= {name: threads[name] for name in threads if name.endswith("THREADS")} | variables
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environ, check=False)
    if done.returncode:
        raise SystemExit(f"{way}: the process failed with exit code {done.returncode}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _numbers(text: str) -> dict[str, int]:
    """``mlp=5,cnn=2`` as a dictionary; empty where it says something else."""
    try:
        found = {name: int(count) for name, _, count in (one.partition("=") for one in text.split(","))}
    except ValueError:
        return {}
    return found if set(found) <= set(MODELS) and min(found.values()) > 0 else {}


def main() -> None:
    """Train everything, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's files; else brim's digits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", default="mlp=5,cnn=2", help="mlp=5,cnn=2")
    # NumPy's convolutions take half a second a step: on all images they would train for an hour
    parser.add_argument(
        "--samples", default="mlp=60000,cnn=6000", help="train on the first so many; mlp=60000,cnn=6000"
    )
    parser.add_argument("--threads", type=int, default=environment.processors())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    epochs, samples = _numbers(options.epochs), _numbers(options.samples)
    if not epochs or not samples or options.seeds < 1:
        parser.error("--epochs, --samples: expected numbers as in mlp=5,cnn=2; --seeds: 1 or more")
    if options.way:
        x, y, *test = _load(options.data)
        for model in (one for one in MODELS if one in epochs):
            for seed in range(options.seeds):
                most = samples.get(model)
                arrays = [x[:most], y[:most], *test]
                found = train(model, seed, epochs[model], arrays, WAYS[options.way][1])
                print(json.dumps({"model": model, "way": options.way, "seed": seed, **found}), flush=True)
        return
    runs = []
    for way in WAYS:
        print(f"{way} ...", file=sys.stderr, flush=True)
        runs += _process(way, options)
    rows = summary(runs)
    print(_text(rows))
    if options.json:
        kept = {"data": options.data.name if options.data else "digits", "samples": samples}
        kept |= {"epochs": epochs, "batch": _BATCH, "seeds": options.seeds}
        recorded = environment.record(options.threads)
        write_json(options.json, {"options": kept, "environment": recorded, "rows": rows, "runs": runs})
        print(f"written   {options.json}")


if __name__ == "__main__":
    main()
