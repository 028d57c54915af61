#include "weight_file.h"

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <utility>

#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#define RIVER_POSIX 1
#endif

namespace river {

#if RIVER_POSIX
namespace {

#ifdef __APPLE__
timespec changed_at(const struct stat& file) { return file.st_mtimespec; }
#else
timespec changed_at(const struct stat& file) { return file.st_mtim; }
#endif

}  // namespace

WeightFile::WeightFile(const std::string& path, size_t bytes) : bytes_(bytes) {
  descriptor_ = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor_ < 0)
    throw std::runtime_error("can't open " + path + ": " + std::strerror(errno));
  struct stat file;
  if (fstat(descriptor_, &file) != 0 || static_cast<size_t>(file.st_size) != bytes) {
    close(descriptor_);
    throw std::runtime_error(path + " doesn't have the " + std::to_string(bytes) +
                             " bytes of the packed weights");
  }
  seconds_ = changed_at(file).tv_sec;
  nanoseconds_ = changed_at(file).tv_nsec;
}

WeightFile::~WeightFile() {
  if (descriptor_ >= 0) close(descriptor_);
}

bool WeightFile::is_unchanged() const noexcept {
  struct stat file;
  return fstat(descriptor_, &file) == 0 && static_cast<size_t>(file.st_size) == bytes_ &&
         changed_at(file).tv_sec == seconds_ && changed_at(file).tv_nsec == nanoseconds_;
}

WeightFile::State WeightFile::read(size_t begin, size_t end, uint8_t* out) const noexcept {
  while (begin < end) {
    const ssize_t count = pread(descriptor_, out, end - begin, static_cast<off_t>(begin));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return is_unchanged() ? State::kUnreadable : State::kChanged;
    begin += static_cast<size_t>(count);
    out += count;
  }
  return is_unchanged() ? State::kWhole : State::kChanged;
}

void WeightFile::fetch(size_t begin, size_t end) const noexcept {
#ifdef POSIX_FADV_WILLNEED
  posix_fadvise(descriptor_, static_cast<off_t>(begin), static_cast<off_t>(end - begin),
                POSIX_FADV_WILLNEED);
#else
  static_cast<void>(begin + end);
#endif
}

#else

WeightFile::WeightFile(const std::string&, size_t) {
  throw std::runtime_error("this system's way to read weights back is not written yet");
}
WeightFile::~WeightFile() = default;
bool WeightFile::is_unchanged() const noexcept { return false; }
WeightFile::State WeightFile::read(size_t, size_t, uint8_t*) const noexcept { return State::kUnreadable; }
void WeightFile::fetch(size_t, size_t) const noexcept {}

#endif

WeightFile::WeightFile(WeightFile&& other) noexcept { *this = std::move(other); }

WeightFile& WeightFile::operator=(WeightFile&& other) noexcept {
  std::swap(descriptor_, other.descriptor_);
  std::swap(bytes_, other.bytes_);
  std::swap(seconds_, other.seconds_);
  std::swap(nanoseconds_, other.nanoseconds_);
  return *this;
}

}  // namespace river
