// The Python module pyunlearn._C: DLPack capsules and plain numbers in, every argument by its name.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/lane_functions.h"
#include "cpu/perturb.h"
#include "cpu/segment_dot.h"
#include "cpu/token_stats.h"
#include "math/philox.h"
#include "tensor/call.h"
#if defined(PU_CUDA)
#include "cuda/perturb.h"
#include "cuda/segment_dot.h"
#include "cuda/token_stats.h"
#endif

namespace py = pybind11;
using py::literals::operator""_a;

namespace {

constexpr int kCpu = 1, kCuda = 2;  // DLPack's device types

// Takes the capsule's tensor for the length of the call, and puts its view into a field; its own deleter gives it back.
class Borrowed {
 public:
  Borrowed(pu::Matrix& field, py::handle capsule, const char* name, bool vector = false) {
    if (capsule.is_none()) return;
    owner_ = static_cast<pu::DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    if (owner_ == nullptr) throw py::error_already_set();
    PyCapsule_SetName(capsule.ptr(), "used_dltensor");
    pu::DLTensor t = owner_->dl_tensor;
    if (vector) {  // one entry a row: a last dimension of size 1
      shape_.assign(t.shape, t.shape + t.ndim);
      strides_.assign(t.strides, t.strides + t.ndim);
      shape_.push_back(1), strides_.push_back(1);
      t.shape = shape_.data(), t.strides = strides_.data(), ++t.ndim;
    }
    field = pu::matrix_of(t, name);
    if (t.data == nullptr && field.rows * field.columns > 0)
      throw std::invalid_argument(std::string(name) + ": has no memory (a fake, functional or zero tensor)");
    device_ = t.device;
  }
  Borrowed(const Borrowed&) = delete;
  ~Borrowed() {
    if (owner_ != nullptr && owner_->deleter != nullptr) owner_->deleter(owner_);
  }
  int cuda_device() const {  // -1: the CPU
    if (device_.type != kCpu && device_.type != kCuda)
      throw std::invalid_argument("tensors on DLPack device type " + std::to_string(device_.type) +
                                  " are not supported");
#if defined(PU_CUDA_ON_CPU)  // the tests' build: the CUDA kernels run on the CPU's tensors
    return 0;
#else
    return device_.type == kCuda ? device_.id : -1;
#endif
  }

