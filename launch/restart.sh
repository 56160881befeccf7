# shellcheck shell=bash
#
# Runs a command again for as long as it asks for it. Sourced, not run:
#
#   source launch/restart.sh
#   ppnet_restarting 5 some command   # At most five restarts.
#
# A run that was told to end saves its state and exits with 75 (EX_TEMPFAIL);
# the same command goes on from there. JAX aborts a process (134) whose peers
# died; all of them go on from the last checkpoint. Any other status is final.

PPNET_AGAIN=75

# Does this status ask for another start?
ppnet_asks_again() {
  (($1 == PPNET_AGAIN || $1 == 134))
}

ppnet_restarting() {
  local restarts=$1 count=0 status
  shift
  while true; do
    status=0
    "$@" || status=$?
    ppnet_asks_again "$status" && ((count < restarts)) || return "$status"
    count=$((count + 1))
    printf 'ppnet: the run goes on from its last checkpoint; restart %d of %d\n' \
      "$count" "$restarts" >&2
  done
}
