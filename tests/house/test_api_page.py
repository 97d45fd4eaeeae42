"""docs/api.md lists every public name, command and variable, and nothing else."""

from __future__ import annotations

import re

import pytest
import torch

import lora_kernels
from documents import ROOT
from lora_kernels import FusedLoRALinear, cli, errors, info
from lora_kernels import peft as live

PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
# What a layer answers to other modules of the package; users have no need of it.
OF_THE_PACKAGE = {
    "add_adapter",
    "branch",
    "check_is_lora",
    "check_rank",
    "is_transposed",
    "matrix",
    "problem",
    "reset_magnitude",
    "row_norms",
    "shared_branch",
    "sharing_state",
    "to_plain",
    "note_pass",
    "total_bias",
    "why_alone",
}


def listed(heading: str) -> list[str]:
    """What the rows of a section name: without arguments, and without what stands before the last dot or blank."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| \S", section, re.MULTILINE)
    assert len(rows) == section.count("\n| ") - 2  # each has one line, and says something
    return [re.split(r"[.\s]", row.partition("(")[0])[-1] for row in rows]


@pytest.mark.parametrize(
    ("heading", "there"),
    [
        ("`lora_kernels`", lora_kernels.__all__),
        ("`lora_kernels.peft`", live.__all__),
        ("`lora_kernels.trainer`", ["FusePeftCallback", "SaveAdapterCallback"]),
        ("`lora_kernels.axolotl`", ["FusePlugin"]),
        ("Errors", errors.__all__),
        ("Commands", cli.COMMANDS),
        ("Environment variables", info.VARIABLES),
    ],
)
def test_all_of_it_is_listed_and_nothing_else(heading: str, there: list[str]) -> None:
    assert sorted(listed(heading)) == sorted(there)


def test_what_a_layer_has_besides_nn_linear_is_listed() -> None:
    layer, plain = FusedLoRALinear(2, 2, r=1), torch.nn.Linear(2, 2)
    own = {name for name in set(dir(layer)) - set(dir(plain)) if not name.startswith("_")}
    rows = set(listed("`FusedLoRALinear`"))
    assert rows <= own
    assert own - rows - OF_THE_PACKAGE == set(), "give it a row in docs/api.md, or name it in OF_THE_PACKAGE"
    assert OF_THE_PACKAGE & rows == set()


def test_every_variable_of_the_package_is_told_by_info() -> None:
    files = [*(ROOT / "lora_kernels").rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.h")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in [*files, ROOT / "setup.py"])
    named = set(re.findall(r"\bLORA_KERNELS_(?!H\b)[A-Z_]*[A-Z]\b(?!_)", text))
    assert named <= set(info.VARIABLES)


def test_the_extras_are_those_that_can_be_installed() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    assert sorted(listed("Extras")) == sorted(re.findall(r"^(\w+) = \[", section, re.MULTILINE))
