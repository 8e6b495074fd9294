#!/usr/bin/env bash
# Set up the environment with the test tools and run the tests: ./run_tests.sh [pytest arguments].
# Without arguments: all tests, in parallel. Paths among the arguments are relative to the project.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
source "$root/scripts/environment.sh"
set_up --extra test
for name in FAQD_DATA FAQD_CACHE; do # relative to where the user stands, not to the project
    value=${!name:-}
    case "$value" in "" | /*) ;; *) export "$name=$PWD/$value" ;; esac
done
cd -- "$root"
if [ $# -eq 0 ]; then
    # Every worker has its own thread pool: together they should not have more threads than there are cores.
    read -r workers threads < <("$python" -c '
import os
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
workers = min(cores, 4)
print(workers, max(1, cores // workers))')
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}"
    # In the order of tests/conftest.py: the series, which takes longest, must not be what is begun last.
    set -- -n "$workers" --dist loadfile --no-loadscope-reorder
fi
exec "$python" -m pytest "$@"
