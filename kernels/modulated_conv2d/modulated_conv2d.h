// One element of what follows the convolution of a modulated layer, and of its derivative.
//
//   v = x scale + strength noise + bias     y = min(max(gain leaky(v), -clamp), clamp)     scaled = y next
//
// scale: of channel and sample, the demodulation; next: of channel and sample, the style of the layer that comes after.
#pragma once

#include "common/portable.h"

namespace sivae::modulated_conv2d {

template <typename W>
struct Channel {
  W scale, bias, strength, next;
};

template <typename W>
struct Formula {
  W alpha, gain, clamp;  // clamp below zero: none
};

template <typename W>
SIVAE_HD W value(const Channel<W>& c, W x, W noise) {
  return x * c.scale + c.strength * noise + c.bias;
}

template <typename W>
SIVAE_HD W activated(const Formula<W>& f, W v) {
  const W y = (v > 0 ? v : v * f.alpha) * f.gain;
  if (f.clamp < 0) return y;
  return y < -f.clamp ? -f.clamp : y > f.clamp ? f.clamp : y;  // NaN stays
}

// The derivative of y in v; zero beyond the clamp.
template <typename W>
SIVAE_HD W slope(const Formula<W>& f, W v) {
  const W s = (v > 0 ? W(1) : f.alpha) * f.gain;
  if (f.clamp < 0) return s;
  const W y = v * s;
  return y >= -f.clamp && y <= f.clamp ? s : W(0);
}

// From the gradients of y and of scaled: that of x, and what x, bias, strength and next get from this element.
template <typename W>
struct Gradients {
  W x, scale, bias, strength, next;
};

template <typename W>
SIVAE_HD Gradients<W> backward(const Channel<W>& c, const Formula<W>& f, W x, W noise, W g, W g_scaled) {
  const W v = value(c, x, noise);
  const W h = (g + g_scaled * c.next) * slope(f, v);
  return {h * c.scale, h * x, h, h * noise, g_scaled * activated(f, v)};
}

}  // namespace sivae::modulated_conv2d
