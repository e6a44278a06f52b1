// What changes least, on a CPU: kvpolicy.ops.change.
//
// torch's own operators do the same where these are called; there, a few thousand numbers go by a dozen
// times, and calling costs more than counting. Built by kvpolicy/ops/cpu/native.py.

#include "by_slot.h"

#include <torch/library.h>

#include <cmath>

namespace {

// What coming lines read from one head's values: see kvpolicy.ops.change, whose formulas these
// are. Only the rows of the matrix of changes are made that belong to a token which goes.
struct Foreseen {
  int64_t lines, slots, dim, across, wide;
  std::vector<float> room;
  float *values, *copied, *mass, *along, *cost, *added, *read, *mean;
  std::vector<float> own;       // |read|^2
  std::vector<int32_t> places;  // positions, none behind the last slot

  Foreseen(int64_t lines, int64_t slots, int64_t dim)
      : lines(lines), slots(slots), dim(dim), across(padded(slots)), wide(padded(dim)),
        room((2 * wide + 2 * lines + 2) * across + (lines + 3) * wide), own(lines),
        places(across, kLast) {
    values = room.data();             // [dim, across], centred, the largest is 1
    copied = values + wide * across;  // [across, dim], the same
    mass = copied + wide * across;    // [lines, across]
    along = mass + lines * across;    // [lines, across]
    cost = along + lines * across;
    added = cost + across;
    read = added + across;      // [lines, dim]
    mean = read + lines * wide;  // and two rows for the least and the largest
  }

  template <typename T>
  void look(
      const T* tokens, const T* next, int64_t stride, const float* masses, int64_t mass_stride) {
    for (int64_t s = 0; s < slots; ++s) copy(tokens + s * stride, dim, copied + s * wide);
    std::fill(copied + slots * wide, copied + across * wide, 0.0f);
    float *least = mean + wide, *most = least + wide;
    std::fill(mean, mean + wide, 0.0f);
    std::memcpy(least, copied, wide * sizeof(float));
    std::memcpy(most, copied, wide * sizeof(float));
    for (int64_t s = 0; s < slots; ++s)
#pragma omp simd
      for (int64_t d = 0; d < wide; ++d) {
        const float value = copied[s * wide + d];
        mean[d] += value;
        least[d] = value < least[d] ? value : least[d];
        most[d] = value > most[d] ? value : most[d];
      }
    float largest = kTiny;
#pragma omp simd reduction(max : largest)
    for (int64_t d = 0; d < wide; ++d) {
      mean[d] /= static_cast<float>(slots);
      const float reach = std::max(most[d] - mean[d], mean[d] - least[d]);
      largest = reach > largest ? reach : largest;
    }
    const float unit = 1.0f / largest;
    for (int64_t s = 0; s < slots; ++s)
#pragma omp simd
      for (int64_t d = 0; d < wide; ++d) copied[s * wide + d] = (copied[s * wide + d] - mean[d]) * unit;
    turn(copied, slots, dim, values);
    for (int64_t w = 0; w < lines; ++w) {
      ask_ahead(next, stride, slots, dim, w, lines);
      float *row = mass + w * across, *reads = read + w * wide;
      std::memcpy(row, masses + w * mass_stride, slots * sizeof(float));
      std::fill(row + slots, row + across, 0.0f);
      float total = 0, square = 0;
#pragma omp simd reduction(+ : total)
      for (int64_t s = 0; s < across; ++s) total += row[s];
      product(row, 1, copied, slots, wide, reads);
      const float share = 1.0f / (total < kTiny ? kTiny : total);
#pragma omp simd reduction(+ : square)
      for (int64_t d = 0; d < wide; ++d) {
        reads[d] *= share;
        square = fused(reads[d], reads[d], square);
      }
      own[w] = square;
      product(reads, 1, values, dim, across, along + w * across);
    }
  }

