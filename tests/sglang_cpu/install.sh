#!/usr/bin/env bash
# Makes the environment VENV, in which SGLang serves on a CPU: for tests, on any machine. About 1.6 GB, a minute or two.
# Does nothing where VENV was made from these very files. Packages come from wherever pip is configured to look; for
# torch that should be a place with CPU builds.
#
#   tests/sglang_cpu/install.sh VENV        PYTHON=python3.11 names the interpreter
set -euo pipefail

venv=${1:?usage: install.sh VENV}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3.11}

requirements=("$here/requirements.txt" "$here/requirements-nodeps.txt" "$here/constraints.txt")
mapfile -t shim < <(find "$here/shim" -type f -not -path '*/__pycache__/*' | sort)

digest() { cat "$@" | sha256sum | cut -d' ' -f1; }
is_current() { [[ -f "$1" && "$(cat "$1")" == "$2" ]]; }

packages_stamp="$venv/.packages.sha256"
packages=$(digest "${requirements[@]}")
if ! is_current "$packages_stamp" "$packages"; then
    rm -rf "$venv"
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet -r "$here/requirements.txt" -c "$here/constraints.txt"
    "$venv/bin/python" -m pip install --quiet --no-deps -r "$here/requirements-nodeps.txt"
    echo "$packages" > "$packages_stamp"
fi

# The shim goes into the environment itself, so that its interpreter alone is all that an engine has to be told.
shim_stamp="$venv/.shim.sha256"
shim_digest=$(digest "${shim[@]}")
if ! is_current "$shim_stamp" "$shim_digest"; then
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    cp -r "$here/shim/." "$site/"
    echo "$shim_digest" > "$shim_stamp"
fi
