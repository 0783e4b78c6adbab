#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <string_view>
#include <vector>

#include "check.hpp"
#include "tercet/row_softmax.hpp"

using tercet::RowGrads;
using tercet::RowLayout;
using tercet::RowRun;
using tercet::RowState;
using tercet::RowTile;
using tercet::RowType;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kLowest = -87.33654F;
constexpr RowType kTypes[] = {RowType::kFloat32, RowType::kBFloat16, RowType::kFloat16};

struct Result {
  std::vector<float> maximum, rest, spread, picked;
};

// Dense rows of float32 logits with one target each.
struct Problem {
  std::int64_t rows{1};
  std::int64_t columns{0};
  std::vector<float> x;
  std::vector<std::int64_t> targets = std::vector<std::int64_t>(static_cast<std::size_t>(rows), 0);
  std::vector<float> scale = std::vector<float>(static_cast<std::size_t>(rows), 1.0F);

  [[nodiscard]] RowTile tile() const {
    return {.x = x.data(),
            .layout = {rows, 0, columns},
            .rows = rows,
            .columns = columns,
            .targets = targets.data(),
            .scale = scale.data()};
  }
};

Problem random_problem(std::int64_t rows, std::int64_t columns) {
  std::mt19937 random(static_cast<unsigned>(rows * 1000 + columns));
  std::normal_distribution<float> normal(0.0F, 4.0F);
  Problem problem{rows, columns, {}};
  for (std::int64_t i = 0; i < rows * columns; ++i) problem.x.push_back(normal(random));
  for (std::int64_t r = 0; r < rows; ++r) {
    const auto index = static_cast<std::size_t>(r);
    problem.targets[index] = static_cast<std::int64_t>(random()) % columns;
    problem.scale[index] = 0.5F + static_cast<float>(random() % 100) / 100.0F;
  }
  return problem;
}

Result empty_result(std::int64_t rows) {
  const auto n = static_cast<std::size_t>(rows);
  return {std::vector<float>(n, -kInf), std::vector<float>(n), std::vector<float>(n),
          std::vector<float>(n, kNan)};
}

void add(Result& result, const RowTile& tile, const RowRun& run) {
  row_softmax_forward(
      tile, {result.maximum.data(), result.rest.data(), result.spread.data(), result.picked.data()},
      run);
}

Result forward(const Problem& problem, const RowRun& run) {
  Result result = empty_result(problem.rows);
  add(result, problem.tile(), run);
  return result;
}

std::vector<float> gradient(const Problem& problem, const Result& stats,
                            const std::vector<float>& a, const std::vector<float>& b,
                            const RowRun& run) {
  std::vector<float> log_sum;
  for (const float rest : stats.rest) log_sum.push_back(std::log1p(rest));
  std::vector<float> target(stats.rest.size(), 0.125F);
  std::vector<float> dx(problem.x.size(), kNan);
  row_softmax_backward(problem.tile(),
                       {stats.maximum.data(), log_sum.data(), a.data(), b.data(), target.data()},
                       dx.data(), problem.tile().layout, run);
  return dx;
}

