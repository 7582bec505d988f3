# Sourced by the other scripts: makes sure that .venv in the project's root is whole and current, then sets
# $root and $python (the environment's interpreter). Needs Python 3.10 or newer and nothing else.
#
#   PYTHON=/path/to/python3.12 ./scripts/test     builds the environment with that interpreter

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
python=$venv/bin/python
stamp=$venv/.ucp-stamp
deepspeed_version=0.19.8

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 2; }

# What the environment was made from. The text itself is the stamp: comparing it needs no hashing tool.
# Where its first line still holds, an old environment can be updated in place (one cannot be moved to another root).
describe_base() { printf 'ucp environment 1, root %s, python %s\n' "$root" "$1"; }
describe_inputs() {
    describe_base "$1"
    cat -- "$root/pyproject.toml" "$root/scripts/constraints.txt"
}

python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        is_usable_python "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.10 or newer that can make virtual environments"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python3.14; do
        if command -v "$candidate" >/dev/null 2>&1 && is_usable_python "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "no Python 3.10 or newer with the venv module found on PATH (on Debian and Ubuntu: apt install python3-venv); PYTHON=... names one elsewhere"
}

is_usable_python() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

is_wanted_version() { [ -z "${PYTHON:-}" ] || [ "$(python_version "$PYTHON")" = "$1" ]; }

is_current() {
    [ -f "$stamp" ] || return 1 # the stamp is written last: without it an environment was never finished
    local version
    version=$(python_version "$python") || return 1
    is_wanted_version "$version" || return 1
    describe_inputs "$version" | cmp -s - "$stamp"
}

# Held from here until unlock_env or the end of the process, so that two runs do not build one environment at once.
lock_env() {
    if command -v flock >/dev/null 2>&1; then
        exec 9>"$root/.venv.lock"
        flock -n 9 && return
        say "waiting for another run that is making .venv"
        flock 9
        return
    fi
    local holder
    until mkdir "$root/.venv.lock.d" 2>/dev/null; do
        holder=$(cat "$root/.venv.lock.d/pid" 2>/dev/null || true)
        if [ -n "$holder" ] && ! kill -0 "$holder" 2>/dev/null; then
            rm -rf -- "$root/.venv.lock.d" # its owner died
            continue
        fi
        [ -n "${waiting_said:-}" ] || say "waiting for another run that is making .venv"
        waiting_said=1
        sleep 1
    done
    printf '%s\n' $$ >"$root/.venv.lock.d/pid"
    trap 'rm -rf -- "$root/.venv.lock.d"' EXIT
}

unlock_env() {
    if command -v flock >/dev/null 2>&1; then
        exec 9>&-
    else
        rm -rf -- "$root/.venv.lock.d"
        trap - EXIT
    fi
}

# What is imported is compiled then; all that is installed would be three times as much.
pip_install() {
    "$python" -m pip install -qq --disable-pip-version-check --no-compile --constraint "$root/scripts/constraints.txt" "$@"
}

build_env() {
    local base version
    version=$(python_version "$python" || true)
    if [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" = "$(describe_base "$version")" ] && is_wanted_version "$version"; then
        say "updating .venv: pyproject.toml or scripts/constraints.txt has changed"
    else
        base=$(find_python) || exit 2
        say "making .venv with $base (Python $(python_version "$base")); this downloads torch, which takes a few minutes"
        if [ -e "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv" 2>/dev/null)" ]; then
            die "$venv exists and is no virtual environment; move it away"
        fi
        "$base" -m venv --clear "$venv" || die "$base could not make a virtual environment in $venv"
    fi
    rm -f -- "$stamp" # from here until the end, this environment counts as unfinished

    # torch comes first because DeepSpeed's setup.py imports it; for the same reason DeepSpeed is built without
    # isolation, with its build tools installed beforehand. DS_BUILD_OPS=0: no compiled kernels, so no compiler is needed.
    say "  build tools, torch"
    pip_install 'setuptools>=77' wheel packaging || die "pip could not install the build tools (its message is above)"
    pip_install torch numpy ninja psutil py-cpuinfo || die "pip could not install torch (its message is above)"
    say "  DeepSpeed"
    DS_BUILD_OPS=0 pip_install --no-build-isolation "deepspeed==$deepspeed_version" ||
        die "pip could not install DeepSpeed (its message is above)"
    say "  universal-checkpoint, and what its tests need"
    pip_install --no-build-isolation --editable "$root[deepspeed,remote,test]" ||
        die "pip could not install this project (its message is above)"
    # The peer of merges, and Megatron-Core, whose checkpoints are read and written: their own pins are older than what
    # is here, or ask for a GPU's libraries, so they come without what they ask for.
    pip_install --no-deps mergekit immutables scipy megatron-core ||
        die "pip could not install mergekit and megatron-core (its message is above)"
    # torchtitan, whose checkpoints are read, for the same reason.
    [ "$(python_version "$python")" = 3.10 ] || pip_install --no-deps torchtitan tyro spmd_types docstring_parser typeguard ||
        die "pip could not install torchtitan (its message is above)"

    describe_inputs "$(python_version "$python")" >"$stamp.new"
    mv -- "$stamp.new" "$stamp"
}

# A folder with one package in another version, without what it needs: that stays .venv's. Put before .venv on PYTHONPATH
# it is what is imported, so that many releases share one environment. Made once, and kept by its name in .venv.
#
# DeepSpeed and most others are Python alone, or small. torch is built anew against nothing here; where only a CUDA build
# of it is to be had, that brings its own libraries, which are several GB.
overlay() { # overlay PACKAGE VERSION: prints the folder
    local folder=$venv/with/$1-$2 options=(--no-deps --no-compile)
    if [ ! -d "$folder" ]; then
        say "  $1 $2, into .venv/with"
        [ "$1" != deepspeed ] || options+=(--no-build-isolation)
        [ "$1" != torch ] || options=(--no-compile)
        rm -rf -- "$folder.new"
        DS_BUILD_OPS=0 "$python" -m pip install -qq --disable-pip-version-check "${options[@]+"${options[@]}"}" \
            --target "$folder.new" "$1==$2" || { rm -rf -- "$folder.new"; die "pip could not install $1 $2 (its message is above)"; }
        mv -- "$folder.new" "$folder"
    fi
    printf '%s\n' "$folder"
}

ensure_env() {
    if ! is_current; then
        lock_env
        is_current || build_env
        unlock_env
    fi
    export PATH=$venv/bin:$PATH # DeepSpeed looks for ninja there
}
