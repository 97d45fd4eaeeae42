"""Offline compilation for GPUs that are not here (a small part of the gate that CI runs whole), and block sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_kernels.backends.triton.choose import blocks
from lora_kernels.backends.triton.offline import compile_report
from lora_kernels.backends.triton.offline.compile_jobs import ARCHITECTURES
from lora_kernels.backends.triton.offline.compile_report import Record

ROOT = Path(__file__).parents[3]
HOPPER = ["product", "product_h", "shrink", "plain_shrink", "dh_db", "outer", "pack", "reduce_dh", "reduce_grads"]
HOPPER += [f"group_{name}" for name in ("product", "dx", "shrink", "dh_db", "da", "pack", "reduce_dh", "reduce_grads")]
MACHINES = [
    *ARCHITECTURES.values(),
    blocks.Machine(capability=86, sm_count=84, shared_memory=101376),
    blocks.Machine(capability=90, sm_count=1, shared_memory=232448),
]


# Which kernels there are for each architecture, and what the compiler makes of one small Triton kernel, one with a
# product, and one in Gluon: CI's gate compiles them all, in every case.
SCRIPT = """
import json
from dataclasses import asdict
from dataclasses import replace
from lora_kernels.backends.triton.offline import compile_report
from lora_kernels.backends.triton.offline.compile_report import QUICK, faults, jobs, report

found = jobs(QUICK, gluon="quick")
names = ("mask_kernel", "shrink_kernel", "hopper_pack_kernel", "hopper_shrink_kernel")
few = {(job.arch, job.kernel): job for job in found if job.kernel in names}
kernels = sorted({(job.arch, job.kernel) for job in found})
records = report(list(few.values()), {})

