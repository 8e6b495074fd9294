"""One call from a network and pictures to small files: the same bits after a kill and side by side, and bad input."""

import json
from pathlib import Path

import pytest
import torch
from conftest import Killed, killed_after, random_images
from PIL import Image
from torch import nn
from torch.nn.utils import prune

from faqd_lib import build_model, load_packed
from faqd_lib.compression import compress as module
from faqd_lib.compression import planning
from faqd_lib.compression.compress import MARKER, PLAN, compress
from faqd_lib.compression.planning import Candidate, Plan, Trial, best, candidates, trial_updates, updates_within
from faqd_lib.compression.task import CompressionError
from faqd_lib.compression.teachers import TeacherError
from faqd_lib.data.images import DatasetError
from faqd_lib.data.pictures import split_pictures
from faqd_lib.data.preprocessing import Preprocessing
from faqd_lib.utils.progress import Progress

SIZE = 16
PREPROCESSING = Preprocessing(SIZE, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
PIXELS = random_images(48, 3, SIZE, "train").pixels
QUICK = {"learning_rate": 0.02, "affinity_weight": 30.0, "batch_size": 16, "epochs": 1}


def network() -> nn.Sequential:
    """A small classifier of three classes that names each of them."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
        ).eval()  # fmt: skip
        logits = model(PREPROCESSING.normalizer("cpu")(PIXELS))
        model[-1].weight /= logits.std(0)[:, None]
        model[-1].bias.sub_(logits.mean(0)).div_(logits.std(0))
        return model


@pytest.fixture
def searching(monkeypatch):
    """Trainings of two updates are long enough for a search."""
    monkeypatch.setattr(planning, "FEWEST_UPDATES", 1)
    monkeypatch.setattr(planning, "SEARCH_SHARE", 10.0)


def run(out, *, teacher=None, images=PIXELS, say=lambda text: None, **options):
    return compress(
        network() if teacher is None else teacher,
        images,
        out=out,
        **{"preprocessing": PREPROCESSING, **QUICK, **options},
        say=say,
    )


def weights(result) -> dict[str, torch.Tensor]:
    return {
        f"{bits} {name}": value for bits, one in result.students.items() for name, value in one.state_dict().items()
    }


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_files_hold_the_student_and_the_card_its_numbers(tmp_path):
    teacher, said = network().train(), []
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    result = run(tmp_path / "out", teacher=teacher, bits=("1W32A",), classes=("a", "b", "c"), say=said.append)
    assert any("training mode" in line for line in said)
    assert teacher.training  # the caller's network stays as it was
    assert_same_bits(before, teacher.state_dict())
    assert any("maps compared: 2, 5" in line for line in said)
    (card,) = result.card.students
    loaded = load_packed(tmp_path / "out" / card.packed.name, network())
    held_out = PREPROCESSING.normalizer("cpu")(PIXELS[:8])
    assert torch.equal(loaded(held_out), result.students["1W32A"](held_out))
    assert card.packed.size < result.card.float_bytes
    assert card.agreement.total == result.card.held_out_pictures == 5
    assert card.onnx_agreement.percent == 100
    assert {one.kind: one.reason for one in card.kept}["ReLU"] == "32 bits asked for activations"
    text, page = ((tmp_path / "out" / name).read_text() for name in ("card.md", "index.html"))
    assert str(card.agreement) in text
    assert str(card.agreement) in page
    numbers = json.loads((tmp_path / "out" / "card.json").read_text())
    assert numbers["students"][0]["agreement"]["total"] == 5
    assert numbers["classes"] == ["a", "b", "c"]
    assert 0 < numbers["batches_share"] < 1
    assert f"Preparing batches took {100 * numbers['batches_share']:.1f} % of the training time." in text


def test_several_bits_are_trained_to_the_same_bits_as_each_alone(tmp_path):
    together = weights(run(tmp_path / "together", bits=("1W32A", "2W32A")))
    alone = weights(run(tmp_path / "1", weight_bits=1)) | weights(run(tmp_path / "2", weight_bits=2))
    assert_same_bits(together, alone)


def test_a_killed_call_goes_on_to_the_same_bits(tmp_path, monkeypatch, searching):
    options = {"epochs": 2, "learning_rate": None}
    whole = run(tmp_path / "whole", **options)
    monkeypatch.setattr(module, "due_every", lambda seconds: lambda: True)
    with killed_after(monkeypatch, module, 3):
        run(tmp_path / "killed", **options)
    assert not (tmp_path / "killed" / "card.md").exists()
    said = []
    again = run(tmp_path / "killed", say=said.append, **options)
    assert any("goes on from its checkpoint after step 3" in line for line in said)
    assert not any("search on" in line for line in said)  # the plan is read, not made again
    assert_same_bits(weights(whole), weights(again))
    files = ["student-1w32a.safetensors", "student-1w32a.onnx"]
    assert all((tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes() for name in files)


def test_a_finished_call_is_not_trained_again(tmp_path, monkeypatch):
    first = weights(run(tmp_path / "out"))
    monkeypatch.setattr(module.Learner, "step", None)
    assert_same_bits(first, weights(run(tmp_path / "out")))


def test_a_student_of_its_own_architecture(tmp_path):
    student = build_model("resnet8", 3)
    result = run(tmp_path / "out", student=student, student_taps=["layer1", "layer2"])
    assert type(result.students["1W32A"]).__name__ == "CifarResNet"
    own = sum(value.numel() * value.element_size() for value in student.state_dict().values())
    assert (result.card.student.name, result.card.student.size) == ("CifarResNet", own)
    text = (tmp_path / "out" / "card.md").read_text()
    assert f"| student, float | {own / 1e3:.1f} kB |  | {100 * own / result.card.float_bytes:.1f} % |" in text
    with pytest.raises(CompressionError, match=r"2 maps of the teacher .* cannot be compared with 3"):
        run(tmp_path / "other", student=student)


def test_folders_that_are_not_ours_are_refused_and_left_alone(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    with pytest.raises(CompressionError, match=r"not made by faqd compress \(it holds thesis.txt\)"):
        run(mine)
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]
    with pytest.raises(CompressionError, match="is a file"):
        run(mine / "thesis.txt")


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    run(tmp_path / "out")
    before = (tmp_path / "out" / MARKER).read_text()
    with pytest.raises(CompressionError, match=r"other settings \(epochs 1 then, 2 now\)"):
        run(tmp_path / "out", epochs=2)
    other = network()
    nn.init.zeros_(other[0].weight[0])
    with pytest.raises(CompressionError, match=r"other settings .*teacher"):
        run(tmp_path / "out", teacher=other)
    assert (tmp_path / "out" / MARKER).read_text() == before
    (tmp_path / "out" / PLAN).write_text("{")
    with pytest.raises(CompressionError, match=r"plan\.json is damaged"):
        run(tmp_path / "out")


def test_two_calls_into_one_folder(tmp_path):
    with (
        module._locked(module._claim(tmp_path / "out")),
        pytest.raises(CompressionError, match="another process compresses") as kept,
    ):
        run(tmp_path / "out")
    with module._locked(tmp_path / "out"):  # free again, though the traceback keeps the frames
        assert kept.tb is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": ("4A1W",)}, "bits must look like 1W4A"),
        ({"bits": ("9W4A",)}, "weight_bits = 9"),
        ({"bits": ("32W32A",)}, "quantizes nothing"),
        ({"epochs": 0}, "epochs must be a number above 0"),
        ({"hours": float("nan")}, "hours must be a number above 0"),
        ({"affinity_weight": -1}, "affinity_weight must be"),
        ({"held_out": 0}, "held_out must be"),
        ({"preprocessing": None}, "say what pictures the teacher expects"),
        ({"classes": ("a", "b")}, "2 names of classes, and the teacher has 3 logits"),
        ({"taps": ("nowhere",)}, "no module 'nowhere'"),
    ],
)
def test_settings_out_of_range(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", **options)


class Wrapped(nn.Module):
    """A network whose output is wrapped by a function."""

    def __init__(self, wrap) -> None:
        super().__init__()
        self.network, self.wrap = network(), wrap

    def forward(self, x):
        return self.wrap(self.network(x))


def with_nan() -> nn.Module:
    broken = network()
    with torch.no_grad():
        broken[3].weight[0, 0, 0, 0] = torch.nan
    return broken


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (Wrapped(lambda logits: (logits, logits)), "must return a tensor .*, got tuple"),
        (Wrapped(lambda logits: {"out": logits}), "got dict with the items out"),
        (Wrapped(lambda logits: logits[:, :1]), "at least 2 classes"),
        (Wrapped(lambda logits: logits.log() * torch.nan), "logits hold NaN"),
        (Wrapped(torch.zeros_like), "the same logits"),
        (with_nan(), r"the teacher's 3\.weight holds NaN"),
        (nn.Sequential(nn.Flatten(), nn.Linear(5, 3)), "takes no images .*: check the preprocessing"),
        (network().half(), r"takes no images .*: its weights are float16, give teacher\.float\(\)"),
    ],
    ids=["tuple", "dict", "one class", "NaN logits", "constant", "NaN weight", "other images", "half"],
)
def test_teachers_that_cannot_teach(tmp_path, teacher, message):
    with pytest.raises(TeacherError, match=message):
        run(tmp_path / "out", teacher=teacher.eval())


def save(folder: Path, pictures, name="{}.png") -> Path:
    folder.mkdir(parents=True)
    for index, picture in enumerate(pictures):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / name.format(index))
    return folder


@pytest.mark.parametrize(
    ("pictures", "message"),
    [([], "holds no picture"), ([PIXELS[0]] * 4, "all 4 pictures are equal"), ([PIXELS[0]], "one picture")],
    ids=["none", "identical", "one"],
)
def test_folders_from_which_nothing_is_learned(tmp_path, pictures, message):
    with pytest.raises(DatasetError, match=message):
        run(tmp_path / "out", images=save(tmp_path / "photos", pictures))


def test_unreadable_pictures_strange_names_and_fewer_than_a_batch(tmp_path):
    folder = save(tmp_path / "my photos – été", PIXELS[:12], "été {} ☀.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    said = []
    with pytest.raises(DatasetError, match="1 of 13 pictures cannot be decoded"):
        run(tmp_path / "out", images=folder)
    result = run(tmp_path / "out", images=folder, max_unreadable=0.1, learning_rate=None, say=said.append)
    assert any("left out: broken.jpg" in line for line in said)
    assert any("fewer training pictures than a batch of 16: a batch has 11" in line for line in said)
    assert any("search before it: none, the training is too short for one" in line for line in said)
    assert result.card.unreadable == 1


def test_a_link_to_a_folder_above(tmp_path):
    folder = save(tmp_path / "photos", PIXELS[:4])
    (folder / "again").symlink_to(folder)
    with pytest.raises(DatasetError, match="link to a folder above it"):
        run(tmp_path / "out", images=folder)


def test_pictures_of_another_size_and_kind(tmp_path):
    with pytest.raises(DatasetError, match="the pictures have 8 pixels, the preprocessing 16"):
        run(tmp_path / "out", images=random_images(8, 3, 8, "train").pixels)
    with pytest.raises(TypeError, match="images must be a folder"):
        run(tmp_path / "out", images=[1, 2])


def test_pictures_that_are_open_are_split_already(tmp_path):
    pictures = split_pictures(PIXELS, held_out=7)
    with pytest.raises(CompressionError, match="the pictures are open, with 7 held out: give held_out where"):
        run(tmp_path / "out", images=pictures, held_out=5)
    assert run(tmp_path / "out", images=pictures).card.held_out_pictures == 7


def test_a_student_that_does_not_stay_finite(tmp_path):
    with pytest.raises(CompressionError, match="no student stayed finite"):
        run(tmp_path / "out", learning_rate=1e30, epochs=3)


def test_one_student_that_fails_costs_no_other(tmp_path, monkeypatch, searching):
    """Of two widths, one has no finite candidate in the search, or loses itself in training."""
    original, said, lost = module._tried, [], ["2W32A"]

    def tried(task, group, *rest):
        trials = original(task, group, *rest)
        gone = {"agreement": None, "cross_entropy": None}
        return [one.model_copy(update=gone) if one.bits in lost else one for one in trials]

    monkeypatch.setattr(module, "_tried", tried)
    options = {"bits": ("1W32A", "2W32A"), "learning_rate": None, "affinity_weight": None}
    result = run(tmp_path / "search", say=said.append, **options)
    assert list(result.students) == ["1W32A"]
    assert list(result.failed) == ["2W32A"]
    assert "no learning rate of 0.001, 0.005, 0.02, 0.08 kept the loss finite" in result.failed["2W32A"]
    assert any(line.startswith("there is no student of 2W32A") for line in said)
    assert "**No student of 2W32A.** no learning rate" in (tmp_path / "search" / "card.md").read_text()
    assert "No student of 2W32A." in (tmp_path / "search" / "index.html").read_text()
    lost.append("1W32A")
    with pytest.raises(CompressionError, match="1W32A: no learning rate"):
        run(tmp_path / "none", **options | {"affinity_weight": 30.0})


def test_a_search_that_was_killed_goes_on(tmp_path, monkeypatch, searching):
    options = {"learning_rate": None, "affinity_weight": None}
    whole = run(tmp_path / "whole", **options)
    original, groups = module._tried, []

    def killed(task, group, *rest):
        if len(groups) == 2:
            raise Killed
        groups.append(group)
        return original(task, group, *rest)

    monkeypatch.setattr(module, "_tried", killed)
    with pytest.raises(Killed):
        run(tmp_path / "killed", **options)
    groups.clear()
    monkeypatch.setattr(
        module, "_tried", lambda task, group, *rest: groups.append(group) or original(task, group, *rest)
    )
    again = run(tmp_path / "killed", **options)
    assert len(groups) == 4  # of six candidates, two were tried before
    assert again.card.plan.trials == whole.card.plan.trials
    assert_same_bits(weights(whole), weights(again))


def test_dropout_draws_the_same_after_a_kill_and_beside_others(tmp_path, monkeypatch):
    teacher = network()
    teacher.insert(8, nn.Dropout(0.5))
    options = {"teacher": teacher.eval(), "epochs": 2}
    whole = run(tmp_path / "whole", **options)
    torch.manual_seed(123)
    beside = run(tmp_path / "beside", **options, bits=("2W32A", "1W32A"))
    assert_same_bits(weights(whole), {name: value for name, value in weights(beside).items() if name[0] == "1"})
    monkeypatch.setattr(module, "due_every", lambda seconds: lambda: True)
    with killed_after(monkeypatch, module, 1):
        run(tmp_path / "killed", **options)
    assert_same_bits(weights(whole), weights(run(tmp_path / "killed", **options)))


def test_dropout_before_a_batch_norm_draws_from_the_seed(tmp_path):
    teacher = network()
    teacher.insert(3, nn.Dropout(0.5))
    files = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        run(tmp_path / f"{seed}", teacher=teacher.eval(), affinity_weight=0.0)
        files.append((tmp_path / f"{seed}" / "student-1w32a.safetensors").read_bytes())
    assert files[0] == files[1]


def test_wrappers_of_teacher_and_student_are_left_out(tmp_path):
    def bare(model: nn.Module) -> nn.Module:
        return model

    files = []
    for wrap in (bare, nn.DataParallel):
        run(tmp_path / wrap.__name__, teacher=wrap(network()), student=wrap(network()), affinity_weight=0.0)
        files.append((tmp_path / wrap.__name__ / "student-1w32a.safetensors").read_bytes())
    assert files[0] == files[1]


class OwnLinear(nn.Linear):
    pass


def test_a_layer_of_ones_own_class_is_kept_by_policy(tmp_path):
    teacher = network()
    last = teacher[-1]
    teacher[-1] = OwnLinear(8, 3)
    teacher[-1].load_state_dict(last.state_dict())
    (card,) = run(tmp_path / "out", teacher=teacher.eval(), affinity_weight=0.0).card.students
    assert {one.kind: one.reason for one in card.kept}["OwnLinear"].startswith("kept by policy")


def pruned() -> nn.Module:
    model = network()
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def with_scale() -> nn.Module:
    model = network()
    model[0].register_buffer("scale", torch.tensor(1.0))
    return model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": pruned()}, r"the teacher cannot be copied: the weight of 0 .*prune\.remove"),
        ({"student": pruned()}, r"the student cannot be copied: the weight of 0 .*prune\.remove"),
        ({"teacher": with_scale()}, r"under the name 0\.scale: rename"),
        ({"teacher": nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, 3))}, "With affinity_weight=0 logits alone"),
    ],
    ids=["pruned teacher", "pruned student", "own scale", "no maps"],
)
def test_networks_that_cannot_be_compressed_are_refused_before_training(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(module.Learner, "step", None)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", **options)


def test_logits_alone_need_no_maps(tmp_path):
    torch.manual_seed(0)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    result = run(tmp_path / "out", teacher=flat, affinity_weight=0.0)
    assert result.card.taps == []
    text = (tmp_path / "out" / "card.md").read_text()
    assert "squared error of logits.\n" in text
    assert "feature affinity at" not in text


def test_the_budget():
    assert updates_within(2.5, None, 10, 1.0, 0) == 25
    assert updates_within(None, None, 10, 1.0, 0) == 50
    assert updates_within(None, 3600.0, 10, 2.0, 0) == 1800
    assert updates_within(None, 3600.0, 10, 2.0, 5) == 1500  # a sixth of the time is for the search
    assert updates_within(5, 3600.0, 10, 2.0, 5) == 50
    assert updates_within(None, 0.0, 10, 2.0, 5) == 1
    assert updates_within(None, 700.0, 10, 1.0, 5) == 700  # no search: a candidate would have 23 updates
    assert updates_within(None, 100_000.0, 10, 1.0, 5) == 97_500  # no candidate has more than 500 updates
    assert trial_updates(1000, 5) == 40
    assert trial_updates(600, 5) == trial_updates(1000, 0) == 0
    plan = Plan(updates=25, steps_per_epoch=10, seconds=1.0)
    assert plan.epochs == 3


def test_progress_counts_each_update_once(monkeypatch):
    """Of 24 updates, 4 are an earlier call's and an epoch of 10 is counted: at update 17 of all, 13 of 20 are done."""
    monkeypatch.setattr(module, "due_every", lambda seconds: lambda: True)
    progress = Progress(24, "compress", bar=False)
    progress.skip(4)
    progress.advance(6, "epoch 1")
    module._steps_shown(progress, 10, 24, "1W4A", begun=4)(1, 7)
    assert (progress.done + sum(progress._begun.values()), progress.total) == (13, 20)


def test_candidates_and_the_best():
    first, second = candidates(["1W4A"], None, None)
    assert [one.learning_rate for one in first] == [0.001, 0.005, 0.02, 0.08]
    assert {one.affinity_weight for one in first} == {30.0}
    assert second == [Candidate("1W4A", 0.0, 3.0), Candidate("1W4A", 0.0, 300.0)]
    assert candidates(["1W4A"], 0.1, 1.0) == []

    def trial(rate, weight, agreement, cross_entropy=1.0, bits="1W4A"):
        return Trial(
            bits=bits, learning_rate=rate, affinity_weight=weight, updates=8, pictures=100, agreement=agreement,
            cross_entropy=cross_entropy,
        )  # fmt: skip

    trials = [trial(0.005, 30.0, 60.0), trial(0.02, 30.0, 80.0), trial(0.08, 30.0, None, None)]
    assert best(trials, "1W4A") == trials[1]
    assert best([*trials, trial(0.08, 30.0, 80.0, 0.5)], "1W4A").learning_rate == 0.08
    # The standard error of 80 % of 100 is 4 points.
    assert best([*trials, trial(0.02, 300.0, 83.9)], "1W4A").affinity_weight == 30
    assert best([*trials, trial(0.02, 300.0, 84.1)], "1W4A").affinity_weight == 300
    assert best(trials[2:], "1W4A") is None


def test_hours_set_the_number_of_updates(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_seconds_of_an_update", lambda task, batches: (100.0, 0.0))
    run(tmp_path / "out", epochs=None, hours=499 / 3600)  # 99 s are enough to come so far
    assert json.loads((tmp_path / "out" / PLAN).read_text())["updates"] == 4


def test_a_teacher_that_names_one_class_is_told(tmp_path):
    teacher = network()
    teacher[-1].bias.data[1] = 100
    result = run(tmp_path / "out", teacher=teacher)
    assert result.card.students[0].agreement.percent == 100
    wanted = "The teacher names 1 of 3 classes on the held-out pictures, so that agreement says nothing"
    assert all(wanted in (tmp_path / "out" / name).read_text() for name in ("card.md", "index.html"))


def test_pictures_that_differ_are_shown(tmp_path):
    student = build_model("resnet8", 3)
    options = {"student_taps": ["layer1", "layer2"], "held_out": 20, "learning_rate": 1e-9}
    result = run(tmp_path / "out", student=student, classes=("<a>", "b", "c"), **options)
    (card,) = result.card.students
    differing = card.agreement.total - card.agreement.count
    assert len(card.differences) == min(12, differing) > 0
    assert all(one.teacher != one.student for one in card.differences)
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == len(card.differences)
    assert "<a>" not in page  # names are escaped
    assert "&lt;a&gt;" in page
