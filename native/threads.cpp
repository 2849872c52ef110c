#include "threads.h"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

namespace orpo {

namespace {

using Region = void (*)(void*);
using GompParallel = void (*)(Region, void*, unsigned threads, unsigned flags);

std::atomic<bool> forked{false};
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// The file of PyTorch's library, if it is loaded: whatever its name is looked up in, its own OpenMP comes first.
std::string torch_library() {
  std::string found;
  dl_iterate_phdr(
      [](dl_phdr_info* library, size_t, void* out) {
        const std::string path = library->dlpi_name;
        const bool is_torch = path.find("/libtorch_cpu.so") != std::string::npos;
        if (is_torch) *static_cast<std::string*>(out) = path;
        return static_cast<int>(is_torch);
      },
      &found);
  return found;
}

// GNU's entry point to a parallel region, which LLVM's and Intel's libraries have as well.
GompParallel find_openmp() {
  const std::string torch = torch_library();
  void* library = torch.empty() ? nullptr : dlopen(torch.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return nullptr;
  void* found = dlsym(library, "GOMP_parallel");  // in the library and in what it depends on
  dlclose(library);  // only our own count of it
  return reinterpret_cast<GompParallel>(found);
}

GompParallel openmp() {
  static const GompParallel found = find_openmp();
  return found;
}

struct Work {
  Body body;
  void* data;
  int64_t items, grain;
  int threads;
  std::atomic<int64_t> next_item{0};
  std::atomic<int> next_thread{0};

  static void run(void* self) {
    Work& work = *static_cast<Work*>(self);
    const int thread = work.next_thread++;
    if (thread >= work.threads) return;
    for (int64_t begin; (begin = work.next_item.fetch_add(work.grain)) < work.items;)
      work.body(work.data, thread, begin, std::min(begin + work.grain, work.items));
  }
};

void run_on_own_threads(Work& work, int threads) {
  std::vector<std::thread> others;
  try {
    while (static_cast<int>(others.size()) < threads - 1) others.emplace_back(Work::run, &work);
  } catch (const std::system_error&) {
    // No more threads to be had: those there are do the work.
  }
  Work::run(&work);
  for (std::thread& other : others) other.join();
}

}  // namespace

void run_ranges(int threads, int64_t items, int64_t grain, Body body, void* data) {
  const GompParallel in_openmp = openmp();
  const int64_t ranges = (items + grain - 1) / grain;
  const int wanted = forked ? 1 : static_cast<int>(std::min<int64_t>(threads, ranges));
  Work work{body, data, items, grain, threads};
  if (wanted <= 1) {
    Work::run(&work);
  } else if (in_openmp) {
    in_openmp(Work::run, &work, static_cast<unsigned>(wanted), 0);
  } else {
    run_on_own_threads(work, wanted);
  }
}

std::string thread_source() {
  Dl_info info;
  const GompParallel found = openmp();
  return found && dladdr(reinterpret_cast<void*>(found), &info) ? info.dli_fname : "std::thread";
}

}  // namespace orpo
