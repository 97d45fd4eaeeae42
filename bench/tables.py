"""Writes the tables in README.md and docs/ from committed results, so that no number there is typed by hand.

A table stands between two marker comments and is named after what it shows::

    <!-- table:DEVICE/PRESET/DIRECTION[/DTYPE][/FIELD=VALUES ...] -->
    <!-- /table -->

such as ``table:amd-epyc/cpu-grid/step/float32/r=16``. DEVICE is a folder of ``bench/results``; of its files with that
PRESET the latest is taken, joined by earlier runs of the same machine and versions. A marker ``grid:`` in the place of
``table:`` makes one row of each shape and M, the dtypes side by side, and sums up the cells of every rank below;
``beside:`` puts what the model of the machine predicted beside what was measured, with wins and losses; ``predicted:``
shows a prediction alone, from a file that ``bench --predict`` wrote, and says so in its heading. ``ratios:`` puts DoRA
beside LoRA and PEFT beside this package, of the presets ``ratios`` and ``gpu-ratios``; ``subject=dora`` chooses.
``model:convergence``, ``model:memory``, ``model:block-memory`` and ``model:long-context`` are what
``bench/convergence.py``, ``bench/model_memory.py`` and ``bench/long_context.py`` found of whole models,
``model:gated-mlp-avx2`` what ``bench/gated_mlp.py`` did of a gated MLP,
``model:traffic`` what ``bench/dram_bytes.py`` counted or measured,
``model:block`` what ``bench --preset gpu-block`` did, ``model:headline`` one sentence of it, ``model:llama`` what
``bench --preset gpu-llama`` did, ``model:few-tokens`` each plan's time for 1 to 16 tokens, and ``model:moe``,
``model:moe-avx2``, ``model:moe-kept``, ``model:moe-qwen3`` and ``model:moe-mixtral`` what ``bench/moe.py`` measured of
stacked experts, ``model:codes-avx2`` what ``bench/codes.py`` did of each quantised form,
``model:qlora-step-avx2`` what ``bench/qlora_step.py`` did of steps over NF4, ``model:qlora-curve`` what
``examples/qlora_llama.py`` wrote.
``brief:`` is the short table of README.md:
``brief:DEVICE/PRESET/DIRECTION[/...][+DIRECTION[/...] ...]`` joins cells of several passes.
A table of measurements shows no predicted number; only ``beside:`` and ``predicted:`` do, and they have no place in
README.md.
``--check`` exits with 1 where a table is not what the results say; ``--write`` makes it so.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import (  # noqa: E402  (the path)
    codes,
    convergence_report,
    dram_bytes,
    few_tokens,
    gated_mlp,
    long_context,
    model_memory,
    moe,
    qlora_curve,
    qlora_step,
)
from bench.brief import brief, headline  # noqa: E402
from lora_kernels.benchmark import block, llama_report  # noqa: E402
from lora_kernels.benchmark.grid import grid  # noqa: E402
from lora_kernels.benchmark.predicted_table import beside  # noqa: E402
from lora_kernels.benchmark.ratios import ratios  # noqa: E402
from lora_kernels.benchmark.report import Table, legend, markdown, table  # noqa: E402
from lora_kernels.benchmark.results import Result, join, load  # noqa: E402
from lora_kernels.benchmark.workloads import FIELDS  # noqa: E402
from lora_kernels.errors import InvalidArgumentError  # noqa: E402

_KINDS = "table|grid|beside|predicted|ratios|brief"
_MARKED = re.compile(rf"(<!-- (?P<kind>{_KINDS}):(?P<name>\S+) -->\n).*?(<!-- /(?P=kind) -->)", re.DOTALL)
_OF_MODELS = re.compile(r"(<!-- model:(?P<name>\S+) -->\n).*?(<!-- /model -->)", re.DOTALL)
_PICTURE = "![Held-out loss of each way to train, and its distance to PEFT's](convergence.svg)\n\n"
_MODELS = {  # the result's file, what makes the table of it, what stands above
    "convergence": ("convergence.json", convergence_report.table, _PICTURE),
    "memory": ("model-memory.json", model_memory.table, ""),
    "block-memory": ("model-memory.json", model_memory.block_table, ""),
    "long-context": ("long-context.json", long_context.table, ""),
    "block": ("nvidia-h100/block.json", block.table, ""),
    "llama": ("nvidia-h200/llama.json", llama_report.table, ""),
    "few-tokens": ("nvidia-h100/few-tokens.json", few_tokens.table, ""),
    "moe": ("moe-cpu.json", moe.table, ""),
    "moe-avx2": ("amd-epyc-avx2/moe-cpu.json", moe.table, ""),
    "moe-kept": ("moe-cpu-kept.json", moe.table, ""),
    "moe-qwen3": ("nvidia-h200/moe.json", moe.table, ""),
    "moe-mixtral": ("nvidia-h200/moe-mixtral.json", moe.table, ""),
    "codes-avx2": ("amd-epyc-avx2/codes.json", codes.table, ""),
    "qlora-curve": ("amd-epyc-avx2/qlora-llama.json", qlora_curve.table, ""),
    "qlora-step-avx2": ("amd-epyc-avx2/qlora-step.json", qlora_step.table, ""),
    "gated-mlp-avx2": ("amd-epyc-avx2/gated-mlp.json", gated_mlp.table, ""),
    "traffic": ("step-traffic.json", dram_bytes.table, ""),
}
_SENTENCES = {"headline": ("nvidia-h200/llama.json", headline)}  # likewise, without a table
# What other commands wrote: tune, verify, the decoder block and the whole model, with a document each.
_OTHERS = (
    "block.json",
    "checks.json",
    "codes.json",
    "few-codes.json",
    "few-tokens.json",
    "gated-mlp.json",
    "hopper_step.json",
    "host-groups.json",
    "host-path.json",
    "host.json",
    "llama-before.json",
    "llama.json",
    "moe-cpu.json",
    "moe-mixtral.json",
    "moe.json",
    "qlora-llama.json",
    "qlora-own.json",
    "qlora-package.json",
    "qlora-step-own.json",
    "qlora-step.json",
    "qlora-step-package.json",
    "shared-inputs.json",
    "step-profile.json",
    "tune.json",
    "tuned.json",
    "verify.json",
)
_MAKERS: dict[str, Callable[[Result, str, dict[str, tuple[str, ...]]], Table]] = {
    "table": partial(table, foreseen=False),
    "grid": grid,
    "beside": beside,
    "predicted": beside,
    "ratios": ratios,
}


def newest(results: Path, device: str, preset: str, predicted: bool = False) -> Result:
    """The latest results of that preset on that device, joined: the measured ones, or the predicted ones.

    Raises:
        InvalidArgumentError: there is none.
    """
    files = [file for file in sorted((results / device).glob("*.json")) if file.name not in _OTHERS]
    found = [r for r in map(load, files) if (r.preset, r.predicted) == (preset, predicted)]
    if not found:
        how = "--predict MACHINE " if predicted else ""
        raise InvalidArgumentError(
            f"{results / device} holds no {'prediction' if predicted else 'result'} of preset {preset!r}: run "
            f"lora-kernels bench --preset {preset} {how}--json {results / device / preset}.json."
        )
    return join(found)


def condition(text: str) -> tuple[str, tuple[str, ...]]:
    """``r=8,16`` as a field and its values; a word alone is a dtype."""
    name, equals, values = text.partition("=")
    return (name, tuple(values.split(","))) if equals else ("dtype", (text,))


def selection(text: str, marker: str) -> tuple[str, dict[str, tuple[str, ...]]]:
    """``step/r=8,16`` as a direction and its conditions; ``marker`` is what an error names."""
    direction, *where = text.split("/")
    conditions = dict(condition(text) for text in where)
    if not direction or not set(conditions) <= set(FIELDS):
        raise InvalidArgumentError(
            f"{marker} is no DEVICE/PRESET/DIRECTION[/DTYPE][/FIELD=VALUES ...]: mend the marker."
        )
    return direction, conditions


def fill(text: str, results: Path) -> str:
    """``text`` with every marked table written anew from ``results``.

    Raises:
        InvalidArgumentError: a table's name is not of the form above, or there is no such result.
    """

    def written(match: re.Match[str]) -> str:
        device, _, rest = match["name"].partition("/")
        preset, _, rest = rest.partition("/")
        selections = [selection(text, f"{match['kind']}:{match['name']}") for text in rest.split("+")]
        result = newest(results, device, preset, match["kind"] == "predicted")
        if match["kind"] == "brief":
            return "".join([match[1], "\n", brief(result, selections), "\n\n", match[4]])
        if len(selections) > 1:
            raise InvalidArgumentError(f"{match['kind']}:{match['name']} joins passes, which only brief: does.")
        content = _MAKERS[match["kind"]](result, *selections[0])
        if not content.rows:
            raise InvalidArgumentError(
                f"{match['kind']}:{match['name']} has no rows: the newest result has no such cells."
            )
        notes = [note for note in legend(result) if note.partition(":")[0] in " ".join(content.header)]
        return "".join([match[1], "\n", markdown(content), *(f" {n}" for n in notes), "\n\n", match[4]])

    return _OF_MODELS.sub(partial(_of_model, results), _MARKED.sub(written, text))


def _of_model(results: Path, match: re.Match[str]) -> str:
    """The table of a benchmark of whole models, or that there is none yet."""
    if match["name"] in _SENTENCES:
        name, say = _SENTENCES[match["name"]]
        return f"{match[1]}\n{say(json.loads((results / name).read_text(encoding='utf-8')))}\n\n{match[3]}"
    if match["name"] not in _MODELS:
        known = ", ".join([*_MODELS, *_SENTENCES])
        raise InvalidArgumentError(f"model:{match['name']} is none of {known}: mend the marker.")
    name, maker, above = _MODELS[match["name"]]
    path = results / name
    if not path.is_file():
        return f"{match[1]}\nNot measured yet.\n\n{match[3]}"
    content = markdown(maker(json.loads(path.read_text(encoding="utf-8"))))
    return f"{match[1]}\n{above}{content}\n\n{match[3]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks or writes; returns the exit status."""
    parser = argparse.ArgumentParser(description="the tables of README.md and docs/ from bench/results")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--check", action="store_true", help="exit with 1 where a file is stale")
    mode.add_argument("--write", action="store_true", help="write the files")
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    parser.add_argument("--file", type=Path, nargs="+", default=pages, help="default: README.md and docs/*.md")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    args = parser.parse_args(arguments)
    stale = 0
    for file in args.file:
        text = file.read_text(encoding="utf-8")
        try:
            filled = fill(text, args.results)
        except InvalidArgumentError as error:
            print(f"tables: {file}: {error}", file=sys.stderr)
            return 1
        if filled != text and args.write:
            file.write_text(filled, encoding="utf-8")
        elif filled != text:
            print(f"tables: {file} is stale: run python bench/tables.py --write.", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    raise SystemExit(main())
