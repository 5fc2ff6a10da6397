"""Tables of rows: for reading, as CSV and as JSON."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.measure import Row

__all__ = ["columns", "load", "markdown", "record", "table", "text_report", "totals", "write"]

_OURS = ("gpulayers", "copy")
NONE: Mapping[str, str] = MappingProxyType({})


def _peer_names(rows: Sequence[Row]) -> list[str]:
    """Return the peers that were measured in at least one row, in order."""
    names: dict[str, bool] = {}
    for row in rows:
        for name, variant in row.variants.items():
            if name not in _OURS:
                names[name] = names.get(name, False) or variant.times is not None
    return [name for name, measured in names.items() if measured]


def record(row: Row) -> dict[str, Any]:
    """Return a row as plain data with every figure that is reported; times in microseconds."""
    case, own, copy = row.case, row.variants["gpulayers"], row.variants["copy"]
    time, copy_time = own.times.p50, copy.times.p50
    share_of_copy = copy_time / own.by(copy.method).p50
    measured = {name: variant for name, variant in row.variants.items() if variant.times is not None}
    ratios, skipped, peer_times, peer_errors = {}, {}, {}, {}
    in_us = lambda times: [round(t * 1e6, 3) for t in times[:3]]
    for name, variant in row.variants.items():
        if name in _OURS:
            continue
        if variant.times is None:
            skipped[name] = variant.reason
        else:
            ratios[name] = variant.times.p50 / own.by(variant.method).p50
            peer_times[name] = in_us(variant.times)
            peer_errors[name] = variant.error
    return {
        "op": case.op, "mode": case.mode, "layout": case.layout, "shape": list(case.shape), "dtype": case.dtype,
        "regime": case.regime, "count": case.count, "groups": case.groups, "minimum_bytes": row.minimum,
        "regime_bytes": row.regime, "p20_us": own.times.p20 * 1e6, "p50_us": time * 1e6, "p80_us": own.times.p80 * 1e6,
        "samples": own.times.samples, "copy_us": copy_time * 1e6, "gb_per_s": row.minimum / time / 1e9,
        "percent_of_copy": 100 * share_of_copy, "percent_of_floor": 100 * share_of_copy * row.regime / row.minimum,
        "launches": row.launches, "host_us": None if row.host is None else row.host.p50 * 1e6,
        "methods": {name: variant.method for name, variant in measured.items()},
        "own_us": {method: in_us(times) for method, times in own.ways.items()},
        "uncaptured": {name: variant.uncaptured for name, variant in measured.items() if variant.uncaptured},
        "error": own.error, "ratios": ratios, "peer_us": peer_times, "peer_errors": peer_errors,
        "skipped": skipped,
    }  # fmt: skip


COLUMNS = [
    ("op", lambda r: r["op"]),
    ("pass", lambda r: r["mode"]),
    ("layout", lambda r: r["layout"]),
    ("shape", lambda r: "x".join(map(str, r["shape"])) + (f" /{r['groups']}" if r["groups"] > 1 else "")),
    ("dtype", lambda r: r["dtype"]),
    ("min MB", lambda r: f"{r['minimum_bytes'] / 1e6:.3g}"),
    ("p20 us", lambda r: f"{r['p20_us']:.4g}"),
    ("p50 us", lambda r: f"{r['p50_us']:.4g}"),
    ("p80 us", lambda r: f"{r['p80_us']:.4g}"),
    ("GB/s", lambda r: f"{r['gb_per_s']:.3g}"),
    ("% copy", lambda r: f"{r['percent_of_copy']:.0f}"),
    ("% floor", lambda r: f"{r['percent_of_floor']:.0f}"),
    ("launches", lambda r: "-" if r["launches"] is None else str(r["launches"])),
    ("host us", lambda r: "-" if r["host_us"] is None else f"{r['host_us']:.1f}"),
    ("error", lambda r: f"{r['error']:.1e}"),
]


def columns(peers: Sequence[str]) -> list[tuple[str, Any]]:
    """Return (title, function of a record) for every column: a peer's column is its time divided by ours."""

    def ratio(name: str) -> Any:
        return lambda r: f"{r['ratios'][name]:.2f}" if name in r["ratios"] else "-"

    return [*COLUMNS, *((f"/ {name}", ratio(name)) for name in peers)]


