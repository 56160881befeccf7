#!/usr/bin/env bash
#
# Runs one job on all GPUs of this machine, installing JAX for CUDA first:
#
#   bash launch/gpu_local.sh --config=configs/llama_7b_lora.py --workdir=/tmp/run
#   CUDA_VISIBLE_DEVICES=0,1 bash launch/gpu_local.sh --config=...
#
# Everything after the script's name goes to `python -m ppnet.main`, one process
# for all GPUs. A run that is told to end (SIGTERM) saves and exits with 75;
# PPNET_RESTARTS (default 0) starts it again so many times. See launch/local.sh
# for paths, PPNET_VENV and PYTHON.

set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source-path=SCRIPTDIR source=restart.sh disable=SC1091
source "$here/restart.sh"

if ! command -v nvidia-smi >/dev/null; then
  printf 'ppnet: expected a machine with an NVIDIA driver (nvidia-smi);' >&2
  printf ' launch/local.sh runs on the processor alone.\n' >&2
  exit 1
fi
export PPNET_EXTRA=cuda
ppnet_restarting "${PPNET_RESTARTS:-0}" bash "$here/local.sh" "$@"
