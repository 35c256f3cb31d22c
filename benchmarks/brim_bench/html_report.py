"""Reports as one HTML file that needs no network: bars beside the peers and the limit; the machinery on a log scale.

No scripts: the pages are read as they are, in light and dark, on screen and on paper.
"""

from __future__ import annotations

import html
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from brim.units import format_bytes
from brim_bench.text_report import (
    energy_text,
    figure,
    fits_text,
    notes_of,
    published_text,
    rate,
    ratio_text,
    side_text,
)

__all__ = ["machinery_page", "run_page"]

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1d2330; --soft: #667; --line: #d9dde5; --own: #2563c9;
  --peer: #b6bcc8; --limit: #c2410c; --good: #15803d; --bad: #b91c1c; --measured: #15803d; }
@media (prefers-color-scheme: dark) { :root { --back: #14171d; --text: #e6e9ef; --soft: #9aa3b2; --line: #333a46;
  --own: #6ea8fe; --peer: #5b6474; --limit: #fb923c; --good: #4ade80; --bad: #f87171; --measured: #4ade80; } }
* { box-sizing: border-box; }
body { background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p, .soft { color: var(--soft); } b { color: var(--text); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .5rem; text-align: right; vertical-align: top; }
th { color: var(--soft); font-weight: 600; } .left { text-align: left; }
td { white-space: nowrap; } td.left + td.left { white-space: normal; }
.scroll { overflow-x: auto; }
.faster { color: var(--good); } .slower { color: var(--bad); } .none { color: var(--soft); font-style: italic; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--text); font: 12px system-ui, sans-serif; }
svg .soft { fill: var(--soft); } .own { fill: var(--own); } .peer { fill: var(--peer); }
.measured { fill: var(--measured); }
.limit { stroke: var(--limit); stroke-width: 2; } .grid { stroke: var(--line); } .whisker { stroke: var(--text); }
.key i { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em; }
"""


def _escape(text: Any) -> str:
    return html.escape(str(text))


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escape(title)}</title>\n<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Cells are HTML already; those in the columns ``left`` are aligned to the left."""

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(f"<{tag}{' class=left' if n in left else ''}>{cell}</{tag}>" for n, cell in enumerate(cells))

    head, body = line("th", header), "\n".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


# ---- a run ----


def run_page(document: Mapping[str, Any]) -> str:
    """The report of ``brim bench run``."""
    rows, environment = document["rows"], document["environment"]
    peers = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    title = "brim bench" + (f" beside {', '.join(peers)}" if peers else "")
    sides = "; ".join(f"{name} {facts['version']}" for name, facts in document["sides"].items())
    parts = [
        f"<h1>{_escape(title)}</h1>",
        f"<p>{_escape(environment['cpu'])}, {environment['threads']} thread{'s'[: environment['threads'] != 1]}, "
        f"{_escape(document['options']['device'])}; {_escape(sides)}; {_escape(environment['time'])}</p>",
        "<h2>Time beside the peers and the limit</h2>",
        '<p class="key">bars end at the median, whiskers span the middle half of the rounds; each picture begins at 0'
        '<i style="background:var(--own)"></i>brim<i style="background:var(--peer)"></i>peers'
        '<i style="background:var(--limit)"></i>the machine\'s limit</p>',
        *[_bars(row) for row in rows],
        "<h2>Figures</h2>",
        _figures(document, peers),
        "<h2>Memory and first runs</h2>",
        "<p>Planned: brim's peak, exact before anything runs. Held: what its memory guard counted at most. Resident: "
        "growth of the process's physical memory. Device: most of its memory in use, as the library counts it, in "
        "brackets what the library had taken from it. First: to build, compile and run once.</p>",
        _memory(document),
        _reasons(rows),
        _notes(document),
        "<h2>Limits of this machine</h2>",
        _limits(document["limits"]),
        "<h2>Environment</h2>",
        _environment(document),
    ]
    return _page(title, "\n".join(part for part in parts if part))


def _bars(row: Mapping[str, Any]) -> str:
    """One workload: a bar for each side that has a figure, on a scale from 0."""
    known = {name: side for name, side in row["sides"].items() if side["status"] == "ok" and "median" in side}
    limit = (row.get("limit") or {}).get("seconds")
    top = max([side["q75"] for side in known.values()] + [limit or 0.0], default=0.0)
    parts = [f'<text x="0" y="14"><tspan font-weight="600">{_escape(row["workload"])}</tspan> '
             f'<tspan class="soft">{_escape(row["what"])}</tspan></text>']  # fmt: skip
    y, left, width = 22, 110, 540
    for name, side in row["sides"].items():
        parts.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{_escape(name)}</text>')
        ratio = row["ratios"].get(name)
        note = f", brim / {name} {ratio_text(ratio)}" if ratio else ""
        if name in known and top:
            length, q25, q75 = (width * side[key] / top for key in ("median", "q25", "q75"))
            css = "own" if name == "brim" else "peer"
            parts.append(f'<rect class="{css}" x="{left}" y="{y}" width="{length:.1f}" height="15" rx="2"/>')
            parts.append(
                f'<line class="whisker" x1="{left + q25:.1f}" x2="{left + q75:.1f}" y1="{y + 7.5}" y2="{y + 7.5}"/>'
            )
            text = figure(side["median"], row["unit"]) + note
            end = width * (limit or 0.0) / top
            behind = q75 < end < q75 + 12 + 7 * len(text)  # the limit's line would go through the text
            x = left + (end if behind else q75) + 8
        else:
            text, x = side["status"] + note, left
        parts.append(f'<text class="soft" x="{x:.1f}" y="{y + 12}">{_escape(text)}</text>')
        y += 20
    if limit and top:
        x = left + width * limit / top
        parts.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="20" y2="{y - 2}"/>')
    return f'<svg viewBox="0 0 1000 {y + 10}" role="img" aria-label="{_escape(row["workload"])}">{"".join(parts)}</svg>'


def _figures(document: Mapping[str, Any], peers: Sequence[str]) -> str:
    names = list(document["sides"])
    several = len(peers) > 1
    header = ["workload", *map(_escape, names), *[f"brim / {_escape(name)}" for name in peers]]
    header += [*(["brim / best peer"] if several else []), "of the limit"]
    lines = []
    for row in document["rows"]:
        line = [f'<span title="{_escape(row["what"])}">{_escape(row["workload"])}</span>']
        line += [_escape(side_text(row["sides"][name], row["unit"])) if name in row["sides"] else "" for name in names]
        line += [_ratio(row["ratios"][name]) if name in row["ratios"] else "" for name in peers]
        if several:
            best = row.get("best_peer")
            line.append(f"{row['ratios'][best]['median']:.2f} <span class=soft>{_escape(best)}</span>" if best else "")
        limit = row.get("limit")
        line.append(f"{limit['fraction']:.0%} <span class=soft>{_escape(limit['by'])}</span>" if limit else "")
        lines.append(line)
    return _table(header, lines)


def _ratio(ratio: Mapping[str, Any]) -> str:
    if ratio["status"] != "ok":
        return f'<span class="none" title="{_escape(ratio["why"])}">{_escape(ratio["status"])}</span>'
    css = "faster" if ratio["q75"] < 1 else "slower" if ratio["q25"] > 1 else ""
    return f'<span class="{css}">{_escape(ratio_text(ratio))}</span>'


_ON_DEVICE = ("held_peak_bytes", "reserved_peak_bytes")


def _memory(document: Mapping[str, Any]) -> str:
    names, lines = list(document["sides"]), []
    on_device = any("reserved_peak_bytes" in s.get("memory", {}) for r in document["rows"] for s in r["sides"].values())
    header = ["workload", "planned", "held", "allocations a run", *[f"resident, {_escape(name)}" for name in names],
              *[f"device, {_escape(name)}" for name in names if on_device],
              *[f"first, {_escape(name)}" for name in names]]  # fmt: skip
    for row in document["rows"]:
        found = {name: row["sides"].get(name, {}).get("memory", {}) for name in names}
        if not any(found.values()):
            continue
        own = found.get("brim", {})
        line = [_escape(row["workload"])]
        line += [format_bytes(own[key]) if key in own else "" for key in ("planned_peak_bytes", "held_peak_bytes")]
        line.append(f"{own['allocations_per_run']:.0f}" if "allocations_per_run" in own else "")
        for name in names:
            line.append(format_bytes(found[name]["rss_growth_bytes"]) if "rss_growth_bytes" in found[name] else "")
        for name in names if on_device else ():
            used = [format_bytes(found[name][key]) for key in _ON_DEVICE if key in found[name]]
            line.append(f"{used[0]} ({used[1]})" if len(used) == 2 else "")
        for name in names:
            first_s = row["sides"].get(name, {}).get("first_s")
            line.append("" if first_s is None else figure(first_s))
        lines.append(line)
    return _table(header, lines)


def _reasons(rows: Sequence[Mapping[str, Any]]) -> str:
    found = [f"<li><b>{_escape(r['workload'])}</b>: {_escape(r['status'])}. {_escape(r['why'])}</li>"
             for r in rows if r["status"] != "ok"]  # fmt: skip
    return f"<h2>Rows without a ratio</h2><ul>{''.join(found)}</ul>" if found else ""


def _notes(document: Mapping[str, Any]) -> str:
    found = "".join(f"<li>{_escape(note)}</li>" for note in notes_of(document))
    return f"<h2>Notes</h2><ul>{found}</ul>" if found else ""


def _limits(limits: Mapping[str, Any] | None) -> str:
    if limits is None:
        return "<p>not measured</p>"
    rows = [["arithmetic", rate(limits["flops_per_s"]), _escape(limits["flops_how"])]]
    if "blas_flops_per_s" in limits:
        rows.append(["matrix products", rate(limits["blas_flops_per_s"]), "float32, through NumPy's BLAS"])

    for kind, flops_per_s in limits.get("product_rates", {}).items():
        rows.append([f"products, {_escape(kind)}", rate(flops_per_s), "brim's matrix products"])
    rows += [
        [_escape(one["level"]), f"{one['bytes_per_s'] / 1e9:,.1f} GB/s", _escape(limits["memory_how"])]
        for one in limits["memory"]
    ]
    if "fault_bytes_per_s" in limits:
        rows.append(["page faults", f"{limits['fault_bytes_per_s'] / 1e9:,.1f} GB/s", "first touch of fresh memory"])
    return _table(["", "at most", "how it was measured"], rows, (0, 2))


def _environment(document: Mapping[str, Any]) -> str:
    rows = [[_escape(key), _escape(value)] for key, value in document["environment"].items()]
    rows += [[_escape(f"card: {key}"), _escape(value)] for key, value in document.get("card", {}).items()]
    for name, facts in document.get("sides", {}).items():
        for key, value in {"version": facts["version"], "threads": facts["threads"], **facts["facts"]}.items():
            rows.append([_escape(f"{name}: {key}"), _escape(value)])
    return _table(["", ""], rows, (0, 1))


# ---- machinery ----


def machinery_page(document: Mapping[str, Any]) -> str:
    """The report of ``brim bench machinery``."""
    training = document["training"]
    title = f"How long would {training['name']} take?"
    state = ""
    if document["state_bytes"] is not None:
        state = (
            f" Weights, gradients and Adam's states take {document['state_bytes'] / 1e9:,.1f} GB "
            f"({document['bytes_per_parameter']} bytes a parameter); activations come on top."
        )
    parts = [
        f"<h1>{_escape(title)}</h1>",
        f"<p>{training['flops']:.2e} floating-point operations. {_escape(training['source'])}.{_escape(state)}</p>",
        '<p class="key"><i style="background:var(--measured)"></i>measured on this machine'
        f'<i style="background:var(--own)"></i>by datasheet, at {document["utilisation"]:.0%} of the peak'
        '<i style="background:var(--peer)"></i>the same, but the state does not fit its memory</p>',
        _log_picture(document["rows"]),
        "<h2>Figures</h2>",
        _table(
            ["machinery", "rate from", "dtype", "rate", "time", "fits", "energy", "source"],
            [
                [
                    _escape(row["name"]), _escape(row["how"]), _escape(row["dtype"]),
                    rate(row["flops_per_s"]), _escape(row["duration"]), _escape(fits_text(row)),
                    _escape(energy_text(row["energy_wh"])), f"<span class=soft>{_escape(row['source'])}</span>",
                ]
                for row in document["rows"]
            ],
            (0, 1, 2, 7),
        ),
    ]  # fmt: skip
    if document["published"]:
        parts.append(f"<p>{_escape(published_text(document)).replace(chr(10), '<br>')}</p>")
    parts.append("<p>Energy: the accelerators' power limits only, without hosts, network and cooling.</p>")
    if document["environment"]:
        parts += ["<h2>Environment</h2>", _environment({"environment": document["environment"]})]
    return _page(title, "\n".join(parts))


_TICKS = (
    (1e-3, "1 ms"), (1.0, "1 s"), (60.0, "1 minute"), (3600.0, "1 hour"), (86_400.0, "1 day"), (31_557_600.0, "1 year"),
    (3.15576e9, "100 years"), (3.15576e11, "10,000 years"), (3.15576e13, "1 million years"),
    (3.15576e15, "100 million years"), (3.15576e17, "10 billion years"),
)  # fmt: skip


def _log_picture(rows: Sequence[Mapping[str, Any]]) -> str:
    """Bars of time on a logarithmic scale, the longest first."""
    ordered = sorted(rows, key=lambda row: -row["seconds"])
    low = math.floor(math.log10(ordered[-1]["seconds"]) - 0.5)
    high = math.ceil(math.log10(ordered[0]["seconds"]))
    left, width, line = 290, 590, 22
    bottom = line * len(ordered) + 6

    def place(seconds: float) -> float:
        return left + width * (math.log10(seconds) - low) / (high - low)

    parts = []
    for seconds, text in _TICKS:
        if low <= math.log10(seconds) <= high:
            x = place(seconds)
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom}"/>')
            parts.append(f'<text class="soft" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{text}</text>')
    for number, row in enumerate(ordered):
        y, x = number * line + 4, place(row["seconds"])
        css = "measured" if row["how"] == "measured" else "peer" if row["fits"] is False else "own"
        parts.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{_escape(_short(row["name"]))}</text>')
        parts.append(f'<rect class="{css}" x="{left}" y="{y}" width="{x - left:.1f}" height="15" rx="2"/>')
        parts.append(f'<text class="soft" x="{x + 6:.1f}" y="{y + 12}">{_escape(row["duration"])}</text>')
    label = "time by machinery, logarithmic scale"
    return f'<svg viewBox="0 0 1000 {bottom + 24}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _short(name: str) -> str:
    return name if len(name) <= 44 else name[:43] + "…"
