"""The CUDA kernels on the host: compiles their bodies with g++ and composes them as ``csrc/cuda/operators.cu`` does."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from ctypes import Structure, byref, c_bool, c_double, c_int, c_int64, c_uint32, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_kernels.packed_mask import dropout_threshold

ROOT = Path(__file__).parents[2]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHRINK, GRADIENT, DH_DB, COLUMN_SUM = range(4)


class Matrix(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("row_stride", c_int64),
        ("aligned", c_bool),
    ]


class Operand(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("dtype", c_int),
        ("rows", c_int64),
        ("columns", c_int64),
        ("row_stride", c_int64),
        ("column_stride", c_int64),
    ]


class Dropout(Structure):
    _fields_ = [("seed", c_void_p), ("keep", c_uint32)]


class Slices(Structure):
    _fields_ = [("count", c_int64), ("length", c_int64)]


class ShrinkArgs(Structure):
    _fields_ = [
        ("x", Matrix),
        ("a", Operand),
        ("dropout", Dropout),
        ("out", c_void_p),
        ("slices", Slices),
        ("scale", c_double),
    ]


class GradientArgs(Structure):
    _fields_ = [
        ("x", Matrix),
        ("hidden", Operand),
        ("dropout", Dropout),
        ("parts", c_void_p),
        ("slices", Slices),
        ("rank_stride", c_int64),
        ("column_stride", c_int64),
    ]


class ExpandArgs(Structure):
    _fields_ = [
        ("hidden", Operand),
        ("factor", Operand),
        ("bias", c_void_p),
        ("bias_dtype", c_int),
        ("bias_stride", c_int64),
        ("dropout", Dropout),
        ("out", c_void_p),
        ("scale", c_double),
    ]


class DhDbArgs(Structure):
    _fields_ = [
        ("dy", Matrix),
        ("b", Operand),
        ("hidden", Operand),
        ("dh_parts", c_void_p),
        ("db_parts", c_void_p),
        ("slices", Slices),
    ]


class ReduceArgs(Structure):
    _fields_ = [
        ("parts", c_void_p),
        ("count", c_int64),
        ("elements", c_int64),
        ("scale", c_double),
        ("out", c_void_p),
        ("dtype", c_int),
    ]


class ColumnSumArgs(Structure):
    _fields_ = [("dy", Matrix), ("parts", c_void_p), ("slices", Slices)]


def compile_host(folder: Path, sources: Path = ROOT, flags: Sequence[str] = ("-O1",)) -> Path:
    """The shared library of ``sources``' tests/native_host/kernels.cpp, built in ``folder``."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("g++ is not installed: the CUDA kernels' bodies cannot be compiled for the host.")
    library = folder / "libcuda_host.so"
    source = sources / "tests" / "native_host" / "kernels.cpp"
    command = [compiler, "-std=c++17", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", *flags]
    subprocess.run([*command, str(source), "-o", str(library)], check=True, capture_output=True, text=True)
    return library


def matrix(t: Tensor) -> Matrix:
    aligned = t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0
    return Matrix(t.data_ptr(), t.shape[0], t.shape[1], t.stride(0), aligned)


def operand(t: Tensor) -> Operand:
    return Operand(t.data_ptr(), DTYPES.index(t.dtype), t.shape[0], t.shape[1], t.stride(0), t.stride(1))


@dataclass(frozen=True)
class Emulation:
    """The operators, kernel by kernel. ``downwards``: in which order the warps of a block take their turns.

    ``small``: which ranks take the small instance where there are two; None as ``csrc/cuda/launch.h`` says.
    """

    library: ctypes.CDLL
    downwards: bool = False
    small: bool | None = None

    def _small(self, dtype: torch.dtype, ranks: int) -> bool:
        return self.small if self.small is not None else ranks <= 16 or dtype == torch.float64

    def slices(self, kernel: int, dtype: torch.dtype, rows: int, columns: int, ranks: int = 1) -> Slices:
        length = c_int64()
        sizes = (c_int64(rows), c_int64(columns), c_int64(ranks))
        self.library.lora_slices.restype = c_int64
        small = c_bool(self._small(dtype, ranks))
        count = self.library.lora_slices(kernel, DTYPES.index(dtype), *sizes, small, byref(length))
        return Slices(count, length.value)

    def _run(self, name: str, dtype: torch.dtype, args: Structure, *more: object) -> None:
        getattr(self.library, f"lora_{name}")(DTYPES.index(dtype), byref(args), *more, c_bool(self.downwards))

    def mask(self, seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
        keep = torch.empty((rows, columns), dtype=torch.bool)
        pointers = (c_void_p(seed.data_ptr()), c_uint32(65536 - dropout_threshold(p)), c_void_p(keep.data_ptr()))
        self.library.lora_mask(*pointers, c_int64(rows), c_int64(columns), c_bool(self.downwards))
        return keep

    def reduce(self, parts: Tensor, count: int, scale: float, out: Tensor) -> Tensor:
        args = ReduceArgs(parts.data_ptr(), count, out.numel(), scale, out.data_ptr(), DTYPES.index(out.dtype))
        self._run("reduce", parts.dtype, args)
        return out

    def shrink(self, x: Tensor, factor: Tensor, dropout: Dropout, scale: float) -> Tensor:
        ranks = factor.shape[0]
        slices = self.slices(SHRINK, x.dtype, *x.shape, ranks)
        parts = _poisoned(slices.count, x.shape[0], ranks, dtype=_sum_dtype(x))
        alone = slices.count == 1
        args = ShrinkArgs(matrix(x), operand(factor), dropout, parts.data_ptr(), slices, scale if alone else 1.0)
        self._run("shrink", x.dtype, args, c_bool(self._small(x.dtype, ranks)))
        return parts[0] if alone else self.reduce(parts, slices.count, scale, torch.empty_like(parts[0]))

    def gradient(
        self, x: Tensor, hidden: Tensor, dropout: Dropout, scale: float, by_columns: bool, out: Tensor
    ) -> Tensor:
        ranks, columns = hidden.shape[1], x.shape[1]
        slices = self.slices(GRADIENT, x.dtype, *x.shape, ranks)
        parts = _poisoned(slices.count, ranks, columns, dtype=_sum_dtype(x))
        strides = (1, ranks) if by_columns else (columns, 1)
        args = GradientArgs(matrix(x), operand(hidden.t()), dropout, parts.data_ptr(), slices, *strides)
        self._run("gradient", x.dtype, args, c_bool(self._small(x.dtype, ranks)))
        return self.reduce(parts, slices.count, scale, out)

    def expand(
        self, dtype: torch.dtype, hidden: Tensor, factor: Tensor, bias: Tensor | None, dropout: Dropout, scale: float
    ) -> Tensor:
        out = _poisoned(hidden.shape[0], factor.shape[0], dtype=dtype)
        of_bias = (None, 0, 0) if bias is None else (bias.data_ptr(), DTYPES.index(bias.dtype), bias.stride(0))
        args = ExpandArgs(operand(hidden), operand(factor), *of_bias, dropout, out.data_ptr(), scale)
        self._run("expand", dtype, args)
        return out

    def dh_db(self, dy: Tensor, lora_b: Tensor, h: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        (rows, columns), ranks = dy.shape, lora_b.shape[1]
        slices = self.slices(DH_DB, dy.dtype, rows, columns)
        self.library.lora_dh_db_tiles.restype = c_int64
        tiles = self.library.lora_dh_db_tiles(DTYPES.index(dy.dtype), c_int64(columns))
        dh_parts = _poisoned(tiles, rows, ranks, dtype=h.dtype)
        db_parts = _poisoned(slices.count, columns, ranks, dtype=h.dtype)
        args = DhDbArgs(
            matrix(dy), operand(lora_b.t()), operand(h.t()), dh_parts.data_ptr(), db_parts.data_ptr(), slices
        )
        self._run("dh_db", dy.dtype, args)
        dh = self.reduce(dh_parts, tiles, scaling, torch.empty_like(h))
        return dh, self.reduce(db_parts, slices.count, scaling, torch.empty(lora_b.shape, dtype=lora_b.dtype))

    def column_sum(self, dy: Tensor, bias: Tensor) -> Tensor:
        slices = self.slices(COLUMN_SUM, dy.dtype, *dy.shape)
        parts = _poisoned(slices.count, dy.shape[1], dtype=_sum_dtype(dy))
        self._run("column_sum", dy.dtype, ColumnSumArgs(matrix(dy), parts.data_ptr(), slices))
        return self.reduce(parts, slices.count, 1.0, torch.empty_like(bias))

    def run(
        self,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        dy: Tensor,
        scaling: float,
        p: float,
        seed: Tensor | None,
        fused: bool = True,
    ) -> dict[str, Tensor]:
        """h, y and every gradient. ``fused``: dh with db where the operators fuse them."""
        nothing = Dropout(None, 0)
        dropout = nothing if seed is None else Dropout(seed.data_ptr(), 65536 - dropout_threshold(p))
        keep_scale = 1.0 if seed is None else 1.0 / (1.0 - p)
        x, dy = (t if t.shape[1] <= 1 or t.stride(1) == 1 else t.contiguous() for t in (x, dy))
        h = self.shrink(x, lora_a, dropout, keep_scale)
        y = _accumulated(self.expand(x.dtype, h, lora_b, bias, nothing, scaling), x, weight.t())
        if fused and lora_b.shape[1] <= 16:
            dh, db = self.dh_db(dy, lora_b, h, scaling)
        else:
            dh = self.shrink(dy, lora_b.t(), nothing, scaling)
            db = self.gradient(dy, h, nothing, scaling, True, torch.empty(lora_b.shape, dtype=lora_b.dtype))
        da = self.gradient(x, dh, dropout, keep_scale, False, torch.empty(lora_a.shape, dtype=lora_a.dtype))
        dx = _accumulated(self.expand(dy.dtype, dh, lora_a.t(), None, dropout, keep_scale), dy, weight)
        results = {"h": h, "y": y, "dx": dx, "da": da, "db": db}
        return results if bias is None else results | {"dbias": self.column_sum(dy, bias)}


def _sum_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def _accumulated(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``out + left right`` as the library's GEMM gives it with beta = 1: fp32 sums or wider, one rounding."""
    wide = torch.float64 if out.dtype in (torch.float64, torch.float32) else torch.float32
    return (out.to(wide) + left.to(wide) @ right.to(wide)).to(out.dtype)
