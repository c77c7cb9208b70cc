// One element of norm_act and of its derivative.
//
//   u = x, or x + skip if the skip comes first      v = (u - mean) scale + shift, plus the skip if it comes last
//   y = leaky(v), then every 2 x 2 pixels averaged, or every pixel written 2 x 2 times
//
// The derivative, with h the gradient of v:  du = scale h + level + by_u (u - mean), where level and by_u say how the
// statistics depend on u; they are zero for given ones.
#pragma once

#include "common/portable.h"

namespace sivae::norm_act {

enum Resample : int64_t { NONE = 0, DOWN = 1, UP = 2 };

template <typename W>
struct Norm {
  W mean, scale, shift;
};

template <typename W>
struct Slope {
  W level, by_u;
};

template <typename W>
SIVAE_HD W value(const Norm<W>& f, W u) {
  return (u - f.mean) * f.scale + f.shift;
}

template <typename W>
SIVAE_HD W leaky(W v, W alpha) {
  return v > 0 ? v : v * alpha;
}

// The gradient of v from that of leaky(v).
template <typename W>
SIVAE_HD W behind(W v, W g, W alpha) {
  return v > 0 ? g : g * alpha;
}

template <typename W>
SIVAE_HD W backward(const Norm<W>& f, const Slope<W>& s, W u, W h) {
  return f.scale * h + s.level + s.by_u * (u - f.mean);
}

}  // namespace sivae::norm_act
