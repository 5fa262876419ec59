// The places of the entries of codes, from a bit mask or from bit-packed indices, checked row by row; and rows of
// codes as dense rows and back, for those who need them so.

#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct Layout {
    const uint8_t* support;
    int64_t bytes, rows, blocks, atoms, nonzeros;
    bool listed;  // bit-packed indices instead of a mask
    int64_t columns() const { return blocks * atoms; }
    int64_t count() const { return blocks * nonzeros; }
    int64_t steps() const { return (columns() + STEP - 1) / STEP; }

    uint64_t peek(int64_t bit) const {  // at least 57 bits from here on, zeros beyond the end
        int64_t at = bit >> 3;
        uint64_t word = 0;
        if (at + 8 <= bytes) std::memcpy(&word, support + at, 8);
        else if (at < bytes) std::memcpy(&word, support + at, size_t(bytes - at));
        return word >> (bit & 7);
    }
    // The mask of a row in 32-bit words; false where it does not take `count` places.
    bool mask(int64_t row, uint32_t* words) const {
        int64_t found = 0, last = columns() & 31;
        if (!listed) {
            const int64_t bit = row * columns(), n = steps();
            const int64_t whole = (bit >> 3) + n * 4 + 4 <= bytes ? n : 0;  // words that can be loaded blindly
            for (int64_t i = 0; i < whole; ++i) {
                uint64_t word;
                std::memcpy(&word, support + (bit >> 3) + i * 4, 8);
                words[i] = uint32_t(word >> (bit & 7));
            }
            for (int64_t i = whole; i < n; ++i) words[i] = uint32_t(peek(bit + i * 32));
            if (last) words[n - 1] &= (1u << last) - 1;
            for (int64_t i = 0; i < n; ++i) found += __builtin_popcount(words[i]);
            return found == count();
        }
        int width = 1;
        while (width < 62 && (int64_t(1) << width) < atoms) ++width;
        std::memset(words, 0, size_t(steps()) * 4);
        int64_t bit = row * count() * width;
        for (int64_t b = 0; b < blocks; ++b)
            for (int64_t n = 0, before = -1; n < nonzeros; ++n, bit += width) {
                int64_t place = int64_t(peek(bit) & ((uint64_t(1) << width) - 1));
                if (place <= before || place >= atoms) return false;
                before = place, place += b * atoms;
                words[place >> 5] |= 1u << (place & 31);
            }
        return true;
    }
};

// f(entry, column) for every entry of a row's mask, in order.
template <class F> inline void each_place(const uint32_t* words, int64_t steps, F f) {
    for (int64_t i = 0, entry = 0; i < steps; ++i)
        for (uint32_t word = words[i]; word; word &= word - 1) f(entry++, i * 32 + __builtin_ctz(word));
}

// Rows start..stop: `values` (all of them) to `dense` (those rows only), or back. 0, or 1 + a damaged row.
template <class T>
int64_t convert(const Layout& layout, int64_t start, int64_t stop, T* values, T* dense, bool back, int threads) {
    int64_t bad = 0, columns = layout.columns(), count = layout.count();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<uint32_t> words(size_t(layout.steps()));
#pragma omp for
        for (int64_t row = start; row < stop; ++row) {
            T *mine = values + row * count, *whole = dense + (row - start) * columns;
            if (!back) std::memset((void*)whole, 0, size_t(columns) * sizeof(T));
            if (!layout.mask(row, words.data())) {
#pragma omp atomic write
                bad = row + 1;
            } else if (back) {
                each_place(words.data(), layout.steps(), [&](int64_t e, int64_t c) { mine[e] = whole[c]; });
            } else {
                each_place(words.data(), layout.steps(), [&](int64_t e, int64_t c) { whole[c] = mine[e]; });
            }
        }
    }
    return bad;
}

}  // namespace
