// sample_timesteps on the CPU: timesteps, coefficients and weights of a batch in one call.
#include "sample_timesteps.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <string_view>
#include <tuple>
#include <vector>

#include "contract.h"
#include "direct.h"
#include "vectorized.h"

namespace fastsds {
namespace {

std::vector<uint32_t> words_of(uint64_t seed, int64_t count, Stream stream) {
  const int64_t blocks = (count + 3) / 4;
  std::vector<uint32_t> words(4 * blocks);
  random_words(seed, 0, blocks, stream, words.data());
  return words;
}

// The rank of each of `count` words, equal ones in their order. The words are uniform, so that a bucket for each
// leaves about one in a bucket, and little to sort there.
class Ranking {
 public:
  explicit Ranking(int64_t count) : ends_(count + 1), order_(count) {}

  void rank(const uint32_t* words, int64_t count, int64_t* ranks) {
    std::fill(ends_.begin(), ends_.end(), 0);
    for (int64_t i = 0; i < count; ++i) ++ends_[position_of(words[i], count) + 1];
    for (int64_t bucket = 0; bucket < count; ++bucket) ends_[bucket + 1] += ends_[bucket];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t bucket = position_of(words[i], count);
      order_[ends_[bucket]++] = i;
    }
    for (int64_t place = 1; place < count; ++place) {
      const int64_t index = order_[place];
      int64_t to = place;
      for (; to > 0 && words[order_[to - 1]] > words[index]; --to) order_[to] = order_[to - 1];
      order_[to] = index;
    }
    for (int64_t place = 0; place < count; ++place) ranks[order_[place]] = place;
  }

