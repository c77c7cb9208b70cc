// What the CPU and the CUDA operator have in common: reading the arguments, making the results.
#pragma once

#include <tuple>

#include "bias_act/bias_act.h"
#include "common/tensors.h"

namespace sivae::bias_act {

// The small tensors beside a map; all are of the wide type.
struct Sides {
  std::optional<Tensor> bias, noise, strength;
  bool noise_shared = false;  // one noise map for the whole batch

  void check(const Map& map) {
    const Tensor& x = map.tensor;
    if (bias.has_value()) {
      check_wide(*bias, x, "bias");
      STD_TORCH_CHECK(bias->dim() == 1 && bias->numel() == map.channels, "bias must be (C,)");
    }
    STD_TORCH_CHECK(noise.has_value() == strength.has_value(), "noise and strength come together");
    if (noise.has_value()) {
      check_wide(*noise, x, "noise");
      check_wide(*strength, x, "strength");
      STD_TORCH_CHECK(strength->numel() == 1, "strength must be one number");
      noise_shared = noise->size(0) == 1;
      STD_TORCH_CHECK(noise->numel() == map.space * (noise_shared ? 1 : map.batch), "noise must be (B or 1, 1, ...)");
    }
  }
};

// The arguments of either direction, with what the results are written to.
struct Call {
  Map map;  // x, or the gradient
  std::optional<Map> saved;
  Sides sides;
  int64_t act;
  double alpha, gain, clamp;
  bool from_output = false;
  Tensor y = {}, dbias = {}, dstrength = {};

  template <typename W>
  Formula<W> formula() const {
    return {static_cast<int>(act), static_cast<W>(alpha), static_cast<W>(gain), static_cast<W>(clamp)};
  }
};

inline Call prepare(const Tensor& x, const std::optional<Tensor>& bias, const std::optional<Tensor>& noise,
                    const std::optional<Tensor>& strength, int64_t act, double alpha, double gain, double clamp) {
  STD_TORCH_CHECK(act >= 0 && act < COUNT, "unknown activation");
  Call call{dense(x), std::nullopt, {bias, noise, strength}, act, alpha, gain, clamp};
  call.sides.check(call.map);
  call.y = empty_like_map(call.map, sizes_of(x));
  return call;
}

inline Tensor empty_wide(const Tensor& x, const std::vector<int64_t>& sizes) {
  const auto type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return torch::stable::empty(sizes, type, std::nullopt, x.device());
}

inline Call prepare_backward(const Tensor& gradient, const std::optional<Tensor>& saved,
                             const std::optional<Tensor>& bias, const std::optional<Tensor>& noise,
                             const std::optional<Tensor>& strength, int64_t act, double alpha, double gain,
                             double clamp, bool from_output, bool want_bias, bool want_strength) {
  Call call = prepare(gradient, bias, noise, strength, act, alpha, gain, clamp);
  if (saved.has_value()) {
    call.saved = dense(*saved);
    STD_TORCH_CHECK(call.saved->last == call.map.last && saved->numel() == gradient.numel() &&
                        saved->scalar_type() == gradient.scalar_type(),
                    "the gradient and the saved map differ in layout, size or type");
  }
  STD_TORCH_CHECK(!want_strength || noise.has_value(), "there is no noise whose strength has a gradient");
  call.from_output = from_output;
  call.dbias = empty_wide(gradient, {want_bias ? call.map.channels : 0});
  call.dstrength = empty_wide(gradient, want_strength ? std::vector<int64_t>{} : std::vector<int64_t>{0});
  return call;
}

// What the derivative is taken from.
enum Source { NOTHING, OUTPUT, INPUT };

inline Source source(const Call& call) { return !call.saved ? NOTHING : call.from_output ? OUTPUT : INPUT; }

template <int N>
using Constant = std::integral_constant<int, N>;

// Calls f(Constant<A>) with the activation if it is compiled on its own, else with COUNT. Not for double: it only checks.
template <typename T, typename F>
void by_act(int64_t act, const F& f) {
  if constexpr (!std::is_same_v<T, double>) {
    if (act == LINEAR) return f(Constant<LINEAR>{});
    if (act == RELU) return f(Constant<RELU>{});
    if (act == LRELU) return f(Constant<LRELU>{});
  }
  f(Constant<COUNT>{});
}

// As by_act, with the source as well: f(A, S). Without a saved map the slope is the gain, whatever the activation.
template <typename T, typename F>
void by_act_and_source(const Call& call, const F& f) {
  if (source(call) == NOTHING) return f(Constant<LINEAR>{}, Constant<NOTHING>{});
  if (source(call) == INPUT) return f(Constant<COUNT>{}, Constant<INPUT>{});
  if constexpr (!std::is_same_v<T, double>) {
    if (call.act == RELU) return f(Constant<RELU>{}, Constant<OUTPUT>{});
    if (call.act == LRELU) return f(Constant<LRELU>{}, Constant<OUTPUT>{});
  }
  f(Constant<COUNT>{}, Constant<OUTPUT>{});
}

}  // namespace sivae::bias_act
