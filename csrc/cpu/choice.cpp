// The choice between the kernels' product and the library's: LORA_KERNELS_CPU_PRODUCT decides (own or library, of any
// size), else what `lora-kernels tune --device cpu` measured on this machine, else a model of what the machine has.
#include "choice.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#if defined(LORA_HAVE_AVX2)
#include <cpuid.h>
#endif

namespace lora_kernels {
namespace {

enum Choice : int8_t { automatic, own, library };

Choice read_choice() {
    const char* named = std::getenv("LORA_KERNELS_CPU_PRODUCT");
    if (named != nullptr && std::strcmp(named, "own") == 0) return own;
    if (named != nullptr && std::strcmp(named, "library") == 0) return library;
    return automatic;
}

std::atomic<int> forced{read_choice()};

// What the model knows of a machine.
struct Processor {
    bool own_tiles;               // the kernels multiply 16-bit matrices by tiles (AMX)
    bool own_pairs;               // bf16 in pairs (AVX512-BF16)
    bool own_wide;                // they have AVX-512 for fp32
    bool intel;                   // MKL's fp32 and fp64 products are tuned for this maker's machines
    bool pairs_bf16, pairs_fp16;  // the library has vector instructions made for the dtype,
    bool tiles_bf16, tiles_fp16;  // or tiles
};

bool has(const char* words, const char* word) {
    const size_t length = std::strlen(word);
    for (const char* at = std::strstr(words, word); at != nullptr; at = std::strstr(at + 1, word)) {
        if ((at == words || at[-1] == ' ') && (at[length] == ' ' || at[length] == '\0')) return true;
    }
    return false;
}

Processor read(const char* words) {
    const bool own_tiles = has(words, "own=amx");
    return {own_tiles,
            has(words, "own=avx512_bf16"),
            own_tiles || has(words, "own=avx512") || has(words, "own=avx512_bf16"),
            has(words, "intel"),
            has(words, "avx512_bf16"),
            has(words, "avx512_fp16"),
            has(words, "amx_bf16"),
            has(words, "amx_fp16")};
}

#if defined(LORA_HAVE_AVX2)
bool amx_fp16() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 21 & 1) != 0;
}
#endif

std::string describe() {
    std::string words = std::string("own=") + capability_name();
#if defined(LORA_HAVE_AVX2)
    __builtin_cpu_init();
    if (__builtin_cpu_is("intel")) words += " intel";
    if (__builtin_cpu_supports("avx512f")) words += " avx512";
    if (__builtin_cpu_supports("avx512bf16")) words += " avx512_bf16";
    if (__builtin_cpu_supports("avx512fp16")) words += " avx512_fp16";
    if (tiles_obstacle() == nullptr) {
        words += " amx_bf16";
        if (amx_fp16()) words += " amx_fp16";
    }
#endif
    return words;
}

enum class Rate { slow, vectors, tiles };

// How the library multiplies. Without instructions for 16-bit products it runs at a fraction of its fp32 rate.
Rate library_rate(const Processor& p, Dtype dtype) {
    if (dtype == Dtype::bf16) return p.tiles_bf16 ? Rate::tiles : p.pairs_bf16 ? Rate::vectors : Rate::slow;
    if (dtype == Dtype::fp16) return p.tiles_fp16 ? Rate::tiles : p.pairs_fp16 ? Rate::vectors : Rate::slow;
    return Rate::vectors;
}

// Fitted on three machines at r = 16; times are the layer's over the frozen layer's, own against library.
// - AMD with AVX2 (bench/results/amd-epyc): 16-bit library products take 3 to 60 times as long as own ones; own fp32 is
//   the quicker one up to 128 tokens.
// - AMD with AVX512-BF16, own in pairs: bf16 of 2048x2048 at 16 tokens 0.84 against 1.06 forward, 0.69 against 1.09
//   backward; of 4096x4096 0.93 and 0.49; 1024x1024 0.99 and 0.83, at 24 tokens 1.11. fp32 at 512 to 2048 tokens
//   0.86 to 0.99 against 1.00 to 1.09.
// - The same without pairs: at 8 tokens 1.05 against 1.20 forward, 1.02 against 1.19 backward; at 16 tokens 1.25
//   against 1.17, 1.68 against 1.27.
// - Intel with AMX, own in vectors throughout: bf16 0.43 at one token, 2.65 at 16, where the library's time hardly
//   depends on so few tokens: about 5 are the border. fp32 1.10 and 1.20; around the library's product some 0.05
//   remain.
// Own products in tiles were not measured against the library's: of up to 16 tokens they read W once, as the library's
// do after they have copied it into tiles; beyond, the library's runs until somebody measures.
bool own_by_model(const Processor& p, Dtype dtype, int64_t m, int64_t n, int64_t k) {
    const int64_t work = m * n * k;
    switch (dtype) {
        case Dtype::bf16:
        case Dtype::fp16: {
            const Rate rate = library_rate(p, dtype);
            if (rate == Rate::slow) return true;
            if (rate == Rate::tiles && p.own_tiles && dtype == Dtype::bf16) return m <= 16 || work <= (1 << 21);
            if (rate == Rate::vectors && p.own_pairs && dtype == Dtype::bf16) return m <= 16 || work <= (1 << 21);
            return m <= (rate == Rate::tiles ? 4 : 8) || work <= (1 << (rate == Rate::tiles ? 20 : 21));
        }
        case Dtype::fp32:
            return (p.own_wide && !p.intel) || m <= (p.intel ? 4 : 128) || work <= (1 << 22);
        case Dtype::fp64:
            return m <= (p.intel ? 4 : 16) || work <= (1 << 22);
    }
    return false;
}

