// Whether this process may use AMX tiles: the CPU must have them, the operating system must have granted this process
// their registers' state, and for the kernels of this library its compiler must have known them.
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lora_kernels {

namespace {

#if defined(__x86_64__)
constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;  // EDX of leaf 7
constexpr unsigned OSXSAVE = 1u << 27;                        // ECX of leaf 1
constexpr unsigned TILE_STATE = 3u << 17;                     // XCR0: the configuration and the data

bool cpu_has_tiles() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & AMX_BF16) && (d & AMX_TILE);
}

bool system_saves_tiles() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & OSXSAVE)) return false;
    unsigned low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & TILE_STATE) == TILE_STATE;
}

// The permission is the process's: threads that exist have it as well, and those to come inherit it.
bool system_permits_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}
#endif

const char* find_obstacle() {
#if defined(__x86_64__)
    if (!cpu_has_tiles()) return "this CPU has no AMX for bf16";
    if (!system_saves_tiles()) return "the operating system does not save AMX's registers";
    if (!system_permits_tiles()) return "the operating system refuses this process the use of AMX";
    return nullptr;
#else
    return "this CPU has no AMX for bf16";
#endif
}

}  // namespace

const char* tiles_obstacle() {
    static const char* const obstacle = find_obstacle();
    return obstacle;
}

const char* amx_obstacle() {
#if defined(LORA_HAVE_AMX)
    return tiles_obstacle();
#else
    return "the compiler that built the library knows no AMX";
#endif
}

}  // namespace lora_kernels
