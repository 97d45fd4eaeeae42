// Forward and backward of one dtype: which products run, with how many threads, and where their scratch lies.
#pragma once

#include "few.h"

namespace lora_kernels {
namespace LORA_CAPABILITY {

constexpr int64_t WORK_PER_THREAD = 1 << 18;  // multiply-adds below which another thread costs more than it saves

LORA_INLINE int64_t useful_threads(int64_t threads, int64_t work) {
    const int64_t most = work / WORK_PER_THREAD + 1;
    return least(threads, most);
}

LORA_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

template <class T, class E>
struct Driver {
    static const T* adapter(const void* p) { return static_cast<const T*>(p); }
    static const E* matrix(const void* p) { return static_cast<const E*>(p); }

    // Forward.
    static int64_t threads_of(const Forward& f) { return useful_threads(f.threads, f.m * f.n * (f.base ? f.k : f.r)); }
    static bool few(const Forward& f) { return f.base && f.m <= FEW_TOKENS_FORWARD; }
    static Shrink<T, E> shrink(const Forward& f) {
        return {f.m, f.k, f.r, matrix(f.x), f.ldx, adapter(f.lora_a), f.dropout, static_cast<T*>(f.h)};
    }
    static Product<T, E> output(const Forward& f) {
        Product<T, E> product = {f.m,
                                 f.n,
                                 f.k,
                                 f.r,
                                 matrix(f.x),
                                 f.ldx,
                                 f.base ? matrix(f.weight) : nullptr,
                                 f.ldw,
                                 true,
                                 adapter(f.h),
                                 adapter(f.lora_b),
                                 static_cast<T>(f.scaling),
                                 adapter(f.bias),
                                 NO_DROPOUT,
                                 static_cast<E*>(f.y),
                                 0,
                                 0};
        product.plan(threads_of(f));
        return product;
    }
    static size_t forward_scratch(const Forward& f) {
        if (f.m == 0) return 0;
        if (few(f)) return static_cast<size_t>(f.m * (2 * f.k + f.r) + threads_of(f) * WEIGHT_ROWS * f.k) * sizeof(T);
        const int64_t threads = threads_of(f);
        return static_cast<size_t>(most(shrink(f).scratch(useful_threads(f.threads, f.m * f.k * f.r)),
                                        threads * output(f).scratch_per_task())) *
               sizeof(T);
    }

    static void forward_few(const Forward& f) {
        T* x = static_cast<T*>(f.scratch);
        T* dropped = x;
        T* low = x + 2 * f.m * f.k;
        T* h = static_cast<T*>(f.h);
        widen_block(matrix(f.x), f.ldx, f.m, f.k, x, f.k, NO_DROPOUT, 0, 0, 0);
        if (f.dropout.active) {
            dropped = x + f.m * f.k;
            widen_block(x, f.k, f.m, f.k, dropped, f.k, f.dropout, 0, 0, f.k);
        }
        const FewForward<T, T, T> hidden = {f.m, f.r,     f.k,     0,       dropped, nullptr, 0, adapter(f.lora_a),
                                            f.k, nullptr, nullptr, nullptr, h};
        hidden.run(useful_threads(f.threads, f.m * f.k * f.r), nullptr);
        for (int64_t q = 0; q < f.m * f.r; ++q) low[q] = h[q] * static_cast<T>(f.scaling);
        const FewForward<T, E, E> output = {f.m,
                                            f.n,
                                            f.k,
                                            f.r,
                                            x,
                                            matrix(f.x),
                                            f.ldx,
                                            matrix(f.weight),
                                            f.ldw,
                                            low,
                                            adapter(f.lora_b),
                                            adapter(f.bias),
                                            static_cast<E*>(f.y)};
        output.run(threads_of(f), low + f.m * f.r);
    }

    static void forward(const Forward& f) {
        if (f.m == 0) return;
        if (few(f)) return forward_few(f);
        T* scratch = static_cast<T*>(f.scratch);
        shrink(f).run(useful_threads(f.threads, f.m * f.k * f.r), scratch);
        output(f).run(threads_of(f), scratch);
    }

