#include "buffer.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

// AddressSanitizer guards what malloc gives, not what mmap does.
#if (defined(__unix__) || defined(__APPLE__)) && !defined(__SANITIZE_ADDRESS__)
#include <sys/mman.h>
#define RIVER_MMAP 1
#endif

namespace river {
namespace {

#if RIVER_MMAP
constexpr size_t kHugePage = 2u << 20;
#else
constexpr size_t kAlignment = 128;
#endif

}  // namespace

Buffer::Buffer(size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
#if RIVER_MMAP
  const bool huge = bytes >= kHugePage;
  mapping_size_ = huge ? bytes + kHugePage : bytes;
  mapping_ = mmap(nullptr, mapping_size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping_ == MAP_FAILED) {
    mapping_ = nullptr;
    throw std::bad_alloc();
  }
  auto address = reinterpret_cast<uintptr_t>(mapping_);
  if (huge) address = (address + kHugePage - 1) & ~(kHugePage - 1);
  data_ = reinterpret_cast<uint8_t*>(address);
#ifdef MADV_HUGEPAGE
  if (huge) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
#else
  mapping_size_ = bytes + kAlignment;
  mapping_ = std::calloc(1, mapping_size_);
  if (mapping_ == nullptr) throw std::bad_alloc();
  const auto address = reinterpret_cast<uintptr_t>(mapping_);
  data_ = reinterpret_cast<uint8_t*>((address + kAlignment - 1) & ~(kAlignment - 1));
#endif
}

Buffer::~Buffer() {
  if (mapping_ == nullptr) return;
#if RIVER_MMAP
  munmap(mapping_, mapping_size_);
#else
  std::free(mapping_);
#endif
}

void Buffer::give_back() {
  if (mapping_ == nullptr) return;
#if RIVER_MMAP && defined(__linux__)
  madvise(mapping_, mapping_size_, MADV_DONTNEED);
#else
  std::memset(data_, 0, size_);
#endif
}

Buffer::Buffer(Buffer&& other) noexcept { *this = std::move(other); }

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(mapping_, other.mapping_);
  std::swap(mapping_size_, other.mapping_size_);
  return *this;
}

}  // namespace river
