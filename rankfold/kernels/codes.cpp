// Products with sparse codes, read as they are stored: values by ascending place, places as a bit mask.
//
// 32 places are handled at a time: their values are spread over the lanes whose mask bits are set and multiplied with
// the input that lies there. A tile is up to 4 rows by up to 4 tokens, so that what is loaded is used several times.
// Every row's mask is counted before a value is read: a damaged support is reported, never followed. Compiled at
// first use for the processor at hand; called through ctypes by cpu.py.

#include <type_traits>
#include <vector>

#include "lanes.h"
#include "places.h"

namespace {

constexpr int MAX_ROWS = 4, MAX_TOKENS = 4;
constexpr size_t AHEAD = 16384;  // bytes to fetch, into the second cache, before they are needed

// Rows of values and of a dictionary. Vector loads run past the end of a row, so the last ones are read from a copy.
template <class T> struct Rows {
    const T* first;
    int64_t rows, length;
    const T* at(int64_t row, std::vector<T>& copy) const {
        if ((row + 1) * length + STEP <= rows * length) return first + row * length;
        copy.assign(size_t(length + STEP), T{});
        std::memcpy(copy.data(), first + row * length, size_t(length) * sizeof(T));
        return copy.data();
    }
};

// --- The four inner loops: one tile of ROWS x TOKENS -------------------------------------------------------------
// dot   y[token][row] = Σ over places of row · x[token]          add   y[token] += Σ over rows of x[token][row] · row
// `Next` puts the 32 values of a row at a step into V out[PARTS], expanded from codes or loaded from a dictionary.

template <int ROWS, int TOKENS, class Next>
inline void dot(int64_t steps, Next next, const float* x, int64_t stride, float (*y)[MAX_TOKENS]) {
    V acc[ROWS][TOKENS] = {};
    for (int64_t s = 0; s < steps; ++s) {
        V v[ROWS][PARTS];
        for (int r = 0; r < ROWS; ++r) next(r, s, v[r]);
        for (int t = 0; t < TOKENS; ++t)
            for (int i = 0; i < PARTS; ++i) {
                V in = load(x + t * stride + s * STEP + i * LANES);
                for (int r = 0; r < ROWS; ++r) acc[r][t] += v[r][i] * in;
            }
    }
    for (int r = 0; r < ROWS; ++r) for (int t = 0; t < TOKENS; ++t) y[r][t] = sum(acc[r][t]);
}

template <int ROWS, int TOKENS, class Next>
inline void add(int64_t steps, Next next, const float (*x)[MAX_TOKENS], float* y, int64_t stride) {
    for (int64_t s = 0; s < steps; ++s) {
        V v[ROWS][PARTS];
        for (int r = 0; r < ROWS; ++r) next(r, s, v[r]);
        for (int t = 0; t < TOKENS; ++t)
            for (int i = 0; i < PARTS; ++i) {
                float* at = y + t * stride + s * STEP + i * LANES;
                V out = load(at);
                for (int r = 0; r < ROWS; ++r) out += v[r][i] * x[r][t];
                store(at, out);
            }
    }
}

template <class F> inline void tile(int64_t rows, int64_t tokens, F f) {  // f(integral constants ROWS, TOKENS)
#define TOKENS_OF(R) \
    switch (tokens) { \
        case 1: return f(std::integral_constant<int, R>{}, std::integral_constant<int, 1>{}); \
        case 2: return f(std::integral_constant<int, R>{}, std::integral_constant<int, 2>{}); \
        case 3: return f(std::integral_constant<int, R>{}, std::integral_constant<int, 3>{}); \
        default: return f(std::integral_constant<int, R>{}, std::integral_constant<int, 4>{}); \
    }
    if (rows == MAX_ROWS) { TOKENS_OF(4) } else { TOKENS_OF(1) }
#undef TOKENS_OF
}

// --- Tiles of codes and of a dictionary: `open` finds the rows, `next` reads them step by step --------------------

// How far ahead to fetch, in entries: whole tiles (of `entries`), and enough of them to hide the memory's latency.
template <class T> inline int64_t distance(int64_t entries) {
    return entries * (1 + int64_t(AHEAD / sizeof(T)) / entries);
}

template <class T> struct CodeTile {
    const Layout& layout;
    const T* values;
    std::vector<uint32_t> masks[MAX_ROWS];
    std::vector<T> copies[MAX_ROWS];
    struct Next {
        const T* p[MAX_ROWS];
        const uint32_t* m[MAX_ROWS];
        int64_t ahead;  // what the next tile reads here: a row is too short for the processor to foresee it
        void operator()(int r, int64_t s, V* out) {
            __builtin_prefetch(p[r] + ahead, 0, 2);
            expand32(m[r][s], p[r], out);
        }
    } next;

    CodeTile(const Layout& l, const T* v) : layout(l), values(v) {
        for (auto& mask : masks) mask.resize(size_t(l.steps()));
    }
    int64_t steps() const { return layout.steps(); }
    int64_t limit(int64_t) const { return layout.rows; }
    const float* input(const float* x, int64_t) const { return x; }
    float* input(float* x, int64_t) const { return x; }
    bool open(int64_t row, int64_t n) {
        Rows<T> rows{values, layout.rows, layout.count()};
        next.ahead = distance<T>(n * layout.count());
        for (int64_t r = 0; r < n; ++r) {
            if (!layout.mask(row + r, masks[r].data())) return false;
            next.p[r] = rows.at(row + r, copies[r]), next.m[r] = masks[r].data();
        }
        return true;
    }
};

template <class T> struct AtomTile {
    const T* dictionary;
    int64_t blocks, atoms, width;
    std::vector<T> copies[MAX_ROWS];
    struct Next {
        const T* p[MAX_ROWS];
        int64_t ahead;
        void operator()(int r, int64_t s, V* out) {
            for (size_t at = 0; at < STEP * sizeof(T); at += 64)
                __builtin_prefetch((const char*)(p[r] + s * STEP + ahead) + at, 0, 2);
            load32(p[r] + s * STEP, out);
        }
    } next;

    AtomTile(const Layout& l, const T* d, int64_t w) : dictionary(d), blocks(l.blocks), atoms(l.atoms), width(w) {}
    int64_t steps() const { return (width + STEP - 1) / STEP; }
    int64_t limit(int64_t row) const { return (row / atoms + 1) * atoms; }  // a tile stays in one block
    const float* input(const float* x, int64_t row) const { return x + row / atoms * steps() * STEP; }
    float* input(float* x, int64_t row) const { return x + row / atoms * steps() * STEP; }
    bool open(int64_t row, int64_t n) {
        Rows<T> rows{dictionary, blocks * atoms, width};
        next.ahead = distance<T>(n * width);
        for (int64_t r = 0; r < n; ++r) next.p[r] = rows.at(row + r, copies[r]);
        return true;
    }
};

// Visits rows begin..end of a tile by fours; 0, or 1 + the first row that is damaged.
template <class Tile, class F> int64_t visit(Tile& tile_of, int64_t begin, int64_t end, int64_t tokens, F f) {
    for (int64_t row = begin, n; row < end; row += n) {
        int64_t stop = tile_of.limit(row) < end ? tile_of.limit(row) : end;
        n = stop - row >= MAX_ROWS ? MAX_ROWS : 1;
        if (!tile_of.open(row, n)) return row + 1;
        for (int64_t t = 0; t < tokens; t += MAX_TOKENS)
            tile(n, tokens - t, [&](auto rows, auto wide) { f(rows, wide, row, t); });
    }
    return 0;
}

using Scratch = std::vector<float>;

// y[token * stride + to(row)] = row · x[token], rows shared out between threads.
template <class Tile, class Make, class To>
int64_t dots(int64_t rows, int64_t tokens, int threads, Make make, const float* x, int64_t across, float* y,
             int64_t stride, To to) {
    int64_t bad = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int i = 0; i < threads; ++i) {
        Tile part = make();
        int64_t found = visit(part, rows * i / threads, rows * (i + 1) / threads, tokens,
            [&](auto R, auto T, int64_t row, int64_t t) {
                float got[R][MAX_TOKENS];
                dot<R, T>(part.steps(), part.next, part.input(x, row) + t * across, across, got);
                for (int r = 0; r < R; ++r)
                    for (int k = 0; k < T; ++k) y[(t + k) * stride + to(row + r)] = got[r][k];
            });
        if (found) {
#pragma omp atomic write
            bad = found;
        }
    }
    return bad;
}

