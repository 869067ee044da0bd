// What surrounds the matrices of a Llama layer on a CPU; cpu_kernels.py compiles it and passes the arguments.
// Numbers are float32 or bfloat16 (as uint16_t). Sums are float32 and rounded once. WIDTH is that of a head.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

float widened(float value) { return value; }

float widened(uint16_t bfloat16) {
  const uint32_t word = static_cast<uint32_t>(bfloat16) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

void store(float value, float& to) { to = value; }

void store(float value, uint16_t& to) {  // rounded to the nearest, a tie to even
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  const bool is_number = (word & 0x7fffffff) <= 0x7f800000;
  to = is_number ? static_cast<uint16_t>((word + 0x7fff + ((word >> 16) & 1)) >> 16) : 0x7fc0;
}

// e to the power of x <= 0, within 3e-7 of it; below -87 as at -87. A loop over it becomes vector instructions.
float exponential(float x) {
  const float powers = (x < -87.0f ? -87.0f : x) * 1.44269504f;
  const float whole = std::floor(powers), rest = (powers - whole) * 0.693147181f;
  float sum = 1.0f / 5040;
  for (const float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = sum * rest + factor;
  const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return sum * power;
}

// Attention of one query over the live positions of its slot

constexpr int BLOCK = 8;  // positions computed together: a query or a sum is read once for all of them

// Asks for the memory that the block after the next ones reads: a slot's part is too short for the processor to
// find out by itself. It may lie beyond the end, where asking has no effect.
template <typename T>
void ask_ahead(const T* from) {
  constexpr int AHEAD = 1024, LINE = 64;
  const char* const memory = reinterpret_cast<const char*>(from) + AHEAD;
  for (size_t byte = 0; byte < BLOCK * WIDTH * sizeof(T); byte += LINE) __builtin_prefetch(memory + byte);
}

template <typename T, int COUNT>
void score(const float* query, const T* keys, float* scores) {
  float sums[COUNT] = {};
  for (int i = 0; i < WIDTH; i++)
    for (int j = 0; j < COUNT; j++) sums[j] += query[i] * widened(keys[j * WIDTH + i]);
  for (int j = 0; j < COUNT; j++) scores[j] = sums[j];
}

template <typename T, int COUNT>
void mix(const float* shares, const T* values, float* sums) {
  for (int i = 0; i < WIDTH; i++) {
    float sum = sums[i];
    for (int j = 0; j < COUNT; j++) sum += shares[j] * widened(values[j * WIDTH + i]);
    sums[i] = sum;
  }
}

// scores: room for `live` of them.
template <typename T>
void attend(const T* query, const T* keys, const T* values, int64_t live, T* out, float* scores) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(WIDTH));
  float asked[WIDTH], sums[WIDTH] = {};
  for (int i = 0; i < WIDTH; i++) asked[i] = widened(query[i]) * scale;
  int64_t position = 0;
  for (; position + BLOCK <= live; position += BLOCK) {
    ask_ahead(keys + position * WIDTH);
    score<T, BLOCK>(asked, keys + position * WIDTH, scores + position);
  }
  for (; position < live; position++) score<T, 1>(asked, keys + position * WIDTH, scores + position);
  float best = scores[0], total = 0.0f;
  for (int64_t i = 1; i < live; i++) best = scores[i] > best ? scores[i] : best;
  for (int64_t i = 0; i < live; i++) {
    scores[i] = exponential(scores[i] - best);
    total += scores[i];
  }
  for (position = 0; position + BLOCK <= live; position += BLOCK) {
    ask_ahead(values + position * WIDTH);
    mix<T, BLOCK>(scores + position, values + position * WIDTH, sums);
  }
  for (; position < live; position++) mix<T, 1>(scores + position, values + position * WIDTH, sums);
  for (int i = 0; i < WIDTH; i++) store(sums[i] / total, out[i]);
}

template <typename T>
void attend_all(const T* query, const T* keys, const T* values, const int64_t* positions, T* out, int64_t slots,
                int64_t kept, int64_t group, int64_t context, int64_t query_row, int64_t threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> scores(context);
    // A thread that has lost its core meanwhile leaves its part to the others.
#pragma omp for schedule(dynamic, 4)
    for (int64_t number = 0; number < slots * kept; number++) {
      const int64_t slot = number / kept, head = number % kept, cells = number * context * WIDTH;
      for (int64_t row = 0; row < group; row++)
        attend<T>(query + slot * query_row + (head * group + row) * WIDTH, keys + cells, values + cells,
                  positions[slot] + 1, out + (number * group + row) * WIDTH, scores.data());
    }
  }
}

