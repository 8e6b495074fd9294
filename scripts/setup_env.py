"""Find or make the Python environment of this project. Prints the path of its Python, and nothing else, on stdout.

    python scripts/setup_env.py [--extra test]

1. An active environment (``VIRTUAL_ENV``, ``CONDA_PREFIX``), or the Python that ``FAQD_PYTHON`` names, is used as it
   is if it satisfies the requirements of ``pyproject.toml``. It is never changed.
2. Otherwise ``.venv`` in the project, made and filled with pip if need be, with the versions of ``requirements.lock``.

``.venv/faqd-setup.json`` says what ``.venv`` holds. It reads "incomplete" while anything there is being changed, so an
installation that was killed is noticed by the next call and done again. Standard library only.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  (reached on the older Pythons that this line is for)
    sys.stderr.write(
        "set-up: this project needs Python 3.11 or newer; {} is Python {}.{}.{}. Install one from your system's "
        "packages, with pyenv or with conda, and start this with it.\n".format(sys.executable, *sys.version_info[:3])
    )
    sys.exit(1)

import argparse
import collections
import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import threading
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "faqd-setup.json"
LOCK = ROOT / ".venv.lock"
INPUTS = (ROOT / "pyproject.toml", ROOT / "requirements.lock")
OLDEST = (3, 11)
HEARTBEAT = 15  # seconds between signs of life during an installation
STEPS = ("Collecting", "Downloading", "Using cached", "Building", "Installing")  # lines of pip that say where it is
TAIL = 25  # lines of a failed command's output that are shown


class SetupError(Exception):
    """The environment cannot be made; the message says why and what to do."""


def say(text: str) -> None:
    """Progress, on stderr: stdout is for the answer."""
    print(f"set-up: {text}", file=sys.stderr, flush=True)


# ---- what an environment holds


def unmet_requirements(extras: list[str]) -> list[str]:
    """Requirements of ``pyproject.toml`` that the running interpreter does not satisfy, each with the reason."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return ["packaging (it compares the versions): not installed"]
    project = tomllib.loads(INPUTS[0].read_text(encoding="utf-8"))["project"]
    optional = project.get("optional-dependencies", {})
    unmet = []
    for line in [*project["dependencies"], *(line for extra in extras for line in optional[extra])]:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            installed = None
        if installed is None:  # also what a damaged installation without a version gives
            unmet.append(f"{requirement}: not installed")
        elif not requirement.specifier.contains(installed, prereleases=True):
            unmet.append(f"{requirement}: version {installed} is installed")
    return unmet


def python_in(prefix: Path) -> Path:
    """Where an environment has its interpreter; conda on Windows has it at the top."""
    places = [prefix / "Scripts" / "python.exe", prefix / "python.exe"] if os.name == "nt" else [prefix / "bin/python"]
    return next((place for place in places if place.is_file()), places[0])


