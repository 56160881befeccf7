# shellcheck shell=bash
#
# Runs a command again for as long as it asks for it. Sourced, not run:
#
#   source launch/restart.sh
#   ppnet_restarting 5 some command   # At most five restarts.
#
# A run that was told to end saves its state and exits with 75 (EX_TEMPFAIL);
# the same command goes on from there. Any other status is final.

PPNET_AGAIN=75

ppnet_restarting() {
  local restarts=$1 count=0 status
  shift
  while true; do
    status=0
    "$@" || status=$?
    ((status == PPNET_AGAIN && count < restarts)) || return "$status"
    count=$((count + 1))
    printf 'ppnet: told to end and saved; restart %d of %d\n' \
      "$count" "$restarts" >&2
  done
}
