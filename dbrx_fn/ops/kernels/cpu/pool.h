// Threads that share one kernel's work. They meet at barriers, where they spin shortly and then sleep.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace dbrx {

class Pool;

// One thread's view of the work.
class Member {
 public:
  Member(Pool& pool, int index, int count) : index(index), count(count), pool_(pool) {}

  const int index;
  const int count;

  // Calls `work(first, last)` for pieces of 0 to `size` of at most `grain` each, by whichever thread is free, and waits
  // for all of them. Which thread takes a piece must not change its results.
  template <class Work>
  void spread(int64_t size, int64_t grain, const Work& work);

  // Waits for all threads.
  void meet();

 private:
  Pool& pool_;
  unsigned phase_ = 0;
};

class Pool {
 public:
  // The process's own.
  static Pool& get();

  int threads();
  void resize(int threads);

  // Calls `work(member)` in each thread.
  template <class Work>
  void run(const Work& work) {
    std::lock_guard<std::mutex> alone(mutex_);
    if (count_ == 1) {
      Member member(*this, 0, 1);
      next_[0] = next_[1] = 0;
      work(member);
      return;
    }
    call_ = [](const void* it, Member& member) { (*static_cast<const Work*>(it))(member); };
    work_ = &work;
    start();
    Member member(*this, 0, count_);
    work(member);
    member.meet();
  }

 private:
  friend class Member;

  void start();
  void stop();
  void serve(int index, uint32_t seen);

  std::mutex mutex_;
  std::vector<std::thread> workers_;
  int count_ = 1;
  void (*call_)(const void*, Member&) = nullptr;
  const void* work_ = nullptr;
  alignas(64) std::atomic<uint32_t> job_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int64_t> next_[2] = {0, 0};
};

template <class Work>
void Member::spread(int64_t size, int64_t grain, const Work& work) {
  auto& next = pool_.next_[phase_ & 1];
  for (int64_t first; (first = next.fetch_add(grain, std::memory_order_relaxed)) < size;) {
    work(first, std::min(first + grain, size));
  }
  meet();
}

}  // namespace dbrx
