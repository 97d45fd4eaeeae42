"""Who may import whom: DESIGN.md lists the storeys, and every import of every module is held against that list."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lora_kernels"
ROOM = "lora_kernels"  # the package's own __init__
TOOLS = ("__main__", "cli", "demo/", "tuning/", "verify/", "benchmark/", "explaining/command")
KEEPERS = {"merging", "pissa", "switching"}  # what they put on a layer, such as _base, they read there too


class Arrow(NamedTuple):
    """``source`` imports ``target``: at its top, "lazy" in a function, or for "types" alone."""

    source: str
    target: str
    kind: str


class Design(NamedTuple):
    """What DESIGN.md allows."""

    storeys: list[list[str]]
    only: list[tuple[list[str], str]]
    exceptions: set[Arrow]
    by_name: set[str]

    def place(self, module: str) -> tuple[int, str]:
        """The storey and the entry of a module; of several entries the longest one, as a folder has rooms."""
        found = [(len(e), i, e) for i, storey in enumerate(self.storeys) for e in storey if stands_in(module, e)]
        assert found, f"{module} stands in no storey of DESIGN.md: say there what it may import, and who may import it"
        _, storey, entry = max(found)
        return storey, entry

    def allows(self, arrow: Arrow) -> bool:
        """Whether the order allows it: downwards, or inside a folder."""
        (above, entry), (below, other) = self.place(arrow.source), self.place(arrow.target)
        return above < below or (entry == other and entry.endswith("/"))


def stands_in(module: str, entry: str) -> bool:
    return module == entry or (entry.endswith("/") and f"{module}/".startswith(entry))


def read(text: str) -> Design:
    (block,) = re.findall(r"^```arrows\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    design = Design([], [], set(), set())
    for line in filter(None, (line.split("#")[0].strip() for line in block.splitlines())):
        kind = re.match(r"(only|lazy|types|by name)\s+(?=\S)", line)
        words = line[kind.end() if kind else 0 :]
        sources, _, target = (part.strip() for part in words.partition("->"))
        if kind is None:
            design.storeys.append(words.split())
        elif kind[1] == "only":
            design.only.append((sources.split(), target))
        elif kind[1] == "by name":
            design.by_name.update(words.split())
        else:
            design.exceptions.update(Arrow(source, target, kind[1]) for source in sources.split())
    return design


DESIGN = read((ROOT / "DESIGN.md").read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    """``models/model``; of a folder's ``__init__`` the folder, and of the package's own the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "/".join(parts[:-1] if parts[-1] == "__init__" else parts) or ROOM


SOURCES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(SOURCES[name].read_text(encoding="utf-8"))


def imports(name: str, text: str | None = None) -> Iterator[tuple[str, str, list[str]]]:
    """(dotted module, kind, names) of every import of a module, or of ``text`` in its place; all of them absolute."""
    package = [ROOM, *([] if name == ROOM else name.split("/"))]
    package = package if SOURCES[name].name == "__init__.py" else package[:-1]

    def walk(node: ast.AST, kind: str) -> Iterator[tuple[str, str, list[str]]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, kind, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*base, *filter(None, [node.module])]), kind, [alias.name for alias in node.names]
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                yield from walk(child, "types")
            for child in node.orelse:
                yield from walk(child, kind)
        else:
            inner = "lazy" if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) else kind
            for child in ast.iter_child_nodes(node):
                yield from walk(child, inner)

    yield from walk(tree_of(name) if text is None else ast.parse(text), "top")


def arrows_of(name: str, text: str | None = None) -> set[Arrow]:
    found = set()
    for module, kind, names in imports(name, text):
        if module.split(".")[0] == ROOM:
            room = "/".join(module.split(".")[1:]) or ROOM
            inner = [n if room == ROOM else f"{room}/{n}" for n in names]
            found |= {Arrow(name, one if one in SOURCES else room, kind) for one in inner or [room]}
    return {arrow for arrow in found if arrow.target != name}


@cache
def arrows() -> frozenset[Arrow]:
    return frozenset(arrow for name in SOURCES for arrow in arrows_of(name))


