# Shared by launch/quickstart.sh, tests/run.sh and .ci/run; sourced, not run. After `sivae_setup EXTRA`, $PY is a Python
# in which sivae-dist runs: that of ./.venv, made on the first call and reused at once afterwards, or with --offline one
# that is already there and is left exactly as it is.
# Callers may set (sivae_option does it from the command line): SIVAE_PYTHON, SIVAE_OFFLINE=1.
# shellcheck shell=bash

SIVAE_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
SIVAE_PYTHON="${SIVAE_PYTHON:-}"
SIVAE_OFFLINE="${SIVAE_OFFLINE:-}"
PY=""

SIVAE_SETUP_HELP="  --python PY   use this Python (3.11 to 3.13) instead of the first suitable one on the PATH
  --offline     install nothing: run with --python PY (default: ./.venv, else the PATH's) as it is"

say() { printf '%s\n' "$*" >&2; }

# die WHAT [FIX]
die() {
    printf 'error: %s\n' "$1" >&2
    [ -z "${2:-}" ] || printf '  fix: %s\n' "$2" >&2
    exit 1
}

# sivae_option "$@": takes one set-up option off the front; SIVAE_SHIFT says how many words it was (0: not one of ours).
sivae_option() {
    SIVAE_SHIFT=0
    case "${1:-}" in
        --offline) SIVAE_OFFLINE=1 SIVAE_SHIFT=1 ;;
        --python=*) SIVAE_PYTHON="${1#*=}" SIVAE_SHIFT=1 ;;
        --python)
            [ -n "${2:-}" ] || die "--python needs the path of a Python" "for example --python python3.11"
            SIVAE_PYTHON="$2" SIVAE_SHIFT=2
            ;;
    esac
}

# Does this command run, and is it a Python we support? Running it is the only proof: a pyenv shim exists on the PATH
# for every version installed and fails for those not selected.
_sivae_is_python() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1
}

# Debian splits venv off: `import venv` works there while making one with pip fails, for want of ensurepip.
_sivae_has_venv() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }

_sivae_find_python() {
    local name path without_venv="" seen=""
    if [ -n "$SIVAE_PYTHON" ]; then
        command -v "$SIVAE_PYTHON" >/dev/null 2>&1 || die "--python $SIVAE_PYTHON: there is no such command" \
            "give the path of a Python 3.11, 3.12 or 3.13"
        _sivae_is_python "$SIVAE_PYTHON" || die \
            "--python $SIVAE_PYTHON is not a working Python 3.11 to 3.13: it says '$("$SIVAE_PYTHON" --version 2>&1 | head -n 1)'" \
            "give the path of a Python 3.11, 3.12 or 3.13"
        PY="$(command -v "$SIVAE_PYTHON")"
        return
    fi
    for name in python3.12 python3.11 python3 python; do
        while IFS= read -r path; do
            [ -n "$path" ] || continue
            seen="$seen $path"
            _sivae_is_python "$path" || continue
            if [ -n "$SIVAE_OFFLINE" ] || _sivae_has_venv "$path"; then
                PY="$path"
                return
            fi
            without_venv="${without_venv:-$path}"
        done < <(type -aP "$name" 2>/dev/null)
    done
    [ -z "$without_venv" ] || die "$without_venv cannot make virtual environments (its ensurepip or venv is missing)" \
        "sudo apt install python3-venv (Debian, Ubuntu), or name another Python with --python"
    die "no Python 3.11, 3.12 or 3.13 found (tried:${seen:- nothing is on the PATH})" \
        "install one (Debian, Ubuntu: sudo apt install python3 python3-venv python3-dev), or name it with --python"
}

_sivae_check_compiler() {
    local compiler="${CXX:-}" candidate
    for candidate in c++ g++ clang++; do
        [ -n "$compiler" ] || { command -v "$candidate" >/dev/null 2>&1 && compiler="$candidate"; }
    done
    [ -n "$compiler" ] && command -v "${compiler%% *}" >/dev/null 2>&1 || die \
        "no C++ compiler found (tried ${CXX:-c++, g++, clang++}); the kernels are compiled on the machine they run on" \
        "install one (Debian, Ubuntu: sudo apt install g++), or name one with the variable CXX"
    "$PY" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
        say "note: Python.h is missing beside $PY, so kernels that need it fall back to the slower reference" \
            "(Debian, Ubuntu: sudo apt install python3-dev)"
}

# What the environment was made from: when any of it changes, pip runs again. The folder counts because neither a
# virtual environment nor an editable installation can be moved.
_sivae_fingerprint() {
    "$PY" - "$SIVAE_ROOT" <<'EOF'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256(f"{root} {sys.version_info[:3]}".encode())
for name in ("pyproject.toml", "constraints.txt", "setup.py"):
    digest.update((root / name).read_bytes())
print(digest.hexdigest())
EOF
}

