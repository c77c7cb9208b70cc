// What the CPU and the CUDA operators have in common: reading the arguments, making the results.
#pragma once

#include <tuple>

#include "common/tensors.h"
#include "norm_act/norm_act.h"

namespace sivae::norm_act {

using Side = std::optional<Tensor>;

// A dense map of height x width pixels, a second one of its kind (or none), constants for a channel (C) or for a channel
// of a sample (B, C), and what happens to the result.
struct Call {
  Map x;
  std::optional<Map> skip;
  Tensor mean, scale, shift;
  int64_t per_sample;  // from one sample's constants to the next one's: C or 0
  int64_t height, width;
  bool first;  // the skip is added before the norm
  Resample resample;
  double alpha;

  std::vector<int64_t> result_sizes() const {
    const int64_t h = resample == DOWN ? height / 2 : resample == UP ? height * 2 : height;
    const int64_t w = resample == DOWN ? width / 2 : resample == UP ? width * 2 : width;
    return {x.batch, x.channels, h, w};
  }
};

// A second map of the same layout, type and device, of these sizes.
inline Map second_map(const Tensor& other, const Map& x, const std::vector<int64_t>& sizes, const char* name) {
  const Map map = dense(other);
  STD_TORCH_CHECK(sizes_of(other) == sizes && other.scalar_type() == x.tensor.scalar_type() &&
                      other.is_cuda() == x.tensor.is_cuda(),
                  name, " and the map differ in size, type or device");
  // Where both layouts hold (one pixel, one channel) the offsets are the same.
  STD_TORCH_CHECK(map.last == x.last || map.channels == 1 || map.space == 1 || map.tensor.numel() == 0, name,
                  " and the map differ in layout");
  return map;
}

inline void check_constant(const Tensor& side, const Map& x, int64_t rows) {
  check_wide(side, x.tensor, "a constant");
  STD_TORCH_CHECK(side.numel() == rows * x.channels, "a constant has ", side.numel(), " numbers");
}

inline Call prepare(const Tensor& x, const Side& skip, const Tensor& mean, const Tensor& scale, const Tensor& shift,
                    bool first, int64_t resample, double alpha) {
  STD_TORCH_CHECK(x.dim() == 4, "norm_act expects (B, C, H, W)");
  STD_TORCH_CHECK(resample >= NONE && resample <= UP, "unknown resampling");
  const Map map = dense(x);
  const int64_t rows = mean.dim() == 2 ? map.batch : 1;
  for (const Tensor* side : {&mean, &scale, &shift}) check_constant(*side, map, rows);
  Call call{map, std::nullopt, mean, scale, shift, mean.dim() == 2 ? map.channels : 0,
            x.size(2), x.size(3), first, static_cast<Resample>(resample), alpha};
  if (skip.has_value()) call.skip = second_map(*skip, map, sizes_of(x), "the skip");
  return call;
}

inline Tensor empty_wide(const Map& x, const std::vector<int64_t>& sizes) {
  const auto type = x.tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return torch::stable::empty(sizes, type, std::nullopt, x.tensor.device());
}

}  // namespace sivae::norm_act
