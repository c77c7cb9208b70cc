// Arguments of the operators that filter as well: a map x of a transposed convolution, its filter, and the epilogue of
// the map u that the filter leaves.
#pragma once

#include "modulated_conv2d/fir.h"
#include "modulated_conv2d/host.h"

namespace sivae::modulated_conv2d {

struct FirCall {
  Call call;  // call.x has the tensor x and the pixels of u
  Tensor f;   // (TAPS, TAPS)
  Span y, x;
  bool flip;
  double fir_gain;

  std::vector<int64_t> result_sizes() const { return {call.x.batch, call.x.channels, y.out, x.out}; }
  Tensor empty_map(bool wanted) const {
    return empty_like_map(call.x, wanted ? result_sizes() : std::vector<int64_t>{0, 1, 1, 1});
  }
  // A gradient of u's sizes, in the type and layout of x.
  std::optional<Map> gradient(const Side& g) const {
    if (!g.has_value()) return std::nullopt;
    const Map map = dense(*g);
    const bool fits = map.last == call.x.last || map.channels == 1 || map.space == 1 || map.tensor.numel() == 0;
    STD_TORCH_CHECK(fits && sizes_of(*g) == result_sizes() && g->scalar_type() == call.x.tensor.scalar_type() &&
                        g->is_cuda() == call.x.tensor.is_cuda(),
                    "a gradient and the map differ in layout, size, type or device");
    return map;
  }
};

inline FirCall prepare(const Tensor& x, const Tensor& f, int64_t pad_x0, int64_t pad_x1, int64_t pad_y0, int64_t pad_y1,
                       bool flip, double fir_gain, const Tensor& scale, const Side& noise, const Side& strength,
                       const Side& bias, const Side& next, double alpha, double gain, double clamp) {
  STD_TORCH_CHECK(x.dim() == 4, "modulated_fir_epilogue expects (B, C, H, W)");
  check_wide(f, x, "the filter");
  STD_TORCH_CHECK(f.dim() == 2 && f.size(0) == TAPS && f.size(1) == TAPS, "the filter must have 4 x 4 taps");
  const auto span = [](int64_t in, int64_t before, int64_t after) {
    STD_TORCH_CHECK(before >= 0 && before < TAPS && after >= 0 && after < TAPS, "padding must be 0, 1, 2 or 3");
    STD_TORCH_CHECK(in > 0 && in + before + after >= TAPS, "the filter does not fit into the map");
    return Span{in, in + before + after - (TAPS - 1), static_cast<int32_t>(before)};
  };
  const Span sy = span(x.size(2), pad_y0, pad_y1), sx = span(x.size(3), pad_x0, pad_x1);
  Map map = dense(x);
  STD_TORCH_CHECK(std::max({x.size(1) * x.size(3), sx.out * x.size(1), x.size(2)}) < (int64_t{1} << 30),
                  "a row of the map has more than 2^30 elements");
  map.space = sy.out * sx.out;
  return {checked(map, scale, noise, strength, bias, next, alpha, gain, clamp), f, sy, sx, flip, fir_gain};
}

}  // namespace sivae::modulated_conv2d