_sivae_make_venv() {
    local extra="$1" venv="$SIVAE_ROOT/.venv" base="$PY" stamp fingerprint version
    version='import sys; print(sys.version)'
    mkdir -p "$venv"
    # Two scripts started together must not both run pip in one environment.
    if command -v flock >/dev/null 2>&1; then
        exec 9>"$venv/.sivae-lock"
        flock -n 9 || { say "waiting for another set-up of $venv"; flock 9; }
    fi
    stamp="$venv/.sivae-stamp"
    fingerprint="$(_sivae_fingerprint)"
    # `dev` contains `test`, so an environment made for dev serves both.
    case "$(cat "$stamp" 2>/dev/null)" in
        "$fingerprint $extra" | "$fingerprint dev")
            if _sivae_is_python "$venv/bin/python"; then
                PY="$venv/bin/python"
                exec 9>&-
                return
            fi
            ;;
    esac
    say "Setting up $venv with $base: the first time this downloads PyTorch and takes minutes."
    rm -f "$stamp"
    # An environment of another Python, or a half-deleted one, is not mended but made anew.
    if [ "$("$venv/bin/python" -c "$version" 2>/dev/null)" != "$("$base" -c "$version")" ]; then
        "$base" -m venv --clear "$venv" >&2 || die "$base could not make a virtual environment in $venv" \
            "see the message above; on Debian or Ubuntu: sudo apt install python3-venv"
    fi
    PY="$venv/bin/python"
    (
        cd "$SIVAE_ROOT"
        # First pip itself: the one that comes with Python is as old as Python.
        "$PY" -m pip install --disable-pip-version-check --quiet -c constraints.txt --upgrade pip >&2 &&
            "$PY" -m pip install -c constraints.txt -e ".[$extra]" >&2
    ) || die "pip could not install sivae-dist into $venv" \
        "see pip's message above (network, proxy, disk space); then run the same command again"
    printf '%s %s\n' "$fingerprint" "$extra" >"$stamp"
    exec 9>&-
}

# Versions and modules of an environment that is taken as it is. Without pip's knowledge of it, importing is the test.
_sivae_check_offline() {
    "$PY" - "$1" <<'EOF' >&2 || exit 1
import importlib.util, sys
need = {"torch": "torch", "accelerate": "accelerate", "deepspeed": "deepspeed", "webdataset": "webdataset",
        "numpy": "numpy", "tensorboard": "tensorboard", "ninja": "ninja", "tyro": "tyro", "safetensors": "safetensors",
        "PIL": "pillow", "yaml": "pyyaml", "tqdm": "tqdm"}
tests = {"pytest": "pytest", "pytest_timeout": "pytest-timeout", "hypothesis": "hypothesis"}
dev = {"ruff": "ruff", "mypy": "mypy"}
need |= {"test": tests, "dev": tests | dev}.get(sys.argv[1], {})
missing = [package for module, package in need.items() if importlib.util.find_spec(module) is None]
if missing:
    print(f"error: {sys.executable} lacks: {', '.join(missing)}")
    print("  fix: install them there, or run without --offline to let .venv be made")
    sys.exit(1)
import torch
version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
if version < (2, 11):
    print(f"error: {sys.executable} has torch {torch.__version__}, sivae-dist needs 2.11 or later")
    print("  fix: upgrade torch there, or run without --offline to let .venv be made")
    sys.exit(1)
EOF
}

# sivae_setup EXTRA: EXTRA is an extra of pyproject.toml (test, dev).
sivae_setup() {
    if [ -n "$SIVAE_OFFLINE" ]; then
        [ -n "$SIVAE_PYTHON" ] || ! _sivae_is_python "$SIVAE_ROOT/.venv/bin/python" ||
            SIVAE_PYTHON="$SIVAE_ROOT/.venv/bin/python"
        _sivae_find_python
        _sivae_check_offline "$1"
        # Nothing is installed, so the checkout itself must be importable, in child processes too.
        export PYTHONPATH="$SIVAE_ROOT${PYTHONPATH:+:$PYTHONPATH}"
    else
        _sivae_find_python
        _sivae_has_venv "$PY" || die "$PY cannot make virtual environments (its ensurepip or venv is missing)" \
            "sudo apt install python3-venv (Debian, Ubuntu), or name another Python with --python"
        _sivae_check_compiler
        _sivae_make_venv "$1"
    fi
    # Tools that the environment brings (ninja for kernels, tensorboard) are looked up by name.
    PATH="$(dirname "$PY"):$PATH"
    export PATH
}

# Two threads unless the user says otherwise. Waiting threads must sleep: with the default of spinning, the quickstart on
# two cores that others used too did not finish 400 images in 100 s, and took 44 s with sleeping ones.
sivae_threads() {
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
    export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
    export MKL_NUM_THREADS="${MKL_NUM_THREADS:-$OMP_NUM_THREADS}"
}
