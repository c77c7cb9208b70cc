#!/usr/bin/env bash
# From nothing to a trained small model: sets up ./.venv, draws a data set, trains, evaluates. Run again, it resumes.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/setup.sh
. "$root/launch/setup.sh"

out="runs/quickstart" resolution=32 count=4096

usage() {
    cat <<EOF
Usage: ./launch/quickstart.sh [options] [-- options for training]

Draws a small synthetic data set, trains a Soft-IntroVAE on it (on a GPU if there is one, else on the CPU) and evaluates
it. Stop it with Ctrl-C; the same command resumes.

  --out RUN     folder of the run (default: $out)
$SIVAE_SETUP_HELP
  --help        this text

Example: ./launch/quickstart.sh --out runs/short -- --train.kimg 2
EOF
}

while [ $# -gt 0 ]; do
    [ "$1" = "--" ] && shift && break
    sivae_option "$@"
    if [ "$SIVAE_SHIFT" -gt 0 ]; then
        shift "$SIVAE_SHIFT"
        continue
    fi
    case "$1" in
        --out) [ -n "${2:-}" ] || die "--out needs a folder" "for example --out runs/first" && out="$2" && shift 2 ;;
        --out=*) out="${1#*=}" && shift ;;
        --help | -h) usage && exit 0 ;;
        *) die "unknown option $1" "./launch/quickstart.sh --help lists the options" ;;
    esac
done

sivae_setup test
sivae_threads
cd "$root"
data="$out-data"

# Through Python, because without an installation (--offline) there is no console script.
sivae_dist() { "$PY" -m sivae_dist "$@"; }

say
say "1/3  Data: $count synthetic scenes of $resolution x $resolution pixels -> $data"
if [ -f "$data/manifest.json" ]; then
    say "     already there"
else
    sivae_dist data scenes "$data" --resolution "$resolution" --count "$count"
fi

device="$("$PY" -c 'import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else "the CPU")')"
say
say "2/3  Training on $device -> $out (progress: samples/ in that folder, and TensorBoard)"
# Ctrl-C goes to all processes of the terminal. Only the training may act on it (it takes the signal over, saves and
# ends): the launcher, left to itself, would die at once and leave the training behind.
stopped=""
trap 'stopped=1' INT
(
    trap '' INT
    exec "$PY" -m accelerate.commands.launch --config_file launch/accelerate/single.yaml -m sivae_dist.train \
        --config configs/quickstart.yaml --out "$out" --data.url "$data" "$@"
) || { status=$?; [ -n "$stopped" ] || exit "$status"; }
trap - INT
if [ -n "$stopped" ]; then
    say "Stopped. The same command goes on from the last checkpoint in $out."
    exit 130
fi

say
say "3/3  Evaluation"
sivae_dist evaluate "$out"

say
say "Done. The run is in $out:"
newest=""
for picture in "$out"/samples/*.png; do
    [ -e "$picture" ] && { [ -z "$newest" ] || [ "$picture" -nt "$newest" ]; } && newest="$picture"
done
[ -z "$newest" ] || say "  newest picture: $newest"
say "  curves and pictures: $(dirname "$PY")/tensorboard --logdir $out/tensorboard   then open http://localhost:6006"
say "  further training, other data, several machines: README.md"
