"""Dropout's mask, one bit an element: ``lora_kernels.packed_mask`` is the specification, bit for bit."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["draw_by_offset", "draw_words", "load_seed"]


@gluon.jit
def _philox(c0, c1, c2, c3, k0, k1, ROUNDS: gl.constexpr):
    """Philox4x32 on uint32 tensors; k0, k1 uint32 scalars."""
    for _ in gl.static_range(ROUNDS):
        a = c0.to(gl.uint64) * 0xD2511F53
        b = c2.to(gl.uint64) * 0xCD9E8D57
        n0 = (b >> 32).to(gl.uint32) ^ c1 ^ k0
        n2 = (a >> 32).to(gl.uint32) ^ c3 ^ k1
        c1 = b.to(gl.uint32)
        c3 = a.to(gl.uint32)
        c0 = n0
        c2 = n2
        k0 = (k0 + 0x9E3779B9).to(gl.uint32)
        k1 = (k1 + 0xBB67AE85).to(gl.uint32)
    return c0, c1, c2, c3


@gluon.jit
def _level(keep, r, keep16, BIT: gl.constexpr):
    """One binary digit of the keep probability: P -> (P + digit) / 2. The majority of three: one instruction."""
    digit = (0 - ((keep16 >> BIT) & 1)).to(gl.uint32)
    return (keep & r) | (digit & (keep | r))


@gluon.jit
def draw_by_offset(word, row, keep16, k0, k1, offset, CALLS: gl.constexpr, ROUNDS: gl.constexpr):
    """32 Bernoulli bits, each 1 with probability keep16 / 65536 (its highest 4 * CALLS binary digits), word by word.

    Not 32 comparisons of a draw with a threshold: 4 * CALLS random words are combined bit by bit, lowest digit first.
    Measured on an H100; ``draw_words`` differs in the counter and takes the key from memory.
    """
    keep = word ^ word
    for c in gl.static_range(CALLS):
        r0, r1, r2, r3 = _philox(word, row, (word ^ word) + (offset + c).to(gl.uint32), word ^ word, k0, k1, ROUNDS)
        keep = _level(keep, r0, keep16, 16 - 4 * CALLS + 4 * c)
        keep = _level(keep, r1, keep16, 16 - 4 * CALLS + 4 * c + 1)
        keep = _level(keep, r2, keep16, 16 - 4 * CALLS + 4 * c + 2)
        keep = _level(keep, r3, keep16, 16 - 4 * CALLS + 4 * c + 3)
    return keep


@gluon.jit
def load_seed(seed_ptr):
    """The four 32-bit words of the int64 (2,) seed: key low, key high, stream low, stream high."""
    key = gl.load(seed_ptr)
    stream = gl.load(seed_ptr + 1)
    return key.to(gl.uint32), (key >> 32).to(gl.uint32), stream.to(gl.uint32), (stream >> 32).to(gl.uint32)


@gluon.jit
def draw_words(word, row, keep16, seed, K):
    """The words of 32 columns each of ``row``, uint32: bit j keeps column 32 word + j; bits beyond K are 0.

    ========= ===================== =====================================================
    word, row uint32, one shape     word = column // 32
    keep16    int32                 65536 times the probability to keep, 1 to 65535
    seed      four uint32 scalars   from ``load_seed``
    ========= ===================== =====================================================
    """
    k0, k1, c2, c3 = seed
    keep = word ^ word
    zero = word ^ word
    for call in gl.static_range(4):
        r0, r1, r2, r3 = _philox(word * 4 + call, row, zero + c2, zero + c3, k0, k1, 7)
        keep = _level(keep, r0, keep16, 4 * call)
        keep = _level(keep, r1, keep16, 4 * call + 1)
        keep = _level(keep, r2, keep16, 4 * call + 2)
        keep = _level(keep, r3, keep16, 4 * call + 3)
    left = K - word.to(gl.int32) * 32  # columns that are there
    last = (zero + 1 << gl.minimum(gl.maximum(left, 0), 31).to(gl.uint32)) - 1
    return gl.where(left >= 32, keep, keep & last)
