"""Device code, and nothing else: grids are in ``run/`` and the operators' files, blocks in ``choose/blocks.py``.

What holds in all kernels. The compute dtype is x's (dy's). ``lora_a``, ``lora_b`` and ``bias`` may have another dtype
and are rounded to the compute dtype in registers; adapters over fp16 are not, whose range is too small for them and for
h and dh: their products are those of bf16 high and low parts. h and dh are fp32; each row is contiguous, and rows may
lie at any distance, as columns of a wider tensor do. Products accumulate in fp32, each output is rounded once. Nothing
is added by atomics: results are bitwise reproducible. A dropped element is multiplied by zero, not replaced, so that
NaN and inf stay visible as they do in ``torch.nn.functional.dropout``. Addresses are int64. The rank R and lora_b's
strides are compile-time constants: a row of h or B is often 8 numbers, and only a known stride lets its loads be
vectors.
"""
