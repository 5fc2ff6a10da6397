#!/usr/bin/env bash
# Evidence from a machine with a GPU, in one command. Needs a Python with cupy, numpy and pytest; torch, jax and triton
# are used where they are installed. No network.
#
#   benchmarks/on_gpu.sh --quick                 # at most 5 minutes
#   benchmarks/on_gpu.sh --full PART             # one of these, at most 8 minutes each:
#       norm32 compiled norm256 shapes recurrent probes tests sanitizer
#
# Environment: PYTHON (python3), OUT (folder for everything that is written; gpulayers-run).
# What there is when the run is cut off stays in OUT; the archive OUT.tar.gz and the summary are made in any case.
set -uo pipefail
cd "$(dirname "$0")/.."

usage() {
    sed -n '2,10p' "$0" | sed 's/^# \{0,1\}//' >&2
    exit 2
}

case "${1:-}" in
    --quick) part=quick limit=290 ;;
    --full)
        part=${2:-} limit=470
        case $part in
            norm32 | compiled | norm256 | shapes | recurrent | probes | tests | sanitizer) ;;
            *) usage ;;
        esac
        ;;
    *) usage ;;
esac

python=${PYTHON:-python3}
out=${OUT:-gpulayers-run}
mkdir -p "$out"
summary=$out/summary.txt
: >"$summary"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
started=$SECONDS
failed=0
child=

say() { printf '%s\n' "$*" | tee -a "$summary"; }

left() { echo $((limit - (SECONDS - started))); }

# The archive and the end of the summary, whatever happened before; runs when the script is stopped, too.
finish() {
    local status=$?
    trap - EXIT INT TERM
    [ -z "$child" ] || kill "$child" 2>/dev/null
    tar -czf "$out.tar.gz" -C "$(dirname "$out")" "$(basename "$out")" 2>/dev/null || true
    say "== $part: $((SECONDS - started)) s, $failed steps failed, exit status $((status ? status : failed > 0)); $out.tar.gz"
    if [ "$(wc -l <"$summary")" -gt 100 ]; then # the summary is at most 100 lines: its beginning and its end
        { head -n 60 "$summary"; echo "..."; tail -n 39 "$summary"; } >"$summary.short" && mv "$summary.short" "$summary"
    fi
    exit $((status ? status : failed > 0))
}
trap finish EXIT
trap 'exit 130' INT TERM

# step NAME SECONDS LINES COMMAND...: run with a limit, keep everything in OUT/NAME.txt, show the last LINES lines.
step() {
    local name=$1 seconds=$2 lines=$3 status=0
    shift 3
    local most
    most=$(left)
    if [ "$most" -lt 5 ]; then
        say "== $name: not run, the time is up"
        return
    fi
    [ "$seconds" -lt "$most" ] || seconds=$most
    local begin=$SECONDS
    timeout --kill-after=10 "$seconds" "$@" >"$out/$name.txt" 2>&1 &
    child=$! # in the background, so that a signal to this script is not kept waiting
    wait "$child" || status=$?
    child=
    case $status in
        0) say "== $name: passed, $((SECONDS - begin)) s" ;;
        124 | 137) say "== $name: cut off after $seconds s (what it wrote is in $out/$name.txt)" && failed=$((failed + 1)) ;;
        *) say "== $name: FAILED with status $status, $((SECONDS - begin)) s" && failed=$((failed + 1)) ;;
    esac
    local show=$out/$name.txt
    # A report that was cut off has printed no table, but wrote one after every row.
    [ "$status" -eq 0 ] || [ ! -s "$out/$name/report.txt" ] || show=$out/$name/report.txt
    tail -n "$lines" "$show" | cut -c 1-400 | tee -a "$summary"
}

reason=$("$python" -c '
from gpulayers.device import gpu_unavailable_reason
print(gpu_unavailable_reason())' 2>&1)
if [ -n "$reason" ]; then
    say "on_gpu.sh: no GPU: ${reason##*$'\n'} Nothing was run."
    exit 3
fi

say "on_gpu.sh --$part, commit $(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown), $(date -u '+%Y-%m-%d %H:%M UTC')"
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit --format=csv,noheader 2>/dev/null | head -1 |
    tee -a "$summary" || true

gpu_tests() { # SECONDS folders: files that need a package which is not here skip or fail by themselves
    local seconds=$1
    shift
    step gpu_tests "$seconds" 12 "$python" -m pytest -m gpu -q --no-header --maxfail=20 -p no:cacheprovider \
        --continue-on-collection-errors "$@"
}

sanitize() { # seconds for each tool
    local tool why
    if ! command -v compute-sanitizer >/dev/null; then
        say "== sanitizer: compute-sanitizer is not installed here"
        return
    fi
    # Containers and drivers may refuse it altogether: that says nothing about the kernels.
    if ! why=$(timeout --kill-after=5 20 compute-sanitizer --tool memcheck --error-exitcode 9 \
        "$python" -c 'import cupy; cupy.zeros(4).sum()' 2>&1); then
        say "== sanitizer: compute-sanitizer does not run here: $(printf '%s' "$why" | tail -n 1 | cut -c 1-200)"
        return
    fi
    for tool in memcheck racecheck; do
        step "$tool" "$1" 3 compute-sanitizer --tool "$tool" --error-exitcode 9 --launch-timeout 120 \
            "$python" -m benchmarks.gpu_probe --sanitizer-subset
    done
}

report() { # NAME SECONDS LINES arguments of python -m benchmarks
    local name=$1 seconds=$2 lines=$3
    shift 3
    step "$name" "$seconds" "$lines" "$python" -m benchmarks --device gpu --out "$out/$name" "$@"
}

case $part in
    quick) # the limits add up to the time there is, so that no step takes another's place
        step report 15 4 "$python" -m gpulayers.report
        step probe 40 24 "$python" -m benchmarks.gpu_probe --out "$out/probe.json"
        gpu_tests 55 tests/kernels tests/unit/test_cuda_graph.py tests/unit/test_report.py
        sanitize 25
        report resnet50 110 34 --batch 32 --dtype float16 --only "resnet50" --peers torch --seconds 0.1
        ;;
    norm32)
        for dtype in float16 float32; do
            report "norm32-$dtype" 230 40 --batch 32 --dtype $dtype --only resnet50 --seconds 0.1 \
                --peers torch,torch_other_layout,plain,chainer_style
        done
        ;;
    compiled) # compiling takes most of it: channels last alone
        report compiled 460 40 --batch 32 --dtype float16 --only "NHWC 32x" --seconds 0.1 --peers torch_compile,jax_jit
        ;;
    norm256)
        report norm256 460 40 --batch 256 --dtype float16 --only "NHWC 256x" --seconds 0.1 \
            --peers torch,torch_other_layout
        ;;
    shapes)
        report shapes 460 90 --dtype float16 --seconds 0.1 --only unet,tabular,speech,tiny,adversarial,unaligned,fused,renorm,ghost,several
        ;;
    recurrent) report recurrent 460 60 --seconds 0.1 --only residual_add,cell,sequence,context,training,optimizer ;;
    probes) step design 300 60 "$python" -m benchmarks.gpu_probe --design --out "$out/design.json" ;;
    tests) gpu_tests 460 tests ;;
    sanitizer) sanitize 220 ;;
esac
