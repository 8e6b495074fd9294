"""The model card: what the files of a compression are worth, as numbers, Markdown and one web page."""

import base64
import copy
import datetime
import io
import json
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jinja2
import numpy as np
import pandas as pd
import torch
from markupsafe import Markup
from PIL import Image
from torch import nn

from ..config import QuantizationConfig
from ..data.pictures import PictureSet
from ..data.preprocessing import Preprocessing
from ..export.onnx import OnnxExportError, export_onnx
from ..export.packed import load_packed, save_packed
from ..models import parameter_count
from ..quantization.description import LayerBits, describe
from ..quantization.module_calls import WEIGHTED
from ..quantization.weights import FLOAT_BITS
from ..reporting import signs
from ..training.learner import Learner
from ..utils.files import atomic_write_text
from ..utils.measure import environment
from .measures import Bin, Latency, Share, agreement, agreement_by_class, calibration, latencies, logits_of
from .planning import Plan
from .task import Task, thinned

MEASURED = 20_000  # held-out pictures at most
ROUNDS = 15  # calls that each latency is measured on
SHOWN, THUMBNAIL = 12, 96  # differing pictures in the card; pixels of their longer side
THROUGH_ONNX = 200  # pictures at most on which the ONNX file is compared with the student
COLLAPSE = 0.5  # share of the teacher's classes below which a student has collapsed
WITHOUT_GAIN = "agrees with the teacher on fewer pictures than after rounding alone"
COLLAPSED = f"names fewer than {COLLAPSE:.0%} of the classes that the teacher names"


class Difference(NamedTuple):
    """A held-out picture that student and teacher name differently."""

    name: str
    teacher: str
    student: str
    address: str  # the picture, as a data: URL


class Kept(NamedTuple):
    """Layers of one kind that stayed float for one reason."""

    kind: str
    count: int
    first: str  # name of the first layer
    reason: str


class Sign(NamedTuple):
    """A sign that distillation has failed: its threshold, and ``yes``, ``no`` or why it is not judged."""

    name: str
    threshold: str
    verdict: str


@dataclass(frozen=True)
class File:
    """A file of a student; without one, ``reason`` says why."""

    name: str = ""
    size: int = 0  # bytes
    reason: str = ""


@dataclass(frozen=True)
class FloatStudent:
    """The network of the students before quantization, where it is no copy of the teacher."""

    name: str
    parameters: int
    size: int  # bytes of weights and buffers


@dataclass(frozen=True)
class StudentCard:
    """What is known of one student."""

    bits: str
    learning_rate: float
    affinity_weight: float
    agreement: Share  # with the teacher, on held-out pictures
    before: Share  # the same after quantization alone
    by_class: list[tuple[str, Share]]
    bins: list[Bin]
    calibration_error: float
    packed: File
    onnx: File
    onnx_agreement: Share | None  # of the ONNX file with the student
    kept: list[Kept]
    signs: list[Sign]
    differences: list[Difference]
    history: list[dict[str, float]]


@dataclass(frozen=True)
class Card:
    """What is known of all students, and of what they were made from."""

    teacher: str
    parameters: int
    float_bytes: int  # of the teacher's weights and buffers
    float_onnx: File
    student: FloatStudent | None  # None for copies of the teacher
    training_pictures: int
    held_out_pictures: int
    unreadable: int
    measured_pictures: int
    taps: list[str]
    preprocessing: Preprocessing
    classes: list[str]
    batch_size: int
    batches_share: float  # of the time of the updates: preparing batches, 0 to 1
    plan: Plan
    students: list[StudentCard]
    failed: dict[str, str]  # by bits: why there is no such student
    latency: dict[str, Latency]
    machine: dict[str, Any]
    written: str

    @property
    def named_by_teacher(self) -> str:
        """A sentence: how many classes the teacher names on the measured pictures, and when that says too little."""
        count = len(self.students[0].by_class)
        warning = ", so that agreement says nothing: give pictures of all classes" if count == 1 else ""
        return f"The teacher names {count:,} of {len(self.classes):,} classes on the held-out pictures{warning}."


