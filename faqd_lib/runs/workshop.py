"""Builds the networks, batches and learners of run configurations, on a suite's images and device."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import islice
from typing import NamedTuple

import torch
from torch import nn

from ..affinity.loss import feature_affinity_loss
from ..config import RunConfig
from ..data import datasets, elsewhere
from ..data.batches import Batches, Normalizer
from ..data.datasets import ImageData, Images
from ..models import FeatureTap, build_model, tap_names
from ..quantization.network import calibrate, quantize, reestimate_batch_norm
from ..training.learner import Learner, projection_seed
from ..training.objective import DistillationObjective
from ..training.segmentation import root_median_frequency
from ..utils.measure import exact_kernels
from .profile import SuiteState
from .store import ResultsError, RunStore

AFFINITY_IMAGES = 1000  # of the test split, whose maps are compared after training
AFFINITY_PIXELS = AFFINITY_IMAGES * 64**2  # of images whose maps are in memory at once


class Splits(NamedTuple):
    """Images to train on, to select epochs with, and to test on; ``validation`` is None if none are held out."""

    training: Images
    validation: Images | None
    test: Images


@dataclass(frozen=True)
class Workshop:
    """Images, device and finished runs, and what is built from them.

    Args:
        state: which images, and the profile.
        store: finished runs, whose weights are loaded.
        device: where networks live.
        data_root: the only folder to look for data in; None for ``$FAQD_DATA``, then ``data/``.
        images: the dataset. None: loaded when first needed.
    """

    state: SuiteState
    store: RunStore
    device: torch.device
    data_root: str | None = None
    images: ImageData | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, object]:
        """The fields to send to another process. Images stay here: the other process loads them."""
        return {one.name: getattr(self, one.name) for one in fields(self)} | {"images": None}

    @cached_property
    def data(self) -> ImageData:
        """The whole dataset.

        Raises:
            ResultsError: the images differ from those that the folder was begun with.
        """
        name, size = self.state.dataset, self.state.profile.image_size
        images = self.images or datasets.load(name, self.data_root, image_size=size)
        if images.fingerprint != self.state.data.fingerprint:
            raise ResultsError(f"the images of {name} are not those that {self.store.folder} was begun with")
        return images

    @cached_property
    def splits(self) -> Splits:
        """The images, with the subsets of the profile taken. Held-out images are taken first, then validation images.

        The held-out images follow the test images in the test split.
        """
        config = self.state.data
        rest, held_out = datasets.split_validation(self.data.train, config.held_out_images, config.subset_seed)
        rest, validation = datasets.split_validation(rest, config.validation_images, config.subset_seed)
        training = datasets.subset(rest, config.train_images, config.subset_seed)
        test = datasets.subset(self.data.test, config.test_images, config.subset_seed)
        return Splits(training, validation, test if held_out is None else test.joined(held_out))

    @cached_property
    def normalizer(self) -> Normalizer:
        """Turns uint8 images into the networks' input, on the device."""
        return Normalizer(self.data.mean, self.data.std, self.device)

    def batches(self, cohort: Sequence[RunConfig]) -> Batches:
        """The training batches of runs side by side. Those of label-free runs alone carry no labels."""
        config = cohort[0]
        training = self._training(config)
        return Batches(
            training.unlabelled() if all(each.label_free for each in cohort) else training,
            config.optimization.batch_size,
            config.seed,
            self.normalizer,
            flip=self.data.flip,
            device=self.device,
        )

    def _training(self, config: RunConfig) -> Images:
        """The images that a run is trained on; those from elsewhere have no labels."""
        if config.images is not None:
            return self.images_from(config.images.name, config.images.train_images, config.images.fingerprint)
        return datasets.subset(self.splits.training, config.data.train_images, config.data.subset_seed)

    def images_from(self, name: str, count: int, fingerprint: str) -> Images:
        """Unlabelled images of a source of :mod:`faqd_lib.data.elsewhere`, in the size of the own images.

        Raises:
            DatasetError: the dataset was not found, or has fewer images.
            ResultsError: the images differ from those of the fingerprint.
        """
        other = None
        if name not in elsewhere.MADE_HERE:
            loaded = self.other_dataset(name)
            if loaded.fingerprint != fingerprint:
                raise ResultsError(f"the images of {name} are not those that {self.store.folder} knows")
            other = loaded.train
        seed, classes = self.state.data.subset_seed, len(self.data.classes)
        return elsewhere.unlabelled(name, count, seed, self.splits.training, classes, other)

    def has_images(self, name: str) -> bool:
        """Whether the images of a source of :mod:`faqd_lib.data.elsewhere` are made here or on disk."""
        try:
            return name in elsewhere.MADE_HERE or datasets.on_disk(name, self.data_root)
        except datasets.DatasetError:  # a folder of images that is gone is an unknown name
            return False

    def other_dataset(self, name: str) -> ImageData:
        """Another dataset, its images resized to the size of the own ones."""
        download = self.state.profile.download
        return datasets.load(name, self.data_root, image_size=self.data.image_size, download=download)

    def build(self, config: RunConfig, *, initial_weights: bool = True) -> nn.Module:
        """The network of a run before training, with its quantizers, not calibrated yet.

        ``initial_weights`` says whether the weights that fine-tuning starts from are loaded.

        Raises:
            ResultsError: the run with the initial weights is not finished, or damaged.
        """
        model = build_model(config.model, len(self.data.classes), image_size=self.data.image_size, seed=config.seed)
        model = model.to(self.device, memory_format=torch.channels_last)
        if initial_weights and config.initial is not None:
            self.store.load_weights(config.initial, model)
        return quantize(model, **config.quantization.quantize_arguments)

    def model(self, config: RunConfig) -> nn.Module:
        """The trained network of a finished run, in evaluation mode.

        Raises:
            ResultsError: the run is not finished, or its weights are damaged.
        """
        return self.store.load_weights(config, self.build(config, initial_weights=False)).eval()

    def shared_teacher(self, cohort: Sequence[RunConfig]) -> nn.Module | None:
        """The frozen teacher that the runs of a cohort share; None if no run has one."""
        config = next((config.teacher for config in cohort if config.teacher is not None), None)
        return None if config is None else self.model(config).requires_grad_(False)

    @exact_kernels()
    def learner(self, config: RunConfig, batches: Batches) -> Learner:
        """A run before its first step: the quantized network, calibrated on the first batch, and its objective."""
        model = self.build(config)
        calibrate(model, next(batches.epoch(0)).images)
        if count := config.optimization.batch_norm_batches:
            reestimate_batch_norm(model, (batch.images for batch in islice(batches.epoch(0), count)))
        adapter_channels = ()
        if config.objective.adapters:
            with FeatureTap(model.eval(), model.feature_names) as tap, torch.no_grad():
                model(torch.zeros(1, *self.data.train.pixels.shape[1:], device=self.device))
            adapter_channels = [features.shape[2 if features.ndim == 3 else 1] for features in tap.features]
        weights = None
        if config.objective.class_weights != "equal":
            weights = root_median_frequency(self._training(config).labels, len(self.data.classes))
        objective = DistillationObjective(
            **config.objective.model_dump(exclude={"adapters", "stages", "taps", "class_weights", "affinity_recipe"}),
            class_weights=weights,
            adapter_channels=adapter_channels,
            lattices=_lattices(model, config.objective.stages) if config.objective.affinity == "squat" else (),
            seed=projection_seed(config.seed),
        ).to(self.device)
        return Learner(config, model, objective, tap_names(model, config.objective.taps), len(batches))

    @exact_kernels()
    @torch.no_grad()
    def test_affinity(self, student: nn.Module, teacher: nn.Module) -> float | None:
        """The exact affinity loss on test images, summed over stages; networks in evaluation mode.

        The images are every n-th of the test split, in float32, with n = test images // :data:`AFFINITY_IMAGES`. Large
        splits thus give 1 to 2 times :data:`AFFINITY_IMAGES`, small ones all images.

        Returns:
            The loss; None where the networks differ in their number of stages.
        """
        if len(student.feature_names) != len(teacher.feature_names):
            return None
        pixels = self.splits.test.pixels
        chosen, total = pixels[:: max(1, len(pixels) // AFFINITY_IMAGES)], 0.0
        with FeatureTap(student, student.feature_names) as of_student, FeatureTap(teacher, teacher.feature_names) as of:
            for part in chosen.split(max(1, AFFINITY_PIXELS // pixels.shape[2:].numel())):
                images = self.normalizer(part.to(self.device))
                student(images), teacher(images)
                pairs = zip(of_student.features, of.features, strict=True)
                mean = float(sum(feature_affinity_loss(of_one, of_other) for of_one, of_other in pairs))
                total += mean * (len(part) / len(chosen))
        return total


def _lattices(model: nn.Module, stages: Sequence[int]) -> list[nn.Module]:
    """The quantized ReLUs that end a network's stages; ``stages`` are numbers from 1 on, () for all."""
    names = [name.removesuffix("@input") for name in tap_names(model, "before ReLU")]
    return [model.get_submodule(names[stage - 1]) for stage in stages or range(1, len(names) + 1)]
