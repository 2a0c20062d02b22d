// The loops around read and write that short transfers and EINTR demand. The system call is a
// parameter, so that the tests can shorten, interrupt and fail it.
#pragma once

#include <sys/types.h>
#include <cerrno>
#include <cstddef>

namespace fusedpo {

// Calls write_some(data, n) -> ssize_t until everything is written. Returns 0 or errno.
template <class WriteSome>
int write_fully(const void* data, std::size_t size, WriteSome&& write_some) {
  const auto* p = static_cast<const unsigned char*>(data);
  while (size > 0) {
    const ssize_t n = write_some(p, size);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return errno;
    if (n == 0) return ENOSPC;  // a device that takes nothing and reports nothing
    p += n;
    size -= static_cast<std::size_t>(n);
  }
  return 0;
}

// Calls read_some(to, n) -> ssize_t until `size` bytes or the end. Returns 0 or errno; `got`
// counts.
template <class ReadSome>
int read_fully(void* to, std::size_t size, std::size_t* got, ReadSome&& read_some) {
  auto* p = static_cast<unsigned char*>(to);
  *got = 0;
  while (*got < size) {
    const ssize_t n = read_some(p + *got, size - *got);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return errno;
    if (n == 0) return 0;
    *got += static_cast<std::size_t>(n);
  }
  return 0;
}

// Calls call() -> int until it is not interrupted. Returns 0 or errno.
template <class Call>
int retry_interrupted(Call&& call) {
  for (;;) {
    if (call() == 0) return 0;
    if (errno != EINTR) return errno;
  }
}

}  // namespace fusedpo
