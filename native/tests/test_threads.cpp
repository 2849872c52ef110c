// Every item once, on any number of threads and from several callers at once; safely after a fork; and the dispatch.

#include "../threads.h"

#include <atomic>
#include <stdexcept>
#include <thread>

#include <sys/wait.h>
#include <unistd.h>

#include "../dispatch.h"
#include "check.h"
#include "numbers.h"

using namespace orpo;

void check_every_item_once(int threads, int64_t items, int64_t grain) {
  std::vector<std::atomic<int>> seen(items);
  std::atomic<bool> is_right{true};
  for_ranges(threads, items, grain, [&](int thread, int64_t begin, int64_t end) {
    if (thread < 0 || thread >= threads || end - begin > grain || end > items) is_right = false;
    for (int64_t i = begin; i < end; ++i) ++seen[i];
  });
  for (int64_t i = 0; i < items; ++i) CHECK(seen[i] == 1, threads, items, grain, i, seen[i]);
  CHECK(is_right, threads, items, grain);
}

void check_all() {
  for (const int threads : {1, 2, 3, 7})
    for (const int64_t items : {0, 1, 2, 5, 1000})
      for (const int64_t grain : {1, 3, 64}) check_every_item_once(threads, items, grain);
}

int main() {
  check_all();
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) callers.emplace_back(check_all);
  for (std::thread& caller : callers) caller.join();

  const pid_t child = fork();
  if (child == 0) {
    check_all();
    _exit(test::report());
  }
  int status = 0;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, status);

  CHECK(&select_kernels("") == supported_kernels().front(), "the best is the first");
  for (const Kernels* kernels : supported_kernels()) CHECK(&select_kernels(kernels->isa) == kernels, kernels->isa);
  try {
    select_kernels("mmx");
    CHECK(false, "no such instruction set");
  } catch (const std::invalid_argument& error) {
    const std::string message = error.what();
    CHECK(message.find("'mmx'") != std::string::npos, message);
    CHECK(message.find(supported_kernels().back()->isa) != std::string::npos, message);
  }
  return test::report();
}
