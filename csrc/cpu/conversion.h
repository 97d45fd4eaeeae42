// Adapters, bias and their gradients between the caller's dtype and the kernels'.
#pragma once

#include "few.h"

namespace lora_kernels {
namespace LORA_CAPABILITY {

// Adapters and bias come in any dtype and leave as T, rounded to E on the way; gradients go the other way.
template <class T, class E>
struct Conversion {
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

    // Rows of a matrix of any dtype, to out's same rows, contiguous.
    static void rows_to(const Stored& from, const Range& rows, int64_t columns, T* out) {
        const auto convert = from.dtype == Dtype::fp32   ? rows_of<float>
                             : from.dtype == Dtype::bf16 ? rows_of<bf16>
                             : from.dtype == Dtype::fp16 ? rows_of<fp16>
                                                         : rows_of<double>;
        convert(from.data, from.row_stride, from.column_stride, rows, columns, out);
    }

    static void adapter(const Stored& from, int64_t rows, int64_t columns, int64_t threads, void* out) {
        const int64_t tasks = least(useful_threads(threads, rows * columns * WORK_PER_ELEMENT), rows);
        run_tasks(tasks,
                  [&](int64_t index) { rows_to(from, share(rows, 1, tasks, index), columns, static_cast<T*>(out)); });
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

}  // namespace LORA_CAPABILITY
}  // namespace lora_kernels
