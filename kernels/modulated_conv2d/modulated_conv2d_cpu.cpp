// The epilogue of a modulated layer on the CPU: one pass over the map either way, channel by channel of a sample, or (for
// channels_last) COLUMNS channels pixel by pixel.
#include "common/place.h"
#include "common/rows_cpu.h"
#include "modulated_conv2d/epilogue_cpu.h"
#include "modulated_conv2d/host.h"

namespace sivae::modulated_conv2d {
namespace {

// Calls work(b, c0, many, at(p)) for every channel of every sample, or every COLUMNS of them.
template <typename F>
void share(const Map& x, const F& work) {
  const Shape shape{x.batch, x.channels, x.space};
  const int64_t each = x.last ? COLUMNS : 1, tiles = (x.channels + each - 1) / each;
  torch::stable::parallel_for(0, x.batch * tiles, pieces(x.space * each), [&](int64_t from, int64_t to) {
    for (int64_t k = from; k < to; ++k) {
      const int64_t b = k / tiles, c0 = k % tiles * each;
      work(b, c0, std::min(each, x.channels - c0), x.last ? shape.in_last(b, c0, 0) : shape.in_plane(b, c0, 0));
    }
  });
}

std::tuple<Tensor, Tensor> run(const Tensor& x, const Tensor& scale, const Side& noise, const Side& strength,
                               const Side& bias, const Side& next, double alpha, double gain, double clamp, bool both) {
  const Call call = prepare(x, scale, noise, strength, bias, next, alpha, gain, clamp);
  const bool plain = both || !next.has_value();
  const Tensor y = empty_result(call, plain), scaled = empty_result(call, next.has_value());
  if (x.numel() == 0) return {y, scaled};
  by_type(x, [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    const Constants<W> constants(call);
    const Formula<W> f = call.formula<W>();
    const T* from = read<T>(call.x.tensor);
    T *to_y = plain ? write<T>(y) : nullptr, *to_scaled = next.has_value() ? write<T>(scaled) : nullptr;
    share(call.x, [&](int64_t b, int64_t c0, int64_t many, int64_t at) {
      const W* drawn = constants.noise ? constants.noise + b * constants.noise_step : nullptr;
      if (!call.x.last) {
        const Channel<W> c = constants.channel(b, c0);
        for (int64_t p = 0; p < call.x.space; p += CHUNK) {
          row(f, c, from + at + p, drawn ? drawn + p : nullptr, std::min(CHUNK, call.x.space - p),
              to_y ? to_y + at + p : nullptr, to_scaled ? to_scaled + at + p : nullptr);
        }
        return;
      }
      Channel<W> all[COLUMNS];
      W result[COLUMNS];
      for (int64_t c = 0; c < many; ++c) all[c] = constants.channel(b, c0 + c);
      for (int64_t p = 0; p < call.x.space; ++p, at += call.x.channels) {
        const W one = drawn ? drawn[p] : W(0);
        const T* source = from + at;
        for (int64_t c = 0; c < many; ++c) result[c] = activated(f, value(all[c], widen(source[c]), one));
        if (to_y) {
          for (int64_t c = 0; c < many; ++c) to_y[at + c] = narrow<T>(result[c]);
        }
        if (to_scaled) {
          for (int64_t c = 0; c < many; ++c) to_scaled[at + c] = narrow<T>(result[c] * all[c].next);
        }
      }
    });
  });
  return {y, scaled};
}

constexpr int SUMS = 4;  // scale, bias, strength, next

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> run_backward(const Side& g, const Side& g_scaled, const Tensor& x,
                                                                const Tensor& scale, const Side& noise,
                                                                const Side& strength, const Side& bias, const Side& next,
                                                                double alpha, double gain, double clamp) {
  const Call call = prepare(x, scale, noise, strength, bias, next, alpha, gain, clamp);
  const std::optional<Map> plain = like_map(g, call.x), beside = like_map(g_scaled, call.x);
  const int64_t batch = call.x.batch, channels = call.x.channels, rows = batch * channels;
  const Tensor dx = empty_result(call, true);
  const Tensor dscale = empty_wide(call, {batch, channels}), dnext = empty_wide(call, {batch, channels});
  const Tensor dbias = empty_wide(call, {channels}), dstrength = empty_wide(call, {});
  by_type(x, [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    const Constants<W> constants(call);
    const Formula<W> f = call.formula<W>();
    const T *from = read<T>(call.x.tensor), *from_y = plain ? read<T>(plain->tensor) : nullptr;
    const T* from_scaled = beside ? read<T>(beside->tensor) : nullptr;
    T* to = write<T>(dx);
    std::vector<W> biases(rows), strengths(rows);
    W* const totals[SUMS] = {write<W>(dscale), biases.data(), strengths.data(), write<W>(dnext)};
    // `many` neighbours; their Gradients go to dx and to `parts`.
    const auto pass = [&](int64_t at, int64_t many, const auto& channel, const auto& drawn, W (*__restrict parts)[SUMS]) {
      for (int64_t i = 0; i < many; ++i) {
        const W one = from_y ? widen(from_y[at + i]) : W(0), two = from_scaled ? widen(from_scaled[at + i]) : W(0);
        const Gradients<W> d = backward(channel(i), f, widen(from[at + i]), drawn(i), one, two);
        to[at + i] = narrow<T>(d.x);
        parts[i][0] = d.scale;
        parts[i][1] = d.bias;
        parts[i][2] = d.strength;
        parts[i][3] = d.next;
      }
    };
    share(call.x, [&](int64_t b, int64_t c0, int64_t many, int64_t at) {
      const W* drawn = constants.noise ? constants.noise + b * constants.noise_step : nullptr;
      if (!call.x.last) {
        const Channel<W> c = constants.channel(b, c0);
        W parts[CHUNK][SUMS], column[CHUNK];
        double sum[SUMS] = {};
        for (int64_t p = 0; p < call.x.space; p += CHUNK) {
          const int64_t length = std::min(CHUNK, call.x.space - p);
          pass(at + p, length, [&](int64_t) { return c; }, [&](int64_t i) { return drawn ? drawn[p + i] : W(0); }, parts);
          for (int s = 0; s < SUMS; ++s) {
            for (int64_t i = 0; i < length; ++i) column[i] = parts[i][s];
            sum[s] += sum_of(column, length);
          }
        }
        for (int s = 0; s < SUMS; ++s) totals[s][b * channels + c0] = static_cast<W>(sum[s]);
        return;
      }
      Channel<W> all[COLUMNS];
      W parts[COLUMNS][SUMS];
      double sum[COLUMNS][SUMS] = {};
      for (int64_t c = 0; c < many; ++c) all[c] = constants.channel(b, c0 + c);
      for (int64_t p = 0; p < call.x.space; ++p, at += channels) {
        pass(at, many, [&](int64_t c) { return all[c]; }, [&](int64_t) { return drawn ? drawn[p] : W(0); }, parts);
        for (int64_t c = 0; c < many; ++c) {
          for (int s = 0; s < SUMS; ++s) sum[c][s] += parts[c][s];
        }
      }
      for (int64_t c = 0; c < many; ++c) {
        for (int s = 0; s < SUMS; ++s) totals[s][b * channels + c0 + c] = static_cast<W>(sum[c][s]);
      }
    });
    double strength_total = 0;
    for (int64_t c = 0; c < channels; ++c) {
      double total = 0;
      for (int64_t b = 0; b < batch; ++b) total += biases[b * channels + c];
      for (int64_t b = 0; b < batch; ++b) strength_total += strengths[b * channels + c];
      write<W>(dbias)[c] = static_cast<W>(total);
    }
    *write<W>(dstrength) = static_cast<W>(strength_total);
  });
  return {dx, dscale, dbias, dstrength, dnext};
}

}  // namespace
}  // namespace sivae::modulated_conv2d

STABLE_TORCH_LIBRARY_IMPL(sivae, CPU, m) {
  m.impl("modulated_epilogue", TORCH_BOX(&sivae::modulated_conv2d::run));
  m.impl("modulated_epilogue_backward", TORCH_BOX(&sivae::modulated_conv2d::run_backward));
}
