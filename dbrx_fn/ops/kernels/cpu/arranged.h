// Memory for a kernel's activations, and rows of them arranged for products with a matrix.
#pragma once

#include <algorithm>
#include <vector>

#include "weights.h"

namespace dbrx {

// Memory for floats, kept from call to call.
class Scratch {
 public:
  void start() {
    used_ = 0;
  }

  // Room for `count` floats until the next `start`, at an address that is a multiple of 64.
  float* take(int64_t count) {
    if (used_ == blocks_.size()) blocks_.emplace_back();
    auto& block = blocks_[used_++];
    if (int64_t(block.size()) < count + 16) block.resize(count + 16);
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(block.data()) + 63) / 64 * 64);
  }

 private:
  std::vector<std::vector<float>> blocks_;
  size_t used_ = 0;
};

class Arranged {
 public:
  // Has room for rows of this matrix's input width. Called for each matrix before `make`.
  void need(const Matrix& m) {
    stride_ = std::max(stride_, arranged_size(m) + sums_size(m));
    need_narrow(m);
  }

  // Has room for what this matrix's adapter makes of rows that are arranged elsewhere.
  void need_narrow(const Matrix& m) {
    narrow_stride_ = std::max(narrow_stride_, narrow_size(m));
  }

  void make(Scratch& scratch, int64_t count) {
    room_ = scratch.take(count * stride_);
    narrow_room_ = scratch.take(count * narrow_stride_);
    rows_.resize(count);
    places_.resize(count);
    for (int64_t n = 0; n < count; ++n) places_[n] = &rows_[n];
  }

  // Arranges `x`, of row `row` of the batch.
  void set(const Matrix& m, int64_t n, const float* x, int64_t row) {
    set(m, n, x);
    set_narrow(m, n, x, row);
  }

  // As above, without what the adapter makes of `x`.
  const Row& set(const Matrix& m, int64_t n, const float* x) {
    float* to = room_ + n * stride_;
    return rows_[n] = arrange(m, x, to, to + arranged_size(m));
  }

  void share(int64_t n, const Row& arranged) {
    rows_[n] = arranged;
  }

  // What the adapter makes of `x`, of which row `n` is arranged.
  void set_narrow(const Matrix& m, int64_t n, const float* x, int64_t row) {
    if (!m.adapter.rank) return;
    float* to = narrow_room_ + n * narrow_stride_;
    narrow(m, x, row, to);
    rows_[n].narrow = to;
  }

  const Row* const* rows() const {
    return places_.data();
  }

 private:
  int64_t stride_ = 0, narrow_stride_ = 0;
  float* room_ = nullptr;
  float* narrow_room_ = nullptr;
  std::vector<Row> rows_;
  std::vector<const Row*> places_;
};

// Bytes of weights that a thread takes at once.
constexpr int64_t PIECE = 24576;

// How many rows of matrices with `outer` rows in all that is. Each of `threads` gets several pieces.
inline int64_t grain(const Matrix& m, int64_t outer, int threads) {
  return std::clamp<int64_t>(std::min(PIECE / m.row_bytes(), outer / (4 * threads)), 4, 64);
}

}  // namespace dbrx
