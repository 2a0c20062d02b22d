// A file system in memory that can lose what was not synced, as LevelDB's fault_injection_test
// does: every write and every directory entry is pending until it is synced, and a crash keeps,
// cuts or drops each pending one by chance, in any order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "store/error.h"
#include "store/file.h"

namespace fusedpo {

using Bytes = std::vector<unsigned char>;

class FaultFileSystem final : public FileSystem {
 public:
  // ---- what the tests do to it ------------------------------------------------

  // The call with this number (counting from 0) and all after it fail: the process has died.
  void die_at(std::uint64_t call) { die_at_ = call; }
  // The call with this number fails, having written half of what it should; later ones work.
  void fail_at(std::uint64_t call) { fail_at_ = call; }
  // The call with this number finds no memory.
  void run_out_of_memory_at(std::uint64_t call) { out_of_memory_at_ = call; }
  // Every sync fails, and loses what was pending (as Linux does).
  void fail_syncs(bool fail) { fail_syncs_ = fail; }
  std::uint64_t calls() const { return calls_; }

  // Power is lost: what was not synced is there, in part or not at all. The dead come alive.
  void crash(std::mt19937_64& random) {
    const auto chance = [&random](unsigned of) { return random() % of == 0; };
    for (const auto& change : pending_names_)
      if (!chance(2)) apply(change, &durable_names_);
    pending_names_.clear();
    names_ = durable_names_;
    for (auto& [name, node] : names_) {
      std::vector<Write> writes = node->pending;
      std::shuffle(writes.begin(), writes.end(), random);
      for (Write& write : writes) {
        if (chance(3)) continue;
        if (chance(3)) write.bytes.resize(random() % (write.bytes.size() + 1));
        write.apply(&node->durable);
      }
      node->pending.clear();
      node->current = node->durable;
    }
    revive();
  }

  // The process has died, but not the machine: everything that was written is there.
  void revive() {
    die_at_ = fail_at_ = out_of_memory_at_ = ~std::uint64_t{0};
    fail_syncs_ = false;
    calls_ = 0;
  }

  Bytes& content(const std::string& path) { return names_.at(path)->current; }
  void put(const std::string& path, Bytes bytes) {
    const auto node = std::make_shared<Node>();
    node->current = node->durable = std::move(bytes);
    names_[path] = durable_names_[path] = node;
  }
  std::vector<std::string> paths() const {
    std::vector<std::string> found;
    for (const auto& [path, node] : names_) found.push_back(path);
    return found;
  }

  // ---- FileSystem ---------------------------------------------------------------

  std::unique_ptr<ReadableFile> open(const std::string& path) override {
    step();
    return std::make_unique<Readable>(at(path));
  }
  std::unique_ptr<Mapping> map(const std::string& path) override {
    step();
    return std::make_unique<Mapped>(at(path)->current);
  }
  std::unique_ptr<WritableFile> create(const std::string& path) override {
    step();
    if (names_.contains(path)) return nullptr;
    const auto node = std::make_shared<Node>();
    change({path, node, ""});
    return std::make_unique<Writable>(*this, node);
  }
  void rename(const std::string& from, const std::string& to) override {
    step();
    const auto node = at(from);
    change({to, node, from});
  }
  bool link(const std::string& from, const std::string& to) override {
    step();
    if (names_.contains(to)) return false;
    change({to, at(from), ""});
    return true;
  }
  bool remove(const std::string& path) override {
    step();
    if (!names_.contains(path)) return false;
    change({path, nullptr, ""});
    return true;
  }
  std::vector<std::string> list(const std::string& directory) override {
    step();
    std::vector<std::string> found;
    for (const auto& [path, node] : names_)
      if (path.starts_with(directory + "/")) found.push_back(path.substr(directory.size() + 1));
    return found;
  }
  void sync_directory(const std::string&) override {
    step();
    check_sync();
    for (const auto& change : pending_names_) apply(change, &durable_names_);
    pending_names_.clear();
  }

 private:
  struct Write {
    std::uint64_t offset = 0;
    Bytes bytes;
    std::optional<std::uint64_t> truncate;

