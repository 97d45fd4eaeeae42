// The kernels of one dtype as the operators call them: which form runs, with how many threads, and where its scratch
// lies.
#pragma once

#include "coded_few.h"
#include "few_layer.h"
#include "gains.h"
#include "gated.h"
#include "low_rank.h"
#include "tiled_few.h"
#include "tiled_products.h"
#include "weighted.h"

namespace lora_kernels {
namespace LORA_CAPABILITY {

LORA_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// What multiplies many tokens.
template <class T, class E>
struct Forms {
    using Output = Product<T, E>;
    using Hidden = Shrink<T, E>;
    using Sums = TokenSums<T, E>;
};
#if LORA_TILES
template <>
struct Forms<float, bf16> {
    using Output = TiledProduct;
    using Hidden = TiledShrink;
    using Sums = TiledTokenSums;
};
#elif LORA_PAIRS
template <>
struct Forms<float, bf16> {
    using Output = Product<float, bf16>;
    using Hidden = PairedShrink;
    using Sums = PairedTokenSums;
};
#endif

template <class T, class E>
struct Driver {
    using Many = Forms<T, E>;
    static const T* adapter(const void* p) { return static_cast<const T*>(p); }
    static const E* matrix(const void* p) { return static_cast<const E*>(p); }
    static size_t bytes(int64_t elements) { return static_cast<size_t>(elements) * sizeof(T); }

    // h = (x * D) Aᵀ.
    static int64_t threads_of(const ShrinkCall& f) { return useful_threads(f.threads, f.m * f.k * f.r); }
    static bool few(const ShrinkCall& f) { return f.m <= FEW_TOKENS_SHRINK<E>; }
    static typename Many::Hidden many(const ShrinkCall& f) {
        return {f.m, f.k, f.r, matrix(f.x), f.ldx, adapter(f.lora_a), f.dropout, static_cast<T*>(f.h)};
    }
    static size_t shrink_scratch(const ShrinkCall& f) {
        if (f.m == 0) return 0;
        return bytes(few(f) ? f.m * f.k : many(f).scratch(threads_of(f)));
    }
    static void shrink(const ShrinkCall& f) {
        if (f.m == 0) return;
        T* scratch = static_cast<T*>(f.scratch);
        if (!few(f)) return many(f).run(threads_of(f), scratch);
        widen_block(matrix(f.x), f.ldx, f.m, f.k, scratch, f.k, f.dropout, 0, 0);
        const FewForward<T, T, T> product = {f.m,     f.r,     f.k,     0,       scratch, adapter(f.lora_a),   f.k,
                                             nullptr, nullptr, nullptr, nullptr, nullptr, static_cast<T*>(f.h)};
        product.run(threads_of(f), nullptr);
    }