@torch.no_grad()
def examine(
    task: Task,
    plan: Plan,
    learners: Sequence[Learner],
    failed: dict[str, str],
    folder: Path,
    about: dict[str, Any],
    say: Callable[[str], None],
) -> Card:
    """Write the files of trained students to ``folder``, and measure them on held-out pictures.

    A student that has no ONNX form gets none; its card says why.
    """
    pictures = thinned(task.pictures.held_out, MEASURED)
    taught = logits_of(task.teacher, pictures, task.normalizer)
    names = list(task.classes) or [f"class {number}" for number in range(taught.shape[1])]
    shape = (3, task.preprocessing.image_size, task.preprocessing.image_size)
    one = task.normalizer(pictures[:1].to(task.device)).contiguous()
    array, where = one.cpu().numpy(), f"torch on {task.device.type}"
    calls: dict[str, Callable[[], object]] = {f"teacher, {where}": lambda: task.teacher(one)}
    with tempfile.TemporaryDirectory() as temporary:
        float_onnx = _exported(task.teacher, Path(temporary) / "teacher.onnx", shape, {})
        if not float_onnx.reason:
            session = _session(Path(temporary) / float_onnx.name)
            calls["teacher, ONNX Runtime on cpu"] = lambda: session.run(None, {"images": array})
    students = []
    for learner in learners:
        say(f"measuring {learner.config.bits} on {len(pictures):,} held-out pictures")
        made, model, call = _student(task, plan, learner, folder, about, pictures, taught, names, shape)
        students.append(made)
        calls[f"{made.bits}, {where}"] = lambda model=model: model(one)
        if call is not None:
            calls[f"{made.bits}, ONNX Runtime on cpu"] = lambda call=call: call(array)
        say(f"{made.bits} agrees with the teacher on {made.agreement}; after rounding alone on {made.before}")
    own = None
    if task.digests["student"] != task.digests["teacher"]:
        own = FloatStudent(type(task.initial).__name__, parameter_count(task.initial), _float_bytes(task.initial))
    return Card(
        teacher=str(about.get("teacher", type(task.teacher).__name__)),
        parameters=parameter_count(task.teacher),
        float_bytes=_float_bytes(task.teacher),
        float_onnx=File(size=float_onnx.size, reason=float_onnx.reason),
        student=own,
        training_pictures=len(task.pictures.train),
        held_out_pictures=len(task.pictures.held_out),
        unreadable=len(task.pictures.unreadable),
        measured_pictures=len(pictures),
        taps=list(task.taps),
        preprocessing=task.preprocessing,
        classes=names,
        batch_size=task.batch_size,
        batches_share=_share_of_batches(learners),
        plan=plan,
        students=students,
        failed=failed,
        latency=latencies(calls, ROUNDS, task.device),
        machine=environment(task.device),
        written=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _share_of_batches(learners: Sequence[Learner]) -> float:
    data, whole = (sum(one.cost[name] for one in learners) for name in ("data_seconds", "training_seconds"))
    return data / whole


def _float_bytes(model: nn.Module) -> int:
    """Bytes of a network's weights and buffers."""
    state = (value for value in model.state_dict().values() if isinstance(value, torch.Tensor))
    return sum(value.numel() * value.element_size() for value in state)


def _student(
    task: Task,
    plan: Plan,
    learner: Learner,
    folder: Path,
    about: Mapping[str, Any],
    pictures: PictureSet,
    taught: torch.Tensor,
    names: Sequence[str],
    shape: tuple[int, int, int],
) -> tuple[StudentCard, nn.Module, Callable[[np.ndarray], np.ndarray] | None]:
    """The card of one student, the network of its packed file, and its ONNX file as a function, if it has one.

    The network of the packed file is what is measured.
    """
    bits = learner.config.bits
    stem = f"student-{bits.lower()}"
    metadata = {
        **about,
        "bits": bits,
        "classes": list(names),
        "preprocessing": asdict(task.preprocessing),
        "made_by": "faqd compress",
    }
    metadata["preprocessing"] |= {name: list(metadata["preprocessing"][name]) for name in ("mean", "std")}
    packed = save_packed(learner.model, folder / f"{stem}.safetensors", metadata=metadata)
    model = load_packed(packed, copy.deepcopy(task.initial).eval())
    logits = logits_of(model, pictures, task.normalizer)
    onnx = _exported(model, folder / f"{stem}.onnx", shape, metadata)
    run, through = None, None
    if not onnx.reason:
        session = _session(folder / onnx.name)

        def run(images: np.ndarray) -> np.ndarray:
            return session.run(None, {"images": images})[0]

        step = -(-len(pictures) // THROUGH_ONNX)
        images = (task.normalizer(some.to(task.device)) for some in thinned(pictures, THROUGH_ONNX).chunks(8))
        named = np.concatenate([run(some.contiguous().cpu().numpy()) for some in images])
        through = agreement(torch.from_numpy(named), logits[::step])
    before = agreement(logits_of(task.prepared[bits].eval(), pictures, task.normalizer), taught)
    by_class = agreement_by_class(logits, taught)
    bins, error = calibration(logits, taught)
    example = task.normalizer(pictures[:2].to(task.device))
    weighted = [name for name, module in model.named_modules() if isinstance(module, WEIGHTED)]
    made = StudentCard(
        bits=bits,
        learning_rate=plan.chosen[bits].learning_rate,
        affinity_weight=plan.chosen[bits].affinity_weight,
        agreement=agreement(logits, taught),
        before=before,
        by_class=[(names[number], share) for number, share in by_class.items()],
        bins=bins,
        calibration_error=error,
        packed=File(packed.name, packed.stat().st_size),
        onnx=onnx,
        onnx_agreement=through,
        kept=kept_float(describe(model, example), task.widths[bits], weighted),
        signs=[
            *failure_signs(learner, len(logits.argmax(1).unique()), len(taught.argmax(1).unique())),
            Sign("no gain", WITHOUT_GAIN, "yes" if agreement(logits, taught).count < before.count else "no"),
        ],
        differences=_differences(pictures, taught, logits, names),
        history=learner.history,
    )
    return made, model, run


def _exported(model: nn.Module, path: Path, shape: tuple[int, int, int], metadata: Mapping[str, Any]) -> File:
    try:
        export_onnx(model, path, shape, metadata=metadata)
    except OnnxExportError as error:
        return File(reason=str(error))
    return File(path.name, path.stat().st_size)


def _session(path: Path):
    """An ONNX Runtime session with as many threads as torch has."""
    import onnxruntime  # imported here because it takes seconds

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])


