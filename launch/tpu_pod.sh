#!/usr/bin/env bash
#
# Runs one job on a Cloud TPU slice: makes the slice or takes the one that is
# there, installs this commit on all of its workers, runs, and collects records.
#
#   bash launch/tpu_pod.sh --name=ppnet --zone=us-west4-a --type=v5litepod-64 \
#     --version=v2-alpha-tpuv5-lite -- \
#     --config=configs/llama_7b_pretrain.py --workdir=/mnt/shared/run
#
#   --name      of the slice
#   --zone      where it is
#   --type      accelerator type; needed to make it
#   --version   of the TPU software; needed to make it
#   --project   of the cloud; default: gcloud's own
#   --spot      make it preemptible
#   --restarts  how often to go on after a preemption; default 10
#   --collect   folder here that the records are copied to; default: runs
#   --delete    delete the slice at the end
#   --dry_run   print every command instead of running it
#
# Everything after -- goes to `python -m ppnet.main`, once on each worker. With
# several workers, and to go on after a slice was taken away, --workdir must be
# on storage that outlives the slice and that all workers see, mounted as a
# folder (Filestore, a disk, gcsfuse).

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
root=$(dirname "$here")
# shellcheck source-path=SCRIPTDIR source=restart.sh disable=SC1091
source "$here/restart.sh"

die() {
  printf 'ppnet: %s\n' "$*" >&2
  exit 2
}

name='' zone='' type='' version='' project='' spot='' delete='' dry_run=''
restarts=10 collect=runs
while (($#)); do
  case "$1" in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --collect=*) collect=${1#*=} ;;
    --spot) spot=yes ;;
    --delete) delete=yes ;;
    --dry_run) dry_run=yes ;;
    --help | -h)
      sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    --)
      shift
      break
      ;;
    *) die "expected an option of this script before --, got $1; see --help" ;;
  esac
  shift
done
[[ -n "$name" && -n "$zone" ]] || die "expected --name and --zone; see --help"
[[ "$restarts" =~ ^[0-9]+$ ]] ||
  die "expected --restarts to be a number, got $restarts"
(($#)) || die "expected the flags of the job after --; see --help"

where=(--zone="$zone")
[[ -z "$project" ]] || where+=(--project="$project")

# Prints the command, or runs it.
run() {
  if [[ -n "$dry_run" ]]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

tpu() {
  local verb=$1
  shift
  run gcloud compute tpus tpu-vm "$verb" "$name" "$@" "${where[@]}" --quiet
}

copy() { run gcloud compute tpus tpu-vm scp "$@" "${where[@]}" --quiet; }

on_workers() { tpu ssh --worker="$1" --command="$2"; }

state() {
  gcloud compute tpus tpu-vm describe "$name" "${where[@]}" \
    --format='value(state)' 2>/dev/null || true
}

make() {
  [[ -n "$type" && -n "$version" ]] || die \
    "expected --type and --version, to make the slice $name in $zone"
  tpu create --accelerator-type="$type" --version="$version" \
    ${spot:+--spot}
}

# The commit that is checked out, and nothing else: what runs can be named.
install() {
  local archive
  if [[ -z "$dry_run" && -n "$(git -C "$root" status --porcelain)" ]]; then
    die "expected a clean checkout, so that the run's commit says what ran"
  fi
  archive=$(mktemp -d)/ppnet.tar.gz
  run git -C "$root" archive --format=tar.gz --prefix=ppnet/ \
    --output="$archive" HEAD
  copy "$archive" "$name:ppnet.tar.gz" --worker=all
  rm -rf "$(dirname "$archive")"
  # Records of earlier runs may be in the same folder: only code is replaced.
  on_workers all "rm -rf ppnet/ppnet ppnet/configs ppnet/launch &&\
 tar -xzf ppnet.tar.gz && PPNET_EXTRA=tpu bash ppnet/launch/local.sh --help >/dev/null"
}

ready() {
  local now=none
  [[ -n "$dry_run" ]] || now=$(state)
  case "$now" in
    READY) return ;;
    '' | none) make ;;
    PREEMPTED | TERMINATED)
      tpu delete
      make
      ;;
    *) die "expected the slice $name to be READY or absent, got $now" ;;
  esac
  install
}

# shellcheck disable=SC2317  # `ppnet_restarting` calls it.
job() {
  local command='cd ppnet && PPNET_EXTRA=tpu bash launch/local.sh --distributed'
  command+=$(printf ' %q' "$@")
  on_workers all "$command" && return
  local status=$?
  # A slice that was taken away cannot pass the status on.
  case "$(state)" in
    PREEMPTED | TERMINATED | '') status=$PPNET_AGAIN ;;
  esac
  ! ppnet_asks_again "$status" || ready
  return "$status"
}

fetch() {
  local flag workdir=runs
  for flag in "$@"; do
    case "$flag" in --workdir=*) workdir=${flag#*=} ;; esac
  done
  [[ "$workdir" == /* ]] || workdir="ppnet/$workdir"
  run mkdir -p "$collect"
  copy --recurse --worker=0 "$name:$workdir" "$collect/"
}

if [[ -n "$dry_run" || "$(state)" != READY ]]; then
  ready
else
  install
fi
status=0
ppnet_restarting "$restarts" job "$@" || status=$?
fetch "$@"
[[ -z "$delete" ]] || tpu delete
exit "$status"
