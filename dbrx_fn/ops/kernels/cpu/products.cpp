// Few rows times a matrix, and LayerNorm.

#include <vector>

#include "kernel.h"
#include "norm.h"
#include "pool.h"
#include "weights.h"

using namespace dbrx;

// inputs: the matrix's leaves, x float32 `[rows inner]`. numbers: the matrix's, rows. output: float32 `[rows outer]`.
DBRX_KERNEL(linear) {
  const int64_t* numbers = given.numbers;
  const void* const* inputs = given.inputs;
  const Matrix m = next_matrix(numbers, inputs);
  const int64_t count = numbers[0], size = arranged_size(m), groups = sums_size(m);
  const auto* x = static_cast<const float*>(inputs[0]);
  auto* out = static_cast<float*>(given.outputs[0]);
  std::vector<float> arranged(count * (size + groups));
  std::vector<Row> rows(count);
  std::vector<const Row*> places(count);
  Pool::get().run([&](Member& me) {
    me.spread(count, 1, [&](int64_t n, int64_t) {
      float* to = arranged.data() + n * (size + groups);
      rows[n] = arrange(m, x + n * m.inner, to, to + size);
      places[n] = &rows[n];
    });
    me.spread(m.outer, 16, [&](int64_t first, int64_t last) {
      std::vector<float> products(count);
      for (int64_t row = first; row < last; ++row) {
        dots(m, row, places.data(), count, products.data());
        for (int64_t n = 0; n < count; ++n) out[n * m.outer + row] = products[n];
      }
    });
  });
}

// inputs: weight float32 `[width]`, x float32 `[rows width]`. numbers: rows, width. constants: eps.
DBRX_KERNEL(layer_norm) {
  const int64_t rows = given.numbers[0], width = given.numbers[1];
  const auto* weight = static_cast<const float*>(given.inputs[0]);
  const auto* x = static_cast<const float*>(given.inputs[1]);
  auto* out = static_cast<float*>(given.outputs[0]);
  Pool::get().run([&](Member& me) {
    me.spread(rows, 8, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) {
        layer_norm(x + n * width, weight, width, given.constants[0], out + n * width);
      }
    });
  });
}