 private:
  pu::DLDevice device_ = {0, 0};
  pu::DLManagedTensor* owner_ = nullptr;
  std::vector<int64_t> shape_, strides_;
};

// A dtype as its empty tensor's capsule; None is no tensor.
pu::DType dtype_like(py::handle capsule) {
  pu::Matrix empty;
  const Borrowed tensor(empty, capsule, "dtype");
  return empty.dtype;
}

using Step = std::optional<std::pair<uint32_t, double>>;  // (draw, scale)
pu::Noise noise_of(const Step& step) { return step ? pu::Noise{true, step->first, step->second} : pu::Noise{}; }

// The kernel of one side or the other, without the interpreter's lock.
template <class Kernel, class... Arguments>
auto run(int device, Kernel on_gpu, Kernel on_cpu, const Arguments&... arguments) {
  const py::gil_scoped_release release;
  if (device < 0) return on_cpu(arguments...);
#if defined(PU_CUDA)
  const pu::cuda::OnDevice current(device);
  return on_gpu(arguments...);
#else
  (void)on_gpu;
  throw std::runtime_error(std::string("the CUDA part is not built: ") + PU_CUDA_REASON);
#endif
}
#if defined(PU_CUDA)
#define PU_BOTH(kernel) pu::cuda::kernel, pu::cpu::kernel
#else
#define PU_BOTH(kernel) pu::cpu::kernel, pu::cpu::kernel
#endif

pu::Call make_call(uint32_t outputs, double temperature, double softcap, int64_t ignore_index, int64_t first_column,
                   int64_t vocabulary, int threads, uintptr_t stream) {
  pu::Call call;
  call.transform = {temperature, softcap}, call.ignore_index = ignore_index, call.outputs = outputs;
  call.first_column = first_column, call.vocabulary = vocabulary;
  call.threads = threads, call.stream = reinterpret_cast<void*>(stream);
  return call;
}

void accumulate(pu::Call call, py::handle logits, py::handle targets, py::handle reference, py::handle state,
                bool fresh) {
  const Borrowed tensors[] = {{call.logits, logits, "logits"},
                              {call.targets, targets, "targets", true},
                              {call.reference, reference, "reference"},
                              {call.state, state, "state"}};
  call.fresh = fresh;
  run(tensors[0].cuda_device(), PU_BOTH(accumulate), call);
}

void finish(pu::Call call, py::handle state, py::handle targets, bool has_reference, py::handle stats,
            py::handle saved) {
  const Borrowed tensors[] = {{call.state, state, "state"},
                              {call.targets, targets, "targets", true},
                              {call.stats, stats, "stats"},
                              {call.saved, saved, "saved"}};
  call.has_reference = has_reference;
  run(tensors[0].cuda_device(), PU_BOTH(finish), call);
}

void topk(pu::Call call, py::handle logits, py::handle targets, py::handle stats, py::handle saved, py::handle index,
          py::handle belief) {
  const Borrowed tensors[] = {{call.logits, logits, "logits"}, {call.targets, targets, "targets", true},
                              {call.stats, stats, "stats"},    {call.saved, saved, "saved"},
                              {call.index, index, "index"},    {call.belief, belief, "belief"}};
  run(tensors[0].cuda_device(), PU_BOTH(topk), call);
}

void backward(pu::Call call, py::handle grad_stats, py::handle stats, py::handle saved, py::handle logits,
              py::handle targets, py::handle reference, py::handle index, py::handle belief, py::handle grad_logits) {
  const Borrowed tensors[] = {{call.logits, logits, "logits"},
                              {call.targets, targets, "targets", true},
                              {call.reference, reference, "reference"},
                              {call.grad_stats, grad_stats, "grad_stats"},
                              {call.stats, stats, "stats"},
                              {call.saved, saved, "saved"},
                              {call.index, index, "index"},
                              {call.belief, belief, "belief"},
                              {call.grad_logits, grad_logits, "grad_logits"}};
  run(tensors[0].cuda_device(), PU_BOTH(backward), call);
}

const char* value_and_grad(pu::Call call, py::handle logits, py::handle targets, py::handle weights, double alpha,
                           double gamma, double beta, py::handle floor, py::handle stats, py::handle grad_logits) {
  const Borrowed tensors[] = {{call.logits, logits, "logits"},       {call.targets, targets, "targets", true},
                              {call.grad_stats, weights, "weights"}, {call.floor, floor, "floor", true},
                              {call.stats, stats, "stats"},          {call.grad_logits, grad_logits, "grad_logits"}};
  call.rule = {alpha, gamma, beta};
  return run(tensors[0].cuda_device(), PU_BOTH(value_and_grad), call);
}

int64_t parts(int cuda_device, int64_t rows, int64_t columns) {
#if defined(PU_CUDA_ON_CPU)
  cuda_device = 0;
#endif
  return run(cuda_device, PU_BOTH(parts_of), rows, columns);
}

void perturb(py::handle table, py::handle source, py::handle target, uint64_t seed, const Step& remove, const Step& add,
             int threads, uintptr_t stream) {
  pu::Perturb p;
  p.seed = seed, p.has_source = !source.is_none(), p.source = dtype_like(source), p.target = dtype_like(target);
  p.remove = noise_of(remove), p.add = noise_of(add);
  p.threads = threads, p.stream = reinterpret_cast<void*>(stream);
  const Borrowed chunks(p.table, table, "table");
  run(chunks.cuda_device(), PU_BOTH(perturb), p);
}

void segment_dot(py::handle table, int64_t chunk, py::handle partials, py::handle sums, int threads, uintptr_t stream) {
  pu::SegmentDot d;
  d.chunk = chunk, d.threads = threads, d.stream = reinterpret_cast<void*>(stream);
  const Borrowed tensors[] = {{d.table, table, "table"}, {d.partials, partials, "partials"}, {d.sums, sums, "sums"}};
  run(tensors[0].cuda_device(), PU_BOTH(segment_dot), d);
}

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, uint64_t key) {
  uint32_t words[4] = {counter[0], counter[1], counter[2], counter[3]};
  pu::philox(words, uint32_t(key), uint32_t(key >> 32));
  return {words[0], words[1], words[2], words[3]};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of pyunlearn. Tensors come as DLPack capsules; see pyunlearn.ops for the public interface.";
  m.attr("cuda_archs") = PU_CUDA_ARCHS;
  m.attr("cuda_reason") = PU_CUDA_REASON;
  m.attr("compiler") = PU_COMPILER;
#if defined(_OPENMP)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  m.attr("outputs") = pu::cpu::output_count();
  m.attr("state_fields") = pu::cpu::state_fields();
  m.def("instruction_set", [] { return pu::cpu::lanes().name; });
  m.def("choose_instruction_set", &pu::cpu::choose_lanes, "name"_a);

  py::class_<pu::Call>(m, "Call", py::module_local(), "What the token statistics take besides tensors.")
      .def(py::init(&make_call), py::kw_only(), "outputs"_a, "temperature"_a, "softcap"_a, "ignore_index"_a,
           "first_column"_a, "vocabulary"_a, "threads"_a, "stream"_a);
  m.def("parts", &parts, "cuda_device"_a, "rows"_a, "columns"_a);
  m.def("accumulate", &accumulate, "call"_a, py::kw_only(), "logits"_a, "targets"_a, "reference"_a, "state"_a,
        "fresh"_a);
  m.def("finish", &finish, "call"_a, py::kw_only(), "state"_a, "targets"_a, "has_reference"_a, "stats"_a, "saved"_a);
  m.def("topk", &topk, "call"_a, py::kw_only(), "logits"_a, "targets"_a, "stats"_a, "saved"_a, "index"_a, "belief"_a);
  m.def("backward", &backward, "call"_a, py::kw_only(), "grad_stats"_a, "stats"_a, "saved"_a, "logits"_a, "targets"_a,
        "reference"_a, "index"_a, "belief"_a, "grad_logits"_a);
  m.def("value_and_grad", &value_and_grad, "call"_a, py::kw_only(), "logits"_a, "targets"_a, "weights"_a, "alpha"_a,
        "gamma"_a, "beta"_a, "floor"_a, "stats"_a, "grad_logits"_a,
        "Returns why two passes serve better, with nothing done, or None.");

  m.def("philox", &philox, "counter"_a, "key"_a);
  m.def("perturb", &perturb, py::kw_only(), "table"_a, "source"_a, "target"_a, "seed"_a, "remove"_a, "add"_a,
        "threads"_a, "stream"_a);
  m.def("segment_dot", &segment_dot, py::kw_only(), "table"_a, "chunk"_a, "partials"_a, "sums"_a, "threads"_a,
        "stream"_a);
}
