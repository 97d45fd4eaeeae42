// The operators for CPU tensors that read a weight of 4-bit codes; lora_kernels/ops.py defines their schemas.
#include "arguments.h"

namespace lora_kernels {
namespace {

constexpr int64_t CODE_UNIT = 32;  // as in csrc/cpu/four_bits.h

const float* floats_of(const Tensor& tensor, const char* name, int64_t count) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.numel() >= count,
                    name, " of a 4-bit weight must be contiguous float32 and have ", count, " numbers, and it has ",
                    tensor.numel(), ".");
    return static_cast<const float*>(tensor.const_data_ptr());
}

const uint8_t* bytes_of(const Tensor& tensor, const char* name, int64_t count) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Byte && tensor.is_contiguous() && tensor.numel() >= count, name,
                    " of a 4-bit weight must be contiguous uint8 and have ", count, " bytes, and it has ",
                    tensor.numel(), ".");
    return static_cast<const uint8_t*>(tensor.const_data_ptr());
}

// parts: codes and absmax; where that is nested (uint8) also its own absmax, its table and its offset.
FourBits weight_of(const std::vector<Tensor>& parts, const Tensor& table, int64_t blocksize, int64_t nested_blocksize,
                   int64_t rows, int64_t columns) {
    STD_TORCH_CHECK(parts.size() == (nested_blocksize == 0 ? 2u : 5u), "a 4-bit weight has two parts, nested five.");
    STD_TORCH_CHECK(blocksize > 0 && blocksize % CODE_UNIT == 0 && nested_blocksize >= 0 && rows >= 0 && columns >= 0,
                    "the blocks of a 4-bit weight must be multiples of ", CODE_UNIT, ", and ", blocksize,
                    " was given.");
    const int64_t total = rows * columns, blocks = ceil_div(total, blocksize);
    FourBits w = {};
    w.n = rows, w.k = columns, w.blocksize = blocksize;
    w.codes = bytes_of(parts[0], "codes", ceil_div(total, 2));
    w.table = floats_of(table, "table", 16);
    if (nested_blocksize == 0) {
        w.absmax = floats_of(parts[1], "absmax", blocks);
        return w;
    }
    w.nested = bytes_of(parts[1], "absmax", blocks);
    w.nested_absmax = floats_of(parts[2], "the absmax of absmax", ceil_div(blocks, nested_blocksize));
    w.nested_table = floats_of(parts[3], "the table of absmax", 256);
    w.nested_blocksize = nested_blocksize;
    w.offset = *floats_of(parts[4], "the offset of absmax", 1);
    return w;
}

const Kernels& kernels_of(Dtype compute) {
    STD_TORCH_CHECK(compute != Dtype::fp64, "a 4-bit weight has no float64 values: use float32, bfloat16 or float16.");
    return kernels_for(compute);
}

Tensor values(const std::vector<Tensor>& parts, const Tensor& table, int64_t blocksize, int64_t nested_blocksize,
              int64_t rows, int64_t columns, ScalarType dtype) {
    Tensor out = empty({rows, columns}, dtype);
    const Kernels& kernels = kernels_of(dtype_of(out, "dtype"));
    kernels.four_bit_values(
        {weight_of(parts, table, blocksize, nested_blocksize, rows, columns), out.mutable_data_ptr(), thread_count()});
    return out;
}

std::tuple<Tensor, Tensor> product(const Tensor& x, const std::vector<Tensor>& parts, const Tensor& table,
                                   int64_t blocksize, int64_t nested_blocksize, const Tensor& lora_b, const Tensor& h,
                                   const std::optional<Tensor>& bias, const std::optional<Tensor>& gain, double scaling,
                                   bool with_linear) {
    const Dtype compute = dtype_of(x, "x"), wide = hidden_of(compute);
    const Kernels& kernels = kernels_of(compute);
    const Matrix tokens(x, "x"), low(h, "h");
    STD_TORCH_CHECK(lora_b.dim() == 2, "lora_b must be a matrix, and it has ", lora_b.dim(), " dimensions.");
    const int64_t m = tokens.rows, k = tokens.columns, n = lora_b.sizes()[0], r = lora_b.sizes()[1];
    STD_TORCH_CHECK(k % CODE_UNIT == 0, "a row of 4-bit codes is multiplied in multiples of ", CODE_UNIT,
                    " columns, and x has ", k, ": multiply the values.");
    expect(h, "h", {m, r}, wide);
    expect(bias, "bias", {n});
    expect(gain, "gain", {n});
    const Adapter b(lora_b, "lora_b", adapter_of(compute));
    const OptionalAdapter offset(bias, "bias", compute), factor(gain, "gain", wide);
    const bool kept = gain.has_value() && with_linear;
    Tensor y = empty({m, n}, x.scalar_type());
    Tensor linear = kept ? empty({m, n}, x.scalar_type()) : empty({0}, x.scalar_type());
    FourBitProductCall call = {weight_of(parts, table, blocksize, nested_blocksize, n, k),
                               m,
                               r,
                               tokens.data,
                               tokens.stride,
                               low.data,
                               low.stride,
                               scaling,
                               b.data,
                               offset.data,
                               factor.data,
                               kept ? linear.mutable_data_ptr() : nullptr,
                               y.mutable_data_ptr(),
                               thread_count(),
                               nullptr};
    Scratch scratch(kernels.four_bit_scratch(call));
    call.scratch = scratch.get();
    kernels.four_bit_product(call);
    return {y, linear};
}

}  // namespace
}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
    m.impl("native_four_bit_values", TORCH_BOX(&lora_kernels::values));
    m.impl("native_four_bit_product", TORCH_BOX(&lora_kernels::product));
}
