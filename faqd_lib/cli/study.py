"""Runs a study: trains what its design wants next, within a time, and says what is settled.

    ./run_all.sh claims --hours 2

Seeds are trained one after another, and each seed's cells in the order of the design. Several calls at once, also on
several machines with a common folder, take different seeds. A call goes on where an earlier one stopped.
"""

import time

import filelock

from ..config import RunConfig
from ..runs.suite import Suite
from ..training.loop import OutOfTimeError
from ..utils.progress import clock


def run_study(suite: Suite, hours: float | None = None) -> bool:
    """Train the runs of a suite's study, seed by seed; the time left goes to the runs of the next seed.

    Args:
        suite: of a profile with a study.
        hours: stop after so much time, with checkpoints; None to train all planned seeds.

    Returns:
        Whether every run that this call could take is finished.
    """
    deadline = None if hours is None else time.monotonic() + 3600 * hours
    study, started = suite.profile.study, time.monotonic()
    for seed in study.seeds:
        runs = seed_runs(suite, seed)
        if all(suite.store.record(run) for run in runs):
            continue
        lock = suite.store.group_lock(f"seed{seed}")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            print(f"seed {seed}: another process trains it", flush=True)
            continue
        with lock:
            for cells in study.cells:
                chosen = list(suite.study_runs(cells, seed).values())
                if not chosen:
                    continue
                try:
                    suite.run(chosen, f"seed {seed}, {cells}", deadline)
                except OutOfTimeError:
                    print(f"time is up after {clock(time.monotonic() - started)}: call again to go on", flush=True)
                    return False
            print(f"seed {seed} is complete after {clock(time.monotonic() - started)}", flush=True)
    return True


def seed_runs(suite: Suite, seed: int) -> list[RunConfig]:
    """All runs of one seed, in the order of the design."""
    return [run for cells in suite.profile.study.cells for run in suite.study_runs(cells, seed).values()]