def wrong(found: set[Arrow] | frozenset[Arrow]) -> set[Arrow]:
    """The arrows that neither the order nor an exception allows."""
    excepted = DESIGN.exceptions | {Arrow(a.source, "*", a.kind) for a in DESIGN.exceptions if a.target == "*"}
    up = {arrow for arrow in found if not DESIGN.allows(arrow)}
    return {a for a in up if a not in excepted and a._replace(target="*") not in excepted}


def circles(found: set[tuple[str, str]]) -> list[list[str]]:
    """Every set of modules each of which leads to every other one (Tarjan's strongly connected components)."""
    leads: dict[str, set[str]] = {}
    for source, target in found:
        leads.setdefault(source, set()).add(target)
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    path: list[str] = []
    done: list[list[str]] = []

    def visit(room: str) -> None:
        order[room] = low[room] = len(order)
        path.append(room)
        for target in sorted(leads.get(room, ())):
            if target not in order:
                visit(target)
            if target in path:
                low[room] = min(low[room], low[target])
        if low[room] == order[room]:
            members = path[path.index(room) :]
            del path[path.index(room) :]
            done.extend([sorted(members)] if len(members) > 1 else [])

    for room in sorted(leads):
        if room not in order:
            visit(room)
    return done


# The list


def test_every_module_stands_in_one_storey() -> None:
    entries = [entry for storey in DESIGN.storeys for entry in storey]
    assert len(entries) == len(set(entries))
    places = {name: DESIGN.place(name)[1] for name in SOURCES}
    assert set(entries) - set(places.values()) == set(), "DESIGN.md names what is not there"


def test_the_storeys_of_the_flow_are_in_the_order_of_the_flow() -> None:
    flow = ["nn", "layer", "functional", "gate", "branches", "branches_autograd", "autograd"]
    flow += ["backends/triton/operators", "backends/triton/run/", "backends/triton/choose/", "ops", "reference"]
    storeys = [next(i for i, storey in enumerate(DESIGN.storeys) if entry in storey) for entry in flow]
    assert storeys == sorted(storeys)


def test_the_design_is_one_page() -> None:
    assert len((ROOT / "DESIGN.md").read_text(encoding="utf-8").splitlines()) <= 80


# Every import of every module


@pytest.mark.parametrize("name", SOURCES)
def test_imports_go_down(name: str) -> None:
    assert wrong(arrows_of(name)) == set()


@pytest.mark.parametrize(("sources", "target"), DESIGN.only, ids=[target for _, target in DESIGN.only])
def test_only_these_import_it(sources: list[str], target: str) -> None:
    allowed = [*sources, target]
    importers = {a.source for a in arrows() if stands_in(a.target, target)}
    assert not {name for name in importers if not any(stands_in(name, entry) for entry in allowed)}


def test_every_exception_is_needed() -> None:
    used = {arrow for arrow in arrows() if not DESIGN.allows(arrow)}
    used |= {arrow._replace(target="*") for arrow in used}
    assert used >= DESIGN.exceptions


def test_there_is_no_circle() -> None:
    """By top-level imports, and by those in functions too, less the exceptions that DESIGN.md gives a reason for."""
    assert circles({(a.source, a.target) for a in arrows() if a.kind == "top"}) == []
    excepted = {(a.source, a.target) for a in DESIGN.exceptions}
    run = {(a.source, a.target) for a in arrows() if a.kind != "types"}
    assert circles(run - excepted) == []


# What holds whatever the list says


def test_a_choice_knows_nothing_of_running() -> None:
    chosen = {a.target for a in arrows() if a.source.startswith("backends/triton/choose/")}
    assert not {t for t in chosen if t.startswith("backends/") and not stands_in(t, "backends/triton/choose/")}


def test_device_code_knows_triton_alone() -> None:
    kernels = [name for name in SOURCES if stands_in(name, "backends/triton/kernels/")]
    known = {module for name in kernels for module, _, _ in imports(name)}
    allowed = re.compile(r"triton(\.|$)|lora_kernels\.backends\.triton\.kernels(\.|$)|__future__$")
    assert len(kernels) > 5
    assert {module for module in known if not allowed.match(module)} == set()


