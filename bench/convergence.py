"""Fine-tunes one small Llama by PEFT, by this package and by this package compiled, on the same seeds: loss curves.

``python bench/convergence.py`` runs what ``bench/results/convergence.json`` does not hold yet (a run that was
interrupted goes on from there), draws ``docs/convergence.svg`` and tells how far the curves lie apart;
``python bench/tables.py --write`` then writes the table in ``docs/training.md``. About half an hour on two cores.

The model reads bytes. It is first trained whole on Python's licence and on sources of the standard library, once, and
kept in a file; then its adapters learn Python's own documentation (``pydoc_data/topics.py``), which it has not seen.
A seed stands for the adapters' first values, the order of the data and dropout's masks; the first two are the same for
every provider, the masks are each one's own. "PEFT again" is what such differences alone amount to: PEFT with lora_A
one rounding away, and with masks of another seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.llamas import AGAIN, PROVIDERS, Sizes, adapted, adapters, llama  # noqa: E402  (after the path)
from lora_kernels.benchmark.results import environment  # noqa: E402
from lora_kernels.console import json_text  # noqa: E402

RESULT = ROOT / "bench" / "results" / "convergence.json"
PICTURE = ROOT / "docs" / "convergence.svg"
BASE = ROOT / "out" / "convergence"  # git ignores it
LARGE = Sizes(hidden=448, intermediate=1216, layers=4)  # 10 million parameters
HELD_OUT = 8  # blocks of the documentation that no run trains on


@dataclass(frozen=True)
class Settings:
    """What a result is of. ``steps`` are fine-tuning steps; the held-out loss is taken every ``every`` steps."""

    sizes: Sizes = LARGE
    length: int = 128
    batch: int = 4
    pretraining: int = 60
    steps: int = 200
    every: int = 20
    rate: float = 2e-3
    r: int = 8
    seeds: tuple[int, ...] = (0, 1, 2)
    dropouts: tuple[float, ...] = (0.0, 0.1)


SMALL = Settings(Sizes(64, 96, 1), length=32, batch=2, pretraining=4, steps=4, every=2, seeds=(0, 1))


def blocks(paths: Sequence[str], length: int) -> Tensor:
    """The bytes of files of the standard library, (blocks, length)."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    data = b"\n".join((folder / path).read_bytes() for path in paths if (folder / path).is_file())
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()[: len(data) // length * length].view(-1, length)


def pretrained(settings: Settings, folder: Path) -> tuple[Any, str]:
    """The base, trained whole or read from its file, and a digest of its weights."""
    model = llama(settings.sizes)
    told = repr((settings.sizes, settings.length, settings.batch, settings.pretraining))
    path = folder / f"base-{hashlib.sha256(told.encode()).hexdigest()[:12]}.pt"
    if path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        data = blocks(("LICENSE.txt", "argparse.py", "typing.py", "inspect.py", "pathlib.py"), settings.length)
        generator = torch.Generator().manual_seed(0)
        train(model, list(model.parameters()), data, 2 * settings.batch, settings.pretraining, 1e-3, generator, "base")
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return model, digest.hexdigest()[:16]


def train(
    model: Any,
    parameters: list[Tensor],
    data: Tensor,
    batch: int,
    steps: int,
    rate: float,
    generator: torch.Generator,
    label: str,
    every: int = 10,
    held_out: Tensor | None = None,
) -> dict[str, list[float]]:
    """The loss of every step, and of ``held_out`` before the first step and after every ``every`` steps."""
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    losses: list[float] = []
    held = [] if held_out is None else [loss_of(model, held_out)]
    for step in range(1, steps + 1):
        tokens = data[torch.randint(len(data), (batch,), generator=generator)]
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % every == 0 or step == steps:
            if held_out is not None:
                held.append(loss_of(model, held_out))
            print(f"convergence: {label}, loss {losses[-1]:.3f}, {step}/{steps}", file=sys.stderr, flush=True)
    return {"train": losses, "held_out": held}


def loss_of(model: Any, tokens: Tensor) -> float:
    """Without dropout."""
    model.eval()
    with torch.no_grad():
        loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    model.train()
    return loss.item()


def fine_tune(base: Any, settings: Settings, provider: str, p: float, seed: int) -> dict[str, Any]:
    """One run, as it stands in the result."""
    data = blocks(("pydoc_data/topics.py",), settings.length)
    model = adapted(base, provider, settings.r, p, seed)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed + (1000 if provider == AGAIN else 0))
    label, began = f"{PROVIDERS[provider]}, dropout {p:g}, seed {seed}", time.monotonic()
    parameters = list(adapters(model).values())
    curves = train(
        model,
        parameters,
        data[HELD_OUT:],
        settings.batch,
        settings.steps,
        settings.rate,
        generator,
        label,
        settings.every,
        data[:HELD_OUT],
    )
    seconds = round(time.monotonic() - began, 1)
    return {"provider": provider, "dropout": p, "seed": seed, "seconds": seconds, **curves}


def run(settings: Settings, path: Path, folder: Path) -> dict[str, Any]:
    """All runs that the file does not hold; written after each one."""
    base, digest = pretrained(settings, folder)
    asked = json.loads(json_text(asdict(settings)))
    result: dict[str, Any] = {"settings": asked, "base": digest, "environment": environment("cpu"), "runs": []}
    if path.is_file():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if (earlier["settings"], earlier["base"]) != (asked, digest):
            raise SystemExit(
                f"convergence: {path} holds runs of other settings or of another base: name another file with --json, "
                "or delete this one."
            )
        result["runs"] = earlier["runs"]
    done = {(entry["provider"], entry["dropout"], entry["seed"]) for entry in result["runs"]}
    for p in settings.dropouts:
        for seed in settings.seeds:
            for provider in PROVIDERS:
                if (provider, p, seed) not in done:
                    result["runs"].append(fine_tune(base, settings, provider, p, seed))
                    partial = path.with_name(f"{path.name}.tmp")
                    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
                    partial.replace(path)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, draws, and tells; 1 if a provider lies further from PEFT than the seeds lie apart."""
    from bench.convergence_report import draw, summary

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULT, metavar="FILE", help="default: the committed result")
    parser.add_argument("--plot", type=Path, default=PICTURE, metavar="FILE", help="default: the committed picture")
    parser.add_argument("--base", type=Path, default=BASE, metavar="FOLDER", help="where the trained base is kept")
    parser.add_argument("--steps", type=int, metavar="N", help="of each run (default: 200)")
    parser.add_argument("--small", action="store_true", help="a tiny model and few steps, to see that it runs")
    args = parser.parse_args(arguments)
    settings = SMALL if args.small else Settings()
    if args.steps is not None:
        settings = replace(settings, steps=args.steps)
    result = run(settings, args.json, args.base)
    draw(result, args.plot)
    apart = summary(result)
    for row in apart:
        print(row)
    return 0 if all(row.within for row in apart) else 1


if __name__ == "__main__":
    raise SystemExit(main())
