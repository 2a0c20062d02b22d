// What the store needs of a file system. One implementation is POSIX; the tests have another that
// loses, cuts and reorders what was not synced.
//
// Every function throws StoreError (kIo, or kMissing where a path does not exist).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace fusedpo {

class ReadableFile {
 public:
  virtual ~ReadableFile() = default;
  // Reads up to `size` bytes at `offset`; fewer only at the end of the file.
  virtual std::size_t read_at(std::uint64_t offset, void* to, std::size_t size) const = 0;
  virtual std::uint64_t size() const = 0;
};

// A file's bytes in memory, shared with every process that maps it. They stay readable after the
// file is renamed or removed.
class Mapping {
 public:
  virtual ~Mapping() = default;
  virtual std::span<const unsigned char> bytes() const = 0;
  // Takes the pages out of this process's resident memory; they are read again when touched.
  virtual void release_memory() const = 0;
};

class WritableFile {
 public:
  virtual ~WritableFile() = default;
  virtual void append(const void* data, std::size_t size) = 0;
  virtual void write_at(std::uint64_t offset, const void* data, std::size_t size) = 0;
  virtual void read_at(std::uint64_t offset, void* to, std::size_t size) const = 0;
  virtual void truncate(std::uint64_t size) = 0;
  // Durable when it returns. After it has thrown, what is on disk is unknown: never call it again,
  // a second call may report success for data that the first one lost.
  virtual void sync() = 0;
  // Whether `path` still names this very file.
  virtual bool is_at(const std::string& path) const = 0;
};

class FileSystem {
 public:
  virtual ~FileSystem() = default;
  virtual std::unique_ptr<ReadableFile> open(const std::string& path) = 0;
  virtual std::unique_ptr<Mapping> map(const std::string& path) = 0;
  // Null when `path` exists already (O_EXCL).
  virtual std::unique_ptr<WritableFile> create(const std::string& path) = 0;
  virtual void rename(const std::string& from, const std::string& to) = 0;
  // Gives `from` the second name `to`; false when that exists already.
  virtual bool link(const std::string& from, const std::string& to) = 0;
  // False when there was no such file.
  virtual bool remove(const std::string& path) = 0;
  virtual std::vector<std::string> list(const std::string& directory) = 0;  // names, sorted
  virtual void sync_directory(const std::string& directory) = 0;

  static FileSystem& posix();
};

// Creates the file `path` with these bytes, whole and durable or not at all. False when it exists.
bool create_atomically(FileSystem& files, const std::string& directory, const std::string& name,
                       std::span<const unsigned char> bytes);

// A name that no other process chooses.
std::uint64_t random_id();

std::string join(const std::string& directory, const std::string& name);
std::string hex(std::uint64_t value);

}  // namespace fusedpo
