// The POSIX implementation of file.h, as LevelDB's env_posix.cc does it: EINTR loops, F_FULLFSYNC
// where fsync alone does not reach the disk, directory entries synced by syncing the directory.
#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <random>

#include "store/error.h"
#include "store/file.h"
#include "store/io_loops.h"

namespace fusedpo {
namespace {

[[noreturn]] void fail(int error, const char* what, const std::string& path) {
  const bool missing = error == ENOENT || error == ENOTDIR;
  std::string message = std::string("cannot ") + what + " " + path + ": " + std::strerror(error);
  if (error == ENOSPC || error == EDQUOT)
    message += ". Free some space and run again: what was synced is kept";
  else if (error == EACCES || error == EPERM || error == EROFS)
    message += ". Check the owner and the permissions of the directory";
  else if (error == EMFILE)
    message += ". Raise the limit (ulimit -n), or merge more often";
  else if (missing)
    message += ". Check the path";
  throw StoreError(missing ? StoreCode::kMissing : StoreCode::kIo, path, std::nullopt, message);
}

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const { return fd_; }

 private:
  int fd_;
};

int open_retrying(const std::string& path, int flags) {
  for (;;) {
    const int fd = ::open(path.c_str(), flags | O_CLOEXEC, 0666);
    if (fd >= 0 || errno != EINTR) return fd;
  }
}

std::uint64_t size_of(int fd, const std::string& path) {
  struct stat info{};
  if (::fstat(fd, &info) != 0) fail(errno, "examine", path);
  if (S_ISDIR(info.st_mode)) fail(EISDIR, "read", path);
  return static_cast<std::uint64_t>(info.st_size);
}

std::size_t pread_fully(int fd, const std::string& path, std::uint64_t offset, void* to,
                        std::size_t size) {
  std::size_t got = 0;
  const int error = read_fully(to, size, &got, [&](void* p, std::size_t n) {
    const std::uint64_t at = offset + got;
    return ::pread(fd, p, n, static_cast<off_t>(at));
  });
  if (error != 0) fail(error, "read", path);
  return got;
}

int flush_to_disk(int fd) {
#ifdef F_FULLFSYNC
  if (::fcntl(fd, F_FULLFSYNC) == 0) return 0;
#endif
  return retry_interrupted([fd] { return ::fsync(fd); });
}

class PosixReadable final : public ReadableFile {
 public:
  PosixReadable(int fd, std::string path) : fd_(fd), path_(std::move(path)) {}
  std::size_t read_at(std::uint64_t offset, void* to, std::size_t size) const override {
    return pread_fully(fd_.get(), path_, offset, to, size);
  }
  std::uint64_t size() const override { return size_of(fd_.get(), path_); }

 private:
  Descriptor fd_;
  std::string path_;
};

class PosixMapping final : public Mapping {
 public:
  PosixMapping(void* data, std::size_t size) : data_(data), size_(size) {}
  PosixMapping(const PosixMapping&) = delete;
  PosixMapping& operator=(const PosixMapping&) = delete;
  ~PosixMapping() override {
    if (size_ > 0) ::munmap(data_, size_);
  }
  std::span<const unsigned char> bytes() const override {
    return {static_cast<const unsigned char*>(data_), size_};
  }
  void release_memory() const override {
    if (size_ > 0) ::madvise(data_, size_, MADV_DONTNEED);  // advice: failing changes nothing
  }

 private:
  void* data_;
  std::size_t size_;
};

class PosixWritable final : public WritableFile {
 public:
  PosixWritable(int fd, std::string path) : fd_(fd), path_(std::move(path)) {}
  void append(const void* data, std::size_t size) override {
    check(write_fully(data, size,
                      [&](const void* p, std::size_t n) { return ::write(fd_.get(), p, n); }),
          "write to");
  }
  void write_at(std::uint64_t offset, const void* data, std::size_t size) override {
    const auto* begin = static_cast<const unsigned char*>(data);
    check(write_fully(data, size,
                      [&](const unsigned char* p, std::size_t n) {
                        const std::uint64_t at = offset + static_cast<std::uint64_t>(p - begin);
                        return ::pwrite(fd_.get(), p, n, static_cast<off_t>(at));
                      }),
          "write to");
  }
  void read_at(std::uint64_t offset, void* to, std::size_t size) const override {
    if (pread_fully(fd_.get(), path_, offset, to, size) != size) fail(EIO, "read back", path_);
  }
  void truncate(std::uint64_t size) override {
    check(retry_interrupted([&] { return ::ftruncate(fd_.get(), static_cast<off_t>(size)); }),
          "shorten");
  }
  void sync() override { check(flush_to_disk(fd_.get()), "sync"); }
  bool is_at(const std::string& path) const override {
    struct stat mine{}, named{};
    if (::fstat(fd_.get(), &mine) != 0) fail(errno, "examine", path_);
    if (::stat(path.c_str(), &named) != 0) {
      if (errno == ENOENT) return false;
      fail(errno, "examine", path);
    }
    return mine.st_dev == named.st_dev && mine.st_ino == named.st_ino;
  }

