// Python module fusedpo._store: the part of the C++ code that needs no torch. Only binds
// csrc/store. Whatever reads, writes or hashes releases the GIL; a StoreError becomes
// fusedpo.StoreError.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "store/crc32c.h"
#include "store/error.h"
#include "store/record_key.h"
#include "store/store.h"

namespace py = pybind11;

namespace fusedpo {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
std::span<const T> span_of(const Array<T>& array) {
  return {array.data(), static_cast<std::size_t>(array.size())};
}

void check_keys(const Array<std::uint8_t>& keys) {
  if (keys.ndim() != 2 || keys.shape(1) != 16)
    throw StoreError(StoreCode::kBadValue, "", std::nullopt,
                     "keys must have shape [N, 16], as record_keys returns them");
}

std::size_t rows(const Array<std::uint8_t>& keys) {
  return static_cast<std::size_t>(keys.shape(0));
}

void raise_store_error(const StoreError& e) {
  const py::object type = py::module_::import("fusedpo._store_error").attr("StoreError");
  const py::object path = e.path.empty() ? py::object(py::none()) : py::str(e.path);
  const py::object offset = e.offset ? py::object(py::int_(*e.offset)) : py::object(py::none());
  const py::object error = type(e.what(), name(e.code), path, offset);
  PyErr_SetObject(type.ptr(), error.ptr());
}

template <class Call>
auto without_gil(Call&& call) {
  const py::gil_scoped_release release;
  return call();
}

Array<std::uint8_t> keys_of(const Array<std::int64_t>& prompt_ids,
                            const Array<std::int64_t>& prompt_offsets,
                            const Array<std::int64_t>& completion_ids,
                            const Array<std::int64_t>& completion_offsets) {
  const py::ssize_t n = std::max<py::ssize_t>(0, prompt_offsets.size() - 1);
  Array<std::uint8_t> keys({n, py::ssize_t{16}});
  unsigned char* to = keys.mutable_data();
  without_gil([&] {
    record_keys({span_of(prompt_ids), span_of(prompt_offsets)},
                {span_of(completion_ids), span_of(completion_offsets)}, to);
  });
  return keys;
}

std::vector<Record> find(const Store& store, const Array<std::uint8_t>& keys) {
  check_keys(keys);
  std::vector<Record> records(rows(keys));
  without_gil([&] { store.view()->lookup(keys.data(), records.size(), records.data()); });
  return records;
}

py::tuple lookup(const Store& store, const Array<std::uint8_t>& keys) {
  const std::vector<Record> records = find(store, keys);
  const auto n = static_cast<py::ssize_t>(records.size());
  Array<bool> found(n);
  Array<double> logps(n);
  Array<std::uint32_t> num_tokens(n);
  bool* to_found = found.mutable_data();
  double* to_logps = logps.mutable_data();
  std::uint32_t* to_num_tokens = num_tokens.mutable_data();
  for (std::size_t i = 0; i < records.size(); ++i) {
    to_found[i] = records[i].num_tokens > 0;
    to_logps[i] = to_found[i] ? records[i].logp : std::numeric_limits<double>::quiet_NaN();
    to_num_tokens[i] = records[i].num_tokens;
  }
  return py::make_tuple(found, logps, num_tokens);
}

// found, the values of all found records one after another, and N + 1 offsets into them.
py::tuple lookup_tokens(const Store& store, const Array<std::uint8_t>& keys) {
  check_keys(keys);
  const auto view = store.view();  // both steps must see the same
  std::vector<Record> records(rows(keys));
  without_gil([&] { view->lookup(keys.data(), records.size(), records.data()); });
  const auto n = static_cast<py::ssize_t>(records.size());
  Array<bool> found(n);
  Array<std::int64_t> offsets(n + 1);
  std::int64_t total = 0;
  for (std::size_t i = 0; i < records.size(); ++i) {
    found.mutable_data()[i] = records[i].has_tokens;
    offsets.mutable_data()[i] = total;
    total += records[i].has_tokens ? records[i].num_tokens : 0;
  }
  offsets.mutable_data()[n] = total;
  Array<float> values(total);
  float* to = values.mutable_data();
  without_gil([&] { view->lookup_tokens(keys.data(), records.data(), records.size(), to); });
  return py::make_tuple(found, values, offsets);
}

Array<bool> missing(const Store& store, const Array<std::uint8_t>& keys, bool tokens) {
  const std::vector<Record> records = find(store, keys);
  Array<bool> absent(static_cast<py::ssize_t>(records.size()));
  for (std::size_t i = 0; i < records.size(); ++i)
    absent.mutable_data()[i] = records[i].num_tokens == 0 || (tokens && !records[i].has_tokens);
  return absent;
}

py::dict merge(Store& store, bool abandoned, const py::object& keep) {
  MergeOptions options;
  options.abandoned = abandoned;
  std::vector<Key> wanted;
  if (!keep.is_none()) {
    const auto keys = keep.cast<Array<std::uint8_t>>();
    check_keys(keys);
    for (std::size_t i = 0; i < rows(keys); ++i) wanted.push_back(Key::load(keys.data() + 16 * i));
    std::sort(wanted.begin(), wanted.end());
    options.keep = [&wanted](const Key& key) {
      return std::binary_search(wanted.begin(), wanted.end(), key);
    };
  }
  const MergeReport report = without_gil([&] { return store.merge(options); });
  using py::literals::operator""_a;
  return py::dict("snapshot"_a = report.snapshot, "records"_a = report.records,
                  "removed"_a = report.removed, "kept_logs"_a = report.kept_logs,
                  "discarded"_a = report.discarded);
}

py::tuple as_tuple(const Problem& problem) {
  return py::make_tuple(problem.file, problem.offset, problem.what);
}

py::dict verify(const std::string& directory, const std::string& identity, double tolerance,
                std::uint64_t limit, std::uint64_t memory_bytes) {
  const VerifyReport report = without_gil([&] {
    return verify_store(FileSystem::posix(), directory, make_identity(identity, tolerance), limit,
                        memory_bytes);
  });
  py::list problems, notes, files;
  for (const Problem& problem : report.problems) problems.append(as_tuple(problem));
  for (const Problem& note : report.notes) notes.append(as_tuple(note));
  for (const FileReport& f : report.files)
    files.append(py::make_tuple(f.name, f.kind, f.bytes, f.records, f.closed));
  using py::literals::operator""_a;
  return py::dict("records"_a = report.records, "problems"_a = problems,
                  "problem_count"_a = report.problem_count, "notes"_a = notes, "files"_a = files);
}

py::list files_of(const Store& store) {
  const auto view = store.view();
  py::list files;
  for (const auto& s : view->snapshots())
    files.append(py::make_tuple(s->path().substr(s->path().rfind('/') + 1), "snapshot",
                                s->bytes().size(), s->size(), true));
  for (std::size_t i = 0; i < view->logs().size(); ++i) {
    const auto& log = view->logs()[i];
    const std::uint64_t records = without_gil([&] { return view->records_in_log(i); });
    files.append(py::make_tuple(log->name, "log", log->head.size, records, log->head.closed));
  }
  return files;
}

void append(LogWriter& writer, const Array<std::uint8_t>& keys, const Array<double>& logps,
            const Array<std::uint32_t>& num_tokens, const py::object& token_logps) {
  check_keys(keys);
  RecordBatch batch{span_of(keys), span_of(logps), span_of(num_tokens), {}, false};
  Array<float> tokens;
  if (!token_logps.is_none()) {
    tokens = token_logps.cast<Array<float>>();
    batch.tokens = span_of(tokens);
    batch.has_tokens = true;
  }
  without_gil([&] { writer.append(batch); });
}

// keys, logps, num_tokens, token values of the next records in key order, and N + 1 offsets into
// the values; None at the end.
py::object next_batch(SortedRecords& sorted, std::size_t size) {
  std::vector<unsigned char> keys;
  std::vector<double> logps;
  std::vector<std::uint32_t> num_tokens;
  std::vector<float> values;
  std::vector<std::int64_t> offsets = {0};
  without_gil([&] {
    Item item;
    while (logps.size() < size && sorted.next(&item)) {
      keys.resize(keys.size() + 16);
      item.record.key.store(keys.data() + keys.size() - 16);
      logps.push_back(item.record.logp);
      num_tokens.push_back(item.record.num_tokens);
      const std::vector<float> tokens = sorted.tokens(item);
      values.insert(values.end(), tokens.begin(), tokens.end());
      offsets.push_back(static_cast<std::int64_t>(values.size()));
    }
  });
  if (logps.empty()) return py::none();
  const auto n = static_cast<py::ssize_t>(logps.size());
  return py::make_tuple(Array<std::uint8_t>({n, py::ssize_t{16}}, keys.data()),
                        Array<double>(n, logps.data()), Array<std::uint32_t>(n, num_tokens.data()),
                        Array<float>(static_cast<py::ssize_t>(values.size()), values.data()),
                        Array<std::int64_t>(n + 1, offsets.data()));
}

bool create_file(const std::string& directory, const std::string& name, const py::bytes& content) {
  const std::string_view text = content;
  return without_gil([&] {
    return create_atomically(FileSystem::posix(), directory, name,
                             {reinterpret_cast<const unsigned char*>(text.data()), text.size()});
  });
}

}  // namespace
}  // namespace fusedpo