def test_the_core_knows_no_tool_and_nothing_below_knows_the_layers() -> None:
    core = {a for a in arrows() if a.kind != "types" and not any(stands_in(a.source, tool) for tool in TOOLS)}
    assert not {a for a in core if any(stands_in(a.target, tool) for tool in TOOLS)}
    below = {"gate", "branches", "branches_autograd", "autograd", "ops", "fakes", "dispatch", "reference"}
    low = {a for a in core if a.source in below or stands_in(a.source, "backends/")}
    assert not {a for a in low if a.target in ("nn", "layer", "functional") or stands_in(a.target, "models/")}


def test_the_lowest_import_nothing_of_the_package() -> None:
    lowest = ("errors", "env", ROOM)
    assert {a for a in arrows() if a.source in lowest and a.kind != "types"} == set()
    of_config = {a.target for a in arrows() if a.source == "config"}
    assert of_config <= {"errors", "activations", "initialisation", "peft_fields"}


def test_only_ops_knows_torch_library() -> None:
    imported = {name for name in SOURCES for module, _, names in imports(name) if knows_library(module, names)}
    said = {
        name
        for name in SOURCES
        for node in ast.walk(tree_of(name))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.library"
    }
    assert imported | said == {"ops"}


def knows_library(module: str, names: list[str]) -> bool:
    return module.startswith("torch.library") or (module == "torch" and "library" in names)


def test_names_that_are_put_together_are_imported_by_these_alone() -> None:
    found = {name for name in SOURCES if imports_by_name(tree_of(name))}
    assert found == DESIGN.by_name


def imports_by_name(tree: ast.Module) -> bool:
    """Whether code imports a module of this package by a text."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args)
    named = [n.args[0] for n in calls if ast.unparse(n.func).split(".")[-1] in ("import_module", "__import__")]
    return any(isinstance(arg, ast.JoinedStr) or ROOM in ast.unparse(arg) for arg in named)


def test_a_layer_s_private_names_are_its_own() -> None:
    """``_x`` of ``LoRALayer`` is read and written by ``layer.py`` and ``nn.py``, and by those who keep it there."""
    (layer,) = (n for n in tree_of("layer").body if isinstance(n, ast.ClassDef) and n.name == "LoRALayer")
    stored = (n for n in ast.walk(layer) if isinstance(n, ast.Attribute | ast.Name) and isinstance(n.ctx, ast.Store))
    own = {n.attr if isinstance(n, ast.Attribute) else n.id for n in stored}
    own |= {n.name for n in layer.body if isinstance(n, ast.FunctionDef)} - set(dir(nn.Module))
    own = {name for name in own if re.fullmatch(r"_[a-z]\w*", name)}
    users = {name for name in SOURCES if own & set(taken(tree_of(name)))}
    assert users - {"layer", "nn"} == KEEPERS


def taken(tree: ast.Module) -> Iterator[str]:
    """The attributes that code takes of what is not itself."""
    found = (n for n in ast.walk(tree) if isinstance(n, ast.Attribute))
    return (n.attr for n in found if not (isinstance(n.value, ast.Name) and n.value.id in ("self", "cls")))


# That it would be seen


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("reference", "from .nn import FusedLoRALinear"),
        ("ops", "def f():\n    from . import dispatch"),
        ("backends/triton/choose/plans", "from ..run import streams"),
        ("backends/triton/choose/plans", "import lora_kernels.backends.triton.run.steps"),
        ("backends/triton/kernels/common", "from ....reference import forward"),
        ("autograd", "class A:\n    def f(self):\n        from .functional import lora_linear"),
        ("models/model", "from ..benchmark.setups import Layer"),
        ("errors", "if x:\n    from .env import y"),
        ("fsdp", "if TYPE_CHECKING:\n    from .nn import FusedLoRALinear"),
    ],
)
def test_an_arrow_back_up_is_seen(name: str, text: str) -> None:
    assert len(wrong(arrows_of(name, text))) == 1


def test_circles_are_seen() -> None:
    assert circles({("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("e", "a")}) == [["a", "b", "c"]]
