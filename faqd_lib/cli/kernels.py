"""Kernels for a series of notebooks, forked from one process that has imported what every notebook imports.

A fresh kernel spends more processor time on imports than many notebooks need. A forked kernel is as separate from
others as a fresh one: its memory, random streams and threads are those of a process that has only imported modules.
Forking after imports is safe on Linux alone. Elsewhere, and for kernels of another Python, kernels start as usual.
"""

import multiprocessing
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner

LAUNCHER = "ipykernel_launcher"
# None of these modules touches a GPU. The only threads that they start are those of OpenBLAS, which starts them again
# after a fork. The second line is what run_all.py imports: multiprocessing runs the main module again in each process.
PRELOADED = (
    "ipykernel.kernelapp", "matplotlib.pyplot", "matplotlib.backends.backend_pdf", "seaborn", "scipy.stats",
    "papermill", "faqd_lib.cli.notebook", "faqd_lib.cli.study", "faqd_lib.reporting.pictures",
)  # fmt: skip
# What torch imports when it first compares two tensors, counts operations or compiles: ten seconds on a slow core. Most
# notebooks do one of these.
COMPILER = ("torch._dynamo", "torch._inductor.compile_fx", "torch.distributed.tensor")


def run_kernel(arguments: Sequence[str], environment: Mapping[str, str], folder: str) -> None:
    """Be a kernel until it is shut down; called in the forked process."""
    os.setsid()  # as jupyter_client does: Ctrl-C on the terminal then reaches the series alone
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import matplotlib
    from ipykernel.kernelapp import launch_new_instance

    matplotlib.rcParams["backend"] = "module://matplotlib_inline.backend_inline"  # read at import, before the fork
    launch_new_instance(argv=list(arguments))


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


class ForkedKernel:
    """A kernel's process, with what :class:`LocalProvisioner` uses of a ``subprocess.Popen``."""

    stdin = stdout = stderr = None

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str], folder: str, preloaded: Sequence[str]
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(preloaded))
        self._process = context.Process(target=run_kernel, args=(arguments, dict(environment), folder))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # the process has ended
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


class ForkingProvisioner(LocalProvisioner):
    """Forks IPython kernels of this Python on Linux, and starts all others as usual."""

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        if sys.platform != "linux" or cmd[0] != sys.executable or LAUNCHER not in cmd:
            return await super().launch_kernel(cmd, **kwargs)
        self.cwd = kwargs.get("cwd") or os.getcwd()
        arguments, preloaded = cmd[cmd.index(LAUNCHER) + 1 :], self.parent.preloaded
        self.process = ForkedKernel(arguments, kwargs["env"], str(self.cwd), preloaded)
        self.pid = self.pgid = self.process.pid
        return self.connection_info


class ForkingKernelManager(AsyncKernelManager):
    """A manager whose kernel is forked; NoSuchKernel if the kernel's specification is not installed.

    ``preloaded`` names the modules that are imported before the first fork.
    """

    preloaded = PRELOADED

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.provisioner = ForkingProvisioner(kernel_id=self.kernel_id, kernel_spec=self.kernel_spec, parent=self)


class SeriesKernelManager(ForkingKernelManager):
    """A manager for many kernels. It imports torch's compiler before the first fork."""

    preloaded = PRELOADED + COMPILER