PYBIND11_MODULE(_store, m) {
  using namespace fusedpo;
  m.doc() = "Storage core of fusedpo; needs no torch, and numpy only for arrays.";
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const StoreError& e) {
      raise_store_error(e);
    }
  });
  m.def(
      "crc32c",
      [](const py::bytes& data) {
        const std::string_view view = data;
        return without_gil([&] { return crc32c(view.data(), view.size()); });
      },
      py::arg("data"), "CRC-32C (Castagnoli) of a bytes object, unmasked.");
  m.def("record_keys", &keys_of, py::arg("prompt_ids"), py::arg("prompt_offsets"),
        py::arg("completion_ids"), py::arg("completion_offsets"));
  m.def("create_file", &create_file, py::arg("directory"), py::arg("name"), py::arg("content"),
        "Creates a file whole and durable, or not at all; False when it exists.");
  m.def(
      "sync_directory",
      [](const std::string& path) {
        without_gil([&] { FileSystem::posix().sync_directory(path); });
      },
      py::arg("path"));
  m.def("agree", &agree, py::arg("a"), py::arg("b"), py::arg("tolerance"),
        "Whether two log-probs of one key may be taken for the same number.");
  m.def("verify", &verify, py::arg("directory"), py::arg("identity"), py::arg("tolerance"),
        py::arg("limit"), py::arg("memory_bytes"));

  py::class_<LogWriter>(m, "LogWriter")
      .def("append", &append, py::arg("keys"), py::arg("logps"), py::arg("num_tokens"),
           py::arg("token_logps"))
      .def("sync", &LogWriter::sync, py::call_guard<py::gil_scoped_release>())
      .def("close", &LogWriter::close, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("path", &LogWriter::path)
      .def_property_readonly("records", &LogWriter::records);

  py::class_<SortedRecords>(m, "SortedRecords").def("next_batch", &next_batch, py::arg("size"));

  py::class_<Store>(m, "Store")
      .def(
          py::init([](const std::string& directory, const std::string& identity, double tolerance) {
            return without_gil([&] {
              return std::make_unique<Store>(FileSystem::posix(), directory,
                                             make_identity(identity, tolerance));
            });
          }),
          py::arg("directory"), py::arg("identity"), py::arg("tolerance"))
      .def("lookup", &lookup, py::arg("keys"))
      .def("lookup_tokens", &lookup_tokens, py::arg("keys"))
      .def("missing", &missing, py::arg("keys"), py::arg("tokens"))
      .def("size",
           [](const Store& store) { return without_gil([&] { return store.view()->size(); }); })
      .def("refresh", &Store::refresh, py::call_guard<py::gil_scoped_release>())
      .def("writer", &Store::writer, py::arg("name"))
      .def("merge", &merge, py::arg("abandoned"), py::arg("keep"))
      .def("files", &files_of)
      .def(
          "sorted",
          [](const Store& store, std::uint64_t memory_bytes) {
            return without_gil([&] { return store.sorted(memory_bytes); });
          },
          py::arg("memory_bytes"));
}
