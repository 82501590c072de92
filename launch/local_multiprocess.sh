#!/usr/bin/env bash
# Runs launch/train.py as N processes on the CPU of this machine.
#
#   bash launch/local_multiprocess.sh N [--port=P] [--dry_run] \
#     -- --config=configs/X.py --workdir=DIR [more of launch/train.py]
#
# Each has one device; XLA_FLAGS=--xla_force_host_platform_device_count=4 gives
# each four. Ctrl-C or SIGTERM ends all after a step that is saved; the same
# command continues, also with another N.
set -euo pipefail
# shellcheck source=launch/commands.sh
source "$(dirname "${BASH_SOURCE[0]}")/commands.sh"

count=
port=$((20000 + RANDOM % 12000)) # below those that systems hand out
while [ $# -gt 0 ]; do
  case $1 in
  --) shift && train_arguments=("$@") && break ;;
  --dry_run) dry_run=1 ;;
  --*) take "$1" port ;;
  *[!0-9]* | 0*) usage "$1: the number of processes is needed" ;;
  *) count=$1 ;;
  esac
  shift
done
[ -n "$count" ] || usage "the number of processes is missing"
python=$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python
script=$(dirname "${BASH_SOURCE[0]}")/train.py
[ "$dry_run" = 1 ] || [ -x "$python" ] ||
  usage "no $python: bash launch/install.sh makes it"

export JAX_PLATFORMS=cpu
pids=()
# The shell starts them deaf to Ctrl-C: it comes from here, once.
trap 'kill -TERM ${pids[@]+"${pids[@]}"} 2>/dev/null || :' INT TERM
for ((number = 0; number < count; number++)); do
  command=("$python" "$script" "--coordinator_address=localhost:$port"
    "--num_processes=$count" "--process_id=$number"
    ${train_arguments[@]+"${train_arguments[@]}"})
  show env JAX_PLATFORMS=cpu "${command[@]}"
  if [ "$dry_run" = 0 ]; then
    "${command[@]}" &
    pids+=($!)
  fi
done

# The code of the process that is to blame: 75 says that another one is.
code=0
for pid in ${pids[@]+"${pids[@]}"}; do
  one=129
  while [ "$one" -gt 128 ]; do # a signal ends the waiting, not the process
    one=0
    wait "$pid" || one=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  if [ "$code" = 0 ] || { [ "$code" = 75 ] && [ "$one" != 0 ]; }; then
    code=$one
  fi
done
exit "$code"
