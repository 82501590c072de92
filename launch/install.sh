#!/usr/bin/env bash
# Makes .venv and installs the package into it, once.
#
#   bash launch/install.sh [EXTRAS]     # EXTRAS: test, gpu, tpu, wandb, test,gpu
#   PYTHON=/path/to/python3.12 bash launch/install.sh
#
# Nothing is done when .venv already holds what this setup.py asks for; an
# install that was interrupted starts again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=${1:-}
venv=.venv
stamp=$venv/installed-${extras:-package}
log=$venv/install.log

say() { printf '[install] %s\n' "$*"; }
fail() {
  printf '[install] %s\n' "$*" >&2
  exit 1
}

recent_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

version_of() {
  "$1" -c 'import sys; print(sys.version.split()[0])' 2>/dev/null
}

# 3.11 and 3.12 come first: the test suite ran on these.
find_python() {
  local name
  if [ -n "${PYTHON:-}" ]; then
    recent_enough "$PYTHON" ||
      fail "PYTHON=$PYTHON is no Python 3.11 or newer; name another one."
    command -v "$PYTHON"
    return
  fi
  for name in python3.11 python3.12 python3.13 python3.14 python3 python; do
    if command -v "$name" >/dev/null && recent_enough "$name"; then
      command -v "$name"
      return
    fi
  done
  fail "no Python 3.11 or newer found. Install one (Debian, Ubuntu:" \
    "apt-get install python3 python3-venv) or name it:" \
    "PYTHON=/path/to/python3.12"
}

# True when .venv can be kept: the Python that was asked for, with a pip.
usable() {
  local python=$venv/bin/python
  [ -f "$venv/pyvenv.cfg" ] && recent_enough "$python" || return 1
  [ -z "${PYTHON:-}" ] ||
    [ "$(version_of "$PYTHON")" = "$(version_of "$python")" ] || return 1
  "$python" -m pip --version >/dev/null 2>&1 ||
    "$python" -m ensurepip >/dev/null 2>&1
}

make_venv() {
  local python
  python=$(find_python)
  if [ -e "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ]; then
    rmdir "$venv" 2>/dev/null ||
      fail "$PWD/$venv is no virtual environment; move it away first."
  fi
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python cannot make virtual environments. Debian, Ubuntu:" \
      "apt-get install python3-venv (or python3.X-venv for that version)."
  say "making $venv with $python ($(version_of "$python"))"
  "$python" -m venv --clear "$venv"
}

# What an install depends on: the Python, setup.py, and the place.
fingerprint() {
  "$venv/bin/python" - "$PWD" <<'PY'
import hashlib, pathlib, sys
parts = [pathlib.Path("setup.py").read_bytes(), sys.argv[1].encode()]
print(sys.version.split()[0], hashlib.sha256(b"\0".join(parts)).hexdigest())
PY
}

# The large downloads and a count of the rest, on a terminal or not.
shorten() {
  local line count=0
  while IFS= read -r line; do
    case $line in
    Collecting\ *)
      count=$((count + 1))
      [ $((count % 20)) -ne 0 ] || say "$count packages looked at, $SECONDS s"
      ;;
    *Downloading\ *\([0-9][0-9]*.[0-9]\ MB\))
      say "fetching ${line##*Downloading }"
      ;;
    Installing\ collected*) say "unpacking, $SECONDS s" ;;
    esac
  done
}

usable || make_venv
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(fingerprint)" ]; then
  exit 0
fi
rm -f "$stamp"
target=.${extras:+[$extras]}
say "installing $target with Python $(version_of "$venv/bin/python");" \
  "1 to 3 minutes, details in $log"
if ! "$venv/bin/python" -m pip install --disable-pip-version-check \
  --progress-bar=off --editable "$target" 2>&1 | tee "$log" | shorten; then
  tail -n 20 "$log" >&2
  fail "pip failed; its last lines are above, the rest is in $log." \
    "The same command tries again."
fi
fingerprint >"$stamp"
say "installed after $SECONDS s"
