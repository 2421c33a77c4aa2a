// Kernels as MLX operations: lazy, usable in mx.compile, and with a twin's derivatives.
//
// Only this file includes MLX's headers. Python gives arrays as addresses of their C++ values (`library.py`).

#include <algorithm>
#include <cstring>
#include <exception>
#include <future>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernel.h"
#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/primitives.h"
#include "mlx/transforms.h"
#include "mlx/version.h"

namespace mx = mlx::core;
using Arrays = std::vector<mx::array>;

namespace {

// Calls the Python function that is registered under a number. Returns 0, or 1 if it raised.
using CallTwin = int (*)(int twin, mx::array* inputs, int n_inputs, mx::array* outputs, int n_outputs);
CallTwin call_twin = nullptr;

thread_local std::string problem;

struct Operand {
  const char* data;
  size_t size;
  size_t itemsize;
  mx::Shape shape;
  mx::Strides strides;

  explicit Operand(const mx::array& a)
      : data(a.data<char>()), size(a.size()), itemsize(a.itemsize()), shape(a.shape()), strides(a.strides()) {}

  void copy_to(char* to) const {
    std::vector<int> index(shape.size(), 0);
    int64_t place = 0;
    for (size_t n = 0; n < size; ++n, to += itemsize) {
      std::memcpy(to, data + place * static_cast<int64_t>(itemsize), itemsize);
      for (size_t axis = shape.size(); axis-- > 0;) {
        place += strides[axis];
        if (++index[axis] < shape[axis]) break;
        place -= strides[axis] * shape[axis];
        index[axis] = 0;
      }
    }
  }
};

struct Copy {
  Operand from;
  char* to;
  bool contiguous;

  void operator()() const {
    if (contiguous) {
      std::memcpy(to, from.data, from.size * from.itemsize);
    } else {
      from.copy_to(to);
    }
  }
};

class Launch : public mx::Primitive {
 public:
  Launch(
      mx::Stream stream,
      dbrx::Kernel kernel,
      std::vector<int64_t> numbers,
      std::vector<float> constants,
      std::vector<int> taken,
      int twin)
      : Primitive(stream),
        kernel_(kernel),
        numbers_(std::move(numbers)),
        constants_(std::move(constants)),
        taken_(std::move(taken)),
        twin_(twin) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    // Each output holds all inputs, but only the one that MLX evaluates needs them. An input that nobody else holds is
    // donatable then.
    bool traced = false;
    for (auto& output : outputs) traced |= output.is_tracer();
    for (auto& output : outputs) {
      if (!traced && &output.inputs() != &inputs) output.inputs().clear();
    }
    wait_for_readers(inputs);
    std::vector<Copy> copies;
    std::vector<void*> results;
    for (size_t n = 0; n < outputs.size(); ++n) {
      auto& output = outputs[n];
      if (taken_[n] < 0) {
        output.set_data(mx::allocator::malloc(output.nbytes()));
      } else {
        const auto& input = inputs[taken_[n]];
        const bool contiguous = input.flags().row_contiguous;
        if (contiguous && input.is_donatable()) {
          output.copy_shared_buffer(input);
        } else {
          output.set_data(mx::allocator::malloc(output.nbytes()));
          copies.push_back({Operand(input), output.data<char>(), contiguous});
        }
      }
      results.push_back(output.data<void>());
    }
    std::vector<const void*> operands;
    std::vector<std::shared_ptr<char[]>> temporaries;
    for (size_t n = 0; n < inputs.size(); ++n) {
      const auto& input = inputs[n];
      const bool written = std::find(taken_.begin(), taken_.end(), static_cast<int>(n)) != taken_.end();
      if (written || input.flags().row_contiguous) {
        operands.push_back(input.data<void>());
        continue;
      }
      temporaries.emplace_back(new char[input.nbytes()]);
      copies.push_back({Operand(input), temporaries.back().get(), false});
      operands.push_back(temporaries.back().get());
    }
    auto& encoder = mx::cpu::get_command_encoder(stream());
    encoder.dispatch([kernel = kernel_,
                      numbers = numbers_,
                      constants = constants_,
                      copies = std::move(copies),
                      temporaries = std::move(temporaries),
                      operands = std::move(operands),
                      results = std::move(results)] {
      for (const auto& copy : copies) copy();
      kernel({operands.data(), results.data(), numbers.data(), constants.data()});
    });
  }

  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error("dbrx_fn's kernels for the CPU don't run on a GPU.");
  }

  std::vector<mx::array> jvp(const Arrays& primals, const Arrays& tangents, const std::vector<int>& places) override {
    return mx::jvp(by(primals, places), chosen(primals, places), tangents).second;
  }

  std::vector<mx::array> vjp(
      const Arrays& primals,
      const Arrays& cotangents,
      const std::vector<int>& places,
      const Arrays&) override {
    return mx::vjp(by(primals, places), chosen(primals, places), cotangents).second;
  }

  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs, const std::vector<int>& axes) override {
    auto outputs = mx::vmap([this](const Arrays& given) { return twin(given); }, axes)(inputs);
    return {outputs, std::vector<int>(outputs.size(), 0)};
  }

  const char* name() const override {
    return "DbrxKernel";
  }

  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> dtypes;

 private:
  // MLX holds the data of a scheduled operation's arrays until it has run. Data that are to be written to are waited
  // for, since copying them would take longer.
  void wait_for_readers(const Arrays& inputs) {
    const auto is_held = [&](int place) { return place >= 0 && inputs[place].data_shared_ptr().use_count() > 1; };
    if (std::none_of(taken_.begin(), taken_.end(), is_held)) return;
    auto done = std::make_shared<std::promise<void>>();
    auto waited = done->get_future();
    mx::cpu::get_command_encoder(stream()).dispatch([done] { done->set_value(); });
    waited.wait();
  }

  Arrays twin(Arrays inputs) const {
    Arrays outputs(shapes.size(), mx::array(0.0f));
    if (call_twin(twin_, inputs.data(), inputs.size(), outputs.data(), outputs.size())) {
      throw std::runtime_error("The stock operations of a kernel raised; see the error above.");
    }
    return outputs;
  }

  static Arrays chosen(const Arrays& all, const std::vector<int>& places) {
    Arrays some;
    for (int place : places) some.push_back(all[place]);
    return some;
  }

  // The twin as a function of the inputs at `places`.
  std::function<Arrays(const Arrays&)> by(const Arrays& all, const std::vector<int>& places) const {
    return [this, all, places](const Arrays& some) {
      Arrays filled = all;
      for (size_t n = 0; n < places.size(); ++n) filled[places[n]] = some[n];
      return twin(filled);
    };
  }

  dbrx::Kernel kernel_;
  std::vector<int64_t> numbers_;
  std::vector<float> constants_;
  // For each output the input whose contents it starts with, or -1.
  std::vector<int> taken_;
  int twin_;
};

