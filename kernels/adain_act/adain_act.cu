// adain_act on a GPU. Forward: a pass that measures, a pass that writes. Backward: a pass for the two sums that the
// derivative needs, a pass that writes it and adds up the gradients of bias and strength.
#include "adain_act/host.h"
#include "common/planes.h"

namespace sivae::adain_act {
namespace {

using planes::Cut;

// What all passes read: the map, and what is added to it before the activation.
template <typename T_, int IN_, int OUT_, int SUMS_, bool MOMENTS_>
struct Pass {
  using T = T_;
  using W = Wide<T>;
  static constexpr int IN = IN_, OUT = OUT_, SUMS = SUMS_;
  static constexpr bool MOMENTS = MOMENTS_;

  const T *x, *g;
  T* y;
  const W *noise, *strength, *bias;
  int64_t noise_step, channels;
  W alpha;

  SIVAE_HD const T* in(int k) const { return k == 0 ? x : g; }
  SIVAE_HD T* out(int) const { return y; }
  int group() const { return noise ? planes::GROUP : 1; }
  template <int V, bool LAST, typename C>
  __device__ void beside(const C*, int64_t b, int64_t, int64_t p, W (&values)[V]) const {
    if (!noise) return;
    const W* from = noise + b * noise_step + p;
    if constexpr (LAST) {
#pragma unroll
      for (int i = 0; i < V; ++i) values[i] = *from;
    } else {
      const planes::Few<V, W> few = planes::load<V>(from);
#pragma unroll
      for (int i = 0; i < V; ++i) values[i] = few.item[i];
    }
  }
  SIVAE_HD Before<W> before(int64_t c) const { return {at(strength, c), at(bias, c), alpha}; }

