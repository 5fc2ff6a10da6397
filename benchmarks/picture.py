"""Pictures of a report: bandwidth over size under the measured copy, and how much slower the peers are."""

from __future__ import annotations

import math
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


def _roofline(plt: Any, rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    modes = [mode for mode in ("inference", "forward", "backward") if any(r["mode"] == mode for r in rows)]
    figure, axes = plt.subplots(1, len(modes), figsize=(4.6 * len(modes), 4.2), sharey=True, squeeze=False)
    for axis, mode in zip(axes[0], modes, strict=True):
        chosen = sorted((r for r in rows if r["mode"] == mode), key=lambda r: r["minimum_bytes"])
        sizes = [r["minimum_bytes"] / 1e6 for r in chosen]
        copied = [r["minimum_bytes"] / r["copy_us"] / 1e3 for r in chosen]
        axis.plot(sizes, copied, color="#777777", lw=1.5, label="copy")
        for name, (colour, marker) in _STYLE.items():
            points = [
                (r["minimum_bytes"] / 1e6, r["gb_per_s"] / (1 if name == "gpulayers" else r["ratios"][name]))
                for r in chosen
                if name == "gpulayers" or name in r["ratios"]
            ]
            if points:  # no lines: shapes of one size differ
                size = 6 if name == "gpulayers" else 4
                axis.plot(*zip(*points, strict=True), ls="", color=colour, marker=marker, ms=size, label=name)
        axis.set(xscale="log", yscale="log", title=mode, xlabel="minimum bytes, MB")
        axis.grid(True, which="both", alpha=0.2)
    axes[0][0].set_ylabel("GB/s of minimum bytes")
    shown = dict(reversed(pair) for axis in axes[0] for pair in zip(*axis.get_legend_handles_labels(), strict=True))
    figure.legend(shown.values(), shown.keys(), loc="lower center", ncol=len(shown), frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(plt: Any, rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draw, for every operation and pass, the geometric mean over its rows of a peer's time over ours."""
    groups: dict[str, dict[str, list[float]]] = {}
    for one in rows:
        for name, ratio in one["ratios"].items():
            groups.setdefault(f"{one['op']} {one['mode']}", {}).setdefault(name, []).append(ratio)
    peers = [name for name in _STYLE if any(name in found for found in groups.values())]
    height = 0.8 / max(len(peers), 1)
    figure, axis = plt.subplots(figsize=(8, 0.5 + 0.16 * len(groups) * max(len(peers), 1) ** 0.8 + 1))
    for k, name in enumerate(peers):
        for place, found in enumerate(groups.values()):
            if name in found:
                mean = math.exp(sum(map(math.log, found[name])) / len(found[name]))
                y = -place + (k - (len(peers) - 1) / 2) * -height
                axis.barh(y, mean - 1, height, left=1, color=_STYLE[name][0], label=name)
    axis.axvline(1, color="black", lw=1)
    axis.set_yticks([-place for place in range(len(groups))], list(groups), fontsize=8)
    axis.set(xscale="log", xlabel="time of the peer / time of gpulayers (right of 1: gpulayers is faster)")
    axis.set_title(title, fontsize=10)
    axis.grid(True, axis="x", which="both", alpha=0.2)
    ticks = [2.0**k for k in range(-8, 9) if axis.get_xlim()[0] <= 2.0**k <= axis.get_xlim()[1]]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axis.legend(unique.values(), unique.keys(), fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
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
