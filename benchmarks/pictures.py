"""A folder of pictures: the time to decode it once, to open it again, and to draw its batches; and the memory.

    python benchmarks/pictures.py FOLDER --image-size 32

Seconds are CPU seconds of all threads, so that a busy machine counts as an idle one. Peak memory is the highest since
the process began, mapped files included. It never falls from one row to the next. Prints a table; writes
``pictures.json`` to ``--out``. The cache lies in a temporary folder and takes 3 · size² bytes a picture.
"""

import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from reporting import announce, options, parse, show, write

from faqd_lib.data.pictures import PictureBatches, open_pictures
from faqd_lib.data.preprocessing import Preprocessing
from faqd_lib.utils.measure import environment


def measured(what: str, call: Callable[[], int]) -> dict[str, str | float]:
    """One row; ``call`` returns a number of pictures."""
    began = time.process_time()
    pictures = call()
    seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return {
        "what": what, "pictures": pictures, "CPU seconds": seconds, "CPU ms a picture": 1000 * seconds / pictures,
        "peak_MiB": peak,
    }  # fmt: skip


def main() -> None:
    parser = options(__doc__, rounds=2)
    parser.add_argument("folder", type=Path, help="pictures, in any folders below it")
    parser.add_argument("--image-size", type=int, default=224, help="pixels of the decoded squares (224)")
    parser.add_argument("--batch", type=int, default=64, help="pictures a batch (64)")
    arguments = parse(parser)
    announce(machine := environment("cpu"))
    expects = Preprocessing(arguments.image_size)
    rows = []
    with tempfile.TemporaryDirectory() as cache:

        def opened() -> int:
            found = open_pictures(arguments.folder, expects, cache)
            return len(found.train) + len(found.held_out)

        def epoch() -> int:
            train = open_pictures(arguments.folder, expects, cache).train
            batches = PictureBatches(train, arguments.batch, 0, expects.normalizer("cpu"))
            return sum(len(batch.images) for batch in batches.epoch(0))

        for what, call in {"decode": opened, "open again": opened, "an epoch of batches": epoch}.items():
            rows.append(measured(what, call) | {"pixels": arguments.image_size})
            print(rows[-1], flush=True)
    write(arguments.out, "pictures", {"environment": machine, "rows": show("pictures", pd.DataFrame(rows))})


if __name__ == "__main__":
    main()
