#!/usr/bin/env bash
#
# Runs every check, whether or not an earlier one failed: lint, format, layers,
# types, tests. Arguments go to pytest:
#
#   bash launch/test.sh
#   bash launch/test.sh tests/privacy -k clipping
#   bash launch/test.sh -m slow
#
# See launch/venv.sh for the variables PPNET_VENV and PYTHON.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=venv.sh disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
ppnet_venv test
cd "$PPNET_ROOT"

summary=()
status=0

# Runs the command after $1 and keeps a line of summary under the name $1.
check() {
  local name=$1 start=$SECONDS verdict=ok
  shift
  printf '\n== %s\n' "$name"
  "$@" || {
    verdict="FAILED ($?)"
    status=1
  }
  summary+=("$(printf '%-13s %-12s %4d s' "$name" "$verdict" \
    $((SECONDS - start)))")
}

check "ruff check" "$PPNET_PYTHON" -m ruff check .
check "ruff format" "$PPNET_PYTHON" -m ruff format --check .
check "import-linter" "$(dirname "$PPNET_PYTHON")/lint-imports" --no-cache
check "pyrefly" "$PPNET_PYTHON" -m pyrefly check \
  --python-interpreter-path "$PPNET_PYTHON"
check "pytest" "$PPNET_PYTHON" -m pytest -n auto "$@"

printf '\n== summary\n'
printf '%s\n' "${summary[@]}"
exit "$status"
