"""Forked kernels: processes of their own, with the modules of the process they are forked from."""

import ast
import asyncio
import os
import signal
import sys

import pytest
from jupyter_client.kernelspec import NoSuchKernel

from faqd_lib.cli.kernels import ForkedKernel, ForkingKernelManager

pytestmark = [
    pytest.mark.series,
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere kernels are not forked"),
]


async def answer(client, code: str) -> dict:
    """The reply to a cell that leaves its answer in ``shown``."""
    shown = {"shown": "shown"}
    return await client.execute_interactive(code, timeout=120, user_expressions=shown, stop_on_error=False)


def shown(reply: dict) -> object:
    return ast.literal_eval(reply["content"]["user_expressions"]["shown"]["data"]["text/plain"])


def test_a_forked_kernel_lives_as_any_other(tmp_path, monkeypatch):
    monkeypatch.setattr(ForkingKernelManager, "preloaded", ("faqd_lib.cli.kernels", "ipykernel.kernelapp"))

    async def life() -> None:
        manager = ForkingKernelManager(kernel_name="python3")
        environment = {**os.environ, "FAQD_OF_THE_KERNEL": "here"}
        await manager.start_kernel(cwd=str(tmp_path), env=environment, extra_arguments=["--IPKernelApp.log_level=50"])
        process = manager.provisioner.process
        client = manager.client()
        client.start_channels()
        try:
            await client.wait_for_ready(timeout=120)
            assert isinstance(process, ForkedKernel)
            code = "import os, sys; shown = (os.getpid(), os.getsid(0), os.getcwd(), os.environ['FAQD_OF_THE_KERNEL'])"
            assert shown(await answer(client, code)) == (process.pid, process.pid, str(tmp_path), "here")
            assert shown(await answer(client, "shown = 'pytest' in sys.modules")) is False
            code = "import matplotlib; shown = matplotlib.get_backend()"
            assert "inline" in shown(await answer(client, code))
            begins = "import pathlib, time; shown = 1; pathlib.Path('begun').touch()"
            sleeping = asyncio.create_task(answer(client, f"{begins}; time.sleep(600)"))
            async with asyncio.timeout(120):
                while not (tmp_path / "begun").exists():
                    await asyncio.sleep(0.05)
            await manager.interrupt_kernel()
            assert (await sleeping)["content"]["ename"] == "KeyboardInterrupt"
            assert await manager.is_alive()
            os.kill(process.pid, signal.SIGKILL)
            for _ in range(100):
                if not await manager.is_alive():
                    break
                await asyncio.sleep(0.1)
            assert process.poll() == -signal.SIGKILL
            assert not await manager.is_alive()
        finally:
            client.stop_channels()
            await manager.shutdown_kernel(now=True)

    asyncio.run(life())


def test_a_kernel_that_is_not_installed_is_named():
    with pytest.raises(NoSuchKernel, match="fortran"):
        ForkingKernelManager(kernel_name="fortran")