// exp(x) of each x, through the backward: dx = -p a with maximum 0, log_sum 0 and a = -1.
std::vector<float> exp_of(const std::vector<float>& x, std::string_view set) {
  const Problem problem{1, static_cast<std::int64_t>(x.size()), x, {-1}};
  const float zero = 0.0F;
  const float a = -1.0F;
  const float unused = 0.0F;
  std::vector<float> dx(x.size(), kNan);
  row_softmax_backward(problem.tile(), {&zero, &zero, &a, nullptr, &unused}, dx.data(), {},
                       {1, set});
  return dx;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

bool same_bits(const Result& a, const Result& b) {
  return same_bits(a.maximum, b.maximum) && same_bits(a.rest, b.rest) &&
         same_bits(a.spread, b.spread) && same_bits(a.picked, b.picked);
}

bool close(double value, double truth, double relative) {
  return std::abs(value - truth) <= relative * std::abs(truth) + 1e-30;
}

// Row r of x, described in double; the first likeliest token stays out of `rest`.
void check_row(const Problem& problem, const Result& result, std::int64_t r) {
  const auto index = static_cast<std::size_t>(r);
  const float* x = problem.x.data() + r * problem.columns;
  std::int64_t best = 0;
  for (std::int64_t j = 1; j < problem.columns; ++j) best = x[j] > x[best] ? j : best;
  double rest = 0.0;
  double spread = 0.0;
  for (std::int64_t j = 0; j < problem.columns; ++j) {
    const double d = (static_cast<double>(x[j]) - x[best]) * problem.scale[index];
    if (j == best || x[j] == -kInf) continue;
    rest += std::exp(d);
    spread -= std::exp(d) * d;
  }
  CHECK(result.maximum[index] == x[best]);
  CHECK(close(result.rest[index], rest, 1e-6));
  CHECK(close(result.spread[index], spread, 2e-6));
  CHECK(result.picked[index] == x[problem.targets[index]]);
}

void exp_is_within_two_units_in_the_last_place(std::string_view set) {
  std::vector<float> x;
  for (float v = 0.0F; v >= kLowest; v -= 1.37e-3F) x.push_back(v);
  for (float v = -1.0F; v < -1e-30F; v *= 0.7F) x.push_back(v);
  for (int n = 0; n <= 126; ++n) {  // around the ends of the range reduction
    const auto edge = static_cast<float>(-(n + 0.5) * std::log(2.0));
    for (float v : {std::nextafter(edge, 0.0F), edge, std::nextafter(edge, -kInf)}) {
      if (v >= kLowest) x.push_back(v);
    }
  }
  const std::vector<float> y = exp_of(x, set);
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double truth = std::exp(static_cast<double>(x[i]));
    const float nearest = static_cast<float>(truth);
    const double unit = static_cast<double>(std::nextafter(nearest, kInf)) - nearest;
    CHECK(std::abs(y[i] - truth) <= 2.0 * unit);
  }
  CHECK(exp_of({0.0F}, set)[0] == 1.0F);
}

void exp_below_the_normal_floats_is_zero(std::string_view set) {
  const float below = std::nextafter(kLowest, -kInf);
  const auto y = exp_of({kLowest, below, -100.0F, -1e4F, -3e38F, -kInf, kNan}, set);
  CHECK(y[0] >= std::numeric_limits<float>::min());
  for (std::size_t i = 1; i < 6; ++i) CHECK(y[i] == 0.0F);
  CHECK(std::isnan(y[6]));
}

void describes_rows_of_every_width(std::string_view set) {
  for (std::int64_t columns = 1; columns <= 200; ++columns) {
    const Problem problem = random_problem(3, columns);
    const Result result = forward(problem, {1, set});
    for (std::int64_t r = 0; r < 3; ++r) check_row(problem, result, r);
  }
  const Problem wide = random_problem(2, 3 * 4096 + 77);
  check_row(wide, forward(wide, {1, set}), 1);
}

void maximum_may_come_anywhere(std::string_view set) {
  for (const std::int64_t columns : {70, 129, 5000}) {
    Problem rising{2, columns, {}};
    for (const float sign : {1.0F, -1.0F}) {
      for (std::int64_t j = 0; j < columns; ++j) {
        const float step = static_cast<float>(j) / static_cast<float>(columns);
        rising.x.push_back(sign * 60.0F * step);
      }
    }
    const Result result = forward(rising, {1, set});
    check_row(rising, result, 0);
    check_row(rising, result, 1);
  }
  for (std::size_t place = 0; place < 150; ++place) {  // equal maxima count once each
    Problem tie{1, 150, std::vector<float>(150, -2.0F)};
    tie.x[place] = tie.x[149 - place] = 3.0F;
    check_row(tie, forward(tie, {1, set}), 0);
  }
}

