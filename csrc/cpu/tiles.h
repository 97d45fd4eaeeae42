// AMX's tiles: eight registers of 16 rows of 64 bytes, that is 16 x 32 bf16 or 16 x 16 floats, and one instruction that
// multiplies them. LORA_EMULATE_TILES writes the instructions out in C++, on any machine and for every instruction
// set's bf16 kernels: for tests.
//
// The instructions are written as assembly, for GCC's intrinsics are macros that want literal numbers, and their loads
// do not tell the compiler that they read memory.
#pragma once

#include "vector.h"

#if defined(LORA_EMULATE_TILES)
#include <cstdio>
#include <cstdlib>
#endif

#if defined(__AMX_BF16__) || defined(LORA_EMULATE_TILES)
#define LORA_TILES 1
#else
#define LORA_TILES 0
#endif

#if LORA_TILES
namespace lora_kernels {
namespace LORA_CAPABILITY {

constexpr int TILE_REGISTERS = 8;
constexpr int64_t TILE_SIDE = 16;                               // rows of any tile, columns of one of floats
constexpr int64_t TILE_DEPTH = 32;                              // columns of one of bf16
constexpr int64_t TILE_BYTES = 64, TILE_SIZE = TILE_SIDE * 32;  // of a row; bf16 in a tile

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

#if defined(LORA_EMULATE_TILES)

struct TileFile {
    bool configured = false;
    TileShapes shapes;
    alignas(64) uint8_t data[TILE_REGISTERS][TILE_SIDE][TILE_BYTES];
};
static thread_local TileFile tile_file;

static void tiles_expect(bool fits, const char* what) {
    if (fits) return;
    std::fprintf(stderr, "tiles: %s\n", what);
    std::abort();
}

static void tile_configure(const TileShapes& shapes) {
    tiles_expect(shapes.palette == 1 && shapes.start_row == 0, "an unknown palette, or an interrupted load");
    for (int tile = 0; tile < 16; ++tile) {
        const bool known = tile < TILE_REGISTERS && shapes.rows[tile] <= TILE_SIDE &&
                           shapes.row_bytes[tile] <= TILE_BYTES && shapes.row_bytes[tile] % 4 == 0;
        tiles_expect(known || (shapes.rows[tile] == 0 && shapes.row_bytes[tile] == 0), "a shape that no tile has");
    }
    tile_file.shapes = shapes;
    __builtin_memset(tile_file.data, 0, sizeof tile_file.data);
    tile_file.configured = true;
}
static void tile_release() { tile_file.configured = false; }
static void tile_configuration(TileShapes& shapes) {
    shapes = tile_file.configured ? tile_file.shapes : TileShapes{};
    shapes.palette = tile_file.configured;
}

static TileFile& tile_checked(int tile) {
    tiles_expect(tile_file.configured, "used without a configuration");
    tiles_expect(tile_file.shapes.rows[tile] > 0 && tile_file.shapes.row_bytes[tile] > 0, "a tile of no shape");
    return tile_file;
}

template <int TILE>
static void tile_zero() {
    __builtin_memset(tile_checked(TILE).data[TILE], 0, sizeof tile_file.data[TILE]);
}
template <int TILE>
static void tile_load(const void* from, int64_t stride) {
    TileFile& file = tile_checked(TILE);
    __builtin_memset(file.data[TILE], 0, sizeof file.data[TILE]);
    for (int64_t row = 0; row < file.shapes.rows[TILE]; ++row)
        __builtin_memcpy(file.data[TILE][row], static_cast<const char*>(from) + row * stride,
                         file.shapes.row_bytes[TILE]);
}
template <int TILE>
static void tile_load_once(const void* from, int64_t stride) {
    tile_load<TILE>(from, stride);
}
template <int TILE>
static void tile_store(void* to, int64_t stride) {
    const TileFile& file = tile_checked(TILE);
    for (int64_t row = 0; row < file.shapes.rows[TILE]; ++row)
        __builtin_memcpy(static_cast<char*>(to) + row * stride, file.data[TILE][row], file.shapes.row_bytes[TILE]);
}

// Subnormal numbers count as zero, as operands and as results; every operation rounds to nearest, ties to even.
static float tile_flushed(float value) {
    const uint32_t bits = read<uint32_t>(&value);
    return (bits & 0x7F800000u) != 0 ? value : __builtin_copysignf(0.0f, value);
}
static float tile_bf16(const uint8_t* row, int64_t column) {
    bf16 value;
    __builtin_memcpy(&value, row + 2 * column, sizeof value);
    return tile_flushed(widen(value));
}

// As the manual writes it: the products of even and of odd k are added up apart, then both to the sum.
template <int SUM, int LEFT, int RIGHT>
static void tile_multiply() {
    TileFile& file = tile_checked(SUM);
    tile_checked(LEFT), tile_checked(RIGHT);
    const TileShapes& shapes = file.shapes;
    const int rows = shapes.rows[SUM], columns = shapes.row_bytes[SUM] / 4, pairs = shapes.row_bytes[LEFT] / 4;
    tiles_expect(SUM != LEFT && SUM != RIGHT && LEFT != RIGHT, "a product of tiles that are not three");
    tiles_expect(
        shapes.rows[LEFT] == rows && shapes.rows[RIGHT] == pairs && shapes.row_bytes[RIGHT] == shapes.row_bytes[SUM],
        "a product of shapes that do not fit");
    for (int row = 0; row < rows; ++row) {
        float even[TILE_SIDE] = {}, odd[TILE_SIDE] = {}, sums[TILE_SIDE];
        for (int pair = 0; pair < pairs; ++pair) {
            const float left[2] = {tile_bf16(file.data[LEFT][row], 2 * pair),
                                   tile_bf16(file.data[LEFT][row], 2 * pair + 1)};
            const uint8_t* right = file.data[RIGHT][pair];
            for (int column = 0; column < columns; ++column) {
                even[column] = tile_flushed(__builtin_fmaf(left[0], tile_bf16(right, 2 * column), even[column]));
                odd[column] = tile_flushed(__builtin_fmaf(left[1], tile_bf16(right, 2 * column + 1), odd[column]));
            }
        }
        __builtin_memcpy(sums, file.data[SUM][row], sizeof sums);
        for (int column = 0; column < columns; ++column)
            sums[column] = tile_flushed(tile_flushed(sums[column]) + tile_flushed(even[column] + odd[column]));
        __builtin_memcpy(file.data[SUM][row], sums, sizeof sums);
    }
}

#else

LORA_INLINE void tile_configure(const TileShapes& shapes) { __asm__ volatile("ldtilecfg %0" ::"m"(shapes)); }
LORA_INLINE void tile_configuration(TileShapes& shapes) { __asm__ volatile("sttilecfg %0" : "=m"(shapes)); }
LORA_INLINE void tile_release() { __asm__ volatile("tilerelease" ::: "memory"); }

template <int TILE>
LORA_INLINE void tile_zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(TILE));
}
template <int TILE>
LORA_INLINE void tile_load(const void* from, int64_t stride) {
    __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(TILE), "r"(from), "r"(stride) : "memory");
}
template <int TILE>  // of what is not read again soon
LORA_INLINE void tile_load_once(const void* from, int64_t stride) {
    __asm__ volatile("tileloaddt1 (%1,%2,1), %%tmm%c0" ::"i"(TILE), "r"(from), "r"(stride) : "memory");
}
template <int TILE>
LORA_INLINE void tile_store(void* to, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(TILE), "r"(to), "r"(stride) : "memory");
}
// SUM (16 x 16 floats) += LEFT (16 x 32 bf16) RIGHT, where RIGHT's row p holds the rows 2p and 2p + 1 of a matrix of 32
// x 16, by turns.
template <int SUM, int LEFT, int RIGHT>
LORA_INLINE void tile_multiply() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(LEFT), "i"(RIGHT));
}

#endif

// The tiles of this thread for as long as the object lives, each of the full size: ragged edges are padded in memory.
// A task of a parallel region owns one. None outlives its task, for a configuration that lingers makes every switch of
// threads dearer. A configuration that was there comes back: oneDNN's products load theirs with every call, but PyTorch
// remembers for each thread which of the block products it serves to extensions was configured last, and skips the
// load. What the tiles held is lost, as with any call: the calling convention preserves none.
class Tiles {
  public:
    Tiles() {
        tile_configuration(former);
        TileShapes shapes;
        for (int tile = 0; tile < TILE_REGISTERS; ++tile)
            shapes.rows[tile] = TILE_SIDE, shapes.row_bytes[tile] = TILE_BYTES;
        tile_configure(shapes);
    }
    ~Tiles() {
        tile_release();
        if (former.palette != 0) tile_configure(former);
    }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

  private:
    TileShapes former;  // palette 0: none
};

}  // namespace LORA_CAPABILITY
}  // namespace lora_kernels
#endif
