// The few types of the CUDA driver's interface that a launch needs, as cuda.h of CUDA 12 and later lays them out. They
// are declared here so that neither CUDA's headers nor its libraries are needed to build; a test compares them with
// the cuda.h that Triton's wheel brings.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lora_kernels {
namespace launch {

using Result = int;
using Context = void*;
using Function = void*;
using Stream = void*;
using Event = void*;

constexpr Result SUCCESS = 0;

struct alignas(128) TensorMap {
    uint64_t words[16];
};

struct Attribute {
    int id;
    char padding[4];
    union Value {
        char bytes[64];
        int flag;
        struct {
            unsigned int x, y, z;
        } cluster;
    } value;
};

struct LaunchConfig {
    unsigned int grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
    Stream stream;
    Attribute* attributes;
    unsigned int attribute_count;
};

constexpr int ATTRIBUTE_COOPERATIVE = 2, ATTRIBUTE_CLUSTER_DIMENSION = 4, ATTRIBUTE_CLUSTER_SCHEDULING = 5,
              ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 6;
constexpr int CLUSTER_SCHEDULING_SPREAD = 1;
constexpr int FUNCTION_NON_PORTABLE_CLUSTER = 14;
constexpr unsigned int EVENT_DISABLE_TIMING = 2;
constexpr int INTERLEAVE_NONE = 0, L2_PROMOTION_128B = 2;
constexpr int MAX_TENSOR_RANK = 5;

}  // namespace launch
}  // namespace lora_kernels