void tiles_add_up(std::string_view set) {
  const Problem problem = random_problem(4, 301);
  const Result whole = forward(problem, {1, set});
  for (const std::int64_t cut : {1, 16, 63, 64, 65, 300}) {
    Result result = empty_result(4);
    RowTile part = problem.tile();
    part.columns = cut;
    add(result, part, {1, set});
    part.x = problem.x.data() + cut;
    part.columns = 301 - cut;
    part.first_column = cut;
    add(result, part, {1, set});
    for (std::size_t r = 0; r < 4; ++r) {
      CHECK(result.maximum[r] == whole.maximum[r]);
      CHECK(close(result.rest[r], whole.rest[r], 1e-6));
      CHECK(close(result.spread[r], whole.spread[r], 2e-6));
      CHECK(result.picked[r] == whole.picked[r]);
    }
  }
}

void exponentials_take_the_place_of_the_logits(std::string_view set) {
  for (const std::int64_t columns : {1, 15, 64, 70, 5000}) {
    Problem problem = random_problem(3, columns);
    const std::vector<float> x = problem.x;
    const Result expected = forward(problem, {1, set});
    Result result = empty_result(3);
    row_softmax_forward(
        problem.tile(),
        {result.maximum.data(), result.rest.data(), result.spread.data(), result.picked.data()},
        {2, set}, problem.x.data());
    CHECK(same_bits(result, expected));
    for (std::size_t i = 0; i < x.size(); ++i) {
      const std::size_t r = i / static_cast<std::size_t>(columns);
      const double d = (static_cast<double>(x[i]) - result.maximum[r]) * problem.scale[r];
      CHECK(close(problem.x[i], std::exp(d), 4e-6));
    }
  }
}

void exponentials_of_masked_rows_are_zero(std::string_view set) {
  Problem problem{2, 3, {-kInf, -kInf, -kInf, kInf, 0.0F, -kInf}};
  Result result = empty_result(2);
  row_softmax_forward(problem.tile(),
                      {result.maximum.data(), result.rest.data(), nullptr, result.picked.data()},
                      {1, set}, problem.x.data());
  for (std::size_t i = 0; i < 3; ++i) CHECK(problem.x[i] == 0.0F);
  CHECK(std::isnan(problem.x[3]));
  CHECK(problem.x[5] == 0.0F);
}

void targets_outside_a_tile_are_skipped(std::string_view set) {
  Problem problem = random_problem(1, 40);
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  problem.targets = {99, 100, 139, 140, -1, kMost, -kMost - 1};
  RowTile tile = problem.tile();
  tile.first_column = 100;
  tile.num_targets = 7;
  Result result = empty_result(1);
  result.picked.assign(7, kNan);
  add(result, tile, {1, set});
  CHECK(result.picked[1] == problem.x[0]);
  CHECK(result.picked[2] == problem.x[39]);
  for (const std::size_t outside : {0, 3, 4, 5, 6}) CHECK(std::isnan(result.picked[outside]));
  const float zero = 0.0F;
  const float a = 0.5F;
  const std::vector<float> target{1, 2, 3, 4, 5, 6, 7};
  std::vector<float> dx(40, kNan);
  row_softmax_backward(tile, {&zero, &zero, &a, nullptr, target.data()}, dx.data(), {}, {1, set});
  CHECK(dx[0] == 2.0F);
  CHECK(dx[39] == 3.0F);
  for (std::size_t j = 1; j < 39; ++j) CHECK(dx[j] <= 0.0F);
}

