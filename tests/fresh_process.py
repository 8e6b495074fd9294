"""Code in a process that has imported torch and nothing else: each is forked from one that imports torch once."""

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from faqd_lib.utils.files import project_root

# Torch is imported with numpy hidden: code that claims to work without numpy cannot get it through torch.
SERVER = """
import json, os, sys
sys.modules["numpy"] = None
import torch
del sys.modules["numpy"]
for line in sys.stdin:
    code, environment, outputs = json.loads(line)
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
for number, name in enumerate(outputs, 1):
    os.dup2(os.open(name, os.O_WRONLY), number)
os.environ.clear()
os.environ.update(environment)
exec(code)
"""


@cache
def _server() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, bufsize=1, cwd=project_root(),
    )  # fmt: skip


def run_fresh(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run ``code`` with these additional environment variables; returns its exit status and what it wrote."""
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        for path in outputs:
            path.touch()
        server.stdin.write(json.dumps([code, {**os.environ, **environment}, list(map(str, outputs))]) + "\n")
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(code, status, *(path.read_text("utf-8") for path in outputs))
