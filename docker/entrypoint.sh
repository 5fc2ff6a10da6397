#!/bin/sh
# Say in one line what the container computes on, then run `python -m gpulayers`, its options, or any command given.
set -eu

# A container started with --user may have no home; CuPy could then keep no compiled kernel.
if [ ! -w "${HOME:-/}" ] && [ -z "${CUPY_CACHE_DIR:-}" ]; then
    echo "gpulayers: HOME (${HOME:-unset}) is not writable, kernels are compiled anew every time." \
        "Set CUPY_CACHE_DIR to a folder of this user." >&2
    CUPY_CACHE_DIR=$(mktemp -d)
    export CUPY_CACHE_DIR
fi

# On standard error, so that the output of a command stays its own.
python - >&2 <<'PYTHON'
from gpulayers.device import gpu_available, gpu_unavailable_reason

if gpu_available():
    from gpulayers._cupy import cupy

    properties = cupy().cuda.runtime.getDeviceProperties(0)
    print(f"gpulayers: GPU 0, {properties['name'].decode()}, {properties['totalGlobalMem'] >> 20} MiB")
else:
    print(f"gpulayers: no GPU, NumPy computes. {gpu_unavailable_reason()}")
PYTHON

case "${1:-}" in
    "" | -*) exec python -m gpulayers "$@" ;;
    *) exec "$@" ;;
esac
