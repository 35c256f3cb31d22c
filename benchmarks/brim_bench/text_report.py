"""Reports as text for a terminal: the table of a run, limits, the picture of the machinery."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from brim.units import format_bytes

__all__ = [
    "device_state_text",
    "figure",
    "limits_text",
    "log_bars",
    "machinery_text",
    "memory_text",
    "notes_of",
    "rate",
    "row_line",
    "run_text",
    "table",
]

_BLOCKS = " ▏▎▍▌▋▊▉█"


def figure(value: float | None, unit: str = "s") -> str:
    """A time or a size with three digits: ``1.23 ms``, ``412.3 MiB``."""
    if value is None:
        return "-"
    if unit == "B":
        return format_bytes(value)
    for factor, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= factor or name == "µs":
            scaled = value / factor
            digits = 0 if scaled >= 100 else 1 if scaled >= 10 else 2
            return f"{scaled:.{digits}f} {name}"
    raise AssertionError(value)


def rate(flops_per_s: float) -> str:
    """``233 GFLOP/s``, ``6.48 EFLOP/s``."""
    for factor, name in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if flops_per_s >= factor or name == "M":
            break
    return f"{flops_per_s / factor:,.3g} {name}FLOP/s"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Aligned columns; those in ``left`` to the left."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[n]) for line in lines) for n in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if n in left else cell.rjust(width) for n, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )


def ratio_text(ratio: Mapping[str, Any]) -> str:
    """``0.31 (0.29 - 0.33)``, or why there is none."""
    if ratio["status"] != "ok":
        return ratio["status"]
    return f"{ratio['median']:.2f} ({ratio['q25']:.2f} - {ratio['q75']:.2f})"


def side_text(side: Mapping[str, Any], unit: str) -> str:
    """``1.23 ms ± 2 %``, or why there is none."""
    if side["status"] != "ok" or "median" not in side:
        return side["status"]
    return f"{figure(side['median'], unit)} ±{side['spread'] / 2:.0%}"


def row_line(row: Mapping[str, Any]) -> str:
    """A row as one line, for the progress of a run."""
    parts = [f"{name} {side_text(side, row['unit'])}" for name, side in row["sides"].items()]
    parts += [f"brim/{name} {ratio_text(ratio)}" for name, ratio in row["ratios"].items()]
    return f"{row['workload']:<20} {'; '.join(parts)}"


def run_text(document: Mapping[str, Any]) -> str:
    """The table of a run, and what is wrong with rows that have no ratio."""
    rows = document["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["sides"]))
    peers = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    several = len(peers) > 1
    limited = any(row.get("limit") for row in rows)
    header = [
        "workload",
        *names,
        *[f"brim / {name}" for name in peers],
        *(["brim / best peer"] if several else []),
        *(["of the limit"] if limited else []),
        "memory",
    ]
    body, reasons = [], []
    for row in rows:
        limit = row.get("limit") or {}
        line = [row["workload"]]
        line += [side_text(row["sides"][name], row["unit"]) if name in row["sides"] else "-" for name in names]
        line += [ratio_text(row["ratios"][name]) if name in row["ratios"] else "-" for name in peers]
        if several:
            best = row.get("best_peer")
            line.append(f"{row['ratios'][best]['median']:.2f} {best}" if best else "-")
        line += [f"{limit['fraction']:.0%} {limit['by']}" if limit.get("fraction") else "-"] * limited
        body.append([*line, _memory(row["sides"])])
        if row["status"] != "ok":
            reasons.append(f"{row['workload']}: {row['status']}{': ' + row['why'] if row['why'] else ''}")
    text = table(header, body)
    text += "\n\nbelow 1: brim is faster; in brackets the middle half of the rounds' ratios; ± half of the middle half"
    text += f"\nmemory: {memory_text(rows)}"
    notes = [*reasons, *notes_of(document)]
    return text + "".join(f"\n{note}" for note in notes)


def memory_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the column of memory is."""
    if any("reserved_peak_bytes" in _of(row, name) for row in rows for name in row["sides"]):
        return (
            "most of the device's memory that was in use, as each library counts it; brim's plan; in brackets what the "
            "library had taken from the device"
        )
    planned = any("planned_peak_bytes" in _of(row, "brim") for row in rows)
    return "growth of the process's resident set" + ("; for brim also the exact peak of the plan" if planned else "")