def kept_float(rows: Sequence[LayerBits], width: QuantizationConfig, weighted: Collection[str]) -> list[Kept]:
    """What stayed float, and why: one entry for all layers of one kind and reason.

    ``weighted``: names of the layers whose weights can be quantized; their classes may have names of their own.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.bits == FLOAT_BITS:
            reason = _why_float(row.kind, width, row.layer in weighted)
            found.setdefault((row.kind, reason), []).append(row.layer or "the network itself")
    return [Kept(kind, len(layers), layers[0], reason) for (kind, reason), layers in found.items()]


def _why_float(kind: str, width: QuantizationConfig, weighted: bool) -> str:
    if kind.endswith("()"):
        return "called as a function: only modules are quantized"
    for quantizable, what, bits in (
        (weighted, "weights", width.weight_bits),
        (kind in ("ReLU", "ReLU6"), "activations", width.activation_bits),
    ):
        if quantizable:
            return f"32 bits asked for {what}" if bits == FLOAT_BITS else "kept by policy (the last layer by default)"
    return "no quantizer for this kind"


def failure_signs(learner: Learner, named: int, by_teacher: int) -> list[Sign]:
    """The failure signs of :mod:`faqd_lib.reporting.signs` with agreement in place of accuracy, and a collapse.

    ``named`` and ``by_teacher`` are the numbers of classes that student and teacher name on held-out pictures.
    """
    bits, epochs = learner.config.bits, learner.config.optimization.epochs
    gaps = [
        {"run": bits, "method": "FAQD", "progress": row["epoch"] / epochs, "gap": 100 - row["test_accuracy"]}
        for row in learner.history
        if "test_accuracy" in row
    ]
    # What the sign reads of a run record.
    run = SimpleNamespace(run_id=bits, configuration=learner.config, history=learner.history)
    judged = {
        "plateau": signs.plateaus(pd.DataFrame(gaps, columns=["run", "method", "progress", "gap"])),
        "instability": signs.unstable(signs.stability_frame([run])),
    }
    fewest = {"plateau": f"{signs.FEWEST_EVALUATIONS} evaluations", "instability": "2 epochs"}
    found = []
    for name, (runs, with_it) in judged.items():
        verdict = ("yes" if with_it else "no") if runs else f"not judged: it needs {fewest[name]}"
        found.append(Sign(name, signs.SIGNS[name], verdict))
    return [*found, Sign("collapse", COLLAPSED, "yes" if named < COLLAPSE * by_teacher else "no")]


def _differences(
    pictures: PictureSet, taught: torch.Tensor, logits: torch.Tensor, names: Sequence[str]
) -> list[Difference]:
    """At most :data:`SHOWN` of the pictures named differently: those with the teacher's highest confidence."""
    confidence, named = taught.softmax(1).max(1)
    said = logits.argmax(1)
    places = (named != said).nonzero().flatten()
    places = places[confidence[places].argsort(descending=True, stable=True)][:SHOWN].tolist()
    return [
        Difference(pictures.name(place), names[int(named[place])], names[int(said[place])], _thumbnail(pictures, place))
        for place in places
    ]


