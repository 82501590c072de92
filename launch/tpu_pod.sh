#!/usr/bin/env bash
# Trains on a TPU pod slice of Google Cloud: all workers of a queued resource.
#
#   bash launch/tpu_pod.sh --name=NAME --zone=ZONE --type=v5litepod-16
#     [--runtime=VERSION] [--project=P] [--spot] [--dry_run] \
#     -- --config=configs/X.py --workdir=DIR [more of launch/train.py]
#   bash launch/tpu_pod.sh --name=NAME --zone=ZONE --stop      # saves, ends
#   bash launch/tpu_pod.sh --name=NAME --zone=ZONE --delete    # costs end
#
# Prints each command, and runs it: asks for the slice where there is none,
# waits for it, copies this folder to all workers, installs, and trains. The
# same command again continues, and a slice that was preempted is replaced. Data
# and work directory must lie on a file system that all workers have mounted.
set -euo pipefail
# shellcheck source=launch/commands.sh
source "$(dirname "${BASH_SOURCE[0]}")/commands.sh"

name='' zone='' type='' runtime='' project='' spot=0 action=train
while [ $# -gt 0 ]; do
  case $1 in
  --) shift && train_arguments=("$@") && break ;;
  --dry_run) dry_run=1 ;;
  --spot) spot=1 ;;
  --stop) action=stop ;;
  --delete) action=delete ;;
  *) take "$1" name zone type runtime project ;;
  esac
  shift
done
need name zone
cd "$(dirname "${BASH_SOURCE[0]}")/.."
where=("--zone=$zone" ${project:+"--project=$project"})
tpus=(gcloud compute tpus)

on_all_workers() {
  run "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker=all \
    "--command=$1"
}

state() {
  "${tpus[@]}" queued-resources describe "$name" "${where[@]}" \
    '--format=value(state.state)' 2>/dev/null || printf 'NONE\n'
}

delete() {
  run "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet
}

create() {
  local tier=()
  [ "$spot" = 0 ] || tier=(--spot)
  run "${tpus[@]}" queued-resources create "$name" "${where[@]}" \
    "--node-id=$name" "--accelerator-type=$type" \
    "--runtime-version=$runtime" ${tier[@]+"${tier[@]}"}
}

# Returns with a slice that runs.
provide() {
  local now said=
  if [ "$dry_run" = 1 ]; then
    create
    run "${tpus[@]}" queued-resources describe "$name" "${where[@]}" \
      '--format=value(state.state)'
    return
  fi
  while :; do
    now=$(state)
    [ "$now" = "$said" ] || printf '[tpu] %s: %s\n' "$name" "$now"
    said=$now
    case $now in
    ACTIVE) return ;;
    NONE) create ;;
    FAILED | SUSPENDED) delete ;; # the latter: preempted
    esac
    sleep 20
  done
}

install() { # joined by &&: the caller looks at the result
  local archive=${TMPDIR:-/tmp}/glscl_jax-$name.tgz
  run tar --exclude=./.git --exclude=./.venv --exclude=./runs \
    -czf "$archive" . &&
    run "${tpus[@]}" tpu-vm scp "$archive" "$name:glscl_jax.tgz" \
      "${where[@]}" --worker=all &&
    # Images of TPU VMs have Python 3.10.
    on_all_workers "command -v python3.11 >/dev/null || { sudo apt-get update -q \
&& sudo apt-get install -yq python3.11-venv; } && mkdir -p glscl_jax && tar xzf \
glscl_jax.tgz -C glscl_jax && cd glscl_jax && bash launch/install.sh tpu"
}

case $action in
stop)
  # One is enough: all stop after the same step.
  run "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker=0 \
    "--command=pkill -TERM -f [l]aunch/train.py"
  exit
  ;;
delete)
  delete
  exit
  ;;
esac

need type
case ${runtime:-$type} in
v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
v5p-*) runtime=v2-alpha-tpuv5 ;;
v6e-*) runtime=v2-alpha-tpuv6e ;;
v2-[0-9]* | v3-* | v4-*) runtime=tpu-ubuntu2204-base ;;
"$type") usage "--runtime is missing: none is known for --type=$type" ;;
esac
while :; do
  provide
  code=0
  install && on_all_workers "cd glscl_jax && $(train_command tpu)" || code=$?
  [ "$dry_run" = 0 ] && [ "$code" != 0 ] || break
  # Where the slice is still there, the training itself has failed.
  [ "$(state)" != ACTIVE ] || break
done
[ "$dry_run" = 1 ] || printf '[tpu] the slice costs until %s\n' \
  "bash launch/tpu_pod.sh --name=$name --zone=$zone --delete"
exit "$code"
