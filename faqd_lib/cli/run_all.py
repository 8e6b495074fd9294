"""Run the notebook series headless: ``python -m faqd_lib.cli.run_all [PROFILE] [options]`` (``./run_all.sh`` calls it).

Papermill executes the notebooks in order. Finished runs are found on disk, so a second call goes on where the first
one stopped. Executed copies go to ``results/<profile>-<dataset>/notebooks/``.
"""

import argparse
import contextlib
import datetime
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import filelock
import nbformat
import papermill
from jupyter_client.kernelspec import NoSuchKernel
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from ..config import ConfigurationError
from ..data.datasets import DatasetError
from ..reporting.grids import everything
from ..runs.profile import PROFILES, Profile, suite_folder
from ..runs.ray import EngineError, RayEngine
from ..runs.store import ResultsError, RunStore
from ..runs.suite import Suite
from ..training.compile import CompilationError
from ..training.loss_log import NonFiniteLossError
from ..utils.files import project_root, require_writable
from ..utils.progress import clock
from . import environment
from .kernels import ForkingKernelManager, SeriesKernelManager
from .notebook import dense_choice
from .study import report_study, run_study

# The notebook of tables and claims reads the runs of others: checked before `--only` runs it.
READER, READ = "09", ("04", "05", "06", "07", "08")
# Notebooks from this number on are the second part: `--all` or `--only` runs them.
SECOND_PART = 11
DENSE = "14"  # the notebook about a class for each pixel; its results go to another folder
LOCK_NAME = ".series.lock"
FEW = 4  # notebooks


class SeriesError(RuntimeError):
    """The series cannot start or has stopped; the message says why and what to do."""


# Errors whose message says what to do. OSError: a folder that cannot be written, a full disk.
STOPPED_BY = (
    SeriesError, ConfigurationError, DatasetError, EngineError, ResultsError, NonFiniteLossError, CompilationError,
    OSError,
)  # fmt: skip


def notebooks_folder() -> Path:
    """``notebooks/`` of the project; SeriesError if there is no such folder."""
    folder = project_root() / "notebooks"
    if not folder.is_dir():
        raise SeriesError(f"there are no notebooks in {folder}: run this from a checkout of the project")
    return folder


def select(only: Sequence[str], both_parts: bool = False) -> list[Path]:
    """The notebooks to run, in order: those of numbers (``0``, ``00,01``), or else the first part, or both parts.

    Raises SeriesError if there is no notebook of a number.
    """
    notebooks = {path.name[:2]: path for path in sorted(notebooks_folder().glob("[0-9][0-9]_*.ipynb"))}
    wanted = [number.zfill(2) for item in only for number in item.split(",") if number]
    if unknown := [number for number in wanted if number not in notebooks]:
        raise SeriesError(f"there is no notebook {unknown[0]!r}: choose from {' '.join(notebooks)}")
    if only and not wanted:
        raise SeriesError(f"--only {' '.join(only)} names no notebook: choose from {' '.join(notebooks)}")
    if only:
        return [path for number, path in notebooks.items() if number in wanted]
    return [path for number, path in notebooks.items() if both_parts or int(number) < SECOND_PART]


def check_needs(selected: Sequence[Path], suite: Suite) -> None:
    """Print how many of the runs that the notebook of tables reads are missing; SeriesError if all are."""
    chosen = {path.name[:2] for path in selected}
    missing = [number for number in READ if number not in chosen]
    if READER not in chosen or not missing:
        return
    runs = everything(suite)
    there = sum(suite.store.record(config) is not None for config in runs)
    wanted = f"--only {' '.join([*missing, READER])}"
    if len(missing) == len(READ) and not there:
        raise SeriesError(
            f"notebook {READER} reads the runs of {', '.join(READ)}, and there are none in {suite.folder}: run {wanted}"
        )
    if there < len(runs):
        print(
            f"notebook {READER}: {len(runs) - there} of {len(runs)} runs are missing, their cells will read 'not run'; "
            f"{wanted} trains them"
        )


def failing_cell(copy: Path) -> str:
    """The cell of an executed copy that failed: ``cell 5 (In [3])``."""
    for index, cell in enumerate(nbformat.read(copy, as_version=4).cells):
        if cell.cell_type == "code" and any(output.output_type == "error" for output in cell.outputs):
            return f"cell {index} (In [{cell.execution_count}])"
    return "an unknown cell"


