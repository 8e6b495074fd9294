"""Find or make the Python environment of this project. Print the path of its Python, and nothing else, on stdout.

    python scripts/setup_env.py [--extra test]

1. The Python that ``FAQD_PYTHON`` names, or else an active environment, is used if it satisfies ``pyproject.toml``.
   Such an environment is never changed.
2. Otherwise ``.venv`` in the project is used. venv and pip make it, with the versions of ``requirements.lock`` and
   with the packages of the notebooks and the test tools.

The stamp ``.venv/faqd-setup.json`` says what ``.venv`` was installed from. The stamp is empty during an installation,
so the next call notices an installation that was killed, and makes ``.venv`` again. A ``.venv`` without a stamp was
made by the user, and is never changed.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  (an active environment may be older)
    sys.exit(f"Python {sys.version_info[0]}.{sys.version_info[1]} is too old: 3.11 or newer is needed")
if sys.platform == "win32":
    sys.exit("this set-up needs Linux or macOS; on Windows, use WSL")

import argparse
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
import tomllib
from pathlib import Path
from subprocess import DEVNULL, STDOUT

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = ROOT / "pyproject.toml"
VERSIONS = ROOT / "requirements.lock"
VENV = (ROOT / ".venv").resolve()  # venv refuses a link
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "faqd-setup.json"
OUTPUT = VENV / "faqd-setup.log"  # of venv or pip
LOCK = ROOT / ".venv.lock"
EXTRAS = ["notebooks", "test"]  # of pyproject.toml: what .venv is installed with
INCOMPLETE = {}  # the stamp during an installation
HEARTBEAT = 15  # seconds between signs of life


def say(text: str) -> None:
    """Print a message on stderr, since stdout is for the answer."""
    print(f"set-up: {text}", file=sys.stderr, flush=True)


def unmet(extras: list[str]) -> list[str]:
    """Return the requirements of ``pyproject.toml`` that the running Python does not satisfy."""
    from packaging.requirements import Requirement  # not in the standard library, but in every environment with Jupyter

    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
    reasons = []
    for requirement in map(Requirement, lines):
        try:
            version = importlib.metadata.version(requirement.name)  # None if the metadata are damaged
        except importlib.metadata.PackageNotFoundError:
            version = None
        needed = requirement.marker is None or requirement.marker.evaluate()
        if needed and not (version and requirement.specifier.contains(version, prereleases=True)):
            reasons.append(f"{requirement}: {version or 'not'} installed")
    return reasons


def failure(*command: str | Path) -> str:
    """Run a command. Return the last line of its error message, or nothing if it succeeds."""
    try:
        done = subprocess.run(command, stdin=DEVNULL, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{command[0]} does not start ({error.strerror})"
    return (done.stderr.splitlines() or [f"exit status {done.returncode}"])[-1] if done.returncode else ""


def shortcoming(python: Path, extras: list[str]) -> str:
    """Return why the environment of a Python does not satisfy ``pyproject.toml``, or nothing if it does."""
    return failure(python, __file__, "--check", *(f"--extra={extra}" for extra in extras))


def chosen_environments() -> dict[str, Path]:
    """Return the Pythons that the user has chosen, by the variables that name them."""
    if os.environ.get("FAQD_PYTHON"):
        return {"FAQD_PYTHON": Path(sys.executable)}  # environment.sh starts this script with it
    active = {name: os.environ.get(name) for name in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    return {name: Path(prefix, "bin/python") for name, prefix in active.items() if prefix}


def read_stamp() -> dict | None:
    """Return what the stamp says, or None without a stamp. A damaged stamp means an incomplete installation."""
    try:
        return json.loads(STAMP.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return INCOMPLETE


def current_stamp() -> dict[str, str]:
    """Return what the stamp of an up-to-date ``.venv`` says. pip writes the folder's path into ``.venv``."""
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (PYPROJECT, VERSIONS)}
    return {"folder": str(ROOT), **files}


def other_version_chosen() -> bool:
    """Return whether FAQD_PYTHON names another version of Python than that in ``.venv``."""
    return bool(os.environ.get("FAQD_PYTHON")) and not (VENV / f"lib/python3.{sys.version_info.minor}").is_dir()


def usable() -> bool:
    """Return whether ``.venv`` can be used as it is."""
    stamp = read_stamp()
    current = stamp is None or (stamp == current_stamp() and not other_version_chosen())
    return current and not shortcoming(PYTHON, EXTRAS)


def hold_lock() -> None:
    """Lock the set-up until this process and the commands that it runs have ended."""
    file = os.open(LOCK, os.O_RDWR | os.O_CREAT)
    os.set_inheritable(file, True)  # a pip whose parent was killed keeps the lock
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"waiting for another set-up of this project, which has locked {LOCK}")
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:  # some network file systems have no locks
        say(f"{LOCK} cannot be locked ({error.strerror}): do not start two set-ups at the same time")


