#!/usr/bin/env bash
# Evidence from a machine with a GPU, in one command. Needs a Python with cupy, numpy and pytest; torch, jax and triton
# are used where they are installed. No network.
#
#   benchmarks/on_gpu.sh --quick                 # at most 5 minutes
#   benchmarks/on_gpu.sh --full PART             # one of these, at most 8 minutes each:
#       norm32 norm256-nhwc norm256-nchw compiled-nhwc compiled-nchw compiled256-nhwc compiled256-nchw
#       shapes recurrent probes tests sanitizer
#
# Environment: PYTHON (python3), OUT (folder for everything that is written; gpulayers-run), COMMIT (what to report as
# the commit where git cannot say). OUT holds summary.txt and run.tar.gz with all that was written, both brought up to
# date after every step; when the run is killed, the folder OUT/run is still there with what the last step wrote.
set -uo pipefail

usage() {
    sed -n '5,13p' "$0" | sed 's/^# \{0,1\}//' >&2
    exit 2
}

case "${1:-}" in
    --quick) part=quick limit=275 ;; # and a step that does not end by itself has 15 seconds more
    --full)
        part=${2:-} limit=460
        case $part in
            norm32 | norm256-nhwc | norm256-nchw | compiled-nhwc | compiled-nchw | compiled256-nhwc | compiled256-nchw) ;;
            shapes | recurrent | probes | tests | sanitizer) ;;
            *) usage ;;
        esac
        ;;
    *) usage ;;
esac

