#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, as an xpk workload.
#
#   bash launch/gke_xpk.sh --name=NAME --cluster=CLUSTER --zone=ZONE
#     --type=v5litepod-256 [--slices=1] [--project=P] [--image=IMAGE]
#     [--storage=NAME] [--restarts=10] [--spot] [--dry_run] \
#     -- --config=configs/X.py --workdir=DIR [more of launch/train.py]
#
# Prints the command of xpk (pip install xpk) and runs it. Without --image this
# folder is put on top of python:3.11, and each host installs when it starts;
# IMAGE has it, with an installed .venv, as its working directory. --storage
# names a file system that xpk has attached: data and work directory must lie on
# one that all hosts share. Preempted or lost hosts start all processes again,
# and the run continues.
set -euo pipefail
# shellcheck source=launch/commands.sh
source "$(dirname "${BASH_SOURCE[0]}")/commands.sh"

name='' cluster='' zone='' type='' slices=1 project='' image='' storage=''
restarts=10 spot=0
while [ $# -gt 0 ]; do
  case $1 in
  --) shift && train_arguments=("$@") && break ;;
  --dry_run) dry_run=1 ;;
  --spot) spot=1 ;;
  *) take "$1" name cluster zone type slices project image storage restarts ;;
  esac
  shift
done
need name cluster zone type slices restarts
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -n "$image" ]; then
  source=("--docker-image=$image")
  command=$(train_command tpu)
else
  source=(--base-docker-image=python:3.11 --script-dir=.)
  command="bash launch/install.sh tpu && $(train_command tpu)"
fi
tier=()
[ "$spot" = 0 ] || tier=(--spot)
# 75: another process was lost; xpk restarts after signals by itself.
run xpk workload create "--workload=$name" "--cluster=$cluster" \
  "--zone=$zone" ${project:+"--project=$project"} "--tpu-type=$type" \
  "--num-slices=$slices" "${source[@]}" ${storage:+"--storage=$storage"} \
  ${tier[@]+"${tier[@]}"} "--max-restarts=$restarts" \
  --restart-on-exit-codes=75 --termination-grace-period-seconds=300 \
  "--command=$command"
