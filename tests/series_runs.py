"""What the tests of the series share."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from faqd_lib.utils.files import project_root

NOTEBOOKS = sorted((project_root() / "notebooks").glob("*.ipynb"))


def environment(cache: Path) -> dict[str, str]:
    keep = {name: value for name, value in os.environ.items() if not name.startswith("FAQD_")}
    return {**keep, "FAQD_CACHE": str(cache), "PYTHONPATH": str(project_root()), "OMP_WAIT_POLICY": "passive"}


def run(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "faqd_lib.cli.run_all", *arguments],
        cwd=cwd, env=environment(cwd / "cache"), capture_output=True, text=True, check=False, timeout=1800,
    )  # fmt: skip


def own_profile(path: Path, changes: Mapping[str, str]) -> None:
    """Write the smoke profile with changes, each of a text that it holds, as a profile of one's own."""
    text = (project_root() / "faqd_lib" / "runs" / "profiles" / "smoke.toml").read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


def digests(results: Path) -> dict[str, str]:
    records = [json.loads(path.read_text()) for path in results.glob("*/runs/*/record.json")]
    return {record["run_id"]: record["weights_digest"] for record in records}


def has_accuracy(cell: str) -> bool:
    return re.search(r"\d\.\d", cell) is not None
