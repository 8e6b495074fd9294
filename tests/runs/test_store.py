"""Records and weights: written whole, read back the same, refused when damaged or of something else."""

import json
import math

import pytest
import torch

from faqd_lib.config import RunConfig
from faqd_lib.models import build_model
from faqd_lib.quantization.network import quantize
from faqd_lib.runs.store import (
    DamagedRecordError,
    DamagedRecordWarning,
    ResultsError,
    RunStore,
    accuracies,
    read_record,
)
from faqd_lib.utils.files import canonical_json, text_digest

HISTORY = [
    {"epoch": 1, "loss": 2.0, "test_accuracy": 30.0, "validation_accuracy": 31.0},
    {"epoch": 2, "loss": 1.5, "test_accuracy": 50.0, "validation_accuracy": 44.0},
    {"epoch": 3, "loss": 0.1 + 0.2, "test_accuracy": 45.0, "validation_accuracy": 47.0},
]


def fields(**changes) -> dict:
    return {
        "history": HISTORY,
        **accuracies(HISTORY),
        "test_images": 24,
        "parameters": 7,
        "weight_bytes": 1.5,
        "cost": {"training_seconds": 0.1},
        "environment": {"torch": torch.__version__, "cores": 2},
        "dataset_note": "ä note",
        "predictions": torch.arange(24) % 5,
        "labels": torch.arange(24) % 4,
        **changes,
    }


def sealed(content: dict) -> dict:
    """With the checksum that fits, as if it had been written so."""
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return {**rest, "checksum": text_digest(canonical_json(rest))}


@pytest.fixture
def store(tmp_path) -> RunStore:
    return RunStore(tmp_path / "suite")


@pytest.fixture
def saved(store, run_config):
    model = quantize(build_model("resnet8", 3, seed=5), 2)
    return store.save(run_config, model, **fields()), model


def test_record_and_weights_come_back_the_same(store, run_config, saved):
    record, model = saved
    assert store.record(run_config) == record
    assert record.history == HISTORY
    assert record.configuration == run_config
    again = store.load_weights(run_config, quantize(build_model("resnet8", 3, seed=6), 2))
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    kept = store.predictions(record)
    assert kept["predicted"].tolist() == [i % 5 for i in range(24)]
    assert kept["label"].tolist() == [i % 4 for i in range(24)]
    names = sorted(p.name for p in store.run_folder(run_config).iterdir())
    assert names == ["predictions.safetensors", "record.json", "weights.safetensors"]
    # JSON that any other program reads, too: no NaN, no pickle.
    content = json.loads((store.run_folder(run_config) / "record.json").read_text("utf-8"))
    assert content["last_accuracy"] == 45.0
    assert content["dataset_note"] == "ä note"


def test_records_lists_every_finished_run(store, run_config, saved):
    other = run_config.model_copy(update={"seed": 4})
    store.save(other, saved[1], **fields())
    (store.folder / "runs" / "unfinished").mkdir()
    assert [record.run_id for record in store.records()] == sorted([run_config.run_id, other.run_id])
    assert RunStore(store.folder / "elsewhere").records() == []


def test_no_record_is_no_run(store, run_config, saved):
    other = run_config.model_copy(update={"seed": 1})
    assert store.record(other) is None
    with pytest.raises(ResultsError, match=f"{other.run_id}.*has not been trained"):
        store.load_weights(other, saved[1])
    # Weights without a record are those of a run that was killed in between.
    (store.run_folder(run_config) / "record.json").unlink()
    assert store.record(run_config) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: text.replace('"last_accuracy"', '"last_acuracy"'),
        lambda text: text.replace("45.0", '"45"'),
        lambda text: text.replace('"weight_bits": 32', '"weight_bits": 3'),
    ],
)
def test_damaged_record_is_named(store, run_config, saved, damage):
    path = store.run_folder(run_config) / "record.json"
    changed = damage(path.read_text("utf-8"))
    assert changed != path.read_text("utf-8")
    path.write_text(changed, "utf-8")
    with pytest.raises(DamagedRecordError, match="damaged") as raised:
        read_record(path)
    assert str(path) in str(raised.value)
    with pytest.warns(DamagedRecordWarning, match="damaged.*counts as not trained"):
        assert store.record(run_config) is None
    assert path.read_text("utf-8") == changed  # looking at it changes nothing
    store.save(run_config, saved[1], **fields())
    assert path.with_name("record.damaged-1.json").read_text("utf-8") == changed
    assert len(store.records()) == 1


@pytest.mark.parametrize("position", [0, 100, 1000, -3])
def test_one_bit_of_a_record_is_noticed(store, run_config, saved, position):
    path = store.run_folder(run_config) / "record.json"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.warns(DamagedRecordWarning, match="damaged"):
        assert store.records() == []


