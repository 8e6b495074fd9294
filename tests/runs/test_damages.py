"""A thousand random damages to records, weights, checkpoints, packed files and decoded images.

Each is detected or harmless: what is read equals what was written, or an error or warning of the reader names the file.
"""

import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_data, make_tiny_suite
from PIL import Image

from faqd_lib.data import datasets
from faqd_lib.export.packed import PackedFileError, load_packed, save_packed
from faqd_lib.models import build_model
from faqd_lib.quantization.network import quantize
from faqd_lib.runs.checkpoints import NAMES, CheckpointInfo, CheckpointWarning, read_checkpoint, write_checkpoint
from faqd_lib.runs.store import DamagedRecordWarning, ResultsError

DAMAGES = 200  # of each of the five kinds of file


def damages(content: bytes, other: bytes) -> Iterator[bytes]:
    """Flipped bits, cut ends, pieces of another file of the same kind, inserted bytes, and that file as a whole."""
    draw = random.Random(0)
    yield other
    for _ in range(DAMAGES - 1):
        place = draw.randrange(len(content))
        kind = draw.choice(("flip", "flip", "cut", "piece", "insert"))
        if kind == "flip":
            yield content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]
        elif kind == "cut":
            yield content[:place]
        elif kind == "insert":
            yield content[:place] + draw.randbytes(draw.randrange(1, 9)) + content[place:]
        else:
            piece = other[place : place + draw.randrange(1, 400)]
            yield content[:place] + piece + content[place + len(piece) :]


def outcomes(path: Path, other: bytes, read: Callable[[], object], equal: Callable[[object], bool]) -> Counter[str]:
    """Damage a file again and again, and read it; ``read`` returns a message where the reader detected the damage."""
    found: Counter[str] = Counter()
    content = path.read_bytes()
    for damaged in damages(content, other):
        path.write_bytes(damaged)
        value = read()
        if isinstance(value, str):
            assert path.name in value
            found["detected"] += 1
        else:
            assert equal(value), f"a damage of {path.name} went unnoticed"
            found["harmless"] += 1
    path.write_bytes(content)
    assert equal(read())
    assert sum(found.values()) == DAMAGES
    assert found["detected"] > DAMAGES / 2
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    suite = make_tiny_suite(tmp_path_factory.mktemp("damages") / "s", make_tiny_data())
    configs = [suite.student("labels", weight_bits=bits) for bits in (1, 2)]
    suite.run(configs)
    return suite, configs


def test_records(trained):
    suite, (config, other) = trained
    path, others = (suite.store.run_folder(each) / "record.json" for each in (config, other))
    expected = suite.store.record(config)

    def read():
        with warnings.catch_warnings():
            warnings.simplefilter("error", DamagedRecordWarning)
            try:
                return suite.store.record(config)
            except (ResultsError, DamagedRecordWarning) as error:
                return str(error)

    outcomes(path, others.read_bytes(), read, lambda value: value == expected)


def test_weights(trained):
    suite, (config, other) = trained
    path, others = (suite.store.run_folder(each) / "weights.safetensors" for each in (config, other))
    expected = suite.model(config).state_dict()

    def read():
        try:
            return suite.model(config).state_dict()
        except ResultsError as error:
            return str(error)

    outcomes(path, others.read_bytes(), read, lambda value: same(value, expected))


def test_checkpoints(tmp_path):
    digest = "a" * 64
    info = CheckpointInfo(
        digest=digest, steps=1, checked=1, history=[{"epoch": 1.0}], peak_bytes=1, data_seconds=0.1,
        teacher_seconds=0.2, environment={"torch": "2"},
    )  # fmt: skip
    states = [({"w": torch.full((50,), float(steps))}, info.model_copy(update={"steps": steps})) for steps in (1, 2)]
    foreign = tmp_path / "foreign"
    write_checkpoint(foreign, states[0][0], info.model_copy(update={"digest": "b" * 64}))
    folder = tmp_path / "run"
    for tensors, facts in states:
        write_checkpoint(folder, tensors, facts)
    whole = {name: (folder / name).read_bytes() for name in NAMES}

    def read():
        (folder / NAMES[1]).write_bytes(whole[NAMES[1]])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tensors, facts = read_checkpoint(folder, digest)
        if facts == states[1][1]:
            return tensors
        # Detected: the previous one is read, and the damaged one is renamed, not removed.
        assert (facts, same(tensors, states[0][0])) == (states[0][1], True)
        (moved,) = folder.glob("*damaged*")
        moved.unlink()
        (warning,) = caught
        assert issubclass(warning.category, CheckpointWarning)
        return str(warning.message)

    outcomes(folder / NAMES[0], (foreign / NAMES[0]).read_bytes(), read, lambda value: same(value, states[1][0]))


def test_packed_files(tmp_path):
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    network = quantize(build_model("resnet8", 10, seed=1), weight_bits=2).eval()
    path = save_packed(network, tmp_path / "network.safetensors")
    other = save_packed(quantize(build_model("resnet20", 10), weight_bits=1), tmp_path / "other.safetensors")

    def read():
        try:
            with torch.no_grad():
                return load_packed(path, build_model("resnet8", 10))(images)
        except PackedFileError as error:
            return str(error)

    with torch.no_grad():
        expected = network(images)
    outcomes(path, other.read_bytes(), read, lambda value: torch.equal(value, expected))


def test_decoded_images(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAQD_CACHE", str(tmp_path / "cache"))
    for colour, name in enumerate(("one", "two")):
        for place in ("train/a", "train/b", "test/a", "test/b"):
            (tmp_path / name / place).mkdir(parents=True)
            Image.new("RGB", (8, 8), (colour, 100, len(place))).save(tmp_path / name / place / "0.png")
    expected = [datasets.load(name, tmp_path) for name in ("one", "two")]
    file, other = sorted((tmp_path / "cache").glob("*.safetensors"))

    def read():
        found = datasets.load("one", tmp_path)
        assert found.fingerprint == expected[0].fingerprint  # in any case: the pictures are decoded again
        return capsys.readouterr().out or found

    outcomes(file, other.read_bytes(), read, lambda value: torch.equal(value.train.pixels, expected[0].train.pixels))


def same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)
