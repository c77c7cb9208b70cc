// upfirdn2d on a GPU: the kernels of tiles.h, and what they made stored.
#include "upfirdn2d/tiles.h"

namespace sivae::upfirdn2d {
namespace {

template <typename T, typename W = Wide<T>>
struct Store {
  T* y;
  template <bool LAST, int V>
  __device__ void operator()(int64_t, int64_t, int64_t, int64_t at, const W (&sum)[V], int many, bool packs) const {
    if constexpr (V == Pack<T>::size) {
      if (packs) {
        Pack<T> stored;
#pragma unroll
        for (int i = 0; i < V; ++i) stored.item[i] = narrow<T>(sum[i]);
        *reinterpret_cast<Pack<T>*>(y + at) = stored;
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (i < many) y[at + i] = narrow<T>(sum[i]);
    }
  }
};

// Whether a fast path took the call.
template <typename T>
bool fast(const Call& call, const Launcher& launch, const Store<T>& end) {
  const bool out_aligned = aligned(end.y);
  if (!four_taps<T>(call, out_aligned)) return false;
  if (call.ax.up == 2 && call.ax.down == 1) {
    launch_four<T, 2, 1>(call, launch, end, out_aligned);
  } else if (call.ax.up == 1 && call.ax.down == 2) {
    launch_four<T, 1, 2>(call, launch, end, out_aligned);
  } else if (call.ax.up == 1 && call.ax.down == 1) {
    launch_four<T, 1, 1>(call, launch, end, out_aligned);
  } else {
    return false;
  }
  return true;
}

Tensor run(const Tensor& x, const std::optional<Tensor>& f, int64_t up_x, int64_t up_y, int64_t down_x, int64_t down_y,
           int64_t pad_x0, int64_t pad_x1, int64_t pad_y0, int64_t pad_y1, bool flip, double gain) {
  const Launcher launch(x);
  const Call call = prepare(x, f, up_x, up_y, down_x, down_y, pad_x0, pad_x1, pad_y0, pad_y1, flip, gain);
  if (call.y.numel() == 0) return call.y;
  by_type(x, [&](auto one) {
    using T = decltype(one);
    const Store<T> end{write<T>(call.y)};
    if constexpr (!std::is_same_v<T, double>) {
      if (fast<T>(call, launch, end)) return;
    }
    launch_elements<T>(call, launch, end);
  });
  return call.y;
}

}  // namespace
}  // namespace sivae::upfirdn2d

SIVAE_OPERATORS {
  m.impl("upfirdn2d", TORCH_BOX(&sivae::upfirdn2d::run));
  m.impl("upfirdn2d_backward", TORCH_BOX(&sivae::upfirdn2d::run));  // its transpose is of its kind
}
