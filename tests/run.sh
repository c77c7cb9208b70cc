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
$SIVAE_SETUP_HELP
  --help        this text

Examples: ./tests/run.sh -k shards     ./tests/run.sh --slow -x     ./tests/run.sh tests/house
EOF
}

gpu="" slow=""
while [ $# -gt 0 ]; do
    sivae_option "$@"
    if [ "$SIVAE_SHIFT" -gt 0 ]; then
        shift "$SIVAE_SHIFT"
        continue
    fi
    case "$1" in
        --gpu) gpu=1 && shift ;;
        --slow) slow=1 && shift ;;
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

sivae_setup test
sivae_threads
if [ -n "$gpu" ]; then
    "$PY" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || die \
        "--gpu: torch sees no CUDA device in $PY" "check nvidia-smi and that this torch is a CUDA build"
fi

cd "$root"
status=0
"$PY" -m pytest -m "$select" "$@" || status=$?
# pytest calls an empty selection an error (5). For a marker that no test bears yet it is none.
if [ "$status" -eq 5 ] && [ -n "$gpu$slow" ]; then
    status=0
fi
exit "$status"