def notes_of(document: Mapping[str, Any]) -> list[str]:
    """What a reader must know besides the table, a sentence each."""
    found = []
    if document["options"].get("tiny"):
        found.append("a rehearsal with small sizes: that it ran is all that it says, the figures mean nothing")
    found += [f"{one['workload']}: left out: {one['why']}" for one in document.get("left_out", [])]
    for row in document["rows"]:
        if row.get("in_turns"):
            found.append(f"{row['workload']}: the sides did not fit the device together, and had it in turns")
        if row["status"] == "ok":
            for name, ratio in row["ratios"].items():
                if ratio["status"] == "not supported" and "nothing to compile" not in ratio["why"]:
                    found.append(f"{row['workload']}: {name}: {ratio['why']}")
    if state := device_state_text(document["rows"]):
        found.append(state)
    return found


_STATES = (
    ("sm_clock_hz", "clock", 1e6, "MHz"), ("memory_clock_hz", "memory clock", 1e6, "MHz"),
    ("temperature_celsius", "temperature", 1.0, "°C"), ("power_watts", "power", 1.0, "W"),
    ("power_limit_watts", "power limit", 1.0, "W"),
)  # fmt: skip


def device_state_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """What the driver told of the device after rounds, lowest to highest; an empty string where it told nothing."""
    states = [row["device_state"] for row in rows if row.get("device_state")]
    parts = []
    for key, name, unit, text in _STATES:
        found = [value / unit for state in states for value in state.get(key, ())]
        if found:
            low, high = f"{min(found):,.0f}", f"{max(found):,.0f}"
            parts.append(f"{name} {low if low == high else f'{low} to {high}'} {text}")
    return f"device, read right after rounds: {', '.join(parts)}" if parts else ""


def _of(row: Mapping[str, Any], side: str) -> Mapping[str, Any]:
    return row["sides"].get(side, {}).get("memory", {})


def _memory(sides: Mapping[str, Mapping[str, Any]]) -> str:
    parts = []
    for name, side in sides.items():
        found = side.get("memory", {})
        if "reserved_peak_bytes" in found:
            plan = f", planned {format_bytes(found['planned_peak_bytes'])}" if "planned_peak_bytes" in found else ""
            reserved = format_bytes(found["reserved_peak_bytes"])
            parts.append(f"{name} {format_bytes(found['held_peak_bytes'])}{plan} ({reserved})")
        elif "rss_growth_bytes" in found:
            exact = f" ({format_bytes(found['planned_peak_bytes'])})" if "planned_peak_bytes" in found else ""
            parts.append(f"{name} {format_bytes(found['rss_growth_bytes'])}{exact}")
    return ", ".join(parts) or "-"


def limits_text(limits: Mapping[str, Any]) -> str:
    """Limits with how they were measured."""
    lines = [f"device       {limits['device']}"] if limits["device"] != "cpu" else []
    lines += [f"arithmetic   {rate(limits['flops_per_s'])}   {limits['flops_how']}"]
    for dtype, flops_per_s in limits.get("product_rates", {}).items():
        lines.append(f"  {dtype:<10} {rate(flops_per_s)}   brim's matrix products")
    for count, flops_per_s in limits.get("flops_by_threads", {}).items():
        if count != str(limits["threads"]):
            lines.append(f"  {count + (' thread' if count == '1' else ' threads'):<10} {rate(flops_per_s)}")
    if "blas_flops_per_s" in limits:
        lines.append(f"  BLAS       {rate(limits['blas_flops_per_s'])}   float32 matrix products through NumPy's BLAS")
    for level in limits["memory"]:
        holds = "" if level["holds_bytes"] is None else f", up to {format_bytes(level['holds_bytes'])}"
        lines.append(f"{level['level']:<12} {level['bytes_per_s'] / 1e9:,.1f} GB/s   {limits['memory_how']}{holds}")
    if "fault_bytes_per_s" in limits:
        speed, page = limits["fault_bytes_per_s"], limits["page_bytes"]
        took = f"{page / speed * 1e6:.2f} µs a page of {page:,} B"
        lines.append(f"page faults  {speed / 1e9:,.1f} GB/s   first touch of fresh memory, {took}")
    if not limits.get("caches_known", True):
        lines.append("the system does not tell the sizes of its caches: usual ones are assumed")
    return "\n".join(lines)


