"""Kernels that launch nothing, for runs that become prepared passes on the CPU's memory."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from driver_stand_in import DriverStandIn
from lora_kernels.backends.triton.run import recording
from lora_kernels.backends.triton.run.prepared import Launch

CPU, STREAM = ("cpu", -1, 0), 0x77


class FakeKernel:
    """Stands in for a Triton kernel of this signature, and counts what Python launches."""

    def __init__(self, *signature: Any, scratch: int = 0, **metadata: Any) -> None:
        self.__name__, self.launched = "fake_kernel", list[tuple[Any, ...]]()
        fixed = {"global_scratch_size": scratch, "launch_pdl": False, "launch_cooperative_grid": False, **metadata}
        self.compiled = SimpleNamespace(
            function=0x700,
            packed_metadata=(4, 1, 0),
            metadata=SimpleNamespace(**fixed),
            src=SimpleNamespace(signature=dict(enumerate(signature))),
        )

    def warmup(self, *arguments: Any, grid: tuple[int, ...], **options: Any) -> Any:
        return self.compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> Any:
            assert all(type(each) is not recording.Given for each in arguments)
            self.launched.append(arguments)
            return self.compiled

        return launch


def one_launch(kernel: FakeKernel) -> Callable[..., Any]:
    """run(stream, x, scaling) -> y, and None."""
    launch = Launch(kernel, (2, 1, 1), (8, None))

    def run(stream: int | None, x: Tensor, scaling: float) -> tuple[Tensor, None]:
        y = torch.empty(4, 8)
        launch(stream, x, y, scaling)
        return y, None

    return run


def kernel_of_one() -> FakeKernel:
    return FakeKernel("*fp32", "*fp32", "fp32", "i32", "constexpr")


def launches(driver: DriverStandIn) -> int:
    return len(driver.take("cuLaunchKernelEx"))
