// adain_act on the CPU. Contiguous: one channel of one sample at a time, which stays in the cache between the pass that
// measures it and the one that writes it. channels_last: COLUMNS channels of one sample at a time.
#include "adain_act/host.h"
#include "common/place.h"
#include "common/rows_cpu.h"

namespace sivae::adain_act {
namespace {

// Reads all there is to know about the channel c of sample b.
template <typename T, typename W = Wide<T>>
struct Reader {
  const T* x;
  const W *noise, *strength, *bias, *style;
  int64_t channels, space, noise_step;
  W eps, alpha;
  bool last;

  explicit Reader(const Call& call)
      : x(read<T>(call.x.tensor)),
        noise(read<W>(call.noise)),
        strength(read<W>(call.strength)),
        bias(read<W>(call.bias)),
        style(read<W>(call.style)),
        channels(call.x.channels),
        space(call.x.space),
        noise_step(call.noise_step()),
        eps(static_cast<W>(call.eps)),
        alpha(static_cast<W>(call.alpha)),
        last(call.x.last) {}

  // Where the channel's first pixel lies; the next one is `last ? channels : 1` further.
  int64_t start(int64_t b, int64_t c) const {
    const Shape shape{0, channels, space};
    return last ? shape.in_last(b, c, 0) : shape.in_plane(b, c, 0);
  }
  const W* noise_of(int64_t b) const { return noise ? noise + b * noise_step : nullptr; }
  Before<W> before(int64_t c) const { return {at(strength, c), at(bias, c), alpha}; }
  W scale(int64_t b, int64_t c) const { return at(style, 2 * b * channels + c); }
  W shift(int64_t b, int64_t c) const { return at(style, (2 * b + 1) * channels + c); }
};

// Calls f(with noise) so that the choice is made outside of the loops.
template <typename F>
void with_noise(bool noise, const F& f) {
  if (noise) {
    f(std::true_type{});
  } else {
    f(std::false_type{});
  }
}

template <bool NOISE, typename T, typename W>
W value_at(const Before<W>& f, const T* x, const W* noise, int64_t i) {
  if constexpr (NOISE) return value(f, widen(x[i]), noise[i]);
  else return value(f, widen(x[i]));
}

template <bool NOISE, typename T, typename W>
void forward_rows(const Reader<T>& in, int64_t batch, T* y, W* mean, W* std) {
  torch::stable::parallel_for(0, batch * in.channels, pieces(in.space), [&](int64_t from, int64_t to) {
    for (int64_t k = from; k < to; ++k) {
      const int64_t b = k / in.channels, c = k % in.channels;
      const Before<W> f = in.before(c);
      const T* x = in.x + in.start(b, c);
      const W* noise = in.noise_of(b);
      const Moments<double> found = row_moments<W>(in.space, [&](int64_t first, int64_t many, W* __restrict out) {
        for (int64_t i = 0; i < many; ++i) out[i] = leaky(f, value_at<NOISE>(f, x, noise, first + i));
      });
      const double var = found.squares / found.count;
      mean[k] = static_cast<W>(found.sum / found.count);
      std[k] = static_cast<W>(root(var));
      const Norm<W> n = norm(mean[k], static_cast<W>(var), in.eps, in.scale(b, c), in.shift(b, c));
      T* __restrict out = y + in.start(b, c);
      for (int64_t i = 0; i < in.space; ++i) out[i] = narrow<T>(normed(n, leaky(f, value_at<NOISE>(f, x, noise, i))));
    }
  });
}

template <bool NOISE, typename T, typename W>
void forward_columns(const Reader<T>& in, int64_t batch, T* y, W* mean, W* std) {
  const int64_t tiles = (in.channels + COLUMNS - 1) / COLUMNS;
  torch::stable::parallel_for(0, batch * tiles, pieces(in.space * COLUMNS), [&](int64_t from, int64_t to) {
    Before<W> f[COLUMNS];
    Norm<W> n[COLUMNS];
    Moments<double> found[COLUMNS];
    for (int64_t k = from; k < to; ++k) {
      const int64_t b = k / tiles, c0 = k % tiles * COLUMNS, many = std::min(COLUMNS, in.channels - c0);
      for (int64_t c = 0; c < many; ++c) f[c] = in.before(c0 + c);
      const T* x = in.x + in.start(b, c0);
      const W* noise = in.noise_of(b);
      const auto fill = [&](int64_t p, W* __restrict out) {
        const T* row = x + p * in.channels;
        const W drawn = NOISE ? noise[p] : W(0);
        for (int64_t c = 0; c < many; ++c) {
          out[c] = leaky(f[c], NOISE ? value(f[c], widen(row[c]), drawn) : value(f[c], widen(row[c])));
        }
      };
      column_moments<W>(in.space, many, found, fill);
      for (int64_t c = 0; c < many; ++c) {
        const int64_t at = b * in.channels + c0 + c;
        const double var = found[c].squares / found[c].count;
        mean[at] = static_cast<W>(found[c].sum / found[c].count);
        std[at] = static_cast<W>(root(var));
        n[c] = norm(mean[at], static_cast<W>(var), in.eps, in.scale(b, c0 + c), in.shift(b, c0 + c));
      }
      W row[COLUMNS];
      for (int64_t p = 0; p < in.space; ++p) {
        fill(p, row);
        T* __restrict out = y + in.start(b, c0) + p * in.channels;
        for (int64_t c = 0; c < many; ++c) out[c] = narrow<T>(normed(n[c], row[c]));
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> run(const Tensor& x, const Side& noise, const Side& strength, const Side& bias,
                                           const Side& style, double eps, double alpha) {
  const Call call = prepare(x, noise, strength, bias, style, eps, alpha);
  const Tensor y = empty_like_map(call.x, sizes_of(x));
  const Tensor mean = empty_wide(call, {call.x.batch, call.x.channels});
  const Tensor std = empty_wide(call, {call.x.batch, call.x.channels});
  if (y.numel() == 0) return {y, mean, std};
  by_type(x, [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    const Reader<T> in(call);
    with_noise(noise.has_value(), [&](auto with) {
      const auto go = call.x.last ? forward_columns<with.value, T, W> : forward_rows<with.value, T, W>;
      go(in, call.x.batch, write<T>(y), write<W>(mean), write<W>(std));
    });
  });
  return {y, mean, std};
}

// What the backward pass reads beside the map, and the sums over pixels that it leaves, (B, C) each.
template <typename W>
struct Gradients {
  const W *mean, *std, *g_mean, *g_std;
  W *style, *strength, *bias;  // style (B, 2 C)

  template <typename T>
  Slope<W> slope_of(const Reader<T>& in, int64_t b, int64_t c, W sum, W moment) const {
    const int64_t k = b * in.channels + c;
    style[(2 * b + 1) * in.channels + c] = sum;
    return slope(mean[k], std[k], in.eps, in.scale(b, c), static_cast<W>(in.space), sum, moment, g_mean[k], g_std[k],
                 &style[2 * b * in.channels + c]);
  }
};

template <bool NOISE, typename T, typename W>
void backward_rows(const Reader<T>& in, int64_t batch, const T* gy, const Gradients<W>& out, T* gx) {
  torch::stable::parallel_for(0, batch * in.channels, pieces(in.space), [&](int64_t from, int64_t to) {
    W one[CHUNK], two[CHUNK];
    for (int64_t k = from; k < to; ++k) {
      const int64_t b = k / in.channels, c = k % in.channels;
      const Before<W> f = in.before(c);
      const T *x = in.x + in.start(b, c), *g = gy + in.start(b, c);
      const W *noise = in.noise_of(b), mean = out.mean[k];
      double sum = 0, moment = 0;
      for (int64_t first = 0; first < in.space; first += CHUNK) {
        const int64_t many = std::min(CHUNK, in.space - first);
        for (int64_t i = 0; i < many; ++i) {
          one[i] = widen(g[first + i]);
          two[i] = one[i] * (leaky(f, value_at<NOISE>(f, x, noise, first + i)) - mean);
        }
        sum += sum_of(one, many);
        moment += sum_of(two, many);
      }
      const Slope<W> s = out.slope_of(in, b, c, static_cast<W>(sum), static_cast<W>(moment));
      double by_noise = 0, total = 0;
      for (int64_t first = 0; first < in.space; first += CHUNK) {
        const int64_t many = std::min(CHUNK, in.space - first);
        T* __restrict to_x = gx + in.start(b, c) + first;
        for (int64_t i = 0; i < many; ++i) {
          one[i] = backward(f, s, value_at<NOISE>(f, x, noise, first + i), widen(g[first + i]));
          to_x[i] = narrow<T>(one[i]);
        }
        total += sum_of(one, many);
        if constexpr (NOISE) {
          for (int64_t i = 0; i < many; ++i) one[i] *= noise[first + i];
          by_noise += sum_of(one, many);
        }
      }
      out.bias[k] = static_cast<W>(total);
      out.strength[k] = static_cast<W>(by_noise);
    }
  });
}

template <bool NOISE, typename T, typename W>
void backward_columns(const Reader<T>& in, int64_t batch, const T* gy, const Gradients<W>& out, T* gx) {
  constexpr int64_t ROWS = 32;
  const int64_t tiles = (in.channels + COLUMNS - 1) / COLUMNS;
  torch::stable::parallel_for(0, batch * tiles, pieces(in.space * COLUMNS), [&](int64_t from, int64_t to) {
    Before<W> f[COLUMNS];
    Slope<W> s[COLUMNS];
    W one[COLUMNS], two[COLUMNS];
    double sum[COLUMNS], moment[COLUMNS];
    for (int64_t k = from; k < to; ++k) {
      const int64_t b = k / tiles, c0 = k % tiles * COLUMNS, many = std::min(COLUMNS, in.channels - c0);
      for (int64_t c = 0; c < many; ++c) f[c] = in.before(c0 + c);
      const W *noise = in.noise_of(b), *mean = out.mean + b * in.channels + c0;
      const int64_t start = in.start(b, c0);
      // each(p, c, v, g) for all elements; what it adds to `one` and `two` is collected in `sum` and `moment`.
      const auto sweep = [&](const auto& each) {
        std::fill_n(sum, many, 0.0);
        std::fill_n(moment, many, 0.0);
        for (int64_t first = 0; first < in.space; first += ROWS) {
          std::fill_n(one, many, W(0));
          std::fill_n(two, many, W(0));
          for (int64_t p = first; p < std::min(first + ROWS, in.space); ++p) {
            const T *x = in.x + start + p * in.channels, *g = gy + start + p * in.channels;
            const W drawn = NOISE ? noise[p] : W(0);
            for (int64_t c = 0; c < many; ++c) {
              each(p, c, NOISE ? value(f[c], widen(x[c]), drawn) : value(f[c], widen(x[c])), widen(g[c]), drawn);
            }
          }
          for (int64_t c = 0; c < many; ++c) sum[c] += one[c];
          for (int64_t c = 0; c < many; ++c) moment[c] += two[c];
        }
      };
      sweep([&](int64_t, int64_t c, W v, W g, W) {
        one[c] += g;
        two[c] += g * (leaky(f[c], v) - mean[c]);
      });
      for (int64_t c = 0; c < many; ++c) {
        s[c] = out.slope_of(in, b, c0 + c, static_cast<W>(sum[c]), static_cast<W>(moment[c]));
      }
      T* __restrict to_x = gx + start;
      sweep([&](int64_t p, int64_t c, W v, W g, W drawn) {
        const W d = backward(f[c], s[c], v, g);
        to_x[p * in.channels + c] = narrow<T>(d);
        one[c] += d;
        two[c] += d * drawn;
      });
      for (int64_t c = 0; c < many; ++c) {
        out.bias[b * in.channels + c0 + c] = static_cast<W>(sum[c]);
        out.strength[b * in.channels + c0 + c] = static_cast<W>(moment[c]);
      }
    }
  });
}

// (B, C) -> (C,), from the first sample to the last.
template <typename W>
void over_samples(const Tensor& rows, const Tensor& out) {
  const int64_t batch = rows.size(0), channels = rows.size(1);
  const W* from = read<W>(rows);
  W* to = write<W>(out);
  std::fill_n(to, channels, W(0));
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t c = 0; c < channels; ++c) to[c] += from[b * channels + c];
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> run_backward(const Tensor& gy, const Tensor& x, const Side& noise,
                                                    const Side& strength, const Side& bias, const Side& style,
                                                    const Tensor& mean, const Tensor& std, const Tensor& g_mean,
                                                    const Tensor& g_std, double eps, double alpha) {
  const Call call = prepare(x, noise, strength, bias, style, eps, alpha);
  const Map g = like_map(gy, call.x);
  check_statistics(call, {&mean, &std, &g_mean, &g_std});
  const int64_t batch = call.x.batch, channels = call.x.channels;
  const Tensor gx = empty_like_map(call.x, sizes_of(x));
  const Tensor g_style = empty_wide(call, {batch, 2 * channels});
  const Tensor rows_bias = empty_wide(call, {batch, channels}), rows_strength = empty_wide(call, {batch, channels});
  const Tensor g_bias = empty_wide(call, {channels}), g_strength = empty_wide(call, {channels});
  by_type(x, [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    const Reader<T> in(call);
    const Gradients<W> out{read<W>(mean),    read<W>(std),      read<W>(g_mean),
                           read<W>(g_std),   write<W>(g_style), write<W>(rows_strength),
                           write<W>(rows_bias)};
    with_noise(noise.has_value(), [&](auto with) {
      const auto go = call.x.last ? backward_columns<with.value, T, W> : backward_rows<with.value, T, W>;
      if (gx.numel() > 0) go(in, batch, read<T>(g.tensor), out, write<T>(gx));
    });
    over_samples<W>(rows_bias, g_bias);
    over_samples<W>(rows_strength, g_strength);
  });
  return {gx, g_strength, g_bias, g_style};
}

}  // namespace
}  // namespace sivae::adain_act

STABLE_TORCH_LIBRARY_IMPL(sivae, CPU, m) {
  m.impl("adain_act", TORCH_BOX(&sivae::adain_act::run));
  m.impl("adain_act_backward", TORCH_BOX(&sivae::adain_act::run_backward));
}
