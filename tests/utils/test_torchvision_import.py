"""torchvision with a torch that cannot load its compiled extension."""

import os
import subprocess
import sys

import pytest

from faqd_lib.utils.files import project_root

# A wheel built for CUDA without its extension: it registers a kernel for a missing schema.
BROKEN = """
import torch
from . import ops
torch.library.register_kernel
schema = torch._C._dispatch_has_kernel("torchvision::nms")
if not schema:
    raise RuntimeError({message!r})
loaded = True
"""


def run_with(tmp_path, message: str) -> subprocess.CompletedProcess:
    package = tmp_path / "fake" / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(BROKEN.format(message=message))
    (package / "ops.py").write_text("times = globals().get('times', 0) + 1\n")
    code = "from faqd_lib.utils.torchvision_import import torchvision; print(torchvision.__file__, torchvision.loaded)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(package.parent), str(project_root())))}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


def test_missing_schemas_are_defined(tmp_path):
    done = run_with(tmp_path, "operator torchvision::nms does not exist")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{tmp_path / 'fake' / 'torchvision' / '__init__.py'} True"


def test_any_other_failure_of_the_import_is_shown(tmp_path):
    done = run_with(tmp_path, "something else is wrong")
    assert done.returncode != 0
    assert "something else is wrong" in done.stderr


@pytest.mark.parametrize("part", ["datasets.CIFAR10", "datasets.ImageFolder", "models.resnet18"])
def test_the_real_one_has_what_is_used(part):
    from faqd_lib.utils.torchvision_import import torchvision

    found = torchvision
    for name in part.split("."):
        found = getattr(found, name)
    assert callable(found)
