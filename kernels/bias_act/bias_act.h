// The formula of bias_act and its derivative, element by element.
//
//     v = x + strength * noise + bias,  y = min(max(gain * act(v), -clamp), clamp)
//
// The derivative is taken from y where act can be turned round (all but swish, for a positive gain), so that x need not
// be kept; otherwise from v. Comparisons are written so that NaN passes as it does in PyTorch.
#pragma once

#include <cmath>

#include "common/portable.h"

namespace sivae::bias_act {

// In the order of ACTIVATIONS in sivae_dist/ops/bias_act.py.
enum Act : int { LINEAR, RELU, LRELU, TANH, SIGMOID, ELU, SELU, SOFTPLUS, SWISH, COUNT };

// What is compiled on its own. COUNT stands for the rest, which chooses at run time: little beside an exponential.
template <int A>
constexpr bool compiled = A == LINEAR || A == RELU || A == LRELU;

template <typename W>
struct Formula {
  int act;
  W alpha, gain;
  W clamp;  // negative: none
};

template <typename W>
SIVAE_HD W sigmoid(W v) {
  return W(1) / (W(1) + std::exp(-v));
}

constexpr double SELU_SCALE = 1.0507009873554804934193349852946, SELU_ALPHA = 1.6732632423543772848170429916717;

// act(v). A: the activation if `compiled`, else COUNT.
template <int A, typename W>
SIVAE_HD W activate(W v, const Formula<W>& f) {
  if constexpr (A == LINEAR) {
    return v;
  } else if constexpr (A == RELU) {
    return v <= W(0) ? W(0) : v;
  } else if constexpr (A == LRELU) {
    return v > W(0) ? v : v * f.alpha;
  } else {
    switch (f.act) {
      case LINEAR: return v;
      case RELU: return activate<RELU>(v, f);
      case LRELU: return activate<LRELU>(v, f);
      case TANH: return std::tanh(v);
      case SIGMOID: return sigmoid(v);
      case ELU: return v > W(0) ? v : std::expm1(v);
      case SELU: return W(SELU_SCALE) * (v > W(0) ? v : W(SELU_ALPHA) * std::expm1(v));
      case SOFTPLUS: return v > W(20) ? v : std::log1p(std::exp(v));
      default: return v / (W(1) + std::exp(-v));
    }
  }
}

// act'(v), from a = act(v).
template <int A, typename W>
SIVAE_HD W slope_of_output(W a, const Formula<W>& f) {
  if constexpr (A == LINEAR) {
    return W(1);
  } else if constexpr (A == RELU) {
    return a <= W(0) ? W(0) : W(1);
  } else if constexpr (A == LRELU) {
    return a > W(0) ? W(1) : f.alpha;
  } else {
    switch (f.act) {
      case LINEAR: return W(1);
      case RELU: return slope_of_output<RELU>(a, f);
      case LRELU: return slope_of_output<LRELU>(a, f);
      case TANH: return W(1) - a * a;
      case SIGMOID: return a * (W(1) - a);
      case ELU: return a > W(0) ? W(1) : a + W(1);
      case SELU: return a > W(0) ? W(SELU_SCALE) : a + W(SELU_SCALE * SELU_ALPHA);
      default: return -std::expm1(-a);  // softplus
    }
  }
}

// act'(v), from v.
template <typename W>
SIVAE_HD W slope_of_input(W v, const Formula<W>& f) {
  switch (f.act) {
    case SWISH: {
      const W s = sigmoid(v);
      return s * (W(1) + v * (W(1) - s));
    }
    case SOFTPLUS: return v > W(20) ? W(1) : sigmoid(v);
    case LRELU: return slope_of_output<LRELU>(v, f);  // the sign is the input's, whatever alpha is
    default: return slope_of_output<COUNT>(activate<COUNT>(v, f), f);
  }
}

template <int A, typename W>
SIVAE_HD W forward(W v, const Formula<W>& f) {
  W y = activate<A>(v, f) * f.gain;
  if (f.clamp >= W(0)) {
    y = y > f.clamp ? f.clamp : y;
    y = y < -f.clamp ? -f.clamp : y;
  }
  return y;
}

// dy/dv from y as it was stored. bound: the clamp as it was stored, for a clamped y has the value of that.
template <int A, typename W>
SIVAE_HD W slope_from_y(W y, W bound, const Formula<W>& f) {
  const W slope = slope_of_output<A>(compiled<A> ? y : y / f.gain, f) * f.gain;
  return f.clamp < W(0) || (y < bound && y > -bound) ? slope : W(0);
}

// dy/dv from v.
template <typename W>
SIVAE_HD W slope_from_v(W v, const Formula<W>& f) {
  const W slope = slope_of_input(v, f) * f.gain;
  if (f.clamp < W(0)) return slope;
  const W y = activate<COUNT>(v, f) * f.gain;
  return y <= f.clamp && y >= -f.clamp ? slope : W(0);
}

// Where element `index` of a dense (B, C, space) map lies. Templated: 32-bit division is several times faster.
template <typename I>
struct Place {
  I channel, pixel;  // pixel counts through the batch: b * space + s
};

template <typename I>
SIVAE_HD Place<I> place(I index, I channels, I space, bool last) {
  if (last) {
    const I pixel = index / channels;
    return {index - pixel * channels, pixel};
  }
  const I plane = index / space, b = plane / channels;
  return {plane - b * channels, b * space + (index - plane * space)};
}

}  // namespace sivae::bias_act
