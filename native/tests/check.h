// CHECK(condition, ...): counts what does not hold and prints it with the values beside it; `report` is main's result.

#pragma once

#include <cstdio>
#include <iostream>

namespace orpo::test {

inline int failures = 0;

template <class... Values>
void fail(const char* file, int line, const char* condition, const Values&... values) {
  if (++failures > 20) return;  // enough to see what is wrong
  std::cerr << file << ":" << line << ": " << condition << " does not hold:";
  ((std::cerr << " " << values), ...);
  std::cerr << "\n";
}

inline int report() {
  if (failures) std::cerr << failures << " checks failed\n";
  return failures != 0;
}

}  // namespace orpo::test

#define CHECK(condition, ...) \
  if (!(condition)) orpo::test::fail(__FILE__, __LINE__, #condition, __VA_ARGS__)
