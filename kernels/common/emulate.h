// CUDA's execution model on one CPU thread, for tests where there is no GPU: the very kernels of the .cu files run, with
// their blocks, shared memory and barriers. Every thread of a block is a fiber. Between barriers the fibers run one after
// the other in an order that changes from barrier to barrier, so a missing barrier gives wrong numbers rather than luck;
// a barrier that only some threads reach ends the process.
//
// Not covered: what needs real parallelism (races within one statement, memory ordering), speed, and warps: shuffles must
// be reached by the whole block.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

#define __global__
#define __device__
#define __shared__ static thread_local
#define __launch_bounds__(...)

namespace sivae::emulate {

class Block {
 public:
  Block(dim3 size, const std::function<void()>& body) : body_(body), fibers_(size.x * size.y * size.z) {
    unsigned index = 0;
    for (Fiber& fiber : fibers_) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stack(index);
      fiber.context.uc_stack.ss_size = STACK;
      makecontext(&fiber.context, &Block::enter, 0);
      fiber.index = dim3(index % size.x, index / size.x % size.y, index / size.x / size.y);
      ++index;
    }
  }

  void run() {
    current() = this;
    for (unsigned round = 0;; ++round) {
      size_t ended = 0;
      const size_t count = fibers_.size(), step = count > 2 ? coprime(count, 7919 + 2 * round) : 1;
      for (size_t k = 0; k < count; ++k) {
        active_ = (round + k * step) % count;
        Fiber& fiber = fibers_[active_];
        if (!fiber.ended) {
          threadIdx = fiber.index;
          resume(fiber);
        }
        ended += fiber.ended;
      }
      if (ended == count) return;
      if (ended) fail("some threads of a block have ended while others wait at a barrier");
    }
  }

  // The end of a thread's share until all others have come as far.
  void barrier() {
    suspend(fibers_[active_]);
    threadIdx = fibers_[active_].index;
  }

  template <typename V>
  V exchange(V value, unsigned from_lane_offset) {
    const size_t me = active_;
    static thread_local std::vector<double> slots;
    slots.resize(fibers_.size());
    slots[me] = static_cast<double>(value);
    barrier();
    const size_t lane = me % 32 + from_lane_offset, other = lane < 32 ? me + from_lane_offset : me;
    const V result = static_cast<V>(slots[other < fibers_.size() ? other : me]);
    barrier();
    return result;
  }

  static Block*& current() {
    static thread_local Block* block = nullptr;
    return block;
  }

 private:
  struct Fiber {
    ucontext_t context;
    jmp_buf point;
    bool started = false;
    dim3 index;
    bool ended = false;
  };

  static constexpr size_t STACK = 1 << 16;

  // Kept from block to block: making and clearing them would take most of the time.
  static char* stack(size_t index) {
    static thread_local std::vector<std::unique_ptr<char[]>> stacks;
    while (stacks.size() <= index) stacks.emplace_back(new char[STACK]);
    return stacks[index].get();
  }

  static void enter() {
    Block* block = current();
    block->body_();
    block->fibers_[block->active_].ended = true;
    _longjmp(block->home_, 1);
  }

  // A context is entered once; from then on jumps do, which ask nothing of the operating system.
  [[gnu::noinline]] void resume(Fiber& fiber) {
    if (_setjmp(home_)) return;
    if (fiber.started) _longjmp(fiber.point, 1);
    fiber.started = true;
    setcontext(&fiber.context);
  }

  [[gnu::noinline]] void suspend(Fiber& fiber) {
    if (_setjmp(fiber.point) == 0) _longjmp(home_, 1);
  }

  static size_t coprime(size_t count, size_t start) {
    const auto gcd = [](size_t a, size_t b) {
      while (b) a %= b, std::swap(a, b);
      return a;
    };
    while (gcd(start, count) != 1) ++start;
    return start % count ? start % count : 1;
  }

  [[noreturn]] static void fail(const char* what) {
    std::fprintf(stderr, "emulated kernel: %s\n", what);
    std::abort();
  }

  std::function<void()> body_;
  std::vector<Fiber> fibers_;
  jmp_buf home_;
  size_t active_ = 0;
};

inline void run(dim3 grid, dim3 block, const std::function<void()>& body) {
  gridDim = grid;
  blockDim = block;
  for (unsigned b = 0; b < grid.x; ++b) {
    blockIdx = dim3(b, 0, 0);
    Block(block, body).run();
  }
}

}  // namespace sivae::emulate

inline void __syncthreads() { sivae::emulate::Block::current()->barrier(); }

template <typename V>
V __shfl_down_sync(unsigned, V value, unsigned delta) {
  return sivae::emulate::Block::current()->exchange(value, delta);
}
