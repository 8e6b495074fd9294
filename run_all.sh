#!/usr/bin/env bash
# Set up the environment and run the whole series of notebooks: ./run_all.sh [PROFILE] [options]; --help lists them.
# ./run_all.sh lab [options of jupyter lab] opens JupyterLab at the first notebook instead.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
source "$root/scripts/environment.sh"
set_up
if [ "${1:-}" = lab ]; then
    shift
    export JUPYTER_PREFER_ENV_PATH=1 # this environment's kernel before a user's own
    exec "$python" -m jupyterlab --ServerApp.root_dir="$root/notebooks" --LabApp.default_url=/lab/tree/00_start_here.ipynb "$@"
fi
exec "$python" -m faqd_lib.cli.run_all "$@"