// The small operations

template <typename T>
void add_norm(T* hidden, const T* delta, const T* norm, T* normed, int64_t rows, int64_t width, float eps,
              int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < rows; row++) {
    T* const own = hidden + row * width;
    float squares = 0.0f;
    if (delta != nullptr)
      for (int64_t i = 0; i < width; i++) store(widened(own[i]) + widened(delta[row * width + i]), own[i]);
    for (int64_t i = 0; i < width; i++) squares += widened(own[i]) * widened(own[i]);
    const float scale = 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
    for (int64_t i = 0; i < width; i++) store(widened(own[i]) * scale * widened(norm[i]), normed[row * width + i]);
  }
}

template <typename T>
void rotate_store(T* qkv, const float* cos, const float* sin, const int64_t* slots, const int64_t* cells, T* keys,
                  T* values, int64_t tokens, int64_t asking, int64_t kept, int64_t width, int64_t context,
                  int64_t threads) {
  const int64_t half = width / 2;
#pragma omp parallel for num_threads(threads)
  for (int64_t token = 0; token < tokens; token++) {
    T* const row = qkv + token * (asking + 2 * kept) * width;
    const float *const angle_cos = cos + token * width, *const angle_sin = sin + token * width;
    for (int64_t head = 0; head < asking + kept; head++) {
      T *const left = row + head * width, *const right = left + half;
      for (int64_t i = 0; i < half; i++) {
        const float one = widened(left[i]), other = widened(right[i]);
        store(one * angle_cos[i] - other * angle_sin[i], left[i]);
        store(other * angle_cos[half + i] + one * angle_sin[half + i], right[i]);
      }
    }
    for (int64_t head = 0; head < kept; head++) {
      const int64_t place = ((slots[token] * kept + head) * context + cells[token]) * width;
      std::memcpy(keys + place, row + (asking + head) * width, width * sizeof(T));
      std::memcpy(values + place, row + (asking + kept + head) * width, width * sizeof(T));
    }
  }
}

template <typename T>
void gate(const T* gate_up, T* gated, int64_t rows, int64_t width, int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < rows; row++)
    for (int64_t i = 0; i < width; i++) {
      const float opening = widened(gate_up[2 * row * width + i]), up = widened(gate_up[(2 * row + 1) * width + i]);
      const float small = exponential(-std::fabs(opening));
      store(opening * (opening < 0.0f ? small : 1.0f) / (1.0f + small) * up, gated[row * width + i]);
    }
}

}  // namespace

#define KERNELS(NAME, T)                                                                                            \
  extern "C" void attend_##NAME(const T* query, const T* keys, const T* values, const int64_t* positions, T* out,   \
                                int64_t slots, int64_t kept, int64_t group, int64_t context, int64_t query_row,     \
                                int64_t threads) {                                                                  \
    attend_all<T>(query, keys, values, positions, out, slots, kept, group, context, query_row, threads);            \
  }                                                                                                                 \
  extern "C" void add_norm_##NAME(T* hidden, const T* delta, const T* norm, T* normed, int64_t rows, int64_t width, \
                                  int64_t threads, float eps) {                                                     \
    add_norm<T>(hidden, delta, norm, normed, rows, width, eps, threads);                                            \
  }                                                                                                                 \
  extern "C" void rotate_store_##NAME(T* qkv, const float* cos, const float* sin, const int64_t* slots,             \
                                      const int64_t* cells, T* keys, T* values, int64_t tokens, int64_t asking,     \
                                      int64_t kept, int64_t width, int64_t context, int64_t threads) {              \
    rotate_store<T>(qkv, cos, sin, slots, cells, keys, values, tokens, asking, kept, width, context, threads);      \
  }                                                                                                                 \
  extern "C" void gate_##NAME(const T* gate_up, T* gated, int64_t rows, int64_t width, int64_t threads) {           \
    gate<T>(gate_up, gated, rows, width, threads);                                                                  \
  }

KERNELS(float32, float)
KERNELS(bfloat16, uint16_t)