// y[token] += x[token * stride + from(row)] · row; every thread sums on its own, and the sums are added at the end.
template <class Tile, class Make, class From>
int64_t adds(int64_t rows, int64_t tokens, int threads, Make make, const float* x, int64_t stride, From from,
             float* y, int64_t across) {
    int64_t bad = 0, size = tokens * across;
    Scratch others(size_t(size * (threads - 1)));
    std::memset(y, 0, size_t(size) * 4);
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int i = 0; i < threads; ++i) {
        Tile part = make();
        float* mine = i ? others.data() + (i - 1) * size : y;
        int64_t found = visit(part, rows * i / threads, rows * (i + 1) / threads, tokens,
            [&](auto R, auto T, int64_t row, int64_t t) {
                float by[R][MAX_TOKENS];
                for (int r = 0; r < R; ++r)
                    for (int k = 0; k < T; ++k) by[r][k] = x[(t + k) * stride + from(row + r)];
                add<R, T>(part.steps(), part.next, by, part.input(mine, row) + t * across, across);
            });
        if (found) {
#pragma omp atomic write
            bad = found;
        }
    }
    for (int i = 0; i + 1 < threads; ++i)
        for (int64_t j = 0; j < size; ++j) y[j] += others[i * size + j];
    return bad;
}

template <class T, class X>
int64_t run(const X* x, X* y, const T* dictionary, int64_t width, const T* values, const Layout& layout, int64_t tokens,
            bool transposed, int threads) {
    const int64_t columns = layout.columns(), codes_across = layout.steps() * STEP;
    const int64_t padded = (width + STEP - 1) / STEP * STEP;
    // The side of x or y that is not the rows of the codes: `pieces` blocks of `length`, each padded to whole steps.
    const int64_t pieces = dictionary ? layout.blocks : 1, length = dictionary ? width : columns;
    const int64_t across = dictionary ? pieces * padded : codes_across, step = dictionary ? padded : codes_across;
    static thread_local Scratch outer, inner, sums;
    outer.assign(size_t(tokens * across), 0), inner.assign(size_t(tokens * codes_across), 0);
    sums.resize(size_t(tokens * layout.rows));
    auto codes = [&] { return CodeTile<T>(layout, values); };
    auto atoms = [&] { return AtomTile<T>(layout, dictionary, width); };
    auto plain = [](int64_t row) { return row; };
    auto turned = [](int64_t column) { return lane<T>(column); };
    float* middle = dictionary ? inner.data() : outer.data();
    int64_t bad = 0;
    auto each = [&](auto f) {  // f(entry of x or y, its place in the padded scratch)
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t b = 0; b < pieces; ++b)
                for (int64_t j = 0; j < length; ++j)
                    f((t * pieces + b) * length + j, t * across + b * step + lane<T>(j));
    };
    if (!transposed) {
        each([&](int64_t from, int64_t to) { outer[to] = widen(x[from]); });
        if (dictionary)
            dots<AtomTile<T>>(columns, tokens, threads, atoms, outer.data(), across, middle, codes_across, turned);
        bad = dots<CodeTile<T>>(layout.rows, tokens, threads, codes, middle, codes_across, sums.data(), layout.rows,
                                plain);
        for (int64_t i = 0; i < tokens * layout.rows; ++i) narrow(sums[i], y[i]);
        return bad;
    }
    for (int64_t i = 0; i < tokens * layout.rows; ++i) sums[i] = widen(x[i]);
    bad = adds<CodeTile<T>>(layout.rows, tokens, threads, codes, sums.data(), layout.rows, plain, middle, codes_across);
    if (dictionary)
        adds<AtomTile<T>>(columns, tokens, threads, atoms, middle, codes_across, turned, outer.data(), across);
    each([&](int64_t to, int64_t from) { narrow(outer[from], y[to]); });
    return bad;
}

}  // namespace

