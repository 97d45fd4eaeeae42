// Loaded before a program (LD_PRELOAD): of the allocations that the thread at hand makes by PyTorch's CPU allocator
// (libc10) and by `new` in the native library, the one that was asked for fails, as it does where there is no memory.
// oneDNN's own, in libtorch_cpu, are left alone: where one of them fails it writes to address 0.
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>

#include <cstring>
#include <new>

namespace {

thread_local long left = -1;  // allocations until the one that fails; -1: none does

bool fails(void* caller, const char* library) {
    Dl_info info;
    return left >= 0 && dladdr(caller, &info) != 0 && std::strstr(info.dli_fname, library) != nullptr && left-- == 0;
}

}  // namespace

extern "C" void lora_fail_after(long allocations) { left = allocations; }
extern "C" long lora_allocations_left() { return left; }

extern "C" int posix_memalign(void** out, size_t alignment, size_t size) {
    using Allocate = int (*)(void**, size_t, size_t);
    static const Allocate next = reinterpret_cast<Allocate>(dlsym(RTLD_NEXT, "posix_memalign"));
    return fails(__builtin_return_address(0), "libc10.") ? ENOMEM : next(out, alignment, size);
}

void* operator new(size_t size) {
    if (fails(__builtin_return_address(0), "lora_kernels_cpu")) throw std::bad_alloc();
    void* memory = malloc(size == 0 ? 1 : size);
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
}