def _thumbnail(pictures: PictureSet, place: int) -> str:
    picture = Image.fromarray(pictures[place : place + 1][0].permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def write(card: Card, folder: Path) -> None:
    """Write ``card.json``, ``card.md`` and ``index.html`` to a folder."""
    numbers = asdict(card) | {"plan": card.plan.model_dump(), "students": [_numbers(one) for one in card.students]}
    atomic_write_text(folder / "card.json", json.dumps(numbers, indent=1, ensure_ascii=False))
    pages = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [jinja2.PackageLoader(__package__), jinja2.PackageLoader(signs.__package__)]  # the style is the report's
        ),
        autoescape=jinja2.select_autoescape(["html"]), trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    pages.globals["style"] = Markup(pages.loader.get_source(pages, "style.css")[0])
    pages.filters["bytes"] = lambda size: f"{size / 1e6:.2f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
    for template, name in (("card.md", "card.md"), ("card.html", "index.html")):
        atomic_write_text(folder / name, pages.get_template(template).render(card=card, cells=_cells))


def _numbers(student: StudentCard) -> dict[str, Any]:
    """A student's card without pictures, with shares in percent and their intervals."""
    values = asdict(student) | {"differences": [one[:3] for one in student.differences]}
    for name in ("agreement", "before", "onnx_agreement"):
        share: Share | None = getattr(student, name)
        values[name] = share and {**share._asdict(), "percent": share.percent, "interval": share.interval}
    return values


def _cells(*values: object) -> str:
    """A row of a Markdown table, with bars escaped and line breaks made spaces."""
    lines = (" ".join(str(value).splitlines()) for value in values)
    return f"| {' | '.join(line.replace('|', chr(92) + '|') for line in lines)} |"
