# Sourced by run_all.sh and run_tests.sh: finds a Python that can run scripts/setup_env.py, and calls it.
# FAQD_PYTHON=/path/to/python chooses the Python by hand.

oldest="3.11"

runs_here() { # runs_here PYTHON: is it there, does it start, is it new enough
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() { # prints the first usable Python; a command may be on the PATH and still not start (pyenv, Windows)
    local candidate tried=()
    local candidates=(python3.13 python3.12 python3.11 python3 python)
    if [ -n "${FAQD_PYTHON:-}" ]; then
        candidates=("$FAQD_PYTHON")
    else
        local prefix
        for prefix in "${CONDA_PREFIX:-}" "${VIRTUAL_ENV:-}"; do
            [ -z "$prefix" ] || candidates=("$prefix/bin/python" "$prefix/Scripts/python.exe" "$prefix/python.exe" "${candidates[@]}")
        done
    fi
    for candidate in "${candidates[@]}"; do
        if runs_here "$candidate"; then
            printf '%s\n' "$candidate"
            return 0
        fi
        local version
        if version=$("$candidate" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null); then
            tried+=("$candidate is Python $version")
        fi
    done
    {
        printf 'This project needs Python %s or newer' "$oldest"
        [ -z "${FAQD_PYTHON:-}" ] || printf ' (FAQD_PYTHON=%s)' "$FAQD_PYTHON"
        [ "${#tried[@]}" -eq 0 ] && printf '; none was found' || printf '; found: %s' "$(printf '%s, ' "${tried[@]}" | sed 's/, $//')"
        printf '.\nInstall one from your system'"'"'s packages, with pyenv or with conda, and put it on the PATH;\n'
        printf 'or name it: FAQD_PYTHON=/path/to/python3.12 %s\n' "$0"
    } >&2
    return 1
}

set_up() { # set_up [--extra test]: sets $python to the environment's Python, and PYTHONPATH to this checkout
    local base
    base=$(find_python)
    python=$("$base" "$root/scripts/setup_env.py" "$@")
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # this checkout's code is what runs, wherever faqd is installed
}
