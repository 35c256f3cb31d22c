"""The commands with their flags and help; exit codes: 1 for a failure, 2 for a bad value, 3 for a small budget."""

# Annotations are evaluated here (no `from __future__ import annotations`): cyclopts reads those of the commands.

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from brim.cli.bench import add_bench

__all__ = ["EXIT_BAD_VALUE", "EXIT_BUDGET", "EXIT_FAILED", "EXIT_INTERRUPTED", "main"]

EXIT_FAILED, EXIT_BAD_VALUE, EXIT_BUDGET, EXIT_INTERRUPTED = 1, 2, 3, 130


def _build() -> Any:
    from cyclopts import App, Parameter

    app = App(
        name="brim",
        help="Deep learning under a declared memory budget.",
        version_flags=["--version"],
        version=_version,
        help_format="plaintext",
    )

    def flag(text: str, *names: str) -> Any:
        return Parameter(name=names or None, help=text, show_default=False, negative=())

    @app.command
    def train(
        dataset: Annotated[str | None, flag("digits, mnist, fashion-mnist, or a .csv or .npz file.")] = None,
        /,
        *,
        model: Annotated[str | None, flag("mlp (default) or cnn.")] = None,
        hidden: Annotated[str | None, flag("Widths of hidden layers, 256,256.")] = None,
        dropout: Annotated[float | None, flag("Share dropped, 0.2.")] = None,
        batch_size: Annotated[int | None, flag("Samples in a batch, 128.")] = None,
        epochs: Annotated[int | None, flag("Epochs, 5.")] = None,
        lr: Annotated[float | None, flag("Learning rate, 0.1.")] = None,
        optimizer: Annotated[str | None, flag("sgd (default), adam, adamw or rmsprop.")] = None,
        momentum: Annotated[float | None, flag("Of sgd and rmsprop, 0.9.")] = None,
        weight_decay: Annotated[float | None, flag("Weight decay, 0.")] = None,
        hypergradient: Annotated[float | None, flag("Learn the rate of sgd with this step size.")] = None,
        schedule: Annotated[str | None, flag("cosine (default), or none.")] = None,
        clip_norm: Annotated[float | None, flag("Clip the norm of the gradients.")] = None,
        fit: Annotated[str | None, flag("Over budget: none refuses (default), recompute, microbatch.")] = None,
        recompute: Annotated[str | None, flag("Layers to recompute in the backward pass, 0,3.")] = None,
        activations: Annotated[str | None, flag("Keep activations as bfloat16; none (default).")] = None,
        precision: Annotated[str | None, flag("fp32 (default), bf16, fp16 or tf32.")] = None,
        seed: Annotated[int | None, flag("Seed of everything random, 0.")] = None,
        device: Annotated[str | None, flag("cpu (default).")] = None,
        budget: Annotated[str | None, flag("Memory budget: 2GiB, 80%, auto (default), off.")] = None,
        data: Annotated[str | None, flag("Folder with the data sets.")] = None,
        config: Annotated[str | None, flag("TOML file with any of these settings.")] = None,
        out: Annotated[str | None, flag("Run folder, runs/<dataset>-<date-time>.")] = None,
        resume: Annotated[bool | None, flag("Continue the run in --out.")] = None,
        checkpoint_every: Annotated[int | None, flag("Also save every so many steps.")] = None,
    ) -> int:
        """Train a classifier; write the run's folder. Flags win over BRIM_<NAME>, that over --config."""
        given = {key: value for key, value in locals().items() if key in _TRAIN_FLAGS and value is not None}
        from brim.cli.train import run

        return run(given, config)

    @app.command
    def plan(
        what: Annotated[
            str | None,
            flag(
                "A data set as for train, gpt2[-medium|-large|-xl], resnet18, resnet50, a .toml file or a run.", "MODEL"
            ),
        ] = None,
        /,
        *,
        budget: Annotated[str | None, flag("Memory budget: 6GiB, 80%, auto (default), off.")] = None,
        batch_size: Annotated[int | None, flag("Samples in a batch.", "--batch-size", "--batch")] = None,
        device_profile: Annotated[str | None, flag("Plan for a card such as h100-80gb; estimated.")] = None,
        json: Annotated[Path | None, flag("Write the plan as JSON.")] = None,
        html: Annotated[Path | None, flag("Write the plan as a page that works offline.")] = None,
        search: Annotated[float | None, flag("Seconds to search for a batch or remedies, 10; 0 for none.")] = None,
        traffic: Annotated[bool, flag("Also print kernels, bytes and arithmetic by phase and op.")] = False,
        **settings: Annotated[str, flag("Any other setting of train: --hidden 256,256, --optimizer adamw.")],
    ) -> int:
        """Plan a training to the byte without running it: does it fit the budget? Exit code 3 when it does not."""
        given: dict[str, Any] = {name.replace("-", "_"): value for name, value in settings.items()}
        given |= {k: v for k, v in {"budget": budget, "batch_size": batch_size}.items() if v is not None}
        from brim.cli.plan import run

        return run(what, given, device_profile, json, html, search, traffic)

    @app.command
    def predict(
        run_folder: Annotated[Path, flag("Folder of a run.", "RUN")],
        input_file: Annotated[Path, flag("An .npz or .csv file with one sample a row.", "INPUT")],
        /,
        *,
        out: Annotated[Path | None, flag("Write here (.csv or .npz) instead of printing.")] = None,
        batch_size: Annotated[int, flag("Samples at a time, 256.")] = 256,
    ) -> int:
        """Predict with a trained run."""
        from brim.cli.predict import run

        return run(run_folder, input_file, out, batch_size)

    @app.command
    def check(
        *,
        device: Annotated[str | None, flag("cpu (default), cuda, cuda:1.")] = None,
        json: Annotated[Path | None, flag("Write every check as JSON.")] = None,
        only: Annotated[str | None, flag("Sections: environment, ops, networks, memory; ops,memory.")] = None,
        quick: Annotated[bool, flag("Fewer and shorter checks.")] = False,
        verbose: Annotated[bool, flag("A line for every row of the table of ops.")] = False,
    ) -> int:
        """Verify this installation: ops, networks and memory on a device. Exit code 1 when a check fails."""
        from brim.cli.check import run

        return run(device, json, only, quick, verbose)

    @app.command
    def info() -> int:
        """Show devices, versions, threads, memory limits, and what is missing."""
        from brim.cli.info import run

        return run()

    add_bench(app)
    return app


