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

class Pool {
 public:
  // The threads never end: they live as long as the process.
  explicit Pool(int threads) {
    for (int i = 1; i < threads; i++) std::thread([this] { work(); }).detach();
    workers_ = threads - 1;
  }

  // Calls `function` with 0, 1, ... count - 1, each once, in any order and on any thread.
  void for_each(int64_t count, const std::function<void(int64_t)>& function) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) {  // another caller has the threads
      for (int64_t i = 0; i < count; i++) function(i);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      function_ = &function;
      count_ = count;
      next_ = 0;
      running_ = workers_;
      round_++;
    }
    wake_.notify_all();
    take_pieces();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void take_pieces() {
    for (int64_t i = next_++; i < count_; i = next_++) (*function_)(i);
  }

  void work() {
    for (uint64_t seen = 0;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return round_ != seen; });
        seen = round_;
      }
      take_pieces();
      std::lock_guard<std::mutex> lock(mutex_);
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int64_t)>* function_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};
  int workers_ = 0, running_ = 0;
  uint64_t round_ = 0;
};
