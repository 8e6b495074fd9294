# Sourced by run_all.sh and run_tests.sh, which set $root.

set_up() { # set_up [--extra test]: sets $python to the Python to use, and PYTHONPATH to this checkout
    local candidate version tried="" candidates=(python3.13 python3.12 python3.11 python3 python)
    [ -z "${CONDA_PREFIX:-}" ] || candidates=("$CONDA_PREFIX/bin/python" "${candidates[@]}")
    [ -z "${VIRTUAL_ENV:-}" ] || candidates=("$VIRTUAL_ENV/bin/python" "${candidates[@]}")
    [ -z "${FAQD_PYTHON:-}" ] || candidates=("$FAQD_PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            python=$("$candidate" "$root/scripts/setup_env.py" "$@")
            export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # this checkout before an installed faqd
            return
        fi
        # A command on the PATH need not start: a pyenv shim without its Python does not.
        version=$("$candidate" --version 2>/dev/null) || version="does not start"
        tried+="  $candidate: $version"$'\n'
    done
    {
        printf 'This project needs Python 3.11 or newer. None was found%s:\n%s' "${FAQD_PYTHON:+ by FAQD_PYTHON}" "$tried"
        printf 'Install one from the packages of the system, with pyenv or with conda, and put it on the PATH.\n'
        printf 'Or name one: FAQD_PYTHON=/path/to/python3.12 %s\n' "$0"
    } >&2
    return 1
}
