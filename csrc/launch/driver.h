// The CUDA driver's entry points and the few of libtorch_cuda's, found at run time: nothing is linked, so the library
// loads where there is no GPU, and under a PyTorch for CPUs.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "cuda_api.h"

namespace lora_kernels {
namespace launch {

// A sentence for the caller.
struct Refusal : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Driver {
    using Encode = Result (*)(TensorMap*, int type, uint32_t rank, void* address, const uint64_t* sizes,
                              const uint64_t* byte_strides, const uint32_t* box, const uint32_t* steps, int interleave,
                              int swizzle, int promotion, int fill);
    using Multiply = AOTITorchError (*)(AtenTensorHandle out, AtenTensorHandle left, AtenTensorHandle right);
    using MultiplyAdd = AOTITorchError (*)(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle left,
                                           AtenTensorHandle right, double beta, double alpha);

    Result (*launch)(const LaunchConfig*, Function, void** parameters, void** extra);
    Result (*set_function_attribute)(Function, int attribute, int value);
    Result (*device)(int* device, int ordinal);
    Result (*retain_context)(Context*, int device);
    Result (*current_device)(int* device);
    Result (*push_context)(Context);
    Result (*pop_context)(Context*);
    Result (*create_event)(Event*, unsigned int flags);
    Result (*record_event)(Event, Stream);
    Result (*wait_event)(Stream, Event, unsigned int flags);
    Result (*is_capturing)(Stream, int* status);
    Result (*error_name)(Result, const char**);
    Result (*error_string)(Result, const char**);
    Result (*version)(int*);
    Encode encode;  // null in a driver from before TMA: only a pass with descriptors needs it

    AOTITorchError (*current_stream)(int32_t index, void** stream);
    AOTITorchError (*pooled_stream)(bool high_priority, int32_t index, void** stream);
    Multiply multiply[2];  // out = left right; on the CPU and on CUDA, null where this PyTorch has no such device
    MultiplyAdd multiply_add[2];

    bool short_tensor_fault = false;  // see descriptors.cpp

    // Throws a Refusal unless `result` is a success; `what` begins the sentence.
    void check(Result result, const std::string& what) const {
        if (result != SUCCESS) refuse(result, what);
    }
    [[noreturn]] void refuse(Result result, const std::string& what) const;
};

// The entry points of the libraries at these paths; they stay open. Throws a Refusal that names what is missing.
std::shared_ptr<const Driver> open_driver(const std::string& driver, const std::string& torch_cuda);

}  // namespace launch
}  // namespace lora_kernels
