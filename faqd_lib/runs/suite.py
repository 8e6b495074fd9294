"""A suite: one profile on one dataset, its runs, and the folder they live in.

suite = Suite.open(profile="quick")
records = suite.run([suite.student("FAQD", weight_bits=1)])

A suite inherits the factory of run configurations and the workshop, which builds networks. It holds the store of
finished runs.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import nn

from ..config import ConfigurationError, RunConfig
from ..data import datasets
from ..models import is_dense
from ..training.learner import precision_that_pays
from ..training.loop import evaluate
from ..utils.files import require_writable
from ..utils.progress import Progress
from . import planning
from .checkpoints import remove_checkpoints
from .configurations import Configurations
from .local import Engine, train_here, units
from .profile import Profile, SuiteState, begin_or_continue, read_state, suite_folder
from .store import METRICS, RunRecord, RunStore
from .workshop import Workshop


@dataclass(frozen=True)
class Suite(Configurations, Workshop):
    """Configurations, networks and records of one results folder.

    :meth:`open` makes a suite, and so does :meth:`read`, from a folder without its images. The fields are those of
    :class:`~faqd_lib.runs.workshop.Workshop`, and the ``engine`` and ``bar`` of :meth:`open`.
    """

    engine: Engine = train_here
    bar: bool | None = None

    @classmethod
    def open(
        cls,
        profile: str | Path | Profile = "quick",
        dataset: str = "",
        data_root: str | Path | None = None,
        results: str | Path | None = None,
        seeds: int = 0,
        device: str = "auto",
        engine: Engine = train_here,
        bar: bool | None = None,
    ) -> Self:
        """Open the suite of a profile on a dataset, or begin it.

        Args:
            profile: a shipped profile's name, the path of a TOML file, or a profile.
            dataset: a dataset's name, or ``"auto"``; empty for the profile's own choice.
            data_root: the only folder to look for data in; None for ``$FAQD_DATA``, then ``data/``.
            results: where suite folders live; None for the project's ``results/``.
            seeds: number of seeds; 0 for the profile's own, or the folder's if it has more.
            device: ``"auto"`` (CUDA if there is one), or a torch device.
            engine: trains runs: in this process (the default), or a :class:`~faqd_lib.runs.ray.RayEngine`.
            bar: whether progress is a bar or lines of text. None: a bar where somebody watches.

        Raises:
            ConfigurationError: a bad profile or argument.
            DatasetError: the dataset is unknown, missing or damaged.
            ResultsError: the folder was begun with another configuration.
            PermissionError: the folder cannot be written to.
        """
        chosen = profile if isinstance(profile, Profile) else Profile.load(profile)
        if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 0:
            raise ConfigurationError(f"seeds must be a whole number of at least 1 (0: the profile's), got {seeds!r}")
        name, reason = chosen.resolve_dataset(dataset, data_root)
        chosen = chosen.for_dataset(name)
        chosen = chosen.model_copy(update={"seeds": seeds or chosen.seeds})
        folder = require_writable(suite_folder(chosen, name, results)).resolve()
        torch_device = _device(device)
        images = datasets.load(name, data_root or None, image_size=chosen.image_size, download=chosen.download)
        state = SuiteState.describe(chosen, name, reason, images, _precision(chosen, torch_device))
        if chosen.study is not None and not (folder / "suite.json").exists():
            known = state.model_copy(update={"sources": dict.fromkeys(chosen.study.sources, "")})
            Configurations(known).check_design()  # before the folder is begun: then the design can be changed
        state = begin_or_continue(folder, state, seeds)
        data_root = str(Path(data_root).resolve()) if data_root else None
        suite = cls(state, RunStore(folder), torch_device, data_root, images, engine, bar)
        if chosen.study is not None:
            for source in chosen.study.sources:
                suite = suite.with_source(source)
        return suite

    def with_source(self, dataset: str) -> Self:
        """This suite, whose folder now knows another dataset that students may take unlabelled images from.

        Raises:
            DatasetError: the dataset is unknown, missing or damaged.
            ResultsError: the folder knows other images of that name.
        """
        sources = {dataset: self.other_dataset(dataset).fingerprint}
        state = self.state.model_copy(update={"sources": sources})
        return replace(self, state=begin_or_continue(self.folder, state, self.state.profile.seeds))

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """The suite of a results folder, without its images: enough for tables.

        Raises:
            ResultsError: no suite was begun there, or its ``suite.json`` is damaged.
        """
        return cls(read_state(Path(folder)), RunStore(Path(folder)), torch.device("cpu"))

    @property
    def dataset(self) -> str:
        """The dataset's name."""
        return self.state.dataset

    @property
    def folder(self) -> Path:
        """The suite's own folder, ``<results>/<profile>-<dataset>``."""
        return self.store.folder

    @property
    def caption(self) -> str:
        """Dataset, sizes and profile, for every table and figure."""
        return self.state.caption

    @property
    def metric(self) -> str:
        """What runs are judged by, in words: accuracy, or mean IoU of one prediction a pixel."""
        return METRICS["mean_iou" if is_dense(self.profile.student) else "accuracy"]

    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """Top-1 accuracy or mean IoU (percent), and mean cross-entropy, on the test images."""
        return evaluate(model, self.splits.test, self.normalizer)[:2]

    def run(self, configs: Iterable[RunConfig], title: str = "runs", deadline: float | None = None) -> list[RunRecord]:
        """Train the runs that are not finished, after the teachers and initial weights they need.

        Every finished run is written before the next cohort begins. Training stops at ``deadline``, a time of
        ``time.monotonic``; with None it goes on to the end. ``title`` is shown with the progress.

        Returns:
            One record a configuration, in the order of ``configs``, each once.

        Raises:
            OutOfTimeError: the deadline has passed. Finished runs and checkpoints are kept.
            NonFiniteLossError: a loss stopped being finite. All other runs of its cohort are finished and saved.
            EngineError: the engine cannot work, or a worker died too often.
        """
        wanted = list(dict.fromkeys(configs))
        waves = planning.waves([config for config in wanted if self.store.record(config) is None])
        needed = dict.fromkeys([*wanted, *(config for wave in waves for config in wave)])
        finished = {config for config in needed if self.store.record(config) is not None}
        for config in finished:  # a process that was killed may have left checkpoints behind
            remove_checkpoints(self.store.run_folder(config))
        if finished:
            print(f"  {title}: {len(finished)} of {len(needed)} runs are there", flush=True)
        missing = [config for config in needed if config not in finished]
        if missing:
            with self.progress(sum(map(units, missing)), title, len(missing)) as progress:
                for wave in waves:
                    if left := [config for config in wave if config not in finished]:
                        self.engine(self, left, progress, deadline)
        return [self.store.record(config) for config in wanted]

    def progress(self, total: float, title: str, runs: int = 1) -> Progress:
        """A progress display in the suite's style; ``total`` in epochs of one network."""
        return Progress(total, title, runs, self.bar)


def _precision(profile: Profile, device: torch.device) -> str:
    if profile.precision == "by device" and device.type == "cpu":
        return "float32"
    return precision_that_pays(device) if profile.precision in ("auto", "by device") else profile.precision


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"device must be auto, cpu, or cuda, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(f"device {name!r}: this torch ({torch.__version__}) sees no CUDA device")
    return device
