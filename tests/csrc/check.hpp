// The few assertions the C++ tests need; a failed one prints its place and ends the test.
#pragma once

#include <cstdio>
#include <cstdlib>

#define CHECK(condition)                                                          \
  do {                                                                            \
    if (!(condition)) {                                                           \
      std::fprintf(stderr, "%s:%d: CHECK(%s)\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                               \
    }                                                                             \
  } while (false)

#define CHECK_THROWS(expression, exception) \
  do {                                      \
    bool thrown = false;                    \
    try {                                   \
      (void)(expression);                   \
    } catch (const exception&) {            \
      thrown = true;                        \
    }                                       \
    CHECK(thrown);                          \
  } while (false)