_TRAIN_FLAGS = frozenset(
    [
        "dataset",
        "model",
        "hidden",
        "dropout",
        "batch_size",
        "epochs",
        "lr",
        "optimizer",
        "momentum",
        "weight_decay",
        "hypergradient",
        "schedule",
        "clip_norm",
        "fit",
        "recompute",
        "activations",
        "precision",
        "seed",
        "device",
        "budget",
        "data",
        "out",
        "resume",
        "checkpoint_every",
    ]
)


def _version() -> str:
    import brim

    return brim.__version__


def run_command(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit code."""
    from cyclopts import CycloptsError

    try:
        result = _build()(
            None if argv is None else list(argv),
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
        return result if isinstance(result, int) else 0
    except CycloptsError as error:
        return _fail(str(error), EXIT_BAD_VALUE)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone, as in `brim info | head -1`
        return EXIT_FAILED
    except Exception as error:
        from brim.errors import BrimError, BudgetExceeded

        if isinstance(error, BudgetExceeded):
            return _fail(str(error), EXIT_BUDGET)
        if isinstance(error, BrimError | ValueError):
            return _fail(str(error), EXIT_BAD_VALUE)
        if isinstance(error, FloatingPointError | OSError):
            return _fail(str(error), EXIT_FAILED)
        raise


def _fail(message: str, code: int) -> int:
    print(f"brim: {message.strip()}", file=sys.stderr)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point of the script ``brim`` and of ``python -m brim``.

    Arguments:
        argv: the arguments; those of the process when None, which then exits with the code.
    """
    code = run_command(argv)
    if argv is None and code:
        raise SystemExit(code)
    return code
