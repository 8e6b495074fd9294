"""Compress a network with unlabelled pictures: quantize copies of it, distil them side by side, write small files.

    <out>/faqd-compression.json       what was asked for; marks the folder as one of this module
          plan.json                   updates, search, learning rates
          runs/<run>/checkpoint.*     states of the students
          student-<bits>.safetensors  packed files
          student-<bits>.onnx
          card.md, index.html         what the files are worth
          card.json                   the same numbers

The same call, made again after a kill, goes on and writes the same files, bit for bit. Made again after the end, the
call writes its outputs anew.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import filelock
import torch
from pydantic import ValidationError
from torch import nn

from ..config import Precision, QuantizationConfig
from ..data.images import DatasetError, Images
from ..data.pictures import PictureBatches, Pictures, open_pictures, split_pictures
from ..data.preprocessing import Preprocessing
from ..runs.checkpoints import due_every, remove_unfinished_writes
from ..runs.local import resume, save_checkpoint
from ..training.cuda_graphs import own_stream
from ..training.learner import Learner
from ..training.loop import Cohort, evaluate, train
from ..utils.files import atomic_write_text, require_writable
from ..utils.measure import environment, exact_kernels
from ..utils.messages import kind_of
from ..utils.progress import Progress, clock
from . import card, planning
from .planning import Candidate, Chosen, Plan, Trial
from .task import WATCHED, CompressionError, Task, thinned

MARKER, PLAN = "faqd-compression.json", "plan.json"
FORMAT = "faqd-compression-2"
HELD_OUT = 0.1  # share of the pictures
CHECKPOINT_SECONDS = 120.0
TIMED_STEPS = (2, 3)  # steps that warm up, steps that are timed; more where batches are prepared ahead


@dataclass(frozen=True)
class Compressed:
    """What :func:`compress` returns."""

    folder: Path
    students: dict[str, nn.Module]  # by bit widths, such as "1W4A"; quantized, in evaluation mode, on the CPU
    card: card.Card
    failed: dict[str, str]  # by bits: why there is no such student


def compress(
    teacher: nn.Module,
    images: str | os.PathLike | torch.Tensor | Pictures,
    *,
    out: str | os.PathLike,
    weight_bits: int = 1,
    activation_bits: int = 32,
    bits: Sequence[str] = (),
    student: nn.Module | None = None,
    taps: Sequence[str] | None = None,
    student_taps: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    quantization: Mapping[str, Any] | None = None,
    epochs: float | None = None,
    hours: float | None = None,
    learning_rate: float | None = None,
    affinity_weight: float | None = None,
    batch_size: int | None = None,
    flip: bool = True,
    held_out: float | None = None,
    max_unreadable: float = 0.05,
    cache: str | os.PathLike | None = None,
    classes: Sequence[str] = (),
    seed: int = 0,
    precision: Precision | None = None,
    device: torch.device | str | None = None,
    about: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> Compressed:
    """Train low-bit copies of a network on unlabelled pictures, and write small files with a model card.

    Squared error of logits and the exact feature-affinity loss teach the students. Students of different bit widths
    train side by side and share one pass of the teacher. Neither ``teacher`` nor ``student`` is changed.

    Args:
        teacher: any classifier of RGB pictures that returns logits (batch, classes). Wrappers of ``teacher`` and
            ``student``, such as DataParallel, are left out.
        images: a folder of pictures; uint8 (count, 3, size, size); or pictures that are open already.
        out: folder for all outputs; new, empty, or of an earlier call with the same arguments.
        weight_bits, activation_bits: 1 to 8, or 32 for float.
        bits: several pairs in place of the two arguments above, such as ``("1W32A", "4W4A")``.
        student: a network to train in place of a copy of the teacher.
        taps, student_taps: names of modules whose maps are compared; None for :func:`faqd_lib.models.stage_taps`.
        preprocessing: size, mean and deviation that the teacher expects. Needed for networks that do not name them.
        quantization: settings of :class:`faqd_lib.config.QuantizationConfig` beside the bits. Scales are per output
            channel unless it says otherwise.
        epochs: passes over the training pictures. None for 5, or for as many as ``hours`` allow.
        hours: time for timing, search and training; it begins after the pictures are decoded. With ``epochs``, the
            shorter of the two counts.
        learning_rate, affinity_weight: None to choose by a search. Its candidates together take a fifth of the number
            of updates of the training. It judges on training pictures that no candidate was trained on. In a training
            too short for a search, None stands for ``LEARNING_RATE`` and ``AFFINITY_WEIGHT`` of
            :mod:`faqd_lib.compression.planning`.
        batch_size: None for 128, or 32 from 64 pixels on. Smaller, down to 16, where an epoch would have fewer than 16
            batches.
        flip: whether pictures may be mirrored. Text, digits and signs may not.
        held_out: share or number of pictures that are measured on and never trained on; None for a tenth. Pictures
            that are open already are split already, and refuse it.
        max_unreadable: largest share of damaged files that are left out.
        cache: folder for decoded pictures; None for ``<out>/cache``.
        classes: names of the classes, for files and card.
        seed: of split, order, augmentation.
        precision: of training steps; None for bf16 where the hardware computes in it.
        device: None for a GPU if there is one.
        about: JSON values to add to the metadata of the files.
        say: shows a line of text.

    Raises:
        CompressionError: the folder holds other files, arguments contradict each other or an earlier call, a network
            cannot be copied (pruned, old weight norm) or has no maps to compare, or no student stayed finite.
        TeacherError: the teacher returns no finite logits; see :func:`faqd_lib.compression.teachers.check_teacher`.
        DatasetError: there are too few pictures, or too many damaged ones.
        ValueError: a setting is out of range, or the network has nothing to quantize, or a parameter with a name that
            packed files need.
        OSError: a folder cannot be written.
    """
    folder = _claim(Path(out))
    widths = _widths(bits or (f"{weight_bits}W{activation_bits}A",), quantization or {})
    _check_budget(epochs, hours, learning_rate, affinity_weight, held_out)
    with _locked(folder):
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if preprocessing is None:
            raise CompressionError(
                "say what pictures the teacher expects: preprocessing=Preprocessing(image_size, mean, std), or "
                "preprocessing_of(teacher, 'timm:…') of faqd_lib.data.preprocessing"
            )
        pictures = _pictures(images, preprocessing, cache or folder / "cache", held_out, seed, max_unreadable, say)
        ends = None if hours is None else time.perf_counter() + 3600 * hours
        task = Task.prepare(
            teacher, student, pictures, preprocessing, taps, student_taps, widths,
            batch_size=batch_size, flip=flip, seed=seed, precision=precision, device=place, classes=classes,
            affinity=affinity_weight != 0, say=say,
        )  # fmt: skip
        given = {
            "epochs": epochs, "hours": hours, "learning_rate": learning_rate, "affinity_weight": affinity_weight,
        }  # fmt: skip
        _mark(folder, task.settings | given)
        plan = _planned(folder, task, epochs, ends, learning_rate, affinity_weight, say)
        trained, diverged = _trained(folder, task, plan, say)
        failed = plan.failed | diverged
        if not trained:
            raise CompressionError(f"no student stayed finite: {next(iter(failed.values()))}")
        made = card.examine(task, plan, trained, failed, folder, dict(about or {}), say)
        card.write(made, folder)
        for width, reason in failed.items():
            say(f"there is no student of {width}: {reason}")
        say(f"written: {folder / 'card.md'}, {folder / 'index.html'}")
        return Compressed(folder, {one.config.bits: one.model.cpu() for one in trained}, made, failed)


def _claim(folder: Path) -> Path:
    """Make the output folder; refuse one that holds anything but an earlier call's outputs."""
    if folder.exists() and not folder.is_dir():
        raise CompressionError(f"{folder} is a file: name a folder for the outputs")
    if folder.is_dir() and not (folder / MARKER).is_file():
        others = sorted(path.name for path in folder.iterdir() if path.name not in (".lock", "cache"))
        if others:
            raise CompressionError(
                f"{folder} is not empty and was not made by faqd compress (it holds {', '.join(others[:3])}"
                f"{', …' if len(others) > 3 else ''}): name a new folder. Nothing was changed"
            )
    return require_writable(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        held = filelock.FileLock(folder / ".lock").acquire(timeout=0)
    except filelock.Timeout:
        raise CompressionError(
            f"another process compresses into {folder}: wait for it, or name another folder"
        ) from None
    with held:
        yield


def _widths(bits: Sequence[str], options: Mapping[str, Any]) -> dict[str, QuantizationConfig]:
    """The quantization of each pair of bits, by ``"1W4A"``."""
    found = {}
    for text in bits:
        weights, w, rest = str(text).upper().partition("W")
        activations, a, end = rest.partition("A")
        if not (w and a and weights.isdecimal() and activations.isdecimal() and not end):
            raise CompressionError(f"bits must look like 1W4A (weights of 1 bit, activations of 4), got {text!r}")
        values = {"per_channel": weights != "32", **options, "weight_bits": int(weights)}
        values["activation_bits"] = int(activations)
        made = QuantizationConfig.parse(values, f"bits {text}")
        if (made.weight_bits, made.activation_bits) == (32, 32):
            raise CompressionError("32W32A quantizes nothing: give fewer bits to weights or activations")
        found[f"{made.weight_bits}W{made.activation_bits}A"] = made
    return found


def _check_budget(
    epochs: float | None, hours: float | None, rate: float | None, weight: float | None, held_out: float | None
) -> None:
    values = {"epochs": epochs, "hours": hours, "learning_rate": rate, "held_out": held_out}
    for name, value in values.items():
        if value is not None and not 0 < value < float("inf"):
            raise CompressionError(f"{name} must be a number above 0, got {value!r}")
    if weight is not None and not 0 <= weight < float("inf"):
        raise CompressionError(f"affinity_weight must be a number of at least 0, got {weight!r}")


def _pictures(
    images: str | os.PathLike | torch.Tensor | Pictures,
    preprocessing: Preprocessing,
    cache: str | os.PathLike,
    held_out: float | None,
    seed: int,
    max_unreadable: float,
    say: Callable[[str], None],
) -> Pictures:
    share = HELD_OUT if held_out is None else held_out
    if isinstance(images, str | os.PathLike):
        due = due_every(10.0)

        def progress(done: int, count: int) -> None:
            if due():
                say(f"decoded {done:,} of {count:,} pictures")

        found = open_pictures(
            images, preprocessing, cache, held_out=share, seed=seed, max_unreadable=max_unreadable,
            progress=progress,
        )  # fmt: skip
    elif isinstance(images, torch.Tensor):
        found = split_pictures(images, held_out=share, seed=seed)
    elif isinstance(images, Pictures):
        if held_out is not None:
            raise CompressionError(
                f"the pictures are open, with {len(images.held_out)} held out: give held_out where you open them"
            )
        found = images
    else:
        raise TypeError(f"images must be a folder, a uint8 tensor or Pictures, got {kind_of(images)}")
    for line in found.notes:
        say(line)
    for name, reason in found.unreadable[:10]:
        say(f"left out: {name} {reason}")
    if len(found.train) < 2 or not len(found.held_out):
        raise DatasetError(
            f"there are {len(found.train)} pictures to train on and {len(found.held_out)} held out: give more pictures"
        )
    if found.train.image_size != preprocessing.image_size:
        raise DatasetError(
            f"the pictures have {found.train.image_size} pixels, the preprocessing {preprocessing.image_size}: make "
            "them equal"
        )
    say(f"{len(found.train):,} pictures to train on, {len(found.held_out):,} held out")
    return found


def _mark(folder: Path, settings: dict[str, Any]) -> None:
    """Write what was asked for, or compare it with what an earlier call wrote."""
    marker = folder / MARKER
    settings = json.loads(json.dumps({"format": FORMAT, **settings}))
    if not marker.is_file():
        atomic_write_text(marker, json.dumps(settings, indent=1))
        return
    try:
        before = json.loads(marker.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CompressionError(f"{marker} is damaged ({error}): name a new folder for the outputs") from error
    changed = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    if changed:
        what = ", ".join(
            f"{name} {_short(before.get(name))} then, {_short(settings.get(name))} now" for name in changed
        )
        raise CompressionError(
            f"{folder} holds a compression with other settings ({what}): name another folder, or give the same settings"
        )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]} …"


