"""Kernels for compute capability 9.0 in Gluon, Triton's lower level; importing this package imports none of them.

What holds in all of them. x, W, dy, y and dx are 16-bit, in rows on 16-byte boundaries; products accumulate in fp32 and
each output is rounded once. h and dh are kept as the operand that a later product loads (``choose.hidden_operand``),
with s and 1 / (1 - p) folded in: where s is 0, h's operand is 0, and so is db = dyᵀ (s h). A and B are rounded to
bf16 in their operands, over fp16 kept as two bf16 parts. A dropped element is replaced by zero, so that its NaN is not
seen. Nothing is summed by atomics: counters say who is last, and the order of sums is fixed. Offsets into h, parts and
words are 32-bit: the host sees to it that they fit.
"""
