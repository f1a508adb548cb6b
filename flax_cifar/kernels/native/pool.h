// Threads that share the work of a function, and sleep in between.
//
// They take one piece at a time, so a thread whose core is busy with something else delays the
// others by one piece at most. OpenMP would have threads for each of the threads that XLA calls us
// from, and they would wait for each other's cores.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>

#ifdef __SSE__
#include <xmmintrin.h>
#endif

using Function = std::function<void(int64_t)>;

// Lets this thread take numbers that are too small for full precision as zeros, as XLA's threads
// do: processors need a hundred times longer for them.
inline void flush_denormals() {
#ifdef __SSE__
  _mm_setcsr(_mm_getcsr() | 0x8040);  // results and operands
#elif defined(__aarch64__)
  uint64_t control;
  asm volatile("mrs %0, fpcr" : "=r"(control));
  asm volatile("msr fpcr, %0" : : "r"(control | 1 << 24));
#endif
}

class Pool {
 public:
  // The threads never end: they live as long as the process.
  explicit Pool(int threads) {
    for (int i = 1; i < threads; i++) std::thread([this] { work(); }).detach();
  }

  // Calls `function` with 0, 1, ... count - 1, each once, in any order and on any thread.
  void for_each(int64_t count, const Function& function) {
    flush_denormals();
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) {  // another caller has the threads
      for (int64_t i = 0; i < count; i++) function(i);
      return;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    function_ = &function;
    count_ = count;
    next_ = 0;
    round_++;
    lock.unlock();
    wake_.notify_all();
    take_pieces(function, count);
    lock.lock();
    function_ = nullptr;  // threads that wake up only now go back to sleep
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void take_pieces(const Function& function, int64_t count) {
    for (int64_t i = next_++; i < count; i = next_++) function(i);
  }

  void work() {
    flush_denormals();
    std::unique_lock<std::mutex> lock(mutex_);
    for (uint64_t seen = 0;;) {
      wake_.wait(lock, [&] { return function_ && round_ != seen; });
      seen = round_;
      running_++;
      const Function& function = *function_;
      const int64_t count = count_;
      lock.unlock();
      take_pieces(function, count);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_;   // held by the caller that has the threads
  std::mutex mutex_;  // held to read or write what is below, but for next_
  std::condition_variable wake_, done_;
  const Function* function_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};
  int running_ = 0;
  uint64_t round_ = 0;
};

inline Pool* pool;

template <class Work>
inline void for_each(int64_t count, const Work& work) {
  pool->for_each(count, work);
}
