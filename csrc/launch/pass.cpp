// Reads a pass from its words, and refuses what does not hold together: a run then checks nothing but its tensors.
#include "pass.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>

namespace lora_kernels {
namespace launch {

namespace {

constexpr int64_t WORDS_VERSION = 3;  // pass_words.py has the same
constexpr int64_t MAX_COUNT = 1 << 16;
constexpr unsigned int PORTABLE_CLUSTER = 8;

void expect(bool holds, const char* what) {
    if (!holds) throw Refusal(std::string("the words are no prepared pass: ") + what + ".");
}

class Words {
  public:
    Words(const int64_t* words, int64_t count) : at_(words), end_(words + count) {}

    int64_t next() {
        expect(at_ < end_, "they end too soon");
        return *at_++;
    }
    // The next word, which counts or chooses: from `low` up to, and without, `high`.
    int64_t within(int64_t low, int64_t high, const char* what) {
        const int64_t found = next();
        expect(found >= low && found < high, what);
        return found;
    }
    bool flag() { return within(0, 2, "a flag is neither 0 nor 1") == 1; }
    int64_t count() { return within(0, MAX_COUNT, "a count is out of range"); }
    double real() {
        const int64_t bits = next();
        double found;
        std::memcpy(&found, &bits, sizeof found);
        return found;
    }
    std::vector<int64_t> list(int64_t length) {
        std::vector<int64_t> found(static_cast<size_t>(length));
        for (int64_t& word : found) word = next();
        return found;
    }
    bool done() const { return at_ == end_; }

