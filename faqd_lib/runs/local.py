"""Runs trained in this process: cohort by cohort, under locks, from their checkpoints on."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from ..config import RunConfig
from ..data.batches import Batches, Normalizer
from ..data.datasets import ImageData, Images
from ..models import parameter_count
from ..quantization.description import weight_bytes
from ..training.learner import Learner
from ..training.loop import train
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
from .profile import Profile, SuiteState
from .store import RunStore, accuracies

# What of the environment must be the same for the same bits.
SAME_BITS = ("torch", "processor", "threads", "device", "commit", "activation_kernels")

_BETWEEN_REPORTS = 5.0  # seconds, of progress within an epoch


class Workplace(Protocol):
    """What training needs of a :class:`~faqd_lib.runs.suite.Suite`."""

    state: SuiteState
    store: RunStore
    device: torch.device
    profile: Profile
    folder: Path
    data: ImageData
    splits: tuple[Images, Images | None, Images]
    normalizer: Normalizer

    def model(self, config: RunConfig) -> nn.Module: ...

    def learner(self, config: RunConfig, batches: Batches) -> Learner: ...


def train_here(suite: Workplace, wave: Sequence[RunConfig], progress: ProgressReporter) -> None:
    """Train runs none of which needs another one, wait for those that another process is at."""
    left = planning.cohorts(wave, suite.profile.cohort)
    while left:
        elsewhere = []
        for cohort in left:
            with suite.store.claim(cohort) as ours:
                todo = [config for config in ours if suite.store.record(config) is None]
                progress.skip(sum(units(config) for config in ours if config not in todo))
                if todo:
                    _train_cohort(suite, todo, progress.number(len(todo)), progress)
            if others := [config for config in cohort if config not in ours]:
                elsewhere.append(others)
        if elsewhere:
            progress.say(f"another process trains {elsewhere[0][0].run_id}: waiting for it")
            with suite.store.lock(elsewhere[0][0]):
                pass
        left = elsewhere


def units(config: RunConfig) -> int:
    """Of progress: an epoch of one network."""
    return max(1, config.optimization.epochs)


def _train_cohort(suite: Workplace, cohort: Sequence[RunConfig], label: str, progress: ProgressReporter) -> None:
    config = cohort[0]
    training, validation, test = suite.splits
    # Label-free students are trained from images that have no labels: there is nothing to look at.
    images = training.unlabelled() if config.label_free else training
    batches = Batches(
        images, config.optimization.batch_size, config.seed, suite.normalizer, flip=suite.data.flip,
        device=suite.device,
    )  # fmt: skip
    teacher_config = next((c.teacher for c in cohort if c.teacher is not None), None)
    teacher = None if teacher_config is None else suite.model(teacher_config).requires_grad_(False)
    splits = {"test": test} if validation is None else {"validation": validation, "test": test}
    learners = [suite.learner(c, batches) for c in cohort]
    here = environment(suite.device)
    for learner in learners:
        remove_unfinished_writes(suite.store.run_folder(learner.config))
        _resume(suite.store, learner, here, progress)

    shown, reported = due_every(_BETWEEN_REPORTS), _epochs(learners)  # what a checkpoint brought is no pace of ours

    def on_batch(epoch: int, done: int) -> None:
        if shown():
            what = f"epoch {epoch + 1} of {config.optimization.epochs}, batch {done} of {len(batches)}"
            progress.within(label, _epochs(learners) - reported, f"{label}, {what}")

    def on_epoch(epoch: int, active: list[Learner]) -> None:
        nonlocal reported
        progress.within(label, 0.0)
        names = ", ".join(sorted({f"{learner.config.bits} {learner.config.method}" for learner in active}))
        accuracy = " ".join(f"{learner.history[-1]['test_accuracy']:.1f}" for learner in active)
        epochs = config.optimization.epochs
        what = f"epoch {epoch + 1} of {epochs}" if epochs else "quantized after training"
        worked, reported = _epochs(learners) - reported, _epochs(learners)
        progress.advance(worked if epochs else len(active), f"{label} ({names}), {what}: test {accuracy} %")

    if config.optimization.compiled:
        progress.say(f"{label}: compiling {'teacher and ' if teacher is not None else ''}{len(learners)} network(s)")
    result = train(
        learners, batches, teacher, () if teacher is None else teacher.feature_names, splits, on_epoch,
        due_every(suite.profile.checkpoint_seconds), lambda learner: save_checkpoint(suite.store, learner, here),
        on_batch, suite.profile.cuda_graphs,
    )  # fmt: skip
    for trained in result.trained:
        suite.store.save(
            trained.config,
            trained.model,
            history=trained.history,
            **accuracies(trained.history),
            test_images=len(test),
            parameters=parameter_count(trained.model),
            weight_bytes=weight_bytes(trained.model),
            cost=trained.cost,
            environment=here | trained.kernels,
            dataset_note=suite.state.note,
            predictions=trained.predictions,
            labels=test.labels,
        )
    if result.failed:
        error = next(iter(result.failed.values()))
        if result.trained:
            error.add_note(f"{len(result.trained)} other runs of its cohort were finished and saved")
        raise error


def _epochs(learners: Sequence[Learner]) -> float:
    """How many epochs all of them together have behind them, the begun ones in part."""
    return sum(learner.steps / learner.steps_per_epoch for learner in learners)


def save_checkpoint(store: RunStore, learner: Learner, here: dict[str, str | int]) -> None:
    """Write what a run needs to go on from where it is."""
    tensors, facts = learner.state()
    facts |= {"digest": learner.config.digest, "environment": here | learner.kernels}
    write_checkpoint(store.run_folder(learner.config), tensors, CheckpointInfo(**facts))


def _resume(store: RunStore, learner: Learner, here: dict[str, str | int], progress: ProgressReporter) -> None:
    """Go on from the run's checkpoint, if it has one."""
    found = read_checkpoint(store.run_folder(learner.config), learner.config.digest)
    if found is None:
        return
    tensors, facts = found
    learner.load_state(tensors, facts.model_dump())
    progress.skip(_epochs([learner]))
    progress.say(f"{learner.config.run_id} goes on from its checkpoint after step {learner.steps}")
    here = here | learner.kernels
    if changed := [key for key in SAME_BITS if here.get(key) != facts.environment.get(key)]:
        what = ", ".join(f"{key} {facts.environment.get(key)} then, {here.get(key)} now" for key in changed)
        warnings.warn(
            f"{learner.config.run_id} was begun in another environment ({what}): it may end with other last bits "
            "than a run without interruption",
            CheckpointWarning,
            stacklevel=2,
        )