 private:
  std::vector<int64_t> ends_, order_;
};

// The stratum of every draw, `[batch * draws]`: draw d of image b falls in part (d + rotation_b) % draws of the range,
// and there in the place that the image has when the batch is sorted by random words.
std::vector<int64_t> strata_of(uint64_t seed, int64_t batch, int64_t draws) {
  const auto order = words_of(seed, batch * draws, kOrderStream), turns = words_of(seed, batch, kRotationStream);
  std::vector<int64_t> places(batch), strata(batch * draws);
  Ranking ranking(batch);
  for (int64_t part = 0; part < draws; ++part) {
    ranking.rank(order.data() + part * batch, batch, places.data());
    for (int64_t image = 0; image < batch; ++image) {
      const int64_t draw = part - position_of(turns[image], draws);
      strata[image * draws + (draw < 0 ? draw + draws : draw)] = part * batch + places[image];
    }
  }
  return strata;
}

// Several searches at a time, because each step of one waits for the last.
template <typename T>
void draw_by_mass(const std::vector<int64_t>& strata, const std::vector<uint32_t>& jitter, const at::Tensor& table,
                  const Range& range, int64_t* t, double* correction) {
  constexpr int64_t kSearches = 8;
  const at::Tensor dense = table.contiguous();
  const T* cdf = dense.const_data_ptr<T>();
  const Mass mass = mass_of(cdf, range.first, range.first + range.span);
  const int64_t count = static_cast<int64_t>(strata.size());
  for (int64_t first = 0; first < count; first += kSearches) {
    const int64_t searches = std::min(kSearches, count - first);
    double wanted[kSearches] = {};
    int64_t found[kSearches] = {};
    for (int64_t i = 0; i < searches; ++i) wanted[i] = quantile(strata[first + i], jitter[first + i], count, mass);
    for (int64_t length = dense.numel(); length > 0; length /= 2) {
      for (int64_t i = 0; i < kSearches; ++i) found[i] = moved(found[i], (length + 1) / 2, cdf, wanted[i]);
    }
    for (int64_t i = 0; i < searches; ++i) {
      const Drawn drawn = drawn_at(found[i], cdf, mass, range);
      t[first + i] = drawn.t;
      correction[first + i] = drawn.correction;
    }
  }
}

at::Tensor gather(const at::Tensor& table, const at::Tensor& t, const double* correction) {
  const at::Tensor dense = table.contiguous(), out = at::empty(t.sizes(), table.options());
  const int64_t* index = t.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES(table.scalar_type(), "sample_timesteps", [&] {
    const scalar_t* values = dense.const_data_ptr<scalar_t>();
    scalar_t* gathered = out.mutable_data_ptr<scalar_t>();
    for (int64_t i = 0; i < t.numel(); ++i) {
      const scalar_t value = values[index[i]];
      gathered[i] = correction == nullptr ? value : static_cast<scalar_t>(value * correction[i]);
    }
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> sample_timesteps(
    const at::Tensor& alpha, const at::Tensor& sigma, const at::Tensor& weights, int64_t batch, int64_t draws,
    const at::Tensor& seed_tensor, std::string_view strategy, int64_t t_min, int64_t t_max,
    const std::optional<at::Tensor>& cdf) {
  const uint64_t seed = *seed_tensor.const_data_ptr<int64_t>();
  const Range range{t_min, t_max - t_min};
  const int64_t count = batch * draws;
  const at::Tensor timesteps = at::empty({batch, draws}, alpha.options().dtype(at::kLong));
  int64_t* t = timesteps.mutable_data_ptr<int64_t>();
  const auto jitter = words_of(seed, count, kJitterStream);
  std::vector<double> correction;
  if (strategy == "uniform") {
    for (int64_t i = 0; i < count; ++i) t[i] = range.first + position_of(jitter[i], range.span);
  } else if (strategy == "antithetic") {
    for (int64_t i = 0; i < count; ++i) t[i] = mirrored(i, jitter[i / 2], range);
  } else if (strategy == "stratified") {
    const auto strata = strata_of(seed, batch, draws);
    for (int64_t i = 0; i < count; ++i) t[i] = within_stratum(strata[i], jitter[i], count, range);
  } else {
    correction.resize(count);
    const auto draw = cdf->scalar_type() == at::kDouble ? draw_by_mass<double> : draw_by_mass<float>;
    draw(strata_of(seed, batch, draws), jitter, *cdf, range, t, correction.data());
  }
  return {timesteps, gather(alpha, timesteps, nullptr), gather(sigma, timesteps, nullptr),
          gather(weights, timesteps, correction.empty() ? nullptr : correction.data())};
}

// The contract that fastsds/ops/sample_timesteps.py explains.
bool is_valid(const at::Tensor& alpha, const at::Tensor& sigma, const at::Tensor& weights, int64_t batch, int64_t draws,
              const at::Tensor& seed, std::string_view strategy, int64_t t_min, int64_t t_max,
              const std::optional<at::Tensor>& cdf) {
  const auto is_table = [&](const at::Tensor& table) {
    return table.is_cpu() && is_coefficient_dtype(table.scalar_type()) && table.sizes() == alpha.sizes();
  };
  const bool by_mass = strategy == "importance";
  return alpha.dim() == 1 && is_table(alpha) && is_table(sigma) && is_table(weights) && by_mass == cdf.has_value() &&
         (by_mass ? is_table(*cdf) : strategy == "uniform" || strategy == "stratified" || strategy == "antithetic") &&
         is_seed(seed) && batch >= 0 && draws >= 1 && 0 <= t_min && t_min < t_max && t_max <= alpha.size(0);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastsds_native, library) {
  library.def(
      "sample_timesteps(Tensor alpha, Tensor sigma, Tensor weights, int batch, int draws, Tensor seed, str strategy, "
      "int t_min, int t_max, Tensor? cdf=None) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(fastsds_native, CPU, library) { library.impl("sample_timesteps", sample_timesteps); }

TORCH_LIBRARY_IMPL(fastsds, CPU, library) { library.impl("sample_timesteps", direct<is_valid, sample_timesteps>()); }

}  // namespace fastsds
