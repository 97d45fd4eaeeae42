// Stands in for the CUDA driver and for what PyTorch's CUDA build adds to its C shim: writes down every call, and fails
// where it is told to. Memory is the host's; nothing runs. WITHOUT_... leaves an entry point out.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "../../csrc/launch/cuda_api.h"

using namespace lora_kernels::launch;

namespace {

struct Fault {
    int calls, code;
};

struct Recorded {
    std::mutex mutex;
    std::string lines;
    bool quiet = false;
    std::map<std::string, Fault> faults;
    std::map<Function, std::vector<int>> parameters;
    std::map<int, Stream> streams;
    uintptr_t events = 0x9000, pool = 0x700, functions = 0xF000;
    int version = 13020;
    Stream captured = nullptr;
};

Recorded& all() {
    static Recorded* const recorded = new Recorded;
    return *recorded;
}

thread_local std::vector<int> contexts;  // the current context's device on top

std::string hex(const void* bytes, size_t count) {
    std::string text;
    char two[3];
    for (size_t i = 0; i < count; ++i) {
        std::snprintf(two, sizeof two, "%02x", static_cast<const unsigned char*>(bytes)[i]);
        text += two;
    }
    return text;
}

template <class... Values>
std::string words(const Values&... values) {
    std::string text;
    const auto add = [&](uint64_t value) { text += " " + std::to_string(value); };
    (add(static_cast<uint64_t>(values)), ...);
    return text;
}

uint64_t number(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

// Writes the line, and returns what the entry point is to return.
Result note(const char* entry, const std::string& rest) {
    Recorded& to = all();
    const std::lock_guard<std::mutex> lock(to.mutex);
    if (!to.quiet) to.lines += entry + rest + "\n";
    const auto fault = to.faults.find(entry);
    if (fault == to.faults.end() || fault->second.calls-- > 0) return SUCCESS;
    const int code = fault->second.code;
    to.faults.erase(fault);
    return code;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// For the tests.

EXPORT void stand_in_forget() {
    Recorded& to = all();
    const std::lock_guard<std::mutex> lock(to.mutex);
    to.lines.clear(), to.faults.clear(), to.streams.clear(), to.quiet = false, to.version = 13020;
    to.captured = nullptr;
}
EXPORT void stand_in_quiet() { all().quiet = true; }
EXPORT void stand_in_fail(const char* entry, int after, int code) { all().faults[entry] = {after, code}; }
EXPORT void stand_in_stream(int device, void* stream) { all().streams[device] = stream; }
EXPORT void stand_in_capture(void* stream) { all().captured = stream; }
EXPORT void stand_in_version(int version) { all().version = version; }
EXPORT void stand_in_parameters(void* function, const int* sizes, int count) {
    const std::lock_guard<std::mutex> lock(all().mutex);
    all().parameters[function].assign(sizes, sizes + count);
}
EXPORT int64_t stand_in_take(char* into, int64_t size) {
    const std::lock_guard<std::mutex> lock(all().mutex);
    const int64_t length = static_cast<int64_t>(all().lines.size());
    if (length < size) std::memcpy(into, all().lines.c_str(), static_cast<size_t>(length) + 1), all().lines.clear();
    return length;
}

// The driver: launches.

#if !defined(WITHOUT_LAUNCH)
EXPORT Result cuLaunchKernelEx(const LaunchConfig* c, Function function, void** parameters, void**) {
    if (all().quiet) return SUCCESS;
    std::string rest = words(number(function), c->grid_x, c->grid_y, c->grid_z, c->block_x, c->block_y, c->block_z,
                             c->shared_bytes, number(c->stream), contexts.empty() ? 99 : contexts.back());
    for (unsigned int i = 0; i < c->attribute_count; ++i) {
        const Attribute& a = c->attributes[i];
        const bool cluster = a.id == ATTRIBUTE_CLUSTER_DIMENSION;
        rest +=
            " @" + std::to_string(a.id) + "=" + hex(&a.value, cluster ? sizeof a.value.cluster : sizeof a.value.flag);
    }
    std::vector<int> sizes;
    {
        const std::lock_guard<std::mutex> lock(all().mutex);
        sizes = all().parameters[function];
    }
    for (size_t i = 0; i < sizes.size(); ++i) rest += " " + hex(parameters[i], static_cast<size_t>(sizes[i]));
    return note("cuLaunchKernelEx", rest);
}
#endif

#if !defined(WITHOUT_ENCODE)
EXPORT Result cuTensorMapEncodeTiled(TensorMap* map, int type, uint32_t rank, void* address, const uint64_t* sizes,
                                     const uint64_t* strides, const uint32_t* box, const uint32_t* steps,
                                     int interleave, int swizzle, int promotion, int fill) {
    std::string rest = words(type, rank, number(address), interleave, swizzle, promotion, fill);
    std::memset(map, 0, sizeof *map);
    map->words[0] = number(address), map->words[1] = ~uint64_t{0};
    for (uint32_t i = 0; i < rank; ++i) {
        rest += words(sizes[i], i + 1 < rank ? strides[i] : 0, box[i], steps[i]);
        map->words[2 + i] = sizes[i], map->words[7 + i] = box[i];
    }
    map->words[12] = static_cast<uint64_t>(type), map->words[13] = rank > 1 ? strides[0] : 0;
    map->words[14] = static_cast<uint64_t>(swizzle), map->words[15] = static_cast<uint64_t>(fill);
    return note("cuTensorMapEncodeTiled", rest);
}
#endif

// Contexts: each device has its primary one.

EXPORT Result cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return ordinal < 2 ? SUCCESS : 101;
}
EXPORT Result cuDevicePrimaryCtxRetain(Context* context, int device) {
    *context = reinterpret_cast<Context>(uintptr_t{0xC000} + static_cast<uintptr_t>(device));
    return note("cuDevicePrimaryCtxRetain", words(device));
}
EXPORT Result cuCtxGetDevice(int* device) {
    if (contexts.empty()) return 201;
    *device = contexts.back();
    return SUCCESS;
}
EXPORT Result cuCtxGetCurrent(Context* context) {
    *context = contexts.empty() ? nullptr : reinterpret_cast<Context>(uintptr_t{0xC000} + contexts.back());
    return SUCCESS;
}
EXPORT Result cuCtxSetCurrent(Context context) {
    contexts = {static_cast<int>(number(context) - 0xC000)};
    return SUCCESS;
}
EXPORT Result cuCtxPushCurrent_v2(Context context) {
    contexts.push_back(static_cast<int>(number(context) - 0xC000));
    return note("cuCtxPushCurrent", words(contexts.back()));
}
EXPORT Result cuCtxPopCurrent_v2(Context*) {
    contexts.pop_back();
    return note("cuCtxPopCurrent", "");
}

// Streams and events.

EXPORT Result cuEventCreate(Event* event, unsigned int flags) {
    *event = reinterpret_cast<Event>(all().events++);
    return note("cuEventCreate", words(flags));
}
EXPORT Result cuEventRecord(Event event, Stream stream) {
    return note("cuEventRecord", words(number(event), number(stream)));
}
EXPORT Result cuStreamWaitEvent(Stream stream, Event event, unsigned int) {
    return note("cuStreamWaitEvent", words(number(stream), number(event)));
}
EXPORT Result cuStreamIsCapturing(Stream stream, int* status) {
    *status = all().captured == stream && stream != nullptr;
    return note("cuStreamIsCapturing", words(number(stream)));
}
EXPORT int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
    *stream = all().streams[device];
    return 0;
}
EXPORT int32_t torch_get_cuda_stream_from_pool(bool high, int32_t device, void** stream) {
    *stream = reinterpret_cast<Stream>(all().pool++);
    return note("pool", words(device, high));
}

// What Triton's own launcher calls besides.

EXPORT Result cuGetErrorName(Result code, const char** name) {
    *name = code == 400 ? "CUDA_ERROR_INVALID_HANDLE" : code == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : nullptr;
    return *name == nullptr ? 1 : SUCCESS;
}
EXPORT Result cuGetErrorString(Result code, const char** text) {
    *text = code == 400 ? "invalid resource handle" : "an illegal memory access was encountered";
    return SUCCESS;
}
EXPORT Result cuDriverGetVersion(int* version) {
    *version = all().version;
    return SUCCESS;
}
EXPORT Result cuFuncSetAttribute(Function function, int attribute, int value) {
    return note("cuFuncSetAttribute", words(number(function), attribute, value));
}
EXPORT Result cuModuleLoadData(void** module, const void*) {
    *module = reinterpret_cast<void*>(uintptr_t{0xA000});
    return SUCCESS;
}
EXPORT Result cuModuleGetFunction(Function* function, void*, const char*) {
    *function = reinterpret_cast<Function>(all().functions++);
    return SUCCESS;
}
EXPORT Result cuFuncGetAttribute(int* value, int attribute, Function) {
    *value = attribute == 0 ? 1024 : 0;  // CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK
    return SUCCESS;
}
EXPORT Result cuDeviceGetAttribute(int* value, int, int) {
    *value = 232448;
    return SUCCESS;
}
EXPORT Result cuFuncSetCacheConfig(Function, int) { return SUCCESS; }
EXPORT Result cuPointerGetAttribute(void* value, int, uint64_t pointer) {
    std::memcpy(value, &pointer, sizeof pointer);
    return SUCCESS;
}
EXPORT Result cuCtxGetLimit(size_t* value, int) {
    *value = 0;
    return SUCCESS;
}
EXPORT Result cuCtxSetLimit(int, size_t) { return SUCCESS; }
EXPORT Result cuOccupancyMaxActiveClusters(int* clusters, Function, const LaunchConfig*) {
    *clusters = 1;
    return SUCCESS;
}
EXPORT Result cuTensorMapEncodeIm2col() { return 1; }
