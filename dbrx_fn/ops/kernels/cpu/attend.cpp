// Attention of several new tokens per row over a cache: clip, rotation, the cache's new keys and values, causal softmax.
//
// Queries that share keys are rows of one matrix, and go through the tiles of tiles.h. Keys that none of a block's
// queries sees are never read. Sums start with the first key, so a query's bits don't depend on the others.

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernel.h"
#include "pool.h"
#include "tiles.h"

using namespace dbrx;

namespace {

// About this many rows share a pass over the keys.
constexpr int64_t BLOCK_ROWS = 96;

struct Shape {
  int64_t batch, time, heads, kv_heads, width, capacity;

  int64_t group() const {
    return heads / kv_heads;
  }
  // Queries of each head in one block.
  int64_t queries() const {
    return std::max<int64_t>(1, BLOCK_ROWS / group());
  }
  int64_t blocks() const {
    return (time + queries() - 1) / queries();
  }
};

// Rotates a head's pairs: entry n with entry n + width / 2.
void turn(const float* from, const float* cosines, const float* sines, int64_t width, float clip, float* to) {
  const int64_t half = width / 2;
  for (int64_t n = 0; n < half; ++n) {
    const float a = std::clamp(from[n], -clip, clip), b = std::clamp(from[half + n], -clip, clip);
    to[n] = a * cosines[n] + b * sines[n];
    to[half + n] = b * cosines[n] + a * sines[half + n];
  }
}

// Scores become weights, not yet divided by their sum, which is returned. The last `size - seen` get none.
float soften(float* scores, int64_t seen, int64_t size) {
  const int64_t whole = seen / LANES * LANES;
  Floats most = splat(-HUGE_VALF);
  for (int64_t n = 0; n < whole; n += LANES) most = max(load(scores + n), most);
  float top = largest(most);
  for (int64_t n = whole; n < seen; ++n) top = std::max(top, scores[n]);
  Floats total = splat(0);
  for (int64_t n = 0; n < seen; n += LANES) {
    const int64_t count = std::min<int64_t>(LANES, seen - n);
    Floats v = count == LANES ? load(scores + n) : load_part(scores + n, count);
    v = exp(v - top);
    for (int64_t lane = count; lane < LANES; ++lane) v[lane] = 0;
    total += v;
    std::memcpy(scores + n, &v, count * sizeof(float));
  }
  std::memset(scores + seen, 0, (size - seen) * sizeof(float));
  return sum(total);
}

// Buffers of one thread.
struct Room {
  Buffer tile, products, queries, scores, weights;

  Room(const Shape& s, int64_t longest)
      : tile(TILE_SIZE),
        products(Packed::size(std::max(rows(s), s.width), TILE)),
        queries(rows(s) * s.width),
        scores(rows(s) * longest),
        weights(Packed::size(rows(s), s.width)) {}

  static int64_t rows(const Shape& s) {
    return s.group() * s.queries();
  }
};

// One block of queries `[group queries width]` of one key head, into `out` `[time heads width]`.
void attend_block(
    const Shape& s,
    const Room& room,
    const float* q,
    const float* keys,
    const Packed& values,
    const int32_t* positions,
    int64_t first,
    int64_t head,
    float* out) {
  const int64_t queries = std::min(s.queries(), s.time - first), rows = s.group() * queries;
  const int64_t last = positions[first + queries - 1] + 1;
  const Packed packed{room.weights.at(0), s.width, rows};
  for (int64_t row = 0; row < rows; row += MOST_ROWS) {
    packed.pack(row, [&](int64_t n) { return q + (n / queries * s.time + first + n % queries) * s.width; });
  }
  const Matrix key_rows{FLOAT32, FLOAT32, 1, last, s.width, reinterpret_cast<const char*>(keys), nullptr, nullptr};
  for (int64_t key = 0; key < last; key += TILE) {
    multiply(packed, key_rows, key, room.tile.at(0), room.products.at(0));
    const int64_t count = std::min<int64_t>(TILE, last - key);
    for (int64_t row = 0; row < rows; ++row) {
      std::memcpy(room.scores.at(row * last + key), room.products.at(row * TILE), count * sizeof(float));
    }
  }
  std::vector<float> sums(rows);
  for (int64_t row = 0; row < rows; ++row) {
    sums[row] = soften(room.scores.at(row * last), positions[first + row % queries] + 1, last);
  }
  const auto* scores = reinterpret_cast<const char*>(room.scores.at(0));
  const Matrix weights{FLOAT32, FLOAT32, 1, rows, last, scores, nullptr, nullptr};
  for (int64_t start = 0; start < rows; start += TILE) {
    multiply(values, weights, start, room.tile.at(0), room.products.at(0));
    for (int64_t row = start; row < std::min<int64_t>(start + TILE, rows); ++row) {
      float* to = out + ((first + row % queries) * s.heads + head + row / queries) * s.width;
      for (int64_t n = 0; n < s.width; ++n) to[n] = room.products.at(n * TILE)[row - start] / sums[row];
    }
  }
}

}  // namespace

