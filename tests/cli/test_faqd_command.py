"""The command ``faqd``: from a folder of pictures to files, looking into them, running them; errors in one line."""

import sys
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from conftest import random_images
from PIL import Image
from safetensors.torch import save_file

from faqd_lib import build_model, cli, quantize, save_packed
from faqd_lib.cli.faqd import _preprocessing, _spec, main, parser
from faqd_lib.compression import teachers
from faqd_lib.compression.teachers import TeacherError, load_teacher, load_weights
from faqd_lib.data.preprocessing import Preprocessing

TEACHER = ["--teacher", "faqd_lib.models:build_model", "name=resnet8", "num_classes=3"]
PREPROCESSING = ["--image-size", "16", "--mean", "0.5", "0.5", "0.5", "--std", "0.25", "0.25", "0.25"]
FAST = ["--learning-rate", "0.02", "--affinity-weight", "30", "--epochs", "1", "--batch-size", "8"]


def save_pictures(folder: Path) -> Path:
    folder.mkdir()
    for index, picture in enumerate(random_images(20, 3, 24, "train").pixels):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{index}.jpg")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with pictures, weights of a teacher, names of classes, and what the command makes of them."""
    place = tmp_path_factory.mktemp("faqd")
    save_pictures(place / "my photos")
    save_file(build_model("resnet8", 3, seed=5).state_dict(), place / "teacher.safetensors")
    (place / "classes.txt").write_text("ant\nbee\ncat\n")
    command = ["compress", *TEACHER, "--weights", str(place / "teacher.safetensors"), *PREPROCESSING, *FAST]
    command += ["--images", str(place / "my photos"), "--classes", str(place / "classes.txt"), "--held-out", "4"]
    assert main([*command, "--out", str(place / "out")]) == 0
    return place


def test_compress_writes_files_and_says_what_they_are_worth(made, capsys):
    names = {path.name for path in (made / "out").iterdir()}
    assert names >= {"student-1w32a.safetensors", "student-1w32a.onnx", "card.md", "index.html", "card.json"}
    assert "faqd_lib.models:build_model at 1W32A" in (made / "out" / "card.md").read_text()


def test_inspect(made, capsys):
    assert main(["inspect", str(made / "out" / "student-1w32a.safetensors")]) == 0
    packed = capsys.readouterr().out
    assert "faqd-packed-1" in packed
    assert "layer1.0.conv1: 16 × 16 × 3 × 3 at 1 bit, 288 bytes" in packed
    assert 'classes: ["ant", "bee", "cat"]' in packed
    assert main(["inspect", str(made / "out" / "student-1w32a.onnx")]) == 0
    graph = capsys.readouterr().out
    assert "input images: N × 3 × 16 × 16" in graph
    assert "INT2" in graph
    assert "Conv" in graph


def test_classify_says_the_same_from_both_files(made, capsys):
    pictures = [str(made / "my photos" / f"{index}.jpg") for index in range(3)]
    network = ["--network", *TEACHER[1:]]
    assert main(["classify", str(made / "out" / "student-1w32a.onnx"), *pictures, "--top", "2"]) == 0
    by_onnx = capsys.readouterr().out
    assert main(["classify", str(made / "out" / "student-1w32a.safetensors"), *pictures, "--top", "2", *network]) == 0
    assert capsys.readouterr().out == by_onnx
    lines = by_onnx.splitlines()
    assert len(lines) == 3
    assert {word.split()[0] for line in lines for word in line.rpartition(": ")[2].split(", ")} <= {"ant", "bee", "cat"}


def test_another_student_begins_with_the_same_weights_in_every_call(made, tmp_path, capsys):
    torch.save(build_model("resnet8", 3, seed=5).state_dict(), tmp_path / "teacher.pth")
    command = ["compress", *TEACHER, "--weights", str(tmp_path / "teacher.pth"), *PREPROCESSING, *FAST]
    command += ["--student", "faqd_lib.models:build_model", "name=resnet8", "num_classes=3"]
    command += ["--images", str(made / "my photos"), "--out", str(tmp_path / "out"), "--held-out", "4"]
    assert main(command) == 0
    assert "the student is a CifarResNet" in capsys.readouterr().out
    assert main(command) == 0
    assert "goes on from its checkpoint" in capsys.readouterr().out