  // The change if a token goes alone.
  void alone(float* out) const {
    float* square = added;
    std::fill(square, square + across, 0.0f);
    for (int64_t d = 0; d < dim; ++d)
#pragma omp simd
      for (int64_t s = 0; s < across; ++s)
        square[s] = fused(values[d * across + s], values[d * across + s], square[s]);
    std::fill(cost, cost + across, 0.0f);
    for (int64_t w = 0; w < lines; ++w) {
      const float *row = mass + w * across, *reads = along + w * across;
      const float constant = own[w];
#pragma omp simd
      for (int64_t s = 0; s < across; ++s) {
        float distance = square[s] + constant - 2 * reads[s];
        distance = distance < 0 ? 0.0f : distance;  // NaN stays NaN
        cost[s] += distance * row[s] * row[s];
      }
    }
    std::memcpy(out, cost, slots * sizeof(float));
  }

  // One token after the other, each the one that adds least.
  void together(const float* score, const int32_t* position, int64_t count, int64_t* out) {
    std::memcpy(cost, score, slots * sizeof(float));
    std::fill(cost + slots, cost + across, kInf);
    std::memcpy(places.data(), position, slots * sizeof(int32_t));
    for (int64_t w = 0; w < lines; ++w)
#pragma omp simd
      for (int64_t s = 0; s < across; ++s)
        along[w * across + s] = (along[w * across + s] - 0.5f * own[w]) * mass[w * across + s];
    for (int64_t round = 0; round < count; ++round) {
      const int64_t slot = lowest_of(cost, places.data(), across);
      out[round] = slot;
      if (round + 1 == count) break;
      product(values + slot, across, values, dim, across, added);
      for (int64_t j = 0; j < across; j += kLanes) {
        Lanes masses{}, cross{};
        for (int64_t w = 0; w < lines; ++w) {
          const Lanes row = lanes<Lanes>(mass + w * across + j);
          masses = fused(mass[w * across + slot], row, masses);
          cross = fused(along[w * across + slot], row, cross);
          cross = fused(mass[w * across + slot], lanes<Lanes>(along + w * across + j), cross);
        }
        lanes<Lanes>(cost + j) += 2 * (lanes<Lanes>(added + j) * masses - cross);
      }
      cost[slot] = kInf;
    }
  }
};

// What is foreseen for each head, one after the other; masses are [B, H, W, S].
template <typename Use>
void foresee(const Tensor& values, const Tensor& mass, const Use& use) {
  const int64_t all = mass.size(0) * mass.size(1);
  by_dtype(values, [&](auto zero) {
    const Rows<decltype(zero)> tokens(values);
    const Rows<float> masses(mass);
    each_head(mass, 1, [&](int64_t first, int64_t last) {
      Foreseen seen(mass.size(2), mass.size(3), values.size(3));
      for (int64_t at = first; at < last; ++at) {
        seen.look(tokens[at], tokens[std::min(at + 1, all - 1)], tokens.stride, masses[at], masses.stride);
        use(seen, at);
      }
    });
  });
}

// The change if each token goes alone, [B, H, S].
Tensor change_alone(const Tensor& values, const Tensor& mass) {
  const int64_t slots = mass.size(3);
  Tensor changes = at::empty({mass.size(0), mass.size(1), slots}, mass.options());
  float* out = changes.mutable_data_ptr<float>();
  foresee(values, mass, [&](Foreseen& seen, int64_t at) { seen.alone(out + at * slots); });
  return changes;
}

// The slots that together change least, int64 [B, H, count], given what each costs to begin with.
Tensor change_together(
    const Tensor& values, const Tensor& mass, const Tensor& score, const Tensor& positions, int64_t count) {
  Tensor chosen = at::empty({mass.size(0), mass.size(1), count}, mass.options().dtype(at::kLong));
  int64_t* out = chosen.mutable_data_ptr<int64_t>();
  const Rows<float> scores(score);
  const Rows<int32_t> position(positions);
  foresee(values, mass, [&](Foreseen& seen, int64_t at) {
    seen.together(scores[at], position[at], count, out + at * count);
  });
  return chosen;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(kvpolicy_cpu, library) {
  library.def("change_alone(Tensor values, Tensor mass) -> Tensor");
  library.def(
      "change_together(Tensor values, Tensor mass, Tensor score, Tensor positions, int count) -> Tensor");
}

TORCH_LIBRARY_IMPL(kvpolicy_cpu, CPU, library) {
  library.impl("change_alone", change_alone);
  library.impl("change_together", change_together);
}
