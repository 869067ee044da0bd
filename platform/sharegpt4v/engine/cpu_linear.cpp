// A float32 matrix product for few rows on processors with AVX-512; cpu_linear.py compiles it and passes the arguments.
//
// The weights are read from memory once a block of rows, and computing with them takes about as long as reading: while
// one panel of them is computed with, the next one is asked for. Without the instructions the library has no functions.

#ifdef __AVX512F__
#include <atomic>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

namespace {

constexpr int64_t LANES = 16, VECTORS = 2;
constexpr int64_t PANEL = LANES * VECTORS;  // outputs computed together; PANEL in cpu_linear.py
constexpr int64_t ROWS = 14;                // their sums, 28 vectors, stay in registers
constexpr int64_t BLOCK = 5;                // tiles of rows that a panel is computed with before the next panel
constexpr int64_t DEPTH = 768;              // inputs whose panel and rows the caches of a core hold
constexpr int64_t LINE = 64;                // bytes that a processor fetches together

// Swaps blocks of SIDE numbers, those right of the diagonal with those left of it: for 8, 4, 2 and 1 a transposition.
template <int SIDE>
void swap_blocks(__m512* square) {
  alignas(64) int32_t kept[LANES], swapped[LANES];  // numbers from 16 on are places in the second vector
  for (int32_t i = 0; i < LANES; i++) {
    kept[i] = i & SIDE ? LANES + i - SIDE : i;
    swapped[i] = i & SIDE ? LANES + i : i + SIDE;
  }
  const __m512i one = _mm512_load_si512(kept), other = _mm512_load_si512(swapped);
  for (int i = 0; i < LANES; i++) {
    if (i & SIDE) continue;
    const __m512 upper = square[i], lower = square[i + SIDE];
    square[i] = _mm512_permutex2var_ps(upper, one, lower);
    square[i + SIDE] = _mm512_permutex2var_ps(upper, other, lower);
  }
}

__mmask16 first(int64_t lanes) { return lanes < LANES ? (1 << lanes) - 1 : 0xffff; }

// Packs `count` rows (count, width), at most LANES of them, as (width, count).
void pack(const float* rows, int64_t count, int64_t width, float* packed) {
  for (int64_t k = 0; k < width; k += LANES) {
    __m512 square[LANES];
    for (int64_t i = 0; i < LANES; i++)
      square[i] = i < count ? _mm512_maskz_loadu_ps(first(width - k), rows + i * width + k) : _mm512_setzero_ps();
    swap_blocks<8>(square), swap_blocks<4>(square), swap_blocks<2>(square), swap_blocks<1>(square);
    for (int64_t own = 0; own < LANES && k + own < width; own++)
      _mm512_mask_storeu_ps(packed + (k + own) * count, first(count), square[own]);
  }
}

// What the processor is asked to fetch meanwhile: `lines` cache lines from `from` on, spread over a tile.
struct Ahead {
  const char* from;
  int64_t lines;
};

// Adds the products of R rows, packed as (depth, R), with a panel (depth, PANEL) to `begin`, or to out without it.
template <int R>
void tile(const float* rows, const float* panel, int64_t depth, const float* begin, float* out, int64_t out_row,
          Ahead ahead) {
  __m512 sums[R][VECTORS];
  for (int i = 0; i < R; i++)
    for (int j = 0; j < VECTORS; j++)
      sums[i][j] = _mm512_loadu_ps((begin != nullptr ? begin : out + i * out_row) + j * LANES);
  int64_t due = 0;
  for (int64_t k = 0; k < depth; k++) {
    for (due += ahead.lines; due >= depth; due -= depth, ahead.from += LINE) __builtin_prefetch(ahead.from, 0, 2);
    for (int i = 0; i < R; i++)
      for (int j = 0; j < VECTORS; j++)
        sums[i][j] += rows[k * R + i] * _mm512_loadu_ps(panel + k * PANEL + j * LANES);
  }
  for (int i = 0; i < R; i++)
    for (int j = 0; j < VECTORS; j++) _mm512_storeu_ps(out + i * out_row + j * LANES, sums[i][j]);
}

using Tile = void (*)(const float*, const float*, int64_t, const float*, float*, int64_t, Ahead);
constexpr Tile TILES[] = {nullptr, tile<1>, tile<2>, tile<3>,  tile<4>,  tile<5>,  tile<6>, tile<7>,
                          tile<8>, tile<9>, tile<10>, tile<11>, tile<12>, tile<13>, tile<14>};
static_assert(sizeof TILES / sizeof *TILES == ROWS + 1, "a tile for each number of rows");

// Divides a number of rows into the fewest parts of at most `most`, which differ by one row at most.
struct Parts {
  int64_t rows, count;
  Parts(int64_t rows, int64_t most) : rows(rows), count((rows + most - 1) / most) {}
  int64_t start(int64_t part) const { return rows * part / count; }
};

}  // namespace

