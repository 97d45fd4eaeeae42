// AMX's instructions as csrc/cpu/tiles.h gives them, or its emulation of them: products of whole and of ragged tiles,
// written as bits, and what becomes of a configuration that another library left. A NaN is written as one and the same.
#include "tiles.h"

#include <cstdio>
#include <cstring>

#include "kernels.h"

using namespace lora_kernels;
using namespace lora_kernels::LORA_CAPABILITY;

namespace {

constexpr int ROWS = 16, PAIRS = 16, COLUMNS = 16, GAP = 7;  // floats between c's rows, pairs between left's

uint32_t state = 1;
uint32_t draw() { return state = state * 1664525u + 1013904223u; }

// Ordinary numbers, the largest and smallest, subnormal ones, zeros, infinities and NaN: each exponent that there is.
uint16_t draw_bf16(bool ordinary) {
    const uint32_t bits = draw() >> 8;
    return ordinary ? (bits & 0x80FF) | (0x7D + (bits >> 16) % 5) << 7 : bits & 0xFFFF;
}

struct Operands {
    uint16_t left[ROWS][2 * (PAIRS + GAP)], right[PAIRS][2 * COLUMNS];
    float sums[ROWS][COLUMNS + GAP];
};

void fill(Operands& operands, bool ordinary) {
    for (auto& row : operands.left)
        for (uint16_t& value : row) value = draw_bf16(ordinary);
    for (auto& row : operands.right)
        for (uint16_t& value : row) value = draw_bf16(ordinary);
    for (auto& row : operands.sums)
        for (float& value : row) {
            const uint32_t bits = static_cast<uint32_t>(draw_bf16(ordinary)) << 16 | draw() >> 16;
            std::memcpy(&value, &bits, sizeof value);
        }
}

void print(const char* name, const Operands& operands) {
    std::printf("%s", name);
    for (const auto& row : operands.sums)
        for (const float value : row) {
            uint32_t bits;
            std::memcpy(&bits, &value, sizeof bits);
            std::printf(" %08x", value != value ? 0x7FC00000u : bits);
        }
    std::printf("\n");
}

TileShapes shapes_of(int rows, int pairs, int columns) {
    TileShapes shapes;
    const auto set = [&](int tile, int of_rows, int words) {
        shapes.rows[tile] = static_cast<uint8_t>(of_rows), shapes.row_bytes[tile] = static_cast<uint16_t>(4 * words);
    };
    set(3, rows, columns), set(5, rows, pairs), set(6, pairs, columns);
    return shapes;
}

// c += left right twice, the second time with the result in another place, after a tile of zeros.
void multiply(int rows, int pairs, int columns, bool ordinary) {
    Operands operands, fresh;
    fill(operands, ordinary), fill(fresh, ordinary);
    const int64_t row = sizeof operands.left[0], sums = sizeof operands.sums[0];
    tile_configure(shapes_of(rows, pairs, columns));
    tile_load<3>(operands.sums, sums);
    tile_load<5>(operands.left, row);
    tile_load_once<6>(operands.right, TILE_BYTES);
    tile_multiply<3, 5, 6>();
    tile_store<3>(operands.sums, sums);
    tile_zero<3>();
    tile_multiply<3, 5, 6>();
    tile_store<3>(fresh.sums, sums);
    tile_release();
    print("sum", operands), print("product", fresh);
}

// What is configured, and how it is after kernels have used the tiles. What a tile holds goes, but it can be used.
void keep(const char* name, const TileShapes* before) {
    TileShapes found;
    if (before != nullptr) tile_configure(*before);
    {
        const Tiles own;
    }
    tile_configuration(found);
    std::printf("%s", name);
    for (size_t i = 0; i < sizeof found; ++i) std::printf(" %02x", reinterpret_cast<const uint8_t*>(&found)[i]);
    std::printf("\n");
    if (before != nullptr) tile_zero<3>(), tile_release();
}

}  // namespace

int main() {
#if !defined(LORA_EMULATE_TILES)
    if (const char* obstacle = amx_obstacle()) return std::printf("%s\n", obstacle), 2;
#endif
    for (const bool ordinary : {true, false}) {
        for (const int rows : {16, 1, 11})
            for (const int pairs : {16, 1, 5})
                for (const int columns : {16, 1, 13}) multiply(rows, pairs, columns, ordinary);
    }
    const TileShapes others = shapes_of(9, 4, 12);
    keep("none", nullptr), keep("others", &others);
    return 0;
}