out=${OUT:-gpulayers-run}
case $out in
    /*) ;;
    *) out=$PWD/$out ;; # where the caller is, not where this script goes
esac
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
work=$out/run
mkdir -p "$out" && rm -f "$out/run.tar.gz" || exit 2
if ! mkdir "$work"; then
    echo "on_gpu.sh: $work is what an earlier run left behind. Move it away, or set OUT to another folder." >&2
    exit 2
fi
summary=$out/summary.txt
: >"$summary"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
COMMIT=$(git rev-parse --short=12 HEAD 2>/dev/null || echo "${COMMIT:-unknown}")
export COMMIT
started=$SECONDS
failed=0
child=

say() { printf '%s\n' "$*" | tee -a "$summary"; }

left() { echo $((limit - (SECONDS - started))); }

# Put everything that there is into the archive; one that is half written never takes the place of a whole one. Status
# 1 of tar is a file that was written to meanwhile.
pack() {
    cp "$summary" "$work/"
    { tar -cf - -C "$out" run || [ $? -eq 1 ]; } | gzip >"$out/part.tar.gz" && mv "$out/part.tar.gz" "$out/run.tar.gz"
}

# The end of the summary and the archive, whatever happened before; runs when the script is stopped, too.
finish() {
    local status=$?
    trap - EXIT INT TERM
    [ "$BASHPID" = $$ ] || exit # a child that was stopped before it became a command has the trap, too
    if [ -n "$child" ] && kill "$child" 2>/dev/null; then # which gets a moment to say what it has
        for _ in {1..50}; do kill -0 "$child" 2>/dev/null && sleep 0.1; done
    fi
    say "== $part: $((SECONDS - started)) s, $failed steps failed, exit status $((status ? status : failed > 0)); $out"
    if [ "$(wc -l <"$summary")" -gt 100 ]; then # the summary is at most 100 lines: its beginning and its end
        { head -n 60 "$summary"; echo "..."; tail -n 39 "$summary"; } >"$work/short" && mv "$work/short" "$summary"
    fi
    pack && rm -rf "$work" # else the folder stays
    exit $((status ? status : failed > 0))
}
trap finish EXIT
trap 'exit 130' INT TERM

# step NAME SECONDS LINES COMMAND...: run with a limit, keep everything in OUT/run/NAME.txt, show the last LINES lines.
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
    timeout --kill-after=15 "$seconds" "$@" >"$work/$name.txt" 2>&1 &
    child=$! # in the background, so that a signal to this script is not kept waiting
    wait "$child" || status=$?
    child=
    case $status in
        0) say "== $name: passed, $((SECONDS - begin)) s" ;;
        124 | 137) say "== $name: cut off after $seconds s (what it wrote is in run/$name.txt)" && failed=$((failed + 1)) ;;
        *) say "== $name: FAILED with status $status, $((SECONDS - begin)) s" && failed=$((failed + 1)) ;;
    esac
    local show=$work/$name.txt
    # A report that was cut off has printed no table, but wrote one after every row.
    [ "$status" -eq 0 ] || [ ! -s "$work/$name/report.txt" ] || show=$work/$name/report.txt
    tail -n "$lines" "$show" | cut -c 1-400 | tee -a "$summary"
    pack
}

# The exit status says whether there is a GPU: warnings of an import are no reason.
if ! reason=$(timeout --kill-after=5 60 "$python" -c '
import sys
from gpulayers.device import gpu_unavailable_reason
reason = gpu_unavailable_reason()
print(reason)
sys.exit(3 if reason else 0)' 2>"$work/stderr.txt"); then
    [ -n "$reason" ] || reason=$(tail -n 1 "$work/stderr.txt")
    [ -n "$reason" ] || reason="no answer in a minute."
    say "on_gpu.sh: no GPU: ${reason##*$'\n'} Nothing was run."
    exit 3
fi

say "on_gpu.sh --$part, commit $COMMIT, $(date -u '+%Y-%m-%d %H:%M UTC')"
timeout 10 nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit --format=csv,noheader 2>/dev/null | head -1 |
    tee -a "$summary" || true

# SECONDS folders: the tests that need a GPU, those of files that need a package which is not here left out. Most of
# their time is compiling, hence several processes where that is possible. Plugins that happen to be installed change
# nothing. A test that hangs shows where, and `timeout` ends a run like Ctrl-C does: with the failures so far.
gpu_tests() {
    local seconds=$1 workers=() processes
    shift
    processes=$(nproc) # apart: bash loses its place when it is stopped inside a substitution inside an expression
    if "$python" -c 'import xdist' 2>/dev/null && ! timeout 10 nvidia-smi -q -d COMPUTE 2>/dev/null | grep -q Exclusive; then
        workers=(-p xdist.plugin -n $((processes < 8 ? processes : 8)))
    fi
    PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 step gpu_tests "$seconds" 12 "$python" -m pytest "${workers[@]}" -m gpu -v \
        --no-header --maxfail=20 -p no:cacheprovider -o faulthandler_timeout=30 --continue-on-collection-errors "$@"
}

sanitize() { # each tool gets its share of the time that is left
    local tools=(memcheck racecheck) tool most why status=0 sanitizer
    if ! sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" 2>/dev/null); then
        say "== sanitizer: compute-sanitizer is not installed here"
        return
    fi
    if [ "$(left)" -lt 25 ]; then
        say "== sanitizer: not run, the time is up"
        return
    fi
    # Containers and drivers may refuse it altogether: that says nothing about the kernels.
    why=$(timeout --kill-after=5 20 "$sanitizer" --tool memcheck --error-exitcode 9 \
        "$python" -c 'import cupy; cupy.zeros(4) + 1' 2>&1) || status=$?
    case $status in
        0) ;;
        124 | 137)
            say "== sanitizer: compute-sanitizer does not run here: no answer in 20 s"
            return
            ;;
        *)
            say "== sanitizer: compute-sanitizer does not run here: $(printf '%s' "$why" | tail -n 1 | cut -c 1-200)"
            return
            ;;
    esac
    while [ ${#tools[@]} -gt 0 ]; do
        tool=${tools[0]}
        most=$(left)
        step "$tool" $((most / ${#tools[@]})) 3 "$sanitizer" --tool "$tool" --error-exitcode 9 \
            --launch-timeout 120 "$python" -m benchmarks.gpu_probe --sanitizer-subset
        tools=("${tools[@]:1}")
    done
}

report() { # NAME SECONDS LINES arguments of python -m benchmarks
    local name=$1 seconds=$2 lines=$3
    shift 3
    step "$name" "$seconds" "$lines" "$python" -m benchmarks --device gpu --out "$work/$name" "$@"
}

case $part in
    quick) # the most important first; the limits leave 40 seconds, so that no step takes another's place
        step report 15 4 "$python" -m gpulayers.report
        gpu_tests 75 tests/kernels tests/unit/test_cuda_graph.py
        report resnet50 110 34 --batch 32 --dtype float16 --only resnet50 --peers torch --seconds 0.05
        step probe 35 24 "$python" -m benchmarks.gpu_probe --out "$work/probe.json"
        sanitize
        ;;
    norm32)
        for dtype in float16 float32; do
            report "norm32-$dtype" 225 40 --batch 32 --dtype $dtype --only resnet50 --seconds 0.1 \
                --peers torch,torch_other_layout,plain,chainer_style
        done
        ;;
    norm256-* | compiled-* | compiled256-*)
        batch=32 peers=torch_compile,jax_jit
        case $part in *256*) batch=256 ;; esac
        case $part in norm*) peers=torch,torch_other_layout ;; esac
        report "$part" 455 60 --batch $batch --dtype float16 --only resnet50 --layout "${part##*-}" --seconds 0.1 \
            --peers $peers
        ;;
    shapes)
        report shapes 455 90 --dtype float16 --seconds 0.1 --only unet,tabular,speech,tiny,adversarial,unaligned,fused,renorm,ghost,several
        ;;
    recurrent) report recurrent 455 60 --seconds 0.1 --only residual_add,cell,sequence,context,training,optimizer ;;
    probes) step design 455 60 "$python" -m benchmarks.gpu_probe --design --out "$work/design.json" ;;
    tests) gpu_tests 455 tests ;;
    sanitizer) sanitize ;;
esac
