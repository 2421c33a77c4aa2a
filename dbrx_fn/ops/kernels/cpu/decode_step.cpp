// One token of each of several rows through the whole model, from ids to logits.
//
// Threads share each product's outputs and meet between the parts. A row's results don't depend on the other rows: its
// sums have one order, and its attention ends at its own position.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "attention.h"
#include "experts.h"
#include "floats.h"
#include "kernel.h"
#include "norm.h"

namespace dbrx {
namespace {

constexpr int64_t WIDEST_HEAD = 1024;

struct Layer {
  const void* norm_1;
  Matrix wqkv;
  Matrix out_proj;
  const void* norm_2;
  Matrix router;
  Matrix w1;
  Matrix v1;
  Matrix w2;
  void* keys;
  void* values;
};

// What each thread has for itself.
struct Own {
  std::vector<float> norm_weight;
  std::vector<float> room;
  Chosen chosen;
};

class Step {
 public:
  // `decode_step.py` gives the order of numbers, inputs and outputs.
  explicit Step(const Arguments& given) {
    const int64_t* numbers = given.numbers;
    const void* const* inputs = given.inputs;
    void* const* outputs = given.outputs;
    for (int64_t* to : {&batch_, &capacity_, &n_heads_, &kv_heads_, &head_dim_, &experts_, &top_k_}) *to = *numbers++;
    dtype_ = Kind(*numbers++);
    layers_.resize(*numbers++);
    eps_ = given.constants[0], clip_ = given.constants[1], order_ = given.constants[2];
    tokens_ = static_cast<const uint32_t*>(*inputs++);
    const auto* places = static_cast<const int32_t*>(*inputs++);
    for (int64_t n = 0; n < batch_; ++n) {
      if (!places[batch_ + n]) continue;
      rows_.push_back(n);
      positions_.push_back(places[n]);
    }
    frequencies_ = static_cast<const float*>(*inputs++);
    logits_ = *outputs++;
    top_experts_ = static_cast<uint32_t*>(*outputs++);
    wte_ = next_adapted(numbers, inputs, dtype_);
    for (auto& layer : layers_) {
      layer.norm_1 = *inputs++;
      layer.wqkv = next_adapted(numbers, inputs, dtype_);
      layer.out_proj = next_adapted(numbers, inputs, dtype_);
      layer.norm_2 = *inputs++;
      layer.router = next_adapted(numbers, inputs, dtype_);
      layer.w1 = next_adapted(numbers, inputs, dtype_);
      layer.v1 = next_adapted(numbers, inputs, dtype_);
      layer.w2 = next_adapted(numbers, inputs, dtype_);
      inputs += 2;
      layer.keys = *outputs++, layer.values = *outputs++;
    }
    norm_f_ = *inputs++;
    head_ = next_adapted(numbers, inputs, dtype_);
    d_model_ = wte_.inner;
    ffn_ = layers_[0].w1.outer;
    count_ = int64_t(rows_.size());
  }

  void run(Scratch& scratch) {
    std::fill_n(top_experts_, int64_t(layers_.size()) * batch_ * top_k_, 0u);
    if (count_ < batch_) std::memset(logits_, 0, batch_ * head_.outer * (dtype_ == FLOAT32 ? 4 : 2));
    if (!count_) return;
    make_room(scratch);
    Pool::get().run([&](Member& me) {
      Own own;
      own.norm_weight.resize(d_model_);
      own.room.resize(experts_);
      me.spread(count_, 1, [&](int64_t n, int64_t) { embed(n); });
      for (size_t n = 0; n < layers_.size(); ++n) {
        attention_half(me, own, layers_[n]);
        expert_half(me, own, layers_[n], top_experts_ + int64_t(n) * batch_ * top_k_);
      }
      const float* weight = floats_of(dtype_, norm_f_, d_model_, own.norm_weight.data());
      me.spread(count_, 1, [&](int64_t n, int64_t) { head_rows_.set(head_, n, normed(weight, n), rows_[n]); });
      product(me, head_, head_rows_, [&](int64_t n, int64_t j, float y) {
        put(dtype_, logits_, rows_[n] * head_.outer + j, y);
      });
    });
  }

