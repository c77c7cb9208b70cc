// One element of adain_act and of its derivative, and what a channel of a sample needs for them.
//
//   v = x + strength noise + bias,  a = leaky(v),  y = (a - mean) scale + shift
//
// With k = 1 + the style's scale, r = 1 / sqrt(var + eps), n pixels, g the gradient of y, and the sums over pixels
// S1 = sum g, S2 = sum g (a - mean), the gradient of a is
//
//   k r g - k r S1 / n - k r^3 S2 / n (a - mean) + g_mean / n + g_std / (n std) (a - mean).
#pragma once

#include "common/portable.h"

namespace sivae::adain_act {

// What is added to every pixel of a channel before the activation.
template <typename W>
struct Before {
  W strength, bias, alpha;
};

template <typename W>
SIVAE_HD W value(const Before<W>& f, W x, W noise) {
  return x + f.strength * noise + f.bias;
}

template <typename W>
SIVAE_HD W value(const Before<W>& f, W x) {
  return x + f.bias;
}

// The product is rounded by itself and never part of a fused multiply-add: every pass must see the same value, so that
// a constant channel equals its mean in all of them.
template <typename W>
SIVAE_HD W leaky(const Before<W>& f, W v) {
#if defined(__CUDA_ARCH__)
  W below;
  if constexpr (sizeof(W) == 4) below = __fmul_rn(v, f.alpha);
  else below = __dmul_rn(v, f.alpha);
#elif defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
  const W below = __builtin_assoc_barrier(v * f.alpha);
#else
  const W below = v * f.alpha;
#endif
  return v > 0 ? v : below;
}

template <typename W>
struct Norm {
  W mean, scale, shift;
};

template <typename W>
SIVAE_HD W root(W v) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(W) == 4) return sqrtf(v);
  else return sqrt(v);
#else
  if constexpr (sizeof(W) == 4) return __builtin_sqrtf(v);
  else return __builtin_sqrt(v);
#endif
}

template <typename W>
SIVAE_HD Norm<W> norm(W mean, W var, W eps, W style_scale, W style_shift) {
  return {mean, (1 + style_scale) / root(var + eps), style_shift};
}

template <typename W>
SIVAE_HD W normed(const Norm<W>& f, W a) {
  return (a - f.mean) * f.scale + f.shift;
}

// The gradient of a, linear in g and a: by_g g + level + by_a (a - mean).
template <typename W>
struct Slope {
  W mean, by_g, level, by_a;
};

// style_scale: of the style, scale - 1. sum, moment: S1, S2. Returns also the gradient of the style's scale, r S2.
template <typename W>
SIVAE_HD Slope<W> slope(W mean, W std, W eps, W style_scale, W pixels, W sum, W moment, W g_mean, W g_std,
                        W* grad_scale) {
  const W r = 1 / root(std * std + eps);
  const W kr = (1 + style_scale) * r;
  const W by_std = std == 0 ? W(0) : g_std / (pixels * std);  // a constant channel: taken as zero
  *grad_scale = r * moment;
  return {mean, kr, (g_mean - kr * sum) / pixels, by_std - kr * r * (r * moment) / pixels};
}

// The gradient of v.
template <typename W>
SIVAE_HD W backward(const Before<W>& f, const Slope<W>& s, W v, W g) {
  const W d = s.by_g * g + s.level + s.by_a * (leaky(f, v) - s.mean);
  return v > 0 ? d : d * f.alpha;
}

}  // namespace sivae::adain_act
