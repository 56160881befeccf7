#!/usr/bin/env bash
#
# Runs a grid on this machine, one shard beside the other, one GPU each where
# there are GPUs, and prints the table of all of them:
#
#   bash launch/sweep.sh --shards=4 --config=configs/quickstart.py \
#     --sweep="privacy.epsilon=1,2,4,8;seed=0,1,2" --workdir=/tmp/sweep
#
# --shards defaults to the number of GPUs, or 1. Everything else goes to
# `python -m ppnet.main`. Given again, it repeats what failed and nothing else.
# The output of shard i is <workdir>/shard-<i>.log.

set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")

gpus=0
if command -v nvidia-smi >/dev/null; then
  gpus=$(nvidia-smi --list-gpus | wc -l)
  export PPNET_EXTRA=cuda
fi
shards=$((gpus > 0 ? gpus : 1))
workdir='' has_sweep=''
flags=()
for flag in "$@"; do
  case "$flag" in
    --shards=*) shards=${flag#*=} ;;
    --sweep=*)
      has_sweep=yes
      flags+=("$flag")
      ;;
    --workdir=*)
      workdir=${flag#*=}
      flags+=("$flag")
      ;;
    *) flags+=("$flag") ;;
  esac
done
if [[ ! "$shards" =~ ^[1-9][0-9]*$ || -z "$workdir" || -z "$has_sweep" ]]; then
  printf 'ppnet: expected --shards=N with N >= 1, --sweep=... and' >&2
  printf ' --workdir=DIR, got --shards=%s --workdir=%s and %s sweep\n' \
    "$shards" "$workdir" "${has_sweep:-no}" >&2
  exit 2
fi
mkdir -p "$workdir"

# Installs before the shards all want it.
bash "$here/local.sh" --help >/dev/null

pids=()
# A shard that is still running when this ends would run on by itself.
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT
for ((i = 0; i < shards; i++)); do
  (
    ((gpus == 0)) || export CUDA_VISIBLE_DEVICES=$((i % gpus))
    exec bash "$here/local.sh" "${flags[@]}" --sweep_shard="$i/$shards"
  ) >"$workdir/shard-$i.log" 2>&1 &
  pids+=($!)
done
status=0
for ((i = 0; i < shards; i++)); do
  wait "${pids[i]}" || {
    status=$?
    printf 'ppnet: shard %d of %d ended with %d; its output:\n' \
      "$i" "$shards" "$status" >&2
    tail -n 5 "$workdir/shard-$i.log" >&2
  }
done
trap - EXIT
((status == 0)) || exit "$status"
# Everything is there: this only reads, and prints the table.
exec bash "$here/local.sh" "${flags[@]}"
