// The CUDA library's operators, by the schemas of lora_kernels/ops.py: allocation, the order of the kernels, the base
// product by the library's GEMM. LibTorch's stable ABI only.
// Compile with -DUSE_CUDA: torch's C shims declare what concerns streams under it.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "../matrix_of_rows.h"
#include "launch.h"

namespace lora_kernels {
namespace cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype_of(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case ScalarType::Half:
            return DType::HALF;
        case ScalarType::BFloat16:
            return DType::BFLOAT16;
        case ScalarType::Float:
            return DType::FLOAT;
        case ScalarType::Double:
            return DType::DOUBLE;
        default:
            STD_TORCH_CHECK(false, "a tensor has a dtype that lora_kernels' CUDA library does not take. ",
                            "Use torch.float16, torch.bfloat16, torch.float32 or torch.float64.");
    }
    return DType::FLOAT;
}

// What a call's kernels share: the device made current, its stream, the compute dtype, dropout.
struct Call {
    Call(const Tensor& on, DType compute, double p, const std::optional<Tensor>& state)
        : guard(on.get_device_index()), dtype(compute), keep_scale(state ? 1.0 / (1.0 - p) : 1.0) {
        void* current = nullptr;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &current));
        stream = static_cast<cudaStream_t>(current);
        if (!state) return;
        STD_TORCH_CHECK(state->is_cuda() && state->scalar_type() == ScalarType::Long && state->numel() == 2,
                        "the dropout state must be two int64 on the device of the other tensors.");
        seed = torch::stable::contiguous(*state);
        dropout = {static_cast<const int64_t*>(seed->const_data_ptr()), dropout_keep(p)};
    }

    // Where sums are kept: h, dh, parts.
    Tensor sums(const Tensor& like, std::initializer_list<int64_t> sizes) const {
        return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()),
                                        dtype == DType::DOUBLE ? ScalarType::Double : ScalarType::Float);
    }

    // out = scale * the sum of `count` parts.
    void reduce(const Tensor& parts, int64_t count, double scale, const Tensor& out) const {
        const ReduceArgs args{parts.const_data_ptr(), count, out.numel(), scale, out.mutable_data_ptr(), dtype_of(out)};
        launch_reduce(dtype, args, stream);
    }

    torch::stable::accelerator::DeviceGuard guard;
    DType dtype;
    double keep_scale;
    cudaStream_t stream = nullptr;
    std::optional<Tensor> seed;  // kept alive
    Dropout dropout{nullptr, KEEP_ALL};
};

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
    return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()));
}

// Kernels read rows of any stride, but adjacent columns: anything else is copied once.
Tensor with_adjacent_columns(const Tensor& x) {
    return x.size(1) <= 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
}

Matrix matrix_of(const Tensor& x) {
    const int64_t row_bytes = x.stride(0) * static_cast<int64_t>(x.element_size());
    const bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 && row_bytes % 16 == 0;
    return {x.const_data_ptr(), x.size(0), x.size(1), x.stride(0), aligned};
}

Operand operand_of(const Tensor& t) {
    return {t.const_data_ptr(), dtype_of(t), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

Operand transposed(const Operand& o) { return {o.data, o.dtype, o.columns, o.rows, o.column_stride, o.row_stride}; }

void check_matrix(const Tensor& t, const char* name, int64_t rows, int64_t columns) {
    STD_TORCH_CHECK(t.is_cuda(), name, " must be on the CUDA device of the other tensors.");
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, " must have the shape (", rows,
                    ", ", columns, ").");
}

// The kernels read these as what the call computes or sums in, whatever they are.
void check_dtype(const Tensor& t, const char* name, DType dtype, const char* meaning) {
    STD_TORCH_CHECK(dtype_of(t) == dtype, name, " must have ", meaning, ".");
}

void check_launches() {
    const cudaError_t status = cudaGetLastError();
    STD_TORCH_CHECK(status == cudaSuccess, "a CUDA kernel could not be launched: ", cudaGetErrorString(status));
}

// out += left right, by cuBLAS. This is what makes the low-rank term come first ("LoRA first"): out is written once by
// Expand and accumulated onto (beta = 1), instead of being written by the GEMM, read, and written again. A 16-bit out
// is rounded twice that way, as it is in the plain composition `linear(x, W) + s h Bᵀ`, which rounds each term: within
// the policy of lora_kernels/accuracy.py (twice the plain composition's error).
void accumulate_product(const Tensor& out, const Tensor& left, const Tensor& right) {
    if (out.numel() == 0 || left.size(1) == 0) return;
    TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(out.get(), out.get(), left.get(), right.get(), 1.0, 1.0));
}

