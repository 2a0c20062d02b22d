// The loops around system calls, and the POSIX files on a real directory.
#include "store/file.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <string>

#include "store/error.h"
#include "store/io_loops.h"
#include "store/store.h"
#include "store_cases.h"

namespace fusedpo {
namespace {

class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string pattern = testing::TempDir() + "fusedpo-XXXXXX";
    path_ = ::mkdtemp(pattern.data());
  }
  ~TemporaryDirectory() { std::filesystem::remove_all(path_); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

TEST(Loops, WriteGoesOnAfterShortWritesAndInterruptions) {
  const std::string data = "some bytes that must all arrive";
  std::string got;
  int call = 0;
  const auto write_some = [&](const unsigned char* p, std::size_t n) -> ssize_t {
    if (call++ % 3 == 0) {
      errno = EINTR;
      return -1;
    }
    const std::size_t taken = std::min<std::size_t>(n, static_cast<std::size_t>(call));
    got.append(reinterpret_cast<const char*>(p), taken);
    return static_cast<ssize_t>(taken);
  };
  EXPECT_EQ(write_fully(data.data(), data.size(), write_some), 0);
  EXPECT_EQ(got, data);
}

TEST(Loops, WriteReportsAFullDiskAfterAShortWrite) {
  int call = 0;
  const auto write_some = [&](const unsigned char*, std::size_t) -> ssize_t {
    if (call++ == 0) return 3;
    errno = ENOSPC;
    return -1;
  };
  EXPECT_EQ(write_fully("0123456789", 10, write_some), ENOSPC);
  EXPECT_EQ(
      write_fully("0123456789", 10, [](const unsigned char*, std::size_t) -> ssize_t { return 0; }),
      ENOSPC);
}

TEST(Loops, ReadGoesOnAfterShortReadsAndInterruptionsAndStopsAtTheEnd) {
  const std::string data = "0123456789";
  std::size_t at = 0;
  int call = 0;
  const auto read_some = [&](unsigned char* to, std::size_t n) -> ssize_t {
    if (call++ % 2 == 0) {
      errno = EINTR;
      return -1;
    }
    const std::size_t given = std::min<std::size_t>({n, 3, data.size() - at});
    std::copy_n(data.begin() + static_cast<std::ptrdiff_t>(at), given, to);
    at += given;
    return static_cast<ssize_t>(given);
  };
  char to[20] = {};
  std::size_t got = 0;
  EXPECT_EQ(read_fully(to, sizeof to, &got, read_some), 0);
  EXPECT_EQ(std::string(to, got), data);
}

TEST(Loops, InterruptedCallsAreRepeatedAndFailedOnesAreNot) {
  int calls = 0;
  EXPECT_EQ(retry_interrupted([&] {
              errno = ++calls < 3 ? EINTR : EIO;
              return -1;
            }),
            EIO);
  EXPECT_EQ(calls, 3);
}

TEST(PosixFiles, DoWhatTheInterfaceSays) {
  const TemporaryDirectory directory;
  FileSystem& files = FileSystem::posix();
  const std::string path = join(directory.path(), "a"), other = join(directory.path(), "b");
  const auto file = files.create(path);
  ASSERT_NE(file, nullptr);
  EXPECT_EQ(files.create(path), nullptr);
  file->append("0123", 4);
  file->write_at(2, "xyz", 3);
  file->sync();
  files.sync_directory(directory.path());
  EXPECT_TRUE(file->is_at(path));
  char text[8] = {};
  EXPECT_EQ(files.open(path)->read_at(0, text, sizeof text), 5u);
  EXPECT_EQ(std::string(text), "01xyz");
  const auto mapping = files.map(path);
  EXPECT_EQ(mapping->bytes().size(), 5u);
  EXPECT_TRUE(files.link(path, other));
  EXPECT_FALSE(files.link(path, other));
  EXPECT_EQ(files.list(directory.path()), (std::vector<std::string>{"a", "b"}));
  EXPECT_TRUE(files.remove(other));
  EXPECT_FALSE(files.remove(other));
  files.rename(path, other);
  EXPECT_FALSE(file->is_at(path));
  EXPECT_TRUE(file->is_at(other));
  file->truncate(1);
  EXPECT_EQ(files.open(other)->size(), 1u);
}

TEST(PosixFiles, FailuresCarryThePathAndAreTyped) {
  FileSystem& files = FileSystem::posix();
  const auto code = [](auto&& call) {
    try {
      call();
    } catch (const StoreError& e) {
      EXPECT_FALSE(e.path.empty());
      return std::string(name(e.code));
    }
    return std::string("no error");
  };
  const TemporaryDirectory directory;
  const std::string absent = join(directory.path(), "absent");
  EXPECT_EQ(code([&] { files.open(absent); }), "missing");
  EXPECT_EQ(code([&] { files.map(absent); }), "missing");
  EXPECT_EQ(code([&] { files.list(absent); }), "missing");
  EXPECT_EQ(code([&] { files.create(join(absent, "x")); }), "missing");
  EXPECT_EQ(code([&] { files.map(directory.path()); }), "io");
}

TEST(PosixFiles, AFullDeviceIsAnErrorThatTellsWhatToDo) {
  if (::access("/dev/full", W_OK) != 0) GTEST_SKIP() << "this system has no /dev/full";
  // A link in the store's directory: create() refuses it, so the device is opened as a log would
  // be.
  const int fd = ::open("/dev/full", O_WRONLY);
  ASSERT_GE(fd, 0);
  const int error = write_fully(
      "x", 1, [fd](const unsigned char* p, std::size_t n) { return ::write(fd, p, n); });
  ::close(fd);
  EXPECT_EQ(error, ENOSPC);
}

TEST(PosixFiles, AStoreSurvivesItsProcess) {
  const TemporaryDirectory directory;
  const auto writer = [&](const std::string& name) {
    return Store(FileSystem::posix(), directory.path(), test_identity()).writer(name);
  };
  const pid_t child = ::fork();
  if (child == 0) {
    const auto w = writer("child");
    append(*w, range(0, 50), true);
    w->sync();
    append(*w, range(50, 60), true);  // never confirmed
    ::_exit(0);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  ASSERT_EQ(status, 0);
  Store store(FileSystem::posix(), directory.path(), test_identity());
  EXPECT_EQ(store.view()->size(), 50u);
  MergeOptions options;
  options.abandoned = true;
  EXPECT_EQ(store.merge(options).records, 50u);
  EXPECT_EQ(look(*store.view(), 49), Seen::kTokens);
}

// This process may open so many files more than it has open now.
class FewDescriptors {
 public:
  explicit FewDescriptors(int more) {
    const int lowest = ::open("/dev/null", O_RDONLY);
    ::close(lowest);
    ::getrlimit(RLIMIT_NOFILE, &before_);
    const rlimit fewer{static_cast<rlim_t>(lowest + more), before_.rlim_max};
    EXPECT_EQ(::setrlimit(RLIMIT_NOFILE, &fewer), 0);
  }
  ~FewDescriptors() { ::setrlimit(RLIMIT_NOFILE, &before_); }

 private:
  rlimit before_{};
};

TEST(PosixFiles, AStoreMayHaveMoreLogsThanAProcessMayOpenFiles) {
  const TemporaryDirectory directory;
  Store store(FileSystem::posix(), directory.path(), test_identity());
  constexpr std::uint64_t kLogs = 80;
  for (std::uint64_t i = 0; i < kLogs; ++i) {
    const auto w = store.writer("w");
    append(*w, {i}, true);
    i % 2 == 0 ? w->close() : w->sync();
  }
  const FewDescriptors few(16);
  store.refresh();
  EXPECT_EQ(store.view()->size(), kLogs);
  const VerifyReport report =
      verify_store(FileSystem::posix(), directory.path(), test_identity(), 10, 1 << 20);
  EXPECT_EQ(report.records, kLogs);
  EXPECT_EQ(report.problem_count, 0u);
  Item item;
  std::uint64_t exported = 0;
  for (const auto sorted = store.sorted(1 << 20); sorted->next(&item);) ++exported;
  EXPECT_EQ(exported, kLogs);
  MergeOptions options;
  options.abandoned = true;
  EXPECT_EQ(store.merge(options).records, kLogs);
  for (std::uint64_t i = 0; i < kLogs; ++i) EXPECT_EQ(look(*store.view(), i), Seen::kTokens) << i;
}

TEST(PosixFiles, AWriterIsOfNoUseToAForkedProcess) {
  const TemporaryDirectory directory;
  const Store store(FileSystem::posix(), directory.path(), test_identity());
  const auto w = store.writer("parent");
  append(*w, range(0, 5));
  const pid_t child = ::fork();
  if (child == 0) {
    try {
      w->sync();
    } catch (const StoreError& e) {
      ::_exit(e.code == StoreCode::kClosed ? 0 : 2);
    }
    ::_exit(1);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  w->close();
}

}  // namespace
}  // namespace fusedpo
