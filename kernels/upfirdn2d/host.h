// What the CPU and the CUDA operator have in common: reading the arguments, making the result.
#pragma once

#include "common/tensors.h"
#include "upfirdn2d/upfirdn2d.h"

namespace sivae::upfirdn2d {

struct Call {
  Map x;
  Tensor y;
  Axis ay, ax;
  std::optional<Tensor> f;  // (taps_y, taps_x), (taps,) for both axes, or none
  bool flip;
  double gain;
};

inline int32_t small(int64_t value, const char* name) {
  STD_TORCH_CHECK(value > -(int64_t{1} << 30) && value < (int64_t{1} << 30), name, " is ", value);
  return static_cast<int32_t>(value);
}

inline Call prepare(const Tensor& x, const std::optional<Tensor>& f, int64_t up_x, int64_t up_y, int64_t down_x,
                    int64_t down_y, int64_t pad_x0, int64_t pad_x1, int64_t pad_y0, int64_t pad_y1, bool flip,
                    double gain) {
  STD_TORCH_CHECK(x.dim() == 4, "upfirdn2d expects (B, C, H, W)");
  STD_TORCH_CHECK(up_x > 0 && up_y > 0 && down_x > 0 && down_y > 0, "factors must be positive");
  int64_t taps_x = 1, taps_y = 1;
  if (f.has_value()) {
    check_wide(*f, x, "the filter");
    STD_TORCH_CHECK((f->dim() == 1 || f->dim() == 2) && f->numel() > 0, "the filter must be (taps,) or (h, w)");
    taps_y = f->size(0);
    taps_x = f->size(f->dim() - 1);
  }
  const auto axis = [](int64_t in, int64_t up, int64_t down, int64_t pad0, int64_t pad1, int64_t taps) {
    STD_TORCH_CHECK(in * up + pad0 + pad1 >= taps, "the filter does not fit into the map");
    const int32_t u = small(up, "up"), d = small(down, "down"), t = small(taps, "taps");
    return Axis{in, out_size(in, u, d, pad0 + pad1, t), u, d, t, small(pad0, "padding")};
  };
  const Axis ay = axis(x.size(2), up_y, down_y, pad_y0, pad_y1, taps_y);
  const Axis ax = axis(x.size(3), up_x, down_x, pad_x0, pad_x1, taps_x);
  Map map = dense(x);
  Tensor y = empty_like_map(map, {x.size(0), x.size(1), ay.out, ax.out});
  return {map, y, ay, ax, f, flip, gain};
}

}  // namespace sivae::upfirdn2d
