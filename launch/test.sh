#!/usr/bin/env bash
# Installs into .venv what is missing and runs the test suite.
#
#   bash launch/test.sh [pytest arguments]      # e.g. tests/data -x
#
# Tests run in two processes; -n 0 runs them in this one.
set -euo pipefail
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
bash launch/install.sh test
# Without paths the whole suite runs; paths are meant from where the user is.
if [ $# -eq 0 ]; then
  exec .venv/bin/python -m pytest
fi
cd "$here"
exec "$root/.venv/bin/python" -m pytest --rootdir="$root" \
  -c "$root/pyproject.toml" "$@"
