// FIR and epilogue of a modulated layer on the CPU, in one pass over memory either way: a row of u, or of its gradient,
// is made, used and forgotten while it lies in the cache. Rows of a channels_last map have the channels innermost.
#include "modulated_conv2d/epilogue_cpu.h"
#include "modulated_conv2d/fir_host.h"
#include "upfirdn2d/upfirdn2d.h"

namespace sivae::modulated_conv2d {
namespace {

constexpr int64_t BAND = 128;  // rows of dx that are made one after the other; TAPS - 1 more of u for each band
constexpr int SUMS = 4;        // scale, bias, strength, next

// The filter by tap, with the gain, and its factors where it is a product; for the gradient turned round.
template <typename W>
struct Taps {
  W all[TAPS][TAPS], y[TAPS], x[TAPS];
  bool separable;

  Taps(const FirCall& call, bool gradient) {
    for (int t = 0; t < TAPS * TAPS; ++t) {
      all[t / TAPS][t % TAPS] =
          read<W>(call.f)[element(t / TAPS, t % TAPS, call.flip != gradient)] * static_cast<W>(call.fir_gain);
    }
    separable = upfirdn2d::separate<TAPS>(&all[0][0], y, x);
  }
};

// out[i] = sum over rows r and columns n of all[r][n] rows[r][i + n inner - before inner], with zeros outside the rows of
// `length` elements and for rows that are null. buffer: length + (before + after) inner elements, zero at both ends.
template <typename S, typename W>
void filter(const S* const (&rows)[TAPS], const Taps<W>& f, int64_t length, int64_t before, int64_t after, int64_t inner,
            W* __restrict buffer, W* __restrict out) {
  const int64_t many = length + (before + after - (TAPS - 1)) * inner;
  W* __restrict middle = buffer + before * inner;
  const W *one = buffer + inner, *two = one + inner, *three = two + inner;
  if (f.separable) {
    const S *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3];
    const W *w = f.y, *v = f.x;
    if (r0 && r1 && r2 && r3) {
      for (int64_t i = 0; i < length; ++i) {
        middle[i] = (widen(r0[i]) * w[0] + widen(r1[i]) * w[1]) + (widen(r2[i]) * w[2] + widen(r3[i]) * w[3]);
      }
    } else {
      std::fill_n(middle, length, W(0));
      for (int r = 0; r < TAPS; ++r) {
        for (int64_t i = 0; rows[r] && i < length; ++i) middle[i] += widen(rows[r][i]) * w[r];
      }
    }
    for (int64_t i = 0; i < many; ++i) out[i] = (buffer[i] * v[0] + one[i] * v[1]) + (two[i] * v[2] + three[i] * v[3]);
    return;
  }
  std::fill_n(out, many, W(0));
  for (int r = 0; r < TAPS; ++r) {
    if (!rows[r]) continue;
    const W* v = f.all[r];
    for (int64_t i = 0; i < length; ++i) middle[i] = widen(rows[r][i]);
    for (int64_t i = 0; i < many; ++i) out[i] += (buffer[i] * v[0] + one[i] * v[1]) + (two[i] * v[2] + three[i] * v[3]);
  }
}

// What the passes know of the maps. A plane: a channel of a sample, or a sample with its channels innermost.
template <typename T, typename W = Wide<T>>
struct Maps {
  const T* from;
  Constants<W> constants;
  Formula<W> f;
  Span y, x;
  bool last;
  int64_t inner, planes, row_in, row_out, before, after;
  std::vector<W> bias, nothing;  // bias: zeros where there is none

  explicit Maps(const FirCall& call)
      : from(read<T>(call.call.x.tensor)),
        constants(call.call),
        f(call.call.formula<W>()),
        y(call.y),
        x(call.x),
        last(call.call.x.last),
        inner(last ? call.call.x.channels : 1),
        planes(last ? call.call.x.batch : call.call.x.batch * call.call.x.channels),
        row_in(x.in * inner),
        row_out(x.out * inner),
        before(x.pad),
        after(x.out - x.in - x.pad + TAPS - 1),
        bias(call.call.x.channels),
        nothing(call.call.x.channels) {
    if (constants.bias) bias.assign(constants.bias, constants.bias + constants.channels);
  }