    // y and dx.
    static int64_t threads_of(const ProductCall& f) {
        int64_t work = 0;
        for (int64_t t = 0; t < f.count; ++t) {
            const Term& term = f.terms[t];
            work += f.m * f.n * (term.weight != nullptr ? term.depth : term.r);
        }
        return useful_threads(f.threads, work);
    }
    static bool few(const ProductCall& f) {
        for (int64_t t = 0; t < f.count; ++t) {
            if (f.terms[t].weight == nullptr) return false;
        }
        if (tiled_few(f)) return true;
        return f.m <= (f.transposed ? FEW_TOKENS_FORWARD<E> : FEW_TOKENS_INPUT_GRAD<E>);
    }
#if LORA_TILES
    static bool tiled_few(const ProductCall& f) {
        return __is_same(E, bf16) && f.transposed && f.m > FEW_TOKENS_IN_VECTORS && f.m <= TiledFewForward::MOST;
    }
    static TiledFewForward few_in_tiles(const ProductCall& f) {
        const Term& term = f.terms[0];
        return {f.m,
                f.n,
                term.depth,
                term.r,
                static_cast<const bf16*>(term.left),
                term.ldl,
                static_cast<const bf16*>(term.weight),
                term.ldw,
                static_cast<const float*>(term.low),
                term.ldlow,
                static_cast<float>(f.factor),
                static_cast<const float*>(term.adapter),
                static_cast<const float*>(f.bias),
                static_cast<const float*>(f.gain),
                static_cast<bf16*>(f.linear),
                static_cast<bf16*>(f.out)};
    }
#else
    static bool tiled_few(const ProductCall&) { return false; }
#endif
    static typename Many::Output many(const ProductCall& f) {
        const Product<T, E> of_call = {f.m,
                                       f.n,
                                       f.terms,
                                       f.count,
                                       f.transposed,
                                       static_cast<T>(f.factor),
                                       adapter(f.bias),
                                       adapter(f.gain),
                                       static_cast<E*>(f.linear),
                                       static_cast<E*>(f.out),
                                       0,
                                       0};
        typename Many::Output product{of_call};
        product.plan(threads_of(f));
        return product;
    }
#if LORA_PAIRS
    static PairedForward few_in_pairs(const ProductCall& f, const float* low) {
        const Term& term = f.terms[0];
        return {f.m,
                f.n,
                term.depth,
                term.r,
                static_cast<const bf16*>(term.left),
                term.ldl,
                static_cast<const bf16*>(term.weight),
                term.ldw,
                low,
                static_cast<const float*>(term.adapter),
                static_cast<const float*>(f.bias),
                static_cast<const float*>(f.gain),
                static_cast<bf16*>(f.linear),
                static_cast<bf16*>(f.out)};
    }
#endif
    // Where the low-rank parts stand alone and nothing drops of them. AMX's tiles make them quicker.
    static bool is_low_rank(const ProductCall& f) {
        if ((LORA_TILES && __is_same(E, bf16)) || f.gain != nullptr || f.linear != nullptr) return false;
        for (int64_t t = 0; t < f.count; ++t) {
            if (f.terms[t].weight != nullptr || f.terms[t].dropout.active) return false;
        }
        return true;
    }
    static LowRankProduct<T, E> low_rank(const ProductCall& f) {
        return {f.m,
                f.n,
                f.terms,
                f.count,
                f.transposed,
                static_cast<T>(f.factor),
                adapter(f.bias),
                static_cast<E*>(f.out)};
    }
    static FewInputGradient<T, E> few_dx(const ProductCall& f) {
        return {f.m, f.n, f.terms, f.count, static_cast<E*>(f.out)};
    }
    static size_t product_scratch(const ProductCall& f) {
        if (f.m == 0) return 0;
        const int64_t threads = threads_of(f);
        if (is_low_rank(f)) return bytes(threads * low_rank(f).scratch_per_task());
        if (!few(f)) return bytes(threads * many(f).scratch_per_task());
        if (!f.transposed) return bytes(threads * few_dx(f).scratch_per_task());
#if LORA_TILES
        if (tiled_few(f)) return bytes(few_in_tiles(f).scratch(threads));
#endif
        const Term& term = f.terms[0];
#if LORA_PAIRS
        if (in_pairs<E>) return bytes(f.m * term.r) + threads * few_in_pairs(f, nullptr).copied() * sizeof(bf16);
#endif
        return bytes(f.m * (term.depth + term.r) + threads * WEIGHT_ROWS * term.depth);
    }
    static void product(const ProductCall& f) {
        if (f.m == 0) return;
        T* scratch = static_cast<T*>(f.scratch);
        if (is_low_rank(f)) return low_rank(f).run(threads_of(f), scratch);
        if (!few(f)) return many(f).run(threads_of(f), scratch);
        if (!f.transposed) return few_dx(f).run(threads_of(f), scratch);
#if LORA_TILES
        if (tiled_few(f)) return few_in_tiles(f).run(threads_of(f), static_cast<float*>(f.scratch));
#endif
        const Term& term = f.terms[0];
        const int64_t k = term.depth, r = term.r;
        T* low = in_pairs<E> ? scratch : scratch + f.m * k;
        for (int64_t i = 0; i < f.m; ++i) {
            const T* h = adapter(term.low) + i * term.ldlow;
            for (int64_t q = 0; q < r; ++q) low[i * r + q] = h[q] * static_cast<T>(f.factor);
        }
#if LORA_PAIRS
        if constexpr (in_pairs<E>)
            return few_in_pairs(f, low).run(threads_of(f), reinterpret_cast<bf16*>(low + f.m * r));
#endif
        widen_block(matrix(term.left), term.ldl, f.m, k, scratch, k);
        const FewForward<T, E, E> output = {f.m,
                                            f.n,
                                            k,
                                            r,
                                            scratch,
                                            matrix(term.weight),
                                            term.ldw,
                                            low,
                                            adapter(term.adapter),
                                            adapter(f.bias),
                                            adapter(f.gain),
                                            static_cast<E*>(f.linear),
                                            static_cast<E*>(f.out)};
        output.run(threads_of(f), low + f.m * r);
    }

