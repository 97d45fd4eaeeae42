#include "driver.h"

#include <dlfcn.h>

namespace lora_kernels {
namespace launch {

namespace {

constexpr int LAST_WITH_SHORT_TENSOR_FAULT = 13010;

void* open(const std::string& path, int flags, const char* what) {
    void* found = dlopen(path.c_str(), flags);
    if (found == nullptr) {
        const char* reason = dlerror();
        throw Refusal(std::string(what) + " cannot be opened (" + (reason ? reason : path) + ").");
    }
    return found;
}

template <class Entry>
bool find(void* library, const char* name, Entry& entry) {
    entry = reinterpret_cast<Entry>(dlsym(library, name));
    return entry != nullptr;
}

template <class Entry>
void need(void* library, const std::string& path, const char* name, Entry& entry) {
    if (!find(library, name, entry)) {
        throw Refusal(path + " has no entry point " + name +
                      ": the launcher needs a driver for CUDA 12 or later, and PyTorch 2.11 or later.");
    }
}

}  // namespace

std::shared_ptr<const Driver> open_driver(const std::string& driver, const std::string& torch_cuda) {
    const auto found = std::make_shared<Driver>();
    void* const cuda = open(driver, RTLD_NOW, "the CUDA driver");
    // PyTorch has loaded it already, privately: a search among all symbols would not find it.
    void* const torch = open(torch_cuda, RTLD_NOW | RTLD_NOLOAD, "PyTorch's CUDA library");
    need(cuda, driver, "cuLaunchKernelEx", found->launch);
    need(cuda, driver, "cuFuncSetAttribute", found->set_function_attribute);
    need(cuda, driver, "cuDeviceGet", found->device);
    need(cuda, driver, "cuDevicePrimaryCtxRetain", found->retain_context);
    need(cuda, driver, "cuCtxGetDevice", found->current_device);
    need(cuda, driver, "cuCtxPushCurrent_v2", found->push_context);
    need(cuda, driver, "cuCtxPopCurrent_v2", found->pop_context);
    need(cuda, driver, "cuEventCreate", found->create_event);
    need(cuda, driver, "cuEventRecord", found->record_event);
    need(cuda, driver, "cuStreamWaitEvent", found->wait_event);
    need(cuda, driver, "cuStreamIsCapturing", found->is_capturing);
    need(cuda, driver, "cuGetErrorName", found->error_name);
    need(cuda, driver, "cuGetErrorString", found->error_string);
    need(cuda, driver, "cuDriverGetVersion", found->version);
    find(cuda, "cuTensorMapEncodeTiled", found->encode);
    need(torch, torch_cuda, "aoti_torch_get_current_cuda_stream", found->current_stream);
    need(torch, torch_cuda, "torch_get_cuda_stream_from_pool", found->pooled_stream);
    find(RTLD_DEFAULT, "aoti_torch_cpu_mm_out", found->multiply[0]);
    find(RTLD_DEFAULT, "aoti_torch_cpu_addmm_out", found->multiply_add[0]);
    find(torch, "aoti_torch_cuda_mm_out", found->multiply[1]);
    find(torch, "aoti_torch_cuda_addmm_out", found->multiply_add[1]);
    int version = 0;
    found->check(found->version(&version), "the driver does not tell its version");
    found->short_tensor_fault = version <= LAST_WITH_SHORT_TENSOR_FAULT;
    return found;
}

void Driver::refuse(Result result, const std::string& what) const {
    const char *name = nullptr, *meaning = nullptr;
    if (error_name(result, &name) != SUCCESS || name == nullptr) name = "an unknown error";
    if (error_string(result, &meaning) != SUCCESS || meaning == nullptr) meaning = "the driver has no words for it";
    throw Refusal(what + ": " + name + " (" + std::to_string(result) + "), " + meaning + ".");
}

}  // namespace launch
}  // namespace lora_kernels
