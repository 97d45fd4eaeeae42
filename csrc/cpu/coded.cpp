// The operators for CPU tensors that read a weight of codes; lora_kernels/ops.py defines their schemas.
#include "layer.h"

namespace lora_kernels {
namespace {

constexpr int64_t CODE_UNIT = 32;  // as in csrc/cpu/four_bits.h

const void* part_of(const Tensor& tensor, ScalarType dtype, const char* name, const char* of, int64_t count) {
    STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.numel() >= count, name,
                    " of a coded weight must be contiguous ", of, " and have ", count, " numbers, and it has ",
                    tensor.numel(), ".");
    return tensor.const_data_ptr();
}

const float* floats_of(const Tensor& tensor, const char* name, int64_t count) {
    return static_cast<const float*>(part_of(tensor, ScalarType::Float, name, "float32", count));
}

const uint8_t* bytes_of(const Tensor& tensor, const char* name, int64_t count) {
    return static_cast<const uint8_t*>(part_of(tensor, ScalarType::Byte, name, "uint8", count));
}

// What a weight is made of: see ops.py.
struct Given {
    const std::vector<Tensor>& parts;
    const std::optional<Tensor>& table;
    int64_t high, wide, nested;
    bool low_first;
    int64_t rows, columns;
};

FourBits four_bits_of(const Given& given) {
    const std::vector<Tensor>& parts = given.parts;
    const int64_t rows = given.rows, columns = given.columns, blocksize = given.wide;
    STD_TORCH_CHECK(parts.size() == (given.nested == 0 ? 2u : 5u), "a 4-bit weight has two parts, nested five.");
    STD_TORCH_CHECK(blocksize > 0 && blocksize % CODE_UNIT == 0 && given.nested >= 0,
                    "the blocks of a 4-bit weight must be multiples of ", CODE_UNIT, ", and ", blocksize,
                    " was given.");
    const int64_t total = rows * columns, blocks = ceil_div(total, blocksize);
    FourBits w = {};
    w.n = rows, w.k = columns, w.blocksize = blocksize, w.low_first = given.low_first;
    w.codes = bytes_of(parts[0], "codes", ceil_div(total, 2));
    w.table = floats_of(*given.table, "table", 16);
    if (parts[1].scalar_type() == ScalarType::BFloat16) {
        STD_TORCH_CHECK(rows % 32 == 0 && columns % blocksize == 0 && given.nested == 0 && !given.low_first,
                        "4-bit codes by columns must have rows in multiples of 32 and whole blocks in each.");
        w.by_columns = static_cast<const uint16_t*>(part_of(parts[1], ScalarType::BFloat16, "absmax", "bf16", blocks));
        return w;
    }
    if (given.nested == 0) {
        w.absmax = floats_of(parts[1], "absmax", blocks);
        return w;
    }
    w.nested = bytes_of(parts[1], "absmax", blocks);
    w.nested_absmax = floats_of(parts[2], "the absmax of absmax", ceil_div(blocks, given.nested));
    w.nested_table = floats_of(parts[3], "the table of absmax", 256);
    w.nested_blocksize = given.nested;
    w.offset = *floats_of(parts[4], "the offset of absmax", 1);
    return w;
}

EightBits eight_bits_of(const Given& given) {
    const std::vector<Tensor>& parts = given.parts;
    STD_TORCH_CHECK(parts.size() == 2 || parts.size() == 3, "an 8-bit weight has two or three parts.");
    STD_TORCH_CHECK(given.high > 0 && given.wide > 0, "the blocks of an 8-bit weight must not be empty.");
    const int64_t total = given.rows * given.columns;
    const int64_t blocks = ceil_div(given.rows, given.high) * ceil_div(given.columns, given.wide);
    EightBits w = {};
    w.n = given.rows, w.k = given.columns, w.high = given.high, w.wide = given.wide;
    w.e4m3 = parts[0].scalar_type() == ScalarType::Byte;
    w.codes = w.e4m3 ? bytes_of(parts[0], "codes", total)
                     : static_cast<const uint8_t*>(part_of(parts[0], ScalarType::Char, "codes", "int8", total));
    w.scales = floats_of(parts[1], "scales", blocks);
    if (parts.size() == 3)
        w.zeros = static_cast<const int8_t*>(part_of(parts[2], ScalarType::Char, "zeros", "int8", blocks));
    return w;
}

Codes weight_of(const Given& given) {
    STD_TORCH_CHECK(given.rows >= 0 && given.columns >= 0, "a coded weight must have rows and columns.");
    Codes w = {};
    w.eight_bits = !given.table.has_value();
    if (w.eight_bits) {
        w.eight = eight_bits_of(given);
    } else {
        w.four = four_bits_of(given);
    }
    return w;
}

// The same for products.
Codes factor_of(const Given& given, int64_t tokens) {
    STD_TORCH_CHECK(tokens <= CODED_TOKENS, "at most ", CODED_TOKENS, " tokens are multiplied with codes, and ", tokens,
                    " were given: multiply the values.");
    const Codes w = weight_of(given);
    STD_TORCH_CHECK(w.eight_bits || given.columns % CODE_UNIT == 0,
                    "a row of 4-bit codes is multiplied in multiples of ", CODE_UNIT, " columns, and W has ",
                    given.columns, ": multiply the values.");
    return w;
}

const Kernels& kernels_of(Dtype compute) {
    STD_TORCH_CHECK(compute != Dtype::fp64, "a coded weight has no float64 values: use float32, bfloat16 or float16.");
    return kernels_for(compute);
}

Tensor values(const std::vector<Tensor>& parts, const std::optional<Tensor>& table, int64_t high, int64_t wide,
              int64_t nested, bool low_first, int64_t rows, int64_t columns, int64_t row, int64_t column,
              int64_t height, int64_t width, ScalarType dtype) {
    const bool whole = height == rows && width == columns, halves = table.has_value();
    STD_TORCH_CHECK(row >= 0 && column >= 0 && height >= 0 && width >= 0 && row + height <= rows &&
                        column + width <= columns && row % 32 == 0,
                    "a part of a coded weight must lie within it, and its rows begin at a multiple of 32.");
    STD_TORCH_CHECK(whole || !halves || (columns % 2 == 0 && column % 2 == 0),
                    "a part of a 4-bit weight must begin at an even column, and the weight have an even number.");
    Tensor out = empty({height, width}, dtype);
    const Kernels& kernels = kernels_of(dtype_of(out, "dtype"));
    const Codes w = weight_of({parts, table, high, wide, nested, low_first, rows, columns});
    if (height * width > 0)
        kernels.coded_values({w, row, column, height, width, out.mutable_data_ptr(), thread_count()});
    return out;
}

// The low-rank part of a product, which may be absent: (m, rank) and an adapter.
struct LowRank {
    int64_t r = 0, ld = 0;
    const void *low = nullptr, *adapter = nullptr;
    std::optional<Matrix> matrix;
    std::optional<Adapter> converted;