// inputs (rows, width); panels (outputs / PANEL rounded up, width, PANEL); bias (the same outputs); out (rows, outputs).
// packed: room for rows * width numbers.
extern "C" void linear_float32(const float* inputs, const float* panels, const float* bias, float* packed, float* out,
                               int64_t rows, int64_t width, int64_t outputs, int64_t threads) {
  const Parts tiles(rows, ROWS);
  const int64_t number = (outputs + PANEL - 1) / PANEL;
  // Smaller blocks where a thread would get few panels: the last ones are waited for.
  const int64_t share = tiles.count * number / (4 * threads);
  const int64_t per_block = share < 1 ? 1 : share < BLOCK ? share : BLOCK;
  const int64_t blocks = (tiles.count + per_block - 1) / per_block;
  std::atomic<int64_t> taken{0};
#pragma omp parallel num_threads(threads)
  {
    // Each tile's rows lie side by side, or rows a power of two apart would share one place in the cache.
#pragma omp for
    for (int64_t t = 0; t < tiles.count; t++) {
      const int64_t start = tiles.start(t);
      pack(inputs + start * width, tiles.start(t + 1) - start, width, packed + start * width);
    }
    // A thread takes the panel after its own before it begins, so that it knows what to ask for.
    for (int64_t mine = taken++, next; mine < blocks * number; mine = next) {
      next = taken++;
      const float* const panel = panels + mine % number * width * PANEL;
      const float* const after = panels + next % number * width * PANEL;
      const int64_t column = mine % number * PANEL, block = mine / number * per_block;
      const int64_t last = block + per_block < tiles.count ? block + per_block : tiles.count;
      const int64_t tiles_here = last - block;
      for (int64_t k = 0; k < width; k += DEPTH) {
        const int64_t depth = width - k < DEPTH ? width - k : DEPTH;
        const int64_t lines = next < blocks * number ? PANEL * depth * sizeof(float) / LINE : 0;
        for (int64_t t = block; t < last; t++) {
          const int64_t start = tiles.start(t), count = tiles.start(t + 1) - start, part = t - block;
          const float* const rows_of_tile = packed + start * width + k * count;
          const int64_t asked = lines * part / tiles_here, to_ask = lines * (part + 1) / tiles_here - asked;
          const Ahead ahead{reinterpret_cast<const char*>(after + k * PANEL) + asked * LINE, to_ask};
          float* const to = out + start * outputs + column;
          const float* const begin = k == 0 ? bias + column : nullptr;
          if (column + PANEL <= outputs) {
            TILES[count](rows_of_tile, panel + k * PANEL, depth, begin, to, outputs, ahead);
            continue;
          }
          float whole[ROWS * PANEL];  // the last panel has more outputs than the matrix
          const int64_t there = (outputs - column) * static_cast<int64_t>(sizeof(float));
          for (int64_t i = 0; i < count; i++) std::memcpy(whole + i * PANEL, to + i * outputs, there);
          TILES[count](rows_of_tile, panel + k * PANEL, depth, begin, whole, PANEL, ahead);
          for (int64_t i = 0; i < count; i++) std::memcpy(to + i * outputs, whole + i * PANEL, there);
        }
      }
    }
  }
}
#endif
