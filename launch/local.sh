#!/usr/bin/env bash
#
# Runs one job on this machine, installing the package first if need be:
#
#   bash launch/local.sh --config=configs/quickstart.py --workdir=/tmp/run
#
# Everything after the script's name goes to `python -m ppnet.main`.
#
# Relative paths mean what they mean in the folder the script is called from,
# as for any other command. One exception: a --config that does not exist there
# is looked for in the project, so that configs/quickstart.py works from
# anywhere.
#
# PPNET_EXTRA names an extra of setup.py to install as well, such as cuda or tpu.
# See launch/venv.sh for the variables PPNET_VENV and PYTHON.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=venv.sh disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

# Prints the value of a --config flag, FILE or FILE:ARG, with FILE made absolute
# if only the project has it.
find_config() {
  local value=$1 file=${1%%:*}
  if [[ "$file" != /* && ! -e "$file" && -e "$PPNET_ROOT/$file" ]]; then
    value="$PPNET_ROOT/$value"
  fi
  printf '%s\n' "$value"
}

flags=()
while (($#)); do
  case "$1" in
    --config=* | -config=*)
      flags+=("--config=$(find_config "${1#*=}")")
      ;;
    --config | -config)
      flags+=("$1")
      if (($# > 1)); then
        flags+=("$(find_config "$2")")
        shift
      fi
      ;;
    *)
      flags+=("$1")
      ;;
  esac
  shift
done

ppnet_venv "${PPNET_EXTRA:-base}"
# -P: a folder named ppnet where the script is called from is not the package.
exec "$PPNET_PYTHON" -P -m ppnet.main ${flags[@]+"${flags[@]}"}