// inputs: projections float32 `[batch time heads + 2 kv_heads, width]`, cosines float32 `[turns time width/2]`, sines
// float32 `[turns time 2 width/2]`, positions int32 `[batch time]`, keys and values float32 `[batch kv_heads capacity
// width]`. Positions of padding may be `capacity` or more. numbers: batch, time, heads, kv_heads, width, capacity, turns
// (1 or batch). constants: clip, scale.
// outputs: float32 `[batch time heads width]`, and the keys and values with the new ones.
DBRX_KERNEL(attend) {
  const int64_t* n = given.numbers;
  const Shape s{n[0], n[1], n[2], n[3], n[4], n[5]};
  const auto* projected = static_cast<const float*>(given.inputs[0]);
  const auto* cosines = static_cast<const float*>(given.inputs[1]);
  const auto* sines = static_cast<const float*>(given.inputs[2]);
  const auto* positions = static_cast<const int32_t*>(given.inputs[3]);
  auto* out = static_cast<float*>(given.outputs[0]);
  auto* keys = static_cast<float*>(given.outputs[1]);
  auto* values = static_cast<float*>(given.outputs[2]);
  const float clip = given.constants[0], scale = given.constants[1];
  const int64_t heads = s.heads + 2 * s.kv_heads, per_head = s.capacity * s.width;
  // Padding may lie behind the cache. It sees all keys and isn't written.
  std::vector<int32_t> ends(s.batch * s.time);
  for (size_t i = 0; i < ends.size(); ++i) ends[i] = std::min<int64_t>(positions[i], s.capacity - 1);
  const int64_t longest = ends.empty() ? 0 : *std::max_element(ends.begin(), ends.end()) + 1;
  const Buffer q(s.batch * s.heads * s.time * s.width);
  const Buffer packed_values(s.batch * s.kv_heads * Packed::size(s.width, longest));
  const auto values_of = [&](int64_t head) {
    return Packed{packed_values.at(head * Packed::size(s.width, longest)), longest, s.width};
  };
  Pool::get().run([&](Member& me) {
    me.spread(s.batch * s.time, 16, [&](int64_t start, int64_t stop) {
      for (int64_t i = start; i < stop; ++i) {
        const int64_t row = i / s.time, time = i % s.time, turned = (n[6] == 1 ? time : i) * s.width;
        const float* from = projected + i * heads * s.width;
        for (int64_t head = 0; head < s.heads; ++head) {
          float* to = q.at(((row * s.heads + head) * s.time + time) * s.width);
          turn(from + head * s.width, cosines + turned / 2, sines + turned, s.width, clip, to);
          for (int64_t k = 0; k < s.width; ++k) to[k] *= scale;
        }
        for (int64_t head = 0; positions[i] < s.capacity && head < s.kv_heads; ++head) {
          const int64_t place = (row * s.kv_heads + head) * per_head + positions[i] * s.width;
          const float* key = from + (s.heads + head) * s.width;
          turn(key, cosines + turned / 2, sines + turned, s.width, clip, keys + place);
          for (int64_t k = 0; k < s.width; ++k) {
            values[place + k] = std::clamp(key[s.kv_heads * s.width + k], -clip, clip);
          }
        }
      }
    });
    me.spread(s.batch * s.kv_heads, 1, [&](int64_t head, int64_t) {
      const int64_t seen = ends[(head / s.kv_heads + 1) * s.time - 1] + 1;
      const Packed to = values_of(head);
      for (int64_t first = 0; first < s.width; first += MOST_ROWS) {
        const int64_t wide = to.width(first), count = std::min(wide, s.width - first);
        for (int64_t i = 0; i < seen; ++i) {
          float* place = to.at(first, i);
          std::memcpy(place, values + head * per_head + i * s.width + first, count * sizeof(float));
          std::fill(place + count, place + wide, 0.0f);
        }
      }
    });
    const Room room(s, longest);
    const int64_t pieces = s.batch * s.kv_heads;
    me.spread(pieces * s.blocks(), 1, [&](int64_t piece, int64_t) {
      // The last queries see most, so they come first.
      const int64_t head = piece % pieces, row = head / s.kv_heads, own = head % s.kv_heads * s.group();
      const int64_t first = (s.blocks() - 1 - piece / pieces) * s.queries();
      const float* rotated = q.at((row * s.heads + own) * s.time * s.width);
      float* to = out + row * s.time * s.heads * s.width;
      attend_block(
          s, room, rotated, keys + head * per_head, values_of(head), &ends[row * s.time], first, own, to);
    });
  });
}