// C x, or Cᵀ x if `transposed`, for x (tokens, ·) into y (tokens, ·); with a dictionary (blocks, atoms, width) C D x
// or Dᵀ Cᵀ x. Types: 0 float32, 1 bfloat16, of values and dictionary (`stored`) and of x and y (`given`). Returns 0,
// or 1 + a row whose places are damaged; y is then not to be used.
extern "C" int64_t rankfold_codes(
    const void* x, void* y, int given, const void* dictionary, int64_t width, const void* values, int stored,
    const uint8_t* support, int64_t bytes, int listed, int64_t rows, int64_t blocks, int64_t atoms, int64_t nonzeros,
    int64_t tokens, int transposed, int threads) {
    Layout layout{support, bytes, rows, blocks, atoms, nonzeros, listed != 0};
    auto go = [&](auto* stored_as, auto* given_as) {
        using T = std::remove_reference_t<decltype(*stored_as)>;
        using X = std::remove_reference_t<decltype(*given_as)>;
        return run<T, X>((const X*)x, (X*)y, (const T*)dictionary, width, (const T*)values, layout, tokens,
                         transposed != 0, threads);
    };
    float* f = nullptr;
    bf16* h = nullptr;
    return stored ? (given ? go(h, h) : go(h, f)) : (given ? go(f, h) : go(f, f));
}

// Rows start..stop of C as dense rows, or, if `back`, its entries out of dense rows. `size`: bytes of an entry.
extern "C" int64_t rankfold_convert(
    void* values, void* dense, int size, int64_t start, int64_t stop, const uint8_t* support, int64_t bytes, int listed,
    int64_t rows, int64_t blocks, int64_t atoms, int64_t nonzeros, int back, int threads) {
    Layout layout{support, bytes, rows, blocks, atoms, nonzeros, listed != 0};
    if (size == 2) return convert(layout, start, stop, (uint16_t*)values, (uint16_t*)dense, back != 0, threads);
    if (size == 4) return convert(layout, start, stop, (uint32_t*)values, (uint32_t*)dense, back != 0, threads);
    return convert(layout, start, stop, (uint64_t*)values, (uint64_t*)dense, back != 0, threads);
}

extern "C" const char* rankfold_lanes() {
#if defined(__AVX512VBMI2__) && defined(__AVX512BW__)
    return "AVX-512 with VBMI2";
#elif defined(__AVX512F__)
    return "AVX-512";
#elif defined(__AVX2__)
    return "AVX2";
#else
    return "portable";
#endif
}
