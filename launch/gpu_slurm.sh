#!/usr/bin/env bash
#
# Runs one job on several machines with GPUs, under SLURM:
#
#   sbatch --nodes=4 --gpus-per-node=8 launch/gpu_slurm.sh \
#     --config=configs/llama_7b_pretrain.py --workdir=/shared/run
#
# One process per machine, which sees all of its GPUs; JAX finds the others
# through SLURM's variables. The project and --workdir must be on storage that
# all machines see. Two minutes before the time is up, or when the job is
# preempted, SLURM sends SIGTERM: the run saves, exits with 75, and the job is
# queued again. Everything after the script's name goes to
# `python -m ppnet.main`.
#
#SBATCH --job-name=ppnet
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail
: "${SLURM_JOB_ID:?Submit this script: sbatch launch/gpu_slurm.sh --config=...}"
# SLURM runs a copy of this file from a folder of its own.
root=${PPNET_ROOT:-$SLURM_SUBMIT_DIR}
launch="$root/launch/local.sh"
if [[ ! -f "$launch" ]]; then
  printf 'ppnet: expected to be submitted from the project, got %s;' "$root" >&2
  printf ' or set PPNET_ROOT.\n' >&2
  exit 1
fi
export PPNET_EXTRA=cuda

# The environment is made once, before every machine wants it.
srun --nodes=1 --ntasks=1 bash "$launch" --help >/dev/null

status=0
# SIGTERM reaches the steps by themselves; the script must outlive them.
trap '' TERM
srun --kill-on-bad-exit=0 bash "$launch" --distributed "$@" || status=$?
# 75: told to end, and saved. 134: JAX aborted it because a peer died.
if ((status == 75 || status == 134)); then
  printf 'ppnet: the run can go on; queueing job %s again\n' \
    "$SLURM_JOB_ID" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