  Pass(const Call& call, const T* gradient, T* result)
      : x(read<T>(call.x.tensor)),
        g(gradient),
        y(result),
        noise(read<W>(call.noise)),
        strength(read<W>(call.strength)),
        bias(read<W>(call.bias)),
        noise_step(call.noise_step()),
        channels(call.x.channels),
        alpha(static_cast<W>(call.alpha)) {}
};

template <typename T, typename W = Wide<T>>
struct Measure : Pass<T, 1, 1, 0, true> {
  using Pass<T, 1, 1, 0, true>::Pass;
  using Channel = Before<W>;
  SIVAE_HD Channel channel(int64_t, int64_t c) const { return this->before(c); }
  SIVAE_HD void operator()(const Channel& f, const W (&v)[1], W noise, W (&o)[1], W (&)[1]) const {
    o[0] = leaky(f, value(f, v[0], noise));
  }
};

template <typename W>
struct Applied {
  Before<W> before;
  Norm<W> norm;
};

template <typename T, typename W = Wide<T>>
struct Apply : Pass<T, 1, 1, 0, false> {
  using Base = Pass<T, 1, 1, 0, false>;
  using Channel = Applied<W>;
  const W *mean, *std, *style;
  W eps;
  Apply(const Call& call, T* result, const W* mean_, const W* std_)
      : Base(call, nullptr, result), mean(mean_), std(std_), style(read<W>(call.style)), eps(static_cast<W>(call.eps)) {}
  SIVAE_HD Channel channel(int64_t b, int64_t c) const {
    const int64_t k = b * this->channels + c, s = 2 * b * this->channels + c;
    return {this->before(c), norm(mean[k], std[k] * std[k], eps, at(style, s), at(style, s + this->channels))};
  }
  SIVAE_HD void operator()(const Channel& f, const W (&v)[1], W noise, W (&o)[1], W (&)[1]) const {
    o[0] = normed(f.norm, leaky(f.before, value(f.before, v[0], noise)));
  }
};

template <typename W>
struct Weighed {
  Before<W> before;
  W mean;
};

// S1 and S2.
template <typename T, typename W = Wide<T>>
struct Weigh : Pass<T, 2, 0, 2, false> {
  using Base = Pass<T, 2, 0, 2, false>;
  using Channel = Weighed<W>;
  const W* mean;
  Weigh(const Call& call, const T* gradient, const W* mean_) : Base(call, gradient, nullptr), mean(mean_) {}
  SIVAE_HD Channel channel(int64_t b, int64_t c) const { return {this->before(c), mean[b * this->channels + c]}; }
  SIVAE_HD void operator()(const Channel& f, const W (&v)[2], W noise, W (&)[1], W (&s)[2]) const {
    s[0] += v[1];
    s[1] += v[1] * (leaky(f.before, value(f.before, v[0], noise)) - f.mean);
  }
};

template <typename W>
struct Sloped {
  Before<W> before;
  Slope<W> slope;
};

template <typename T, typename W = Wide<T>>
struct Differentiate : Pass<T, 2, 1, 2, false> {
  using Base = Pass<T, 2, 1, 2, false>;
  using Channel = Sloped<W>;
  const Slope<W>* slopes;
  Differentiate(const Call& call, const T* gradient, T* result, const Slope<W>* slopes_)
      : Base(call, gradient, result), slopes(slopes_) {}
  SIVAE_HD Channel channel(int64_t b, int64_t c) const { return {this->before(c), slopes[b * this->channels + c]}; }
  SIVAE_HD void operator()(const Channel& f, const W (&v)[2], W noise, W (&o)[1], W (&s)[2]) const {
    o[0] = backward(f.before, f.slope, value(f.before, v[0], noise), v[1]);
    s[0] += o[0];
    s[1] += o[0] * noise;
  }
};

template <typename W>
struct Statistics {
  W *mean, *std;
  int64_t channels;
  SIVAE_HD void operator()(int64_t b, int64_t c, const W (&total)[2]) const {
    mean[b * channels + c] = total[0];
    std[b * channels + c] = root(total[1]);
  }
};

template <typename W>
struct Slopes {
  const W *mean, *std, *g_mean, *g_std, *style;
  W eps, pixels;
  Slope<W>* slopes;
  W* g_style;
  int64_t channels;
  SIVAE_HD void operator()(int64_t b, int64_t c, const W (&total)[2]) const {
    const int64_t k = b * channels + c, s = 2 * b * channels + c;
    g_style[s + channels] = total[0];
    slopes[k] = slope(mean[k], std[k], eps, at(style, s), pixels, total[0], total[1], g_mean[k], g_std[k], &g_style[s]);
  }
};

template <typename W>
struct Kept {
  W *bias, *strength;
  int64_t channels;
  SIVAE_HD void operator()(int64_t b, int64_t c, const W (&total)[2]) const {
    bias[b * channels + c] = total[0];
    strength[b * channels + c] = total[1];
  }
};

inline int64_t gathering_blocks(const Launcher& launch, const Shape& shape) {
  return std::min(shape.batch * shape.channels, launch.resident_blocks() * 8);
}

std::tuple<Tensor, Tensor, Tensor> run(const Tensor& x, const Side& noise, const Side& strength, const Side& bias,
                                       const Side& style, double eps, double alpha) {
  const Launcher launch(x);
  const Call call = prepare(x, noise, strength, bias, style, eps, alpha);
  const Shape shape{call.x.batch, call.x.channels, call.x.space};
  const Tensor y = empty_like_map(call.x, sizes_of(x));
  const Tensor mean = empty_wide(call, {shape.batch, shape.channels});
  const Tensor std = empty_wide(call, {shape.batch, shape.channels});
  if (y.numel() == 0) return {y, mean, std};
  by_type(x, [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    const Measure<T> measure(call, nullptr, nullptr);
    T* result = write<T>(y);
    const Cut how = planes::cut<T>(shape, call.x.last, aligned(measure.x) && aligned(result) && aligned(measure.noise));
    const Tensor parts = empty_wide(call, {shape.batch, shape.channels, how.chunks, 2});
    planes::pass(launch, measure, shape, how, write<W>(parts));
    launch(planes::gather_moments<Statistics<W>, W>, gathering_blocks(launch, shape), dim3(32),
           static_cast<const W*>(write<W>(parts)), shape, how.chunks, how.length,
           Statistics<W>{write<W>(mean), write<W>(std), shape.channels});
    planes::pass(launch, Apply<T>(call, result, read<W>(mean), read<W>(std)), shape, how, static_cast<W*>(nullptr));
  });
  return {y, mean, std};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> run_backward(const Tensor& gy, const Tensor& x, const Side& noise,
                                                        const Side& strength, const Side& bias, const Side& style,
                                                        const Tensor& mean, const Tensor& std, const Tensor& g_mean,
                                                        const Tensor& g_std, double eps, double alpha) {
  const Launcher launch(x);
  const Call call = prepare(x, noise, strength, bias, style, eps, alpha);
  const Map g = like_map(gy, call.x);
  check_statistics(call, {&mean, &std, &g_mean, &g_std});
  const Shape shape{call.x.batch, call.x.channels, call.x.space};
  const Tensor gx = empty_like_map(call.x, sizes_of(x));
  const Tensor g_style = empty_wide(call, {shape.batch, 2 * shape.channels});
  Tensor g_bias = empty_wide(call, {shape.channels}), g_strength = empty_wide(call, {shape.channels});
  if (gx.numel() == 0) {
    torch::stable::zero_(g_bias);
    torch::stable::zero_(g_strength);
    return {gx, g_strength, g_bias, g_style};
  }
  by_type(x, [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    const Weigh<T> weigh(call, read<T>(g.tensor), read<W>(mean));
    T* result = write<T>(gx);
    const bool all_aligned = aligned(weigh.x) && aligned(weigh.g) && aligned(result) && aligned(weigh.noise);
    const Cut how = planes::cut<T>(shape, call.x.last, all_aligned);
    const Tensor parts = empty_wide(call, {shape.batch, shape.channels, how.chunks, 2});
    const Tensor slopes = empty_wide(call, {shape.batch, shape.channels, sizeof(Slope<W>) / sizeof(W)});
    const Tensor per_sample = empty_wide(call, {2, shape.batch, shape.channels});
    auto* slopes_at = reinterpret_cast<Slope<W>*>(write<W>(slopes));
    W *parts_at = write<W>(parts), *biases = write<W>(per_sample), *strengths = biases + shape.batch * shape.channels;
    const int64_t blocks = gathering_blocks(launch, shape);

    planes::pass(launch, weigh, shape, how, parts_at);
    const Slopes<W> ends{read<W>(mean),  read<W>(std), read<W>(g_mean),
                         read<W>(g_std), read<W>(style), static_cast<W>(eps),
                         static_cast<W>(shape.space), slopes_at, write<W>(g_style),
                         shape.channels};
    const W* sums = parts_at;
    launch(planes::gather<2, Slopes<W>, W>, blocks, dim3(32), sums, shape, how.chunks, ends);
    planes::pass(launch, Differentiate<T>(call, weigh.g, result, slopes_at), shape, how, parts_at);
    launch(planes::gather<2, Kept<W>, W>, blocks, dim3(32), sums, shape, how.chunks,
           Kept<W>{biases, strengths, shape.channels});
    const int64_t few = (shape.channels + THREADS - 1) / THREADS;
    launch(planes::over_samples<W>, few, dim3(THREADS), static_cast<const W*>(biases), shape, write<W>(g_bias));
    launch(planes::over_samples<W>, few, dim3(THREADS), static_cast<const W*>(strengths), shape, write<W>(g_strength));
  });
  return {gx, g_strength, g_bias, g_style};
}

}  // namespace
}  // namespace sivae::adain_act

SIVAE_OPERATORS {
  m.impl("adain_act", TORCH_BOX(&sivae::adain_act::run));
  m.impl("adain_act_backward", TORCH_BOX(&sivae::adain_act::run_backward));
}