 private:
  void check(int error, const char* what) const {
    if (error != 0) fail(error, what, path_);
  }
  Descriptor fd_;
  std::string path_;
};

class PosixFileSystem final : public FileSystem {
 public:
  std::unique_ptr<ReadableFile> open(const std::string& path) override {
    const int fd = open_retrying(path, O_RDONLY);
    if (fd < 0) fail(errno, "open", path);
    return std::make_unique<PosixReadable>(fd, path);
  }
  std::unique_ptr<Mapping> map(const std::string& path) override {
    const Descriptor fd(open_retrying(path, O_RDONLY));
    if (fd.get() < 0) fail(errno, "open", path);
    const std::uint64_t size = size_of(fd.get(), path);
    if (size == 0) return std::make_unique<PosixMapping>(nullptr, 0);
    void* data = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, fd.get(), 0);
    if (data == MAP_FAILED) fail(errno, "map", path);
    return std::make_unique<PosixMapping>(data, size);
  }
  std::unique_ptr<WritableFile> create(const std::string& path) override {
    const int fd = open_retrying(path, O_RDWR | O_CREAT | O_EXCL);
    if (fd < 0 && errno == EEXIST) return nullptr;
    if (fd < 0) fail(errno, "create", path);
    return std::make_unique<PosixWritable>(fd, path);
  }
  void rename(const std::string& from, const std::string& to) override {
    if (::rename(from.c_str(), to.c_str()) != 0) fail(errno, "rename", from);
  }
  bool link(const std::string& from, const std::string& to) override {
    if (::link(from.c_str(), to.c_str()) == 0) return true;
    if (errno == EEXIST) return false;
    if (errno != EPERM && errno != EOPNOTSUPP && errno != ENOSYS) fail(errno, "link", to);
    // A file system without hard links: the same bytes under the second name, exclusively.
    const auto source = open(from);
    std::vector<unsigned char> bytes(source->size());
    bytes.resize(source->read_at(0, bytes.data(), bytes.size()));
    const auto file = create(to);
    if (file == nullptr) return false;
    file->append(bytes.data(), bytes.size());
    file->sync();
    return true;
  }
  bool remove(const std::string& path) override {
    if (::unlink(path.c_str()) == 0) return true;
    if (errno != ENOENT) fail(errno, "remove", path);
    return false;
  }
  std::vector<std::string> list(const std::string& directory) override {
    const std::unique_ptr<DIR, int (*)(DIR*)> handle(::opendir(directory.c_str()), ::closedir);
    if (handle == nullptr) fail(errno, "list", directory);
    std::vector<std::string> names;
    for (;;) {
      errno = 0;
      const dirent* entry = ::readdir(handle.get());
      if (entry == nullptr) break;
      names.emplace_back(entry->d_name);
    }
    if (errno != 0) fail(errno, "list", directory);
    std::erase_if(names, [](const std::string& name) { return name == "." || name == ".."; });
    std::sort(names.begin(), names.end());
    return names;
  }
  void sync_directory(const std::string& directory) override {
    const Descriptor fd(open_retrying(directory, O_RDONLY | O_DIRECTORY));
    if (fd.get() < 0) fail(errno, "open", directory);
    const int error = flush_to_disk(fd.get());
    // Some network file systems cannot sync a directory: their servers make entries durable.
    if (error != 0 && error != EINVAL && error != EOPNOTSUPP) fail(error, "sync", directory);
  }
};

}  // namespace

FileSystem& FileSystem::posix() {
  static PosixFileSystem files;
  return files;
}

std::uint64_t random_id() {
  std::random_device device;
  return std::uint64_t{device()} << 32 | device();
}

std::string join(const std::string& directory, const std::string& name) {
  return directory.empty() || directory.back() == '/' ? directory + name : directory + "/" + name;
}

std::string hex(std::uint64_t value) {
  std::array<char, 17> text{};
  std::snprintf(text.data(), text.size(), "%016llx", static_cast<unsigned long long>(value));
  return text.data();
}

bool create_atomically(FileSystem& files, const std::string& directory, const std::string& name,
                       std::span<const unsigned char> bytes) {
  const std::string temporary = join(directory, hex(random_id()) + ".tmp");
  const auto file = files.create(temporary);
  if (file == nullptr)
    throw StoreError(StoreCode::kIo, temporary, std::nullopt, temporary + " exists; run again");
  bool created = false;
  try {
    file->append(bytes.data(), bytes.size());
    file->sync();
    created = files.link(temporary, join(directory, name));
  } catch (...) {
    try {
      files.remove(temporary);
    } catch (const StoreError&) {  // the first error is the one to tell
    }
    throw;
  }
  files.remove(temporary);
  files.sync_directory(directory);
  return created;
}

}  // namespace fusedpo
