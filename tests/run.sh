#!/usr/bin/env bash
# Sets up ./.venv when needed and runs the tests.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/setup.sh
. "$root/launch/setup.sh"

usage() {
    cat <<EOF
Usage: ./tests/run.sh [options] [arguments for pytest]

Without options: everything that needs neither a GPU nor much time.
  --gpu         the tests that need a CUDA device (slow ones too)
  --slow        the tests marked slow (with --gpu: both)
  --jobs N      so many test processes at a time (default: 2 for a whole fast run on two cores or more, else 1)
$SIVAE_SETUP_HELP
  --help        this text

Examples: ./tests/run.sh -k shards     ./tests/run.sh --slow -x     ./tests/run.sh tests/house
EOF
}

gpu="" slow="" jobs=""
while [ $# -gt 0 ]; do
    sivae_option "$@"
    if [ "$SIVAE_SHIFT" -gt 0 ]; then
        shift "$SIVAE_SHIFT"
        continue
    fi
    case "$1" in
        --gpu) gpu=1 && shift ;;
        --slow) slow=1 && shift ;;
        --jobs=*) jobs="${1#*=}" && shift ;;
        --jobs) jobs="${2:-none}" && shift && [ $# -eq 0 ] || shift ;;
        --help | -h) usage && exit 0 ;;
        --) shift && break ;;
        *) break ;;
    esac
done

case "$gpu/$slow" in
    /) select="not slow and not gpu" ;;
    1/) select="gpu" ;;
    /1) select="slow and not gpu" ;;
    *) select="slow or gpu" ;;
esac

case "$jobs" in
    *[!0-9]* | 0) die "--jobs $jobs: expected a number of processes" "for example --jobs 2" ;;
esac
# What is selected by hand is short, or wants to be watched (-s, --pdb); slow tests need the memory of a whole machine.
if [ -z "$jobs" ]; then
    [ $# -eq 0 ] && [ -z "$gpu$slow" ] && [ "$(nproc 2>/dev/null || echo 1)" -gt 1 ] && jobs=2 || jobs=1
fi

sivae_setup test
sivae_threads
if [ -n "$gpu" ]; then
    "$PY" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || die \
        "--gpu: torch sees no CUDA device in $PY" "check nvidia-smi and that this torch is a CUDA build"
fi

cd "$root"
if [ "$jobs" -gt 1 ]; then
    if "$PY" -c 'import xdist' 2>/dev/null; then
        # In the order of the folders: what takes minutes (apps, dist, e2e) does not begin last.
        set -- -n "$jobs" --no-loadscope-reorder "$@"
    else
        say "note: $PY has no pytest-xdist, so one process runs all tests"
    fi
fi
status=0
"$PY" -m pytest -m "$select" "$@" || status=$?
# pytest calls an empty selection an error (5). For a marker that no test bears yet it is none.
if [ "$status" -eq 5 ] && [ -n "$gpu$slow" ]; then
    status=0
fi
exit "$status"