def ask(python: Path, *arguments: str) -> str | None:
    """What ``python arguments`` prints, or None if it fails or there is no such program."""
    try:
        done = subprocess.run(
            [python, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def version_of(python: Path) -> tuple[int, ...] | None:
    """(major, minor, micro), or None if it does not run."""
    answer = ask(python, "-c", "import sys; print('%d.%d.%d' % sys.version_info[:3])")
    return None if answer is None else tuple(map(int, answer.split(".")))


def dotted(version: tuple[int, ...]) -> str:
    """``3.12.1``"""
    return ".".join(map(str, version))


def shortcomings(python: Path, extras: list[str]) -> list[str]:
    """Why the environment of ``python`` cannot be used as it is; empty if it can."""
    version = version_of(python)
    if version is None:
        return [f"{python} is missing or does not run"]
    if version[:2] < OLDEST:
        return [f"its Python is {dotted(version)}, {dotted(OLDEST)} or newer is needed"]
    answer = ask(python, __file__, "--unmet", *(f"--extra={extra}" for extra in extras))
    return ["its packages cannot be listed"] if answer is None else json.loads(answer)


# ---- an environment that is there already


def candidates() -> list[tuple[str, Path]]:
    """(description, interpreter) of the environments that the user has chosen, less the project's own."""
    found = []
    for name, kind in (("VIRTUAL_ENV", "active virtual environment"), ("CONDA_PREFIX", "active conda environment")):
        prefix = os.environ.get(name)
        if prefix and Path(prefix).resolve() != VENV.resolve():
            found.append((f"{kind} {prefix}", python_in(Path(prefix))))
    if os.environ.get("FAQD_PYTHON"):
        found.append((f"Python that FAQD_PYTHON names, {sys.executable}", Path(sys.executable)))
    return found


def chosen_environment(extras: list[str]) -> Path | None:
    """The interpreter of the first environment chosen by the user that satisfies everything."""
    for description, python in candidates():
        reasons = shortcomings(python, extras)
        if not reasons:
            say(f"using the {description}, which satisfies pyproject.toml, as it is")
            return python
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        say(f"not using the {description}: {reasons[0]}{more}")
    return None


# ---- the project's own environment


def read_stamp() -> dict | None:
    """What the stamp says; an unreadable one counts as that of an incomplete environment."""
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
        return {"complete": stamp["complete"], "ours": stamp["ours"], "extras": stamp["extras"], "of": stamp["of"]}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return {"complete": False, "ours": True, "extras": [], "of": ""}


def write_stamp(*, complete: bool, ours: bool, extras: list[str], of: str) -> None:
    """Write the stamp atomically."""
    part = STAMP.with_suffix(".part")
    part.write_text(json.dumps({"complete": complete, "ours": ours, "extras": extras, "of": of}), encoding="utf-8")
    os.replace(part, STAMP)


def inputs_digest(version: tuple[int, ...]) -> str:
    """Digest of all that an installation follows from; the folder too, since the project is installed by its path."""
    digest = hashlib.sha256(f"{dotted(version)}|{ROOT}|".encode())
    for path in INPUTS:
        digest.update(path.read_bytes() + b"|")
    return digest.hexdigest()


def ready(extras: list[str]) -> bool:
    """Whether ``.venv`` is complete, up to date and still holds what was installed there."""
    stamp = read_stamp()
    if stamp is None or not stamp["complete"] or not set(extras) <= set(stamp["extras"]):
        return False
    version = version_of(python_in(VENV))
    return version is not None and stamp["of"] == inputs_digest(version) and not shortcomings(python_in(VENV), extras)


@contextlib.contextmanager
def exclusive():
    """Hold the set-up lock; wait, and say so, while another process has it. Yields the lock's file descriptor."""
    with open(LOCK, "a+b") as file:
        waiting = False
        while not _try_lock(file):
            if not waiting:
                say(f"another set-up of this project is under way ({LOCK.name} is locked): waiting for it to end")
            waiting = True
            time.sleep(0.5)
        yield file.fileno()  # closing the file releases the lock


def _try_lock(file) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:  # some network file systems have no locks
        say(f"{LOCK} cannot be locked ({error.strerror}): do not start two set-ups at the same time")
    return True


def run(command: list, lock: int, what: str, advice: str) -> None:
    """Run a command quietly, with a line every few seconds; its output is shown only if it fails.

    The command inherits the lock: if this process is killed and the command lives on, the next set-up waits for it.

    Raises:
        SetupError: with the end of its output and ``advice``.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET")}
    process = subprocess.Popen(
        command, cwd=ROOT, env={**environment, "PIP_USER": "0", "PYTHONUNBUFFERED": "1"}, text=True, errors="replace",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        pass_fds=() if os.name == "nt" else (lock,),
    )  # fmt: skip
    lines = collections.deque(maxlen=TAIL)
    reader = threading.Thread(target=lines.extend, args=(process.stdout,), daemon=True)
    reader.start()
    start = time.monotonic()
    while True:
        try:
            status = process.wait(HEARTBEAT)
            break
        except subprocess.TimeoutExpired:
            now = [line.strip()[:80] for line in list(lines) if line.lstrip().startswith(STEPS)]
            say(f"  {time.monotonic() - start:.0f} s{': ' + now[-1] if now else ''}")
    reader.join(10)
    if status:
        tail = "".join(f"  | {line.rstrip()}\n" for line in lines)
        if any("No space left" in line for line in lines):
            advice = f"The disk of {ROOT} or the temporary folder is full: make room, or set TMPDIR; then start again."
        elif any("ResolutionImpossible" in line for line in lines):
            advice = "requirements.lock does not fit pyproject.toml: its first lines say how to make it again."
        raise SetupError(f"{what} failed (exit status {status}); the end of its output:\n{tail}{advice}")


def empty_venv() -> None:
    """Remove what is in ``.venv``; the stamp stays, so that a kill here leaves an incomplete environment."""
    for child in VENV.iterdir():
        if child == STAMP:
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def create_venv(lock: int) -> None:
    """A new ``.venv``, marked incomplete before anything is in it."""
    VENV.mkdir(exist_ok=True)
    write_stamp(complete=False, ours=True, extras=[], of="")
    empty_venv()
    # Not sys.executable: that may lie in the very environment that is made again.
    python = getattr(sys, "_base_executable", None) or sys.executable
    say(f"making {VENV} with Python {dotted(sys.version_info[:3])} ({python})")
    run(
        [python, "-m", "venv", VENV], lock, "making .venv",
        "If ensurepip or venv is missing, install your system's package for it (python3-venv on Debian and Ubuntu).",
    )  # fmt: skip


def prepare_venv(lock: int) -> bool:
    """Make sure that ``.venv`` has a Python and pip that work. Returns whether packages must be installed over."""
    stamp = read_stamp()
    version = version_of(python_in(VENV))
    ours = stamp is None or stamp["ours"]
    if stamp is not None and not stamp["complete"]:
        say(".venv was left incomplete by a set-up that did not end: repairing it")
        if ours:
            create_venv(lock)
            return False
    elif version is None or (stamp is not None and version[:2] < OLDEST):
        if VENV.is_dir() and any(VENV.iterdir()):
            say(".venv has no Python that works: making it again")
        create_venv(lock)
        return False
    if version is None or version[:2] < OLDEST:
        raise SetupError(
            f"{VENV} was not made by this set-up, and its Python is "
            f"{'broken' if version is None else dotted(version)} ({dotted(OLDEST)} or newer is needed): remove that "
            "folder and start again"
        )
    if ask(python_in(VENV), "-m", "pip", "--version") is None:  # environments made by other tools may lack it
        run([python_in(VENV), "-m", "ensurepip"], lock, "installing pip in .venv", f"Remove {VENV} and start again.")
    return stamp is not None and not stamp["complete"]


def own_environment(extras: list[str]) -> Path:
    """The interpreter of ``.venv``, after whatever is needed to have it complete."""
    python = python_in(VENV)
    if not ready(extras):
        with exclusive() as lock:
            if not ready(extras):  # another set-up may have done it meanwhile
                install(python, extras, lock)
    say(f"using {VENV}")
    return python


def install(python: Path, extras: list[str], lock: int) -> None:
    """Bring ``.venv`` to what ``pyproject.toml`` and ``requirements.lock`` say."""
    before = read_stamp()
    extras = sorted({*extras, *(before["extras"] if before else [])})  # run_all.sh does not take the test tools away
    made_elsewhere = before is None and version_of(python_in(VENV)) is not None
    over = prepare_venv(lock)
    ours = not made_elsewhere and (before is None or before["ours"])
    write_stamp(complete=False, ours=ours, extras=extras, of="")
    start = time.monotonic()
    say("installing the packages of requirements.lock: some minutes, much longer with CUDA libraries")
    run(
        [
            python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--progress-bar", "off",
            "--no-compile",  # most of what Jupyter brings is never imported; the rest is compiled when it is
            *(["--force-reinstall"] if over else []),
            "-c", INPUTS[1].name, "-e", f".[{','.join(extras)}]" if extras else ".",
        ],
        lock, "pip install",
        "If it could not reach the package index: check the network, set HTTPS_PROXY if you are behind a proxy, or "
        "configure pip (`pip config`) with the index that your site uses. Then start the same command again.",
    )  # fmt: skip
    version = version_of(python)
    missing = shortcomings(python, extras)
    if version is None or missing:
        raise SetupError(
            f"pip ended well, but {VENV} does not satisfy pyproject.toml: {'; '.join(missing)}. requirements.lock may "
            "not fit pyproject.toml any more: its first lines say how to make it again"
        )
    write_stamp(complete=True, ours=ours, extras=extras, of=inputs_digest(version))
    say(f"installed in {time.monotonic() - start:.0f} s")


def main() -> int:
    """See the head of this file. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Find or make the Python environment of this project.")
    parser.add_argument("--extra", action="append", default=[], choices=["test"], help="with the test tools, too")
    parser.add_argument("--unmet", action="store_true", help=argparse.SUPPRESS)  # asked of other interpreters
    arguments = parser.parse_args()
    extras = sorted(set(arguments.extra))
    if arguments.unmet:
        print(json.dumps(unmet_requirements(extras)))
        return 0
    try:
        print(chosen_environment(extras) or own_environment(extras))
    except SetupError as error:
        say(str(error))
        return 1
    except OSError as error:
        say(f"{error}. Make {ROOT} writable, or activate an environment that satisfies pyproject.toml")
        return 1
    except KeyboardInterrupt:
        say("interrupted; the same command started again begins where it is safe to")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
