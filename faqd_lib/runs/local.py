"""Training in this process: cohort by cohort, under locks, continuing from checkpoints."""

import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import filelock
from torch import nn

from ..config import RunConfig
from ..models import parameter_count, tap_names
from ..quantization.description import weight_bytes
from ..training.learner import Learner
from ..training.loop import OutOfTimeError, train
from ..utils.measure import environment
from ..utils.progress import ProgressReporter
from . import planning
from .checkpoints import (
    CheckpointInfo,
    CheckpointWarning,
    due_every,
    read_checkpoint,
    remove_unfinished_writes,
    write_checkpoint,
)
from .store import accuracies, score
from .workshop import Workshop

# Trains runs that do not need each other, until a time of ``time.monotonic`` if that is not None. Finished runs are in
# the workshop's store afterwards.
Engine = Callable[[Workshop, Sequence[RunConfig], ProgressReporter, float | None], None]
Machine = dict[str, str | int]  # hardware and software, as :func:`~faqd_lib.utils.measure.environment` describes them

# Parts of a machine that must be the same for the same bits.
SAME_BITS = ("torch", "processor", "threads", "device", "commit", "activation_kernels")

_BETWEEN_REPORTS = 5.0  # seconds, of progress within an epoch


def train_here(
    workshop: Workshop, wave: Sequence[RunConfig], progress: ProgressReporter, deadline: float | None = None
) -> None:
    """Train runs that do not need each other, and wait for those that another process trains.

    Raises:
        OutOfTimeError: ``deadline`` (a time of ``time.monotonic``) has passed. Checkpoints are written. Waiting for
            another process ends as well.
        NonFiniteLossError: a loss stopped being finite. All other runs of its cohort are finished and saved.
    """
    store = workshop.store
    left = planning.cohorts(wave, workshop.state.profile.cohort)
    while left:
        elsewhere = []
        for cohort in left:
            with store.lock_available(cohort) as locked:
                missing = [config for config in locked if store.record(config) is None]
                progress.skip(sum(units(config) for config in locked if config not in missing))
                if missing:
                    _train_cohort(workshop, missing, progress.number(len(missing)), progress, deadline)
            if others := [config for config in cohort if config not in locked]:
                elsewhere.append(others)
        if elsewhere:
            progress.say(f"another process trains {elsewhere[0][0].run_id}: waiting for it")
            # filelock takes -1 for no limit.
            seconds = -1 if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                with store.lock(elsewhere[0][0]).acquire(timeout=seconds):
                    pass
            except filelock.Timeout as error:
                raise OutOfTimeError("time was up while another process trained; call again to go on") from error
        left = elsewhere


def units(config: RunConfig) -> int:
    """Progress units of a run: one per epoch, at least one."""
    return max(1, config.optimization.epochs)


def _train_cohort(
    workshop: Workshop, cohort: Sequence[RunConfig], label: str, progress: ProgressReporter, deadline: float | None
) -> None:
    """Train runs side by side, from their checkpoints if there are any, and save them."""
    profile, splits, store = workshop.state.profile, workshop.splits, workshop.store
    batches, teacher = workshop.batches(cohort), workshop.shared_teacher(cohort)
    learners = [workshop.learner(config, batches) for config in cohort]
    machine = environment(workshop.device)
    for learner in learners:
        remove_unfinished_writes(store.run_folder(learner.config))
        resume(store.run_folder(learner.config), learner, machine, progress.say)
        progress.skip(_epochs([learner]))  # those of its checkpoint
    if cohort[0].optimization.compiled:
        progress.say(f"{label}: compiling {'teacher and ' if teacher is not None else ''}{len(learners)} network(s)")
    report = _CohortReport(progress, label, learners)
    # A run on fewer images has shorter epochs, but is evaluated after about as many updates.
    steps = len(splits.training) // cohort[0].optimization.batch_size
    result = train(
        learners,
        batches,
        teacher,
        feature_names=() if teacher is None else tap_names(teacher, cohort[0].objective.taps),
        splits={name: images for name in ("validation", "test") if (images := getattr(splits, name)) is not None},
        on_epoch=report.epoch,
        on_batch=report.batch,
        checkpoint_due=due_every(profile.checkpoint_seconds),
        checkpoint=lambda learner: save_checkpoint(store.run_folder(learner.config), learner, machine),
        cuda_graphs=profile.cuda_graphs,
        evaluate_every=profile.evaluate_every * max(1, round(steps / len(batches))),
        time_is_up=lambda: deadline is not None and time.monotonic() >= deadline,
    )
    for trained in result.trained:
        _save(workshop, trained, teacher, machine)
    if result.failed:
        error = next(iter(result.failed.values()))
        if result.trained:
            error.add_note(f"{len(result.trained)} other runs of its cohort were finished and saved")
        raise error