    void apply(Bytes* to) const {
      if (truncate) {
        to->resize(*truncate);
        return;
      }
      if (to->size() < offset + bytes.size()) to->resize(offset + bytes.size());
      std::copy(bytes.begin(), bytes.end(), to->begin() + static_cast<std::ptrdiff_t>(offset));
    }
  };
  struct Node {
    Bytes durable, current;
    std::vector<Write> pending;
  };
  using Names = std::map<std::string, std::shared_ptr<Node>>;
  struct NameChange {
    std::string path;
    std::shared_ptr<Node> node;  // null: removed
    std::string from;            // of a rename
  };

  struct Readable final : ReadableFile {
    explicit Readable(std::shared_ptr<Node> node) : node(std::move(node)) {}
    std::size_t read_at(std::uint64_t offset, void* to, std::size_t size) const override {
      const Bytes& bytes = node->current;
      if (offset >= bytes.size()) return 0;
      const std::size_t n = std::min<std::size_t>(size, bytes.size() - offset);
      std::copy_n(bytes.begin() + static_cast<std::ptrdiff_t>(offset), n,
                  static_cast<unsigned char*>(to));
      return n;
    }
    std::uint64_t size() const override { return node->current.size(); }
    std::shared_ptr<Node> node;
  };
  struct Mapped final : Mapping {
    explicit Mapped(Bytes bytes) : content(std::move(bytes)) {}
    std::span<const unsigned char> bytes() const override { return content; }
    void release_memory() const override {}
    const Bytes content;
  };
  struct Writable final : WritableFile {
    Writable(FaultFileSystem& files, std::shared_ptr<Node> node)
        : files(files), node(std::move(node)) {}
    void append(const void* data, std::size_t size) override {
      write_at(node->current.size(), data, size);
    }
    void write_at(std::uint64_t offset, const void* data, std::size_t size) override {
      const auto* p = static_cast<const unsigned char*>(data);
      const auto write = [&](std::size_t n) { record({offset, Bytes(p, p + n), std::nullopt}); };
      try {
        files.step();
      } catch (const StoreError&) {
        write(size / 2);  // a short write before the disk was full, or the process died
        throw;
      }
      write(size);
    }
    void read_at(std::uint64_t offset, void* to, std::size_t size) const override {
      if (Readable(node).read_at(offset, to, size) != size) throw io("read");
    }
    void truncate(std::uint64_t size) override {
      files.step();
      record({0, {}, size});
    }
    void sync() override {
      files.step();
      if (files.fail_syncs_) node->pending.clear();
      files.check_sync();
      node->durable = node->current;
      node->pending.clear();
    }
    bool is_at(const std::string& path) const override {
      files.step();
      const auto it = files.names_.find(path);
      return it != files.names_.end() && it->second == node;
    }
    void record(Write write) const {
      write.apply(&node->current);
      node->pending.push_back(std::move(write));
    }
    FaultFileSystem& files;
    std::shared_ptr<Node> node;
  };

  static StoreError io(const std::string& what) {
    return StoreError(StoreCode::kIo, "", std::nullopt, "injected: " + what);
  }
  void step() {
    const std::uint64_t call = calls_++;
    if (call >= die_at_) throw io("dead");
    if (call == out_of_memory_at_) throw std::bad_alloc();
    if (call == fail_at_) throw io("no space left on device");
  }
  void check_sync() const {
    if (fail_syncs_) throw io("sync failed");
  }
  std::shared_ptr<Node> at(const std::string& path) const {
    const auto it = names_.find(path);
    if (it == names_.end())
      throw StoreError(StoreCode::kMissing, path, std::nullopt, path + " does not exist");
    return it->second;
  }
  static void apply(const NameChange& change, Names* names) {
    if (!change.from.empty()) names->erase(change.from);
    if (change.node == nullptr)
      names->erase(change.path);
    else
      (*names)[change.path] = change.node;
  }
  void change(NameChange change) {
    apply(change, &names_);
    pending_names_.push_back(std::move(change));
  }

  Names names_, durable_names_;
  std::vector<NameChange> pending_names_;
  std::uint64_t calls_ = 0, die_at_ = ~std::uint64_t{0}, fail_at_ = ~std::uint64_t{0};
  std::uint64_t out_of_memory_at_ = ~std::uint64_t{0};
  bool fail_syncs_ = false;
};

}  // namespace fusedpo
