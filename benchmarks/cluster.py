"""Lose a machine of a Ray cluster in the middle of training and see whether all runs end with the same bits.

    python benchmarks/cluster.py                # two machines, one is lost; a minute or two

Several nodes of a cluster start on this machine. Each has its own scheduler and room for one worker, like a separate
machine. The file system stands for the shared folder of a real cluster. The cluster trains a teacher and one student a
node. One node is killed as soon as every student has a checkpoint, and the other nodes finish its work. Weights and
histories are compared with those of one process.

Prints a verdict; exits with 1 if bits differ or no run went on from a checkpoint. Needs the extra ``ray``.
"""

import argparse
import contextlib
import io
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from faqd_lib.config import RunConfig
from faqd_lib.runs.local import Engine, train_here
from faqd_lib.runs.profile import Profile
from faqd_lib.runs.ray import RayEngine
from faqd_lib.runs.suite import Suite

STORE = 100 * 2**20  # bytes of each node's object store
RESUMED = "goes on from its checkpoint"


def suite_in(folder: Path, epochs: int, engine: Engine = train_here) -> Suite:
    schedule = {"epochs": 1, "batch_size": 32, "warmup_epochs": 0.5}
    profile = Profile.parse(
        {"name": "cluster", "shows_results": False, "train_images": 96, "test_images": 50, "teachers": ["resnet8"],
         "student": "resnet8", "checkpoint_seconds": 0.0, "teacher_schedule": schedule,
         "student_schedule": {**schedule, "epochs": epochs}, "fine_tuning_schedule": schedule},
        "cluster",
    )  # fmt: skip
    return Suite.open(profile, "digits", results=folder, device="cpu", engine=engine)


def students(suite: Suite, machines: int) -> list[RunConfig]:
    """One student a machine: students of different seeds see different images and cannot share a cohort."""
    return [
        suite.student(("FAQD", "FFAQD")[n % 2], weight_bits=1, activation_bits=4, seed=n + 1) for n in range(machines)
    ]


def outcome(suite: Suite, configs: list[RunConfig]) -> list[tuple]:
    """Names, weights and histories, which must be the same."""
    return [(record.run_id, record.weights_digest, record.history) for record in map(suite.store.record, configs)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", type=int, default=2, help="nodes of the cluster, at least 2 (2)")
    parser.add_argument("--epochs", type=int, default=40, help="of the students (40)")
    arguments = parser.parse_args()
    if arguments.machines < 2:
        parser.error(f"--machines must be at least 2, got {arguments.machines}")
    try:
        import ray
        from ray.cluster_utils import Cluster
    except ModuleNotFoundError:
        parser.error("this needs Ray: pip install 'faqd[ray]' in this environment")

    torch.set_num_threads(1)  # as many as each worker has
    with tempfile.TemporaryDirectory() as scratch:
        here = suite_in(Path(scratch) / "here", arguments.epochs)
        configs = students(here, arguments.machines)
        here.run(configs, "one process")
        expected = outcome(here, configs)

        node = {"num_cpus": 1, "object_store_memory": STORE}
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        others = [cluster.add_node(**node) for _ in range(arguments.machines - 1)]
        cluster.wait_for_nodes()
        there = suite_in(Path(scratch) / "there", arguments.epochs, RayEngine(cluster.address))
        there.run([there.teacher()], "cluster")
        begun, lost = time.monotonic(), []

        def lose_one() -> None:
            while len(list(there.folder.glob("runs/*/checkpoint.safetensors"))) < len(configs):
                time.sleep(0.05)
            cluster.remove_node(others[0], allow_graceful=False)
            lost.append(time.monotonic() - begun)

        said = io.StringIO()
        threading.Thread(target=lose_one, daemon=True).start()
        with contextlib.redirect_stdout(said):
            there.run(configs, "cluster")
        same, resumed = outcome(there, configs) == expected, RESUMED in said.getvalue()
        left = sum(found["Alive"] for found in ray.nodes())
        ray.shutdown()
        cluster.shutdown()
    if not lost or left != arguments.machines - 1:
        print("nothing was lost before training had ended: raise --epochs")
        return 1
    print(
        f"{arguments.machines} machines, one lost after {lost[0]:.1f} s, {left} left: "
        f"{'the same bits' if same else 'OTHER BITS'}, "
        f"{'taken up from a checkpoint' if resumed else 'BUT NOT FROM A CHECKPOINT'}"
    )
    return int(not (same and resumed))


if __name__ == "__main__":
    sys.exit(main())