def execute(notebook: Path, copy: Path, parameters: dict[str, object], manager: type[AsyncKernelManager]) -> float:
    """Execute one notebook, with its text on the terminal; returns the seconds it took. Every cell updates the copy.

    Raises:
        SeriesError: the notebook has no such parameter, a cell failed, or the kernel died.
    """
    known = papermill.inspect_notebook(str(notebook))
    if unknown := [name for name in parameters if name not in known]:  # papermill would ignore it
        raise SeriesError(f"{notebook.name} has no parameter {unknown[0]!r}; it has: {', '.join(known) or 'none'}")
    started = time.monotonic()
    try:
        papermill.execute_notebook(
            str(notebook),
            str(copy),
            parameters,
            kernel_name="python3",
            progress_bar=False,
            stdout_file=sys.stdout,
            stderr_file=sys.stderr,
            cwd=str(copy.parent),
            kernel_manager_class=manager,
            # Hides the kernel's messages on transport and shutdown. Its death is noticed without them.
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
            shutdown_kernel="immediate",  # a regular shutdown takes seconds
        )
    except PapermillExecutionError as error:
        raise SeriesError(
            f"{notebook.name}, {failing_cell(copy)}: {error.ename}: {error.evalue}\nexecuted copy: {copy}"
        ) from error
    except DeadKernelError as error:
        raise SeriesError(
            f"{notebook.name}: the kernel died, most likely out of memory. Finished runs are kept; call again "
            f"to go on.\nexecuted copy: {copy}"
        ) from error
    except NoSuchKernel as error:
        message = f"{notebook.name}: there is no kernel 'python3' in {sys.prefix}: install ipykernel"
        raise SeriesError(message) from error
    return time.monotonic() - started


def kernel_manager(notebooks: int) -> type[AsyncKernelManager]:
    """The manager for a series of this length. In a short one, imports before the fork cost more than they save."""
    if notebooks == 1:
        return AsyncKernelManager
    return ForkingKernelManager if notebooks <= FEW else SeriesKernelManager


@contextlib.contextmanager
def locked(folders: Iterable[Path]) -> Iterator[None]:
    """Hold the locks of results folders; SeriesError if another process works in one of them."""
    with contextlib.ExitStack() as stack:
        for folder in folders:
            lock = filelock.FileLock(require_writable(folder.parent) / f".{folder.name}{LOCK_NAME}")
            try:
                stack.enter_context(lock.acquire(timeout=0))
            except filelock.Timeout:
                raise SeriesError(
                    f"another run_all.sh is working in {folder}: wait for it, or give --results"
                ) from None
        yield


def move_old_results(folder: Path) -> None:
    """Rename an old results folder (``--fresh``); nothing is deleted."""
    if folder.exists():
        target = folder.with_name(f"{folder.name}.old-{datetime.datetime.now():%Y%m%d-%H%M%S}")
        print(f"moved the old results to {folder.rename(target)}")