compile_report._AGAIN = 1 << 64  # none
job = few[80, "mask_kernel"]
(record,) = [r for r in records if (r.arch, r.kernel) == (80, "mask_kernel")]
known = {record.key: replace(record, registers=7, seconds=0.0, case="another")}
reused = report([job], known)
changed = [replace(job, options=job.options | {"num_warps": 8}), replace(job, arch=90)]
changed += [replace(job, constants=job.constants | {next(iter(job.constants)): 5})]
keys = [compile_report._key_of(one) for one in (job, job, *changed)]
compile_report._AGAIN = 1
again = faults(report([job], known), known)
print(json.dumps({
    "kernels": kernels, "records": [asdict(record) for record in records], "reused": asdict(*reused),
    "keys": keys, "again": again, "registers": record.registers,
}))
"""


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_is_in_the_report(arch: int, compiled: dict[str, Any]) -> None:
    names = ["forward", "expand", "shrink", "few_tokens", "sum_parts", "dh_db", "reduce", "dx", "dx_low_rank", "da"]
    names += [
        "draw",
        "mask",
        "row_norms",
        "gain_grad",
        "gated",
        "gated_grad",
        *("combine", "combine_grad"),
        "four_bit_values",
        "eight_bit_values",
        "e2m1_values",
        "few_codes",
        *("few_four_bits", "sum_four_bits"),
        *("experts_shrink", "experts_product", "experts_outer"),
        *(["persistent", "dx_persistent"] if arch >= 90 else []),
    ]
    names += [f"hopper_{name}" for name in HOPPER if arch == 90]
    assert {kernel for of, kernel in compiled["kernels"] if of == arch} == {f"{name}_kernel" for name in names}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_some_kernels_compile(arch: int, compiled: dict[str, Any]) -> None:
    """bf16 under fp32 adapters with dropout: no spills, in shared memory, the meant instructions."""
    records = [Record(**record) for record in compiled["records"] if record["arch"] == arch]
    assert len(records) == (4 if arch == 90 else 2)
    assert all(record.registers > 0 for record in records)
    assert compile_report.faults(records, {}) == []


def test_what_is_known_is_not_compiled_again_and_a_sample_is_compared(compiled: dict[str, Any]) -> None:
    reused = Record(**compiled["reused"])
    assert reused.registers == 7
    assert reused.case.startswith("bf16 ")  # as the call's, which need not be the first of its kind as it was
    same, again, *changed = compiled["keys"]
    assert same == again == reused.key
    assert len({same, *changed}) == 4
    (fault,) = compiled["again"]
    assert f"is not what the known record says: registers {compiled['registers']} where 7 was." in fault


def test_the_committed_records_have_a_key_each() -> None:
    """By which the gate knows them; CI compiles what they lack."""
    for path in sorted((ROOT / "bench" / "results" / "compile").glob("triton-*.json")):
        records = [Record(**record) for record in json.loads(path.read_text())]
        assert len({record.key for record in records}) == len(records) > 1000, path.name
        assert all(len(record.key) == 16 for record in records), path.name


def test_the_interpreter_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        compile_report.jobs()


BLOCKS = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "PDL": True, "num_warps": 8}
GOOD = Record("persistent_kernel", 90, "bf16", False, 250, 0, 0, 100_000, 232_448, "wgmma", 1.0, BLOCKS, 6, 6, 1)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"stack": 8, "registers": 255}, "spills: 8 bytes of stack"),
        ({"stack": 8, "blocks": BLOCKS | {"maxnreg": 250}}, "spills: 8 bytes of stack"),
        ({"stack": 40}, "spills: 40 bytes of stack"),
        ({"local": 16}, "16 of local memory"),
        ({"shared": 232_449}, "takes 232449 bytes of shared memory and the device has 232448"),
        ({"instruction": "mma.sync"}, "uses mma.sync where wgmma is meant"),
        ({"instruction": ""}, "uses no tensor core where wgmma is meant"),
        ({"arch": 100}, "uses wgmma where tcgen05 is meant"),
        ({"products": 3}, "has 3 HGMMA where a K step takes 4"),
        ({"tma_loads": 0}, "has no UTMALDG"),
        ({"waits": 0}, "has no ACQBULK"),
        ({"chained": True}, "adds all its products up in one chain"),
        ({"overflows": 2}, "is compiled wrongly: 2 offsets"),
        ({"spills": 13}, "13 loads and stores"),
        ({"fused": 1}, "has 1 multiply-adds where two roundings are meant"),
        ({"kernel": "hopper_product_kernel", "tma_loads": 0, "tma_stores": 1}, "has no UTMALDG"),
        ({"kernel": "hopper_product_kernel"}, "has no UTMASTG"),
        ({"kernel": "hopper_outer_kernel", "products": 0}, "has no HGMMA"),
    ],
)
def test_the_gate_can_fail(change: dict[str, object], sentence: str) -> None:
    assert compile_report.faults([GOOD], {}) == []
    (fault,) = compile_report.faults(
        [Record(**({f: getattr(GOOD, f) for f in Record.__dataclass_fields__} | change))], {}
    )
    assert sentence in fault


def test_a_value_on_the_stack_for_one_more_block_is_no_fault() -> None:
    given_up = {"registers": 128, "stack": 8, "spills": 5}
    record = Record(**{f: getattr(GOOD, f) for f in Record.__dataclass_fields__} | given_up)
    assert compile_report.faults([record], {}) == []


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: f"sm{machine.capability}x{machine.sm_count}")
@pytest.mark.parametrize(("itemsize", "tf32"), [(2, False), (4, True), (4, False)])
def test_blocks_fit_the_machine(machine: blocks.Machine, itemsize: int, tf32: bool) -> None:
    """Every size gets blocks that are powers of two, and operand tiles that shared memory holds."""
    for rows in (1, 16, 64, 1024, 2**20):
        for columns in (1, 40, 1024, 4096, 14336):
            for r in (1, 8, 17, 64, 300):
                gemm = blocks.gemm_configs(machine, rows, columns, r, itemsize, tf32, dropout=r > 8)[0]
                tiles = gemm.num_stages * (gemm.block_rows + gemm.block_columns) * gemm.block_sum
                assert tiles * itemsize <= machine.shared_memory
                assert blocks.fits_shared_memory(machine, gemm, itemsize)
                chosen = [
                    gemm,
                    blocks.shrink_config(machine, rows, r, itemsize, tf32),
                    blocks.few_tokens_config(machine, columns, r, itemsize, tf32),
                    blocks.dh_db_config(machine, rows, columns, r, itemsize, tf32),
                    blocks.outer_config(machine, columns, r, itemsize, tf32),
                ]
                for config in filter(None, chosen):
                    sizes = [getattr(config, name) for name in config.__slots__ if name.startswith(("block", "chunk"))]
                    assert all(block >= 16 and block & (block - 1) == 0 for block in sizes), config
