#include "known.h"

#include <algorithm>
#include <cstring>

#include "../rows.h"

namespace lora_kernels {
namespace launch {

Key::Key(double p, int64_t kind) {
    int64_t bits;
    std::memcpy(&bits, &p, sizeof bits);
    put(bits), put(kind);
}

bool Key::add(const std::optional<Tensor>& tensor) {
    if (!tensor.has_value()) return put(-1), true;
    const AtenTensorHandle handle = tensor->get();
    int32_t layout, dtype, device_type, device_index;
    int64_t dims, *sizes, *strides;
    if (aoti_torch_get_layout(handle, &layout) != AOTI_TORCH_SUCCESS || layout != aoti_torch_layout_strided() ||
        aoti_torch_get_dtype(handle, &dtype) != AOTI_TORCH_SUCCESS ||
        aoti_torch_get_device_type(handle, &device_type) != AOTI_TORCH_SUCCESS ||
        aoti_torch_get_device_index(handle, &device_index) != AOTI_TORCH_SUCCESS ||
        aoti_torch_get_dim(handle, &dims) != AOTI_TORCH_SUCCESS || dims == 0 ||
        aoti_torch_get_sizes(handle, &sizes) != AOTI_TORCH_SUCCESS ||
        aoti_torch_get_strides(handle, &strides) != AOTI_TORCH_SUCCESS) {
        return false;
    }
    int64_t rows = 1, step = 0;
    for (int64_t i = 0; i < dims - 1; ++i) rows *= sizes[i];
    const int64_t columns = sizes[dims - 1];
    if (rows == 0 || columns == 0) return false;
    if (rows > 1 && (step = Rows::row_step(dims, sizes, strides)) < 0) return false;
    if (reinterpret_cast<uintptr_t>(tensor->const_data_ptr()) % 16 != 0) return false;
    put(int64_t{dtype} | int64_t{device_type} << 16 | int64_t{device_index} << 32 | int64_t{dims > 1} << 62);
    put(rows), put(step), put(columns), put(columns > 1 ? strides[dims - 1] : 0);
    return true;
}

bool Key::operator==(const Key& other) const {
    return count_ == other.count_ && std::equal(words_.begin(), words_.begin() + count_, other.words_.begin());
}

size_t Key::hash() const {
    uint64_t found = 0;
    for (size_t i = 0; i < count_; ++i) {
        found = (found ^ static_cast<uint64_t>(words_[i])) * 0x9E3779B97F4A7C15u;
        found ^= found >> 32;
    }
    return static_cast<size_t>(found);
}

void KnownPasses::enter(const Key& key, Entry entry) {
    const auto kept = std::make_shared<const Entry>(std::move(entry));
    const std::unique_lock<std::shared_mutex> lock(mutex_);
    for (auto it = entries_.begin(); it != entries_.end();) it = it->second->pass.expired() ? entries_.erase(it) : ++it;
    entries_[key] = kept;
}

std::vector<Tensor> KnownPasses::run(double number, double p, int64_t kind,
                                     const std::optional<Tensor>* const* tensors) const {
    Key key(p, kind);
    for (size_t i = 0; i < Key::MAX_TENSORS; ++i) {
        if (!key.add(*tensors[i])) return {};
    }
    std::shared_ptr<const Entry> entry;
    {
        const std::shared_lock<std::shared_mutex> lock(mutex_);
        const auto found = entries_.find(key);
        if (found == entries_.end()) return {};
        entry = found->second;
    }
    const std::shared_ptr<const Pass> pass = entry->pass.lock();
    if (pass == nullptr || (entry->eager_only && is_captured(*pass))) return {};
    std::optional<Tensor> matrices[Key::MAX_TENSORS];
    const std::optional<Tensor>* given[Key::MAX_TENSORS];
    for (size_t i = 0; i < Key::MAX_TENSORS; ++i) {
        given[i] = tensors[i];
        if (tensors[i]->has_value() && (*tensors[i])->dim() > 2) {
            matrices[i] = Rows(**tensors[i]).matrix, given[i] = &matrices[i];
        }
    }
    std::vector<Tensor> own =
        launch::run(*pass, given, pass->tensors.size(), &number, static_cast<size_t>(pass->number_count));
    if (own.empty()) return {};
    std::vector<Tensor> results;
    results.reserve(entry->absent.size());
    auto next = own.begin();
    for (const std::optional<Tensor>& absent : entry->absent) results.push_back(absent.has_value() ? *absent : *next++);
    if (!entry->absent[0].has_value()) results[0] = Rows(**tensors[0]).restored(results[0]);
    return results;
}

}  // namespace launch
}  // namespace lora_kernels
