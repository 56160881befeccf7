# shellcheck shell=bash
#
# Makes the virtual environment that the launch scripts run in. Sourced, not
# run:
#
#   source launch/venv.sh
#   ppnet_venv base   # Installs the package; sets PPNET_ROOT, PPNET_PYTHON.
#   ppnet_venv test   # The same, with the extra `test` of setup.py.
#
# Environment:
#   PPNET_VENV  where the environment lives; default: .venv in the project. An
#               existing environment that these scripts did not make is
#               installed into, and never cleared.
#   PYTHON      the interpreter to make it with (3.11 or newer); default:
#               python3, or the first of python3.13, 3.12, 3.11 that is new
#               enough.
#
# A start that finds everything installed costs one checksum. An interrupted
# installation is recognised by its marker file and done again from nothing;
# concurrent starts wait for each other where `flock` exists.

PPNET_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

_ppnet_die() {
  printf 'ppnet: %s\n' "$@" >&2
  exit 1
}

_ppnet_is_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# Prints an interpreter that is new enough.
_ppnet_find_python() {
  local candidate
  if [[ -n "${PYTHON:-}" ]]; then
    _ppnet_is_new_enough "$PYTHON" || _ppnet_die \
      "Expected PYTHON=$PYTHON to be Python 3.11 or newer, got $(
        "$PYTHON" --version 2>&1 || true)."
    printf '%s\n' "$PYTHON"
    return
  fi
  for candidate in python3 python3.13 python3.12 python3.11; do
    if _ppnet_is_new_enough "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  _ppnet_die \
    "Expected Python 3.11 or newer, got $(
      python3 --version 2>&1 || true)." \
    "Install one and name it: PYTHON=/path/to/python3.11 bash $0 ..."
}

# What an installation depends on. The project's path is part of it, because an
# environment that moved with its project has stale paths inside.
_ppnet_fingerprint() {
  {
    printf '%s\n' "$PPNET_ROOT"
    cat "$PPNET_ROOT/setup.py"
  } | cksum
}

# Is the package, with extra $2 (or "base"), installed in environment $1?
_ppnet_is_installed() {
  local stamp="$1/.ppnet-installed-$2"
  [[ -x "$1/bin/python" && ! -e "$1/.ppnet-incomplete" && -f "$stamp" ]] &&
    [[ "$(<"$stamp")" == "$(_ppnet_fingerprint)" ]]
}

# Shows pip's log as a line or two of progress.
_ppnet_progress() {
  local line count=0
  while IFS= read -r line; do
    case "$line" in
      Collecting*)
        count=$((count + 1))
        if [[ -t 2 ]]; then
          printf '\r\033[K  %d packages: %s' "$count" "${line:0:50}" >&2
        elif ((count % 20 == 0)); then
          printf '  %d packages found\n' "$count" >&2
        fi
        ;;
      'Installing collected'*)
        [[ -t 2 ]] && printf '\r\033[K' >&2
        printf '  unpacking; this takes a minute\n' >&2
        ;;
    esac
  done
}

# Brings environment $1 up to date. Runs with the lock held, in a subshell.
_ppnet_install() {
  local venv=$1 extra=$2 python target=$PPNET_ROOT
  local ours="$venv/.ppnet-made-here" incomplete="$venv/.ppnet-incomplete"
  local log="$venv/.ppnet-install.log"
  # An environment does not survive being moved: its scripts hold its path.
  if [[ -e "$incomplete" || ! -x "$venv/bin/python" ]] ||
    [[ -e "$ours" && "$(<"$ours")" != "$venv" ]]; then
    python=$(_ppnet_find_python) || exit 1
    : >"$incomplete"
    printf '%s\n' "$venv" >"$ours"
    find "$venv" -mindepth 1 -maxdepth 1 ! -name '.ppnet-*' \
      -exec rm -rf {} +
    printf 'ppnet: making %s\n' "$venv" >&2
    "$python" -m venv "$venv" || _ppnet_die "Could not make $venv."
  elif [[ -e "$ours" ]]; then
    # Up to date or not, it was whole. Should this start be killed, the marker
    # stays and the next start begins from nothing.
    printf 'was whole\n' >"$incomplete"
  fi
  [[ "$extra" == base ]] || target+="[$extra]"
  printf 'ppnet: installing %s (log: %s)\n' "$target" "$log" >&2
  if ! "$venv/bin/python" -m pip install --no-input --progress-bar off \
    --disable-pip-version-check -e "$target" </dev/null 2>&1 |
    tee "$log" | _ppnet_progress; then
    tail -n 15 "$log" >&2
    # pip gave up by itself (no network, say): a whole environment stays whole.
    [[ -s "$incomplete" ]] && rm -f "$incomplete"
    _ppnet_die "The installation failed; the log is $log."
  fi
  _ppnet_fingerprint >"$venv/.ppnet-installed-base"
  _ppnet_fingerprint >"$venv/.ppnet-installed-$extra"
  rm -f "$incomplete"
}

# Makes sure that the environment holds the package, with extra $1 (or "base").
ppnet_venv() {
  local extra=$1 venv=${PPNET_VENV:-$PPNET_ROOT/.venv}
  [[ "$venv" == /* ]] || venv="$PWD/$venv"
  if ! _ppnet_is_installed "$venv" "$extra"; then
    mkdir -p "$venv" || _ppnet_die "Could not make the folder $venv."
    # An empty folder becomes ours; so does a start that died right here.
    if [[ -z "$(find "$venv" -mindepth 1 -maxdepth 1 \
      ! -name '.ppnet-*' -print -quit)" ]]; then
      printf '%s\n' "$venv" >"$venv/.ppnet-made-here"
    elif [[ ! -e "$venv/.ppnet-made-here" && ! -x "$venv/bin/python" ]]; then
      _ppnet_die "Expected $venv to hold a usable virtual environment or" \
        "nothing at all. Repair it, or name another: PPNET_VENV=..."
    fi
    (
      set -o pipefail
      if command -v flock >/dev/null; then
        exec 9>>"$venv/.ppnet-lock"
        flock -n 9 || {
          printf 'ppnet: waiting for another start to install\n' >&2
          flock 9
        }
      fi
      # Whoever held the lock may have done the work.
      _ppnet_is_installed "$venv" "$extra" || _ppnet_install "$venv" "$extra"
    ) || exit 1
  fi
  # shellcheck disable=SC2034  # Read by the scripts that source this file.
  PPNET_PYTHON="$venv/bin/python"
}
