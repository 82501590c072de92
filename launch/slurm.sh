#!/usr/bin/env bash
# Submits a training on GPU nodes to Slurm: one process a node.
#
#   bash launch/slurm.sh --nodes=N --gpus=PER_NODE [--time=24:00:00]
#     [--partition=P] [--account=A] [--cpus=PER_NODE] [--name=glscl]
#     [--grace=SECONDS] [--dry_run] \
#     -- --config=configs/X.py --workdir=DIR [more of launch/train.py]
#
# Prints the job and submits it. This folder and the work directory must be
# seen by all nodes; `bash launch/install.sh gpu` on one of them comes first.
# Before its time is over and on preemption the job saves and goes back into the
# queue, as it does when a node was lost. scancel ends it for good.
set -euo pipefail
# shellcheck source=launch/commands.sh
source "$(dirname "${BASH_SOURCE[0]}")/commands.sh"

nodes='' gpus='' time=24:00:00 partition='' account='' cpus='' name=glscl
grace=300
while [ $# -gt 0 ]; do
  case $1 in
  --) shift && train_arguments=("$@") && break ;;
  --dry_run) dry_run=1 ;;
  *) take "$1" nodes gpus time partition account cpus name grace ;;
  esac
  shift
done
need nodes gpus time name grace
cd "$(dirname "${BASH_SOURCE[0]}")/.."

job() {
  printf '#!/usr/bin/env bash\n'
  printf '#SBATCH --%s\n' "job-name=$name" "nodes=$nodes" ntasks-per-node=1 \
    "gpus-per-node=$gpus" "time=$time" ${cpus:+"cpus-per-task=$cpus"} \
    ${partition:+"partition=$partition"} ${account:+"account=$account"} \
    "signal=TERM@$grace" requeue open-mode=append "output=$name-%j.txt"
  printf 'cd %s || exit\n' "$(quote "$PWD")"
  # A process that was lost must not take the others before these said why.
  # srun takes no --cpus-per-task from the job.
  printf 'srun --kill-on-bad-exit=0%s \\\n  %s\n' \
    "${cpus:+ --cpus-per-task=$cpus}" "$(train_command cuda)"
  cat <<'END'
code=$?
# 143: stopped by SIGTERM and saved. 75: another process fell silent.
case $code in
143 | 75) scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit "$code"
END
}

job
if [ "$dry_run" = 1 ]; then
  printf '+ sbatch\n'
else
  job | sbatch
fi