    // A layer's forward in one go, where the kernels have that.
    static bool whole_forward([[maybe_unused]] const FewForwardCall& f) {
#if LORA_PAIRS
        if constexpr (in_pairs<E>) return FewLayer{f}.pays(threads_of(f));
#endif
        return false;
    }
    static int64_t threads_of(const FewForwardCall& f) { return useful_threads(f.threads, f.m * f.n * f.k); }
    static size_t few_forward_scratch([[maybe_unused]] const FewForwardCall& f) {
#if LORA_PAIRS
        if constexpr (in_pairs<E>) return FewLayer{f}.scratch(threads_of(f));
#endif
        return 0;
    }
    static void few_forward([[maybe_unused]] const FewForwardCall& f) {
#if LORA_PAIRS
        if constexpr (in_pairs<E>) FewLayer{f}.run(threads_of(f));
#endif
    }

    static void apply_gain(const GainCall& f) {
        const int64_t tasks = least(useful_threads(f.threads, f.m * f.n * WORK_PER_ELEMENT), f.m);
        run_tasks(tasks, [&](int64_t task) {
            const Range range = share(f.m, 1, tasks, task);
            scale_block(matrix(f.linear) + range.begin * f.n, f.n, range.end - range.begin, f.n, adapter(f.gain),
                        adapter(f.bias), static_cast<E*>(f.out) + range.begin * f.n, f.n);
        });
    }

    // dh, db and dbias: one read of dy.
    static int64_t threads_of(const OutputGradsCall& f) { return useful_threads(f.threads, 2 * f.m * f.n * f.r); }
    static bool few(const OutputGradsCall& f) { return f.m <= FEW_TOKENS_BACKWARD; }
    static FewOutputGradients<T, E> few_of_output(const OutputGradsCall& f) {
        return {f.m,
                f.n,
                f.r,
                matrix(f.dy),
                f.lddy,
                static_cast<T>(f.scaling),
                adapter(f.lora_b),
                adapter(f.h),
                f.ldh,
                static_cast<T*>(f.dh),
                static_cast<T*>(f.db),
                static_cast<T*>(f.dbias)};
    }
    static typename Many::Sums of_output(const OutputGradsCall& f) {
        return {f.m,
                f.n,
                f.r,
                matrix(f.dy),
                f.lddy,
                NO_DROPOUT,
                static_cast<T>(f.scaling),
                adapter(f.h),
                f.ldh,
                adapter(f.lora_b),
                static_cast<T*>(f.db),
                static_cast<T*>(f.dh),
                static_cast<T*>(f.dbias),
                false};
    }
    static size_t output_grads_scratch(const OutputGradsCall& f) {
        if (f.m == 0) return 0;
        return bytes(few(f) ? few_of_output(f).scratch(threads_of(f)) : of_output(f).scratch(threads_of(f)));
    }
    static void output_grads(const OutputGradsCall& f) {
        T* scratch = static_cast<T*>(f.scratch);
        if (f.m == 0) {
            if (f.db != nullptr) fill(static_cast<T*>(f.db), f.n * f.r, T(0));
            if (f.dbias != nullptr) fill(static_cast<T*>(f.dbias), f.n, T(0));
        } else if (few(f)) {
            few_of_output(f).run(threads_of(f), scratch);
        } else {
            of_output(f).run(threads_of(f), scratch);
        }
    }

    // da: one read of x.
    static int64_t threads_of(const AGradCall& f) { return useful_threads(f.threads, f.m * f.k * f.r); }
    static bool few(const AGradCall& f) { return f.m <= FEW_TOKENS_BACKWARD; }
    static FewAdapterGradient<T, E> few_of_input(const AGradCall& f) {
        return {f.m, f.k, f.r, matrix(f.x), f.ldx, adapter(f.dh), f.lddh, f.dropout, static_cast<T*>(f.da)};
    }
    static typename Many::Sums of_input(const AGradCall& f) {
        return {f.m,           f.k,    f.r,     matrix(f.x),           f.ldx,   f.dropout, T(1),
                adapter(f.dh), f.lddh, nullptr, static_cast<T*>(f.da), nullptr, nullptr,   true};
    }
    static size_t a_grad_scratch(const AGradCall& f) {
        if (f.m == 0) return 0;
        return bytes(few(f) ? few_of_input(f).scratch(threads_of(f)) : of_input(f).scratch(threads_of(f)));
    }
    static void a_grad(const AGradCall& f) {
        T* scratch = static_cast<T*>(f.scratch);
        if (f.m == 0) return fill(static_cast<T*>(f.da), f.r * f.k, T(0));
        if (few(f)) return few_of_input(f).run(threads_of(f), scratch);
        of_input(f).run(threads_of(f), scratch);
    }