def test_classify_takes_folders_and_goes_on_after_a_damaged_picture(made, tmp_path, capsys):
    save_pictures(tmp_path / "some")
    (tmp_path / "some" / "1.jpg").write_bytes(b"not a picture")
    assert main(["classify", str(made / "out" / "student-1w32a.onnx"), str(tmp_path / "some")]) == 1
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 19
    assert f"{tmp_path / 'some' / '1.jpg'} is not a picture" in said.err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["inspect", "{}/nothing.onnx"], "there is no file"),
        (["inspect", "{}/classes.txt"], "damaged or not a safetensors file"),
        (["inspect", "{}/teacher.safetensors"], "must be a packed network"),
        (["classify", "{}/out/student-1w32a.safetensors", "x.jpg"], "from faqd_lib.models:build_model name=resnet8"),
        (["classify", "{}/out/student-1w32a.onnx", "{}/classes.txt"], "not a picture"),
        (["classify", "{}/out/student-1w32a.onnx", "x.jpg", "--top", "0"], "--top must be"),
        (["classify", "{}/out/student-1w32a.onnx", "{}/my photos", "--image-size", "24"], "leave out --image-size"),
        (["compress", "--teacher", "nothing", "--images", "{}", "--out", "{}/o"], "a teacher must be timm:NAME"),
        (["compress", "--teacher", "no_such:f", "--images", "{}", "--out", "{}/o"], "there is no module 'no_such'"),
        (["compress", "--teacher", "torchvision:resnet18", "--images", "{}", "--out", "{}/o"], "random weights"),
        (["compress", *TEACHER, "--images", "{}", "--out", "{}/o"], "--image-size, --mean and --std"),
        (["compress", *TEACHER, *PREPROCESSING, "--images", "{}/none", "--out", "{}/o"], "cannot be read"),
        (["compress", *TEACHER, *PREPROCESSING, "--images", "{}/out", "--out", "{}/my photos"], "not made by faqd"),
        (["compress", *TEACHER, "depth", *PREPROCESSING, "--images", "{}", "--out", "{}/o"], "must be name=value"),
    ],
)
def test_errors_are_one_line(made, command, message, capsys):
    assert main([word.replace("{}", str(made)) for word in command]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (made / "o" / "card.md").exists()


def test_an_onnx_file_may_take_pictures_of_any_size(made, tmp_path, capsys):
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("GlobalAveragePool", ["images"], ["pooled"]),
            onnx.helper.make_node("Flatten", ["pooled"], ["logits"]),
        ],
        "any",
        [onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["N", 3])],
    )
    opset = onnx.helper.make_opsetid("", 17)
    onnx.save(onnx.helper.make_model(graph, ir_version=9, opset_imports=[opset]), tmp_path / "any.onnx")
    assert main(["classify", str(tmp_path / "any.onnx"), str(made / "my photos"), *PREPROCESSING]) == 0
    assert "%" in capsys.readouterr().out


