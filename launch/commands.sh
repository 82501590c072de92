# shellcheck shell=bash
# What the launchers share; sourced, not run.
set -euo pipefail

dry_run=0
train_arguments=()

show() { printf '+ %s\n' "$(quote "$@")"; }

# Each command is printed before it runs; with --dry_run that is all.
run() {
  show "$@"
  [ "$dry_run" = 1 ] || "$@"
}

# The same in place of this script, so that signals reach the command.
run_last() {
  show "$@"
  [ "$dry_run" = 1 ] || exec "$@"
}

# The comment at the top of the script, then what is wrong.
usage() {
  awk 'NR == 1 || /shellcheck/ { next } !/^#/ { exit }
    { sub(/^# ?/, ""); print }' "$0" >&2
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# need NAME.. : variables that must not be empty, named as their options.
need() {
  local wanted
  for wanted in "$@"; do
    [ -n "${!wanted}" ] || usage "--$wanted is missing"
  done
}

# take --NAME=VALUE NAME.. : sets the variable of that name.
take() {
  local option=${1%%=*} known
  for known in "${@:2}"; do
    if [ "--$known" = "$option" ] && [ "$1" != "$option" ]; then
      printf -v "$known" '%s' "${1#*=}"
      return
    fi
  done
  usage "unknown argument: $1"
}

# Words as one text that a shell reads as the same words.
quote() {
  local text
  printf -v text ' %q' "$@"
  printf '%s' "${text# }"
}

# train_command PLATFORM: what trains, for a shell on another machine. A CPU in
# place of an accelerator that does not work would go unseen for hours.
train_command() {
  quote env "JAX_PLATFORMS=$1,cpu" .venv/bin/python launch/train.py \
    ${train_arguments[@]+"${train_arguments[@]}"}
}