// scale (x * keep) factorᵀ, in fp32 (fp64).
Tensor shrink(const Call& call, const Tensor& x, const Operand& factor, const Dropout& dropout, double scale) {
    const int64_t rows = x.size(0), ranks = factor.rows;
    const Slices slices = shrink_slices(call.dtype, rows, x.size(1), ranks);
    const Tensor out = call.sums(x, {rows, ranks});
    ShrinkArgs args{matrix_of(x), factor, dropout, out.mutable_data_ptr(), slices, scale};
    if (slices.count == 1) {
        launch_shrink(call.dtype, args, call.stream);
        return out;
    }
    const Tensor parts = call.sums(x, {slices.count, rows, ranks});
    args.out = parts.mutable_data_ptr();
    args.scale = 1.0;
    launch_shrink(call.dtype, args, call.stream);
    call.reduce(parts, slices.count, scale, out);
    return out;
}

// scale hiddenᵀ (x * keep) into out: (R, C), or (C, R) if `by_columns`.
void gradient(const Call& call, const Tensor& x, const Operand& hidden, const Dropout& dropout, double scale,
              bool by_columns, const Tensor& out) {
    const int64_t columns = x.size(1), ranks = hidden.columns;
    const Slices slices = gradient_slices(call.dtype, x.size(0), columns, ranks);
    const Tensor parts = call.sums(x, {slices.count, ranks, columns});
    const int64_t rank_stride = by_columns ? 1 : columns, column_stride = by_columns ? ranks : 1;
    const GradientArgs args{matrix_of(x), transposed(hidden), dropout,      parts.mutable_data_ptr(),
                            slices,       rank_stride,        column_stride};
    launch_gradient(call.dtype, args, call.stream);
    call.reduce(parts, slices.count, scale, out);
}

// out = keep * (scale hidden factorᵀ + bias).
void expand(const Call& call, const Operand& hidden, const Operand& factor, const Tensor* bias, const Dropout& dropout,
            double scale, const Tensor& out) {
    ExpandArgs args{hidden, factor, nullptr, DType::FLOAT, 0, dropout, out.mutable_data_ptr(), scale};
    if (bias != nullptr) {
        args.bias = bias->const_data_ptr();
        args.bias_dtype = dtype_of(*bias);
        args.bias_stride = bias->stride(0);
    }
    launch_expand(call.dtype, args, call.stream);
}

std::tuple<Tensor, Tensor> dh_db(const Call& call, const Tensor& dy, const Tensor& lora_b, const Tensor& h,
                                 double scaling) {
    const int64_t rows = dy.size(0), columns = dy.size(1), ranks = lora_b.size(1);
    const Slices slices = dh_db_slices(call.dtype, rows, columns);
    const int64_t tiles = dh_db_tiles(call.dtype, columns);
    const Tensor dh = call.sums(dy, {rows, ranks}), db = empty(lora_b, {columns, ranks});
    const Tensor dh_parts = call.sums(dy, {tiles, rows, ranks});
    const Tensor db_parts = call.sums(dy, {slices.count, columns, ranks});
    const DhDbArgs args{matrix_of(dy),
                        transposed(operand_of(lora_b)),
                        transposed(operand_of(h)),
                        dh_parts.mutable_data_ptr(),
                        db_parts.mutable_data_ptr(),
                        slices};
    launch_dh_db(call.dtype, args, call.stream);
    call.reduce(dh_parts, tiles, scaling, dh);
    call.reduce(db_parts, slices.count, scaling, db);
    return {dh, db};
}

Tensor column_sum(const Call& call, const Tensor& dy, const Tensor& bias) {
    const int64_t columns = dy.size(1);
    const Slices slices = column_sum_slices(dy.size(0), columns);
    const Tensor parts = call.sums(dy, {slices.count, columns}), out = empty(bias, {columns});
    launch_column_sum(call.dtype, {matrix_of(dy), parts.mutable_data_ptr(), slices}, call.stream);
    call.reduce(parts, slices.count, 1.0, out);
    return out;
}

