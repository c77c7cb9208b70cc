// Host side of every operator, for CPU and CUDA alike: layouts, checks, types. Only torch's stable interface is used.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/portable.h"

namespace sivae {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A dense (B, C, ...) tensor: C innermost (channels_last) or the space innermost. As `_arguments.dense` in Python, which
// the fakes use: contiguous wins where both hold, and what is neither is copied to contiguous.
struct Map {
  Tensor tensor;
  bool last;
  int64_t batch, channels, space;
};

inline bool is_channels_last(const Tensor& x) {
  if (x.dim() != 4 || x.is_contiguous()) return false;
  int64_t expected = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

inline Map dense(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 2, "expected (B, C, ...), got ", x.dim(), " dimensions");
  const bool last = is_channels_last(x);
  int64_t space = 1;
  for (int64_t d = 2; d < x.dim(); ++d) space *= x.size(d);
  return {last || x.is_contiguous() ? x : torch::stable::contiguous(x), last, x.size(0), x.size(1), space};
}

// Asks Linux for pages of 2 MB in a large tensor's memory. It clears each page that is written for the first time, which
// page by page of 4 kB takes longer than the arithmetic of most operators.
inline void in_large_pages([[maybe_unused]] const Tensor& fresh) {
#if defined(__linux__) && !defined(__CUDACC__)
  constexpr uintptr_t page = uintptr_t{1} << 21;
  const uintptr_t size = static_cast<uintptr_t>(fresh.numel()) * static_cast<uintptr_t>(fresh.element_size());
  if (fresh.is_cuda() || size < 2 * page) return;
  const uintptr_t from = reinterpret_cast<uintptr_t>(fresh.const_data_ptr());
  const uintptr_t first = (from + page - 1) / page * page, last = (from + size) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: it may be refused
#endif
}

// An uninitialised tensor of these sizes on x's device, in x's type and the map's layout.
inline Tensor empty_like_map(const Map& map, const std::vector<int64_t>& sizes) {
  const Tensor& x = map.tensor;
  const Tensor made = torch::stable::empty(sizes, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                           map.last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  in_large_pages(made);
  return made;
}

inline std::vector<int64_t> sizes_of(const Tensor& x) {
  const auto sizes = x.sizes();
  return {sizes.begin(), sizes.end()};
}

template <typename T>
const T* read(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <typename T>
const T* read(const std::optional<Tensor>& x) {
  return x.has_value() ? read<T>(*x) : nullptr;
}

template <typename T>
T* write(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Small tensors beside the map (filter, bias, ...): contiguous, on the same device, in the type sums are kept in.
inline void check_wide(const Tensor& side, const Tensor& x, const char* name) {
  const auto wanted = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(side.scalar_type() == wanted, name, " must be float32 (float64 beside a float64 map)");
  STD_TORCH_CHECK(side.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(side.is_cuda() == x.is_cuda(), name, " must be on the device of the map");
}

// Calls f(T{}) with the element type of x.
template <typename F>
void by_type(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Half: return f(Half{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Double: return f(double{});
    default: STD_TORCH_CHECK(false, "expected float32, float16, bfloat16 or float64");
  }
}

}  // namespace sivae
