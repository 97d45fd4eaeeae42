// A prepared pass: which kernels run with which arguments in which memory, as Python describes it once, in words of 64
// bits (lora_kernels/backends/triton/run/pass_words.py writes what pass.cpp reads).
#pragma once

#include <mutex>
#include <unordered_map>
#include <vector>

#include "driver.h"

namespace lora_kernels {
namespace launch {

constexpr size_t MAX_PARAMETER_BYTES = 8192, MAX_PARAMETERS = 512;

// Where a pointer comes from: tensor `index` of the call, or buffer `index` of the pass, `offset` bytes on.
enum class Memory { tensor = 0, buffer = 1 };
struct Place {
    Memory memory;
    int64_t index, offset;
};

// What tensor k of every call has to be: the kernels were compiled and the sizes taken for it.
struct TensorSpec {
    bool present;
    int32_t dtype = 0;
    bool aligned = false;  // to 16 bytes
    std::vector<int64_t> sizes, strides;
};

// Memory of one call: a tensor of its own, or bytes of the scratch memory that a call allocates in one piece.
struct Buffer {
    bool own;
    int32_t dtype = 0;
    std::vector<int64_t> sizes, strides;
    int64_t offset = 0;
};

struct Descriptor {
    Place place;
    int element_type, element_bytes, swizzle, fill;
    std::vector<int64_t> sizes, strides, box;
};

enum class Argument { pointer = 0, number = 1, constant = 2, descriptor = 3 };
enum class Number { f32 = 0, f64 = 1, i32 = 2, i64 = 3 };

// A parameter that each call fills in; what is constant stands in the kernel's template.
struct Slot {
    Argument kind;
    size_t at;
    Place place{};
    int64_t index = 0;
    Number type = Number::f32;
    double factor = 1.0;  // of a number
};

struct Kernel {
    Function function;
    unsigned int grid[3], threads, shared_bytes, cluster;
    bool dependent, cooperative, beside;
    std::vector<unsigned char> bytes;  // the parameters, constants in place
    std::vector<uint32_t> parameters;  // where each begins
    std::vector<Slot> slots;
};

// An operand of PyTorch's product: a tensor, or a view of its memory.
struct Operand {
    Place place;
    bool viewed;
    int64_t sizes[2], strides[2];
};

struct Product {
    int64_t out;  // a buffer that is a tensor
    bool add;
    Operand left, right;
};

struct Step {
    // The streams part to one beside of normal priority, or of high priority, and meet.
    enum class Kind { kernel = 0, product = 1, fork = 2, join = 3, fork_high = 4 } kind;
    size_t index;
};

struct SideStream {
    Stream stream;
    Event forked, joined;
};

class Pass {
  public:
    // Throws a Refusal where the words are no pass.
    Pass(std::shared_ptr<const Driver> driver, const int64_t* words, int64_t count);

    const std::shared_ptr<const Driver> driver;
    int32_t device_type, device_index, ordinal;
    int device = 0;
    Context context = nullptr;
    int64_t scratch_bytes = 0, number_count = 0;
    std::vector<TensorSpec> tensors;
    std::vector<Buffer> buffers;
    std::vector<Descriptor> descriptors;
    std::vector<Kernel> kernels;
    std::vector<Product> products;
    std::vector<Step> steps;
    std::vector<int64_t> results;

    // The descriptor `index` at `address`: made once for each address, since all else of it is fixed by the pass.
    void describe(size_t index, uint64_t address, TensorMap& out) const;
    // The stream beside `main` of this priority, with its events; one for each.
    SideStream beside(Stream main, bool high) const;

  private:
    mutable std::mutex mutex_;
    mutable std::vector<std::unordered_map<uint64_t, TensorMap>> maps_;
};

}  // namespace launch
}  // namespace lora_kernels