// x is (..., K), and y then (..., N). Its third result is the packed mask, which is drawn again instead.
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor given_x, const Tensor weight, const Tensor lora_a,
                                           const Tensor lora_b, const std::optional<Tensor> bias, double scaling,
                                           double p, const std::optional<Tensor> state) {
    const MatrixOfRows given(given_x);
    const Tensor& x = given.matrix;
    const int64_t rows = x.size(0), columns = weight.size(0);
    check_matrix(weight, "weight", columns, x.size(1));
    check_matrix(lora_a, "lora_a", lora_a.size(0), x.size(1));
    check_matrix(lora_b, "lora_b", columns, lora_a.size(0));
    const Call call(x, dtype_of(x), p, state);
    check_dtype(weight, "weight", call.dtype, "x's dtype");
    const Tensor rows_of_x = with_adjacent_columns(x), y = empty(x, {rows, columns});
    const Tensor h = shrink(call, rows_of_x, operand_of(lora_a), call.dropout, call.keep_scale);
    expand(call, operand_of(h), operand_of(lora_b), bias ? &*bias : nullptr, {nullptr, KEEP_ALL}, scaling, y);
    check_launches();
    accumulate_product(y, rows_of_x, torch::stable::transpose(weight, 0, 1));
    const int64_t none[] = {0};
    return {given.restored(y), h,
            torch::stable::new_empty(x, torch::headeronly::IntHeaderOnlyArrayRef(none, 1), ScalarType::Int)};
}

// dy is (..., N), x (..., K), and dx then too. Which gradients are due is told by what is given: dx by weight, da by x,
// db by h, dbias by bias.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor given_dy, const std::optional<Tensor> given_x,
                                                    const std::optional<Tensor> weight, const Tensor lora_a,
                                                    const Tensor lora_b, const std::optional<Tensor> bias,
                                                    const std::optional<Tensor> h, double scaling, double p,
                                                    const std::optional<Tensor> state) {
    const MatrixOfRows given(given_dy);
    const Tensor& dy = given.matrix;
    const std::optional<Tensor> x = given_x ? std::optional<Tensor>(MatrixOfRows(*given_x).matrix) : std::nullopt;
    const int64_t rows = dy.size(0), columns = dy.size(1), ranks = lora_a.size(0), width = lora_a.size(1);
    check_matrix(lora_b, "lora_b", columns, ranks);
    if (x) check_matrix(*x, "x", rows, width);
    if (weight) check_matrix(*weight, "weight", columns, width);
    if (h) check_matrix(*h, "h", rows, ranks);
    const Call call(dy, dtype_of(dy), p, state);
    if (x) check_dtype(*x, "x", call.dtype, "dy's dtype");
    if (weight) check_dtype(*weight, "weight", call.dtype, "dy's dtype");
    if (h) check_dtype(*h, "h", call.dtype == DType::DOUBLE ? DType::DOUBLE : DType::FLOAT, "the dtype of sums");
    const Tensor rows_of_dy = with_adjacent_columns(dy);
    Tensor dx, da, db, dbias, dh;
    const bool dh_wanted = x || weight;
    if (dh_wanted && h && ranks <= DhDb<float>::RANKS) {
        std::tie(dh, db) = dh_db(call, rows_of_dy, lora_b, *h, scaling);
    } else {
        if (dh_wanted) dh = shrink(call, rows_of_dy, transposed(operand_of(lora_b)), {nullptr, KEEP_ALL}, scaling);
        if (h) {
            db = empty(lora_b, {columns, ranks});
            gradient(call, rows_of_dy, operand_of(*h), {nullptr, KEEP_ALL}, scaling, true, db);
        }
    }
    if (!h) db = empty(lora_b, {0});
    da = x ? empty(lora_a, {ranks, width}) : empty(lora_a, {0});
    if (x) {
        gradient(call, with_adjacent_columns(*x), operand_of(dh), call.dropout, call.keep_scale, false, da);
    }
    dbias = bias ? column_sum(call, rows_of_dy, *bias) : empty(dy, {0});
    dx = weight ? empty(dy, {rows, width}) : empty(dy, {0});
    if (weight) {
        expand(call, operand_of(dh), transposed(operand_of(lora_a)), nullptr, call.dropout, call.keep_scale, dx);
    }
    check_launches();
    if (weight) accumulate_product(dx, rows_of_dy, *weight);
    return {weight ? given.restored(dx) : dx, da, db, dbias};
}

Tensor mask(const Tensor state, int64_t rows, int64_t columns, double p) {
    const Call call(state, DType::FLOAT, p, state);
    const int64_t sizes[] = {rows, columns};
    const Tensor keep =
        torch::stable::new_empty(state, torch::headeronly::IntHeaderOnlyArrayRef(sizes, 2), ScalarType::Bool);
    launch_mask({call.dropout, static_cast<bool*>(keep.mutable_data_ptr()), rows, columns}, call.stream);
    check_launches();
    return keep;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CUDA, m) {
    m.impl("native_forward", TORCH_BOX(&forward));
    m.impl("native_backward", TORCH_BOX(&backward));
    m.impl("native_mask", TORCH_BOX(&mask));
}

}  // namespace cuda
}  // namespace lora_kernels
