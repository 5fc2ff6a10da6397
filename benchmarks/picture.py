"""Pictures of a report: bandwidth over size under the measured copy, and how much slower the peers are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw"]

# Okabe and Ito's colours, which people with any colour vision can tell apart; markers differ too.
_STYLE = {
    "gpulayers": ("#000000", "o"), "torch": ("#E69F00", "s"), "torch_other_layout": ("#D55E00", "D"),
    "torch_compile": ("#CC79A7", "^"), "jax_jit": ("#009E73", "v"), "plain": ("#56B4E9", "x"),
    "chainer_style": ("#0072B2", "+"), "tensorflow": ("#F0E442", "*"), "thinc": ("#999999", "."),
}  # fmt: skip


def _numbered(axis: Any) -> None:
    """Write 1, 2 and 5 times the powers of ten along a logarithmic axis, as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _ceiling(rows: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """Return (MB, GB/s) of the copies: the median where several rows have one size."""
    found: dict[int, list[float]] = {}
    for row in rows:
        found.setdefault(row["minimum_bytes"], []).append(row["minimum_bytes"] / row["copy_us"] / 1e3)
    return [(size / 1e6, statistics.median(speeds)) for size, speeds in sorted(found.items())]


def _roofline(plt: Any, rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    modes = [mode for mode in ("inference", "forward", "backward", "step") if any(r["mode"] == mode for r in rows)]
    figure, axes = plt.subplots(1, len(modes), figsize=(4.6 * len(modes), 4.8), sharey=True, squeeze=False)
    for axis, mode in zip(axes[0], modes, strict=True):
        chosen = [r for r in rows if r["mode"] == mode]
        axis.plot(*zip(*_ceiling(chosen), strict=True), color="#777777", lw=1.5, label="copy of as many bytes")
        for name, (colour, marker) in _STYLE.items():
            points = [
                (r["minimum_bytes"] / 1e6, r["minimum_bytes"] / (r["peer_us"].get(name) or [0, r["p50_us"]])[1] / 1e3)
                for r in chosen
                if name == "gpulayers" or name in r["ratios"]
            ]
            if points:  # no lines: shapes of one size differ
                size, over = (7, 3) if name == "gpulayers" else (4.5, 2)
                axis.plot(
                    *zip(*points, strict=True), ls="", color=colour, marker=marker, ms=size, label=name, zorder=over
                )
        axis.set(xscale="log", yscale="log", title=mode, xlabel="minimum bytes, MB")
        _numbered(axis.xaxis)
        axis.grid(True, which="major", alpha=0.25)
    _numbered(axes[0][0].yaxis)
    axes[0][0].set_ylabel("GB/s of minimum bytes")
    shown = dict(reversed(pair) for axis in axes[0] for pair in zip(*axis.get_legend_handles_labels(), strict=True))
    figure.legend(shown.values(), shown.keys(), loc="lower center", ncol=5, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _grouped(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return the peers' ratios by operation and pass; the passes of an operation stand together."""
    groups: dict[str, dict[str, list[float]]] = {}
    for op in dict.fromkeys(row["op"] for row in rows):
        for mode in ("inference", "forward", "backward", "step"):
            chosen = [row for row in rows if (row["op"], row["mode"]) == (op, mode) and row["ratios"]]
            if chosen:
                found = groups.setdefault(f"{op}, {mode} ({len(chosen)} row{'s' * (len(chosen) > 1)})", {})
                for name in _STYLE:
                    if ratios := [row["ratios"][name] for row in chosen if name in row["ratios"]]:
                        found[name] = ratios
    return groups


def _bars(plt: Any, rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draw, for every operation and pass, the geometric mean over its rows of a peer's time over ours."""
    groups = _grouped(rows)
    bars = sum(map(len, groups.values()))
    height = max(0.13 * (bars + len(groups)) + 1.6, 3.0)  # inches: a bar is as high as a gap between groups
    figure, axis = plt.subplots(figsize=(9, height))
    place, ticks = 0.0, []
    for number, found in enumerate(groups.values()):
        if number % 2:
            axis.axhspan(place - 1, place + len(found), color="#f0f0f0", zorder=0)
        ticks.append(place + (len(found) - 1) / 2)
        for name, ratios in found.items():
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            axis.barh(place, mean - 1, 0.9, left=1, color=_STYLE[name][0], label=name, zorder=2)
            where = {"ha": "left", "xytext": (3, 0)} if mean >= 1 else {"ha": "right", "xytext": (-3, 0)}
            axis.annotate(
                f"{mean:.2f}", (mean, place), textcoords="offset points", va="center", fontsize=6, **where
            )
            place += 1
        place += 1
    axis.axvline(1, color="black", lw=1, zorder=3)
    axis.set_yticks(ticks, list(groups), fontsize=8)
    axis.set_ylim(place - 0.5, -1)
    axis.set(xscale="log", xlabel="time of the peer / time of gpulayers, geometric mean (above 1: gpulayers is faster)")
    axis.margins(x=0.08)
    _numbered(axis.xaxis)
    axis.grid(True, axis="x", which="major", alpha=0.25)
    handles, labels = axis.get_legend_handles_labels()
    unique = {name: handles[labels.index(name)] for name in _STYLE if name in labels}
    figure.suptitle(title, fontsize=10, y=1 - 0.1 / height, va="top")
    place_of = (0.5, 1 - 0.5 / height)
    figure.legend(
        unique.values(), unique.keys(), fontsize=8, loc="upper center", bbox_to_anchor=place_of, ncol=4, frameon=False
    )
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.9 / height))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw(folder: Path, header: dict[str, str], rows: Sequence[dict[str, Any]]) -> list[Path]:
    """Draw roofline.png and ratios.png into `folder`; return them. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    machine = header.get("GPU") or f"{header.get('processor', '')}, {header.get('threads', '')}"
    title = f"{machine}\ncommit {header['commit']}, {header['date']}"
    plain = [r for r in rows if r["op"] == "batch_norm" and r["layout"] == "NHWC" and r["dtype"] == rows[0]["dtype"]]
    made = []
    if plain:
        made.append(folder / "roofline.png")
        _roofline(plt, plain, f"Batch normalisation, NHWC, {rows[0]['dtype']}. {title}", made[-1])
    if any(r["ratios"] for r in rows):
        made.append(folder / "ratios.png")
        _bars(plt, rows, title, made[-1])
    return made
