// One call of a prepared pass. All memory is allocated before the first launch, on the current stream, and the side
// stream is joined before anything is let go of, also where a launch fails: no kernel outlives what it reads.
#include "run.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace lora_kernels {
namespace launch {

namespace {

// The pass's context where another device's, or none, is current: the legacy stream is of the current context.
class OnDevice {
  public:
    explicit OnDevice(const Pass& pass) : driver_(*pass.driver) {
        int current = -1;
        if (driver_.current_device(&current) == SUCCESS && current == pass.device) return;
        driver_.check(driver_.push_context(pass.context), "the device cannot be made current");
        pushed_ = true;
    }
    ~OnDevice() {
        Context left = nullptr;
        if (pushed_) driver_.pop_context(&left);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    const Driver& driver_;
    bool pushed_ = false;
};

struct NoMemory {};

[[noreturn]] void refuse_tensor(size_t index, const char* what) {
    throw Refusal("tensor " + std::to_string(index) + " of the call " + what +
                  ", and its pass was prepared otherwise.");
}

class Call {
  public:
    Call(const Pass& pass, const std::optional<Tensor>* const* tensors, const double* numbers)
        : pass_(pass), driver_(*pass.driver), tensors_(tensors), numbers_(numbers) {
        addresses_[0].resize(pass.tensors.size());
        addresses_[1].resize(pass.buffers.size());
        for (size_t i = 0; i < pass.tensors.size(); ++i) addresses_[0][i] = check_tensor(i);
    }

    void allocate() {
        unsigned char* scratch = nullptr;
        if (pass_.scratch_bytes > 0) {
            const int64_t stride = 1;
            scratch_.emplace(empty(1, &pass_.scratch_bytes, &stride, aoti_torch_dtype_uint8()));
            scratch = static_cast<unsigned char*>(scratch_->mutable_data_ptr());
        }
        own_.resize(pass_.buffers.size());
        for (size_t i = 0; i < pass_.buffers.size(); ++i) {
            const Buffer& buffer = pass_.buffers[i];
            if (buffer.own) {
                own_[i].emplace(empty(static_cast<int64_t>(buffer.sizes.size()), buffer.sizes.data(),
                                      buffer.strides.data(), buffer.dtype));
                addresses_[1][i] = reinterpret_cast<uint64_t>(own_[i]->mutable_data_ptr());
            } else {
                addresses_[1][i] = reinterpret_cast<uint64_t>(scratch + buffer.offset);
            }
        }
    }

    void run() {
        if (driver_.current_stream(pass_.ordinal, &main_) != AOTI_TORCH_SUCCESS) {
            throw Refusal("PyTorch does not tell the current stream: the device may be lost.");
        }
        try {
            for (const Step& step : pass_.steps) take(step);
        } catch (...) {
            if (forked_) {  // what was launched beside still runs in memory that is now let go of
                driver_.record_event(side_.joined, side_.stream);
                driver_.wait_event(main_, side_.joined, 0);
            }
            throw;
        }
    }

    std::vector<Tensor> results() const {
        std::vector<Tensor> found;
        found.reserve(pass_.results.size());
        for (const int64_t index : pass_.results) found.push_back(*own_[static_cast<size_t>(index)]);
        return found;
    }

