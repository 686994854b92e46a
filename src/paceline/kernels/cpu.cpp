// PACE in one pass over memory, on the CPU. The rule of update.py once more, because compiling that
// one reads and writes the same bytes but takes longer (benchmarks/results).
//
// Compiled by cpu.py with any C++17 compiler; needs neither torch nor Python.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

namespace {

struct bfloat16 { uint16_t bits; };

// One row for each tensor and one for the step, as cpu.py lays them out. The extra averages follow
// each, as many as there are: their addresses after a tensor's row, their weights after the step's.
struct Row { int64_t param, grad, exp_avg, exp_avg_sq, average, size, key, start, count; };
struct Step {
  double w1, beta2, w2, eps, unbias, step_size, shrink, gain, cap, weight, sign, guard;
};
// The same of what another optimizer has moved, and of its pull.
struct Moved { int64_t param, before, average, second_moment, size; };
struct Pull { double gain, unbias, eps, cap, weight; };
// And of a parameter and its average that trade places.
struct Pair { int64_t param, average, size; };

enum Average { WATCH, PULL, PULL_UNIFORM };  // the last with one gain for all coordinates

template <class W, class T> inline W load(const T* x, int64_t i) { return W(x[i]); }
template <> inline float load<float>(const bfloat16* x, int64_t i) {
  const uint32_t bits = uint32_t(x[i].bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Returns what it stored.
template <class T, class W> inline W store(T* x, int64_t i, W value, uint32_t) {
  return x[i] = value;
}
inline float store(bfloat16* x, int64_t i, float value, uint32_t noise) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits += noise;
  x[i].bits = uint16_t(bits >> 16);
  bits &= 0xFFFF0000U;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Added to a float's bits, it makes the cut after 16 of them round to nearest, ties to even.
inline uint32_t nearest(double) { return 0; }
inline uint32_t nearest(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return 0x7FFF + ((bits >> 16) & 1);
}

// rounding.py's `mix` and the 16 bits of noise that it gives each tensor of the step.
inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352DU;
  x = (x ^ (x >> 15)) * 0x846CA68BU;
  return x ^ (x >> 16);
}

template <class P, class S, Average AVERAGE, bool STOCHASTIC>
void range(const Row& row, int64_t begin, int64_t end, const Step& step) {
  using W = std::conditional_t<std::is_same_v<P, double>, double, float>;  // arithmetic
  constexpr bool narrow = std::is_same_v<S, bfloat16>;
  constexpr bool offset = sizeof(S) < sizeof(P);
  P* __restrict params = reinterpret_cast<P*>(row.param);
  const P* __restrict grads = reinterpret_cast<const P*>(row.grad);
  S* __restrict exp_avgs = reinterpret_cast<S*>(row.exp_avg);
  S* __restrict exp_avg_sqs = reinterpret_cast<S*>(row.exp_avg_sq);
  S* __restrict averages = reinterpret_cast<S*>(row.average);
  const uint32_t key = uint32_t(row.key), start = uint32_t(row.start);
  const W w1 = W(step.w1), beta2 = W(step.beta2), w2 = W(step.w2), eps = W(step.eps);
  const W unbias = W(step.unbias), step_size = W(step.step_size), shrink = W(step.shrink);
  const W gain = W(step.gain), cap = W(step.cap), weight = W(step.weight), sign = W(step.sign);

#ifdef __clang__  // which looks for __restrict in arguments only
#pragma clang loop vectorize(assume_safety)
#endif
  for (int64_t i = begin; i < end; i++) {
    const uint32_t noise = narrow || STOCHASTIC ? mix((uint32_t(i) + start) ^ key) : 0;
    const W theta = load<W>(params, i);
    W g = sign * load<W>(grads, i);
    if (narrow) g = g == g ? g : W(NAN);  // the noise could carry another NaN's bits over to zero
    W m = load<W>(exp_avgs, i), v = load<W>(exp_avg_sqs, i);
    const W kept = load<W>(averages, i);
    m += w1 * (g - m);
    v = beta2 * v + w2 * g * g;
    const W inverse = 1 / (std::sqrt(v) * unbias + eps);
    W next = shrink * theta - step_size * m * inverse;
    if constexpr (AVERAGE != WATCH) {
      W lambda = AVERAGE == PULL ? gain * inverse : gain;
      lambda = cap < lambda ? cap : lambda;  // a NaN stays
      next += lambda * (offset ? kept : kept - theta);
    }
    store(exp_avgs, i, m, noise & 0xFFFF);
    store(exp_avg_sqs, i, v, noise >> 16);
    const uint32_t third = (noise * 0x9E3779B9U) >> 16;
    if constexpr (offset) {
      const W d = store(averages, i, (1 - weight) * (kept - (next - theta)), third);
      next = (next + d) - d;
    }
    next = store(params, i, next, STOCHASTIC ? (noise * 0x85EBCA6BU) >> 16 : nearest(next));
    if constexpr (!offset) {
      const W moved = kept + weight * (next - kept);
      store(averages, i, weight == 0 ? kept : moved, third);
    }
  }
}

// An extra average takes in what a block has just stepped to. The weights are in the cache: this
// reads and writes the average and no other memory.
template <class P, class W>
void take_in(int64_t average, const P* __restrict params, int64_t from, int64_t to, W weight) {
  W* __restrict averages = reinterpret_cast<W*>(average);
  for (int64_t i = from; i < to; i++)
    averages[i] += weight * (load<W>(params, i) - averages[i]);
}

// Steps a piece block by block. With a guard, coordinates whose gradient's square is not finite are
// put back after the block's step. They are looked for in what the step is about to read, which
// costs no memory traffic. Returns how many there were.
template <class P, class S, Average AVERAGE, bool STOCHASTIC>
int64_t piece(const Row& row, int64_t begin, int64_t end, const Step& step, int extra) {
  using W = std::conditional_t<std::is_same_v<P, double>, double, float>;
  struct Skipped { int64_t at; P param; S exp_avg, exp_avg_sq, average; };
  constexpr int64_t BLOCK = 2048;
  P* params = reinterpret_cast<P*>(row.param);
  const P* __restrict grads = reinterpret_cast<const P*>(row.grad);
  S* exp_avgs = reinterpret_cast<S*>(row.exp_avg);
  S* exp_avg_sqs = reinterpret_cast<S*>(row.exp_avg_sq);
  S* averages = reinterpret_cast<S*>(row.average);
  const int64_t* extra_averages = reinterpret_cast<const int64_t*>(&row + 1);
  const double* weights = reinterpret_cast<const double*>(&step + 1);
  const W limit = std::sqrt(std::numeric_limits<W>::max());
  auto steps = [=](int64_t i) { return std::abs(load<W>(grads, i)) <= limit; };  // no NaN does

  int64_t total = 0;
  for (int64_t from = begin; from < end; from += BLOCK) {
    const int64_t to = from + BLOCK < end ? from + BLOCK : end;
    Skipped skipped[BLOCK];
    int count = 0, bad = 0;
    if (step.guard != 0)
      for (int64_t i = from; i < to; i++) bad |= !steps(i);
    for (int64_t i = from; bad && i < to; i++)
      if (!steps(i))
        skipped[count++] = {i, params[i], exp_avgs[i], exp_avg_sqs[i], averages[i]};
    range<P, S, AVERAGE, STOCHASTIC>(row, from, to, step);
    for (int k = 0; k < count; k++) {
      const Skipped& x = skipped[k];
      params[x.at] = x.param;
      exp_avgs[x.at] = x.exp_avg;
      exp_avg_sqs[x.at] = x.exp_avg_sq;
      averages[x.at] = x.average;
    }
    for (int j = 0; j < extra; j++) {
      if (weights[j] == 0) continue;
      W* average = reinterpret_cast<W*>(extra_averages[j]);
      W kept[BLOCK];
      for (int k = 0; k < count; k++) kept[k] = average[skipped[k].at];
      take_in(extra_averages[j], params, from, to, W(weights[j]));
      for (int k = 0; k < count; k++) average[skipped[k].at] = kept[k];
    }
    total += count;
  }
  return total;
}

using Piece = int64_t (*)(const Row&, int64_t, int64_t, const Step&, int);

template <class P, class S> Piece choose(Average average, bool stochastic) {
  constexpr bool can = std::is_same_v<P, bfloat16>;
  if (average == WATCH) return stochastic ? piece<P, S, WATCH, can> : piece<P, S, WATCH, false>;
  if (average == PULL) return stochastic ? piece<P, S, PULL, can> : piece<P, S, PULL, false>;
  return stochastic ? piece<P, S, PULL_UNIFORM, can> : piece<P, S, PULL_UNIFORM, false>;
}

// After another optimizer's step, as update.py's `pull_`: the pull, and what the averages take in.
template <class P, class V, Average AVERAGE>
void follow(const Moved& row, int64_t begin, int64_t end, const Pull& pull, int extra) {
  using W = std::conditional_t<std::is_same_v<P, double>, double, float>;
  constexpr int64_t BLOCK = 2048;
  P* __restrict params = reinterpret_cast<P*>(row.param);
  const P* __restrict before = reinterpret_cast<const P*>(row.before);
  const V* __restrict second_moments = reinterpret_cast<const V*>(row.second_moment);
  W* __restrict averages = reinterpret_cast<W*>(row.average);
  const int64_t* extra_averages = reinterpret_cast<const int64_t*>(&row + 1);
  const double* weights = reinterpret_cast<const double*>(&pull + 1);
  const W gain = W(pull.gain), unbias = W(pull.unbias), eps = W(pull.eps), cap = W(pull.cap);
  const W weight = W(pull.weight);

  for (int64_t from = begin; from < end; from += BLOCK) {
    const int64_t to = from + BLOCK < end ? from + BLOCK : end;
#ifdef __clang__
#pragma clang loop vectorize(assume_safety)
#endif
    for (int64_t i = from; i < to; i++) {
      W next = load<W>(params, i);
      const W kept = averages[i];
      if constexpr (AVERAGE != WATCH) {
        W lambda = gain;
        if constexpr (AVERAGE == PULL)
          lambda = gain * (1 / (std::sqrt(load<W>(second_moments, i)) * unbias + eps));
        lambda = cap < lambda ? cap : lambda;  // a NaN stays
        next += lambda * (kept - load<W>(before, i));
        next = store(params, i, next, nearest(next));
      }
      const W moved = kept + weight * (next - kept);
      averages[i] = weight == 0 ? kept : moved;
    }
    for (int j = 0; j < extra; j++)
      if (weights[j] != 0) take_in(extra_averages[j], params, from, to, W(weights[j]));
  }
}

using Follow = void (*)(const Moved&, int64_t, int64_t, const Pull&, int);

template <class P, class V> Follow choose_follow(Average average) {
  if (average == WATCH) return follow<P, V, WATCH>;
  return average == PULL ? follow<P, V, PULL> : follow<P, V, PULL_UNIFORM>;
}

// Live weights and average trade places, as swap.py has it: as bits, but for an offset.
template <class P, class A, bool BACK>
void swap_pair(const Pair& row, int64_t begin, int64_t end) {
  P* __restrict params = reinterpret_cast<P*>(row.param);
  A* __restrict averages = reinterpret_cast<A*>(row.average);
#ifdef __clang__
#pragma clang loop vectorize(assume_safety)
#endif
  for (int64_t i = begin; i < end; i++) {
    const P param = params[i];
    if constexpr (sizeof(A) < sizeof(P)) {
      const P d = load<P>(averages, i);
      params[i] = BACK ? param - d : param + d;
    } else if constexpr (sizeof(A) == sizeof(P)) {
      params[i] = averages[i];
      averages[i] = param;
    } else {  // what rounding left out is the average's lower half, read with its sign
      const uint32_t bits = averages[i];
      const bool nan = (bits & 0x7FFFFFFFU) > 0x7F800000U;
      const uint32_t rest = bits & 0xFFFFU, upper = uint32_t(param) << 16;
      params[i] = P(BACK ? bits >> 16 : nan ? 0x7FC0U : (bits + 0x8000U) >> 16);
      averages[i] = BACK ? upper + rest - ((rest & 0x8000U) << 1) : upper | rest;
    }
  }
}

using Swap = void (*)(const Pair&, int64_t, int64_t);

template <class P, class A> Swap choose_swap(bool back) {
  return back ? swap_pair<P, A, true> : swap_pair<P, A, false>;
}

// OpenMP's GOMP_parallel, as its runtimes on Linux have it: run this, with that, on so many.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// Has run(k, begin, end) for each piece of each of `count` tensors, and adds up what it returns.
//
// With torch's own threads where there is OpenMP: they spin for a while after torch's last
// operation, and would hold up threads of ours.
template <class Size, class Run>
int64_t for_pieces(int64_t count, int threads, Parallel parallel, Size size, Run run) {
  int64_t total = 0;
  for (int64_t k = 0; k < count; k++) total += size(k);
  // Long pieces stream best; some eight for each thread balance; short ones do not pay a thread.
  int64_t length = total / (8 * threads);
  length = length < (1 << 15) ? 1 << 15 : length > (1 << 20) ? 1 << 20 : length;
  length &= ~int64_t(63);  // whole vectors: their ends may round otherwise, and ends would move
  std::vector<int64_t> first(count + 1, 0);
  for (int64_t k = 0; k < count; k++) first[k + 1] = first[k] + (size(k) + length - 1) / length;
  if (int64_t(threads) > 1 + total / length) threads = int(1 + total / length);

  // Takes pieces in turn, so that a thread that the machine slows down holds up nobody.
  std::atomic<int64_t> next(0), sum(0);
  auto work = [&] {
    int64_t k = 0;
    for (int64_t at; (at = next.fetch_add(1)) < first[count];) {
      while (at >= first[k + 1]) k++;
      const int64_t begin = (at - first[k]) * length;
      const int64_t end = begin + length < size(k) ? begin + length : size(k);
      sum += run(k, begin, end);
    }
  };
  if (threads > 1 && parallel) {
    parallel([](void* data) { (*static_cast<decltype(work)*>(data))(); }, &work, threads, 0);
    return sum;
  }
  std::vector<std::thread> helpers;
  try {
    while (int(helpers.size()) < threads - 1) helpers.emplace_back(work);
  } catch (const std::system_error&) {  // no more threads to be had: use those there are
  }
  work();
  for (auto& helper : helpers) helper.join();
  return sum;
}

// The rows of a table, each with the addresses of as many extra averages.
template <class R> struct Table {
  const char* first;
  int64_t stride;
  Table(const void* table, int extra)
      : first(static_cast<const char*>(table)), stride(int64_t(sizeof(R)) + 8 * extra) {}
  const R& operator[](int64_t k) const {
    return *reinterpret_cast<const R*>(first + k * stride);
  }
};

}  // namespace

// Returns how many coordinates were skipped. Each row's count of steps moves with its tensor, so that
// no interrupt comes between the two.
extern "C" int64_t paceline_step(const void* table, int64_t count, const Step* step, int extra,
                                 int dtypes, int average, int stochastic, int threads,
                                 Parallel parallel) {
  const Table<Row> rows(table, extra);
  Piece run = nullptr;
  const Average kind = Average(average);
  if (dtypes == 0) run = choose<float, float>(kind, stochastic);
  if (dtypes == 1) run = choose<float, bfloat16>(kind, stochastic);
  if (dtypes == 2) run = choose<bfloat16, float>(kind, stochastic);
  if (dtypes == 3) run = choose<bfloat16, bfloat16>(kind, stochastic);
  if (dtypes == 4) run = choose<double, double>(kind, stochastic);
  for (int64_t k = 0; k < count; k++) *reinterpret_cast<double*>(rows[k].count) += 1;
  return for_pieces(
      count, threads, parallel, [=](int64_t k) { return rows[k].size; },
      [=](int64_t k, int64_t begin, int64_t end) { return run(rows[k], begin, end, *step, extra); });
}

// As `paceline_step`, of tensors that another optimizer has moved; dtypes are of parameters and
// second moments.
extern "C" void paceline_follow(const void* table, int64_t count, const Pull* pull, int extra,
                                int dtypes, int average, int threads, Parallel parallel) {
  const Table<Moved> rows(table, extra);
  Follow run = nullptr;
  const Average kind = Average(average);
  if (dtypes == 0) run = choose_follow<float, float>(kind);
  if (dtypes == 1) run = choose_follow<float, bfloat16>(kind);
  if (dtypes == 2) run = choose_follow<bfloat16, float>(kind);
  if (dtypes == 3) run = choose_follow<bfloat16, bfloat16>(kind);
  if (dtypes == 4) run = choose_follow<double, double>(kind);
  for_pieces(
      count, threads, parallel, [=](int64_t k) { return rows[k].size; },
      [=](int64_t k, int64_t begin, int64_t end) {
        run(rows[k], begin, end, *pull, extra);
        return int64_t(0);
      });
}

// As `paceline_step`, of parameters that trade places with averages, or back. At the end `done`
// changes between 0 and 1, so that no interrupt comes between the two.
extern "C" void paceline_swap(const void* table, int64_t count, int64_t* done, int dtypes,
                                  int back, int threads, Parallel parallel) {
  const Table<Pair> rows(table, 0);
  Swap run = nullptr;
  if (dtypes == 0) run = choose_swap<uint32_t, uint32_t>(back);
  if (dtypes == 1) run = choose_swap<float, bfloat16>(back);
  if (dtypes == 2) run = choose_swap<uint16_t, uint32_t>(back);
  if (dtypes == 3) run = choose_swap<uint16_t, uint16_t>(back);
  if (dtypes == 4) run = choose_swap<uint64_t, uint64_t>(back);
  for_pieces(
      count, threads, parallel, [=](int64_t k) { return rows[k].size; },
      [=](int64_t k, int64_t begin, int64_t end) {
        run(rows[k], begin, end);
        return int64_t(0);
      });
  *done ^= 1;
}