def test_record_that_is_no_text_is_named(store, run_config, saved):
    path = store.run_folder(run_config) / "record.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.warns(DamagedRecordWarning, match="damaged"):
        assert store.record(run_config) is None


@pytest.mark.parametrize("version", ["earlier", "later"])
def test_record_of_another_version_is_refused(store, run_config, saved, version):
    path = store.run_folder(run_config) / "record.json"
    content = json.loads(path.read_text("utf-8"))
    if version == "later":
        content = sealed(content | {"from_the_future": 1})
    else:
        del content["checksum"]
    path.write_text(json.dumps(content), "utf-8")
    for call in (lambda: store.record(run_config), store.records):
        with pytest.raises(ResultsError, match="another version") as raised:
            call()
        assert str(path) in str(raised.value)
        assert "trained again" in str(raised.value)


def test_record_of_another_configuration_is_refused(store, run_config, saved):
    other = run_config.model_copy(update={"seed": 1})
    store.run_folder(run_config).rename(store.run_folder(other))
    with pytest.raises(ResultsError, match="another configuration") as raised:
        store.record(other)
    assert run_config.digest[:12] in str(raised.value)
    assert other.digest[:12] in str(raised.value)


def test_edited_configuration_in_a_record_is_refused(store, run_config, saved):
    path = store.run_folder(run_config) / "record.json"
    content = json.loads(path.read_text("utf-8"))
    content["configuration"]["optimization"]["epochs"] = 200
    path.write_text(json.dumps(sealed(content)), "utf-8")
    with pytest.raises(ResultsError, match="another configuration"):
        store.record(run_config)


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "one bit", "other weights"])
def test_damaged_weights_are_named(store, run_config, saved, damage):
    path = store.run_folder(run_config) / "weights.safetensors"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "other weights":
        other = run_config.model_copy(update={"seed": 1})
        store.save(other, quantize(build_model("resnet8", 3, seed=9), 2), **fields())
        path.write_bytes((store.run_folder(other) / "weights.safetensors").read_bytes())
    else:
        changed = {"truncated": content[:-8], "empty": b"", "one bit": content[:-1] + bytes([content[-1] ^ 1])}
        path.write_bytes(changed[damage])
    with pytest.raises(ResultsError, match=r"weights\.safetensors") as raised:
        store.load_weights(run_config, quantize(build_model("resnet8", 3), 2))
    assert str(path.parent) in str(raised.value)
    assert "train the run again" in str(raised.value)


def test_a_failing_save_leaves_the_finished_run(store, run_config, saved, monkeypatch):
    def fail(tensors, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("faqd_lib.runs.store.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        store.save(run_config, build_model("resnet8", 3), **fields(last_accuracy=1.0))
    monkeypatch.undo()
    assert store.record(run_config) == saved[0]
    store.load_weights(run_config, quantize(build_model("resnet8", 3), 2))
    assert len(list(store.run_folder(run_config).iterdir())) == 3


def test_unwritable_results_are_named(tmp_path, run_config, saved):
    (tmp_path / "file").touch()
    store = RunStore(tmp_path / "file" / "suite")
    with pytest.raises(PermissionError, match="--results") as raised:
        store.save(run_config, saved[1], **fields())
    assert str(store.run_folder(run_config)) in str(raised.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_json_cannot_hold_is_never_saved_as_finished(store, run_config, bad):
    """A record that cannot be read again would stop every later run of the suite."""
    history = [{**HISTORY[0], "test_cross_entropy": bad}]
    try:
        store.save(run_config, build_model("resnet8", 3), **fields(history=history))
    except ValueError:
        assert store.record(run_config) is None
    else:
        assert len(store.records()) == 1


def test_accuracies():
    assert accuracies(HISTORY) == {"last_accuracy": 45.0, "best_accuracy": 50.0, "selected_accuracy": 45.0}
    plain = [{k: v for k, v in row.items() if "validation" not in k} for row in HISTORY]
    assert accuracies(plain) == {"last_accuracy": 45.0, "best_accuracy": 50.0, "selected_accuracy": None}


def test_record_is_readable_without_its_weights(store, run_config, saved):
    (store.run_folder(run_config) / "weights.safetensors").unlink()
    record = store.record(run_config)
    assert isinstance(record.configuration, RunConfig)
    assert record.finished.endswith("+00:00")


def test_record_of_200_epochs_is_small(store, run_config, saved):
    row = {
        name: 1.2345678901234567
        for name in ("loss", "logit", "affinity", "label", "gradient_norm", "test_accuracy", "test_cross_entropy",
                     "validation_accuracy", "validation_cross_entropy")
    }  # fmt: skip
    history = [{"epoch": epoch, **row} for epoch in range(1, 201)]
    path = store.run_folder(run_config) / "record.json"
    path.unlink()
    store.save(run_config, saved[1], **fields(history=history, **accuracies(history)))
    assert path.stat().st_size < 200_000
