"""Every example in a docstring runs, and every public name has one."""

from __future__ import annotations

import doctest
import pkgutil
import sys
from importlib import import_module

import pytest

import lora_kernels

DEVICE_CODE = "lora_kernels.backends.triton"
PEFT_CODE = "lora_kernels.peft"
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(lora_kernels.__path__, "lora_kernels.", onerror=lambda name: None)
    if not module.name.startswith(DEVICE_CODE) and not module.name.endswith("__main__")
)
EXEMPT = {"__version__", "LoRAKernelsError"}


@pytest.mark.parametrize("name", ["lora_kernels", *MODULES])
def test_examples_run(name: str) -> None:
    if name.startswith(PEFT_CODE):
        pytest.importorskip("peft", reason="the examples of lora_kernels.peft make PEFT models, and PEFT is not here")
    if name == "lora_kernels.trainer":
        pytest.importorskip("transformers", reason="lora_kernels.trainer is for transformers' Trainer")
    result = doctest.testmod(import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


PUBLIC = {name: getattr(lora_kernels, name) for name in lora_kernels.__all__ if name not in EXEMPT}
METHODS = {name: getattr(lora_kernels.FusedLoRALinear, name) for name in ("from_linear", "enable_lora")}


@pytest.mark.parametrize("name", sorted({**PUBLIC, **METHODS}))
def test_every_public_name_has_an_example_that_runs_by_itself(name: str) -> None:
    """As a reader copies it: with no name but those that it imports."""
    if name in ("fuse_peft", "unfuse_peft"):
        pytest.importorskip("peft", reason="the examples of lora_kernels.peft make PEFT models, and PEFT is not here")
    found = {**PUBLIC, **METHODS}[name]
    example = doctest.DocTestParser().get_doctest(found.__doc__ or "", {}, name, None, None)
    assert example.examples, f"{name} has no example in its docstring"
    told: list[str] = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.DocTestRunner(optionflags=flags).run(example, out=told.append).failed == 0, "".join(told)


def test_without_peft_the_examples_of_its_modules_are_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(pytest.skip.Exception, match="PEFT is not here"):
        test_examples_run("lora_kernels.peft.layer")