    LowRank(const std::optional<Tensor>& low_given, const char* name, const std::optional<Tensor>& adapter_given,
            const char* adapter_name, Dtype compute, int64_t m, int64_t rows, bool by_rows) {
        STD_TORCH_CHECK(low_given.has_value() == adapter_given.has_value(), name, " and ", adapter_name,
                        " go together.");
        if (!low_given.has_value()) return;
        matrix.emplace(*low_given, name);
        r = matrix->columns, ld = matrix->stride, low = matrix->data;
        expect(*low_given, name, {m, r}, hidden_of(compute));
        if (by_rows) {
            expect(*adapter_given, adapter_name, {rows, r});
        } else {
            expect(*adapter_given, adapter_name, {r, rows});
        }
        adapter = converted.emplace(*adapter_given, adapter_name, adapter_of(compute)).data;
    }
};

std::tuple<Tensor, Tensor> product(const Tensor& x, const std::vector<Tensor>& parts,
                                   const std::optional<Tensor>& table, int64_t high, int64_t wide, int64_t nested,
                                   bool low_first, int64_t rows, const std::optional<Tensor>& lora_b,
                                   const std::optional<Tensor>& h, const std::optional<Tensor>& bias,
                                   const std::optional<Tensor>& gain, double scaling, bool with_linear) {
    const Dtype compute = dtype_of(x, "x"), wide_dtype = hidden_of(compute);
    const Kernels& kernels = kernels_of(compute);
    const Matrix tokens(x, "x");
    const int64_t m = tokens.rows, n = rows;
    const LowRank low(h, "h", lora_b, "lora_b", compute, m, n, true);
    expect(bias, "bias", {n});
    expect(gain, "gain", {n});
    const OptionalAdapter offset(bias, "bias", compute), factor(gain, "gain", wide_dtype);
    const bool kept = gain.has_value() && with_linear;
    Tensor y = empty({m, n}, x.scalar_type());
    Tensor linear = kept ? empty({m, n}, x.scalar_type()) : empty({0}, x.scalar_type());
    CodedProductCall call = {factor_of({parts, table, high, wide, nested, low_first, n, tokens.columns}, m),
                             m,
                             low.r,
                             tokens.data,
                             tokens.stride,
                             low.low,
                             low.ld,
                             scaling,
                             low.adapter,
                             offset.data,
                             factor.data,
                             kept ? linear.mutable_data_ptr() : nullptr,
                             y.mutable_data_ptr(),
                             thread_count(),
                             nullptr};
    Scratch scratch(kernels.coded_product_scratch(call));
    call.scratch = scratch.get();
    kernels.coded_product(call);
    return {y, linear};
}

Tensor input_grad(const Tensor& dy, const std::vector<Tensor>& parts, const std::optional<Tensor>& table, int64_t high,
                  int64_t wide, int64_t nested, bool low_first, int64_t columns, const std::optional<Tensor>& dh,
                  const std::optional<Tensor>& lora_a, double p, const std::optional<Tensor>& state) {
    const Dtype compute = dtype_of(dy, "dy");
    const Kernels& kernels = kernels_of(compute);
    const Matrix outer(dy, "dy");
    const int64_t m = outer.rows, n = outer.columns;
    const LowRank low(dh, "dh", lora_a, "lora_a", compute, m, columns, false);
    Tensor dx = empty({m, columns}, dy.scalar_type());
    const Tensor* seed = state.has_value() && low.r > 0 ? &*state : nullptr;
    CodedInputGradCall call = {
        factor_of({parts, table, high, wide, nested, low_first, n, columns}, m),
        m,
        {n, low.r, outer.data, outer.stride, nullptr, 0, low.low, low.ld, low.adapter, dropout_of(seed, p)},
        dx.mutable_data_ptr(),
        thread_count(),
        nullptr};
    Scratch scratch(kernels.coded_input_grad_scratch(call));
    call.scratch = scratch.get();
    kernels.coded_input_grad(call);
    return dx;
}

}  // namespace
}  // namespace lora_kernels

STABLE_TORCH_LIBRARY_IMPL(lora_kernels, CPU, m) {
    m.impl("native_coded_values", TORCH_BOX(&lora_kernels::values));
    m.impl("native_coded_product", TORCH_BOX(&lora_kernels::product));
    m.impl("native_coded_input_grad", TORCH_BOX(&lora_kernels::input_grad));
}
