// Ranges of rows on several threads, in the pool that PyTorch's own operations run in.
//
// The threads of an OpenMP pool spin for a while between two regions. Threads of another pool would compete with them
// for the cores, so we ask the OpenMP library that PyTorch has loaded. Without one, threads are started for the call.

#pragma once

#include <cstdint>
#include <string>

namespace orpo {

// `body(data, thread, begin, end)` for ranges of at most `grain` items that cover [0, items), on at most `threads`
// threads; `thread` < `threads` tells them apart. Which thread has which range is left to chance: results must not
// depend on it. Must not throw. In a process that was forked, where the pool's threads are gone, it runs on one.
using Body = void (*)(void* data, int thread, int64_t begin, int64_t end);
void run_ranges(int threads, int64_t items, int64_t grain, Body body, void* data);

template <class F>
void for_ranges(int threads, int64_t items, int64_t grain, F f) {
  run_ranges(
      threads, items, grain,
      [](void* data, int thread, int64_t begin, int64_t end) { (*static_cast<F*>(data))(thread, begin, end); }, &f);
}

// Where the threads come from: the file of the OpenMP library, or "std::thread".
std::string thread_source();

}  // namespace orpo
