// Bringing tiles into shared memory: the large matrices asynchronously as they are, dropout applied in place, the small
// factors of any dtype and layout rounded to the compute dtype on the way.
#pragma once

#include "product.h"

namespace lora_kernels {
namespace cuda {

constexpr int UNIT = 8;  // elements that a thread moves at a time

// x or dy: rows of unit column stride in the compute dtype. `aligned`: all rows begin at multiples of 16 bytes.
struct Matrix {
    const void* data;
    int64_t rows, columns, row_stride;
    bool aligned;
};

// lora_a, lora_b, h or dh, or the transposed of one, by its strides.
struct Operand {
    const void* data;
    DType dtype;
    int64_t rows, columns, row_stride, column_stride;
};

// seed: int64 (2,) on the device, or null where nothing is dropped.
struct Dropout {
    const int64_t* seed;
    uint32_t keep;  // 65536 times the probability that an element is kept, at least 1
};

template <typename T>
struct alignas(16) Unit {
    T at[UNIT];
};

// ROWS x COLUMNS in shared memory. Rows are 16 bytes longer: rows that ldmatrix reads together start in other banks.
template <typename T, int ROWS, int COLUMNS>
struct Tile {
    static constexpr int WIDTH = COLUMNS + 16 / static_cast<int>(sizeof(T));
    static constexpr int ROW_UNITS = COLUMNS / UNIT;
    static constexpr int UNITS = ROWS * ROW_UNITS;
    static_assert(COLUMNS % UNIT == 0, "rows are moved in units");
    alignas(16) T data[ROWS * WIDTH];

    LORA_TEAM T* at(int row, int column) { return data + row * WIDTH + column; }
    LORA_TEAM Unit<T>& unit(int row, int group) { return *reinterpret_cast<Unit<T>*>(at(row, group * UNIT)); }
};

// tile[i][j] = matrix[first_row + i][first_column + j], zero from end_row and from the last column on. Complete for the
// thread itself after commit() and wait(), for others after a barrier. Thread t moves units t, t + THREADS, ...
template <typename T, int ROWS, int COLUMNS, class Warp>
LORA_TEAM void stage_matrix(Warp& warp, Tile<T, ROWS, COLUMNS>& tile, const Matrix& matrix, int64_t first_row,
                            int64_t end_row, int64_t first_column) {
    using Target = Tile<T, ROWS, COLUMNS>;
    warp.each([&](int lane) {
        LORA_UNROLL for (int u = warp.index() * WARP_LANES + lane; u < Target::UNITS; u += THREADS) {
            const int i = u / Target::ROW_UNITS, group = u % Target::ROW_UNITS;
            const int64_t row = first_row + i, column = first_column + group * UNIT;
            const T* source = static_cast<const T*>(matrix.data) + row * matrix.row_stride + column;
            Unit<T>& target = tile.unit(i, group);
            if (matrix.aligned && row < end_row && column + UNIT <= matrix.columns) {
                LORA_UNROLL for (int part = 0; part < static_cast<int>(sizeof(Unit<T>)) / 16; ++part) {
                    warp.copy16(reinterpret_cast<char*>(&target) + 16 * part,
                                reinterpret_cast<const char*>(source) + 16 * part);
                }
            } else {
                Unit<T> unit;
                LORA_UNROLL for (int j = 0; j < UNIT; ++j) {
                    unit.at[j] = row < end_row && column + j < matrix.columns ? source[j] : T{};
                }
                target = unit;
            }
        }
    });
}

// One call of Philox.
struct Random {
    uint32_t w[4];
};
LORA_HD Random philox(uint64_t key, uint64_t stream, uint32_t c0, uint32_t c1) {
    uint32_t c2 = static_cast<uint32_t>(stream), c3 = static_cast<uint32_t>(stream >> 32);
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    LORA_UNROLL for (int round = 0; round < PHILOX_ROUNDS; ++round) {
        const uint64_t product0 = static_cast<uint64_t>(PHILOX_MULTIPLIER_0) * c0;
        const uint64_t product1 = static_cast<uint64_t>(PHILOX_MULTIPLIER_1) * c2;
        c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(product1);
        c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(product0);
        k0 += PHILOX_WEYL_0;
        k1 += PHILOX_WEYL_1;
    }
    return {{c0, c1, c2, c3}};
}

// Bit j: whether column DROPOUT_WORD * word + j of a row is kept.
LORA_HD uint32_t keep_word(const Dropout& dropout, int64_t row, int64_t word) {
    const uint64_t key = static_cast<uint64_t>(dropout.seed[0]), stream = static_cast<uint64_t>(dropout.seed[1]);
    uint32_t kept = dropout.keep == KEEP_ALL ? ~0u : 0u;
    for (int call = first_call(dropout.keep); call < PHILOX_CALLS; ++call) {
        const uint32_t counter = static_cast<uint32_t>(word) * PHILOX_CALLS + static_cast<uint32_t>(call);
        const Random random = philox(key, stream, counter, static_cast<uint32_t>(row));
        LORA_UNROLL for (int i = 0; i < 4; ++i) {
            const uint32_t digit = 0u - (dropout.keep >> (4 * call + i) & 1u);
            kept = (kept & random.w[i]) | (digit & (kept | random.w[i]));  // majority
        }
    }
    return kept;
}

// The mask of a tile. Its words are drawn while the tile's copies are on their way, and others read them after a
// barrier.
template <int ROWS, int COLUMNS>
struct KeepWords {
    static constexpr int ACROSS = (COLUMNS + DROPOUT_WORD - 1) / DROPOUT_WORD;
    static_assert(COLUMNS % DROPOUT_WORD == 0 || DROPOUT_WORD % COLUMNS == 0,
                  "a tile's columns are whole words or one");
    uint32_t words[ROWS * ACROSS];