  int64_t sample(int64_t plane) const { return last ? plane : plane / constants.channels; }
  const W* noise(int64_t plane, int64_t o) const {
    return constants.noise ? constants.noise + sample(plane) * constants.noise_step + o * x.out : nullptr;
  }
  // Row o of u; buffer: row_in + (before + after) inner, zero at both ends.
  void filtered(const Taps<W>& taps, int64_t plane, int64_t o, W* buffer, W* u) const {
    const T* rows[TAPS];
    for (int t = 0; t < TAPS; ++t) {
      const int64_t i = o + t - y.pad;
      rows[t] = i >= 0 && i < y.in ? from + (plane * y.in + i) * row_in : nullptr;
    }
    filter(rows, taps, row_in, before, after, inner, buffer, u);
  }
};

std::tuple<Tensor, Tensor> run(const Tensor& x, const Tensor& f, int64_t pad_x0, int64_t pad_x1, int64_t pad_y0,
                               int64_t pad_y1, bool flip, double fir_gain, const Tensor& scale, const Side& noise,
                               const Side& strength, const Side& bias, const Side& next, double alpha, double gain,
                               double clamp, bool both) {
  const FirCall call = prepare(x, f, pad_x0, pad_x1, pad_y0, pad_y1, flip, fir_gain, scale, noise, strength, bias, next,
                               alpha, gain, clamp);
  const bool plain = both || !next.has_value();
  const Tensor y = call.empty_map(plain), scaled = call.empty_map(next.has_value());
  if (y.numel() + scaled.numel() == 0) return {y, scaled};
  by_type(x, [&](auto one) {
    using T = decltype(one);
    using W = Wide<T>;
    const Maps<T> maps(call);
    const Taps<W> taps(call, false);
    T *to_y = plain ? write<T>(y) : nullptr, *to_scaled = next.has_value() ? write<T>(scaled) : nullptr;
    torch::stable::parallel_for(0, maps.planes * maps.y.out, pieces(maps.row_out), [&](int64_t first, int64_t end) {
      std::vector<W> buffer(maps.row_in + (maps.before + maps.after) * maps.inner), u(maps.row_out);
      for (int64_t k = first; k < end; ++k) {
        const int64_t plane = k / maps.y.out, o = k % maps.y.out, at = k * maps.row_out;
        maps.filtered(taps, plane, o, buffer.data(), u.data());
        const W* drawn = maps.noise(plane, o);
        if (!maps.last) {
          const Channel<W> c = maps.constants.channel(maps.sample(plane), plane % maps.constants.channels);
          for (int64_t p = 0; p < maps.row_out; p += CHUNK) {
            row(maps.f, c, u.data() + p, drawn ? drawn + p : nullptr, std::min(CHUNK, maps.row_out - p),
                to_y ? to_y + at + p : nullptr, to_scaled ? to_scaled + at + p : nullptr);
          }
          continue;
        }
        const int64_t channels = maps.inner;
        const W *by = maps.constants.scale + plane * channels, *add = maps.bias.data();
        const W* following = to_scaled ? maps.constants.next + plane * channels : nullptr;
        const W strong = drawn ? *maps.constants.strength : W(0);
        for (int64_t p = 0; p < maps.x.out; ++p) {
          W* __restrict v = u.data() + p * channels;
          const W beside = drawn ? drawn[p] : W(0);
          for (int64_t c = 0; c < channels; ++c) {
            v[c] = activated(maps.f, value(Channel<W>{by[c], add[c], strong, W(0)}, v[c], beside));
          }
          T* __restrict plain_to = to_y + at + p * channels;
          for (int64_t c = 0; to_y && c < channels; ++c) plain_to[c] = narrow<T>(v[c]);
          T* __restrict scaled_to = to_scaled + at + p * channels;
          for (int64_t c = 0; to_scaled && c < channels; ++c) scaled_to[c] = narrow<T>(v[c] * following[c]);
        }
      }
    });
  });
  return {y, scaled};
}

// The gradients of `many` elements of u; channel(i) is that of the i-th. f is a copy, and all is restrict: g++ vectorises it.
template <typename W, typename F>
void gradients(int64_t many, const Formula<W> f, const F& channel, const W* __restrict u, const W* __restrict drawn,
               int64_t step, const W* __restrict one, const W* __restrict two, W* __restrict du, W* __restrict scale,
               W* __restrict bias, W* __restrict strength, W* __restrict next) {
  for (int64_t i = 0; i < many; ++i) {
    const Gradients<W> d = backward(channel(i), f, u[i], drawn[i * step], one[i], two[i]);
    du[i] = d.x;
    scale[i] = d.scale;
    bias[i] = d.bias;
    strength[i] = d.strength;
    next[i] = d.next;
  }
}

// A band's share of the backward pass: rows of u, of its gradient, and of dx, one after the other.
template <typename T, typename W = Wide<T>>
struct Band {
  const Maps<T>& maps;
  const Taps<W>&taps, &back;
  const T *g, *g_scaled;
  T* dx;
  int64_t margin, padded;
  std::vector<W> buffer, back_buffer, u, ring, out, one, two, drawn, parts[SUMS];

