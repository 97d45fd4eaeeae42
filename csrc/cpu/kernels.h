// The interface between the operators (torch tensors, allocation) and the kernels (plain pointers, one instruction
// set each). No torch here, and no inline function that two instruction sets could share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lora_kernels {

// Runs body(context, task) for task = 0 .. tasks - 1 on torch's threads; task i always means the same work.
void parallel(int64_t tasks, void (*body)(void* context, int64_t task), void* context);

enum class Dtype { fp32, bf16, fp16, fp64 };

struct Dropout {
    bool active;
    uint64_t key, stream;  // the seed's two words
    uint32_t keep;         // 65536 times the probability that an element is kept, at least 1
    double scale;          // 1 / (1 - p)
    int64_t row = 0;       // of the mask, where the call's own rows begin
};

// T is the accumulation type (float, or double for fp64), E the compute dtype's storage. Matrices are row-major with
// unit column stride; ld* is the distance of two rows in elements. Adapters, bias and gain are T, adapters and bias
// already rounded to E, but adapters over fp16 not at all. Results are contiguous; those that are not due are null.
// `threads` is how many there are, and `scratch` what the kernel's *_scratch asks for in bytes, 64-byte aligned.
struct ShrinkCall {  // h = (x * D) Aᵀ
    int64_t m, k, r;
    const void* x;  // E (m, k)
    int64_t ldx;
    const void* lora_a;  // T (r, k), contiguous
    Dropout dropout;
    void* h;  // T (m, r)
    int64_t threads;
    void* scratch;
};

// One layer's summand of a product: left right + D * (factor low adapter).
struct Term {
    int64_t depth, r;
    const void* left;  // E (m, depth)
    int64_t ldl;
    const void*
        weight;  // E (n, depth), as y's, or (depth, n), as dx's; null: the library's product is added afterwards
    int64_t ldw;
    const void* low;  // T (m, r)
    int64_t ldlow;
    const void* adapter;  // T (n, r) or (r, n), contiguous
    Dropout dropout;      // of the low-rank part, as a matrix (m, n)
};

struct ProductCall {  // out = gain * (Σ terms) + bias
    int64_t m, n;
    const Term* terms;
    int64_t count;
    bool transposed;  // the terms' weights and adapters are (n, ...), as y = x Wᵀ has them: one term, no dropout
    double factor;
    const void *bias, *gain;  // T (n) or null
    void* linear;             // E (m, n): Σ terms, where gain is there and somebody asks for it
    void* out;                // E (m, n)
    int64_t threads;
    void* scratch;
};

// An adapter as it is stored.
struct Stored {
    const void* data;
    Dtype dtype;
    int64_t row_stride, column_stride;
};

struct FewForwardCall {  // h = (x * D) Aᵀ and out = x Wᵀ + factor h lora_bᵀ + bias, of few tokens
    int64_t m, n, k, r;
    const void* x;  // E (m, k)
    int64_t ldx;
    const void* weight;  // E (n, k)
    int64_t ldw;
    Stored lora_a, lora_b;  // (r, k), (n, r)
    const void* bias;       // T (n) or null
    double factor;
    Dropout dropout;
    void *h, *out;  // T (m, r), E (m, n)
    int64_t threads;
    void* scratch;
};

struct GainCall {  // out = gain * linear + bias, where the library's product came last
    int64_t m, n;
    const void* linear;       // E (m, n), contiguous; may be out
    const void *gain, *bias;  // T (n); bias may be null
    void* out;                // E (m, n)
    int64_t threads;
};

struct OutputGradsCall {  // dh = s dy B, db = s dyᵀ h, dbias = Σ dy
    int64_t m, n, r;
    const void* dy;  // E (m, n)
    int64_t lddy;
    const void* lora_b;  // T (n, r), contiguous; read where dh is due
    const void* h;       // T (m, r); read where db is due
    int64_t ldh;
    double scaling;
    void *dh, *db, *dbias;  // T (m, r), (n, r), (n)
    int64_t threads;
    void* scratch;
};

struct AGradCall {  // da = dhᵀ (x * D)
    int64_t m, k, r;
    const void* x;  // E (m, k)
    int64_t ldx;
    const void* dh;  // T (m, r)
    int64_t lddh;
    Dropout dropout;
    void* da;  // T (r, k)
    int64_t threads;
    void* scratch;
};

struct GainGradCall {  // dlinear = gain * dy, dgain = Σ dy * linear, dbias = Σ dy
    int64_t m, n;
    const void* dy;  // E (m, n)
    int64_t lddy;
    const void* linear;  // E (m, n); read where dgain is due
    int64_t ldl;
    const void* gain;     // T (n)
    void* dlinear;        // E (m, n)
    void *dgain, *dbias;  // T (n)
    int64_t threads;
};

struct RowNormsCall {  // norms = ‖W + s B A‖ of each row
    int64_t n, k, r;
    const void* weight;  // E (n, k), or (k, n) where across
    int64_t ldw;
    bool across;
    const void *lora_a, *lora_b;  // T (r, k), (n, r), contiguous
    double scaling;
    void* norms;  // T (n)
    int64_t threads;
    void* scratch;
};

struct GatedCall {         // a = σ(gate) * up; or dgate = da * up * σ'(gate), dup = da * σ(gate)
    int64_t m, n, number;  // σ's in activations.GATES
    const void* gate;      // E (m, n), as all of them
    int64_t ldgate;
    const void* up;
    int64_t ldup;
    const void* da;  // null: a is asked for
    int64_t ldda;
    void *a, *dgate, *dup;
    int64_t ldout, threads;
};

