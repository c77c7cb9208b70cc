// bias_act on the CPU: pieces of fixed size, in each a plain loop that g++ vectorises. Sums are kept per piece, in lanes,
// and added up in order, so that they do not depend on the number of threads.
#include "bias_act/host.h"

namespace sivae::bias_act {
namespace {

constexpr int64_t PIECE = 4096;  // elements whose sums are kept in single precision before they go to double
constexpr int LANES = 16;

template <typename T>
struct Arrays {
  using W = Wide<T>;
  const T *x, *saved;
  T* y;
  const W *bias, *noise;
  W strength;

  explicit Arrays(const Call& call)
      : x(read<T>(call.map.tensor)),
        saved(call.saved ? read<T>(call.saved->tensor) : nullptr),
        y(write<T>(call.y)),
        bias(read<W>(call.sides.bias)),
        noise(read<W>(call.sides.noise)),
        strength(noise ? *read<W>(call.sides.strength) : W(0)) {}
};

inline int64_t pieces(int64_t length, int64_t piece) { return (length + piece - 1) / piece; }

// Calls f(unit, plane, from, to) for pieces of contiguous planes; unit = plane * pieces + piece.
template <typename F>
void by_piece(const Map& map, const F& f) {
  const int64_t count = pieces(map.space, PIECE), size = std::min(map.space, PIECE);
  if (count == 0) return;
  torch::stable::parallel_for(0, map.batch * map.channels * count, 4 * PIECE / size, [&](int64_t first, int64_t past) {
    for (int64_t unit = first; unit < past; ++unit) {
      const int64_t from = unit % count * PIECE;
      f(unit, unit / count, from, std::min(map.space, from + PIECE));
    }
  });
}

// Calls f(unit, first pixel, last pixel + 1) for groups of pixels of a channels_last map.
template <typename F>
void by_group(const Map& map, const F& f) {
  const int64_t pixels = map.batch * map.space, group = std::max<int64_t>(1, PIECE / std::max<int64_t>(1, map.channels));
  torch::stable::parallel_for(0, pieces(pixels, group), 4, [&](int64_t first, int64_t past) {
    for (int64_t unit = first; unit < past; ++unit) f(unit, unit * group, std::min(pixels, (unit + 1) * group));
  });
}

template <typename V>
double total(const V* values, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += values[i];
  return sum;
}

template <int A, typename T>
void forward_all(const Call& call) {
  using W = Wide<T>;
  const Map& map = call.map;
  const Arrays<T> a(call);
  const Formula<W> f = call.formula<W>();
  const int64_t space = map.space, channels = map.channels;
  if (map.last) {
    const std::vector<W> none(a.bias ? 0 : channels, W(0));
    const W* bias = a.bias ? a.bias : none.data();
    by_group(map, [&](int64_t, int64_t first, int64_t past) {
      for (int64_t pixel = first; pixel < past; ++pixel) {
        const W add = a.noise ? a.strength * a.noise[call.sides.noise_shared ? pixel % space : pixel] : W(0);
        const T* x = a.x + pixel * channels;
        T* __restrict y = a.y + pixel * channels;
        for (int64_t c = 0; c < channels; ++c) y[c] = narrow<T>(forward<A>(widen(x[c]) + add + bias[c], f));
      }
    });
    return;
  }
  by_piece(map, [&](int64_t, int64_t plane, int64_t from, int64_t to) {
    const W bias = a.bias ? a.bias[plane % channels] : W(0);
    const T* x = a.x + plane * space;
    T* __restrict y = a.y + plane * space;
    if (a.noise) {
      const W* noise = a.noise + (call.sides.noise_shared ? 0 : plane / channels * space);
      for (int64_t i = from; i < to; ++i) y[i] = narrow<T>(forward<A>(widen(x[i]) + a.strength * noise[i] + bias, f));
    } else {
      for (int64_t i = from; i < to; ++i) y[i] = narrow<T>(forward<A>(widen(x[i]) + bias, f));
    }
  });
}

template <int A, int S, typename T, typename W>
inline W slope(const T* saved, int64_t i, W add, W bound, const Formula<W>& f) {
  if constexpr (S == NOTHING) {
    return f.gain;
  } else if constexpr (S == OUTPUT) {
    return slope_from_y<A>(widen(saved[i]), bound, f);
  } else {
    return slope_from_v(widen(saved[i]) + add, f);
  }
}

template <int A, int S, typename T>
void backward_last(const Call& call) {
  using W = Wide<T>;
  const Map& map = call.map;
  const Arrays<T> a(call);
  const Formula<W> f = call.formula<W>();
  const W bound = widen(narrow<T>(f.clamp));
  const int64_t channels = map.channels, pixels = map.batch * map.space;
  const int64_t units = pieces(pixels, std::max<int64_t>(1, PIECE / std::max<int64_t>(1, channels)));
  std::vector<W> sums(units * channels, W(0));
  std::vector<double> weighted(units, 0.0);
  const std::vector<W> none(a.bias ? 0 : channels, W(0));
  const W* bias = a.bias ? a.bias : none.data();
  by_group(map, [&](int64_t unit, int64_t first, int64_t past) {
    W* __restrict sum = sums.data() + unit * channels;
    for (int64_t pixel = first; pixel < past; ++pixel) {
      const int64_t at = pixel * channels;
      const W noise = a.noise ? a.noise[call.sides.noise_shared ? pixel % map.space : pixel] : W(0);
      const W add = a.strength * noise;
      const T *g = a.x + at, *saved = a.saved ? a.saved + at : nullptr;
      T* __restrict dx = a.y + at;
      W lanes[LANES] = {};
      const auto one = [&](int64_t c, int lane) {
        const W value = widen(g[c]) * slope<A, S>(saved, c, S == INPUT ? add + bias[c] : W(0), bound, f);
        dx[c] = narrow<T>(value);
        sum[c] += value;
        lanes[lane] += value;
      };
      int64_t c = 0;
      for (; c + LANES <= channels; c += LANES) {
        for (int lane = 0; lane < LANES; ++lane) one(c + lane, lane);
      }
      for (int lane = 0; c < channels; ++c, ++lane) one(c, lane);
      if (a.noise) weighted[unit] += noise * total(lanes, LANES);
    }
  });
  if (call.dstrength.numel()) *write<W>(call.dstrength) = static_cast<W>(total(weighted.data(), units));
  for (int64_t c = 0; c < call.dbias.numel(); ++c) {
    double sum = 0;
    for (int64_t unit = 0; unit < units; ++unit) sum += sums[unit * channels + c];
    write<W>(call.dbias)[c] = static_cast<W>(sum);
  }
}

template <int A, int S, typename T>
void backward_planes(const Call& call) {
  using W = Wide<T>;
  const Map& map = call.map;
  const Arrays<T> a(call);
  const Formula<W> f = call.formula<W>();
  const W bound = widen(narrow<T>(f.clamp));
  const int64_t space = map.space, channels = map.channels, count = pieces(space, PIECE);
  const int64_t units = map.batch * channels * count;
  std::vector<double> sums(units), weighted(units);
  by_piece(map, [&](int64_t unit, int64_t plane, int64_t from, int64_t to) {
    const W bias = a.bias ? a.bias[plane % channels] : W(0);
    const W* noise = a.noise ? a.noise + (call.sides.noise_shared ? 0 : plane / channels * space) : nullptr;
    const T *g = a.x + plane * space, *saved = a.saved ? a.saved + plane * space : nullptr;
    T* __restrict dx = a.y + plane * space;
    W sum[LANES] = {}, by_noise[LANES] = {};
    const auto one = [&](int64_t i, int lane, W n) {
      const W value = widen(g[i]) * slope<A, S>(saved, i, S == INPUT ? a.strength * n + bias : W(0), bound, f);
      dx[i] = narrow<T>(value);
      sum[lane] += value;
      by_noise[lane] += value * n;
    };
    int64_t i = from;
    for (; i + LANES <= to; i += LANES) {
      if (noise) {
        for (int lane = 0; lane < LANES; ++lane) one(i + lane, lane, noise[i + lane]);
      } else {
        for (int lane = 0; lane < LANES; ++lane) one(i + lane, lane, W(0));
      }
    }
    for (int lane = 0; i < to; ++i, ++lane) one(i, lane, noise ? noise[i] : W(0));
    sums[unit] = total(sum, LANES);
    weighted[unit] = total(by_noise, LANES);
  });
  if (call.dstrength.numel()) *write<W>(call.dstrength) = static_cast<W>(total(weighted.data(), units));
  for (int64_t c = 0; c < call.dbias.numel(); ++c) {
    double sum = 0;
    for (int64_t b = 0; b < map.batch; ++b) sum += total(sums.data() + (b * channels + c) * count, count);
    write<W>(call.dbias)[c] = static_cast<W>(sum);
  }
}

Tensor run(const Tensor& x, const std::optional<Tensor>& bias, const std::optional<Tensor>& noise,
           const std::optional<Tensor>& strength, int64_t act, double alpha, double gain, double clamp) {
  const Call call = prepare(x, bias, noise, strength, act, alpha, gain, clamp);
  by_type(x, [&](auto element) {
    using T = decltype(element);
    by_act<T>(act, [&](auto a) { forward_all<decltype(a)::value, T>(call); });
  });
  return call.y;
}

std::tuple<Tensor, Tensor, Tensor> run_backward(const Tensor& gradient, const std::optional<Tensor>& saved,
                                                const std::optional<Tensor>& bias, const std::optional<Tensor>& noise,
                                                const std::optional<Tensor>& strength, int64_t act, double alpha,
                                                double gain, double clamp, bool from_output, bool want_bias,
                                                bool want_strength) {
  const Call call = prepare_backward(gradient, saved, bias, noise, strength, act, alpha, gain, clamp, from_output,
                                     want_bias, want_strength);
  by_type(gradient, [&](auto element) {
    using T = decltype(element);
    by_act_and_source<T>(call, [&](auto a, auto s) {
      constexpr int A = decltype(a)::value, S = decltype(s)::value;
      call.map.last ? backward_last<A, S, T>(call) : backward_planes<A, S, T>(call);
    });
  });
  return {call.y, call.dbias, call.dstrength};
}

}  // namespace
}  // namespace sivae::bias_act

STABLE_TORCH_LIBRARY_IMPL(sivae, CPU, m) {
  m.impl("bias_act", TORCH_BOX(&sivae::bias_act::run));
  m.impl("bias_act_backward", TORCH_BOX(&sivae::bias_act::run_backward));
}