def test_options_change_a_known_preprocessing():
    known = Preprocessing(224, resize_size=256)

    def given(*words: str) -> Preprocessing:
        command = ["compress", "--teacher", "x", "--images", "x", "--out", "x", *words]
        return _preprocessing(parser().parse_args(command), lambda: known)

    assert given() == known
    assert given("--image-size", "64") == Preprocessing(64)
    assert given("--image-size", "64", "--resize-size", "72") == Preprocessing(64, resize_size=72)
    assert given("--interpolation", "bicubic") == Preprocessing(224, resize_size=256, interpolation="bicubic")
    assert given(*PREPROCESSING) == Preprocessing(16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def test_damaged_onnx_files(tmp_path, capsys):
    (tmp_path / "x.onnx").write_bytes(b"\x08not")
    assert main(["inspect", str(tmp_path / "x.onnx")]) == 1
    assert "damaged or no ONNX file" in capsys.readouterr().err
    assert main(["classify", str(tmp_path / "x.onnx"), "x.jpg"]) == 1
    assert "damaged" in capsys.readouterr().err


def test_an_onnx_file_of_another_tool_needs_its_preprocessing(made, tmp_path, capsys):
    model = onnx.load(made / "out" / "student-1w32a.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "bare.onnx")
    picture = str(made / "my photos" / "0.jpg")
    assert main(["classify", str(tmp_path / "bare.onnx"), picture]) == 1
    assert "say what pictures the network expects" in capsys.readouterr().err
    assert main(["classify", str(tmp_path / "bare.onnx"), picture, *PREPROCESSING]) == 0
    assert capsys.readouterr().out.rpartition(": ")[2].split()[0] in ("0", "1", "2")


def test_series_is_run_all(monkeypatch):
    stub = SimpleNamespace(main=lambda argv: 7 if argv == ["smoke", "--only", "00"] else 0)
    monkeypatch.setitem(sys.modules, "faqd_lib.cli.run_all", stub)  # the module takes seconds to import
    monkeypatch.setattr(cli, "run_all", stub, raising=False)
    assert main(["series", "smoke", "--only", "00"]) == 7


def test_specs():
    assert _spec(["a:b", "depth=3", "name=resnet8", "flag=True"]) == (
        "a:b",
        {"depth": 3, "name": "resnet8", "flag": True},
    )


def test_a_module_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_own_networks.py").write_text(
        "import torch\ndef small(classes):\n    return torch.nn.Linear(2, classes)\nnumber = 3\n"
        "def nothing():\n    return 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_teacher("my_own_networks:small", classes=4).out_features == 4
    with pytest.raises(TeacherError, match=r"no function 'smal' \(did you mean 'small'\?\)"):
        load_teacher("my_own_networks:smal")
    with pytest.raises(TeacherError, match=r"cannot be built \(TypeError"):
        load_teacher("my_own_networks:small", depth=4)
    with pytest.raises(TeacherError, match=r"must return a torch\.nn\.Module, got int"):
        load_teacher("my_own_networks:nothing")
    sys.modules.pop("my_own_networks")


def test_weights_that_do_not_fit_are_named(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    state = model.state_dict()
    save_file({**state, "extra": torch.zeros(1)}, tmp_path / "extra.safetensors")
    with pytest.raises(TeacherError, match=r"not in the network: extra$"):
        load_weights(model, tmp_path / "extra.safetensors")
    save_file({name: value for name, value in state.items() if name != "1.bias"}, tmp_path / "missing.safetensors")
    with pytest.raises(TeacherError, match=r"missing in the file: 1\.bias$"):
        load_weights(model, tmp_path / "missing.safetensors")
    save_file({**state, "1.weight": torch.zeros(5, 3)}, tmp_path / "shape.safetensors")
    with pytest.raises(TeacherError, match=r"1\.weight: \(5, 3\) in the file, \(2, 3\) in the network.*num_classes"):
        load_weights(model, tmp_path / "shape.safetensors")
    torch.save(state, tmp_path / "weights.pth")
    load_weights(model, tmp_path / "weights.pth")
    torch.save({"epoch": 3, "model": state}, tmp_path / "checkpoint.pth")
    with pytest.raises(
        TeacherError, match=r"must hold a state_dict, got dict with the items epoch, model: save weights"
    ):
        load_weights(model, tmp_path / "checkpoint.pth")
    torch.save(model, tmp_path / "model.pth")
    with pytest.raises(TeacherError, match=r"holds more than tensors, .*: save weights by"):
        load_weights(model, tmp_path / "model.pth")
    (tmp_path / "text.safetensors").write_text("text")
    with pytest.raises(TeacherError, match="is damaged, holds more than tensors, or is no file of weights"):
        load_weights(model, tmp_path / "text.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_weights(model, tmp_path / "none.safetensors")


def test_torchvision_teachers(tmp_path):
    model = teachers.build_network("torchvision:mobilenet_v2", num_classes=4)
    save_file(model.state_dict(), tmp_path / "mobile.safetensors")
    loaded = load_teacher("torchvision:mobilenet_v2", tmp_path / "mobile.safetensors", num_classes=4)
    assert torch.equal(loaded.classifier[1].weight, model.classifier[1].weight)
    assert not loaded.training
    with pytest.raises(TeacherError, match=r"no classifier 'resnet81' \(did you mean 'resnet18'\?\)"):
        teachers.build_network("torchvision:resnet81")
    with pytest.raises(TeacherError, match="weights of resnet18 are IMAGENET1K_V1"):
        load_teacher("torchvision:resnet18:V9", pretrained=True)
    with pytest.raises(TeacherError, match="not by both"):
        load_teacher("torchvision:resnet18", tmp_path / "mobile.safetensors", pretrained=True)


def test_classify_builds_the_network_that_a_file_names_without_its_weights(made, tmp_path, capsys):
    """Tests reach no other machine: a download would fail."""
    model = quantize(teachers.build_network("torchvision:mobilenet_v2", num_classes=4, width_mult=0.1), weight_bits=1)
    about = {
        "student": "torchvision:mobilenet_v2",
        "student_arguments": {"num_classes": 4, "width_mult": 0.1, "weights": "DEFAULT"},
        "teacher": "torchvision:resnet18",
        "preprocessing": {"image_size": 32, "mean": [0.5] * 3, "std": [0.25] * 3},
    }
    path = save_packed(model, tmp_path / "small.safetensors", metadata=about)
    picture = str(made / "my photos" / "0.jpg")
    assert main(["classify", str(path), picture]) == 0
    assert capsys.readouterr().out.rpartition(": ")[2].split()[0] in ("0", "1", "2", "3")
    network = ["--network", "torchvision:mobilenet_v2", "weights=DEFAULT"]
    assert main(["classify", str(path), picture, *network]) == 1
    assert "built with random weights here: leave out weights" in capsys.readouterr().err


def test_a_second_call_goes_on(made, capsys):
    command = ["compress", *TEACHER, "--weights", str(made / "teacher.safetensors"), *PREPROCESSING, *FAST]
    command += ["--images", str(made / "my photos"), "--held-out", "4", "--out", str(made / "out")]
    assert main([*command, "--epochs", "2"]) == 1
    assert "other settings (epochs 1.0 then, 2.0 now)" in capsys.readouterr().err
    assert main(command) == 0
    assert "goes on from its checkpoint after step 2" in capsys.readouterr().out