void masked_and_bad_logits(std::string_view set) {
  for (const std::size_t columns : {5U, 64U, 200U}) {
    Problem problem{1, static_cast<std::int64_t>(columns), std::vector<float>(columns, -kInf)};
    Result result = forward(problem, {1, set});
    CHECK(result.maximum[0] == -kInf);
    CHECK(result.rest[0] == 0.0F);
    CHECK(result.spread[0] == 0.0F);
    problem.x[columns - 2] = -1e4F;
    problem.x[columns - 1] = -1e4F;
    result = forward(problem, {1, set});
    check_row(problem, result, 0);
    CHECK(result.rest[0] == 1.0F);
    for (const std::size_t bad : {std::size_t{0}, columns - 1}) {
      for (const float value : {kNan, kInf}) {
        Problem spoilt = problem;
        spoilt.x[bad] = value;
        CHECK(std::isnan(forward(spoilt, {1, set}).rest[0]));
        spoilt.x[columns - 2] = 1e30F;  // a maximum behind it
        CHECK(std::isnan(forward(spoilt, {1, set}).rest[0]));
      }
    }
  }
  const std::vector<float> far{1.0F, -3e38F, 3e38F, 0.0F};  // a fall beyond float
  const Result result = forward(Problem{1, 4, far}, {1, set});
  CHECK(result.rest[0] == 0.0F);
  CHECK(result.spread[0] == 0.0F);
}

void writes_the_gradient_of_every_width(std::string_view set) {
  const std::vector<float> a{0.7F, -0.3F, 0.0F};
  const std::vector<float> b{0.0F, 0.4F, -0.2F};
  for (std::int64_t columns = 1; columns <= 70; ++columns) {
    const Problem problem = random_problem(3, columns);
    const Result stats = forward(problem, {1, set});
    const std::vector<float> dx = gradient(problem, stats, a, b, {1, set});
    for (std::size_t r = 0; r < 3; ++r) {
      const double log_sum = std::log1p(static_cast<double>(stats.rest[r]));
      for (std::int64_t j = 0; j < columns; ++j) {
        const std::size_t i = r * static_cast<std::size_t>(columns) + static_cast<std::size_t>(j);
        const double d = (static_cast<double>(problem.x[i]) - stats.maximum[r]) * problem.scale[r];
        const double log_p = d - log_sum;
        const double truth = -std::exp(log_p) * (a[r] + b[r] * log_p);
        const double scale = std::exp(log_p) * (std::abs(a[r]) - std::abs(b[r]) * log_p);
        const bool is_target = j == problem.targets[r];
        CHECK(is_target ? dx[i] == 0.125F : std::abs(dx[i] - truth) <= 4e-6 * scale + 1e-37);
      }
    }
  }
}

void rows_without_gradient_are_not_read(std::string_view set) {
  Problem problem = random_problem(2, 33);
  std::fill(problem.x.begin(), problem.x.begin() + 33, kNan);
  Result stats = forward(random_problem(2, 33), {1, set});
  stats.rest[0] = stats.maximum[0] = kNan;
  problem.targets = {-1, -1};
  const auto dx = gradient(problem, stats, {0.0F, 1.0F}, {0.0F, 0.0F}, {1, set});
  for (std::size_t j = 0; j < 33; ++j) {
    CHECK(dx[j] == 0.0F);
    CHECK(dx[33 + j] < 0.0F);
  }
  for (const float g : gradient(problem, stats, {kNan, kNan}, {0.0F, 0.0F}, {1, set})) {
    CHECK(std::isnan(g));
  }
}

std::uint16_t bfloat16_of(float x) {
  return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(x) >> 16);
}

