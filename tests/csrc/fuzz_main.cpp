// What libFuzzer does, without coverage, for compilers that lack it: random inputs, each from its
// own seed, for some seconds; or the one input of a seed, or of a file, again.
//
//   fuzz_tell -max_total_time=20 [-seed=1]     inputs of the seeds from 1 on
//   fuzz_tell [-seed=1] [file ...]             these inputs

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" void __sanitizer_set_death_callback(void (*say)()) __attribute__((weak));
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

constexpr std::size_t kMaxSize = 600;

std::vector<std::uint8_t> input_of(std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::uint8_t> input(random() % (random() % 2 == 0 ? kMaxSize : 3 * kMaxSize));
  for (std::uint8_t& byte : input) byte = static_cast<std::uint8_t>(random());
  return input;
}

std::uint64_t current_seed = 0;

void say_seed() {
  if (current_seed != 0) std::fprintf(stderr, "failed for -seed=%llu\n", current_seed + 0ull);
}

void run(const std::vector<std::uint8_t>& input) {
  try {
    LLVMFuzzerTestOneInput(input.data(), input.size());
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    std::exit(1);
  }
}

}  // namespace

int main(int argc, char** argv) {
  int seconds = 0;
  std::uint64_t seed = 0;
  std::vector<std::string> files;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument.starts_with("-max_total_time=")) {
      seconds = std::stoi(argument.substr(16));
    } else if (argument.starts_with("-seed=")) {
      seed = std::stoull(argument.substr(6));
    } else {
      files.push_back(argument);
    }
  }
  std::atexit(say_seed);  // of a failed check
  if (__sanitizer_set_death_callback != nullptr) __sanitizer_set_death_callback(say_seed);
  for (const std::string& file : files) {
    std::ifstream in(file, std::ios::binary);
    run({std::istreambuf_iterator<char>(in), {}});
  }
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  const std::uint64_t first = seed == 0 ? 1 : seed;
  if (seed == 0 && seconds == 0) return 0;
  current_seed = first;
  do {
    run(input_of(current_seed));
    current_seed += 1;
  } while (std::chrono::steady_clock::now() < end);
  std::printf("%llu inputs\n", current_seed - first + 0ull);
  current_seed = 0;
}