    // Backward.
    static bool needs_dh(const Backward& b) { return b.dx != nullptr || b.da != nullptr; }
    static bool few(const Backward& b) { return b.base && b.m <= FEW_TOKENS_BACKWARD; }
    static FewOutputGradients<T, E> few_of_output(const Backward& b, T* dh) {
        return {b.m,
                b.n,
                b.r,
                matrix(b.dy),
                b.lddy,
                static_cast<T>(b.scaling),
                adapter(b.lora_b),
                adapter(b.h),
                needs_dh(b) ? dh : nullptr,
                static_cast<T*>(b.db),
                static_cast<T*>(b.dbias)};
    }
    static FewAdapterGradient<T, E> few_of_input(const Backward& b, const T* dh) {
        return {b.m, b.k, b.r, matrix(b.x), b.ldx, dh, b.dropout, static_cast<T*>(b.da)};
    }
    static int64_t threads_of(const Backward& b) { return useful_threads(b.threads, b.m * b.n * (b.base ? b.k : b.r)); }
    static int64_t output_threads(const Backward& b) { return useful_threads(b.threads, 2 * b.m * b.n * b.r); }
    static int64_t input_threads(const Backward& b) { return useful_threads(b.threads, b.m * b.k * b.r); }

    static TokenSums<T, E> of_output(const Backward& b, T* dh) {  // dh, db, dbias: one read of dy
        return {b.m,
                b.n,
                b.r,
                matrix(b.dy),
                b.lddy,
                NO_DROPOUT,
                static_cast<T>(b.scaling),
                adapter(b.h),
                adapter(b.lora_b),
                static_cast<T*>(b.db),
                needs_dh(b) ? dh : nullptr,
                static_cast<T*>(b.dbias),
                false};
    }
    static TokenSums<T, E> of_input(const Backward& b, const T* dh) {  // da: one read of x
        return {b.m,     b.k,     b.r, matrix(b.x), b.ldx, b.dropout, T(1), dh, nullptr, static_cast<T*>(b.da),
                nullptr, nullptr, true};
    }
    static FewInputGradient<T, E> few_input_gradient(const Backward& b, const T* dh) {
        return {b.m,
                b.n,
                b.k,
                b.r,
                matrix(b.dy),
                b.lddy,
                matrix(b.weight),
                b.ldw,
                dh,
                adapter(b.lora_a),
                b.dropout,
                static_cast<E*>(b.dx)};
    }
    static Product<T, E> input_gradient(const Backward& b, const T* dh) {
        Product<T, E> product = {b.m,
                                 b.k,
                                 b.n,
                                 b.r,
                                 matrix(b.dy),
                                 b.lddy,
                                 b.base ? matrix(b.weight) : nullptr,
                                 b.ldw,
                                 false,
                                 dh,
                                 adapter(b.lora_a),
                                 T(1),
                                 nullptr,
                                 b.dropout,
                                 static_cast<E*>(b.dx),
                                 0,
                                 0};
        product.plan(threads_of(b));
        return product;
    }

    static size_t backward_scratch(const Backward& b) {
        if (b.m == 0) return 0;
        T dh;  // only whether it is due counts here
        int64_t size;
        if (few(b)) {
            size =
                most(few_of_output(b, &dh).scratch(output_threads(b)), few_of_input(b, &dh).scratch(input_threads(b)));
            size = most(size, threads_of(b) * few_input_gradient(b, &dh).scratch_per_task());
        } else {
            size = most(of_output(b, &dh).scratch(output_threads(b)), of_input(b, &dh).scratch(input_threads(b)));
            size = most(size, threads_of(b) * input_gradient(b, &dh).scratch_per_task());
        }
        return static_cast<size_t>(size + round_up(b.m * b.r, 16)) * sizeof(T);
    }

    static void backward_empty(const Backward& b) {
        if (b.da != nullptr) fill(static_cast<T*>(b.da), b.r * b.k, T(0));
        if (b.db != nullptr) fill(static_cast<T*>(b.db), b.n * b.r, T(0));
        if (b.dbias != nullptr) fill(static_cast<T*>(b.dbias), b.n, T(0));
    }

    static void backward(const Backward& b) {
        if (b.m == 0) return backward_empty(b);
        T* dh = static_cast<T*>(b.scratch);
        T* scratch = dh + round_up(b.m * b.r, 16);
        const bool of_dy = needs_dh(b) || b.db != nullptr || b.dbias != nullptr;
        if (few(b)) {
            if (of_dy) few_of_output(b, dh).run(output_threads(b), scratch);
            if (b.da != nullptr) few_of_input(b, dh).run(input_threads(b), scratch);
            if (b.dx != nullptr) few_input_gradient(b, dh).run(threads_of(b), scratch);
        } else {
            if (of_dy) of_output(b, dh).run(output_threads(b), scratch);
            if (b.da != nullptr) of_input(b, dh).run(input_threads(b), scratch);
            if (b.dx != nullptr) input_gradient(b, dh).run(threads_of(b), scratch);
        }
    }
};

// Adapters and bias come in any dtype and leave as T, rounded to E on the way; gradients go the other way.
template <class T, class E>
struct Conversion {
    static constexpr int64_t WORK_PER_ELEMENT = 8;  // in multiply-adds: it is read from memory, rounded and written