// Widened and narrowed by the kernels: exp of 16-bit logits near 0, rounded to the same type.
void half_types_round_to_nearest_even(std::string_view set) {
  const std::vector<float> values{1.0F, 0.5F, -2.0F, 0.333251953125F, 65504.0F, 6.1035156e-5F};
  const float zero = 0.0F;
  for (const RowType type : kTypes) {
    if (type == RowType::kFloat32) continue;
    const bool brain = type == RowType::kBFloat16;
    std::vector<std::uint16_t> x(19, 0);  // exp(0) = 1, so that dx = -a
    std::vector<std::uint16_t> dx(19, 0xffff);
    const std::int64_t target = -1;
    RowTile tile{.x = x.data(), .type = type, .rows = 1, .columns = 19, .targets = &target};
    const float one = 1.0F;
    tile.scale = &one;
    const auto narrow = [&](float value) {
      const float a = -value;
      row_softmax_backward(tile, {&zero, &zero, &a, nullptr, &zero}, dx.data(), {}, {1, set});
      for (const std::uint16_t bits : dx) CHECK(bits == dx[0]);
      return dx[0];
    };
    CHECK(narrow(1.0F) == (brain ? 0x3f80 : 0x3c00));
    CHECK(narrow(-2.0F) == (brain ? 0xc000 : 0xc000));
    CHECK(narrow(kInf) == (brain ? 0x7f80 : 0x7c00));
    CHECK((narrow(kNan) & 0x7fff) > (brain ? 0x7f80 : 0x7c00));
    CHECK(narrow(brain ? 1.00390625F : 1.00048828125F) == (brain ? 0x3f80 : 0x3c00));  // tie
    CHECK(narrow(brain ? 1.01171875F : 1.00146484375F) == (brain ? 0x3f82 : 0x3c02));  // tie
    CHECK(narrow(brain ? 1.005F : 1.0006F) == (brain ? 0x3f81 : 0x3c01));
    if (!brain) {
      CHECK(narrow(65519.0F) == 0x7bff);
      CHECK(narrow(65520.0F) == 0x7c00);
      CHECK(narrow(0x1.8p16F) == 0x7c00);
      CHECK(narrow(1e6F) == 0x7c00);
      CHECK(narrow(0x1p-24F) == 1);
      CHECK(narrow(0x1p-25F) == 0);
      CHECK(narrow(0x1.8p-24F) == 2);
      CHECK(narrow(0x1p-14F) == 0x0400);
    }
    // Widening, through the target's logit.
    const std::vector<std::uint16_t> bits =
        brain ? std::vector<std::uint16_t>{0x3f80, 0xff80, bfloat16_of(-0.0078125F), 1}
              : std::vector<std::uint16_t>{0x3c00, 0xfc00, 0xa000, 1};
    const std::vector<float> wide{1.0F, -kInf, -0.0078125F, brain ? 0x1p-133F : 0x1p-24F};
    for (std::int64_t j = 0; j < 4; ++j) {
      Result result = empty_result(1);
      RowTile few = tile;
      few.x = bits.data();
      few.columns = 4;
      few.targets = &j;
      add(result, few, {1, set});
      CHECK(result.picked[0] == wide[static_cast<std::size_t>(j)]);
      CHECK(result.maximum[0] == 1.0F);
    }
  }
}

// Rows on two strides, off every boundary; what lies between them is neither read nor written.
void strides_and_misalignment_change_no_bit(std::string_view set) {
  const Problem dense = random_problem(6, 67);
  const Result expected = forward(dense, {1, set});
  const std::vector<float> a(6, 0.5F);
  const std::vector<float> b(6, 0.25F);
  const std::vector<float> d_expected = gradient(dense, expected, a, b, {1, set});
  const RowLayout layout{3, 251, 71};
  std::vector<float> apart(1 + 251 + 2 * 71 + 67, kNan);
  const auto place = [&](std::int64_t r) {
    return static_cast<std::size_t>(1 + (r / 3) * 251 + (r % 3) * 71);
  };
  for (std::int64_t r = 0; r < 6; ++r) {
    std::copy_n(dense.x.begin() + r * 67, 67, apart.begin() + static_cast<long>(place(r)));
  }
  RowTile tile = dense.tile();
  tile.x = apart.data() + 1;
  tile.layout = layout;
  Result result = empty_result(6);
  add(result, tile, {1, set});
  CHECK(same_bits(result, expected));
  std::vector<float> log_sum;
  for (const float rest : result.rest) log_sum.push_back(std::log1p(rest));
  const std::vector<float> target(6, 0.125F);
  row_softmax_backward(tile,
                       {result.maximum.data(), log_sum.data(), a.data(), b.data(), target.data()},
                       apart.data() + 1, layout, {1, set});  // in place
  std::size_t untouched = 0;
  for (const float value : apart) untouched += std::isnan(value) ? 1U : 0U;
  CHECK(untouched == apart.size() - 6 * 67);
  for (std::int64_t r = 0; r < 6; ++r) {
    CHECK(std::memcmp(apart.data() + place(r), d_expected.data() + r * 67, 67 * 4) == 0);
  }
}

