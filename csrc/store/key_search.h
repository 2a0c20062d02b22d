// Search in sorted arrays of 128-bit keys, many keys at a time.
//
// Keys are hashes, hence uniform: the position of a key is its value times the density, give or
// take sqrt(N). Three corrections by the local difference land within a cache line or two. The keys
// of a group take each step together, so that their cache misses overlap. Where keys are not
// uniform, galloping from the last guess still finds every key in O(log N).
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "store/bytes.h"

namespace fusedpo {

// `keys` has KeyAt::operator()(i) -> Key and prefetch(i), for i in [0, n). Calls
// on_found(j, position) with the first position whose key is not less than targets(j), 0 <= j < m.
template <class Keys, class Targets, class OnFound>
void lower_bounds(const Keys& keys, std::uint64_t n, const Targets& targets, std::size_t m,
                  OnFound&& on_found) {
  constexpr std::size_t kGroup = 32;
  constexpr int kCorrections = 3;
  const double density = static_cast<double>(n) / 18446744073709551616.0;
  const auto clamp = [n](double x) {
    return x <= 0 ? 0 : std::min(static_cast<std::uint64_t>(x), n - 1);
  };
  if (n == 0) {
    for (std::size_t j = 0; j < m; ++j) on_found(j, std::uint64_t{0});
    return;
  }
  for (std::size_t begin = 0; begin < m; begin += kGroup) {
    const std::size_t count = std::min(kGroup, m - begin);
    std::array<Key, kGroup> target;
    std::array<std::uint64_t, kGroup> guess;
    for (std::size_t j = 0; j < count; ++j) {
      target[j] = targets(begin + j);
      guess[j] = clamp(static_cast<double>(target[j].high) * density);
      keys.prefetch(guess[j]);
    }
    for (int step = 0; step < kCorrections; ++step) {
      for (std::size_t j = 0; j < count; ++j) {
        const auto distance =
            static_cast<double>(static_cast<std::int64_t>(target[j].high - keys(guess[j]).high));
        guess[j] = clamp(static_cast<double>(guess[j]) + distance * density);
        keys.prefetch(guess[j]);
      }
    }
    for (std::size_t j = 0; j < count; ++j) {
      // Bracket: everything before `low` is less, everything from `high` on is not.
      std::uint64_t low = 0, high = n;
      std::uint64_t at = guess[j];
      for (std::uint64_t step = 1;; step *= 2) {
        if (keys(at) < target[j]) {
          low = at + 1;
          if (high != n || n - low < step) break;
          at = low + step - 1;
        } else {
          high = at;
          if (low != 0 || high < step) break;
          at = high - step;
        }
      }
      while (low < high) {
        const std::uint64_t middle = low + (high - low) / 2;
        if (keys(middle) < target[j])
          low = middle + 1;
        else
          high = middle;
      }
      on_found(begin + j, low);
    }
  }
}

}  // namespace fusedpo
