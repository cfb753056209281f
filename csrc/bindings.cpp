// The Python module pyunlearn._C: DLPack capsules in, nothing but plain numbers otherwise.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <utility>
#include <vector>

#include "cpu/perturb.h"
#include "cpu/segment_dot.h"
#include "cpu/token_stats.h"
#include "math/philox.h"
#include "tensor/view.h"
#if defined(PU_CUDA)
#include "cuda/perturb.cuh"
#include "cuda/segment_dot.cuh"
#include "cuda/token_stats.cuh"
#endif

namespace py = pybind11;

namespace {

constexpr int kCpu = 1, kCuda = 2;  // DLPack's device types

// Takes the capsule's tensor for the length of the call; its own deleter gives it back.
class Borrowed {
 public:
  explicit Borrowed(py::handle capsule, const char* name, bool vector = false) {
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
    view_ = pu::matrix_of(t, name);
    device_ = t.device;
  }
  Borrowed(const Borrowed&) = delete;
  ~Borrowed() {
    if (owner_ != nullptr && owner_->deleter != nullptr) owner_->deleter(owner_);
  }
  operator const pu::Matrix&() const { return view_; }
  int cuda_device() const {  // -1: the CPU
    if (device_.type != kCpu && device_.type != kCuda)
      throw std::invalid_argument("tensors on DLPack device type " + std::to_string(device_.type) + " are not supported");
#if defined(PU_CUDA_ON_CPU)  // the tests' build: the CUDA kernels run on the CPU's tensors
    return 0;
#else
    return device_.type == kCuda ? device_.id : -1;
#endif
  }

 private:
  pu::DLDevice device_ = {0, 0};
  pu::DLManagedTensor* owner_ = nullptr;
  pu::Matrix view_;
  std::vector<int64_t> shape_, strides_;
};

struct Options {  // the arguments every call ends with
  uint32_t outputs;
  double temperature, softcap;
  int64_t ignore_index, first_column, vocabulary;
  int threads;
  void* stream;  // raw cudaStream_t; 0 on the CPU
  pu::cpu::Call call() const { return {{temperature, softcap}, ignore_index, outputs, first_column, vocabulary, threads}; }
};

Options options_of(const py::args& a) {
  return {a[0].cast<uint32_t>(), a[1].cast<double>(), a[2].cast<double>(), a[3].cast<int64_t>(), a[4].cast<int64_t>(),
          a[5].cast<int64_t>(), a[6].cast<int>(), reinterpret_cast<void*>(a[7].cast<uintptr_t>())};
}

// A dtype as its empty tensor's capsule; None is no tensor.
pu::DType dtype_like(py::handle capsule) { return static_cast<const pu::Matrix&>(Borrowed(capsule, "dtype")).dtype; }

pu::Noise noise_of(const py::object& step) {  // None, or (draw, scale)
  if (step.is_none()) return {};
  const auto [draw, scale] = step.cast<std::pair<uint32_t, double>>();
  return {true, draw, scale};
}

[[maybe_unused]] void no_cuda() { throw std::runtime_error(std::string("the CUDA part is not built: ") + PU_CUDA_REASON); }

}  // namespace