  Band(const Maps<T>& m, const Taps<W>& t, const Taps<W>& b, const T* g_, const T* g_scaled_, T* dx_)
      : maps(m),
        taps(t),
        back(b),
        g(g_),
        g_scaled(g_scaled_),
        dx(dx_),
        margin(TAPS - 1 - m.before),
        padded(m.row_out + (2 * (TAPS - 1) - m.before - m.after) * m.inner),
        buffer(m.row_in + (m.before + m.after) * m.inner),
        back_buffer(padded),
        u(m.row_out),
        ring(TAPS * m.row_out),
        out(padded),
        one(m.row_out),
        two(m.row_out),
        drawn(m.x.out),
        parts{std::vector<W>(m.row_out), std::vector<W>(m.row_out), std::vector<W>(m.row_out), std::vector<W>(m.row_out)} {
  }

  void widened(const T* from, int64_t at, std::vector<W>& to) const {
    if (from == nullptr) return;  // zeros from the beginning
    for (int64_t i = 0; i < maps.row_out; ++i) to[i] = widen(from[at + i]);
  }

  // The gradient of row o of u; sums are added to where the row is the band's own.
  void gradient_row(int64_t plane, int64_t o, double* sums, bool own) {
    maps.filtered(taps, plane, o, buffer.data(), u.data());
    const int64_t at = (plane * maps.y.out + o) * maps.row_out;
    widened(g, at, one);
    widened(g_scaled, at, two);
    if (const W* from = maps.noise(plane, o)) std::copy_n(from, maps.x.out, drawn.data());
    W* du = ring.data() + o % TAPS * maps.row_out;
    if (!maps.last) {
      const Channel<W> c = maps.constants.channel(maps.sample(plane), plane % maps.constants.channels);
      gradients(maps.row_out, maps.f, [c](int64_t) { return c; }, u.data(), drawn.data(), 1, one.data(), two.data(), du,
                parts[0].data(), parts[1].data(), parts[2].data(), parts[3].data());
      for (int s = 0; own && s < SUMS; ++s) sums[s] += sum_of(parts[s].data(), maps.row_out);
      return;
    }
    const int64_t channels = maps.inner;
    const W *by = maps.constants.scale + plane * channels, *add = maps.bias.data();
    const W* following = maps.constants.next ? maps.constants.next + plane * channels : maps.nothing.data();
    const W strong = maps.constants.noise ? *maps.constants.strength : W(0);
    const auto channel = [=](int64_t c) { return Channel<W>{by[c], add[c], strong, following[c]}; };
    for (int64_t p = 0; p < maps.x.out; ++p) {
      const int64_t at_p = p * channels;
      gradients(channels, maps.f, channel, u.data() + at_p, drawn.data() + p, 0, one.data() + at_p, two.data() + at_p,
                du + at_p, parts[0].data() + at_p, parts[1].data() + at_p, parts[2].data() + at_p,
                parts[3].data() + at_p);
    }
    for (int s = 0; own && s < SUMS; ++s) {
      W* __restrict total = parts[s].data();  // of the first pixel, then of all
      for (int64_t p = 1; p < maps.x.out; ++p) {
        for (int64_t c = 0; c < channels; ++c) total[c] += total[p * channels + c];
      }
      for (int64_t c = 0; c < channels; ++c) sums[c * SUMS + s] += total[c];
    }
  }