    template <class Warp>
    LORA_TEAM void draw(Warp& warp, const Dropout& dropout, int64_t first_row, int64_t first_column) {
        warp.each([&](int lane) {
            for (int i = warp.index() * WARP_LANES + lane; i < ROWS * ACROSS; i += THREADS) {
                const int64_t row = first_row + i / ACROSS, word = first_column / DROPOUT_WORD + i % ACROSS;
                words[i] = keep_word(dropout, row, word);
            }
        });
    }

    // Zeroes what is dropped of row i's unit `group`. The tile begins at first_column of the matrix.
    template <typename T>
    LORA_TEAM void apply(Unit<T>& unit, int i, int group, int64_t first_column) const {
        const int column = static_cast<int>(first_column % DROPOUT_WORD) + group * UNIT;
        const uint32_t bits = words[i * ACROSS + column / DROPOUT_WORD] >> column % DROPOUT_WORD;
        LORA_UNROLL for (int j = 0; j < UNIT; ++j) {
            if ((bits >> j & 1u) == 0) unit.at[j] = T{};
        }
    }
};

// Zeroes what dropout drops of a staged tile. Each thread changes the units that it staged itself, so that no barrier
// stands between.
template <typename T, int ROWS, int COLUMNS, class Warp>
LORA_TEAM void drop_tile(Warp& warp, Tile<T, ROWS, COLUMNS>& tile, const KeepWords<ROWS, COLUMNS>& kept,
                         int64_t first_column) {
    using Target = Tile<T, ROWS, COLUMNS>;
    warp.each([&](int lane) {
        LORA_UNROLL for (int u = warp.index() * WARP_LANES + lane; u < Target::UNITS; u += THREADS) {
            const int i = u / Target::ROW_UNITS, group = u % Target::ROW_UNITS;
            Unit<T> unit = tile.unit(i, group);
            kept.apply(unit, i, group, first_column);
            tile.unit(i, group) = unit;
        }
    });
}

// values[j] = source[j * stride], zero from `count` on.
template <typename Source, typename Sum>
LORA_TEAM void load_run(Sum (&values)[UNIT], const Source* source, int64_t stride, int64_t count) {
    if (stride == 1 && count >= UNIT && reinterpret_cast<uintptr_t>(source) % 16 == 0) {
        const Unit<Source> unit = *reinterpret_cast<const Unit<Source>*>(source);
        LORA_UNROLL for (int j = 0; j < UNIT; ++j) values[j] = static_cast<Sum>(widen(unit.at[j]));
    } else {
        LORA_UNROLL for (int j = 0; j < UNIT; ++j) {
            values[j] = j < count ? static_cast<Sum>(widen(source[j * stride])) : Sum(0);
        }
    }
}

// Which unit of an operand's tile number u is: along rows where columns are adjacent in memory, along columns
// otherwise.
template <int ROWS, int ROW_UNITS>
LORA_HD void operand_unit(int u, bool along_rows, int& row, int& group) {
    row = along_rows ? u / ROW_UNITS : u % ROWS;
    group = along_rows ? u % ROW_UNITS : u / ROWS;
}

template <typename T, typename Source, int ROWS, int COLUMNS, class Warp>
LORA_TEAM void stage_from(Warp& warp, Tile<T, ROWS, COLUMNS>& high, Tile<T, ROWS, COLUMNS>* low, const Operand& operand,
                          int64_t first_row, int64_t first_column, int64_t end_column) {
    using Target = Tile<T, ROWS, COLUMNS>;
    using Sum = typename Number<T>::Sum;
    warp.each([&](int lane) {
        for (int u = warp.index() * WARP_LANES + lane; u < Target::UNITS; u += THREADS) {
            int i, group;
            operand_unit<ROWS, Target::ROW_UNITS>(u, operand.column_stride == 1, i, group);
            const int64_t row = first_row + i, column = first_column + group * UNIT;
            const int64_t count = row < operand.rows ? end_column - column : 0;
            const int64_t offset = row * operand.row_stride + column * operand.column_stride;
            Sum values[UNIT];
            load_run(values, static_cast<const Source*>(operand.data) + offset, operand.column_stride, count);
            Unit<T> upper, lower;
            LORA_UNROLL for (int j = 0; j < UNIT; ++j) {
                upper.at[j] = narrowed<T>(values[j]);
                const Sum rest = values[j] - widen(upper.at[j]);
                lower.at[j] = narrowed<T>(is_finite(rest) ? rest : Sum(0));
            }
            high.unit(i, group) = upper;
            if (low != nullptr) low->unit(i, group) = lower;
        }
    });
}

// A base of Shared: where the low parts of a factor are staged. Nowhere, and null, but where T is WIDE.
template <typename T, int ROWS, int COLUMNS, int BUFFERS>
struct LowFactor {
    LORA_TEAM Tile<T, ROWS, COLUMNS>* low_factor(int) { return nullptr; }
};
template <int ROWS, int COLUMNS, int BUFFERS>
struct LowFactor<Half, ROWS, COLUMNS, BUFFERS> {
    Tile<BFloat16, ROWS, COLUMNS> low_parts[BUFFERS];
    LORA_TEAM Tile<BFloat16, ROWS, COLUMNS>* low_factor(int buffer) { return &low_parts[buffer]; }
};

// tile[i][j] = operand[first_row + i][first_column + j] rounded to T, zero from the operand's last row and from
// end_column on: lora_a or lora_b. Where `low` is not null it gets what rounding lost.
template <typename T, int ROWS, int COLUMNS, class Warp>
LORA_TEAM void stage_factor(Warp& warp, Tile<T, ROWS, COLUMNS>& tile, Tile<T, ROWS, COLUMNS>* low,
                            const Operand& operand, int64_t first_row, int64_t first_column, int64_t end_column) {
    switch (operand.dtype) {
        case DType::HALF:
            return stage_from<T, Half>(warp, tile, low, operand, first_row, first_column, end_column);
        case DType::BFLOAT16:
            return stage_from<T, BFloat16>(warp, tile, low, operand, first_row, first_column, end_column);
        case DType::FLOAT:
            return stage_from<T, float>(warp, tile, low, operand, first_row, first_column, end_column);
        case DType::DOUBLE:
            return stage_from<T, double>(warp, tile, low, operand, first_row, first_column, end_column);
    }
}

// The same of h or dh, which are in Sum. For a 16-bit T `low` is the tile of what rounding lost: high + low has nearly
// all bits. An infinite or NaN high part travels alone, for inf - inf would turn an infinity into NaN.
template <typename T, int ROWS, int COLUMNS, int LOW_ROWS, class Warp>
LORA_TEAM void stage_hidden(Warp& warp, Tile<T, ROWS, COLUMNS>& high, Tile<T, LOW_ROWS, COLUMNS>& low,
                            const Operand& operand, int64_t first_row, int64_t first_column, int64_t end_column) {
    Tile<T, ROWS, COLUMNS>* rest = nullptr;
    if constexpr (Number<T>::SPLIT) rest = &low;
    stage_from<T, typename Number<T>::Sum>(warp, high, rest, operand, first_row, first_column, end_column);
}

}  // namespace cuda
}  // namespace lora_kernels