def last_lines(count: int) -> str:
    """Return the last lines that the command has printed."""
    return "\n".join(OUTPUT.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])


def run(*command: str | Path) -> int:
    """Run a command with signs of life, and return its exit status. Show the end of its output if it fails."""
    start = time.monotonic()
    with open(OUTPUT, "wb") as output:
        process = subprocess.Popen(command, stdin=DEVNULL, stdout=output, stderr=STDOUT, close_fds=False)
    while True:
        try:
            status = process.wait(HEARTBEAT)
            break
        except subprocess.TimeoutExpired:
            say(f"  {time.monotonic() - start:.0f} s: {last_lines(1).strip()[:80]}")
    if status:
        print(last_lines(20), file=sys.stderr)
    return status


def make_venv() -> None:
    """Empty ``.venv`` and make it again. The stamp stays, so a kill leaves an incomplete installation."""
    python = sys._base_executable  # sys.executable may lie in the .venv that is emptied here
    say(f"making {VENV} with Python {platform.python_version()} ({python})")
    for child in VENV.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        elif child != STAMP:
            child.unlink()
    if run(python, "-I", "-m", "venv", VENV):
        sys.exit(f"set-up: {python} cannot make {VENV}. On Debian and Ubuntu, install the package python3-venv.")


def install() -> None:
    """Bring ``.venv`` to what ``pyproject.toml`` and ``requirements.lock`` say."""
    before = read_stamp()
    if before is None and VENV.exists() and any(VENV.iterdir()):
        sys.exit(
            f"set-up: {VENV} was not made by this set-up and cannot be used: {shortcoming(PYTHON, ['test'])}.\n"
            f"Remove it, or complete it: {PYTHON} -m pip install -c {VERSIONS} -e '{ROOT}[{','.join(EXTRAS)}]'"
        )
    VENV.mkdir(exist_ok=True)
    STAMP.write_text(json.dumps(INCOMPLETE))
    if not before or other_version_chosen() or failure(PYTHON, "-I", "-m", "pip", "--version"):
        before = INCOMPLETE
        make_venv()
    say(f"installing the packages of {VERSIONS.name}: some minutes, much longer with CUDA libraries")
    options = ("--no-input", "--no-user", "--disable-pip-version-check", "--progress-bar=off")
    if not sys.dont_write_bytecode:  # Python then keeps the bytecode of what is imported; most of Jupyter never is
        options += ("--no-compile",)
    status = run(PYTHON, "-I", "-m", "pip", "install", *options, "-c", VERSIONS, "-e", f"{ROOT}[{','.join(EXTRAS)}]")
    if status > 0:  # pip ended by itself, and left no package half-installed
        STAMP.write_text(json.dumps(before))
    if status:
        sys.exit(
            f"set-up: pip failed (exit status {status}); all of its output is in {OUTPUT}.\n"
            "No network: connect, or set HTTPS_PROXY or the index of pip (pip config). Full disk: make room, or set "
            "TMPDIR.\nVersions in conflict: make requirements.lock again, as its first lines say. Then start again."
        )
    if reason := shortcoming(PYTHON, EXTRAS):
        sys.exit(f"set-up: {VERSIONS} does not fit pyproject.toml ({reason}): make it again, as its first lines say")
    STAMP.write_text(json.dumps(current_stamp()))


def find_environment(extras: list[str]) -> Path:
    """Return the Python to use, after an installation if one is needed."""
    for name, python in chosen_environments().items():
        if python.parent.parent.resolve() == VENV:
            continue
        reason = shortcoming(python, extras)
        if not reason:
            say(f"using {python} ({name})")
            return python
        say(f"not using {python} ({name}): {reason}")
    if not usable():
        hold_lock()
        if not usable():  # another set-up may have done it meanwhile
            install()
    say(f"using {PYTHON}")
    return PYTHON


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Find or make the Python environment of this project.")
    parser.add_argument("--extra", action="append", default=[], choices=EXTRAS, help="with the test tools, too")
    parser.add_argument("--check", action="store_true", help="only tell what the running Python lacks")
    arguments = parser.parse_args()
    if arguments.check:
        reasons = unmet(arguments.extra)
        sys.exit(f"{reasons[0]} (unmet in all: {len(reasons)})" if reasons else 0)
    try:
        print(find_environment(["notebooks", *arguments.extra]))
    except OSError as error:
        sys.exit(f"set-up: {error}. Make {ROOT} writable, or activate an environment that satisfies pyproject.toml.")
    except KeyboardInterrupt:
        sys.exit("set-up: interrupted; the next call completes what is incomplete")
