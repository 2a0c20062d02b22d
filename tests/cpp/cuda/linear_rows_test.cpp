// The memory-bound steps of linear_token_logps on the emulated device: scoring rows of logits,
// writing their unit gradients over them, general gradients, and the labels' exact logits.
#include "linear_problem.h"

namespace fusedpo {
namespace {

class LinearRows : public testing::TestWithParam<DType> {
 protected:
  void TearDown() override { cuda_host::set_seed(0); }
  const DType type = GetParam();
};

// Of rows with ordinary and with large logits.
using ErrorsByScale = std::vector<PlainErrors>;

void include_errors(const Problem& p, ErrorsByScale* errors) {
  for (size_t i = 0; i < p.n(); ++i) {
    const Truth truth = p.truth(i);
    if (!p.number(i, truth)) continue;
    PlainErrors& e = (*errors)[p.cases[i].large];
    if (p.type == DType::f64) {
      e.include(p.plain<double>(i), truth);
    } else {
      e.include(p.plain<float>(i), truth);
    }
  }
}

void expect_row_scores(const Problem& p, const ErrorsByScale& errors, const OnDevice& d,
                       const Scored& s, const std::string& where) {
  const DType type = p.type;
  for (size_t i = 0; i < p.n(); ++i) {
    const RowCase& row = p.cases[i];
    const std::string what = where + ", " + row.name + ": ";
    std::vector<double> stats;
    for (size_t k = 0; k < 4; ++k) stats.push_back(s.stats.get(4 * i + k));
    if (p.position[i] < 0) {
      for (const double value : stats) EXPECT_EQ(value, 0.0) << what;
      continue;
    }
    const auto at = static_cast<size_t>(p.position[i]);
    const double got[] = {s.logps.get(at), s.entropy.get(at), s.sum_sq.get(at), s.mean.get(at)};
    if (row.label == kIgnore) {
      for (const double value : got) EXPECT_EQ(value, 0.0) << what;
      for (const double value : stats) EXPECT_EQ(value, 0.0) << what;
      EXPECT_EQ(s.top1.host()[at], 0) << what;
      continue;
    }
    if (!row.scored) {
      for (const double value : got) EXPECT_TRUE(std::isnan(value)) << what;
      for (int k = 0; k < 3; ++k) EXPECT_TRUE(std::isnan(stats[static_cast<size_t>(k)])) << what;
      EXPECT_EQ(s.top1.host()[at], 0) << what;
      continue;
    }
    const TypedArray x(type, row.x);
    RowStats cpu_stats;
    const RowResult cpu = cpu_score(type, x.data(), p.vocab, row.label, p.transform, d.view.bias,
                                    p.exact_or_null(i), &cpu_stats);
    const Truth truth = p.truth(i);
    if (!p.number(i, truth)) {
      EXPECT_TRUE(std::isnan(got[0]) && std::isnan(cpu.logp)) << what << got[0] << " " << cpu.logp;
      continue;
    }
    if (!row.large) {  // there the cap makes ties of different logits
      EXPECT_EQ(s.top1.host()[at] != 0, truth.is_top1) << what << "is_top1";
    }
    const PlainErrors& e = errors[row.large];
    const auto near = [&](double value, long double want, double error, double of_cpu,
                          const char* name) {
      expect_near(type, value, want, allowed(type, error, static_cast<double>(want), false), of_cpu,
                  truth, what + name);
    };
    near(got[0], truth.logp, e.logp, cpu.logp, "logp");
    const double slack = of_dominating(type, truth, static_cast<size_t>(row.label));
    expect_near(type, got[1], truth.entropy,
                allowed(type, e.entropy, static_cast<double>(truth.entropy), false) + slack,
                cpu.entropy, truth, what + "entropy");
    expect_near(
        type, got[2], truth.log_sum_sq_probs,
        allowed(type, e.log_sum_sq_probs, static_cast<double>(truth.log_sum_sq_probs), false) +
            2 * slack,
        cpu.log_sum_sq_probs, truth, what + "log_sum_sq_probs");
    near(got[3], truth.mean, e.mean, cpu.mean_logits, "mean_logits");
    const double unit = result_of(type) == DType::f64 ? 0x1p-53 : 0x1p-24;
    EXPECT_LE(distance(stats[0], truth.max), 8 * unit * std::fabs(static_cast<double>(truth.max)))
        << what << "max";
    EXPECT_LE(distance(stats[3], truth.target_slope), 8 * unit) << what << "1 - tanh^2";
    EXPECT_LE(distance(cpu_stats.target_slope, truth.target_slope), 16 * unit)
        << what << "1 - tanh^2, CPU";
  }
  // Positions without a row are not written.
  std::vector<bool> has_row(p.positions, false);
  for (const int64_t at : p.position) {
    if (at >= 0) has_row[static_cast<size_t>(at)] = true;
  }
  const std::vector<char> fresh = TypedArray(result_of(type), 1).bytes();
  const std::vector<char> bytes = s.logps.bytes();
  for (size_t at = 0; at < p.positions; ++at) {
    if (has_row[at]) continue;
    EXPECT_TRUE(std::equal(fresh.begin(), fresh.end(),
                           bytes.begin() + static_cast<long>(at * fresh.size())))
        << where << at;
  }
}

// x now holds gradients times `scale`; g(i): what they are of.
template <typename Upstream>
void expect_row_gradients(const Problem& p, const OnDevice& d, double scale, Upstream g,
                          const std::string& where) {
  for (size_t i = 0; i < p.n(); ++i) {
    const RowCase& row = p.cases[i];
    const std::string what = where + ", " + row.name + ", column ";
    const RowGradient of_row = g(i);
    const bool nothing =
        row.label == kIgnore || (of_row.grad_logp == 0.0 && of_row.grad_entropy == 0.0);
    const Truth truth = p.truth(i);
    const bool number = p.number(i, truth);
    if (number && row.large) continue;
    if (nothing || !number) {
      for (size_t v = 0; v < p.vocab; ++v) {
        const double got = d.x.get(i * p.ld + v);
        EXPECT_TRUE(nothing ? got == 0.0 : std::isnan(got)) << what << v << ": " << got;
      }
      continue;
    }
    const auto y = static_cast<size_t>(row.label);
    const GradientTruth want(p.type, truth, y, of_row, scale, &p.transform);
    const TypedArray x(p.type, row.x);
    const auto cpu =
        cpu_gradient(p.type, x.data(), p.vocab, row.label, of_row, p.transform, d.view.bias);
    for (size_t v = 0; v < p.vocab; ++v) {
      const double got = d.x.get(i * p.ld + v);
      EXPECT_LE(distance(got, want.value[v]), want.bound[v])
          << what << v << ": got " << got << ", want " << static_cast<double>(want.value[v]);
      if (p.exact.empty()) {  // the CPU kernel has no exact logit here
        EXPECT_LE(distance(got, scale * cpu[v]), 2 * want.bound[v])
            << what << v << ", CPU " << scale * cpu[v];
      }
    }
  }
}

RowGradient saved(const Problem& p, const Scored& s, size_t i) {
  RowGradient g{};
  g.max = s.stats.get(4 * i);
  g.log_sum = s.stats.get(4 * i + 1);
  g.rest_share = s.stats.get(4 * i + 2);
  if (p.position[i] >= 0) g.entropy = s.entropy.get(static_cast<size_t>(p.position[i]));
  return g;
}

TEST_P(LinearRows, ScoresAndGradientsMatchTheDefinitions) {
  unsigned seed = 300;
  for (const size_t vocab : {1, 7, 9, 31, 130, 1001}) {
    for (const Transformed& t : kTransforms) {
      ++seed;
      const size_t gap = seed % 3 == 0 ? 0 : seed % 3 == 1 ? 3 : 64 - vocab % 64;
      const Problem p(type, vocab, t, seed % 2 == 0, gap, seed);
      const std::string where = std::string(name_of(type)) + ", " + t.name + ", vocab " +
                                std::to_string(vocab) + ", seed " + std::to_string(seed);
      OnDevice d(p);
      Scored s(result_of(type), p.positions, p.n());
      score(d, kAllMetrics, true, seed, &s);
      ErrorsByScale errors(2);
      for (unsigned sample = 0; sample < kSamples; ++sample) {
        include_errors(Problem(type, vocab, t, seed % 2 == 0, 0, 2000 + sample), &errors);
      }
      include_errors(p, &errors);
      expect_row_scores(p, errors, d, s, where);
      const auto unit = [&](size_t i) {
        RowGradient g = saved(p, s, i);
        g.grad_logp = 1.0;
        return g;
      };
      expect_row_gradients(p, d, cuda::unit_scale(type, p.transform), unit, where + ", unit");

      if (!p.exact.empty()) continue;  // a general gradient has the rounded logits alone
      OnDevice again(p);
      const TypedArray of_logps(result_of(type),
                                random_values(result_of(type), p.positions, 1.0, seed));
      std::vector<double> h = random_values(result_of(type), p.positions, 0.4, seed + 1);
      for (size_t at = 0; at < p.positions; at += 4) h[at] = 0.0;
      const TypedArray of_entropy(result_of(type), h);
      const double alpha = rounded(result_of(type), 0.6);
      const TypedArray factor(result_of(type), std::vector<double>{alpha});
      const int wanted = static_cast<int>(seed / 2 % 3);  // logps, entropy, both
      s.entropy.set_written();
      cuda_host::set_seed(seed + 1);
      const cuda_host::LaunchLog log;
      cuda::gradient_rows(again.view, wanted == 1 ? nullptr : of_logps.data(),
                          wanted == 0 ? nullptr : of_entropy.data(),
                          wanted == 0 ? nullptr : s.entropy.data(), s.stats.data(),
                          vocab % 2 == 0 ? nullptr : factor.data(), kStream);
      ASSERT_EQ(log.launches().size(), 1u);
      EXPECT_EQ(log.launches()[0].stream, kStream);
      const auto general = [&](size_t i) {
        RowGradient g = saved(p, s, i);
        if (p.position[i] < 0) return g;
        const auto at = static_cast<size_t>(p.position[i]);
        g.grad_logp = wanted == 1 ? 0.0 : of_logps.get(at);
        g.grad_entropy = wanted == 0 ? 0.0 : of_entropy.get(at);
        return g;
      };
      expect_row_gradients(p, again, vocab % 2 == 0 ? 1.0 : alpha, general, where + ", general");
    }
  }
}

// Rows of 96 KiB and more are shared by more threads.
TEST_P(LinearRows, WideRowsMatchTheDefinitions) {
  const size_t item = item_size(type);
  for (const size_t bytes : {size_t{97} << 10, size_t{193} << 10}) {
    const size_t vocab = bytes / item + 1;
    Problem p(type, vocab, kTransforms[1], false, 0, 4);
    p.cases.erase(p.cases.begin() + 3, p.cases.end());
    p.position.resize(3);
    OnDevice d(p);
    Scored s(result_of(type), p.positions, p.n());
    score(d, kAllMetrics, true, 2, &s);
    ErrorsByScale errors(2);
    include_errors(p, &errors);
    expect_row_scores(p, errors, d, s, name_of(type));
    expect_row_gradients(
        p, d, cuda::unit_scale(type, p.transform),
        [&](size_t i) {
          RowGradient g = saved(p, s, i);
          g.grad_logp = 1.0;
          return g;
        },
        name_of(type));
  }
}

TEST_P(LinearRows, NeitherMetricsNorGradientsNorOrderChangeABit) {
  for (const int which : {1, 4}) {
    const Problem p(type, 131, kTransforms[which], true, 1, 9);
    std::vector<std::vector<char>> want;
    std::vector<char> want_x;
    for (const uint64_t seed : {0, 1, 2}) {
      const OnDevice d(p);
      Scored s(result_of(type), p.positions, p.n());
      score(d, kAllMetrics, true, seed, &s);
      if (seed == 0) {
        want = s.bytes();
        want_x = d.x.bytes();
      }
      EXPECT_EQ(s.bytes(), want);
      EXPECT_EQ(d.x.bytes(), want_x);
    }
    for (unsigned metrics = 0; metrics <= kAllMetrics; ++metrics) {
      const OnDevice d(p);
      const std::vector<char> before = d.x.bytes();
      Scored s(result_of(type), p.positions, p.n());
      score(d, metrics, false, metrics, &s);
      const auto got = s.bytes();
      EXPECT_EQ(d.x.bytes(), before) << "rows are only read";
      for (const size_t k : {0, 1, 2, 3, 4, 5}) {
        const unsigned needs[] = {0, kEntropy, kLogSumSqProbs, kMeanLogits, 0, kIsTop1};
        if ((metrics & needs[k]) == needs[k]) {
          EXPECT_EQ(got[k], want[k]) << metrics << " " << k;
        }
      }
    }
  }
}

TEST_P(LinearRows, WithoutPositionsRowsAreTheirOwn) {
  Problem p(type, 37, kTransforms[0], false, 0, 21);
  p.cases.resize(20);
  p.position.clear();
  for (int64_t i = 0; i < 20; ++i) p.position.push_back(i);
  OnDevice d(p), null_rows(p);
  null_rows.view.rows = nullptr;
  Scored want(result_of(type), p.positions, p.n()), got(result_of(type), p.positions, p.n());
  score(d, kAllMetrics, true, 1, &want);
  score(null_rows, kAllMetrics, true, 2, &got);
  EXPECT_EQ(got.bytes(), want.bytes());
  EXPECT_EQ(null_rows.x.bytes(), d.x.bytes());
  null_rows.view.n = 0;
  const cuda_host::LaunchLog log;
  cuda::score_rows(null_rows.view, kAllMetrics, true, {}, nullptr, kStream);
  cuda::gradient_rows(null_rows.view, nullptr, nullptr, nullptr, nullptr, nullptr, kStream);
  cuda::label_products(nullptr, type, nullptr, type, 1, 1, 1, null_rows.view, false, nullptr,
                       kStream);
  EXPECT_EQ(log.launches().size(), 0u);
}

TEST(UnitScale, BringsTheLargestEntriesOfFp16ToAbout1024) {
  for (const double k : {1e-3, 0.5, 1.0, 1.5, 60.0, 64.0, 1000.0, -200.0}) {
    for (const double temperature : {1.0, 0.7}) {
      const double scale = cuda::unit_scale(DType::f16, {k, 0.0, temperature});
      int exponent = 0;
      EXPECT_EQ(std::frexp(scale, &exponent), 0.5) << "a power of two";
      EXPECT_LE(scale, 1024.0);
      const double largest = scale * std::fabs(k / temperature);
      EXPECT_LE(largest, 1024.0);
      EXPECT_TRUE(scale == 1024.0 || largest > 512.0) << k;
      for (const DType type : {DType::f32, DType::bf16, DType::f64}) {
        EXPECT_EQ(cuda::unit_scale(type, {k, 0.0, temperature}), 1.0);
      }
    }
  }
}

// The label's logit from its two vectors, the weight in any type and with any strides.
TEST_P(LinearRows, LabelProductsAreSummedInTheComputeType) {
  for (const size_t cols : {1, 5, 127, 128, 129, 1000}) {
    for (const DType w_type : kTypes) {
      if ((w_type == DType::f64) != (type == DType::f64)) continue;
      constexpr size_t kVocab = 6, kRows = 8, kPositions = 10;
      const std::vector<int64_t> position = {4, 1, -1, 9, 0, 7, 2, 5};
      const std::vector<int64_t> by_position = {3, 0, kIgnore, 2, 5, 4, 1, 6, 0, -1};
      const bool transposed = cols % 2 == 0;
      const TypedArray a(type, random_values(type, kRows * cols, 1.0, 3));
      const TypedArray w(w_type, random_values(w_type, kVocab * (cols + 2), 1.0, 4));
      const size_t row_stride = transposed ? 1 : cols + 2, col_stride = transposed ? kVocab : 1;
      const DeviceArray<int64_t> rows(position), labels(by_position);
      static_assert(kPositions == 10);
      TypedArray exact(result_of(type), kRows);
      cuda::LogitRows view;
      view.n = kRows;
      view.vocab = kVocab;
      view.rows = rows.data();
      view.labels = labels.data();
      view.ignore_index = kIgnore;
      for (const bool add : {false, true}) {
        cuda_host::set_seed(cols);
        const cuda_host::LaunchLog log;
        cuda::label_products(a.data(), type, w.data(), w_type, static_cast<int64_t>(row_stride),
                             static_cast<int64_t>(col_stride), static_cast<int64_t>(cols), view,
                             add, exact.data(), kStream);
        ASSERT_EQ(log.launches().size(), 1u);
        EXPECT_EQ(log.launches()[0].stream, kStream);
        for (size_t i = 0; i < kRows; ++i) {
          const int64_t label =
              position[i] < 0 ? kIgnore : by_position[static_cast<size_t>(position[i])];
          long double want = 0, size = 0;
          if (label >= 0 && label < static_cast<int64_t>(kVocab)) {
            for (size_t h = 0; h < cols; ++h) {
              const double weight =
                  rounded(type == DType::f64 ? DType::f64 : type,
                          w.get(static_cast<size_t>(label) * row_stride + h * col_stride));
              want += static_cast<long double>(a.get(i * cols + h)) * weight;
              size += std::fabs(static_cast<long double>(a.get(i * cols + h)) * weight);
            }
          }
          if (add) {
            want *= 2;
            size *= 2;
          }
          // A thread's products, cols / 128 of them, are summed in the compute type.
          const double unit = result_of(type) == DType::f64 ? 0x1p-53 : 0x1p-24;
          const double bound =
              static_cast<double>(size) * unit * (static_cast<double>(cols) / 128.0 + 3.0);
          EXPECT_LE(distance(exact.get(i), want), bound)
              << name_of(type) << " " << name_of(w_type) << " " << cols << " " << i << " " << add;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Type, LinearRows, testing::ValuesIn(kTypes),
                         [](const auto& param) { return std::string(name_of(param.param)); });

}  // namespace
}  // namespace fusedpo