    static void gated(const GatedCall& f) {
        const Gated<T, E> call = {f.m,
                                  f.n,
                                  matrix(f.gate),
                                  matrix(f.up),
                                  matrix(f.da),
                                  f.ldgate,
                                  f.ldup,
                                  f.ldda,
                                  static_cast<E*>(f.a),
                                  static_cast<E*>(f.dgate),
                                  static_cast<E*>(f.dup),
                                  f.ldout};
        const int64_t threads = useful_threads(f.threads, f.m * f.n * 4 * WORK_PER_ELEMENT);
        f.da == nullptr ? call.template run<false>(f.number, threads) : call.template run<true>(f.number, threads);
    }

    static void weighted_sum(const WeightedSumCall& f) {
        const WeightedSum<T, E> call = {
            f.m, f.n, matrix(f.rows), f.tokens, adapter(f.factors), static_cast<T*>(f.sums)};
        call.run(useful_threads(f.threads, f.m * f.n * WORK_PER_ELEMENT));
    }
    static void weigh(const WeighingCall& f) {
        const Weighing<T, E> call = {
            f.m, f.n, matrix(f.rows), adapter(f.factors), static_cast<E*>(f.grads), static_cast<T*>(f.products)};
        call.run(useful_threads(f.threads, f.m * f.n * WORK_PER_ELEMENT));
    }

    static void gain_grad(const GainGradCall& f) {
        const GainGradients<T, E> gradients = {f.m,
                                               f.n,
                                               matrix(f.dy),
                                               f.lddy,
                                               matrix(f.linear),
                                               f.ldl,
                                               adapter(f.gain),
                                               static_cast<E*>(f.dlinear),
                                               static_cast<T*>(f.dgain),
                                               static_cast<T*>(f.dbias)};
        gradients.run(useful_threads(f.threads, f.m * f.n * WORK_PER_ELEMENT));
    }

    static RowNorms<T, E> norms_of(const RowNormsCall& f) {
        return {f.n,
                f.k,
                f.r,
                matrix(f.weight),
                f.ldw,
                f.across,
                adapter(f.lora_a),
                adapter(f.lora_b),
                static_cast<T>(f.scaling),
                static_cast<T*>(f.norms)};
    }
    static int64_t threads_of(const RowNormsCall& f) { return useful_threads(f.threads, f.n * f.k * f.r); }
    static size_t row_norms_scratch(const RowNormsCall& f) { return bytes(norms_of(f).scratch(threads_of(f))); }
    static void row_norms(const RowNormsCall& f) { norms_of(f).run(threads_of(f), static_cast<T*>(f.scratch)); }
};

static void draw_mask(const Dropout& dropout, int64_t rows, int64_t columns, int64_t threads, bool* keep) {
    const int64_t tasks = least(useful_threads(threads, rows * columns), rows);
    run_tasks(tasks, [&](int64_t task) {
        const Range range = share(rows, 1, tasks, task);
        with_mask(dropout, range.begin, 0, range.end - range.begin, columns,
                  [&](int64_t i, int64_t j, int64_t count, const uint64_t* words) {
                      bool* to = keep + (range.begin + i) * columns + j;
                      for (int64_t at = 0; at < count; ++at)
                          to[at] = words[at / DROPOUT_WORD] >> (at % DROPOUT_WORD) & 1;
                  });
    });
}

template <class T, class E>
constexpr Kernels KERNELS = {Driver<T, E>::shrink_scratch,
                             Driver<T, E>::shrink,
                             Driver<T, E>::product_scratch,
                             Driver<T, E>::product,
                             Driver<T, E>::whole_forward,
                             Driver<T, E>::few_forward_scratch,
                             Driver<T, E>::few_forward,
                             Driver<T, E>::apply_gain,
                             Driver<T, E>::output_grads_scratch,
                             Driver<T, E>::output_grads,
                             Driver<T, E>::a_grad_scratch,
                             Driver<T, E>::a_grad,
                             Driver<T, E>::gain_grad,
                             Driver<T, E>::row_norms_scratch,
                             Driver<T, E>::row_norms,
                             Driver<T, E>::gated,
                             Driver<T, E>::weighted_sum,
                             Driver<T, E>::weigh,
                             CodedDriver<T, E>::values,
                             CodedDriver<T, E>::product_scratch,
                             CodedDriver<T, E>::product,
                             CodedDriver<T, E>::input_grad_scratch,
                             CodedDriver<T, E>::input_grad,
                             Conversion<T, E>::adapter,
                             Conversion<T, E>::gradient,
                             draw_mask};

}  // namespace LORA_CAPABILITY
}  // namespace lora_kernels