def run_series(
    arguments: argparse.Namespace, profile: Profile, dataset: str, only: Sequence[str], fresh: set[Path]
) -> None:
    """Run the selected notebooks on one dataset: a name, ``"auto"``, or nothing for the profile's own choice.

    With ``--fresh``, the old results of folders that are not in ``fresh`` are moved aside, and the folders are added.
    Raises SeriesError if a notebook fails, or if another process works in the folder. Errors of
    :meth:`~faqd_lib.runs.suite.Suite.open` pass through.
    """
    name, reason = profile.resolve_dataset(dataset, arguments.data_root)
    print(f"\n=== profile {profile.name}, dataset {reason}")
    folder = suite_folder(profile, name, arguments.results)
    selected = select(only, arguments.all)
    if arguments.seeds is not None and arguments.seeds < 1:
        raise ConfigurationError(f"seeds must be a whole number of at least 1, got {arguments.seeds}")
    seeds = arguments.seeds or 0  # 0: the profile's own number
    folders = [folder]
    if any(notebook.name.startswith(DENSE) for notebook in selected):
        fitted, dense, _ = dense_choice(profile, dataset, arguments.data_root)
        profile = fitted if dense == name else profile
        folders = list(dict.fromkeys([folder, suite_folder(profile, dense, arguments.results)]))
    with locked(folders):
        for place in folders if arguments.fresh else ():
            if place not in fresh:
                move_old_results(place)
        fresh.update(folders)
        suite = Suite.open(profile, dataset, arguments.data_root, arguments.results, seeds)
        check_needs(selected, suite)
        parameters = {
            "profile": str(arguments.profile),
            "dataset": dataset,  # as asked for: the notebooks say which dataset was taken, and why
            "data_root": str(arguments.data_root or ""),
            "results_dir": str(folder.parent),
            "seeds": seeds,
        }
        copies = require_writable(folder / "notebooks")
        manager = kernel_manager(len(selected))
        seconds: dict[str, float] = {}
        for index, notebook in enumerate(selected, start=1):
            gone = clock(sum(seconds.values()))
            print(f"\n--- notebook {index} of {len(selected)}: {notebook.stem} ({gone} gone)")
            seconds[notebook.stem] = execute(notebook, copies / notebook.name, parameters, manager)
        summarise(folder, seconds)
    from ..reporting.report import write_report  # imported here because nbconvert takes a second

    print(f"     {'report:':<20} {write_report(suite)}")


def study(arguments: argparse.Namespace, profile: Profile) -> None:
    """Run the study of a profile in place of notebooks; ConfigurationError names an option that studies lack."""
    for option, absent in {"only": [], "all": False, "seeds": None}.items():
        if getattr(arguments, option) != absent:
            raise ConfigurationError(f"--{option} is not for a study: its design says what is trained")
    if arguments.hours is not None and not 0 <= arguments.hours < float("inf"):
        raise ConfigurationError(f"--hours must be a number of at least 0, got {arguments.hours:g}")
    name, reason = profile.resolve_dataset(arguments.dataset, arguments.data_root)
    print(f"\n=== study {profile.name}, dataset {reason}")
    folder = suite_folder(profile, name, arguments.results)
    if arguments.fresh and folder.exists():
        require_unused(RunStore(folder), profile.study.seeds)
        move_old_results(folder)
    places = arguments.dataset, arguments.data_root, arguments.results
    suite = Suite.open(profile, *places, engine=environment.engine(), bar=False)
    try:
        if arguments.hours != 0:
            run_study(suite, arguments.hours)
    except NonFiniteLossError:
        report_study(suite)  # of all other runs
        raise
    report_study(suite)


def require_unused(store: RunStore, seeds: Iterable[int]) -> None:
    """Raise SeriesError if a process trains one of these seeds of a study."""
    for seed in seeds:
        try:
            store.group_lock(f"seed{seed}").acquire(timeout=0).lock.release()
        except filelock.Timeout:
            raise SeriesError(
                f"another process trains seed {seed} in {store.folder}: wait for it, or leave out --fresh"
            ) from None


def summarise(folder: Path, seconds: Mapping[str, float]) -> None:
    """Print the executed notebooks with their times, and the contents of the folder."""
    print(f"\n=== done: {folder}")
    print(f"{'notebook':<34} {'time':>7}")
    for name, taken in {**seconds, "all": sum(seconds.values())}.items():
        print(f"{name:<34} {clock(taken):>7}")
    for kind, pattern in {
        "run record": "runs/*/record.json",
        "table": "tables/*.md",
        "figure": "figures/*.png",
        "executed notebook": "notebooks/*.ipynb",
    }.items():
        if count := len(list(folder.glob(pattern))):
            kinds = f"{kind}{'s' if count > 1 else ''}:"
            print(f"{count:4} {kinds:<20} {folder / pattern.partition('/')[0]}")
    if (folder / "summary.md").is_file():
        print(f"     {'summary:':<20} {folder / 'summary.md'}")


