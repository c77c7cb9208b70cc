// What the CPU and the CUDA operator have in common: reading the arguments, making the results.
#pragma once

#include <tuple>

#include "adain_act/adain_act.h"
#include "common/tensors.h"

namespace sivae::adain_act {

using Side = std::optional<Tensor>;

// A dense map, and the small tensors beside it: noise (B or 1, 1, H, W), strength (C,), bias (C,), style (B, 2 C).
struct Call {
  Map x;
  Side noise, strength, bias, style;
  double eps, alpha;

  // Noise of sample b begins at b * this.
  int64_t noise_step() const { return noise.has_value() && noise->size(0) > 1 ? x.space : 0; }
};

inline void check_side(const Side& side, const Tensor& x, int64_t numel, const char* name) {
  if (!side.has_value()) return;
  check_wide(*side, x, name);
  STD_TORCH_CHECK(side->numel() == numel, name, " has ", side->numel(), " numbers, expected ", numel);
}

inline Call prepare(const Tensor& x, const Side& noise, const Side& strength, const Side& bias, const Side& style,
                    double eps, double alpha) {
  STD_TORCH_CHECK(x.dim() == 4, "adain_act expects (B, C, H, W)");
  const Map map = dense(x);
  STD_TORCH_CHECK(map.space > 0, "a map without pixels has no statistics");
  STD_TORCH_CHECK(noise.has_value() == strength.has_value(), "noise and strength come together");
  if (noise.has_value()) {
    STD_TORCH_CHECK(noise->dim() == 4 && (noise->size(0) == 1 || noise->size(0) == map.batch), "noise has wrong sizes");
    check_side(noise, x, noise->size(0) * map.space, "noise");
  }
  check_side(strength, x, map.channels, "strength");
  check_side(bias, x, map.channels, "bias");
  check_side(style, x, 2 * map.batch * map.channels, "style");
  return {map, noise, strength, bias, style, eps, alpha};
}

// The statistics and their gradients, (B, C).
inline void check_statistics(const Call& call, const std::vector<const Tensor*>& all) {
  for (const Tensor* each : all) check_side(*each, call.x.tensor, call.x.batch * call.x.channels, "a statistic");
}

// A second map of the same sizes, type and layout.
inline Map like_map(const Tensor& g, const Map& x) {
  const Map map = dense(g);
  STD_TORCH_CHECK(map.last == x.last && sizes_of(g) == sizes_of(x.tensor) &&
                      g.scalar_type() == x.tensor.scalar_type() && g.is_cuda() == x.tensor.is_cuda(),
                  "the gradient and the map differ in layout, size, type or device");
  return map;
}

// Uninitialised, of the type sums are kept in.
inline Tensor empty_wide(const Call& call, const std::vector<int64_t>& sizes) {
  const Tensor& x = call.x.tensor;
  const auto type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return torch::stable::empty(sizes, type, std::nullopt, x.device());
}

// Element c of a channel vector, or zero.
template <typename W>
SIVAE_HD W at(const W* side, int64_t index) {
  return side ? side[index] : W(0);
}

}  // namespace sivae::adain_act
