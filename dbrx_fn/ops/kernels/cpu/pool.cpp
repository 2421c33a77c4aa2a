#include "pool.h"

#include <pthread.h>

#include <exception>

namespace dbrx {
namespace {

// About 30 us, the time that waking a sleeping thread takes.
constexpr int SPINS = 600;

// Threads that share a core would only keep each other from working.
std::atomic<int> spins{SPINS};

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

void wait_while(std::atomic<uint32_t>& value, uint32_t old) {
  for (int n = spins.load(std::memory_order_relaxed); n > 0; --n) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause();
  }
  value.wait(old, std::memory_order_acquire);
}

Pool* pool = nullptr;
std::once_flag once;

}  // namespace

Pool& Pool::get() {
  std::call_once(once, [] {
    pool = new Pool;
    // A forked process has none of the threads.
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
  });
  return *pool;
}

int Pool::threads() {
  std::lock_guard<std::mutex> alone(mutex_);
  return count_;
}

void Pool::resize(int threads) {
  std::lock_guard<std::mutex> alone(mutex_);
  if (threads == count_) return;
  stop();
  count_ = 1;
  const uint32_t seen = job_.load();
  try {
    for (int n = 1; n < threads; ++n, ++count_) workers_.emplace_back([this, n, seen] { serve(n, seen); });
  } catch (const std::exception&) {
    // A process may have only so many threads, or so much memory. Those that there are share the work.
  }
  spins = count_ <= int(std::thread::hardware_concurrency()) ? SPINS : 0;
}

void Pool::start() {
  next_[0].store(0, std::memory_order_relaxed);
  next_[1].store(0, std::memory_order_relaxed);
  job_.fetch_add(1, std::memory_order_release);
  job_.notify_all();
}

void Pool::stop() {
  if (workers_.empty()) return;
  call_ = nullptr;
  start();
  for (auto& worker : workers_) worker.join();
  workers_.clear();
}

void Pool::serve(int index, uint32_t seen) {
  for (;;) {
    wait_while(job_, seen);
    ++seen;
    if (!call_) return;
    Member member(*this, index, count_);
    call_(work_, member);
    member.meet();
  }
}

void Member::meet() {
  if (count == 1) {
    pool_.next_[phase_++ & 1].store(0, std::memory_order_relaxed);
    return;
  }
  const uint32_t generation = pool_.generation_.load(std::memory_order_acquire);
  if (pool_.arrived_.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
    pool_.arrived_.store(0, std::memory_order_relaxed);
    pool_.next_[phase_ & 1].store(0, std::memory_order_relaxed);
    pool_.generation_.store(generation + 1, std::memory_order_release);
    pool_.generation_.notify_all();
  } else {
    wait_while(pool_.generation_, generation);
  }
  ++phase_;
}

}  // namespace dbrx

extern "C" void dbrx_set_threads(int threads) {
  dbrx::Pool::get().resize(threads);
}
