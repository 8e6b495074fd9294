"""Kill trainings at random moments and see whether they end with the same bits: a stress test of checkpoints.

    python benchmarks/kill.py --kills 20

A process trains a teacher, an FAQD and an FFAQD student, with a checkpoint after every step. SIGKILL ends the process
at random moments, half of them during the writing of a checkpoint. The process is started again until it finishes.
Weights and histories are compared with those of a process that was not killed. Prints the moment and the verdict of
every kill; exits with 1 if a verdict is bad.

Every process is forked from one that has imported torch and trained nothing.
"""

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
from contextlib import redirect_stdout
from multiprocessing.synchronize import Event
from pathlib import Path

from faqd_lib.runs.profile import Profile
from faqd_lib.runs.suite import Suite

RESUMED = "goes on from its checkpoint"
PRELOADED = ["faqd_lib.runs.local", "torch._dynamo", "torch._inductor.compile_fx"]
SCHEDULE = {"epochs": 2, "batch_size": 16, "warmup_epochs": 0.5}


def suite_in(folder: Path) -> Suite:
    profile = Profile.parse(
        {"name": "kill", "shows_results": False, "train_images": 96, "test_images": 50, "image_size": 8,
         "teachers": ["resnet8"], "student": "resnet8", "checkpoint_seconds": 0.0, "teacher_schedule": SCHEDULE,
         "student_schedule": SCHEDULE, "fine_tuning_schedule": SCHEDULE},
        "kill",
    )  # fmt: skip
    return Suite.open(profile, "digits", results=folder)


def train(folder: Path, said: Path, begun: Event) -> None:
    with said.open("w", buffering=1) as file, redirect_stdout(file):
        suite = suite_in(folder)
        begun.set()
        suite.run([suite.student("FAQD", weight_bits=1, activation_bits=4), suite.student("FFAQD", weight_bits=2)])


def outcome(folder: Path) -> dict[str, tuple]:
    """What must be the same: weights and history of every run."""
    records = [json.loads(path.read_text("utf-8")) for path in folder.glob("*/runs/*/record.json")]
    return {record["run_id"]: (record["weights_digest"], record["history"]) for record in records}


def checkpoints(folder: Path) -> bool:
    return any(folder.glob("*/runs/*/checkpoint*.safetensors"))


def unfinished_writes(folder: Path) -> set[Path]:
    return set(folder.glob("*/runs/*/.checkpoint*.part"))


def killed_once(folder: Path, seconds: float, mid_write: bool) -> tuple[str | None, str, float]:
    """Train in a process that is killed after ``seconds``, or, with ``mid_write``, in the first write after these.

    Returns:
        (when it was killed, or None if it got through; what it printed; seconds of training).
    """
    left_by_others = unfinished_writes(folder)
    processes = multiprocessing.get_context("forkserver")
    begun, moment = processes.Event(), None
    with tempfile.NamedTemporaryFile("r") as said:
        process = processes.Process(target=train, args=(folder, Path(said.name), begun))
        process.start()
        # The clock starts with training: a kill before tests nothing.
        while not begun.wait(0.1) and process.is_alive():
            pass
        start = time.monotonic()
        process.join(None if seconds == float("inf") else seconds)
        while process.is_alive() and moment is None:
            writing = bool(unfinished_writes(folder) - left_by_others)
            if writing or not mid_write:
                process.kill()
                where = "while a checkpoint was written" if writing else "between two writes"
                moment = f"after {time.monotonic() - start:5.2f} s, {where}"
            time.sleep(0.0005)
        process.join()
        if process.exitcode != 0 and moment is None:
            raise RuntimeError(f"training failed by itself, for the reason above:\n{said.read()}")
        return moment, said.read(), time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    arguments = parser.parse_args()
    if arguments.kills < 1:
        parser.error(f"--kills must be at least 1, got {arguments.kills}")
    multiprocessing.set_forkserver_preload(PRELOADED)
    moments, kills, wrong, trials = random.Random(arguments.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        _, _, whole_seconds = killed_once(whole, float("inf"), False)
        expected = outcome(whole)
        print(f"without a kill: {len(expected)} runs, {whole_seconds:.2f} s of training")
        while kills < arguments.kills:
            trials += 1
            folder, lines = Path(scratch) / str(trials), []
            while True:
                last = len(lines) == 4 or kills + len(lines) == arguments.kills
                seconds = float("inf") if last else moments.uniform(0.0, whole_seconds)
                had_one = checkpoints(folder)
                moment, said, _ = killed_once(folder, seconds, mid_write=moments.random() < 0.5)
                if moment is None:
                    break
                lines.append(moment)
            # A training that starts from nothing gives these bits as well: the process must have read its checkpoint.
            verdict = "the same bits" if outcome(folder) == expected else "OTHER BITS"
            if lines and had_one:
                verdict += ", from a checkpoint" if RESUMED in said else ", BUT NOT FROM ITS CHECKPOINT"
            for line in lines:
                print(f"trial {trials}: killed {line}: {verdict}", flush=True)
            kills, wrong = kills + len(lines), wrong + ("OTHER" in verdict or "NOT" in verdict)
            if not lines:
                print(f"trial {trials}: it got through before it was killed")
    print(f"{kills} kills in {trials} trials: {'all the same bits' if not wrong else f'{wrong} trials are wrong'}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
