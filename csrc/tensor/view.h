// Checked views of DLPack tensors. The DLPack structures below are the stable C ABI (version 0.x capsules, "dltensor"),
// which every array library exports: csrc needs no framework's headers, and one build serves every version of torch.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace pu {

struct DLDevice { int32_t type, id; };
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null means contiguous
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};

enum class DType { kFloat32, kBFloat16, kFloat16, kFloat64, kInt32, kInt64 };

inline int64_t size_of(DType t) {
  switch (t) {
    case DType::kFloat64:
    case DType::kInt64: return 8;
    case DType::kFloat32:
    case DType::kInt32: return 4;
    default: return 2;
  }
}

// Rows of a (rows..., columns) tensor: any number of leading dimensions that collapse to two, unit stride in the last.
struct Matrix {
  char* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t rows = 0, columns = 0;
  int64_t inner_rows = 1, inner_stride = 0, outer_stride = 0;  // strides in elements
  explicit operator bool() const { return data != nullptr; }
  int64_t row_offset(int64_t i) const { return (i / inner_rows) * outer_stride + (i % inner_rows) * inner_stride; }
  char* row(int64_t i, int64_t column = 0) const { return data + (row_offset(i) + column) * size_of(dtype); }
  template <class T> T* as(int64_t i = 0) const { return reinterpret_cast<T*>(row(i)); }
};

inline DType dtype_of(const DLTensor& t, const char* name) {
  const int key = t.dtype.code * 1000 + t.dtype.bits;
  if (t.dtype.lanes == 1) switch (key) {
      case 2032: return DType::kFloat32;
      case 4016: return DType::kBFloat16;
      case 2016: return DType::kFloat16;
      case 2064: return DType::kFloat64;
      case 32: return DType::kInt32;
      case 64: return DType::kInt64;
      default: break;
    }
  throw std::invalid_argument(std::string(name) + ": unsupported dtype (DLPack code " + std::to_string(t.dtype.code) +
                              ", " + std::to_string(t.dtype.bits) + " bits)");
}

inline Matrix matrix_of(const DLTensor& t, const char* name) {
  if (t.ndim < 1) throw std::invalid_argument(std::string(name) + ": needs at least one dimension");
  Matrix m;
  m.dtype = dtype_of(t, name);
  m.data = static_cast<char*>(t.data) + t.byte_offset;
  m.columns = t.shape[t.ndim - 1];
  m.rows = 1;
  for (int d = 0; d < t.ndim - 1; ++d) m.rows *= t.shape[d];
  if (t.strides == nullptr) {
    m.inner_rows = m.rows > 0 ? m.rows : 1;
    m.inner_stride = m.columns;
    return m;
  }
  if (m.rows == 0 || m.columns == 0) return m;
  if (m.columns > 1 && t.strides[t.ndim - 1] != 1)
    throw std::invalid_argument(std::string(name) + ": the last dimension needs stride 1");
  // Collapse leading dimensions from the right: two groups suffice for every slice of a (batch, time, vocabulary) tensor.
  int64_t sizes[2] = {1, 1}, strides[2] = {0, 0};
  int group = 0;
  for (int d = t.ndim - 2; d >= 0; --d) {
    if (t.shape[d] == 1) continue;
    if (sizes[group] > 1 && t.strides[d] != sizes[group] * strides[group] && ++group > 1)
      throw std::invalid_argument(std::string(name) +
                                  ": leading dimensions do not collapse to two; call .contiguous()");
    if (sizes[group] == 1) strides[group] = t.strides[d];
    sizes[group] *= t.shape[d];
  }
  m.inner_rows = sizes[0], m.inner_stride = strides[0], m.outer_stride = strides[1];
  return m;
}

}  // namespace pu
