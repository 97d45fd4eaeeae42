"""What ``llama`` has measured, in ratios, lines and a table, with the best that is published beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .llama_models import MODELS, PROVIDERS, R
from .report import Table, software

__all__ = ["LARGE", "TARGETS", "published", "reached", "table", "told"]

LARGE = "gpu-llama"
TARGETS = {  # where it stands in what was reached, the least
    "tokens/s over the published": (("headline", "over published"), 1.0),
    "tokens/s over PEFT's": (("common", "over peft"), 1.35),
    "tokens/s over PEFT's with Liger": (("liger", "over peft-liger"), 1.2),
    "memory of PEFT with Liger over ours": (("liger", "peak of peft-liger over ours"), 1.0),
}
_OURS = ("fused", "compiled", "fused-liger")
_Timed = dict[tuple[str, int], dict[str, Any]]


def published(model: str) -> dict[str, Any]:
    """The best that is published of one of ``MODELS``."""
    of = MODELS[model]
    what = f"{model}, LoRA r = 16, alpha = 32, dropout 0.1, all projections, 2 x 4096 tokens, one H100"
    return {"who": "NeMo Automodel", "what": what, "tokens_per_second": of.tokens_per_second, "tflops": of.tflops}


def reached(document: dict[str, Any]) -> dict[str, Any]:
    """Ratios of tokens a second, and of peak memory, that ours has to others of the same batch.

    ``common``: at the largest batch for which the frozen model, PEFT and ours have all been timed. ``liger``: likewise
    with Liger. ``headline``: ours at the largest batch of all. ``drift``: the frozen model's time at its second turn
    over that at its first.
    """
    timed, again = _timed(document)
    batches = sorted({batch for _, batch in timed}, reverse=True)

    def over(ours: str, theirs: str, batch: int, field: str = "tokens_per_second") -> float | None:
        one, other = (timed.get((name, batch), {}).get(field) for name in (ours, theirs))
        return None if one is None or other is None else float(one / other)

    def common(*names: str) -> int | None:
        return next((batch for batch in batches if all((name, batch) in timed for name in names)), None)

    found: dict[str, Any] = {}
    if (batch := common("frozen", "peft", "fused")) is not None:
        ratios = {f"over {name}": over("fused", name, batch) for name in ("frozen", "peft", "peft32")}
        peak = over("fused", "peft", batch, "peak_bytes")
        compiled = over("compiled", "peft", batch)
        found["common"] = {"batch": batch, **ratios, "compiled over peft": compiled, "peak over peft": peak}
    if (batch := common("fused-liger", "peft-liger")) is not None:
        peak = over("peft-liger", "fused-liger", batch, "peak_bytes")
        speed = over("fused-liger", "peft-liger", batch)
        found["liger"] = {"batch": batch, "over peft-liger": speed, "peak of peft-liger over ours": peak}
    ours = [(batch, numbers["tokens_per_second"], name) for (name, batch), numbers in timed.items() if name in _OURS]
    if ours:
        batch, speed, name = max(ours)
        found["headline"] = {"batch": batch, "provider": name, "tokens_per_second": speed}
        if document["preset"] == LARGE and batch == max(document["sizes"]["batches"]):
            found["headline"]["over published"] = speed / document["published"]["tokens_per_second"]
    if again and (first := timed.get(("frozen", again[0]))):
        found["drift"] = again[1]["step_ms"] / first["step_ms"]
    return found


def _timed(document: dict[str, Any]) -> tuple[_Timed, tuple[int, dict[str, Any]] | None]:
    """The numbers of what was timed; the batch and the numbers of the frozen model's second turn."""
    timed: _Timed = {}
    again = None
    for cell in document["cells"]:
        if cell["status"] == "timed":
            if cell["again"]:
                again = (cell["batch"], cell["numbers"])
            else:
                timed[cell["provider"], cell["batch"]] = cell["numbers"]
    return timed, again


def told(document: dict[str, Any]) -> Sequence[str]:
    """A line for each cell, then for each aim, then the published row."""
    if document["left_out"]:
        return [f"The model was not run: {document['left_out']}"]
    timed, _ = _timed(document)
    head = f"{document['parameters'] / 1e9:.3f} billion parameters; TFLOP/s: 4 flops a parameter and token."
    lines = [f"{head} One provider after the other, not interleaved. Compared {document['compared']}."]
    for cell in document["cells"]:
        title = PROVIDERS[cell["provider"]].title + (", again" if cell["again"] else "")
        place = f"{cell['batch']} x {cell['tokens']}, {title}"
        if cell["status"] == "timed":
            lines.append(f"{place}: {', '.join(_facts(cell, timed))}")
        else:
            lines.append(f"{place}: {cell['status']}: {cell['reason']}")
    found = document.get("reached", {})
    for group in ("common", "liger", "headline"):
        if group in found:
            said = [f"{key} {_short(value)}" for key, value in found[group].items() if value is not None]
            lines.append(f"{group}: {', '.join(said)}")
    if "drift" in found:
        lines.append(f"The frozen model's second turn took {found['drift']:.3f} of its first's time.")
    if document["preset"] == LARGE:
        lines += _aims(found)
        lines.append(_published(document))
    return lines