  private:
    uint64_t check_tensor(size_t index) const {
        const TensorSpec& spec = pass_.tensors[index];
        const std::optional<Tensor>& given = *tensors_[index];
        if (given.has_value() != spec.present) refuse_tensor(index, spec.present ? "is missing" : "is given");
        if (!spec.present) return 0;
        const AtenTensorHandle handle = given->get();
        int32_t dtype, device_type, device_index;
        int64_t rank, *sizes, *strides;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device_type));
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device_index));
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype));
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &rank));
        if (device_type != pass_.device_type || device_index != pass_.device_index) {
            refuse_tensor(index, "is on another device");
        }
        if (dtype != spec.dtype) refuse_tensor(index, "is of another dtype");
        if (rank != static_cast<int64_t>(spec.sizes.size())) refuse_tensor(index, "has another number of dimensions");
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
        for (size_t i = 0; i < spec.sizes.size(); ++i) {
            if (sizes[i] != spec.sizes[i]) refuse_tensor(index, "has another shape");
            if (sizes[i] > 1 && strides[i] != spec.strides[i]) refuse_tensor(index, "has other strides");
        }
        const uint64_t address = reinterpret_cast<uint64_t>(given->const_data_ptr());
        if (spec.aligned && address % 16 != 0) refuse_tensor(index, "does not start on a 16-byte boundary");
        return address;
    }

    Tensor empty(int64_t rank, const int64_t* sizes, const int64_t* strides, int32_t dtype) const {
        AtenTensorHandle made;
        if (aoti_torch_empty_strided(rank, sizes, strides, dtype, pass_.device_type, pass_.device_index, &made) !=
            AOTI_TORCH_SUCCESS) {
            throw NoMemory();
        }
        return Tensor(made);
    }

    uint64_t address(const Place& place) const {
        const uint64_t start = addresses_[static_cast<size_t>(place.memory)][static_cast<size_t>(place.index)];
        return start + static_cast<uint64_t>(place.offset);
    }

    void take(const Step& step) {
        switch (step.kind) {
            case Step::Kind::kernel:
                return launch(pass_.kernels[step.index]);
            case Step::Kind::product:
                return multiply(pass_.products[step.index]);
            case Step::Kind::fork:
            case Step::Kind::fork_high:
                side_ = pass_.beside(main_, step.kind == Step::Kind::fork_high);
                driver_.check(driver_.record_event(side_.forked, main_), "the streams cannot part");
                driver_.check(driver_.wait_event(side_.stream, side_.forked, 0), "the streams cannot part");
                forked_ = true;
                return;
            case Step::Kind::join:
                driver_.check(driver_.record_event(side_.joined, side_.stream), "the streams cannot meet");
                driver_.check(driver_.wait_event(main_, side_.joined, 0), "the streams cannot meet");
                forked_ = false;
                return;
        }
    }

    void fill(const Slot& slot, unsigned char* bytes) const {
        if (slot.kind == Argument::pointer) {
            const uint64_t found = address(slot.place);
            std::memcpy(bytes + slot.at, &found, sizeof found);
        } else if (slot.kind == Argument::descriptor) {
            const Descriptor& of = pass_.descriptors[static_cast<size_t>(slot.index)];
            pass_.describe(static_cast<size_t>(slot.index), address(of.place),
                           *reinterpret_cast<TensorMap*>(bytes + slot.at));
        } else {
            write_number(numbers_[slot.index] * slot.factor, slot.type, bytes + slot.at);
        }
    }

    static void write_number(double number, Number type, unsigned char* at) {
        const auto write = [at](auto value) { std::memcpy(at, &value, sizeof value); };
        if (type == Number::f32) return write(static_cast<float>(number));
        if (type == Number::f64) return write(number);
        const double limit = type == Number::i32 ? 2147483648.0 : 9007199254740992.0;
        if (std::trunc(number) != number || number >= limit || number < -limit) {
            throw Refusal("a number of the call is no integer that its kernel can take.");
        }
        type == Number::i32 ? write(static_cast<int32_t>(number)) : write(static_cast<int64_t>(number));
    }

    void launch(const Kernel& kernel) const {
        alignas(128) unsigned char bytes[MAX_PARAMETER_BYTES];
        void* parameters[MAX_PARAMETERS];
        std::copy(kernel.bytes.begin(), kernel.bytes.end(), bytes);
        for (size_t i = 0; i < kernel.parameters.size(); ++i) parameters[i] = bytes + kernel.parameters[i];
        for (const Slot& slot : kernel.slots) fill(slot, bytes);
        Attribute attributes[4];
        LaunchConfig config{kernel.grid[0] * kernel.cluster,
                            kernel.grid[1],
                            kernel.grid[2],
                            kernel.threads,
                            1,
                            1,
                            kernel.shared_bytes,
                            kernel.beside ? side_.stream : main_,
                            attributes,
                            0};
        const auto attribute = [&](int id) -> Attribute::Value& {
            Attribute& added = attributes[config.attribute_count++];
            std::memset(&added, 0, sizeof added);
            added.id = id;
            return added.value;
        };
        if (kernel.dependent) attribute(ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION).flag = 1;
        if (kernel.cooperative) attribute(ATTRIBUTE_COOPERATIVE).flag = 1;
        if (kernel.cluster > 1) {
            attribute(ATTRIBUTE_CLUSTER_DIMENSION).cluster = {kernel.cluster, 1, 1};
            attribute(ATTRIBUTE_CLUSTER_SCHEDULING).flag = CLUSTER_SCHEDULING_SPREAD;
        }
        driver_.check(driver_.launch(&config, kernel.function, parameters, nullptr), "a kernel could not be launched");
    }

    const Tensor& tensor(const Place& place) const {
        const size_t index = static_cast<size_t>(place.index);
        return place.memory == Memory::tensor ? **tensors_[index] : *own_[index];
    }

    Tensor operand(const Operand& of) const {
        const Tensor& whole = tensor(of.place);
        if (!of.viewed) return whole;
        AtenTensorHandle view;  // an offset would be added to the tensor's own
        TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(whole.get(), 2, of.sizes, of.strides, 0, &view));
        return Tensor(view);
    }

    void multiply(const Product& product) const {
        const size_t kind = pass_.device_type == aoti_torch_device_type_cuda() ? 1 : 0;
        const Tensor left = operand(product.left), right = operand(product.right);
        const AtenTensorHandle out = own_[static_cast<size_t>(product.out)]->get();
        const AOTITorchError failed = product.add
                                          ? driver_.multiply_add[kind](out, out, left.get(), right.get(), 1.0, 1.0)
                                          : driver_.multiply[kind](out, left.get(), right.get());
        if (failed != AOTI_TORCH_SUCCESS) throw NoMemory();
    }

    const Pass& pass_;
    const Driver& driver_;
    const std::optional<Tensor>* const* tensors_;
    const double* numbers_;
    std::vector<uint64_t> addresses_[2];  // by Memory
    std::optional<Tensor> scratch_;
    std::vector<std::optional<Tensor>> own_;
    Stream main_ = nullptr;
    SideStream side_{};
    bool forked_ = false;
};

}  // namespace

std::vector<Tensor> run(const Pass& pass, const std::optional<Tensor>* const* tensors, size_t tensor_count,
                        const double* numbers, size_t number_count) {
    if (tensor_count != pass.tensors.size() || number_count != static_cast<size_t>(pass.number_count)) {
        throw Refusal("the pass is for " + std::to_string(pass.tensors.size()) + " tensors and " +
                      std::to_string(pass.number_count) + " numbers; got " + std::to_string(tensor_count) + " and " +
                      std::to_string(number_count) + ".");
    }
    const OnDevice guard(pass);
    Call call(pass, tensors, numbers);
    try {
        call.allocate();
        call.run();
    } catch (const NoMemory&) {
        return {};
    }
    return call.results();
}

bool is_captured(const Pass& pass) {
    const OnDevice guard(pass);
    Stream stream = nullptr;
    int status = 0;
    return pass.driver->current_stream(pass.ordinal, &stream) != AOTI_TORCH_SUCCESS ||
           pass.driver->is_capturing(stream, &status) != SUCCESS || status != 0;
}

}  // namespace launch
}  // namespace lora_kernels