  void run(int64_t plane, int64_t from, int64_t to, double* sums) {
    for (int64_t i = from - (TAPS - 1); i < to; ++i) {
      const int64_t newest = i + maps.y.pad;  // the last row of u that row i of dx needs
      if (newest >= 0 && newest < maps.y.out) {
        gradient_row(plane, newest, sums, owns(maps.y, from, to, newest));
      }
      if (i < from) continue;
      const W* rows[TAPS];
      for (int t = 0; t < TAPS; ++t) {
        const int64_t o = newest - (TAPS - 1) + t;
        rows[t] = o >= 0 && o < maps.y.out ? ring.data() + o % TAPS * maps.row_out : nullptr;
      }
      filter(rows, back, maps.row_out, margin, TAPS - 1 - maps.after, maps.inner, back_buffer.data(), out.data());
      T* __restrict result = dx + (plane * maps.y.in + i) * maps.row_in;
      for (int64_t k = 0; k < maps.row_in; ++k) result[k] = narrow<T>(out[k]);
    }
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> run_backward(
    const Side& g, const Side& g_scaled, const Tensor& x, const Tensor& f, int64_t pad_x0, int64_t pad_x1, int64_t pad_y0,
    int64_t pad_y1, bool flip, double fir_gain, const Tensor& scale, const Side& noise, const Side& strength,
    const Side& bias, const Side& next, double alpha, double gain, double clamp) {
  const FirCall call = prepare(x, f, pad_x0, pad_x1, pad_y0, pad_y1, flip, fir_gain, scale, noise, strength, bias, next,
                               alpha, gain, clamp);
  const std::optional<Map> plain = call.gradient(g), beside = call.gradient(g_scaled);
  STD_TORCH_CHECK(plain || beside, "there is no gradient");
  const int64_t batch = call.call.x.batch, channels = call.call.x.channels;
  const Tensor dx = empty_like_map(call.call.x, sizes_of(x));
  const Tensor dscale = empty_wide(call.call, {batch, channels}), dnext = empty_wide(call.call, {batch, channels});
  const Tensor dbias = empty_wide(call.call, {channels}), dstrength = empty_wide(call.call, {});
  by_type(x, [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    const Maps<T> maps(call);
    const Taps<W> taps(call, false), back(call, true);
    const T* from_y = plain ? read<T>(plain->tensor) : nullptr;
    const T* from_scaled = beside ? read<T>(beside->tensor) : nullptr;
    const Pieces bands = pieces_of(maps.y.in, BAND);
    const int64_t count = x.numel() ? maps.planes * bands.count : 0, each = maps.inner * SUMS;
    std::vector<double> sums(count * each);
    torch::stable::parallel_for(0, count, pieces(bands.length * maps.row_in), [&](int64_t first, int64_t end) {
      Band<T> band(maps, taps, back, from_y, from_scaled, write<T>(dx));
      for (int64_t k = first; k < end; ++k) {
        const int64_t from = k % bands.count * bands.length;
        band.run(k / bands.count, from, std::min(maps.y.in, from + bands.length), sums.data() + k * each);
      }
    });
    // Of a channel of a sample, over the bands in their order; then over the samples.
    std::vector<double> bias_total(channels);
    double strength_total = 0;
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t c = 0; c < channels; ++c) {
        double total[SUMS] = {};
        for (int64_t k = 0; count && k < bands.count; ++k) {
          const int64_t plane = maps.last ? b : b * channels + c;
          const double* part = sums.data() + (plane * bands.count + k) * each + (maps.last ? c * SUMS : 0);
          for (int s = 0; s < SUMS; ++s) total[s] += part[s];
        }
        write<W>(dscale)[b * channels + c] = static_cast<W>(total[0]);
        bias_total[c] += total[1];
        strength_total += total[2];
        write<W>(dnext)[b * channels + c] = static_cast<W>(total[3]);
      }
    }
    for (int64_t c = 0; c < channels; ++c) write<W>(dbias)[c] = static_cast<W>(bias_total[c]);
    *write<W>(dstrength) = static_cast<W>(strength_total);
  });
  return {dx, dscale, dbias, dstrength, dnext};
}

}  // namespace
}  // namespace sivae::modulated_conv2d

STABLE_TORCH_LIBRARY_IMPL(sivae, CPU, m) {
  m.impl("modulated_fir_epilogue", TORCH_BOX(&sivae::modulated_conv2d::run));
  m.impl("modulated_fir_epilogue_backward", TORCH_BOX(&sivae::modulated_conv2d::run_backward));
}
