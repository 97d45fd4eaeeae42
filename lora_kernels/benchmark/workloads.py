"""What is measured: a ``Workload`` is one cell of a table. Nothing here runs."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["DIRECTIONS", "DTYPES", "FIELDS", "LAYER", "LAYERS", "NF4", "SUBJECTS", "Workload"]

DTYPES = ("float32", "bfloat16", "float16")
DIRECTIONS = {
    "forward": "forward without a graph",
    "backward": "backward alone, of a graph that is kept",
    "dx": "backward with the input as the only gradient",
    "step": "forward and backward",
    "overhead": "host time of a forward without a graph",
    "overhead-grad": "host time of a forward that records a graph",
    "memory": "bytes kept for backward, and the peak of a step",
}
LAYER, NF4 = "layer", "nf4"
LAYERS = (LAYER, NF4)  # the subjects that are one layer with one adapter
SUBJECTS = {
    LAYER: "one layer with LoRA",
    NF4: "one layer with LoRA over a weight in bitsandbytes' NF4",
    "dora": "one layer, LoRA and DoRA",
    "two-adapters": "one layer, two active adapters of rank r",
    "three-adapters": "one layer, three active adapters of rank r",
    "mixed-batch": "one layer, four rows with two adapters and none",
    "three-layers": "three layers of one x: N, N / 4 and N / 4, as q, k and v are",
    "decoder-block": "a Llama block of hidden size K with an MLP of N, all seven projections adapted",
}


@dataclass(frozen=True)
class Workload:
    """One cell: x (tokens, in_features) through a layer of rank r.

    Attributes:
        direction: one of ``DIRECTIONS``.
        tokens, in_features, out_features, r: M, K, N, R.
        dtype: compute dtype, one of ``DTYPES``.
        adapter_dtype: dtype of the adapters; None is the package's (and PEFT's) default, fp32 over a 16-bit base.
        p: dropout probability.
        bias: whether the frozen layer has a bias.
        train_bias: whether that bias trains beside the adapters, as in the worked example.
        subject: what is adapted, one of ``SUBJECTS``; the providers of all but the first are in ``model_providers``.
    """

    direction: str
    tokens: int
    in_features: int
    out_features: int
    r: int
    dtype: str = "float32"
    adapter_dtype: str | None = None
    p: float = 0.0
    bias: bool = False
    train_bias: bool = False
    subject: str = LAYER

    def has(self, name: str, values: tuple[str, ...]) -> bool:
        """Whether the field ``name`` has one of ``values``, as text."""
        return str(getattr(self, name)) in values

    def is_within(self, other: Workload) -> bool:
        """Whether ``other`` is the same for larger sizes, whatever its rank: its frozen layer has at least the work."""
        sizes = ("tokens", "in_features", "out_features")
        alike = all(getattr(self, name) == getattr(other, name) for name in FIELDS if name not in (*sizes, "r"))
        return alike and all(getattr(self, name) <= getattr(other, name) for name in sizes)

    @property
    def adapters(self) -> str:
        """The adapters' dtype, the default resolved."""
        return self.adapter_dtype or "float32"

    @property
    def has_backward(self) -> bool:
        return self.direction in ("backward", "dx", "step", "memory")

    @property
    def has_forward(self) -> bool:
        return self.direction in ("forward", "step")

    @property
    def records(self) -> bool:
        """Whether x requires a gradient, as behind the first layer of a model it does."""
        return self.has_backward or self.direction == "overhead-grad"

    @property
    def shape(self) -> str:
        return f"{self.in_features}→{self.out_features}"

    def __str__(self) -> str:
        subject = [] if self.subject == LAYER else [self.subject]
        parts = [*subject, self.direction, f"M={self.tokens}", self.shape, f"r={self.r}", self.dtype]
        if self.adapter_dtype:
            parts.append(f"adapters {self.adapter_dtype}")
        if self.p:
            parts.append(f"p={self.p}")
        return " ".join([*parts, *["trainable"] * self.train_bias, *["bias"] * self.bias])


FIELDS = tuple(f.name for f in fields(Workload))
