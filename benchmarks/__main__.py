"""``python -m benchmarks``: measure every row, print one table, write JSON, CSV, text and pictures."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
COPY_BYTES = 256 << 20
BATCHES = {"gpu": [32, 256], "cpu": [32]}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, epilog="benchmarks/README.md says how a report is taken."
    )
    parser.add_argument(
        "--batch", type=_batches, help="of the ResNet-50 list, several by commas; default: 32,256 on a GPU, 32 on a CPU"
    )
    parser.add_argument("--dtype", default="float32", choices=["float64", "float32", "float16", "bfloat16"])
    parser.add_argument("--only", default="", help="measure rows whose name or regime contains one of these, by commas")
    parser.add_argument("--layout", type=str.upper, default="", help="measure rows of this layout only, such as NHWC")
    parser.add_argument("--peers", default="all", help="names by commas, 'all' or 'none'")
    parser.add_argument(
        "--peer-python", action="append", default=[], type=_peer_python, metavar="NAME=PYTHON",
        help="run this peer with that Python, in a process of its own; may be given several times",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each variant of a row")
    parser.add_argument("--threads", type=int, default=0, help="processors to use (CPU); 0: all that are there")
    parser.add_argument("--device", default="", choices=["", "cpu", "gpu"], help="default: a GPU if one is usable")
    parser.add_argument("--out", type=Path, help="folder to write to; default: benchmarks/results/<machine>")
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    return parser


def _batches(text: str) -> list[int]:
    """Split positive numbers by commas. Raises ArgumentTypeError for anything else."""
    words = text.split(",")
    if not all(word.isdigit() and int(word) for word in words):
        raise argparse.ArgumentTypeError(f"expected positive numbers by commas; got {text!r}")
    return [int(word) for word in words]


def _peer_python(text: str) -> tuple[str, str]:
    """Split NAME=PYTHON. Raises ArgumentTypeError for anything else."""
    name, equals, python = text.partition("=")
    if not (name and equals and python):
        raise argparse.ArgumentTypeError(f"expected NAME=PYTHON, such as tensorflow=/path/to/python; got {text!r}")
    return name, python


def _limit_threads(threads: int) -> None:
    """Leave this process `threads` processors: every library then sees that many. Before anything is imported."""
    if threads and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    for name in THREAD_VARIABLES:
        if threads:
            os.environ[name] = str(threads)


class _Progress:
    """A progress bar on standard error; without tqdm a line for every row."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._bar = total, 0, None
        try:
            from tqdm import tqdm
        except ImportError:
            return
        self._bar = tqdm(total=total, unit="row", file=sys.stderr, disable=None)

    def begin(self, name: str) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.set_postfix_str(name)
        else:
            print(f"{self._done}/{self._total} {name}", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _measure_all(
    chosen: list[Any], peers: list[Any], on_gpu: bool, seconds: float, save: Callable[[list[Any], dict[str, str]], None]
) -> tuple[list[Any], dict[str, str]]:
    """Return the records, and the reasons of rows that failed; `save` is given both after every row."""
    from benchmarks.machine import on_chip_bytes
    from benchmarks.measure import measure
    from benchmarks.peers import said
    from benchmarks.report import record

    records: list[Any] = []
    failed: dict[str, str] = {}
    on_chip, progress = on_chip_bytes(on_gpu), _Progress(len(chosen))
    for case in chosen:
        progress.begin(case.name)
        try:
            records.append(record(measure(case, peers, on_gpu, on_chip, seconds)))
        except Exception as error:  # of any library: the row is named, and fails the run at its end
            failed[case.name] = said(error)
            print(f"\nfailed: {case.name}\n{traceback.format_exc()}", file=sys.stderr)
        save(records, failed)
        progress.end()
    progress.close()
    return records, failed


def _copy_seconds(on_gpu: bool) -> float:
    """Return the median time of a copy that reads and writes 256 MB together."""
    from benchmarks.bytes_moved import copy_function
    from benchmarks.timing_cpu import interleaved

    copy = copy_function(COPY_BYTES, on_gpu)
    if not on_gpu:
        return interleaved({"copy": copy}, {}, 0.5)["copy"].p50
    from benchmarks.timing_gpu import samples_flushed

    return sorted(samples_flushed(copy, lambda: None, 0, 20))[10]


def _peer_names(options: argparse.Namespace) -> tuple[str, ...]:
    from benchmarks import peers

    return {"all": peers.NAMES, "none": ()}.get(options.peers, tuple(options.peers.split(",")))


def _find_peers(options: argparse.Namespace, on_gpu: bool) -> list[Any]:
    from benchmarks import peers
    from benchmarks.timing_cpu import thread_count

    pythons = dict(options.peer_python)
    found = peers.find(_peer_names(options), on_gpu, pythons)
    if not on_gpu and any(p.module is not None and p.name.startswith("torch") and p.name not in pythons for p in found):
        import torch

        torch.set_num_threads(thread_count())
    return found


def _report(options: argparse.Namespace, chosen: list[Any], found: list[Any], on_gpu: bool) -> int:
    """Measure the rows and write everything; return 1 if a row was wrong or none was measured."""
    from benchmarks import machine, picture, report

    header = machine.header(on_gpu, COPY_BYTES / _copy_seconds(on_gpu))
    header["peers"] = ", ".join(f"{p.name}: {p.module.version()}" for p in found if p.module is not None) or "none"
    skipped = {peer.name: peer.reason for peer in found if peer.module is None}
    folder = options.out or Path(__file__).parent / "results" / machine.class_name(on_gpu)

    def save(records: list[Any], failed: dict[str, str]) -> None:  # so that a run that is cut off keeps what it has
        report.write(folder, header, records, skipped, failed)

    records, failed = _measure_all(chosen, found, on_gpu, options.seconds, save)
    if records or failed:
        print(report.text_report(header, records, skipped, failed))
    if not records:
        print("benchmarks: no row was measured. Look at --list and --only.", file=sys.stderr)
        return 1
    try:
        made = picture.draw(folder, header, records)
    except ImportError as error:
        print(f"no pictures: {error}. Install gpulayers[plot].", file=sys.stderr)
        made = []
    print(f"written to {folder}: report.json, report.csv, report.txt{''.join(f', {path.name}' for path in made)}")
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if a row was wrong or none was measured."""
    parser = _parser()
    options = parser.parse_args(arguments)
    _limit_threads(options.threads)
    import gpulayers as gl
    from benchmarks import peers, shapes

    for name in [*_peer_names(options), *dict(options.peer_python)]:
        if name not in peers.NAMES:
            parser.error(f"no such peer: {name!r}. Expected 'all', 'none' or some of {', '.join(peers.NAMES)}")
    on_gpu = options.device == "gpu" or (not options.device and gl.gpu_available())
    if on_gpu and not gl.gpu_available():
        print(f"benchmarks: no GPU is usable. {gl.gpu_unavailable_reason()}", file=sys.stderr)
        return 1
    gl.set_device("gpu" if on_gpu else "cpu")
    batches = options.batch or BATCHES["gpu" if on_gpu else "cpu"]
    wanted = [word for word in options.only.split(",") if word]
    chosen = [
        case
        for case in shapes.cases(batches, options.dtype)
        if (not wanted or any(word in f"{case.name} {case.regime}" for word in wanted))
        and options.layout in ("", case.layout)
    ]
    if options.list:
        print("\n".join(case.name for case in chosen))
        return 0
    found = _find_peers(options, on_gpu)
    try:
        return _report(options, chosen, found, on_gpu)
    finally:
        peers.close(found)


if __name__ == "__main__":
    sys.exit(main())