const mx::Dtype DTYPES[] = {mx::float32, mx::bfloat16, mx::float16, mx::uint32, mx::int32, mx::uint8};

}  // namespace

extern "C" {

// The layout as C++ sees it, for the check when the library is loaded.
int dbrx_mlx_version() {
  return MLX_VERSION_NUMERIC;
}

int dbrx_array_size() {
  return sizeof(mx::array);
}

const char* dbrx_running_version() {
  return mx::version();
}

// `axes` gets the shape of at most 8 axes. Returns the number of axes, or -1 if there are more.
int dbrx_describe(const mx::array* a, int* axes, int* dtype) {
  *dtype = -1;
  for (int n = 0; n < 6; ++n) {
    if (a->dtype() == DTYPES[n]) *dtype = n;
  }
  if (a->ndim() > 8) return -1;
  for (size_t n = 0; n < a->ndim(); ++n) axes[n] = a->shape(n);
  return a->ndim();
}

// Writes the dtypes and shapes of some arrays, some of them null, as bytes that identify them. Returns their number, or
// -1 if there is no room.
int dbrx_signature(int n_arrays, const mx::array* const* arrays, char* to, int room) {
  int used = 0;
  const auto write = [&](const void* from, int bytes) {
    if (used + bytes <= room) std::memcpy(to + used, from, bytes);
    used += bytes;
  };
  for (int n = 0; n < n_arrays; ++n) {
    if (!arrays[n]) {
      write("", 1);
      continue;
    }
    const char head[] = {1, char(arrays[n]->dtype().val()), char(arrays[n]->ndim())};
    write(head, sizeof head);
    for (int axis : arrays[n]->shape()) write(&axis, sizeof axis);
  }
  return used <= room ? used : -1;
}

void dbrx_assign(const mx::array* from, mx::array* to) {
  *to = *from;
}

void dbrx_set_call_twin(CallTwin call) {
  call_twin = call;
}

const char* dbrx_problem() {
  return problem.c_str();
}

// Null inputs are left out. Returns 0, or 1 if there was a problem. `layout` holds each output's dtype, taken input, number of axes and shape.
int dbrx_launch(
    dbrx::Kernel kernel,
    int n_inputs,
    const mx::array* const* inputs,
    int n_outputs,
    mx::array* const* outputs,
    const int* layout,
    int n_numbers,
    const int64_t* numbers,
    int n_constants,
    const float* constants,
    int twin) {
  try {
    std::vector<mx::Shape> shapes;
    std::vector<mx::Dtype> dtypes;
    std::vector<int> taken;
    for (int n = 0; n < n_outputs; ++n) {
      dtypes.push_back(DTYPES[layout[0]]);
      taken.push_back(layout[1]);
      shapes.emplace_back(layout + 3, layout + 3 + layout[2]);
      layout += 3 + layout[2];
    }
    Arrays operands;
    operands.reserve(n_inputs);
    for (int n = 0; n < n_inputs; ++n) {
      if (inputs[n]) operands.push_back(*inputs[n]);
    }
    auto primitive = std::make_shared<Launch>(
        mx::default_stream(mx::Device::cpu),
        kernel,
        std::vector<int64_t>(numbers, numbers + n_numbers),
        std::vector<float>(constants, constants + n_constants),
        std::move(taken),
        twin);
    primitive->shapes = shapes;
    primitive->dtypes = dtypes;
    auto made = mx::array::make_arrays(std::move(shapes), dtypes, primitive, operands);
    for (int n = 0; n < n_outputs; ++n) *outputs[n] = std::move(made[n]);
    return 0;
  } catch (const std::exception& error) {
    problem = error.what();
    return 1;
  }
}
}
