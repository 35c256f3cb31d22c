"""``brim bench``: the flags of its commands. What they do is in the package ``brim_bench``, loaded when one runs."""

# Annotations are evaluated here (no `from __future__ import annotations`): cyclopts reads those of the commands.

from pathlib import Path
from typing import Annotated, Any

__all__ = ["add_bench"]


def add_bench(app: Any) -> None:
    """Add the command ``bench`` and its own commands to the application."""
    from cyclopts import App, Parameter

    bench = App(
        name="bench",
        help="Measure brim beside other libraries and the machine's limits; ask how long a training takes elsewhere.",
        help_format="plaintext",
        version_flags=(),
    )
    app.command(bench)

    def flag(text: str, *names: str) -> Any:
        return Parameter(name=names or None, help=text, show_default=False, negative=())

    @bench.command(name="list")
    def list_(*, device: Annotated[str, flag("cpu (default), or cuda: other sizes.")] = "cpu") -> int:
        """Show the workloads, and the peers that are installed."""
        from brim_bench import command

        return command.list_workloads(device)

    @bench.command
    def run(
        *names: Annotated[str, flag("Workloads, or patterns such as 'mlp_*'; all of the device without.")],
        device: Annotated[str, flag("cpu (default), cuda, cuda:1.")] = "cpu",
        vs: Annotated[
            str | None, flag("Peers: torch,torch_fused,torch_compile,torch_graphs,jax,mlx,tinygrad, or module:Class.")
        ] = None,
        threads: Annotated[int | None, flag("Threads of each side; all processors.")] = None,
        rounds: Annotated[int, flag("Rounds of each side, 7; twice as many where they spread.")] = 7,
        seconds: Annotated[float, flag("Seconds of a round, 0.3.")] = 0.3,
        max_spread: Annotated[float, flag("Most spread of a figure that is reported, 0.25.")] = 0.25,
        max_others: Annotated[float, flag("Most of the processors that others may use meanwhile, 0.25.")] = 0.25,
        eager: Annotated[bool, flag("Run brim without brim.compile.")] = False,
        json: Annotated[Path | None, flag("Write the results as JSON.")] = None,
        html: Annotated[Path | None, flag("Write a page that works offline.")] = None,
    ) -> int:
        """Measure workloads. Exit code 1: a wrong result or a failure; 4: too noisy to report."""
        from brim_bench import command
        from brim_bench.contest import Options
        from brim_bench.environment import processors

        count = processors() if threads is None else threads
        options = Options(device, count, rounds, seconds, max_spread, max_others, eager)
        return command.run(names, [one.strip() for one in (vs or "").split(",") if one.strip()], options, json, html)

    @bench.command
    def gpu(
        *names: Annotated[str, flag("Workloads, or patterns such as 'gpu_gemm_*'; all for GPUs without.")],
        minutes: Annotated[float, flag("For everything, 10; the most important comes first.")] = 10.0,
        device: Annotated[str, flag("cuda (default), cuda:1.")] = "cuda",
        vs: Annotated[str, flag("Peers, torch,torch_compile,torch_graphs.")] = "torch,torch_compile,torch_graphs",
        threads: Annotated[int | None, flag("Threads of each side on the host; all processors.")] = None,
        tiny: Annotated[bool, flag("Rehearse with small sizes, on any device.")] = False,
        json: Annotated[Path | None, flag("Where the results go, benchmarks/results/DATE-bench-CARD.json.")] = None,
        html: Annotated[Path | None, flag("Write a page that works offline.")] = None,
    ) -> int:
        """Measure everything on a GPU within a given time, and keep it."""
        from brim_bench.gpu import run_all

        peers = [one.strip() for one in vs.split(",") if one.strip()]
        return run_all(minutes, device, peers, names, json, html, tiny, threads)

    @bench.command
    def compare(
        before: Annotated[Path, flag("JSON of an earlier run.", "BEFORE")],
        after: Annotated[Path, flag("JSON of a later run.", "AFTER")],
        /,
    ) -> int:
        """Show what changed between two runs. Exit code 1 where a workload became slower, beyond the spread."""
        from brim_bench import command

        return command.compare(before, after)

    @bench.command
    def limits(
        *,
        device: Annotated[str, flag("cpu (default), cuda, cuda:1.")] = "cpu",
        threads: Annotated[int | None, flag("Threads; all processors.")] = None,
        seconds: Annotated[float, flag("Seconds of each measurement, 0.5.")] = 0.5,
    ) -> int:
        """Measure what this machine can do at most: arithmetic, memory by level, page faults."""
        from brim_bench import command
        from brim_bench.environment import processors

        return command.limits(device, processors() if threads is None else threads, seconds)

    @bench.command
    def machinery(
        *,
        flops: Annotated[float | None, flag("Operations of the training, 3.8e25.")] = None,
        params: Annotated[float | None, flag("Parameters, 405e9.")] = None,
        tokens: Annotated[float | None, flag("Tokens, 15.6e12.")] = None,
        gpus: Annotated[int, flag("How many of each single accelerator, 1.")] = 1,
        mfu: Annotated[float, flag("Share of a datasheet's peak that a training reaches, 0.4.")] = 0.4,
        threads: Annotated[int | None, flag("Threads of the measurement; all processors.")] = None,
        results: Annotated[Path | None, flag("JSON of a run on a GPU, or a folder; benchmarks/results.")] = None,
        json: Annotated[Path | None, flag("Write the table as JSON.")] = None,
        html: Annotated[Path | None, flag("Write a page that works offline.")] = None,
    ) -> int:
        """How long would this training take on this machine, and on others? Llama 3 405B unless told otherwise."""
        from brim_bench import command
        from brim_bench.environment import processors

        count = processors() if threads is None else threads
        places = command.usable_devices()
        return command.machinery_table(flops, params, tokens, gpus, mfu, count, places, json, html, results)
