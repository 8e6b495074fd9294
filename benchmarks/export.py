"""Compare trained students with their packed and ONNX files: size, outputs and speed, on the whole test split.

    python benchmarks/export.py results/reference/five-epochs-cifar10-jpeg '*-4w4a-*seed2*'

Takes every run of a results folder whose name matches one of the patterns; names runs left out for lack of weights.
Measures, for each run,

- the bytes of the float32 file, the packed file and the ONNX file,
- whether the packed file gives the same logits to the bit,
- top-1 of PyTorch and of ONNX Runtime, and how often both name the same class,
- milliseconds for a batch, all three in turns.

Prints a table; writes ``export-PROFILE.json`` to ``--out``, by default ``results/benchmarks``. Needs onnx, onnxruntime
and the images of the folder's dataset.
"""

import fnmatch
import statistics
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import torch
from reporting import announce, options, parse, show, write
from safetensors.torch import save_file

from faqd_lib import load_packed, save_packed
from faqd_lib.export.onnx import export_onnx
from faqd_lib.quantization.weights import FLOAT_BITS
from faqd_lib.runs.store import RunRecord
from faqd_lib.runs.suite import Suite
from faqd_lib.utils.measure import environment, take_turns

LEAST_AGREEMENT = {True: 99.9, False: 99.0}  # percent of images; the key: are activations float?


def exported(suite: Suite, record: RunRecord, folder: Path, batch: int, rounds: int) -> dict:
    """One line of the table."""
    config = record.configuration
    student, test = suite.model(config).cpu(), suite.splits[2]
    images = suite.normalizer(test.pixels.to(suite.device)).cpu()
    about = {"name": config.model, "num_classes": len(suite.data.classes), "image_size": suite.data.image_size}
    packed = save_packed(student, folder / "student.safetensors", architecture=about)
    back = load_packed(packed)
    save_file({n: t.contiguous() for n, t in back.state_dict().items()}, folder / "float32.safetensors")
    path = export_onnx(student, folder / "student.onnx", images.shape[1:])
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = torch.get_num_threads(), 1
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])

    def run(part: torch.Tensor) -> np.ndarray:
        return session.run(None, {"images": part.numpy()})[0]

    parts = images.split(500)
    with torch.inference_mode():
        logits, again = (torch.cat([network(part) for part in parts]) for network in (student, back))
        theirs = torch.from_numpy(np.concatenate([run(part) for part in parts]))
        part = images[:batch]
        calls = {"PyTorch": lambda: student(part), "packed": lambda: back(part), "ONNX Runtime": lambda: run(part)}
        times = take_turns(calls, rounds)
    agreement = 100 * float((theirs.argmax(1) == logits.argmax(1)).double().mean())
    least = LEAST_AGREEMENT[config.quantization.activation_bits == FLOAT_BITS]
    top1 = {
        f"top-1 {name}": 100 * float((values.argmax(1) == test.labels).double().mean())
        for name, values in (("PyTorch", logits), ("ONNX Runtime", theirs))
    }
    return {
        "run": record.run_id, "images": len(test), "float32_bytes": (folder / "float32.safetensors").stat().st_size,
        "packed_bytes": packed.stat().st_size, "onnx_bytes": path.stat().st_size,
        "packed: same bits": torch.equal(logits, again), **top1, "same class %": agreement,
        "wanted": f"≥ {least}", "met": agreement >= least,
        **{f"ms for {batch}, {name}": 1e3 * statistics.median(seconds) for name, seconds in times.items()},
    }  # fmt: skip


def main() -> None:
    parser = options(__doc__, rounds=15)
    parser.add_argument("folder", type=Path, help="a results folder: <results>/<profile>-<dataset>")
    parser.add_argument("patterns", nargs="*", default=["*"], help="of the names of runs, as in a shell (*)")
    parser.add_argument("--batch", type=int, default=64, help="images a call whose time is taken (64)")
    arguments = parse(parser)
    machine = environment("cpu") | {"onnxruntime": onnxruntime.__version__}
    announce(machine)
    suite = Suite.read(arguments.folder)
    chosen = [
        record
        for record in suite.store.records()
        if record.configuration.quantization.weight_bits < FLOAT_BITS
        and any(fnmatch.fnmatch(record.run_id, pattern) for pattern in arguments.patterns)
    ]
    for record in [
        r for r in chosen if not (suite.store.run_folder(r.configuration) / "weights.safetensors").is_file()
    ]:
        print(f"left out: {record.run_id} has no weights here")
        chosen.remove(record)
    if not chosen:
        parser.error(
            f"no run with quantized weights that are kept in {arguments.folder} matches {' '.join(arguments.patterns)}"
        )
    with tempfile.TemporaryDirectory() as scratch:
        rows = [exported(suite, record, Path(scratch), arguments.batch, arguments.rounds) for record in chosen]
    result = {"environment": machine, "export": show("export", pd.DataFrame(rows))}
    write(arguments.out, f"export-{suite.profile.name}", result)


if __name__ == "__main__":
    main()