    template <class S>
    static void rows_of(const void* source, int64_t row_stride, int64_t column_stride, const Range& rows,
                        int64_t columns, T* out) {
        constexpr int VL = lanes<T>;
        constexpr bool rounds = sizeof(E) == 2 && !same<S, E>;
        const bool one_row = column_stride == 1 && row_stride == columns;  // the rows of the range follow each other
        const int64_t length = one_row ? columns * (rows.end - rows.begin) : columns;
        for (int64_t i = rows.begin; i < (one_row ? rows.begin + 1 : rows.end); ++i) {
            const S* from = static_cast<const S*>(source) + i * row_stride;
            T* to = out + i * columns;
            int64_t j = 0;
            if constexpr (vectorizes<S>) {
                for (; column_stride == 1 && j + VL <= length; j += VL) {
                    Vector<T> value = load(from + j);
                    if constexpr (rounds) {
                        E rounded[VL];
                        store(value, rounded);
                        value = load(rounded);
                    }
                    store(value, to + j);
                }
            }
            for (; j < length; ++j) {
                E rounded;
                narrow(static_cast<T>(widen(from[j * column_stride])), &rounded);
                to[j] = widen(rounded);
            }
        }
    }

    static void adapter(const void* source, Dtype dtype, int64_t row_stride, int64_t column_stride, int64_t rows,
                        int64_t columns, int64_t threads, void* out) {
        const auto convert = dtype == Dtype::fp32   ? rows_of<float>
                             : dtype == Dtype::bf16 ? rows_of<bf16>
                             : dtype == Dtype::fp16 ? rows_of<fp16>
                                                    : rows_of<double>;
        const int64_t tasks = least(useful_threads(threads, rows * columns * WORK_PER_ELEMENT), rows);
        run_tasks(tasks, [&](int64_t index) {
            const Range range = share(rows, 1, tasks, index);
            convert(source, row_stride, column_stride, range, columns, static_cast<T*>(out));
        });
    }

    template <class S>
    static void row_to(const T* from, int64_t count, void* out) {
        constexpr int VL = lanes<T>;
        S* to = static_cast<S*>(out);
        int64_t j = 0;
        if constexpr (vectorizes<S>) {
            for (; j + VL <= count; j += VL) store(load(from + j), to + j);
        }
        for (; j < count; ++j) narrow(static_cast<Scalar<S>>(from[j]), to + j);
    }

    static void gradient(const void* source, int64_t count, Dtype dtype, void* out) {
        const T* from = static_cast<const T*>(source);
        switch (dtype) {
            case Dtype::fp32:
                return row_to<float>(from, count, out);
            case Dtype::bf16:
                return row_to<bf16>(from, count, out);
            case Dtype::fp16:
                return row_to<fp16>(from, count, out);
            case Dtype::fp64:
                return row_to<double>(from, count, out);
        }
    }

    template <class A, class B>
    static constexpr bool same = __is_same(A, B);
    template <class S>
    static constexpr bool vectorizes = same<T, double> ? same<S, double> : !same<S, double>;  // load and store exist
    template <class S>
    using Scalar = decltype(widen(S{}));
};

static void draw_mask(const Dropout& dropout, int64_t rows, int64_t columns, int64_t threads, bool* keep) {
    const int64_t tasks = least(useful_threads(threads, rows * columns), rows);
    run_tasks(tasks, [&](int64_t task) {
        const Range range = share(rows, 1, tasks, task);
        for (int64_t i = range.begin; i < range.end; ++i) {
            for (int64_t j = 0; j < columns; j += MASK_SPAN) {
                uint16_t bits[MASK_SPAN + DROPOUT_GROUP * PHILOX_LANES];
                const int64_t span = least(MASK_SPAN, columns - j);
                random_bits(dropout, dropout_group(i, j, columns), ceil_div(span, DROPOUT_GROUP), bits);
                for (int64_t q = 0; q < span; ++q) keep[i * columns + j + q] = bits[q] >= dropout.threshold;
            }
        }
    });
}

template <class T, class E>
constexpr Kernels KERNELS = {Driver<T, E>::forward_scratch,
                             Driver<T, E>::forward,
                             Driver<T, E>::backward_scratch,
                             Driver<T, E>::backward,
                             Conversion<T, E>::adapter,
                             Conversion<T, E>::gradient,
                             draw_mask};

}  // namespace LORA_CAPABILITY
}  // namespace lora_kernels