def _facts(cell: dict[str, Any], timed: _Timed) -> list[str]:
    numbers = cell["numbers"]
    facts = [f"{numbers['tokens_per_second']:.0f} tokens/s", f"{numbers['tflops']:.3g} TFLOP/s"]
    facts += [f"{numbers['step_ms']:.1f} ms", f"ratio {_ratio(cell, timed)}", f"peak {_peak(numbers)}"]
    if numbers["launches"] is None:
        facts.append(f"launches not counted ({numbers['not_profiled']})")
    else:
        facts.append(f"{numbers['launches']} launches, GPU busy {numbers['busy']:.0%}")
    facts.append(f"loss {cell['loss']:.3f}, first step {cell['first_step_s']:.1f} s")
    return facts + ([cell["note"]] if cell["note"] else [])


def _aims(found: dict[str, Any]) -> list[str]:
    lines = []
    for name, ((group, key), least) in TARGETS.items():
        value = found.get(group, {}).get(key)
        verdict = "not measured" if value is None else f"{'ok  ' if value >= least else 'MISS'} {value:.3f}"
        lines.append(f"{name}: {verdict} (>= {least:g})")
    return lines


def _published(document: dict[str, Any]) -> str:
    of = document["published"]
    return (
        f"Published, not measured here: {of['who']}: {of['tokens_per_second']} tokens/s, {of['tflops']} TFLOP/s "
        f"({of['what']})."
    )


def _ratio(cell: dict[str, Any], timed: _Timed) -> str:
    """Time over the frozen model's at the same batch."""
    frozen = timed.get(("frozen", cell["batch"]))
    return "–" if frozen is None else f"{cell['numbers']['step_ms'] / frozen['step_ms']:.3f}"


def _peak(numbers: dict[str, Any]) -> str:
    return "–" if numbers["peak_bytes"] is None else f"{numbers['peak_bytes'] / 2**30:.1f} GiB"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(document: dict[str, Any]) -> Table:
    """For a page: a row for each cell that was timed or had no room, then the published one."""
    timed, _ = _timed(document)
    header = ["who", "batch", "tokens/s", "TFLOP/s", "ratio", "peak", "launches", "GPU busy"]
    rows = []
    shown = [cell for cell in document["cells"] if cell["status"] in ("timed", "out of memory", "failed")]
    for cell in sorted(shown, key=lambda cell: cell["batch"]):
        title = PROVIDERS[cell["provider"]].title + (", again" if cell["again"] else "")
        row = [title, f"{cell['batch']} x {cell['tokens']}"]
        if cell["status"] != "timed":
            rows.append([*row, cell["status"], *["–"] * 5])
            continue
        n = cell["numbers"]
        launches, busy = ("–", "–") if n["launches"] is None else (str(n["launches"]), f"{n['busy']:.0%}")
        speed = [f"{n['tokens_per_second']:.0f}", f"{n['tflops']:.3g}", _ratio(cell, timed)]
        rows.append([*row, *speed, _peak(n), launches, busy])
    notes = []
    if document["preset"] == LARGE:
        of = document["published"]
        speed = [str(of["tokens_per_second"]), str(of["tflops"])]
        rows.append([f"{of['who']}, published", "2 x 4096", *speed, *["–"] * 4])
        notes.append(_published(document))
    left_out = [cell for cell in document["cells"] if cell["status"] == "left out"]
    if left_out:
        notes.append(f"Not run, for want of time or of a package: {len(left_out)} of {len(document['cells'])} cells.")
    sizes = document["sizes"]
    caption = (
        f"A training step of a {sizes.get('kind', 'Llama')} of {document['parameters'] / 1e9:.3f} billion random "
        f"weights (hidden {sizes['hidden']}, {sizes['layers']} blocks; rank {R}, alpha {document['alpha']}, dropout "
        f"{document['dropout']:g}, all seven projections): forward, loss, backward, AdamW. Ratio: time over the frozen "
        "model's at that batch; one provider after the other, not interleaved. TFLOP/s: 4 flops a parameter and token. "
        f"{document['environment']['device']}; {software(document['environment'], document['date'])}."
    )
    return Table(caption, header, rows, frozenset(), frozenset(), notes)