def table(records: Sequence[dict[str, Any]], peers: Sequence[str]) -> str:
    """Return the records as a table of text, numbers to the right."""
    chosen = columns(peers)
    lines = [[title for title, _ in chosen]]
    lines += [[text(one) for _, text in chosen] for one in records]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = {"op", "pass", "layout", "shape", "dtype"}
    shown = []
    for line in lines:
        cells = [
            cell.ljust(width) if chosen[i][0] in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        shown.append("  ".join(cells).rstrip())
    return "\n".join(shown)


def _ratio_of_sums(rows: Sequence[dict[str, Any]], name: str) -> float:
    """Return a peer's total over ours, which is taken for each row as the peer's time was: by their ratio."""
    theirs = [(r["count"] * r["peer_us"][name][1], r["ratios"][name]) for r in rows]
    return sum(time for time, _ in theirs) / sum(time / ratio for time, ratio in theirs)


def totals(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the ResNet-50 lists' sums, each row weighted by how often the network has it, for each pass and layout.

    A peer is left out of a total if it misses a row of it.
    """
    lists: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for one in records:
        if one["regime"].startswith("resnet50"):
            lists.setdefault((one["regime"], one["op"], one["mode"], one["layout"], one["dtype"]), []).append(one)
    found = []
    for (regime, op, mode, layout, dtype), rows in lists.items():
        ours = sum(r["count"] * r["p50_us"] for r in rows)
        names = [name for name in rows[0]["ratios"] if all(name in r["ratios"] for r in rows)]
        copy = sum(r["count"] * r["copy_us"] for r in rows)
        beside = sum(r["count"] * r["copy_us"] * 100 / r["percent_of_copy"] for r in rows)  # ours, timed as the copy
        layers = sum(r["count"] for r in rows)
        found.append({
            "list": regime, "op": op, "mode": mode, "layout": layout, "dtype": dtype, "layers": layers,
            "total_us": ours, "percent_of_copy": 100 * copy / beside,
            "ratios": {name: _ratio_of_sums(rows, name) for name in names},
        })  # fmt: skip
    return found


def totals_text(records: Sequence[dict[str, Any]]) -> str:
    """Return the totals as lines."""
    lines = []
    for one in totals(records):
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in one["ratios"].items())
        name = f"{one['list']} {one['op']} {one['mode']} {one['layout']} {one['dtype']}, {one['layers']} layers"
        time = f"{one['total_us'] / 1e3:.1f} ms, {one['percent_of_copy']:.0f} % of the copy"
        lines.append(f"{name}: {time}; peers' times over ours: {ratios}")
    return "\n".join(lines)


def methods_text(records: Sequence[dict[str, Any]]) -> str:
    """Return a line for each variant: in how many rows it was timed by which method. Empty where there is but one."""
    counts: dict[str, Counter[str]] = {}
    for one in records:
        for name, method in one.get("methods", {}).items():
            counts.setdefault(name, Counter())[method] += bool(method)
    counts = {name: found for name, found in counts.items() if found.total()}
    parts = {name: ", ".join(f"{method} {n}" for method, n in found.items()) for name, found in counts.items()}
    return "\n".join(f"{name}: {text} rows" for name, text in parts.items())


def markdown(records: Sequence[dict[str, Any]], peers: Sequence[str]) -> str:
    """Return a small table for a README: the totals of the ResNet-50 lists."""
    titles = ["pass", "layout", "layers", "total ms", "% of copy", *(f"{name} / ours" for name in peers)]
    lines = ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
    for one in totals(records):
        cells = [one["mode"], one["layout"], str(one["layers"]), f"{one['total_us'] / 1e3:.1f}"]
        cells.append(f"{one['percent_of_copy']:.0f}")
        cells += [f"{one['ratios'][name]:.2f}" if name in one["ratios"] else "-" for name in peers]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def text_report(
    header: dict[str, str], records: Sequence[dict[str, Any]], skipped: dict[str, str], failed: Mapping[str, str] = NONE
) -> str:
    """Return the whole report as text; `failed` has the rows that are missing, and why."""
    peers = list(dict.fromkeys(name for one in records for name in one["ratios"]))
    lines = [f"{name}: {value}" for name, value in header.items()]
    lines += [f"skipped: {name}: {reason}" for name, reason in skipped.items()]
    lines += ["", table(records, peers), ""]
    if total := totals_text(records):
        lines += ["Totals, each shape weighted by how often the network has it:", total, ""]
    if ways := methods_text(records):
        lines += ["Timed by (benchmarks/timing_gpu.py), a ratio being of times by one method:", ways, ""]
    if failed:
        lines += [*(f"failed: {name}: {reason}" for name, reason in failed.items()), ""]
    lines.append(
        "Columns: min MB, the bytes that must be moved; % copy, the time of a copy of as many bytes in the same run "
        "over ours; % floor, the same for the bytes of the regime; launches, of our own kernels: those of cuBLAS and "
        "CuPy are not counted; error, the largest difference from float64 over the largest value; / peer, the peer's "
        "median time over ours (above 1: gpulayers is faster)."
    )
    return "\n".join(lines) + "\n"


def write(
    folder: Path, header: dict[str, str], records: Sequence[dict[str, Any]], skipped: dict[str, str],
    failed: Mapping[str, str] = NONE,
) -> None:  # fmt: skip
    """Write report.json, report.csv and report.txt into `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    everything = {
        "header": header, "skipped": skipped, "failed": dict(failed), "totals": totals(records), "rows": list(records),
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    peers = list(dict.fromkeys(name for one in records for name in one["ratios"]))
    with (folder / "report.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([title for title, _ in columns(peers)])
        writer.writerows([[text(one) for _, text in columns(peers)] for one in records])
    (folder / "report.txt").write_text(text_report(header, records, skipped, failed), encoding="utf-8")


def load(folder: Path) -> dict[str, Any]:
    """Return what `write` wrote: header, skipped, failed, totals, rows."""
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))
