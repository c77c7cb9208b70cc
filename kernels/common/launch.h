// Launching CUDA kernels on torch's current stream; the names that let a .cu file be compiled by g++ as well, where
// `SIVAE_EMULATED` runs its kernels thread by thread on the CPU (common/emulate.h).
#pragma once

#include "common/tensors.h"

#if defined(SIVAE_EMULATED)
#include "common/emulate.h"
#define SIVAE_OPERATORS STABLE_TORCH_LIBRARY_IMPL(sivae_emulated, CPU, m)
#else
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#if defined(TORCH_VERSION_2_13_0) && TORCH_FEATURE_VERSION >= TORCH_VERSION_2_13_0
#define SIVAE_NATIVE_HANDLE
#else  // older headers do not know the version's name, and show this function only to torch's own builds
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif
#define SIVAE_OPERATORS STABLE_TORCH_LIBRARY_IMPL(sivae, CUDA, m)
#endif

namespace sivae {

constexpr int THREADS = 256;

// A tensor's device is current while this lives; launches go to its current stream.
class Launcher {
 public:
#if defined(SIVAE_EMULATED)
  explicit Launcher(const Tensor&) {}
  int64_t resident_blocks() const { return 3; }  // few, so that the loops over tiles run more than once
#else
  explicit Launcher(const Tensor& x) : guard_(x.get_device_index()) {
    const int32_t device = x.get_device_index();
    void* stream = nullptr;
#if defined(SIVAE_NATIVE_HANDLE)
    stream = torch::stable::accelerator::getCurrentStream(device).nativeHandle();
#else
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
#endif
    stream_ = static_cast<cudaStream_t>(stream);
    check(cudaDeviceGetAttribute(&processors_, cudaDevAttrMultiProcessorCount, device));
  }

  // Blocks of THREADS threads that the device can hold at once; a kernel with more work loops.
  int64_t resident_blocks() const { return processors_ * int64_t{2048 / THREADS}; }
#endif

  // Runs kernel<<<min(work, resident or `most`), block>>>(arguments...).
  template <typename... P, typename... A>
  void operator()(void (*kernel)(P...), int64_t blocks, dim3 block, A... arguments) const {
    if (blocks <= 0) return;
    STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "too many blocks: ", blocks);
    const dim3 grid(static_cast<unsigned>(blocks));
#if defined(SIVAE_EMULATED)
    emulate::run(grid, block, [&] { kernel(arguments...); });
#else
    kernel<<<grid, block, 0, stream_>>>(arguments...);
    check(cudaGetLastError());
#endif
  }

 private:
#if !defined(SIVAE_EMULATED)
  static void check(cudaError_t status) {
    STD_TORCH_CHECK(status == cudaSuccess, "CUDA: ", cudaGetErrorString(status));
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  int processors_ = 0;
#endif
};

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace sivae
