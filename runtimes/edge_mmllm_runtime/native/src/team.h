// Threads that work through the phases of a program together.
//
// Each phase is cut into chunks that threads claim one by one; a thread goes on to the next phase
// when every chunk of this one is done. Only a running thread holds a claim, so nobody waits for
// a thread that has not come yet: one that arrives late passes the phases that are over.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "simd.h"

namespace edge {

EDGE_INLINE void relax() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Team {
 public:
  explicit Team(int phases) : phases_(phases), counts_(new Count[phases]) {}

  void begin() {
    for (int p = 0; p < phases_; p++) {
      counts_[p].claimed.store(0, std::memory_order_relaxed);
      counts_[p].done.store(0, std::memory_order_relaxed);
    }
    taken_.store(false, std::memory_order_relaxed);
    over_.store(false, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_release);
  }

  // Whether the forward is done: more threads may be called than there are.
  bool over() const { return over_.load(std::memory_order_relaxed); }
  void finish() { over_.store(true, std::memory_order_relaxed); }

  // True for one of the threads of a forward.
  bool first() { return !taken_.exchange(true, std::memory_order_relaxed); }

  template <typename Task>
  EDGE_INLINE void work(int phase, int chunks, Task task) {
    Count& count = counts_[phase];
    if (count.done.load(std::memory_order_acquire) >= chunks) return;
    for (;;) {
      const int chunk = count.claimed.fetch_add(1, std::memory_order_relaxed);
      if (chunk >= chunks) break;
      task(chunk);
      count.done.fetch_add(1, std::memory_order_release);
    }
    for (int spins = 0; count.done.load(std::memory_order_acquire) < chunks; spins++) {
      if (spins < 4096) {
        relax();
      } else {
        std::this_thread::yield();  // the other thread is not running: more threads than cores
      }
    }
  }

 private:
  struct alignas(64) Count {
    std::atomic<int> claimed{0}, done{0};
  };
  int phases_;
  std::atomic<bool> taken_{false}, over_{false};
  std::unique_ptr<Count[]> counts_;
};

}  // namespace edge