def _planned(
    folder: Path,
    task: Task,
    epochs: float | None,
    ends: float | None,
    learning_rate: float | None,
    affinity_weight: float | None,
    say: Callable[[str], None],
) -> Plan:
    """Read the plan of an earlier call, or make it: an estimate first, then the search.

    ``ends`` is the time of ``time.perf_counter`` at which the training should end; None without a limit.
    """
    batches = task.batches(task.pictures.train)
    rounds = planning.candidates(task.widths, learning_rate, affinity_weight)
    trials = sum(map(len, rounds)) / len(task.widths)
    if (folder / PLAN).is_file():
        try:
            plan = Plan.model_validate_json((folder / PLAN).read_text(encoding="utf-8"))
        except ValidationError as error:
            raise CompressionError(f"{folder / PLAN} is damaged: remove it, and the plan is made anew") from error
    else:
        usual = Chosen(
            learning_rate=planning.LEARNING_RATE if learning_rate is None else learning_rate,
            affinity_weight=planning.AFFINITY_WEIGHT if affinity_weight is None else affinity_weight,
        )
        plan = _estimated(task, batches, epochs, ends, trials, usual)
        atomic_write_text(folder / PLAN, plan.model_dump_json(indent=1))
    trial_updates = planning.trial_updates(plan.updates, trials)
    search = trials * (trial_updates * plan.seconds + len(_judged(task)) * plan.picture_seconds)
    before = f"about {clock(search)}" if not plan.chosen else "done" if plan.trials else "none"
    if trials and plan.chosen and not plan.trials:
        before += ", the training is too short for one"
    say(
        f"plan: {plan.updates:,} updates ({plan.updates / len(batches):.3g} epochs of {len(batches):,} batches of "
        f"{batches.batch_size}) of {', '.join(task.widths)}, about {clock(plan.updates * plan.seconds)}; search before "
        f"it: {before}"
    )
    if not plan.chosen:
        for tried in _searched(task, rounds, trial_updates, plan.trials, say):
            plan = plan.model_copy(update={"trials": tried})
            atomic_write_text(folder / PLAN, plan.model_dump_json(indent=1))
        choices = {bits: _choice(plan.trials, bits) for bits in task.widths}
        failed = {bits: _no_rate(plan.trials, bits) for bits, choice in choices.items() if choice is None}
        if len(failed) == len(choices):
            raise CompressionError("; ".join(f"{bits}: {reason}" for bits, reason in failed.items()))
        chosen = {bits: choice for bits, choice in choices.items() if choice is not None}
        plan = plan.model_copy(update={"chosen": chosen, "failed": failed})
        atomic_write_text(folder / PLAN, plan.model_dump_json(indent=1))
    for bits, choice in plan.chosen.items():
        say(f"{bits}: learning rate {choice.learning_rate:g}, affinity weight {choice.affinity_weight:g}")
    return plan


