// Rows found, moved, scaled and summed on the emulated device, against loops on the host.
#include "cuda/rows.h"

#include "token_scores.h"

namespace fusedpo {
namespace {

class Rows : public testing::TestWithParam<DType> {
 protected:
  void TearDown() override { cuda_host::set_seed(0); }
  const DType type = GetParam();
};

// Runs `enqueue` and checks that it was `count` launches on the stream it was given.
template <typename Enqueue>
void launched(size_t count, uint64_t seed, Enqueue enqueue) {
  cuda_host::set_seed(seed);
  const cuda_host::LaunchLog log;
  enqueue();
  EXPECT_EQ(log.launches().size(), count);
  for (const auto& launch : log.launches()) EXPECT_EQ(launch.stream, kStream);
}

// One kept row of three, all, none; across the shares of warps and blocks.
TEST(KeptRows, AreNumberedInOrder) {
  for (const int64_t count : {0, 1, 2, 31, 32, 33, 1000, 1023, 1024, 1025, 5000}) {
    for (const int every : {1, 3, 1 << 20}) {
      std::vector<int64_t> labels(static_cast<size_t>(count), kIgnore);
      for (size_t t = 0; t < labels.size(); ++t) {
        if ((t * 7 + 1) % static_cast<size_t>(every) == 0) labels[t] = static_cast<int64_t>(t % 50);
      }
      if (count > 31) labels[static_cast<size_t>(count) - 2] = 49;
      std::vector<int64_t> want_rows, want_slot;
      for (int64_t t = 0; t < count; ++t) {
        const bool keeps = labels[static_cast<size_t>(t)] != kIgnore;
        want_slot.push_back(keeps ? static_cast<int64_t>(want_rows.size()) : -1);
        if (keeps) want_rows.push_back(t);
      }
      const auto kept = static_cast<int64_t>(want_rows.size());
      want_rows.resize(static_cast<size_t>(count), -1);
      const DeviceArray<int64_t> y(labels);
      const DeviceArray<int64_t> rows(static_cast<size_t>(count)), slot(static_cast<size_t>(count)),
          info(2);
      launched(1, static_cast<uint64_t>(count + every), [&] {
        cuda::find_kept_rows(y.data(), count, 50, kIgnore, {rows.data(), slot.data(), info.data()},
                             kStream);
      });
      EXPECT_EQ(rows.host(), want_rows) << count << " " << every;
      EXPECT_EQ(slot.host(), want_slot) << count << " " << every;
      EXPECT_EQ(info.host(), (std::vector<int64_t>{kept, -1})) << count << " " << every;
    }
  }
  cuda_host::set_seed(0);
}

TEST(KeptRows, TheFirstLabelOutsideTheVocabularyIsTold) {
  for (const int64_t first : {0, 5, 63, 64, 2000, 2999}) {
    for (const int64_t bad : {int64_t{50}, int64_t{-1}, int64_t{1} << 40}) {
      std::vector<int64_t> labels(3000, 49);
      labels[1] = kIgnore;
      labels[static_cast<size_t>(first)] = bad;
      labels[std::min<size_t>(static_cast<size_t>(first) + 37, 2999)] = bad;  // the same warp's
      labels[2999] = 51;
      const DeviceArray<int64_t> y(labels);
      const DeviceArray<int64_t> rows(3000), slot(3000), info(2);
      launched(1, 3, [&] {
        cuda::find_kept_rows(y.data(), 3000, 50, kIgnore, {rows.data(), slot.data(), info.data()},
                             kStream);
      });
      EXPECT_EQ(info.host(), (std::vector<int64_t>{2999, first == 2999 ? 2999 : first}));
      EXPECT_EQ(slot.host()[static_cast<size_t>(first)], first > 1 ? first - 1 : first)
          << "it counts as scored";
    }
  }
  cuda_host::set_seed(0);
}

std::vector<std::vector<double>> some_rows(DType type, size_t n, size_t cols, unsigned seed) {
  std::vector<std::vector<double>> rows;
  for (size_t i = 0; i < n; ++i)
    rows.push_back(random_values(type, cols, 3.0, seed + static_cast<unsigned>(i)));
  return rows;
}

std::vector<DType> types_for(DType from) {
  if (from == DType::f64) return {DType::f64};
  return {DType::f32, DType::bf16, DType::f16};
}

TEST_P(Rows, GatheredRowsAreRoundedOnceOnTheWay) {
  unsigned seed = 0;
  for (const size_t cols : {1, 4, 7, 8, 64, 1001, 1028}) {
    for (const Lie lie : kLies) {
      ++seed;
      TypedRows from(type, 8, cols, lie);
      const auto values = some_rows(type, 8, cols, seed);
      from.set(values);
      const std::vector<int64_t> picked = {7, 0, -1, 3, 3, 8, 5};
      const DeviceArray<int64_t> rows(picked);
      for (const DType to_type : types_for(type)) {
        const DType through = types_for(type)[seed % types_for(type).size()];
        for (const bool all : {false, true}) {
          const size_t n = all ? 6 : picked.size();
          // One element past a vector: the two sides do not match.
          TypedArray to(to_type, n * cols, seed % 2 == 0 ? 1 : 0);
          launched(1, seed, [&] {
            cuda::gather_rows(from.view, all ? nullptr : rows.data(), static_cast<int64_t>(n),
                              through, to_type, to.data(), kStream);
          });
          for (size_t i = 0; i < n; ++i) {
            const int64_t source = all ? static_cast<int64_t>(i) : picked[i];
            for (size_t v = 0; v < cols; ++v) {
              const bool outside = source < 0 || source >= 8;
              const double want =
                  outside
                      ? 0.0
                      : rounded(to_type, rounded(through, values[static_cast<size_t>(source)][v]));
              EXPECT_EQ(to.get(i * cols + v), want)
                  << name_of(type) << " " << cols << " " << i << " " << v;
            }
          }
        }
      }
    }
  }
  launched(0, 1, [&] {
    cuda::gather_rows(TypedRows(type, 4, 3, Lie::kDense).view, nullptr, 0, type, type, nullptr,
                      kStream);
  });
}

// a[i] = f(c, alpha) x[i] in the compute type, rounded to `to`: a product of three numbers in any
// order, so within 2 ulp of the compute type and half a one of the result.
void expect_scaled(double got, double x, double c, double alpha, DType to,
                   const std::string& what) {
  const long double want = static_cast<long double>(alpha) * c * x;
  const double unit = to == DType::f64 ? 0x1p-53 : 0x1p-24;
  const double bound =
      2.0 * unit * static_cast<double>(std::fabs(want)) + 0.51 * ulp(to, static_cast<double>(want));
  EXPECT_LE(distance(got, want), bound)
      << what << ": got " << got << ", want " << static_cast<double>(want);
}

TEST_P(Rows, ScaledRowsTakeTheirOwnCoefficient) {
  unsigned seed = 50;
  const DType result = result_of(type);
  for (const size_t cols : {1, 4, 7, 128, 1028}) {
    for (const DType to_type : types_for(type)) {
      ++seed;
      const std::vector<int64_t> position = {4, 0, -1, 2, 6};
      const DeviceArray<int64_t> rows(position);
      const auto c = random_values(result, 7, 2.0, seed);
      const TypedArray coefficients(result, c),
          alpha(result, std::vector<double>{rounded(result, 0.3)});
      for (int kind = 0; kind < 4; ++kind) {
        const bool with_c = kind != 1, with_rows = kind >= 2, with_alpha = kind % 2 == 1;
        std::vector<double> x = random_values(type, 5 * cols, 3.0, seed);
        if (with_rows)
          std::fill(x.begin() + static_cast<long>(2 * cols),
                    x.begin() + static_cast<long>(3 * cols), kNan);
        const TypedArray from(type, x, seed % 2 == 0 ? 1 : 0);
        TypedArray to(to_type, 5 * cols);
        if (type == to_type && kind == 3) to.set_written();
        const bool in_place = type == to_type && kind == 3;
        launched(1, seed, [&] {
          cuda::scale_rows(from.data(), type, with_c ? coefficients.data() : nullptr,
                           with_rows ? rows.data() : nullptr, with_alpha ? alpha.data() : nullptr,
                           5, static_cast<int64_t>(cols), to_type,
                           in_place ? from.data() : to.data(), kStream);
        });
        for (size_t i = 0; i < 5; ++i) {
          const int64_t at = with_rows ? position[i] : static_cast<int64_t>(i);
          for (size_t v = 0; v < cols; ++v) {
            const double got = in_place ? from.get(i * cols + v) : to.get(i * cols + v);
            if (at < 0) {
              EXPECT_EQ(got, 0.0) << "no row, " << v;
              continue;
            }
            expect_scaled(got, x[i * cols + v], with_c ? c[static_cast<size_t>(at)] : 1.0,
                          with_alpha ? alpha.get(0) : 1.0, to_type,
                          std::string(name_of(type)) + " " + name_of(to_type) + " " +
                              std::to_string(cols) + " " + std::to_string(kind) + " " +
                              std::to_string(i) + " " + std::to_string(v));
          }
        }
      }
    }
  }
  launched(0, 1, [&] {
    cuda::scale_rows(nullptr, type, nullptr, nullptr, nullptr, 0, 5, type, nullptr, kStream);
  });
}

TEST_P(Rows, ScatteredRowsGoToTheirPositionsAndTheOthersAreZero) {
  unsigned seed = 90;
  const DType result = result_of(type);
  for (const size_t cols : {1, 4, 7, 128, 1028}) {
    for (const Lie lie : kLies) {
      for (const DType to_type : types_for(type)) {
        ++seed;
        const std::vector<int64_t> slot = {2, -1, 0, 1, -1, 4, -1, 3};
        const DeviceArray<int64_t> slots(slot);
        const auto c = random_values(result, 8, 2.0, seed);
        const TypedArray coefficients(result, c);
        // `from` is of the result type, or already of the hidden states' type.
        const DType from_type = seed % 2 == 0 ? result : type;
        const auto x = random_values(from_type, 5 * cols, 3.0, seed);
        const TypedArray from(from_type, x);
        const TypedRows to(to_type, 8, cols, lie);
        const bool with_c = seed % 3 != 0;
        launched(1, seed, [&] {
          cuda::scatter_rows(from.data(), from_type, with_c ? coefficients.data() : nullptr,
                             slots.data(), to.view, kStream);
        });
        for (size_t t = 0; t < 8; ++t) {
          for (size_t v = 0; v < cols; ++v) {
            const double got = to.get(t, v);
            if (slot[t] < 0) {
              EXPECT_EQ(got, 0.0) << t << " " << v;
            } else {
              expect_scaled(got, x[static_cast<size_t>(slot[t]) * cols + v], with_c ? c[t] : 1.0,
                            1.0, to_type,
                            std::string(name_of(from_type)) + " " + name_of(to_type) + " " +
                                std::to_string(t) + " " + std::to_string(v));
            }
          }
        }
      }
    }
  }
}

TEST_P(Rows, SumsAreAddedUpScaled) {
  const DType result = result_of(type);
  if (result != type) return;  // sums are of the result type
  for (const size_t count : {0, 1, 3, 4, 5, 255, 1024, 1025, 4099}) {
    for (const size_t offset : {0, 1}) {
      for (const bool with_alpha : {false, true}) {
        const auto x = random_values(result, count, 2.0, 5),
                   before = random_values(result, count, 2.0, 6);
        const TypedArray sum(result, before, offset),
            add(result, x, with_alpha ? 1 - offset : offset);
        const TypedArray alpha(result, std::vector<double>{rounded(result, -0.7)});
        launched(count == 0 ? 0 : 1, count, [&] {
          cuda::add_scaled(sum.data(), add.data(), result, with_alpha ? alpha.data() : nullptr,
                           static_cast<int64_t>(count), kStream);
        });
        for (size_t i = 0; i < count; ++i) {
          const long double want =
              before[i] + static_cast<long double>(with_alpha ? alpha.get(0) : 1.0) * x[i];
          const double unit = result == DType::f64 ? 0x1p-53 : 0x1p-24;
          const double bound =
              unit * (std::fabs(x[i]) + static_cast<double>(std::fabs(want))) * 1.01;
          EXPECT_LE(distance(sum.get(i), want), bound) << count << " " << i;
        }
      }
    }
  }
}

TEST_P(Rows, ColumnsAreSummedInTheOrderOfTheRows) {
  const DType result = result_of(type);
  unsigned seed = 0;
  for (const size_t n : {0, 1, 7, 8, 9, 40}) {
    for (const size_t cols : {1, 7, 255, 256, 257, 1000}) {
      ++seed;
      const size_t ld = cols + seed % 3;
      const auto x = random_values(type, n * ld, 2.0, seed);
      TypedArray d(type, x);
      for (size_t i = 0; i < n && ld > cols; ++i) d.forbid(i * ld + cols, (i + 1) * ld);
      std::vector<int64_t> position;
      for (size_t i = 0; i < n; ++i)
        position.push_back(i % 5 == 3 ? -1 : static_cast<int64_t>((3 * i + 1) % 43));
      const DeviceArray<int64_t> rows(position);
      const auto c = random_values(result, 43, 1.0, seed + 1);
      const TypedArray coefficients(result, c),
          alpha(result, std::vector<double>{rounded(result, 1.7)});
      const bool with_c = seed % 4 != 0, with_rows = seed % 3 != 0, with_alpha = seed % 2 == 0,
                 add = seed % 5 < 2;
      const auto before = random_values(result, cols, 1.0, seed + 2);
      TypedArray out(result, cols);
      if (add) {
        for (size_t v = 0; v < cols; ++v) out.set(v, before[v]);
        out.set_written();
      }
      launched(1, seed, [&] {
        cuda::sum_columns(d.data(), type, static_cast<int64_t>(ld),
                          with_c ? coefficients.data() : nullptr, with_rows ? rows.data() : nullptr,
                          with_alpha ? alpha.data() : nullptr, static_cast<int64_t>(n),
                          static_cast<int64_t>(cols), add, out.data(), kStream);
      });
      for (size_t v = 0; v < cols; ++v) {
        long double want = 0, size = 0;
        for (size_t i = 0; i < n; ++i) {
          const int64_t at = with_rows ? position[i] : static_cast<int64_t>(i);
          if (at < 0) continue;
          const long double term =
              static_cast<long double>(with_c ? c[static_cast<size_t>(at)] : 1.0) * x[i * ld + v];
          want += term;
          size += std::fabs(term);
        }
        const long double factor = with_alpha ? alpha.get(0) : 1.0;
        want = factor * want + (add ? before[v] : 0.0);
        size = factor * size + (add ? std::fabs(before[v]) : 0.0);
        // Runs of 8 rows are summed in the compute type: 8 roundings, and the product's.
        const double unit = result == DType::f64 ? 0x1p-53 : 0x1p-24;
        const double bound =
            10.0 * unit * static_cast<double>(size) + 0.51 * ulp(result, static_cast<double>(want));
        EXPECT_LE(distance(out.get(v), want), bound)
            << name_of(type) << " " << n << " " << cols << " " << v;
      }
    }
  }
}

// The power of two at or above the largest magnitude, and its inverse.
TEST(GradientScale, IsThePowerOfTwoAtOrAboveTheLargest) {
  struct Case {
    double largest, want;
  };
  const Case cases[] = {{0.0, 1.0},       {1.0, 1.0},        {-1.5, 2.0},     {2.0, 2.0},
                        {0.3, 0.5},       {0.25, 0.25},      {3e-9, 0x1p-28}, {-1e5, 131072.0},
                        {kInfinity, 1.0}, {-kInfinity, 1.0}, {kNan, 1.0}};
  for (const DType result : {DType::f32, DType::f64}) {
    for (const Case& one : cases) {
      for (const int64_t n : {1, 40, 1025, 3000}) {
        for (const int kind : {0, 1, 2, 3}) {  // in c, in h, in both; by rows
          const auto count = static_cast<size_t>(n);
          std::vector<double> c(count + 1, rounded(result, one.largest / 8)), h = c;
          if (!std::isfinite(one.largest)) h = c = std::vector<double>(count + 1, 0.5);
          const size_t at = count * 5 / 7;
          (kind == 1 ? h : c)[at] = rounded(result, one.largest);
          c[count] = 1e9;  // a position that no row names
          std::vector<int64_t> position(count);
          for (size_t i = 0; i < count; ++i) position[i] = static_cast<int64_t>(count - 1 - i);
          if (n > 1) position[static_cast<size_t>(position[0]) == at ? 1 : 0] = -1;
          const DeviceArray<int64_t> rows(position);
          const TypedArray of_c(result, c), of_h(result, h);
          TypedArray out(result, 2);
          launched(1, 3, [&] {
            cuda::find_gradient_scale(
                kind == 1 ? nullptr : of_c.data(), kind == 0 ? nullptr : of_h.data(),
                kind == 3 ? rows.data() : nullptr, n, result, out.data(), kStream);
          });
          EXPECT_EQ(out.get(0), one.want) << one.largest << " " << n << " " << kind;
          EXPECT_EQ(out.get(1), 1.0 / one.want) << one.largest << " " << n << " " << kind;
        }
      }
    }
  }
  TypedArray out(DType::f32, 2);
  launched(1, 3, [&] {
    cuda::find_gradient_scale(nullptr, nullptr, nullptr, 0, DType::f32, out.data(), kStream);
  });
  EXPECT_EQ(out.get(0), 1.0);
  EXPECT_EQ(out.get(1), 1.0);
  cuda_host::set_seed(0);
}

INSTANTIATE_TEST_SUITE_P(Type, Rows, testing::ValuesIn(kTypes),
                         [](const auto& param) { return std::string(name_of(param.param)); });

}  // namespace
}  // namespace fusedpo
