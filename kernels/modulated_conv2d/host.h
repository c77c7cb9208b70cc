// What the CPU and the CUDA operator have in common: reading the arguments, making the results.
#pragma once

#include <tuple>

#include "common/tensors.h"
#include "modulated_conv2d/modulated_conv2d.h"

namespace sivae::modulated_conv2d {

using Side = std::optional<Tensor>;

struct Call {
  Map x;
  Tensor scale;                    // (B, C)
  Side noise, strength, bias, next;  // (B or 1, 1, H, W), (), (C,), (B, C)
  double alpha, gain, clamp;

  int64_t noise_step() const { return noise.has_value() && noise->size(0) > 1 ? x.space : 0; }
  template <typename W>
  Formula<W> formula() const {
    return {static_cast<W>(alpha), static_cast<W>(gain), static_cast<W>(clamp)};
  }
};

inline void check_side(const Side& side, const Tensor& x, int64_t numel, const char* name) {
  if (!side.has_value()) return;
  check_wide(*side, x, name);
  STD_TORCH_CHECK(side->numel() == numel, name, " has ", side->numel(), " numbers, expected ", numel);
}

// Checks what stands beside a map of `map.space` pixels.
inline Call checked(const Map& map, const Tensor& scale, const Side& noise, const Side& strength, const Side& bias,
                    const Side& next, double alpha, double gain, double clamp) {
  const Tensor& x = map.tensor;
  const int64_t rows = map.batch * map.channels;
  check_side(scale, x, rows, "scale");
  check_side(next, x, rows, "next");
  check_side(bias, x, map.channels, "bias");
  check_side(strength, x, 1, "strength");
  STD_TORCH_CHECK(noise.has_value() == strength.has_value(), "noise and strength come together");
  if (noise.has_value()) {
    STD_TORCH_CHECK(noise->dim() == 4 && (noise->size(0) == 1 || noise->size(0) == map.batch), "noise has wrong sizes");
    check_side(noise, x, noise->size(0) * map.space, "noise");
  }
  return {map, scale, noise, strength, bias, next, alpha, gain, clamp};
}

inline Call prepare(const Tensor& x, const Tensor& scale, const Side& noise, const Side& strength, const Side& bias,
                    const Side& next, double alpha, double gain, double clamp) {
  STD_TORCH_CHECK(x.dim() == 4, "modulated_epilogue expects (B, C, H, W)");
  return checked(dense(x), scale, noise, strength, bias, next, alpha, gain, clamp);
}

// A gradient of the map's sizes, type and layout.
inline std::optional<Map> like_map(const Side& g, const Map& x) {
  if (!g.has_value()) return std::nullopt;
  const Map map = dense(*g);
  STD_TORCH_CHECK(map.last == x.last && sizes_of(*g) == sizes_of(x.tensor) &&
                      g->scalar_type() == x.tensor.scalar_type() && g->is_cuda() == x.tensor.is_cuda(),
                  "a gradient and the map differ in layout, size, type or device");
  return map;
}

inline Tensor empty_wide(const Call& call, const std::vector<int64_t>& sizes) {
  const Tensor& x = call.x.tensor;
  const auto type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return torch::stable::empty(sizes, type, std::nullopt, x.device());
}

// A result that is not wanted has no elements.
inline Tensor empty_result(const Call& call, bool wanted) {
  return empty_like_map(call.x, wanted ? sizes_of(call.x.tensor) : std::vector<int64_t>{0, 1, 1, 1});
}

// Pointers for the constants of a channel of a sample.
template <typename W>
struct Constants {
  const W *scale, *noise, *strength, *bias, *next;
  int64_t channels, noise_step;

  explicit Constants(const Call& call)
      : scale(read<W>(call.scale)),
        noise(read<W>(call.noise)),
        strength(read<W>(call.strength)),
        bias(read<W>(call.bias)),
        next(read<W>(call.next)),
        channels(call.x.channels),
        noise_step(call.noise_step()) {}

  SIVAE_HD Channel<W> channel(int64_t b, int64_t c) const {
    const int64_t k = b * channels + c;
    return {scale[k], bias ? bias[c] : W(0), strength ? *strength : W(0), next ? next[k] : W(0)};
  }
};

}  // namespace sivae::modulated_conv2d
