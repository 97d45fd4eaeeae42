"""The launcher on the CPU's memory, over a driver that writes down what it is asked for."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from driver_stand_in import DriverStandIn, compile_driver
from lora_kernels.backends.native import load
from stand_in import needs_a_compiler


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[DriverStandIn, str]:
    needs_a_compiler()
    folder = tmp_path_factory.mktemp("driver")
    compile_driver(folder)
    (folder / "libcuda.so").symlink_to("libcuda.so.1")
    library = load._loaded.get("launch") or load.compile_into_cache("launch")
    torch.ops.load_library(str(library.path))
    return DriverStandIn(folder / "libcuda.so.1"), str(library.path)


@pytest.fixture
def driver(parts: tuple[DriverStandIn, str], monkeypatch: pytest.MonkeyPatch) -> DriverStandIn:
    """The launcher in use, on the CPU's memory."""
    from fake_kernels import CPU, STREAM
    from lora_kernels.backends.triton.run import launcher, prepared

    stand_in, path = parts
    stand_in.forget()
    stand_in.library.cuCtxSetCurrent(0xC000)
    stand_in.stream(0, STREAM)
    found = launcher._Found(launcher.Library(path, stand_in.path, stand_in.path), None)
    monkeypatch.setattr(launcher, "_found", found)
    monkeypatch.setattr(launcher, "_device_words", lambda index: CPU)
    monkeypatch.setattr(launcher, "current_stream", lambda index: STREAM)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(prepared, "_current", lambda stream: nullcontext())
    return stand_in
