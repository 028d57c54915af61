// Tests of the core without Python, for the sanitizers: `core_test [part of a test's name]`.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <new>
#include <vector>

#include "check.h"

namespace river::test {
namespace {

constexpr int kShownFailures = 5;  // of a test

int failures = 0;
const char* subject = "";

struct Test {
  const char* name;
  void (*run)();
};

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

}  // namespace

void check(bool holds, const char* what, const char* file, int line) {
  if (holds) return;
  if (++failures <= kShownFailures)
    std::printf("  %s:%d: %s does not hold%s%s\n", file, line, what, *subject ? ", kernels " : "",
                subject);
}

Registered::Registered(const char* name, void (*run)()) { tests().push_back({name, run}); }

void set_subject(const char* name) { subject = name; }

Guarded::Guarded(size_t bytes) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t readable = (bytes + page - 1) / page * page;
  mapping_size_ = readable + page;
  mapping_ = mmap(nullptr, mapping_size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping_ == MAP_FAILED) throw std::bad_alloc();
  auto* start = static_cast<uint8_t*>(mapping_);
  if (mprotect(start + readable, page, PROT_NONE) != 0) throw std::bad_alloc();
  data_ = start + readable - bytes;
}

Guarded::~Guarded() { munmap(mapping_, mapping_size_); }

}  // namespace river::test

int main(int count, char** arguments) {
  using namespace river::test;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // a crash leaves the name of the test before it
  int passed = 0, failed = 0;
  for (const Test& test : tests()) {
    if (count > 1 && std::strstr(test.name, arguments[1]) == nullptr) continue;
    failures = 0;
    test.run();
    set_subject("");
    std::printf("%s %s\n", failures == 0 ? "passed" : "FAILED", test.name);
    ++(failures == 0 ? passed : failed);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}
