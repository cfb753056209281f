// The Python module pyunlearn._C: DLPack capsules in, nothing but plain numbers otherwise.
#include <pybind11/pybind11.h>

#include <vector>

#include "cpu/token_stats.h"
#include "tensor/view.h"

namespace py = pybind11;

namespace {

constexpr int kCpu = 1;  // DLPack's device type

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
    view_ = pu::matrix_of(t, name, kCpu);
  }
  Borrowed(const Borrowed&) = delete;
  ~Borrowed() {
    if (owner_ != nullptr && owner_->deleter != nullptr) owner_->deleter(owner_);
  }
  operator const pu::Matrix&() const { return view_; }

 private:
  pu::DLManagedTensor* owner_ = nullptr;
  pu::Matrix view_;
  std::vector<int64_t> shape_, strides_;
};

pu::cpu::Call call_of(uint32_t outputs, double temperature, double softcap, int64_t ignore_index, int64_t first_column, int64_t vocabulary, int threads) {
  return {{temperature, softcap}, ignore_index, outputs, first_column, vocabulary, threads};
}

}  // namespace

#define PU_CALL_PARAMETERS uint32_t outputs, double temperature, double softcap, int64_t ignore_index, int64_t first_column, int64_t vocabulary, int threads
#define PU_CALL call_of(outputs, temperature, softcap, ignore_index, first_column, vocabulary, threads)

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

  m.def("accumulate", [](py::handle logits, py::handle targets, py::handle reference, py::handle state, bool fresh, PU_CALL_PARAMETERS) {
    Borrowed l(logits, "logits"), t(targets, "targets", true), r(reference, "reference"), s(state, "state");
    py::gil_scoped_release release;
    pu::cpu::accumulate(PU_CALL, l, t, r, s, fresh);
  });
  m.def("finish", [](py::handle state, py::handle targets, bool has_reference, py::handle stats, py::handle saved, PU_CALL_PARAMETERS) {
    Borrowed s(state, "state"), t(targets, "targets", true), o(stats, "stats"), k(saved, "saved");
    py::gil_scoped_release release;
    pu::cpu::finish(PU_CALL, s, t, has_reference, o, k);
  });
  m.def("topk", [](py::handle logits, py::handle targets, py::handle stats, py::handle saved, py::handle index, py::handle belief, PU_CALL_PARAMETERS) {
    Borrowed l(logits, "logits"), t(targets, "targets", true), o(stats, "stats"), k(saved, "saved"), j(index, "index"), b(belief, "belief");
    py::gil_scoped_release release;
    pu::cpu::topk(PU_CALL, l, t, o, k, j, b);
  });
  m.def("backward", [](py::handle grad_stats, py::handle stats, py::handle saved, py::handle logits, py::handle targets, py::handle reference,
                       py::handle index, py::handle belief, py::handle grad_logits, PU_CALL_PARAMETERS) {
    Borrowed g(grad_stats, "grad_stats"), o(stats, "stats"), k(saved, "saved"), l(logits, "logits"), t(targets, "targets", true);
    Borrowed r(reference, "reference"), j(index, "index"), b(belief, "belief"), d(grad_logits, "grad_logits");
    py::gil_scoped_release release;
    pu::cpu::backward(PU_CALL, g, o, k, l, t, r, j, b, d);
  });
}
