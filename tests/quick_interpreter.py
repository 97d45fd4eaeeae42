"""Triton's interpreter without the work that changes nothing: the tests spend most of their time in it.

It rounds fp32 to bf16, and fp16 by way of fp32, to nearest even as GPUs do; Triton's own cuts off. Else its results and
its errors are the same, because only these go:

- The check of each integer operation for overflow computes it in int64, compares, and hands the outcome to
  ``device_assert``, which drops it unless the interpreter's options say ``debug``. Its own switch turns it off.
- A call of a device function looks through all of ``triton.language`` for builtins to replace, which the launch it is
  in has replaced already.
- What a launch replaces is looked for in all of ``triton.language``, again for each launch.
- NumPy's dtype for one of Triton's is looked up in a table that is built for each look-up.
- A block's type is checked, and its shape, size and name are made, for each operation: here once for each type.
- A tensor's shape and size are made of constants for each tensor: here once for each shape.
- Blocks of one shape are compared dimension by dimension to be broadcast to each other.
- Which dtype two operands share, and what a cast takes, is found by asking for one kind of number after the other:
  operands of one dtype, numbers beside a tensor, and casts between the usual dtypes are looked up.
- bf16 is taken apart into sign, exponent and significand to be widened: its bits are fp32's first ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_NAMES = (
    *((interpreter.interpreter_builder, "options"), (interpreter, "_patch_lang"), (interpreter, "_patch_builtin")),
    *((interpreter, "_get_np_dtype"), (tl.block_type, "__init__"), (tl.tensor, "__init__")),
    *((TritonSemantic, "broadcast_impl_value"), (interpreter.InterpreterBuilder, "cast_impl")),
    *((TritonSemantic, "binary_op_type_checking_impl"), (TritonSemantic, "cast")),
)
STOCK = [(owner, name, getattr(owner, name)) for owner, name in _NAMES]  # what ``install`` replaces


class _Scope(interpreter._LangPatchScope):  # type: ignore[misc]
    """What a launch has replaced; a device function that it calls adds what is missing."""

    modules: set[Any]

    def __init__(self) -> None:
        super().__init__()
        self.modules = set()

    def restore(self) -> None:
        global _running
        super().restore()
        _running = None


_running: _Scope | None = None


@cache
def _languages(fn: Any) -> frozenset[Any]:
    return frozenset(value for value in fn.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core))


def _patch_lang_once(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def patch_lang(fn: Any) -> Any:
        global _running
        modules = _languages(fn)
        if _running is not None and modules <= _running.modules:
            return _running
        done = original(fn)
        if _running is None:
            _running = _Scope()
        _running._changes += done._changes
        _running.modules |= modules
        return _running

    return patch_lang


@cache
def _builtins(package: Any) -> list[tuple[str, Any]]:
    """Asked between launches, when nothing is replaced."""
    return [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    for name, member in _builtins(package):
        interpreter._patch_attr(package, name, member, builder, scope)


def _blocks_once(original: Callable[..., None]) -> Callable[..., None]:
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        named = element_ty.name, getattr(element_ty, "address_space", None)
        key = (named, *(size.value if isinstance(size, tl.constexpr) else size for size in shape))
        if key not in known:
            original(self, element_ty, shape)
            known[key] = dict(self.__dict__)
        self.__dict__.update(known[key])

    return init


def _shapes_once(original: Callable[..., None]) -> Callable[..., None]:
    known: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def init(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape.values) if type.is_block() else ()
        if sizes not in known:
            original(self, handle, type)
            known[sizes] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = known[sizes]

    return init


def _alike_first(original: Callable[..., Any]) -> Callable[..., Any]:
    def broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
        one, other = lhs.type, rhs.type
        if one.is_block() and other.is_block() and one.shape.values == other.shape.values:
            return lhs, rhs
        return original(self, lhs, rhs)

    return broadcast


_INTEGERS = {dtype.name for dtype in (tl.int32, tl.int64)}  # they stay what they are, divided too
_WIDE = {dtype.name for dtype in (tl.float32, tl.float64)}  # likewise
_KEPT = {*_INTEGERS, *_WIDE, tl.int1.name}


def _known_first(original: Callable[..., Any]) -> Callable[..., Any]:
    def known(self: Any, one: Any, other: Any) -> tuple[Any, Any] | None:
        """Both in one dtype, where that takes no question."""
        kinds = type(one), type(other)
        if kinds[0] is kinds[1] is tl.tensor:
            return (one, other) if one.dtype.name == other.dtype.name in _KEPT else None
        number, tensor = (one, other) if kinds[1] is tl.tensor else (other, one)
        if type(tensor) is not tl.tensor or type(number) not in (int, float):
            return None
        dtype = tensor.dtype
        integer = dtype.name in _INTEGERS and type(number) is int and -(2**31) <= number < 2**31
        if not integer and dtype.name not in _WIDE:
            return None
        constant = self.scalar_constant(number, dtype)
        return (constant, other) if number is one else (one, constant)

    def checked(
        self: Any, lhs: Any, rhs: Any, lhs_ptr: bool = False, rhs_ptr: bool = False, arithmetic: bool = True,
        div_or_mod: bool = False,
    ) -> Any:  # fmt: skip
        found = known(self, lhs, rhs) if arithmetic else None
        if found is None:
            return original(self, lhs, rhs, lhs_ptr, rhs_ptr, arithmetic, div_or_mod)
        return self.broadcast_impl_value(*found)

    return checked


_CASTS = {
    **{(narrow.name, tl.float32.name): "create_fp_ext" for narrow in (tl.float16, tl.bfloat16)},
    **{(tl.float32.name, narrow.name): "create_fp_trunc" for narrow in (tl.float16, tl.bfloat16)},
}


def _usual_casts_first(original: Callable[..., Any]) -> Callable[..., Any]:
    def cast(self: Any, input: Any, dst_ty: Any, fp_downcast_rounding: str | None = None) -> Any:
        usual = _CASTS.get((input.type.scalar.name, dst_ty.scalar.name)) if fp_downcast_rounding is None else None
        if usual is None:
            return original(self, input, dst_ty, fp_downcast_rounding)
        target = input.type.with_element_ty(dst_ty.scalar) if input.type.is_block() else dst_ty
        return self.tensor(getattr(self.builder, usual)(input.handle, target.to_ir(self.builder)), target)

    return cast


def _bf16_by_bits(original: Callable[..., Any]) -> Callable[..., Any]:
    def cast(self: Any, source: Any, target: Any) -> Any:
        types = source.dtype.scalar, target.scalar
        if types == (tl.bfloat16, tl.float32):
            found = np.asarray(source.data.astype(np.uint32) << 16).view(np.float32)
        elif types == (tl.float32, tl.bfloat16):
            bits = np.asarray(source.data).view(np.uint32)
            nearest = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
            found = np.where(np.isnan(source.data), (bits >> 16) | 0x40, nearest).astype(np.uint16)
        else:
            return original(self, source, target)
        return interpreter.TensorHandle(found, types[1])

    return cast


def _dtypes_by_name(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    known: dict[str, Any] = {}

    def np_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in known:
            known[name] = original(dtype)
        return known[name]

    return np_dtype


def install() -> None:
    """For this process, once; its launches come from one thread at a time, as the interpreter has it.

    Within itself each call of ``_patch_lang`` would note everything twice: a test loads ``conftest.py`` many times.
    """
    if interpreter._patch_lang is not STOCK[1][2]:
        return
    options = interpreter.interpreter_builder.options
    assert not options.debug
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    interpreter._patch_lang = _patch_lang_once(interpreter._patch_lang)
    interpreter._patch_builtin = _patch_builtin
    interpreter._get_np_dtype = _dtypes_by_name(interpreter._get_np_dtype)
    tl.block_type.__init__ = _blocks_once(tl.block_type.__init__)
    tl.tensor.__init__ = _shapes_once(tl.tensor.__init__)
    TritonSemantic.broadcast_impl_value = _alike_first(TritonSemantic.broadcast_impl_value)
    TritonSemantic.binary_op_type_checking_impl = _known_first(TritonSemantic.binary_op_type_checking_impl)
    TritonSemantic.cast = _usual_casts_first(TritonSemantic.cast)
    interpreter.InterpreterBuilder.cast_impl = _bf16_by_bits(interpreter.InterpreterBuilder.cast_impl)
