// The warm calls of an operator: passes found by what their tensors are, so that nothing of them is asked in Python.
#pragma once

#include <array>
#include <shared_mutex>

#include "run.h"

namespace lora_kernels {
namespace launch {

// All that a pass depends on, in words: the call's own two numbers, and each tensor's device, dtype, sizes and strides.
class Key {
  public:
    static constexpr size_t MAX_TENSORS = 40;

    // `kind` tells apart what the tensors do not tell.
    Key(double p, int64_t kind);
    // The tensors, each (..., F) as the matrix of its rows; absent ones at the end do not count. False where no pass
    // can be known by them: one is empty, no plain tensor, does not begin on a 16-byte boundary, or its rows are not at
    // one distance; or there are too many.
    bool add(const std::optional<Tensor>* const* tensors, size_t count);
    bool operator==(const Key& other) const;
    size_t hash() const;

  private:
    bool add(const std::optional<Tensor>& tensor);
    void put(int64_t word) { words_[count_++] = word; }

    std::array<int64_t, 2 + 5 * MAX_TENSORS> words_;
    size_t count_ = 0;
};

class KnownPasses {
  public:
    struct Entry {
        std::weak_ptr<const Pass> pass;             // it lives as long as Python keeps it
        bool eager_only;                            // a captured graph takes another
        std::vector<std::optional<Tensor>> absent;  // what stands for each result, or nothing where the pass has it
        size_t of_rows;                             // results that are in the first tensor's leading dimensions
    };

    void enter(const Key& key, Entry entry);
    // The results of the pass that is known by the tensors. None where none is known, or as in `run`.
    std::vector<Tensor> run(const double* numbers, size_t number_count, double p, int64_t kind,
                            const std::optional<Tensor>* const* tensors, size_t count) const;

  private:
    struct Hash {
        size_t operator()(const Key& key) const { return key.hash(); }
    };

    mutable std::shared_mutex mutex_;
    std::unordered_map<Key, std::shared_ptr<const Entry>, Hash> entries_;
};

}  // namespace launch
}  // namespace lora_kernels
