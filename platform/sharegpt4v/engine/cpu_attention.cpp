// Attention of a decode step on a CPU: each slot reads only its own live positions, in one call for all slots.
// engine/cpu_attention.py compiles it and says what the arguments are.

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

// e to the power of x <= 0, to 1e-7 of it; below -87 as at -87. A loop over it becomes vector instructions.
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

void store(float value, float& to) { to = value; }

void store(float value, uint16_t& to) {  // rounded to the nearest, a tie to even
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  const bool is_number = (word & 0x7fffffff) <= 0x7f800000;
  to = is_number ? static_cast<uint16_t>((word + 0x7fff + ((word >> 16) & 1)) >> 16) : 0x7fc0;
}

constexpr int BLOCK = 8;  // positions computed together: a query or a sum is read once for all of them

template <typename T, int WIDTH, int COUNT>
void score(const float* asked, const T* keys, float* scores) {
  float sums[COUNT] = {};
  for (int i = 0; i < WIDTH; i++)
    for (int j = 0; j < COUNT; j++) sums[j] += asked[i] * widened(keys[j * WIDTH + i]);
  for (int j = 0; j < COUNT; j++) scores[j] = sums[j];
}

template <typename T, int WIDTH, int COUNT>
void mix(const float* shares, const T* values, float* sums) {
  for (int i = 0; i < WIDTH; i++) {
    float sum = sums[i];
    for (int j = 0; j < COUNT; j++) sum += shares[j] * widened(values[j * WIDTH + i]);
    sums[i] = sum;
  }
}

// The queries of one slot that share one head of keys. room: for `group` rows of scores, of queries and of sums.
template <typename T, int WIDTH>
void attend(const T* query, const T* keys, const T* values, int64_t live, int64_t group, T* out, float* room) {
  float* const scores = room;
  float* const asked = scores + group * live;
  float* const sums = asked + group * WIDTH;
  const float scale = 1.0f / std::sqrt(static_cast<float>(WIDTH));
  for (int64_t i = 0; i < group * WIDTH; i++) {
    asked[i] = widened(query[i]) * scale;
    sums[i] = 0.0f;
  }
  int64_t position = 0;
  for (; position + BLOCK <= live; position += BLOCK)
    for (int64_t row = 0; row < group; row++)
      score<T, WIDTH, BLOCK>(asked + row * WIDTH, keys + position * WIDTH, scores + row * live + position);
  for (; position < live; position++)
    for (int64_t row = 0; row < group; row++)
      score<T, WIDTH, 1>(asked + row * WIDTH, keys + position * WIDTH, scores + row * live + position);
  for (int64_t row = 0; row < group; row++) {
    float* const own = scores + row * live;
    float best = own[0], total = 0.0f;
    for (int64_t i = 1; i < live; i++) best = own[i] > best ? own[i] : best;
    for (int64_t i = 0; i < live; i++) {
      own[i] = exponential(own[i] - best);
      total += own[i];
    }
    const float share = 1.0f / total;
    for (int64_t i = 0; i < live; i++) own[i] *= share;
  }
  for (position = 0; position + BLOCK <= live; position += BLOCK)
    for (int64_t row = 0; row < group; row++)
      mix<T, WIDTH, BLOCK>(scores + row * live + position, values + position * WIDTH, sums + row * WIDTH);
  for (; position < live; position++)
    for (int64_t row = 0; row < group; row++)
      mix<T, WIDTH, 1>(scores + row * live + position, values + position * WIDTH, sums + row * WIDTH);
  for (int64_t i = 0; i < group * WIDTH; i++) store(sums[i], out[i]);
}

template <typename T, int WIDTH>
void attend_all(const T* query, const T* keys, const T* values, const int64_t* positions, T* out, int64_t slots,
                int64_t kept, int64_t group, int64_t context, int64_t query_row, int64_t threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> room(group * (context + 2 * WIDTH));
    // A thread that has lost its core meanwhile leaves its part to the others.
#pragma omp for schedule(dynamic, 4)
    for (int64_t number = 0; number < slots * kept; number++) {
      const int64_t slot = number / kept, head = number % kept, cells = number * context * WIDTH;
      attend<T, WIDTH>(query + slot * query_row + head * group * WIDTH, keys + cells, values + cells,
                       positions[slot] + 1, group, out + number * group * WIDTH, room.data());
    }
  }
}

}  // namespace

#define ENTRY(NAME, T, WIDTH)                                                                                 \
  extern "C" void NAME##_##WIDTH(const T* query, const T* keys, const T* values, const int64_t* positions,    \
                                 T* out, int64_t slots, int64_t kept, int64_t group, int64_t context,         \
                                 int64_t query_row, int64_t threads) {                                        \
    attend_all<T, WIDTH>(query, keys, values, positions, out, slots, kept, group, context, query_row, threads); \
  }
#define ENTRIES(WIDTH) ENTRY(float32, float, WIDTH) ENTRY(bfloat16, uint16_t, WIDTH)
ENTRIES(16)
ENTRIES(32)
ENTRIES(64)
ENTRIES(80)
ENTRIES(96)
ENTRIES(128)
ENTRIES(256)
