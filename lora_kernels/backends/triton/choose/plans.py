"""The ways to run a pass, as data: what a choice depends on, the plans to choose among, and JSON both ways.

============ ===================================================================================== ========
forward      what runs                                                                             launches
============ ===================================================================================== ========
Ring         one pass over W in CUDA C++, for up to 16 tokens of bfloat16; needs NVRTC                1
FewTokens    one pass over W that forms y and h; with ``splits`` > 1 each takes a share of K       1, or 2
Fused        h, then one product whose accumulator takes s h Bᵀ as an additional K step            2
LoraFirst    h, then y₀ = bias + s h Bᵀ, then the library's product accumulates onto it (beta = 1) 3
BaseFirst    h, then the library's product, then bias + s h Bᵀ is added onto it in place           3
Hopper       h, then one product with the low-rank term as one more K step, both in Gluon          3
HopperInside the same in one pass that forms h too, shared by the tiles of a row; no dropout       2
============ ===================================================================================== ========

All but the compositions round y once. They round twice, as PyTorch's own do: y₀ (or the base) and then the sum. The
Gluon kernels are for compute capability 9.0; the first launch packs A and B as they load them.

A backward pass takes dh and db (in one read of dy and a second stage, or one after the other), dx, and da, which has a
second stage too where its rows are split:

=========== ======================================================================================= =================
backward    dx                                                                                      launches, with da
=========== ======================================================================================= =================
DxFused     one product whose accumulator begins with D * (dh A)                                    4 to 6
DxLoraFirst D * (dh A), then the library's product accumulates onto it (beta = 1)                   5 to 7
DxHopper    dh and db in one read of dy, then one product in Gluon that takes D * (dh A)            6
DxInside    the same, dh formed in the product and db in a read of dy of its own; no dropout        5
RingGrads   in CUDA C++, for up to 16 tokens of bfloat16: W is read once, and dh, db beside it      2
=========== ======================================================================================= =================

Every plan has a ``kind`` (its name in tables), its ``launches``, and ``is_composition``: whether the large product is
the library's.

With ``beside`` small kernels, which read memory, run on a second stream beside the large one, which counts: in backward
whatever dx does not wait for, in forward the h of ``BaseFirst``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, TypeAlias

from ....errors import InvalidArgumentError
from .blocks import DhDbConfig, ExpandConfig, FewTokensConfig, GemmConfig, OuterConfig, ShrinkConfig
from .group_plans import Apart, DxHopperGroup, GroupPlan, HopperGroup
from .hopper_blocks import (
    HopperDhDb,
    HopperOuter,
    HopperPlainShrink,
    HopperProduct,
    HopperProductH,
    HopperShrink,
)
from .hopper_group_blocks import HopperGroupDa, HopperGroupDx, HopperGroupShrink
from .ring import RingConfig

__all__ = [
    "DIRECTIONS",
    "DTYPES",
    "GLUON_PLANS",
    "KINDS",
    "UNMEASURED",
    "VARIANTS",
    "BackwardPlan",
    "BaseFirst",
    "Cell",
    "DhDb",
    "DxFused",
    "DxHopper",
    "DxInside",
    "DxLoraFirst",
    "FewTokens",
    "ForwardPlan",
    "Fused",
    "GluonPlan",
    "Hopper",
    "HopperInside",
    "LoraFirst",
    "Plan",
    "Ring",
    "RingGrads",
    "Skinny",
    "is_of",
    "plan_from_json",
    "plan_to_json",
]

DIRECTIONS = ("forward", "backward")
DTYPES = ("bfloat16", "float16", "float32", "tf32")
# How the fused product loads its operands: tiles of pointers; or by TMA, in programs that walk the tiles.
VARIANTS = ("pointer", "persistent")
MODES = ("split", "coop")  # of the Gluon product: two consumers with half a tile's rows each, or one of all warps


def _itemsize(dtype: str) -> int:
    return 2 if dtype in ("bfloat16", "float16") else 4


@dataclass(frozen=True, slots=True)
class Skinny:
    """What the way to a product with R on one side depends on: to h or da over x's columns, to dh or db over dy's.

    Attributes:
        tokens: the token bucket, the next power of 2 of M.
        columns: K of x, N of dy.
        dtype: one of ``DTYPES``.
        dropout: whether a mask is drawn; dy has none.
    """

    tokens: int
    columns: int
    r: int
    dtype: str
    dropout: bool

    @property
    def itemsize(self) -> int:
        return _itemsize(self.dtype)

    @property
    def tf32(self) -> bool:
        return self.dtype == "tf32"


@dataclass(frozen=True, slots=True)
class Cell:
    """What the choice of a plan depends on.

    Attributes:
        direction: which pass, one of ``DIRECTIONS``; of backward, with dx, da and db due.
        tokens: the token bucket, the next power of 2 of M.
        k, n, r: in_features, out_features, rank.
        dtype: the compute dtype, one of ``DTYPES``; ``"tf32"`` is fp32 whose products may round to TF32.
        dropout: whether a mask is drawn.
        others: of layers that read one x, each further one's out_features and rank; empty for a layer by itself.
    """

    direction: str
    tokens: int
    k: int
    n: int
    r: int
    dtype: str
    dropout: bool
    others: tuple[tuple[int, int], ...] = ()

    @property
    def itemsize(self) -> int:
        return _itemsize(self.dtype)

    @property
    def tf32(self) -> bool:
        return self.dtype == "tf32"

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """out_features and rank of each layer."""
        return ((self.n, self.r), *self.others)

    @property
    def ns(self) -> tuple[int, ...]:
        return tuple(n for n, _ in self.sizes)

    @property
    def rs(self) -> tuple[int, ...]:
        return tuple(r for _, r in self.sizes)

    @property
    def members(self) -> tuple[Cell, ...]:
        """Each layer of a group by itself."""
        return tuple(replace(self, n=n, r=r, others=()) for n, r in self.sizes)

    @property
    def of_x(self) -> Skinny:
        """For h and da."""
        return Skinny(self.tokens, self.k, self.r, self.dtype, self.dropout)

    @property
    def of_dy(self) -> Skinny:
        """For dh and db."""
        return Skinny(self.tokens, self.n, self.r, self.dtype, False)

    def __str__(self) -> str:
        dropout = " dropout" if self.dropout else ""
        ns, rs = ("+".join(map(str, values)) for values in (self.ns, self.rs))
        return f"{self.direction} {self.dtype} M<={self.tokens} {self.k}->{ns} r={rs}{dropout}"


@dataclass(frozen=True, slots=True)
class FewTokens:
    """``splits`` programs share the sum over K of each strip of y; ``pdl``: the second stage starts early."""

    kind: ClassVar[str] = "few_tokens"
    is_composition: ClassVar[bool] = False
    config: FewTokensConfig
    splits: int = 1
    pdl: bool = False

    @property
    def launches(self) -> int:
        return _stages(self.splits)

    def __str__(self) -> str:
        c = self.config
        return f"few_tokens {c.block_m}x{c.block_n}x{c.block_k}/{c.num_stages} splits={self.splits}{_pdl(self.pdl)}"


@dataclass(frozen=True, slots=True)
class Ring:
    """In CUDA C++: ``producers`` blocks form h; clusters of ``splits`` share the sum over K. ``pdl``: it prefetches W
    while the kernel before it ends."""

    kind: ClassVar[str] = "ring"
    is_composition: ClassVar[bool] = False
    launches: ClassVar[int] = 1
    config: RingConfig
    splits: int = 1
    producers: int = 4
    blocks_a_multiprocessor: int = 1
    pdl: bool = False

    def __str__(self) -> str:
        return f"ring {self.config.name} splits={self.splits} producers={self.producers}{_pdl(self.pdl)}"


@dataclass(frozen=True, slots=True)
class Fused:
    """``variant``: one of ``VARIANTS``; ``pdl``: the product starts while h is still computed."""

    kind: ClassVar[str] = "fused"
    is_composition: ClassVar[bool] = False
    launches: ClassVar[int] = 2
    shrink: ShrinkConfig
    gemm: GemmConfig
    variant: str = "pointer"
    pdl: bool = False

    def __str__(self) -> str:
        g = self.gemm
        tile = f"{g.block_rows}x{g.block_columns}x{g.block_sum}/{g.num_stages} warps={g.num_warps}"
        return f"fused {self.variant} {tile} {_shrink(self.shrink)}{_pdl(self.pdl)}"


@dataclass(frozen=True, slots=True)
class LoraFirst:
    """``pdl``: the kernel that writes y₀ is launched while h is still computed."""

    kind: ClassVar[str] = "lora_first"
    is_composition: ClassVar[bool] = True
    launches: ClassVar[int] = 3
    shrink: ShrinkConfig
    expand: ExpandConfig
    pdl: bool = False

    def __str__(self) -> str:
        return f"lora_first {_shrink(self.shrink)} {_expand(self.expand)}{_pdl(self.pdl)}"


@dataclass(frozen=True, slots=True)
class BaseFirst:
    """``beside``: h is computed on a second stream meanwhile."""

    kind: ClassVar[str] = "base_first"
    is_composition: ClassVar[bool] = True
    launches: ClassVar[int] = 3
    shrink: ShrinkConfig
    expand: ExpandConfig
    beside: bool = False

    def __str__(self) -> str:
        return f"base_first {_shrink(self.shrink)} {_expand(self.expand)}{_beside(self.beside)}"


@dataclass(frozen=True, slots=True)
class Hopper:
    """In Gluon: h by ``shrink`` (with dropout by ``HopperShrink``, which draws the mask too), then the product."""

    kind: ClassVar[str] = "hopper"
    is_composition: ClassVar[bool] = False
    launches: ClassVar[int] = 3
    shrink: HopperShrink | HopperPlainShrink
    product: HopperProduct

    def __str__(self) -> str:
        return f"hopper {self.product.name} shrink {self.shrink.name}"


@dataclass(frozen=True, slots=True)
class HopperInside:
    """In Gluon: y and h in one pass over x; without dropout."""

    kind: ClassVar[str] = "hopper_inside"
    is_composition: ClassVar[bool] = False
    launches: ClassVar[int] = 2
    product: HopperProductH

    def __str__(self) -> str:
        return f"hopper_inside {self.product.name}"


@dataclass(frozen=True, slots=True)
class DhDb:
    """How dh and db come about: ``joint``, by ``dh_db`` in one read of dy; else dh by ``shrink``, then db by ``db``.

    Where db is not due, dh is by ``shrink``.
    """

    shrink: ShrinkConfig
    db: OuterConfig
    dh_db: DhDbConfig
    joint: bool

    @property
    def launches(self) -> int:
        return 2 if self.joint else self.dh_launches + _stages(self.db.splits)

    @property
    def dh_launches(self) -> int:
        """Of dh, where nothing else is due."""
        return _stages(self.shrink.splits)

    def __str__(self) -> str:
        c = self.dh_db
        joint = f"dh+db {c.block_m}x{c.block_n}/{c.chunk_m}"
        return joint if self.joint else f"dh {_shrink(self.shrink)} db {_outer(self.db)}"


@dataclass(frozen=True, slots=True)
class DxFused:
    """``variant``: one of ``VARIANTS``."""

    kind: ClassVar[str] = "dx_fused"
    is_composition: ClassVar[bool] = False
    dx_launches: ClassVar[int] = 1
    hidden: DhDb
    da: OuterConfig
    gemm: GemmConfig
    variant: str = "pointer"
    beside: bool = False

    @property
    def launches(self) -> int:
        return _launches(self)

    def __str__(self) -> str:
        g = self.gemm
        tile = f"{g.block_rows}x{g.block_columns}x{g.block_sum}/{g.num_stages} warps={g.num_warps}"
        return f"dx_fused {self.variant} {tile} {_rest(self)}"


@dataclass(frozen=True, slots=True)
class DxLoraFirst:
    kind: ClassVar[str] = "dx_lora_first"
    is_composition: ClassVar[bool] = True
    dx_launches: ClassVar[int] = 2
    hidden: DhDb
    da: OuterConfig
    expand: ExpandConfig
    beside: bool = False

    @property
    def launches(self) -> int:
        return _launches(self)

    def __str__(self) -> str:
        return f"dx_lora_first {_expand(self.expand)} {_rest(self)}"


@dataclass(frozen=True, slots=True)
class DxHopper:
    """In Gluon: dh and db by ``dh_db``; then dx, and da with the sums of da and db, with ``beside`` on two streams."""

    kind: ClassVar[str] = "dx_hopper"
    is_composition: ClassVar[bool] = False
    launches: ClassVar[int] = 6
    dh_db: HopperDhDb
    dx: HopperProduct
    da: HopperOuter
    beside: bool = False

    def __str__(self) -> str:
        return f"dx_hopper {self.dx.name} dh+db {self.dh_db.name} da {self.da.name}{_beside(self.beside)}"


@dataclass(frozen=True, slots=True)
class DxInside:
    """In Gluon: dx and dh in one pass over dy, without dropout; db and da by ``db`` and ``da``, db with ``beside`` on a
    second stream beside dx."""

    kind: ClassVar[str] = "dx_inside"
    is_composition: ClassVar[bool] = False
    launches: ClassVar[int] = 5
    dx: HopperProductH
    db: HopperOuter
    da: HopperOuter
    beside: bool = False

    def __str__(self) -> str:
        return f"dx_inside {self.dx.name} db {self.db.name} da {self.da.name}{_beside(self.beside)}"


@dataclass(frozen=True, slots=True)
class RingGrads:
    """In CUDA C++: ``slices`` blocks share the sum of dh, ``splits`` each strip of dx's. ``pdl``: the second launch
    loads A and x while the first ends."""

    kind: ClassVar[str] = "ring_grads"
    is_composition: ClassVar[bool] = False
    launches: ClassVar[int] = 2
    slices: int = 1
    splits: int = 1
    pdl: bool = False

    def __str__(self) -> str:
        return f"ring_grads slices={self.slices} splits={self.splits}{_pdl(self.pdl)}"


ForwardPlan: TypeAlias = Ring | FewTokens | Fused | LoraFirst | BaseFirst
BackwardPlan: TypeAlias = DxFused | DxLoraFirst
GluonPlan: TypeAlias = Hopper | HopperInside | DxHopper | DxInside
Plan: TypeAlias = ForwardPlan | BackwardPlan | RingGrads | GluonPlan | GroupPlan
GLUON_PLANS = (Hopper, HopperInside, DxHopper, DxInside)
UNMEASURED = (RingGrads,)  # on no GPU yet: taken where a tuned table has it ahead, and else last

_BY_DIRECTION: dict[str, tuple[type[Any], ...]] = {
    "forward": (Ring, FewTokens, Fused, LoraFirst, BaseFirst, Hopper, HopperInside, HopperGroup, Apart),
    "backward": (DxFused, DxLoraFirst, DxHopper, DxInside, RingGrads, DxHopperGroup, Apart),
}
KINDS: dict[str, type[Any]] = {kind.kind: kind for kinds in _BY_DIRECTION.values() for kind in kinds}
_CONFIGS: tuple[type[Any], ...] = (
    RingConfig,
    FewTokensConfig,
    ShrinkConfig,
    GemmConfig,
    ExpandConfig,
    OuterConfig,
    DhDbConfig,
    DhDb,
    HopperShrink,
    HopperPlainShrink,
    HopperProduct,
    HopperProductH,
    HopperDhDb,
    HopperOuter,
    HopperGroupShrink,
    HopperGroupDx,
    HopperGroupDa,
)


def is_of(plan: Plan, direction: str) -> bool:
    """Whether ``plan`` is one for ``direction``."""
    return isinstance(plan, _BY_DIRECTION[direction])


def _pdl(pdl: bool) -> str:
    return " pdl" if pdl else ""


def _beside(beside: bool) -> str:
    return " beside" if beside else ""


def _shrink(c: ShrinkConfig) -> str:
    return f"shrink {c.block_m}x{c.block_k}/{c.num_stages} splits={c.splits}"


def _expand(c: ExpandConfig) -> str:
    return f"expand {c.block_m}x{c.block_n}"


def _outer(c: OuterConfig) -> str:
    return f"{c.block_m}x{c.block_k}/{c.num_stages} splits={c.splits}"


def _stages(splits: int) -> int:
    """Launches of what is split: a second stage adds the parts."""
    return 1 + (splits > 1)


def _launches(plan: BackwardPlan) -> int:
    return plan.hidden.launches + plan.dx_launches + _stages(plan.da.splits)


def _rest(plan: BackwardPlan) -> str:
    return f"{plan.hidden} da {_outer(plan.da)}{_beside(plan.beside)}"


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """``plan`` as JSON knows it: its ``kind`` and its fields, the configurations as objects of their own."""
    return {"kind": plan.kind, **asdict(plan)}


def plan_from_json(document: Mapping[str, Any]) -> Plan:
    """The plan that ``plan_to_json`` wrote.

    Raises:
        InvalidArgumentError: ``document`` is no such object: an unknown kind, a field too many or too few, or a value
            that no configuration has.
    """
    if not isinstance(document, Mapping) or document.get("kind") not in tuple(KINDS):  # which asks no hash
        raise InvalidArgumentError(f"a plan is an object whose 'kind' is one of {', '.join(KINDS)}; got {document!r}.")
    plan: Plan = _parsed(KINDS[document["kind"]], {name: document[name] for name in document if name != "kind"})
    return plan


def _parsed(kind: type[Any], document: Any) -> Any:
    """An instance of the dataclass ``kind``; the annotations say what each value may be."""
    names = [field.name for field in fields(kind)]
    if not isinstance(document, Mapping) or set(document) != set(names):
        raise InvalidArgumentError(f"{kind.__name__} has the fields {', '.join(names)}; got {document!r}.")
    return kind(
        **{field.name: _value(kind, field.name, str(field.type), document[field.name]) for field in fields(kind)}
    )


def _value(kind: type[Any], name: str, annotation: str, value: Any) -> Any:
    if configs := [config for config in _CONFIGS if config.__name__ in annotation.split(" | ")]:
        return _parsed(_with_fields_of(value, configs), value)
    if annotation == "Ranks":
        given = value if isinstance(value, (list, tuple)) else ()
        if not 2 <= len(given) <= 4:
            raise InvalidArgumentError(f"{name} of {kind.__name__} is {value!r} and must be a list of 2 to 4 ranks.")
        return tuple(_value(kind, "rank", "int", rank) for rank in given)
    if annotation == "str":
        allowed, right = _words(name, value)
    elif annotation == "bool":
        allowed, right = "true or false", isinstance(value, bool)
    else:
        power = name.startswith("block_") or name in ("num_warps", "warps", "rank")
        allowed = f"a positive integer{', a power of 2' if power else ''}, at most 65536"
        right = type(value) is int and 1 <= value <= 65536 and not (power and value & (value - 1))
    if not right:
        raise InvalidArgumentError(f"{name} of {kind.__name__} is {value!r} and must be {allowed}.")
    return value


def _with_fields_of(document: Any, configs: list[type[Any]]) -> type[Any]:
    """Of ``configs`` the one that has the fields of ``document``, else the first: parsing it tells what is wrong."""
    given = set(document) if isinstance(document, Mapping) else set()
    return next((config for config in configs if {field.name for field in fields(config)} == given), configs[0])


def _words(name: str, value: Any) -> tuple[str, bool]:
    """Which words a field takes, and whether ``value`` is one."""
    known = {"variant": VARIANTS, "mode": MODES}.get(name)
    if known is None:
        return "a name", isinstance(value, str) and value.isidentifier()
    return f"one of {', '.join(known)}", value in known
