// The interface between the operators (torch tensors, allocation) and the kernels (plain pointers, one instruction
// set each). No torch here, and no inline function that two instruction sets could share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lora_kernels {

// Runs body(context, task) for task = 0 .. tasks - 1 on torch's threads; task i always means the same work.
void parallel(int64_t tasks, void (*body)(void* context, int64_t task), void* context);

struct Dropout {
    bool active;
    uint64_t key, stream;  // the seed's two words
    uint32_t threshold;    // kept: 16 random bits >= threshold
    double scale;          // 1 / (1 - p)
};

// T is the accumulation type (float, or double for fp64), E the compute dtype's storage. Matrices are row-major with
// unit column stride; ld* is the distance of two rows in elements. Adapters and bias are T, already rounded to E.
struct Forward {
    int64_t m, n, k, r;
    const void *x, *weight;  // E (m, k), (n, k)
    int64_t ldx, ldw;
    const void *lora_a, *lora_b;  // T (r, k), (n, r), contiguous
    const void* bias;             // T (n) or null
    double scaling;
    Dropout dropout;
    bool base;  // false: y leaves without x Wᵀ, and the library's product accumulates onto it
    void* y;    // E (m, n), contiguous
    void* h;    // T (m, r), contiguous
    int64_t threads;
    void* scratch;  // forward_scratch(...) bytes, 64-byte aligned
};

// Outputs that are not due are null; weight, x and h are given where dx, da and db are due.
struct Backward {
    int64_t m, n, k, r;
    const void *dy, *x, *weight;  // E (m, n), (m, k), (n, k)
    int64_t lddy, ldx, ldw;
    const void *lora_a, *lora_b;  // T (r, k), (n, r), contiguous
    const void* h;                // T (m, r), contiguous
    double scaling;
    Dropout dropout;
    bool base;              // false: dx leaves without dy W
    void* dx;               // E (m, k), contiguous
    void *da, *db, *dbias;  // T (r, k), (n, r), (n), contiguous
    int64_t threads;
    void* scratch;
};

enum class Dtype { fp32, bf16, fp16, fp64 };

struct Kernels {
    size_t (*forward_scratch)(const Forward&);
    void (*forward)(const Forward&);
    size_t (*backward_scratch)(const Backward&);
    void (*backward)(const Backward&);
    // out (rows, columns), contiguous T: a matrix of any dtype and strides, rounded to the compute dtype.
    void (*adapter)(const void* source, Dtype dtype, int64_t row_stride, int64_t column_stride, int64_t rows,
                    int64_t columns, int64_t threads, void* out);
    // out (count) of any dtype from T, rounded once.
    void (*gradient)(const void* source, int64_t count, Dtype dtype, void* out);
    // keep (rows, columns) of bool.
    void (*mask)(const Dropout& dropout, int64_t rows, int64_t columns, int64_t threads, bool* keep);
};

const Kernels& kernels_for(Dtype dtype);

// Whether x Wᵀ and dy W of m tokens run in the kernels, with the low-rank part inside; elsewhere torch's own product
// accumulates onto it.
bool own_product(Dtype dtype, int64_t m, int64_t n, int64_t k);

}  // namespace lora_kernels