struct WeightedSumCall {  // sums[tokens[i]] += factors[i] * rows[i], rows of one token following each other
    int64_t m, n;
    const void* rows;  // E (m, n), contiguous
    const int64_t* tokens;
    const void* factors;  // T (m), or null: 1
    void* sums;           // T (tokens, n), contiguous
    int64_t threads;
};

struct WeighingCall {  // products[i] = <rows[i], grads[i]>, and then grads[i] *= factors[i]
    int64_t m, n;
    const void* rows;     // E (m, n), contiguous; read where products are due
    const void* factors;  // T (m)
    void* grads;          // E (m, n), contiguous
    void* products;       // T (m), or null
    int64_t threads;
};

// W (n, k) of 4-bit codes: value i of its rows, one after the other, is table[code i] * absmax[i / blocksize].
struct FourBits {
    int64_t n, k, blocksize;
    const uint8_t* codes;  // two a byte, the first in the high half, or in the low one; or by columns
    bool low_first;
    const float* table;  // (16)
    const float*
        absmax;  // null where it is nested: nested_table[nested[b]] * nested_absmax[b / nested_blocksize] + offset
    const uint8_t* nested;
    const float *nested_table, *nested_absmax;
    int64_t nested_blocksize;
    float offset;
    // Not null: bitsandbytes' order for AVX512-BF16. Blocks of 32 rows; within them a pair of columns after the other,
    // of whose 64 codes (row by row) byte i holds the i-th below the (i + 32)-th. This is absmax, bf16 (blocks, n).
    const uint16_t* by_columns;
};

// W (n, k) of 8-bit codes: value (i, j) is (code - zero) * scale, those of the block (i / high, j / wide).
struct EightBits {
    int64_t n, k, high, wide;
    const uint8_t* codes;
    bool e4m3;            // or int8
    const float* scales;  // (ceil(n / high), ceil(k / wide))
    const int8_t* zeros;  // the same, or null
};

struct Codes {  // one of both
    bool eight_bits;
    FourBits four;
    EightBits eight;
    int64_t n() const { return eight_bits ? eight.n : four.n; }
    int64_t k() const { return eight_bits ? eight.k : four.k; }
};

constexpr int64_t CODED_TOKENS = 16;  // at most so many are multiplied with codes

struct CodedValuesCall {  // of rows and columns from these on, a multiple of 32 and, of 4-bit codes, of 2
    Codes weight;
    int64_t row, column, height, width;
    void* out;  // E (height, width)
    int64_t threads;
};

struct CodedProductCall {  // out = gain * (x Wᵀ + factor low lora_bᵀ) + bias; k of 4-bit codes a multiple of 32
    Codes weight;
    int64_t m, r;
    const void* x;  // E (m, k)
    int64_t ldx;
    const void* low;  // T (m, r)
    int64_t ldlow;
    double factor;
    const void *lora_b, *bias, *gain;  // T (n, r), (n) or null
    void *linear, *out;                // E (m, n); linear may be null
    int64_t threads;
    void* scratch;
};

struct CodedInputGradCall {  // out = dy W + D * (dh lora_a); k of 4-bit codes a multiple of 32
    Codes weight;
    int64_t m;
    Term term;  // without its weight
    void* out;  // E (m, k)
    int64_t threads;
    void* scratch;
};

struct Kernels {
    size_t (*shrink_scratch)(const ShrinkCall&);
    void (*shrink)(const ShrinkCall&);
    size_t (*product_scratch)(const ProductCall&);
    void (*product)(const ProductCall&);
    bool (*whole_forward)(const FewForwardCall&);  // whether the next two run
    size_t (*few_forward_scratch)(const FewForwardCall&);
    void (*few_forward)(const FewForwardCall&);
    void (*apply_gain)(const GainCall&);
    size_t (*output_grads_scratch)(const OutputGradsCall&);
    void (*output_grads)(const OutputGradsCall&);
    size_t (*a_grad_scratch)(const AGradCall&);
    void (*a_grad)(const AGradCall&);
    void (*gain_grad)(const GainGradCall&);
    size_t (*row_norms_scratch)(const RowNormsCall&);
    void (*row_norms)(const RowNormsCall&);
    void (*gated)(const GatedCall&);
    void (*weighted_sum)(const WeightedSumCall&);
    void (*weigh)(const WeighingCall&);
    void (*coded_values)(const CodedValuesCall&);
    size_t (*coded_product_scratch)(const CodedProductCall&);
    void (*coded_product)(const CodedProductCall&);
    size_t (*coded_input_grad_scratch)(const CodedInputGradCall&);
    void (*coded_input_grad)(const CodedInputGradCall&);
    // out (rows, columns), contiguous T: a matrix of any dtype and strides, rounded to the compute dtype.
    void (*adapter)(const Stored& source, int64_t rows, int64_t columns, int64_t threads, void* out);
    // out (count) of any dtype from T, rounded once.
    void (*gradient)(const void* source, int64_t count, Dtype dtype, void* out);
    // keep (rows, columns) of bool.
    void (*mask)(const Dropout& dropout, int64_t rows, int64_t columns, int64_t threads, bool* keep);
};

const Kernels& kernels_for(Dtype dtype);

// The instruction set whose kernels run, as LORA_KERNELS_CPU_CAPABILITY names it.
const char* capability_name();

// Why AMX's tiles cannot be used here, by any library, or null: they can. The first call asks for the permission.
const char* tiles_obstacle();

// Why these kernels do not use them, or null.
const char* amx_obstacle();

}  // namespace lora_kernels
