#!/usr/bin/env bash
# Trains on all GPUs of this machine, by one process.
#
#   bash launch/gpu_host.sh [--dry_run] \
#     -- --config=configs/X.py --workdir=DIR [more of launch/train.py]
#
# Installs jax for CUDA into .venv first. CUDA_VISIBLE_DEVICES=0,1 takes some
# GPUs. Ctrl-C or SIGTERM saves; the same command continues.
set -euo pipefail
# shellcheck source=launch/commands.sh
source "$(dirname "${BASH_SOURCE[0]}")/commands.sh"

while [ $# -gt 0 ]; do
  case $1 in
  --) shift && train_arguments=("$@") && break ;;
  --dry_run) dry_run=1 ;;
  *) take "$1" ;;
  esac
  shift
done
here=$(dirname "${BASH_SOURCE[0]}")

run nvidia-smi --list-gpus
run bash "$here/install.sh" gpu
# A CPU in place of a GPU that does not work would go unseen for hours.
run_last env JAX_PLATFORMS=cuda,cpu "$here/../.venv/bin/python" \
  "$here/train.py" ${train_arguments[@]+"${train_arguments[@]}"}