#if defined(PU_CUDA)
#define PU_ON_DEVICE(device, gpu_call, cpu_call) (device >= 0 ? (pu::cuda::OnDevice(device), pu::cuda::gpu_call) : pu::cpu::cpu_call)
#else
#define PU_ON_DEVICE(device, gpu_call, cpu_call) (device >= 0 ? (no_cuda(), pu::cpu::cpu_call) : pu::cpu::cpu_call)
#endif

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
  m.attr("state_fields") = pu::cpu::state_fields();
  m.def("instruction_set", [] { return pu::cpu::lanes().name; });
  m.def("choose_instruction_set", &pu::cpu::choose_lanes, py::arg("name"));

  m.def("accumulate", [](py::handle logits, py::handle targets, py::handle reference, py::handle state, bool fresh, const py::args& rest) {
    const Options o = options_of(rest);
    Borrowed l(logits, "logits"), t(targets, "targets", true), r(reference, "reference"), s(state, "state");
    py::gil_scoped_release release;
    PU_ON_DEVICE(l.cuda_device(), accumulate(o.call(), l, t, r, s, fresh, o.stream), accumulate(o.call(), l, t, r, s, fresh));
  });
  m.def("finish", [](py::handle state, py::handle targets, bool has_reference, py::handle stats, py::handle saved, const py::args& rest) {
    const Options o = options_of(rest);
    Borrowed s(state, "state"), t(targets, "targets", true), v(stats, "stats"), k(saved, "saved");
    py::gil_scoped_release release;
    PU_ON_DEVICE(s.cuda_device(), finish(o.call(), s, t, has_reference, v, k, o.stream), finish(o.call(), s, t, has_reference, v, k));
  });
  m.def("topk", [](py::handle logits, py::handle targets, py::handle stats, py::handle saved, py::handle index, py::handle belief, const py::args& rest) {
    const Options o = options_of(rest);
    Borrowed l(logits, "logits"), t(targets, "targets", true), v(stats, "stats"), k(saved, "saved"), j(index, "index"), b(belief, "belief");
    py::gil_scoped_release release;
    PU_ON_DEVICE(l.cuda_device(), topk(o.call(), l, t, v, k, j, b, o.stream), topk(o.call(), l, t, v, k, j, b));
  });
  m.def("backward", [](py::handle grad_stats, py::handle stats, py::handle saved, py::handle logits, py::handle targets, py::handle reference,
                       py::handle index, py::handle belief, py::handle grad_logits, const py::args& rest) {
    const Options o = options_of(rest);
    Borrowed g(grad_stats, "grad_stats"), v(stats, "stats"), k(saved, "saved"), l(logits, "logits"), t(targets, "targets", true);
    Borrowed r(reference, "reference"), j(index, "index"), b(belief, "belief"), d(grad_logits, "grad_logits");
    py::gil_scoped_release release;
    PU_ON_DEVICE(l.cuda_device(), backward(o.call(), g, v, k, l, t, r, j, b, d, o.stream), backward(o.call(), g, v, k, l, t, r, j, b, d));
  });

  m.def("parts", [](int cuda_device, int64_t rows, int64_t columns) {
#if defined(PU_CUDA_ON_CPU)
    cuda_device = 0;
#endif
    return PU_ON_DEVICE(cuda_device, parts_of(rows, columns), parts_of(rows, columns));
  });
  m.def("value_and_grad", [](py::tuple rule, py::handle weights, py::handle floor, py::handle logits, py::handle targets, py::handle stats,
                             py::handle grad_logits, const py::args& rest) {
    const Options o = options_of(rest);
    const pu::cpu::Rule how = {rule[0].cast<double>(), rule[1].cast<double>(), rule[2].cast<double>()};
    Borrowed w(weights, "weights"), f(floor, "floor", true), l(logits, "logits"), t(targets, "targets", true), v(stats, "stats");
    Borrowed d(grad_logits, "grad_logits");
    py::gil_scoped_release release;
    return PU_ON_DEVICE(l.cuda_device(), value_and_grad(o.call(), how, w, f, l, t, v, d, o.stream), value_and_grad(o.call(), how, w, f, l, t, v, d));
  });

  m.def("philox", [](std::array<uint32_t, 4> counter, uint64_t key) {
    uint32_t words[4] = {counter[0], counter[1], counter[2], counter[3]};
    pu::philox(words, uint32_t(key), uint32_t(key >> 32));
    return std::array<uint32_t, 4>{words[0], words[1], words[2], words[3]};
  });
  m.def("perturb", [](py::handle table, py::handle source, py::handle target, uint64_t seed, const py::object& remove, const py::object& add, int threads, uintptr_t stream) {
    const pu::Perturb p = {seed, !source.is_none(), dtype_like(source), dtype_like(target), noise_of(remove), noise_of(add)};
    Borrowed t(table, "table");
    py::gil_scoped_release release;
    PU_ON_DEVICE(t.cuda_device(), perturb(p, t, reinterpret_cast<void*>(stream)), perturb(p, t, threads));
  });
  m.def("segment_dot", [](py::handle table, int64_t chunk, py::handle partials, py::handle sums, int threads, [[maybe_unused]] uintptr_t stream) {
    Borrowed t(table, "table"), p(partials, "partials"), s(sums, "sums");
    py::gil_scoped_release release;
    PU_ON_DEVICE(t.cuda_device(), segment_dot(t, chunk, p, s, reinterpret_cast<void*>(stream)), segment_dot(t, chunk, p, s, threads));
  });
}