 private:
  void make_room(Scratch& scratch) {
    scratch.start();
    const int64_t chunks = *std::max_element(positions_.begin(), positions_.end()) / CHUNK + 1;
    chunks_ = chunks;
    x_ = scratch.take(count_ * d_model_);
    normed_ = scratch.take(count_ * d_model_);
    turns_ = scratch.take(count_ * head_dim_);
    qkv_ = scratch.take(count_ * (n_heads_ + 2 * kv_heads_) * head_dim_);
    attended_ = scratch.take(count_ * n_heads_ * head_dim_);
    parts_ = scratch.take(count_ * n_heads_ * chunks * (head_dim_ + PART_EXTRA));
    weights_ = scratch.take(count_ * top_k_);
    gate_ = scratch.take(count_ * top_k_ * ffn_);
    up_ = scratch.take(count_ * top_k_ * ffn_);
    top_.resize(count_ * top_k_);
    for (const auto& layer : layers_) {
      qkv_rows_.need(layer.wqkv);
      out_rows_.need(layer.out_proj);
      router_rows_.need(layer.router);
      gate_rows_.need(layer.w1);
      gate_pairs_.need_narrow(layer.w1);
      up_pairs_.need_narrow(layer.v1);
      down_rows_.need(layer.w2);
    }
    head_rows_.need(head_);
    for (auto* rows : {&qkv_rows_, &out_rows_, &router_rows_, &gate_rows_, &head_rows_}) rows->make(scratch, count_);
    for (auto* rows : {&gate_pairs_, &up_pairs_, &down_rows_}) rows->make(scratch, count_ * top_k_);
  }

  // Calls `put(n, j, y)` for output j of each row n.
  template <class Put>
  void product(Member& me, const Matrix& m, const Arranged& x, const Put& put) {
    me.spread(m.outer, grain(m, m.outer, me.count), [&](int64_t first, int64_t last) {
      float out[MOST_ROWS];
      for (int64_t j = first; j < last; ++j) {
        dots(m, j, x.rows(), count_, out);
        for (int64_t n = 0; n < count_; ++n) put(n, j, out[n]);
      }
    });
  }

  const float* normed(const float* weight, int64_t n) {
    float* to = normed_ + n * d_model_;
    layer_norm(x_ + n * d_model_, weight, d_model_, eps_, to);
    return to;
  }

  // The token's row, and the rotation at its position. An unknown id makes the row NaN.
  void embed(int64_t n) {
    const uint32_t token = tokens_[rows_[n]];
    float* x = x_ + n * d_model_;
    if (token < uint64_t(wte_.outer)) {
      adapted_as_floats(wte_, token, rows_[n], x);
    } else {
      std::fill_n(x, d_model_, std::numeric_limits<float>::quiet_NaN());
    }
    const int64_t half = head_dim_ / 2;
    float* turns = turns_ + n * head_dim_;
    for (int64_t k = 0; k < half; ++k) {
      const double angle = float(positions_[n]) * frequencies_[k];
      turns[k] = float(std::cos(angle));
      turns[half + k] = float(std::sin(angle));
    }
  }

  void attention_half(Member& me, Own& own, const Layer& layer) {
    const int64_t width = (n_heads_ + 2 * kv_heads_) * head_dim_;
    const float* weight = floats_of(dtype_, layer.norm_1, d_model_, own.norm_weight.data());
    me.spread(count_, 1, [&](int64_t n, int64_t) { qkv_rows_.set(layer.wqkv, n, normed(weight, n), rows_[n]); });
    product(me, layer.wqkv, qkv_rows_, [&](int64_t n, int64_t j, float y) {
      qkv_[n * width + j] = y < -clip_ ? -clip_ : y > clip_ ? clip_ : y;
    });
    me.spread(count_ * kv_heads_ * chunks_, 1, [&](int64_t unit, int64_t) {
      attend_chunk(layer, unit / chunks_ / kv_heads_, unit / chunks_ % kv_heads_, unit % chunks_);
    });
    me.spread(count_, 1, [&](int64_t n, int64_t) {
      const int64_t size = head_dim_ + PART_EXTRA;
      float* attended = attended_ + n * n_heads_ * head_dim_;
      for (int64_t h = 0; h < n_heads_; ++h) {
        const float* parts = parts_ + (n * n_heads_ + h) * chunks_ * size;
        merge(parts, positions_[n] / CHUNK + 1, size, head_dim_, attended + h * head_dim_);
      }
      out_rows_.set(layer.out_proj, n, attended, rows_[n]);
    });
    product(me, layer.out_proj, out_rows_, [&](int64_t n, int64_t j, float y) { x_[n * d_model_ + j] += y; });
  }