def _save(workshop: Workshop, trained: Learner, teacher: nn.Module | None, machine: Machine) -> None:
    test, taught = workshop.splits.test, trained.config.teacher is not None
    workshop.store.save(
        trained.config,
        trained.model,
        history=trained.history,
        **accuracies(trained.history),
        test_affinity=workshop.test_affinity(trained.model, teacher) if taught else None,
        test_images=len(test),
        parameters=parameter_count(trained.model),
        weight_bytes=weight_bytes(trained.model),
        cost=trained.cost,
        environment=machine | trained.kernels,
        dataset_note=workshop.state.note,
        **trained.tested.kept(test.labels),
    )


class _CohortReport:
    """Reports a cohort to the progress display. Epochs that came from checkpoints do not count as progress."""

    def __init__(self, progress: ProgressReporter, label: str, learners: Sequence[Learner]) -> None:
        self._progress, self._label, self._learners = progress, label, learners
        self._epochs = learners[0].config.optimization.epochs
        self._reported = _epochs(learners)
        self._due = due_every(_BETWEEN_REPORTS)

    def batch(self, epoch: int, done: int) -> None:
        """Report progress within an epoch, every few seconds."""
        if self._due():
            where = f"epoch {epoch + 1} of {self._epochs}, batch {done} of {self._learners[0].steps_per_epoch}"
            self._progress.within(self._label, _epochs(self._learners) - self._reported, f"{self._label}, {where}")

    def epoch(self, epoch: int, finished: list[Learner]) -> None:
        """Report a finished epoch with its test accuracies."""
        self._progress.within(self._label, 0.0)
        names = ", ".join(sorted({f"{learner.config.bits} {learner.config.method}" for learner in finished}))
        rows = [learner.history[-1] for learner in finished]
        accuracy = " ".join(f"{found:.1f}" for row in rows if (found := score(row)) is not None)
        what = f"epoch {epoch + 1} of {self._epochs}" if self._epochs else "quantized after training"
        test = f": test {accuracy} %" if accuracy else ""
        worked = _epochs(self._learners) - self._reported if self._epochs else len(finished)
        self._reported = _epochs(self._learners)
        self._progress.advance(worked, f"{self._label} ({names}), {what}{test}")


def _epochs(learners: Sequence[Learner]) -> float:
    """Finished epochs of all learners together, with fractions of those that have begun."""
    return sum(learner.steps / learner.steps_per_epoch for learner in learners)


def save_checkpoint(folder: Path, learner: Learner, machine: Machine) -> None:
    """Write the state from which a run continues with the same bits to the run's folder."""
    tensors, facts = learner.state()
    facts |= {"digest": learner.config.digest, "environment": machine | learner.kernels}
    write_checkpoint(folder, tensors, CheckpointInfo(**facts))


def resume(folder: Path, learner: Learner, machine: Machine, say: Callable[[str], None]) -> None:
    """Continue from the checkpoint in the run's folder, if there is one. Warns if it is of another machine."""
    found = read_checkpoint(folder, learner.config.digest)
    if found is None:
        return
    tensors, info = found
    learner.load_state(tensors, info.model_dump())
    say(f"{learner.config.run_id} goes on from its checkpoint after step {learner.steps}")
    now, then = machine | learner.kernels, info.environment
    if changed := [key for key in SAME_BITS if now.get(key) != then.get(key)]:
        what = ", ".join(f"{key} {then.get(key)} then, {now.get(key)} now" for key in changed)
        warnings.warn(
            f"{learner.config.run_id} was begun in another environment ({what}): it may end with other last bits "
            "than a run without interruption",
            CheckpointWarning,
            stacklevel=2,
        )