// What was measured: tokens in buckets by the power of 2 above, n and k in classes by the nearest one.
constexpr int DTYPES = 4, PASSES = 2, TOKENS = 15, SMALLEST = 5, SIZES = 11;  // 1 .. 16384 tokens; 32 .. 32768
constexpr int FEW = 4, FULL = 9;                                              // 16 tokens, 512 tokens
Choice measured[DTYPES][PASSES][TOKENS][SIZES][SIZES];

int log2_floor(int64_t value) { return 63 - __builtin_clzll(static_cast<unsigned long long>(value)); }

int token_class(int64_t m) {
    const int log = m <= 1 ? 0 : log2_floor(m - 1) + 1;
    return log < TOKENS ? log : TOKENS - 1;
}

int size_class(int64_t size) {
    if (size < (int64_t(1) << SMALLEST)) return 0;
    if (size >= (int64_t(1) << (SMALLEST + SIZES - 1))) return SIZES - 1;
    const int log = log2_floor(size);
    return log + (size * size > (int64_t(2) << (2 * log))) - SMALLEST;
}

// How far a row says something of other sizes: of n and k one class away; of tokens four times as many or few on the
// same side of 16, where the kernels take other ways; of any more tokens if it is of 512 or more.
constexpr int REACH = 2;

struct Row {
    int64_t dtype, pass, m, n, k, choice;
};

// Steps between a row's cell and another, or -1 where the row says nothing of it.
int steps(int row_m, int row_n, int row_k, int m, int n, int k) {
    const int apart_n = std::abs(row_n - n), apart_k = std::abs(row_k - k), apart_m = std::abs(row_m - m);
    if (apart_n > 1 || apart_k > 1 || (row_m <= FEW) != (m <= FEW)) return -1;
    if (apart_m > REACH && !(m > row_m && row_m >= FULL)) return -1;
    return apart_m + apart_n + apart_k;
}

// Every cell takes the choice of the nearest row that reaches it; of equally near ones, of the first.
void install(const Row* rows, int64_t count) {
    static int8_t nearest[DTYPES][PASSES][TOKENS][SIZES][SIZES];
    std::memset(measured, 0, sizeof measured);
    std::memset(nearest, 127, sizeof nearest);
    for (const Row* row = rows; row != rows + count; ++row) {
        const int row_m = token_class(row->m), row_n = size_class(row->n), row_k = size_class(row->k);
        for (int m = 0; m < TOKENS; ++m) {
            for (int n = 0; n < SIZES; ++n) {
                for (int k = 0; k < SIZES; ++k) {
                    const int away = steps(row_m, row_n, row_k, m, n, k);
                    int8_t& best = nearest[row->dtype][row->pass][m][n][k];
                    if (away < 0 || away >= best) continue;
                    best = static_cast<int8_t>(away);
                    measured[row->dtype][row->pass][m][n][k] = static_cast<Choice>(row->choice);
                }
            }
        }
    }
}

}  // namespace

bool library_is_slow(Dtype dtype) {
    static const Processor here = read(processor());
    return library_rate(here, dtype) == Rate::slow;
}

bool library_reads_past_rows(Dtype dtype) {
    static const Processor here = read(processor());
    return here.tiles_bf16 && (dtype == Dtype::bf16 || dtype == Dtype::fp16);
}

const char* processor() {
    static const std::string words = describe();
    return words.c_str();
}

bool own_product(Dtype dtype, Pass pass, int64_t m, int64_t n, int64_t k) {
    static const Processor here = read(processor());
    const int named = forced.load(std::memory_order_relaxed);
    if (named != automatic) return named == own;
    const Choice found =
        measured[static_cast<int>(dtype)][static_cast<int>(pass)][token_class(m)][size_class(n)][size_class(k)];
    return found == automatic ? own_by_model(here, dtype, m, n, k) : found == own;
}

}  // namespace lora_kernels

// For the package's Python, which calls them through ctypes: a dtype is its place in Dtype, a pass its place in Pass.
#define LORA_EXPORT extern "C" __attribute__((visibility("default")))

LORA_EXPORT const char* lora_kernels_cpu_processor() { return lora_kernels::processor(); }

LORA_EXPORT int lora_kernels_cpu_own_product(int dtype, int pass, int64_t m, int64_t n, int64_t k) {
    return lora_kernels::own_product(static_cast<lora_kernels::Dtype>(dtype), static_cast<lora_kernels::Pass>(pass), m,
                                     n, k);
}

LORA_EXPORT int lora_kernels_cpu_model(const char* words, int dtype, int64_t m, int64_t n, int64_t k) {
    return lora_kernels::own_by_model(lora_kernels::read(words), static_cast<lora_kernels::Dtype>(dtype), m, n, k);
}

// Rows of (dtype, pass, m, n, k, choice); 1 is own, 2 library. Once, before an operator runs.
LORA_EXPORT void lora_kernels_cpu_install_choices(const int64_t* rows, int64_t count) {
    lora_kernels::install(reinterpret_cast<const lora_kernels::Row*>(rows), count);
}

// 0: as chosen, 1: own, 2: library; returns what held before. For the tuner, while no operator runs.
LORA_EXPORT int lora_kernels_cpu_force_product(int choice) { return lora_kernels::forced.exchange(choice); }