  // The queries of one key head over one chunk of the cache. The chunk of the new token is written first.
  void attend_chunk(const Layer& layer, int64_t n, int64_t kv, int64_t chunk) {
    const int64_t position = positions_[n], first = chunk * CHUNK, group = n_heads_ / kv_heads_;
    if (first > position) return;
    const int64_t count = std::min(CHUNK, position + 1 - first);
    const int64_t base = (rows_[n] * kv_heads_ + kv) * capacity_ * head_dim_;
    const int64_t bytes = base * (dtype_ == FLOAT32 ? 4 : 2);
    void* keys = static_cast<char*>(layer.keys) + bytes;
    void* values = static_cast<char*>(layer.values) + bytes;
    const float* heads = qkv_ + n * (n_heads_ + 2 * kv_heads_) * head_dim_;
    const float* turns = turns_ + n * head_dim_;
    float turned[WIDEST_HEAD];
    if (position < first + CHUNK) {
      rotate(heads + (n_heads_ + kv) * head_dim_, turns, head_dim_, 1, turned);
      put_all(dtype_, keys, position * head_dim_, turned, head_dim_);
      put_all(dtype_, values, position * head_dim_, heads + (n_heads_ + kv_heads_ + kv) * head_dim_, head_dim_);
    }
    const float scale = float(1 / std::sqrt(double(head_dim_)));
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
      rotate(heads + h * head_dim_, turns, head_dim_, scale, turned);
      float* part = parts_ + ((n * n_heads_ + h) * chunks_ + chunk) * (head_dim_ + PART_EXTRA);
      attend(dtype_, turned, keys, values, first, count, head_dim_, part);
    }
  }

  void expert_half(Member& me, Own& own, const Layer& layer, uint32_t* top_experts) {
    const float* weight = floats_of(dtype_, layer.norm_2, d_model_, own.norm_weight.data());
    me.spread(count_, 1, [&](int64_t n, int64_t) {
      const float* x = normed(weight, n);
      router_rows_.set(layer.router, n, x, rows_[n]);
      const Row row = gate_rows_.set(layer.w1, n, x);
      for (int64_t pair = n * top_k_; pair < (n + 1) * top_k_; ++pair) {
        gate_pairs_.share(pair, row);
        up_pairs_.share(pair, row);
      }
      route(own, layer.router, n);
      std::copy_n(&top_[n * top_k_], top_k_, top_experts + rows_[n] * top_k_);
    });
    if (layer.w1.adapter.rank || layer.v1.adapter.rank) {
      spread_pairs(me, [&](int64_t pair, int64_t expert, int64_t n) {
        gate_pairs_.set_narrow(layer.w1.of(expert), pair, normed_ + n * d_model_, rows_[n]);
        up_pairs_.set_narrow(layer.v1.of(expert), pair, normed_ + n * d_model_, rows_[n]);
      });
    }
    own.chosen.sort(top_.data(), count_ * top_k_, experts_);
    hidden_of(me, layer.w1, layer.v1, own.chosen, gate_pairs_.rows(), up_pairs_.rows(), gate_, up_);
    spread_pairs(me, [&](int64_t pair, int64_t expert, int64_t n) {
      down_rows_.set(layer.w2.of(expert), pair, gate_ + pair * ffn_, rows_[n]);
    });
    add_outputs(me, layer.w2, own.chosen, down_rows_.rows(), weights_, top_k_, x_);
  }

  // Calls `work(pair, its expert, its row)` for each row's choices.
  template <class Work>
  void spread_pairs(Member& me, const Work& work) {
    me.spread(count_ * top_k_, 1, [&](int64_t pair, int64_t) { work(pair, top_[pair], pair / top_k_); });
  }

  void route(Own& own, const Matrix& router, int64_t n) {
    std::vector<float> logits(experts_);
    for (int64_t e = 0; e < experts_; ++e) dots(router, e, router_rows_.rows() + n, 1, &logits[e]);
    choose(logits.data(), experts_, top_k_, order_, &top_[n * top_k_], weights_ + n * top_k_, own.room.data());
  }

  int64_t batch_, capacity_, n_heads_, kv_heads_, head_dim_, experts_, top_k_, d_model_, ffn_, count_, chunks_;
  Kind dtype_;
  float eps_, clip_, order_;
  std::vector<Layer> layers_;
  Matrix wte_, head_;
  const void* norm_f_;
  const uint32_t* tokens_;
  const float* frequencies_;
  void* logits_;
  uint32_t* top_experts_;
  // The rows that have a token, and its position in each.
  std::vector<int64_t> rows_, positions_;
  float *x_, *normed_, *turns_, *qkv_, *attended_, *parts_, *weights_, *gate_, *up_;
  std::vector<uint32_t> top_;
  Arranged qkv_rows_, out_rows_, router_rows_, gate_rows_, gate_pairs_, up_pairs_, down_rows_, head_rows_;
};

}  // namespace
}  // namespace dbrx

DBRX_KERNEL(decode_step) {
  thread_local dbrx::Scratch scratch;
  dbrx::Step(given).run(scratch);
}