  private:
    const int64_t *at_, *end_;
};

int32_t dtype_of(int64_t code) {
    using torch::headeronly::ScalarType;
    expect(code >= 0 && code < static_cast<int64_t>(ScalarType::NumOptions), "a dtype is unknown");
    return torch::stable::detail::to<int32_t>(torch::stable::detail::from(static_cast<ScalarType>(code)));
}

TensorSpec read_tensor(Words& words) {
    TensorSpec spec;
    spec.present = words.flag();
    if (!spec.present) return spec;
    spec.dtype = dtype_of(words.next());
    spec.aligned = words.flag();
    const int64_t rank = words.within(0, 8, "a tensor has too many dimensions");
    spec.sizes = words.list(rank), spec.strides = words.list(rank);
    return spec;
}

Buffer read_buffer(Words& words, int64_t scratch_bytes) {
    Buffer buffer;
    buffer.own = words.flag();
    if (!buffer.own) {
        buffer.offset = words.within(0, scratch_bytes + 1, "a buffer lies outside the scratch memory");
        return buffer;
    }
    buffer.dtype = dtype_of(words.next());
    const int64_t rank = words.within(0, 8, "a buffer has too many dimensions");
    buffer.sizes = words.list(rank), buffer.strides = words.list(rank);
    return buffer;
}

Place read_place(Words& words, const Pass& pass) {
    Place place;
    place.memory = static_cast<Memory>(words.within(0, 2, "a place is neither a tensor nor a buffer"));
    const size_t count = place.memory == Memory::tensor ? pass.tensors.size() : pass.buffers.size();
    place.index = words.within(0, static_cast<int64_t>(count), "a place is of a tensor or buffer that is not there");
    place.offset = words.next();
    return place;
}

Descriptor read_descriptor(Words& words, const Pass& pass) {
    Descriptor of;
    of.place = read_place(words, pass);
    of.element_type = static_cast<int>(words.next());
    of.element_bytes = static_cast<int>(words.within(1, 17, "a descriptor's element size is out of range"));
    of.swizzle = static_cast<int>(words.next()), of.fill = static_cast<int>(words.next());
    const int64_t rank = words.within(1, MAX_TENSOR_RANK + 1, "a descriptor has no dimension or too many");
    of.sizes = words.list(rank), of.strides = words.list(rank), of.box = words.list(rank);
    for (const int64_t size : of.sizes) expect(size > 0, "a descriptor's size is not above 0");
    return of;
}

// Room for a parameter of `bytes`, aligned to them as a kernel's parameters are.
size_t place_parameter(Kernel& kernel, size_t bytes) {
    const size_t at = (kernel.bytes.size() + bytes - 1) / bytes * bytes;
    kernel.bytes.resize(at + bytes);
    kernel.parameters.push_back(static_cast<uint32_t>(at));
    expect(kernel.bytes.size() <= MAX_PARAMETER_BYTES && kernel.parameters.size() <= MAX_PARAMETERS,
           "a kernel has more than 4096 bytes of parameters, or more than 256 of them");
    return at;
}

void read_argument(Words& words, const Pass& pass, Kernel& kernel) {
    Slot slot{};
    slot.kind = static_cast<Argument>(words.within(0, 4, "an argument is of an unknown kind"));
    switch (slot.kind) {
        case Argument::pointer:
            slot.place = read_place(words, pass), slot.at = place_parameter(kernel, sizeof(void*));
            break;
        case Argument::number:
            slot.index = words.within(0, pass.number_count, "an argument is a number that is not there");
            slot.type = static_cast<Number>(words.within(0, 4, "a number is of an unknown type"));
            slot.factor = words.real();
            slot.at = place_parameter(kernel, slot.type == Number::f32 || slot.type == Number::i32 ? 4 : 8);
            break;
        case Argument::constant: {
            const int64_t bytes = words.next();
            expect(bytes == 1 || bytes == 2 || bytes == 4 || bytes == 8, "a constant is not of 1, 2, 4 or 8 bytes");
            const int64_t bits = words.next();
            const size_t at = place_parameter(kernel, static_cast<size_t>(bytes));
            std::memcpy(kernel.bytes.data() + at, &bits, static_cast<size_t>(bytes));  // little-endian, as GPUs are
            return;
        }
        case Argument::descriptor:
            slot.index = words.within(0, static_cast<int64_t>(pass.descriptors.size()), "a descriptor is not there");
            slot.at = place_parameter(kernel, sizeof(TensorMap));
            break;
    }
    kernel.slots.push_back(slot);
}

Kernel read_kernel(Words& words, const Pass& pass) {
    Kernel kernel{};
    const int64_t handle = words.next();
    expect(handle != 0, "a kernel has no handle");
    std::memcpy(&kernel.function, &handle, sizeof kernel.function);
    for (unsigned int& size : kernel.grid) {
        size = static_cast<unsigned int>(words.within(1, int64_t{1} << 31, "a grid has no blocks"));
    }
    kernel.threads = static_cast<unsigned int>(words.within(1, 1025, "a block has no threads, or more than 1024"));
    kernel.shared_bytes = static_cast<unsigned int>(words.within(0, 1 << 20, "the shared memory is out of range"));
    kernel.cluster = static_cast<unsigned int>(words.within(1, 17, "a cluster has no blocks, or more than 16"));
    kernel.dependent = words.flag(), kernel.cooperative = words.flag(), kernel.beside = words.flag();
    const int64_t count = words.count();
    for (int64_t i = 0; i < count; ++i) read_argument(words, pass, kernel);
    if (kernel.cluster > PORTABLE_CLUSTER) {
        pass.driver->check(pass.driver->set_function_attribute(kernel.function, FUNCTION_NON_PORTABLE_CLUSTER, 1),
                           "a kernel cannot have clusters of more than 8 blocks");
    }
    return kernel;
}

Operand read_operand(Words& words, const Pass& pass) {
    Operand operand{};
    operand.place = read_place(words, pass);
    const bool tensor = operand.place.memory == Memory::tensor
                            ? pass.tensors[static_cast<size_t>(operand.place.index)].present
                            : pass.buffers[static_cast<size_t>(operand.place.index)].own;
    expect(tensor && operand.place.offset == 0, "an operand of a product is no tensor");
    operand.viewed = words.flag();
    for (int64_t& size : operand.sizes) size = words.next();
    for (int64_t& stride : operand.strides) stride = words.next();
    return operand;
}

Product read_product(Words& words, const Pass& pass) {
    const int kind = pass.device_type == aoti_torch_device_type_cuda();
    expect(pass.driver->multiply[kind] != nullptr && pass.driver->multiply_add[kind] != nullptr,
           "this PyTorch has no product on the device");
    Product product{};
    product.out = words.within(0, static_cast<int64_t>(pass.buffers.size()), "a product goes to no buffer");
    expect(pass.buffers[static_cast<size_t>(product.out)].own, "a product goes to scratch memory");
    product.add = words.flag();
    product.left = read_operand(words, pass), product.right = read_operand(words, pass);
    return product;
}

void read_steps(Words& words, Pass& pass) {
    bool forked = false;
    const int64_t count = words.count();
    for (int64_t i = 0; i < count; ++i) {
        const auto kind = static_cast<Step::Kind>(words.within(0, 5, "a step is of an unknown kind"));
        size_t index = 0;
        if (kind == Step::Kind::kernel) {
            index = pass.kernels.size();
            pass.kernels.push_back(read_kernel(words, pass));
            expect(forked || !pass.kernels.back().beside, "a kernel runs beside before the streams part");
        } else if (kind == Step::Kind::product) {
            index = pass.products.size();
            pass.products.push_back(read_product(words, pass));
        } else {
            expect(forked == (kind == Step::Kind::join), "the streams part and meet out of turn");
            forked = !forked;
        }
        pass.steps.push_back({kind, index});
    }
    expect(!forked, "the streams part and do not meet");
}

}  // namespace

Pass::Pass(std::shared_ptr<const Driver> of, const int64_t* begin, int64_t count) : driver(std::move(of)) {
    Words words(begin, count);
    expect(words.next() == WORDS_VERSION, "they are of another version of the package");
    device_type = words.flag() ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
    device_index = static_cast<int32_t>(words.within(-1, MAX_COUNT, "the device is out of range"));
    ordinal = static_cast<int32_t>(words.within(0, MAX_COUNT, "the device is out of range"));
    driver->check(driver->device(&device, ordinal), "device " + std::to_string(ordinal) + " is not there");
    driver->check(driver->retain_context(&context, device), "device " + std::to_string(ordinal) + " has no context");
    scratch_bytes = words.within(0, int64_t{1} << 48, "the scratch memory is out of range");
    number_count = words.count();
    for (int64_t left = words.count(); left > 0; --left) tensors.push_back(read_tensor(words));
    for (int64_t left = words.count(); left > 0; --left) buffers.push_back(read_buffer(words, scratch_bytes));
    for (int64_t left = words.count(); left > 0; --left) descriptors.push_back(read_descriptor(words, *this));
    expect(descriptors.empty() || driver->encode != nullptr,
           "it has TMA descriptors, and the driver has no entry point cuTensorMapEncodeTiled");
    maps_.resize(descriptors.size());
    read_steps(words, *this);
    results = words.list(words.count());
    expect(!results.empty(), "it has no result");
    for (const int64_t index : results) {
        expect(index >= 0 && index < static_cast<int64_t>(buffers.size()) && buffers[static_cast<size_t>(index)].own,
               "a result is no tensor");
    }
    expect(words.done(), "words are left over");
}

}  // namespace launch
}  // namespace lora_kernels
