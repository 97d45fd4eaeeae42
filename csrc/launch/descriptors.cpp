// TMA descriptors and side streams: what outlives a call, each kept under a lock.
#include <map>
#include <tuple>

#include "pass.h"

namespace lora_kernels {
namespace launch {

namespace {

constexpr size_t MAX_ADDRESSES = 1024;  // of one descriptor; a pass that meets more makes some anew
constexpr uint64_t SHORT_TENSOR_BYTES = 131072;
constexpr uint64_t SHORT_TENSOR_BIT = 1ull << 21;

TensorMap encode(const Driver& driver, const Descriptor& of, uint64_t address) {
    const size_t rank = of.sizes.size();
    uint64_t sizes[MAX_TENSOR_RANK], strides[MAX_TENSOR_RANK];
    uint32_t box[MAX_TENSOR_RANK], steps[MAX_TENSOR_RANK];
    uint64_t last_byte = 0;
    for (size_t i = 0; i < rank; ++i) {  // the driver counts dimensions from the innermost
        const size_t from = rank - 1 - i;
        sizes[i] = static_cast<uint64_t>(of.sizes[from]), box[i] = static_cast<uint32_t>(of.box[from]), steps[i] = 1;
        const uint64_t apart = static_cast<uint64_t>(of.strides[from]) * static_cast<uint64_t>(of.element_bytes);
        if (i > 0) strides[i - 1] = apart;
        last_byte += (sizes[i] - 1) * (i == 0 ? static_cast<uint64_t>(of.element_bytes) : apart);
    }
    TensorMap map{};
    driver.check(driver.encode(&map, of.element_type, static_cast<uint32_t>(rank), reinterpret_cast<void*>(address),
                               sizes, strides, box, steps, INTERLEAVE_NONE, of.swizzle, L2_PROMOTION_128B, of.fill),
                 "a TMA descriptor cannot be made");
    // Drivers up to 13.1 set a bit of short tensors' descriptors that makes their reads wrong; Triton clears it too.
    if (driver.short_tensor_fault && last_byte + 1 < SHORT_TENSOR_BYTES) map.words[1] &= ~SHORT_TENSOR_BIT;
    return map;
}

struct SideStreams {
    std::mutex mutex;
    std::map<std::tuple<std::shared_ptr<const Driver>, int, Stream, bool>, SideStream> found;
};

// Never destroyed: a thread may launch while the process ends.
SideStreams& side_streams() {
    static SideStreams* const all = new SideStreams;
    return *all;
}

}  // namespace

void Pass::describe(size_t index, uint64_t address, TensorMap& out) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto& known = maps_[index];
    const auto found = known.find(address);
    if (found != known.end()) {
        out = found->second;
        return;
    }
    out = encode(*driver, descriptors[index], address);
    if (known.size() >= MAX_ADDRESSES) known.clear();
    known.emplace(address, out);
}

SideStream Pass::beside(Stream main, bool high) const {
    SideStreams& all = side_streams();
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto key = std::make_tuple(driver, device, main, high);
    const auto found = all.found.find(key);
    if (found != all.found.end()) return found->second;
    SideStream made{};
    do {  // PyTorch's pool goes round: the stream at hand may be one of it
        if (driver->pooled_stream(high, ordinal, &made.stream) != AOTI_TORCH_SUCCESS) {
            throw Refusal("PyTorch gives no stream beside the current one: the device may be lost.");
        }
    } while (made.stream == main);
    driver->check(driver->create_event(&made.forked, EVENT_DISABLE_TIMING), "an event cannot be made");
    driver->check(driver->create_event(&made.joined, EVENT_DISABLE_TIMING), "an event cannot be made");
    all.found.emplace(key, made);
    return made;
}

}  // namespace launch
}  // namespace lora_kernels