def _estimated(
    task: Task, batches: PictureBatches, epochs: float | None, ends: float | None, trials: float, usual: Chosen
) -> Plan:
    """Time a few updates, and plan as many as fit beside ``trials`` candidates a student.

    Where candidates would be too short, there is no search: all students take ``usual``.
    """
    seconds, picture_seconds = _seconds_of_an_update(task, batches)
    watching = picture_seconds * len(thinned(task.pictures.held_out, WATCHED))
    judging = picture_seconds * len(_judged(task))

    def updates_beside(trials: float) -> int:
        if ends is None:
            return planning.updates_within(epochs, None, len(batches), seconds, trials)
        updates = 1
        for _ in range(2):  # the evaluations follow from the epochs, and the epochs from the time left by them
            passes = -(-updates // len(batches))
            evaluations = -(-passes // planning.evaluate_every(passes))
            left = max(0.0, ends - time.perf_counter() - evaluations * watching - trials * judging)
            updates = planning.updates_within(epochs, left, len(batches), seconds, trials)
        return updates

    updates, chosen = updates_beside(trials), {}
    if not planning.trial_updates(updates, trials):
        updates, chosen = updates_beside(0), dict.fromkeys(task.widths, usual)
    return Plan(
        updates=updates, steps_per_epoch=len(batches), seconds=seconds, picture_seconds=picture_seconds, chosen=chosen
    )


def _choice(trials: list[Trial], bits: str) -> Chosen | None:
    """What the search found; None where no candidate stayed finite."""
    found = planning.best(trials, bits)
    return found and Chosen(learning_rate=found.learning_rate, affinity_weight=found.affinity_weight)


def _no_rate(trials: list[Trial], bits: str) -> str:
    rates = sorted({trial.learning_rate for trial in trials if trial.bits == bits})
    return (
        f"no learning rate of {', '.join(f'{rate:g}' for rate in rates)} kept the loss finite: give a lower one, and a "
        "new output folder"
    )


@exact_kernels()
def _seconds_of_an_update(task: Task, batches: PictureBatches) -> tuple[float, float]:
    """Mean seconds of an update of all students, with batch and teacher's pass, and of evaluating all on a picture."""
    warm_up, timed = (max(count, 2 * batches.threads) for count in TIMED_STEPS)
    weight = planning.AFFINITY_WEIGHT if task.taps else 0.0
    learners = [
        task.learner(Candidate(bits, planning.LEARNING_RATES[0], weight), warm_up + timed, batches)
        for bits in task.widths
    ]
    seconds = []
    with (
        own_stream(task.device),
        closing(Cohort(learners, task.teacher, task.taps, task.device, cuda_graphs=False)) as cohort,
    ):
        epoch = 0
        while len(seconds) < warm_up + timed:
            stream = batches.epoch(epoch)
            for _ in range(len(batches)):
                started = time.perf_counter()
                cohort.step(epoch, next(stream), cohort.active)
                if task.device.type == "cuda":
                    torch.cuda.synchronize(task.device)
                seconds.append(time.perf_counter() - started)
                if len(seconds) == warm_up + timed:
                    break
            for learner in cohort.active:
                learner.end_epoch(epoch, {})
            epoch += 1
        some = task.pictures.train[: batches.batch_size]
        started = time.perf_counter()
        for learner in learners:
            evaluate(learner.model, Images(some, torch.zeros(len(some), dtype=torch.long)), batches.normalizer)
        evaluated = time.perf_counter() - started
    return sum(seconds[warm_up:]) / timed, evaluated / len(some)


def _judged(task: Task) -> torch.Tensor:
    """Positions of the training pictures that judge the search, int64: every fifth, at most :data:`WATCHED`."""
    count = len(task.pictures.train)
    return torch.arange(0, count, max(5, -(-count // WATCHED)))


def _searched(
    task: Task, rounds: list[list[Candidate]], updates: int, before: list[Trial], say: Callable[[str], None]
) -> Iterator[list[Trial]]:
    """Train candidates for a few updates, and see how often each names the teacher's class.

    As many candidates train side by side as students later: the search needs no more memory than the training.
    Training pictures decide. The held-out pictures stay unseen.

    Args:
        before: trials of an earlier call.

    Yields:
        All trials so far, after each cohort.
    """
    if not rounds:
        return
    train_set = task.pictures.train
    chosen = torch.zeros(len(train_set), dtype=torch.bool)
    chosen[_judged(task)] = True
    parts = [replace(train_set, indices=train_set.indices[mask]) for mask in (chosen, ~chosen)]
    judged, batches = task.watched(parts[0]), task.batches(parts[1])
    trials = list(before)
    for wanted in rounds:
        best = {bits: planning.best(trials, bits) for bits in task.widths}
        resolved = [
            one._replace(learning_rate=one.learning_rate or best[one.bits].learning_rate)
            for one in wanted
            if one.learning_rate or best[one.bits] is not None
        ]
        done = {(trial.bits, trial.learning_rate, trial.affinity_weight) for trial in trials}
        missing = [candidate for candidate in resolved if candidate not in done]
        for start in range(0, len(missing), len(task.widths)):
            group = missing[start : start + len(task.widths)]
            trials += _tried(task, group, updates, judged, batches)
            yield trials
    say(f"search on {len(judged)} training pictures, after {updates} updates each:")
    for line in trial_lines(trials):
        say(line)


def _tried(
    task: Task, candidates: Sequence[Candidate], updates: int, judged: Images, batches: PictureBatches
) -> list[Trial]:
    """Train these candidates side by side."""
    cohort = {candidate: task.learner(candidate, updates, batches) for candidate in candidates}
    with Progress(updates, "search", len(cohort)) as progress:
        result = train(
            list(cohort.values()), batches, task.teacher, task.taps, {"test": judged}, cuda_graphs=False,
            evaluate_every=10**9, on_batch=_steps_shown(progress, len(batches), updates, f"{len(cohort)} candidates"),
        )  # fmt: skip
    trials = []
    for candidate, learner in cohort.items():
        row = learner.history[-1] if learner in result.trained else {}
        trials.append(
            Trial(
                **candidate._asdict(),
                updates=updates,
                pictures=len(judged),
                agreement=row.get("test_accuracy"),
                cross_entropy=row.get("test_cross_entropy"),
            )
        )
    return trials


def trial_lines(trials: Sequence[Trial]) -> list[str]:
    """The search as lines of text."""
    lines = [f"  {'bits':<7} {'learning rate':>13} {'affinity weight':>15} {'agreement':>10} {'cross-entropy':>13}"]
    for one in trials:
        found = "    not finite" if one.agreement is None else f"{one.agreement:>8.1f} % {one.cross_entropy:>13.3f}"
        lines.append(f"  {one.bits:<7} {one.learning_rate:>13g} {one.affinity_weight:>15g} {found}")
    return lines


def _steps_shown(
    progress: Progress, steps_per_epoch: int, total: int, text: str, begun: int = 0
) -> Callable[[int, int], None]:
    """Shows the update of ``total``; ``begun`` of them were done by an earlier call."""
    due = due_every(2.0)

    def shown(epoch: int, done: int) -> None:
        if due():
            steps = epoch * steps_per_epoch + done
            progress.within("all", max(0, steps - begun - progress.done), f"{text}, update {steps} of {total}")

    return shown


def _trained(folder: Path, task: Task, plan: Plan, say: Callable[[str], None]) -> tuple[list[Learner], dict[str, str]]:
    """Train all students side by side, from their checkpoints if there are any.

    Returns:
        The finished students; and by the bits of all others, why their loss stopped being finite.
    """
    batches = task.batches(task.pictures.train)
    learners = [
        task.learner(Candidate(bits, choice.learning_rate, choice.affinity_weight), plan.updates, batches)
        for bits, choice in plan.chosen.items()
    ]
    machine = environment(task.device)
    places = {learner: require_writable(folder / "runs" / learner.config.run_id) for learner in learners}
    with Progress(plan.updates, "compress", len(learners)) as progress:
        for learner, place in places.items():
            remove_unfinished_writes(place)
            resume(place, learner, machine, say)
        begun = min(learner.steps for learner in learners)
        progress.skip(begun)
        shown = _steps_shown(progress, len(batches), plan.updates, ", ".join(plan.chosen), begun)

        def epoch_done(epoch: int, finished: list[Learner]) -> None:
            steps = min(learner.steps for learner in finished)
            progress.within("all", 0)
            progress.advance(
                steps - begun - progress.done, f"epoch {epoch + 1} of {plan.epochs}{_agreements(finished)}"
            )
            for learner in finished if epoch + 1 == plan.epochs else ():
                save_checkpoint(places[learner], learner, machine)

        result = train(
            learners,
            batches,
            task.teacher,
            task.taps,
            {"test": task.watched(task.pictures.held_out)},
            on_epoch=epoch_done,
            on_batch=shown,
            checkpoint_due=due_every(CHECKPOINT_SECONDS),
            checkpoint=lambda learner: save_checkpoint(places[learner], learner, machine),
            cuda_graphs=False,
            evaluate_every=planning.evaluate_every(plan.epochs),
        )
    errors = {learner.config.bits: result.failed.get(learner.config.run_id) for learner in learners}
    return result.trained, {bits: str(error) for bits, error in errors.items() if error is not None}


def _agreements(learners: Sequence[Learner]) -> str:
    rows = {learner.config.bits: learner.history[-1].get("test_accuracy") for learner in learners}
    return "".join(f"; {bits} agrees on {value:.1f} %" for bits, value in rows.items() if value is not None)