void threads_change_no_bit(std::string_view set) {
  const Problem problem = random_problem(53, 8191);
  const std::vector<float> a(53, 0.5F);
  const std::vector<float> b(53, 0.25F);
  const Result one = forward(problem, {1, set});
  const std::vector<float> d_one = gradient(problem, one, a, b, {1, set});
  for (const int threads : {2, 3, 64}) {
    CHECK(same_bits(forward(problem, {threads, set}), one));
    CHECK(same_bits(gradient(problem, one, a, b, {threads, set}), d_one));
  }
}

void rejects_bad_arguments() {
  const Problem problem = random_problem(2, 3);
  Result result = empty_result(2);
  const auto rejects = [&](auto change, const RowRun& run) {
    RowTile tile = problem.tile();
    change(tile);
    CHECK_THROWS(add(result, tile, run), std::invalid_argument);
  };
  const RowRun run{1, ""};
  rejects([](RowTile& t) { t.x = nullptr; }, run);
  rejects([](RowTile& t) { t.targets = nullptr; }, run);
  rejects([](RowTile& t) { t.scale = nullptr; }, run);
  rejects([](RowTile& t) { t.rows = -1; }, run);
  rejects([](RowTile& t) { t.columns = -1; }, run);
  rejects([](RowTile& t) { t.first_column = -1; }, run);
  rejects([](RowTile& t) { t.num_targets = -1; }, run);
  rejects([](RowTile& t) { t.layout.inner = 0; }, run);
  rejects([](RowTile& t) { t.layout.stride_outer = -1; }, run);
  rejects([](RowTile&) {}, RowRun{0, ""});
  rejects([](RowTile&) {}, RowRun{1, "sse"});
  const RowTile tile = problem.tile();
  float f[2]{};
  CHECK_THROWS(row_softmax_forward(tile, {nullptr, f, f, f}, run), std::invalid_argument);
  CHECK_THROWS(row_softmax_forward(tile, {f, f, f, nullptr}, run), std::invalid_argument);
  CHECK_THROWS(row_softmax_backward(tile, {f, f, f, f, f}, nullptr, tile.layout, run),
               std::invalid_argument);
  CHECK_THROWS(row_softmax_backward(tile, {f, f, nullptr, f, f}, f, tile.layout, run),
               std::invalid_argument);
  CHECK_THROWS(row_softmax_backward(tile, {f, f, f, f, nullptr}, f, tile.layout, run),
               std::invalid_argument);
  row_softmax_forward(RowTile{}, RowState{}, run);  // no rows: nothing is needed
  row_softmax_backward(RowTile{}, RowGrads{}, nullptr, {}, run);
}

}  // namespace

int main() {
  CHECK(tercet::row_instruction_sets().front() == "portable");
  for (const std::string_view set : tercet::row_instruction_sets()) {
    exp_is_within_two_units_in_the_last_place(set);
    exp_below_the_normal_floats_is_zero(set);
    describes_rows_of_every_width(set);
    maximum_may_come_anywhere(set);
    tiles_add_up(set);
    exponentials_take_the_place_of_the_logits(set);
    exponentials_of_masked_rows_are_zero(set);
    targets_outside_a_tile_are_skipped(set);
    masked_and_bad_logits(set);
    writes_the_gradient_of_every_width(set);
    rows_without_gradient_are_not_read(set);
    half_types_round_to_nearest_even(set);
    strides_and_misalignment_change_no_bit(set);
    threads_change_no_bit(set);
  }
  rejects_bad_arguments();
  return 0;
}
