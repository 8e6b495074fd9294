"""The command ``faqd``: compress a network, look into its files, run them; and the series of notebooks.

faqd compress --teacher torchvision:resnet18 --pretrained --images photos --bits 1W32A 4W4A --out small
faqd inspect small/student-4w4a.onnx
faqd classify small/student-4w4a.onnx picture.jpg
faqd series quick
"""

import argparse
import ast
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..compression.planning import AFFINITY_WEIGHT, LEARNING_RATE
from ..data.decoding import picture_files
from ..data.images import DatasetError
from ..data.preprocessing import INTERPOLATIONS, Preprocessing, preprocessing_of
from ..export.packed import load_packed, read_header
from ..training.loss_log import NonFiniteLossError
from ..utils.messages import first_line

ERRORS = (ValueError, OSError, DatasetError, NonFiniteLossError, ModuleNotFoundError)
NO_PREPROCESSING = (
    "say what pictures the network expects: --image-size, --mean and --std, as in training "
    "(--image-size 32 --mean 0.5 0.5 0.5 --std 0.25 0.25 0.25)"
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    whole = argparse.ArgumentParser(
        prog="faqd", description="Compress a network, look into its files, run them; and the series of notebooks.",
        epilog=__doc__.partition("\n\n")[2], formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = whole.add_subparsers(dest="command", required=True)
    what = "train low-bit copies of a network on unlabelled pictures"
    _add_compress(commands.add_parser("compress", help=what, description=f"{what}; defaults in brackets"))
    inspect = commands.add_parser("inspect", help="print what a packed or ONNX file holds")
    inspect.add_argument("file", type=Path)
    classify = commands.add_parser("classify", help="run a packed or ONNX file on pictures")
    classify.add_argument("file", type=Path)
    classify.add_argument("pictures", type=Path, nargs="+", help="pictures, or folders of them")
    classify.add_argument("--top", type=int, default=1, metavar="N", help="number of classes to print a picture (1)")
    classify.add_argument(
        "--network", nargs="+", metavar="SPEC", help="for a packed file: its float network, and name=value arguments"
    )
    _add_preprocessing(classify)
    commands.add_parser("series", help="run the notebooks; options as those of ./run_all.sh", add_help=False)
    return whole


def _add_compress(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "--teacher", nargs="+", required=True, metavar="SPEC",
        help="timm:NAME, torchvision:NAME or package.module:function, and name=value arguments of it",
    )  # fmt: skip
    add("--weights", type=Path, metavar="FILE", help="the teacher's state_dict, written by safetensors or torch.save")
    add("--pretrained", action="store_true", help="the weights that timm or torchvision offers; may download")
    add("--images", type=Path, required=True, metavar="DIR", help="pictures, in any folders below DIR; no labels")
    add(
        "--bits", nargs="+", default=["1W32A"], metavar="BITS",
        help="bits of weights and of activations, 32 for float; several train together: 1W32A 4W4A (1W32A)",
    )  # fmt: skip
    add("--out", type=Path, required=True, metavar="DIR", help="a new folder, or that of an earlier call to go on with")
    add("--epochs", type=float, metavar="N", help="passes over the training pictures (5)")
    add("--hours", type=float, metavar="H", help="hours to search and train; with --epochs, the shorter of both")
    add(
        "--student", nargs="+", metavar="SPEC",
        help="a network to train instead of a copy of the teacher; written as for --teacher; its weights are random",
    )  # fmt: skip
    add("--taps", nargs="+", metavar="MODULE", help="modules whose maps are compared (chosen by resolution)")
    add(
        "--student-taps", nargs="+", metavar="MODULE",
        help="modules of --student whose maps are compared, one for each of --taps",
    )  # fmt: skip
    searched = "if left out: chosen by a search, or {:g} in a training too short for one"
    add("--learning-rate", type=float, metavar="X", help=searched.format(LEARNING_RATE))
    add("--affinity-weight", type=float, metavar="X", help=f"{searched.format(AFFINITY_WEIGHT)}; 0: logits alone")
    add(
        "--batch-size", type=int, metavar="N",
        help="pictures of a batch (128 below 64 pixels, else 32; fewer if there are few pictures)",
    )  # fmt: skip
    add("--per-tensor", action="store_true", help="one scale per weight tensor, not per output channel")
    add("--no-flip", action="store_true", help="never mirror pictures: for text, digits, signs")
    add("--held-out", type=float, default=0.1, metavar="X", help="share or number of pictures to measure on (0.1)")
    add("--max-unreadable", type=float, default=0.05, metavar="X", help="share of damaged files to leave out (0.05)")
    add("--classes", type=Path, metavar="FILE", help="names of the classes, one a line")
    add("--cache", type=Path, metavar="DIR", help="decoded pictures (default: FAQD_CACHE, or OUT/cache)")
    add("--seed", type=int, default=0, help="of split, order and augmentation (0)")
    _add_preprocessing(command)


def _add_preprocessing(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("preprocessing", "if left out: what timm, torchvision or the file says")
    group.add_argument("--image-size", type=int, metavar="N", help="pixels of the network's input, height and width")
    group.add_argument("--resize-size", type=int, metavar="N", help="short side before the crop (the image size)")
    group.add_argument("--mean", type=float, nargs=3, metavar="X", help="of each channel, for pixels in [0, 1]")
    group.add_argument("--std", type=float, nargs=3, metavar="X")
    group.add_argument("--interpolation", choices=INTERPOLATIONS, help="how pixels are resized (bilinear)")


def _spec(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """A spec and its arguments: ``["a:b", "depth=3"]`` → ``("a:b", {"depth": 3})``."""
    found = {}
    for word in words[1:]:
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"arguments of {words[0]} must be name=value, got {word!r}")
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[name] = text
    return words[0], found


def _preprocessing(arguments: argparse.Namespace, known: Callable[[], Preprocessing | None]) -> Preprocessing:
    """The preprocessing: values of the options first, then those that ``known()`` returns.

    If ``--image-size`` is given without ``--resize-size``, the short side is resized to the image size. Raises
    ValueError if options and ``known()`` leave a value open.
    """
    names = ("image_size", "resize_size", "mean", "std", "interpolation")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    complete = all(name in given for name in ("image_size", "mean", "std"))
    try:
        rest = known()
    except ValueError:  # a configuration that Preprocessing cannot hold
        if not complete:
            raise
        rest = None
    if rest is None:
        if not complete:
            raise ValueError(NO_PREPROCESSING)
        return Preprocessing(**given)
    return replace(rest, **({"resize_size": 0} if "image_size" in given else {}) | given)


def compress(arguments: argparse.Namespace) -> int:
    """Build the teacher and compress it; 1 if one of the students failed, else 0."""
    from ..compression import teachers
    from ..compression.compress import compress as run

    spec, options = _spec(arguments.teacher)
    teacher = teachers.load_teacher(spec, arguments.weights, pretrained=arguments.pretrained, **options)
    about, student = {"teacher": spec, "teacher_arguments": options}, None
    if arguments.student:
        name, values = _spec(arguments.student)
        about |= {"student": name, "student_arguments": values}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(arguments.seed)  # a call after a kill must begin with the same weights
            student = teachers.build_network(name, **values)

    def known() -> Preprocessing | None:
        return preprocessing_of(teacher, spec) if spec.partition(":")[0] in ("timm", "torchvision") else None

    preprocessing = _preprocessing(arguments, known)
    print(f"pictures are prepared as follows: {preprocessing}", flush=True)
    if arguments.weights and arguments.image_size is None:
        print(
            "if the teacher was trained on pictures prepared differently, give --image-size, --mean and --std",
            flush=True,
        )
    classes = arguments.classes.read_text(encoding="utf-8").splitlines() if arguments.classes else ()
    cache = arguments.cache or os.environ.get("FAQD_CACHE")
    result = run(
        teacher,
        arguments.images,
        out=arguments.out,
        bits=arguments.bits,
        student=student,
        taps=arguments.taps,
        student_taps=arguments.student_taps,
        preprocessing=preprocessing,
        quantization={"per_channel": False} if arguments.per_tensor else None,
        epochs=arguments.epochs,
        hours=arguments.hours,
        learning_rate=arguments.learning_rate,
        affinity_weight=arguments.affinity_weight,
        batch_size=arguments.batch_size,
        flip=not arguments.no_flip,
        held_out=arguments.held_out,
        max_unreadable=arguments.max_unreadable,
        cache=cache or None,
        classes=[line.strip() for line in classes if line.strip()],
        seed=arguments.seed,
        about=about,
        say=lambda text: print(text, flush=True),
    )
    for one in result.card.students:
        files = f"{one.packed.name} {one.packed.size:,} bytes"
        files += f", {one.onnx.name} {one.onnx.size:,} bytes" if one.onnx.name else "; no ONNX file, the card says why"
        print(f"{one.bits}: {files} (teacher {result.card.float_bytes:,}); agreement {one.agreement}")
        for sign in one.signs:
            if sign.verdict == "yes":
                print(f"{one.bits} shows a sign of failure, {sign.name}: {sign.threshold}")
    if any(sign.verdict == "yes" for one in result.card.students for sign in one.signs):
        print("a student that shows a sign of failure may need a longer training or more pictures")
    if len(result.card.students[0].by_class) == 1:
        print(result.card.named_by_teacher)
    return 1 if result.failed else 0


def inspect(arguments: argparse.Namespace) -> None:
    """Print header, layers and metadata of a packed or ONNX file."""
    path = _existing(arguments.file)
    (_inspect_onnx if path.suffix == ".onnx" else _inspect_packed)(path)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return path


def _inspect_packed(path: Path) -> None:
    header = read_header(path)
    print(f"{path}: {header['format']}, {path.stat().st_size:,} bytes, digest {header['digest'][:12]}")
    print(f"architecture: {json.dumps(header['architecture']) if header['architecture'] else 'not named'}")
    for name, layer in header["layers"].items():
        count = torch.Size(layer["shape"]).numel()
        shape = " × ".join(map(str, layer["shape"]))
        print(f"  {name or 'the network'}: {shape} at {_bits(layer)}, {-(-count * layer['bits'] // 8):,} bytes")
    for name, relu in header["activations"].items():
        print(f"  {name}: activations at {_bits(relu)}")
    _print_metadata(header["metadata"])


def _bits(part: dict[str, Any]) -> str:
    return f"{part['bits']} bit{'' if part['bits'] == 1 else 's'}"


def _inspect_onnx(path: Path) -> None:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path)
    except DecodeError as error:
        raise ValueError(f"{path} is damaged or no ONNX file: {first_line(error)}") from error
    opset = max(entry.version for entry in model.opset_import)
    print(
        f"{path}: ONNX of {model.producer_name or 'an unknown producer'}, {path.stat().st_size:,} bytes, opset {opset}"
    )
    for what, values in (("input", model.graph.input), ("output", model.graph.output)):
        for value in values:
            sizes = [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
            print(f"{what} {value.name}: {' × '.join(map(str, sizes))}")
    kinds = Counter(node.op_type for node in model.graph.node)
    print(f"operators: {', '.join(f'{count} {kind}' for kind, count in kinds.most_common())}")
    for tensor in model.graph.initializer:
        kind, shape = onnx.TensorProto.DataType.Name(tensor.data_type), " × ".join(map(str, tensor.dims))
        print(f"  {tensor.name}: {shape or 'a number'}, {kind}, {len(tensor.raw_data):,} bytes")
    _print_metadata({entry.key: entry.value for entry in model.metadata_props})


def _print_metadata(metadata: dict[str, Any]) -> None:
    print("metadata:" if metadata else "no metadata")
    for key, value in metadata.items():
        print(f"  {key}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")


def classify(arguments: argparse.Namespace) -> int:
    """Name the classes of pictures, one at a time; 1 if a picture cannot be decoded, else 0."""
    if arguments.top < 1:
        raise ValueError(f"--top must be at least 1, got {arguments.top}")
    path = _existing(arguments.file)
    run, metadata = (_onnx_network if path.suffix == ".onnx" else _packed_network)(path, arguments)

    expects = metadata.get("preprocessing")
    preprocessing = _preprocessing(arguments, lambda: expects and Preprocessing(**expects))
    normalizer, classes = preprocessing.normalizer("cpu"), metadata.get("classes", ())
    failed = 0
    for picture in _below(arguments.pictures):
        try:
            pixels = preprocessing.tensor(picture)
        except DatasetError as error:
            print(f"faqd classify: {error}", file=sys.stderr)
            failed = 1
            continue
        with torch.no_grad():
            (logits,) = run(normalizer(pixels[None]).contiguous())
        shares, numbers = logits.softmax(0).topk(min(arguments.top, len(logits)))
        named = [classes[number] if number < len(classes) else str(number) for number in numbers.tolist()]
        said = ", ".join(f"{name} {share:.1%}" for name, share in zip(named, shares, strict=True))
        print(f"{picture}: {said}", flush=True)
    return failed


def _below(paths: Sequence[Path]) -> Iterator[Path]:
    """The files among ``paths``, and all pictures in folders among them; DatasetError for a folder without pictures."""
    for path in paths:
        found = picture_files(path)[0] if path.is_dir() else [path]
        if not found:
            raise DatasetError(f"{path} holds no picture")
        yield from found


def _onnx_network(path: Path, arguments: argparse.Namespace):
    """A function from images to logits, and the file's metadata."""
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidGraph, InvalidProtobuf

    if arguments.network:
        raise ValueError("--network is for packed files: an ONNX file holds its network")
    try:
        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    except (Fail, InvalidGraph, InvalidProtobuf) as error:
        raise ValueError(f"{path} is damaged, or no file for this ONNX Runtime: {first_line(error)}") from error
    texts = session.get_modelmeta().custom_metadata_map
    metadata = {key: json.loads(texts[key]) for key in ("preprocessing", "classes") if key in texts}
    (taken,) = session.get_inputs()

    def run(images: torch.Tensor) -> torch.Tensor:
        wanted, given = taken.shape[1:], list(images.shape[1:])
        if any(isinstance(size, int) and size != found for size, found in zip(wanted, given, strict=True)):
            shapes = [" × ".join(map(str, shape)) for shape in (wanted, given)]
            remedy = "leave out --image-size" if "preprocessing" in metadata else f"give --image-size {wanted[-1]}"
            raise ValueError(f"{path} takes pictures of {shapes[0]}, got {shapes[1]}: {remedy}")
        return torch.from_numpy(session.run(None, {taken.name: images.numpy()})[0])

    return run, metadata


def _packed_network(path: Path, arguments: argparse.Namespace):
    """A function from images to logits, and the file's metadata."""
    from ..compression.teachers import LOADING, build_network

    header = read_header(path)
    if arguments.network:
        spec, options = _spec(arguments.network)
        network = load_packed(path, build_network(spec, **options))
    elif header["architecture"]:
        network = load_packed(path)
    else:
        who = "student" if "student" in header["metadata"] else "teacher"
        named, options = (header["metadata"].get(key) for key in (who, f"{who}_arguments"))
        named, options = str(named or ""), options or {}
        # The weights are in the file, and a file must not make this download or unpickle anything.
        options = {name: value for name, value in options.items() if name not in LOADING}
        if named.partition(":")[0] in ("timm", "torchvision"):
            return load_packed(path, build_network(named, **options)), header["metadata"]
        words = [named, *(f"{name}={value}" for name, value in options.items())]
        made = f"; it was made from {' '.join(words)}" if named else ""
        raise ValueError(f"{path} holds weights only: give its float network by --network SPEC{made}")
    return network, header["metadata"]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit status is 0 only if all was done."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["series"]:
        try:
            from . import run_all
        except ModuleNotFoundError as error:
            print(f"faqd series needs {error.name}: pip install 'faqd[notebooks]'", file=sys.stderr)
            return 1
        return run_all.main(argv[1:])
    arguments = parser().parse_args(argv)
    if "" not in sys.path:
        sys.path.insert(0, "")  # modules of the user's own, which a console script does not see
    try:
        return {"compress": compress, "inspect": inspect, "classify": classify}[arguments.command](arguments) or 0
    except torch.OutOfMemoryError as error:
        print(f"faqd {arguments.command}: {first_line(error)}: give a smaller --batch-size or fewer --bits, and a new "
              "--out", file=sys.stderr)  # fmt: skip
        return 1
    except ERRORS as error:
        if isinstance(error, BrokenPipeError) and arguments.command != "compress":
            # The reader, such as `head`, has what it wants.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        else:
            print(f"faqd {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; call again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