def _absolute(path: str) -> Path:
    """The path from the root: kernels have another working directory than this process."""
    return Path(path).expanduser().resolve()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="run_all.sh",
        description="Run the notebook series headless and write every table. A second call goes on where the first "
        "one stopped.",
    )
    add, on_ray = parser.add_argument, "with --engine ray"
    add("profile", nargs="?", default="quick", help=f"{', '.join(PROFILES)} (default: quick), or a .toml file")
    add("--dataset", default="", help="a dataset's name; left out: the profile's own choice")
    add("--data-root", type=_absolute, help="the only folder to look for data in")
    add("--only", nargs="+", default=[], metavar="NN", help="numbers of the notebooks to run")
    add("--all", action="store_true", help=f"run the second part as well: the notebooks from {SECOND_PART} on")
    add("--seeds", type=int, help="number of seeds (left out: the profile's own)")
    add("--results", type=_absolute, help="where results go (default: results/)")
    add("--engine", choices=environment.ENGINES, help="where runs are trained (default: local, in this process)")
    add("--address", help=f"{on_ray}: a cluster that runs already; left out: this machine")
    add("--cpus-per-run", type=int, metavar="N", help=f"{on_ray}: threads of a worker (1)")
    add("--gpus-per-run", type=float, metavar="X", help=f"{on_ray}: the part of a GPU it has (0.25 if there is one)")
    add("--hours", type=float, metavar="H", help="for a study: hours to train; 0 only writes its tables")
    add("--fresh", action="store_true", help="begin again; the old results, and those of notebook 14, are moved aside")
    return parser


def choose_engine(arguments: argparse.Namespace) -> None:
    """Set the environment variables that tell the kernels where runs are trained; start Ray if no cluster is named.

    Raises EngineError if Ray is not installed or not reachable, or if an option needs ``--engine ray``.
    """
    options = {
        "FAQD_RAY_ADDRESS": arguments.address,
        "FAQD_RAY_CPUS": arguments.cpus_per_run,
        "FAQD_RAY_GPUS": arguments.gpus_per_run,
    }
    given = {name: str(value) for name, value in options.items() if value is not None}
    if arguments.engine:
        os.environ["FAQD_ENGINE"] = arguments.engine
    os.environ.update(given)
    engine = environment.engine()
    if not isinstance(engine, RayEngine):
        if given:
            raise EngineError("--address, --cpus-per-run and --gpus-per-run belong to --engine ray")
        return
    ray = engine.connect()  # this process keeps it running for all the kernels
    os.environ["FAQD_RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    cpus, gpus = (ray.cluster_resources().get(kind, 0) for kind in ("CPU", "GPU"))
    each = f"{engine.cpus} and {engine.gpus:g} for each run"
    print(f"Ray at {os.environ['FAQD_RAY_ADDRESS']}: {cpus:g} CPUs, {gpus:g} GPUs; {each}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit status is 0 only if every notebook ran to its end, or the study until its time was up."""
    arguments = parser().parse_args(argv)
    for variable in ("FAQD_DATA", "FAQD_CACHE", "FAQD_RESULTS"):
        if os.environ.get(variable):
            os.environ[variable] = str(_absolute(os.environ[variable]))
    if arguments.profile.endswith(".toml"):
        arguments.profile = str(_absolute(arguments.profile))
    arguments.results = arguments.results or environment.results()
    # Inherited by the kernels: text instead of bars, and the kernel of this Python environment.
    os.environ.update(FAQD_PROGRESS="text", JUPYTER_PREFER_ENV_PATH="1", PYDEVD_DISABLE_FILE_VALIDATION="1")
    try:
        choose_engine(arguments)
        profile = Profile.load(arguments.profile)
        if profile.study is not None:
            study(arguments, profile)
            return 0  # also if the study stopped because time was up
        if arguments.hours is not None:
            raise ConfigurationError(f"--hours is for a study, and the profile {profile.name} has none: leave it out")
        datasets = [arguments.dataset] if arguments.dataset else profile.series_datasets
        fresh: set[Path] = set()
        for dataset in datasets:
            run_series(arguments, profile, dataset, arguments.only, fresh)
        numbers = {path.name[:2] for path in select(arguments.only)}
        if len(datasets) > 1 and READER in numbers:
            for dataset in datasets:  # once more: now the tables can show all datasets
                run_series(arguments, profile, dataset, [READER], fresh)
    except STOPPED_BY as error:
        print(f"\nstopped: {error}", *getattr(error, "__notes__", ()), sep="\n  ", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; finished runs are kept, call again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
