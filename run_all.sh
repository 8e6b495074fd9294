#!/usr/bin/env bash
# Set up the environment and run the whole series of notebooks: ./run_all.sh [PROFILE] [options]; --help lists them.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
source "$root/scripts/environment.sh"
set_up
exec "$python" -m faqd_lib.series "$@"