def log_bars(values: Sequence[tuple[str, float, str]], width: int = 40) -> str:
    """Bars on a logarithmic scale, one decade each so many columns: (label, value, text at the end)."""
    low = math.floor(math.log10(min(value for _, value, _ in values)))
    high = math.ceil(math.log10(max(value for _, value, _ in values)))
    label_width = max(len(label) for label, _, _ in values)
    lines = []
    for label, value, text in values:
        eighths = round(8 * width * (math.log10(value) - low) / max(1, high - low))
        full, rest = divmod(max(1, eighths), 8)
        lines.append(f"{label:<{label_width}}  {'█' * full}{_BLOCKS[rest].strip()} {text}")
    return "\n".join(lines)


def machinery_text(document: Mapping[str, Any]) -> str:
    """The table and the picture of how long a training would take."""
    training, rows = document["training"], document["rows"]
    lines = [f"{training['name']}: {training['flops']:.2e} floating-point operations", f"  {training['source']}"]
    if document["state_bytes"] is not None:
        lines.append(
            f"  weights, gradients and Adam's states: {document['state_bytes'] / 1e9:,.1f} GB "
            f"({document['bytes_per_parameter']} bytes a parameter; activations come on top)"
        )
    header = ["machinery", "", "dtype", "rate", "utilisation", "time", "fits", "energy"]
    body = [
        [
            row["name"], row["how"], row["dtype"], rate(row["flops_per_s"]),
            "rate as measured" if row["how"] == "measured" else f"{row['utilisation']:.0%} of peak",
            row["duration"], fits_text(row), energy_text(row["energy_wh"]),
        ]
        for row in rows
    ]  # fmt: skip
    lines += ["", table(header, body, left=(0, 1, 2)), ""]
    ordered = sorted(rows, key=lambda row: -row["seconds"])
    lines += ["time, on a logarithmic scale", log_bars([(r["name"], r["seconds"], r["duration"]) for r in ordered])]
    if document["published"]:
        lines += ["", published_text(document)]
    lines += [
        "",
        "time: operations over rate. Measured: matrix products alone, which is the least; and whole training steps",
    ]
    lines += ["fits: weights, gradients and Adam's states; else how many such devices hold them at least"]
    lines += ["energy: the accelerators' power limits only, without hosts, network and cooling"]
    return "\n".join(lines)


def fits_text(row: Mapping[str, Any]) -> str:
    """``yes``, or how many such devices the state needs at least."""
    if row["devices_needed"] is None:
        return "-"
    return "yes" if row["fits"] else f"no, needs {row['devices_needed']:,}"


def energy_text(energy_wh: float | None) -> str:
    """``21.6 GWh``."""
    if energy_wh is None:
        return "-"
    for factor, name in ((1e12, "TWh"), (1e9, "GWh"), (1e6, "MWh"), (1e3, "kWh")):
        if energy_wh >= factor:
            return f"{energy_wh / factor:,.3g} {name}"
    return f"{energy_wh:,.3g} Wh"


def published_text(document: Mapping[str, Any]) -> str:
    """The published figures beside the computed ones of the same cluster."""
    published = document["published"]
    row = next(row for row in document["rows"] if row["devices"] == published["gpus"])
    hours = row["seconds"] / 3600 * row["devices"]
    low, high = published["utilisation"]
    energy = published["gpu_hours"] * published["watts_per_gpu"]
    return (
        f"published: up to {published['gpus']:,} H100 at {low:.0%} to {high:.0%} of their peak, "
        f"{published['gpu_hours'] / 1e6:.2f} million GPU hours of {published['watts_per_gpu']:.0f} W "
        f"({energy_text(energy)}); {published['source']}\n"
        f"computed:  {row['name']} at {row['utilisation']:.0%}: {row['duration']}, {hours / 1e6:.2f} million GPU hours"
    )
