#include "known.h"

#include <algorithm>
#include <cstring>

#include "../matrix_of_rows.h"

namespace lora_kernels {
namespace launch {

Key::Key(double p, int64_t kind) {
    int64_t bits;
    std::memcpy(&bits, &p, sizeof bits);
    put(bits), put(kind);
}

bool Key::add(const std::optional<Tensor>* const* tensors, size_t count) {
    while (count > 0 && !tensors[count - 1]->has_value()) --count;
    if (count == 0 || count > MAX_TENSORS) return false;
    return std::all_of(tensors, tensors + count, [this](const auto* tensor) { return add(*tensor); });
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
    if (rows > 1 && (step = MatrixOfRows::row_step(dims, sizes, strides)) < 0) return false;
    if (reinterpret_cast<uintptr_t>(tensor->const_data_ptr()) % 16 != 0) return false;
    put(int64_t{dtype} | int64_t{device_type} << 16 | int64_t{device_index & 0xFFFF} << 32 | int64_t{dims > 1} << 62);
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

std::vector<Tensor> KnownPasses::run(const double* numbers, size_t number_count, double p, int64_t kind,
                                     const std::optional<Tensor>* const* tensors, size_t count) const {
    Key key(p, kind);
    if (!key.add(tensors, count)) return {};
    std::shared_ptr<const Entry> entry;
    {
        const std::shared_lock<std::shared_mutex> lock(mutex_);
        const auto found = entries_.find(key);
        if (found == entries_.end()) return {};
        entry = found->second;
    }
    const std::shared_ptr<const Pass> pass = entry->pass.lock();
    if (pass == nullptr || pass->tensors.size() > count || (entry->eager_only && is_captured(*pass))) return {};
    std::optional<Tensor> matrices[Key::MAX_TENSORS];
    const std::optional<Tensor>* given[Key::MAX_TENSORS];
    for (size_t i = 0; i < pass->tensors.size(); ++i) {
        given[i] = tensors[i];
        if (tensors[i]->has_value() && (*tensors[i])->dim() > 2) {
            matrices[i] = MatrixOfRows(**tensors[i]).matrix, given[i] = &matrices[i];
        }
    }
    std::vector<Tensor> own = launch::run(*pass, given, pass->tensors.size(), numbers, number_count);
    if (own.empty()) return {};
    const MatrixOfRows rows(**tensors[0]);
    std::vector<Tensor> results;
    results.reserve(entry->absent.size());
    auto next = own.begin();
    for (const std::optional<Tensor>& absent : entry->absent) {
        if (absent.has_value()) {
            results.push_back(*absent);
        } else {
            results.push_back(results.size() < entry->of_rows ? rows.restored(*next) : *next);
            ++next;
        }
    }
    return results;
}

}  // namespace launch
}  // namespace lora_kernels
