// What the files of kernels share. All arithmetic is in float32; rows are independent of each other and of the number of
// threads.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAS_BF16 1
#else
#define HAS_BF16 0
#endif

using Index = int64_t;
using Half = uint16_t;  // bfloat16

inline int threads = 1;
constexpr Index WORTH = 1 << 15;  // numbers below which a second thread costs more than it brings

inline Half to_half(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return Half(x != x ? 0x7fc0 : rounded);  // no branch, so that loops of it become vector instructions
}

inline float to_float(Half x) {
    uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

// to_float(to_half(x)), in 32-bit numbers alone, so that loops of it become vector instructions.
inline float as_half(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    float y;
    std::memcpy(&y, &bits, 4);
    return x != x ? x : y;
}

inline void round_row(float* x, Index n) {
#pragma omp simd
    for (Index i = 0; i < n; i++) x[i] = as_half(x[i]);
}

// Cody and Waite's reduction and a polynomial of degree 6: 1e-7 relative; 0 below -87, NaN of NaN.
inline float exponential(float x) {
    float n = std::nearbyint(x * 1.44269504f);
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = (int32_t(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return x < -87.0f ? 0.0f : p * power;
}

// Numbers into a row that the next product takes, from a column on: as float32, or as bfloat16, of which a last column
// that makes their number even is 0.
inline void put(void* to, bool half, Index row, Index stride, Index column, const float* from, Index n) {
    if (half) {
        Half* out = static_cast<Half*>(to) + row * stride + column;
        for (Index i = 0; i < n; i++) out[i] = to_half(from[i]);
        if (column + n == stride - 1) out[n] = 0;
    } else {
        std::memcpy(static_cast<float*>(to) + row * stride + column, from, n * sizeof(float));
    }
}

inline float dot(const float* x, const float* y, Index n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (Index i = 0; i < n; i++) sum += x[i] * y[i];
    return sum;
}

// The functions below that are not inlined are the same instructions in decoding and in an update, so that both give the
// same numbers.
#define SHARED [[gnu::noinline]] inline

// RMSNorm; returns 1 / the root mean square.
SHARED float normalise(const float* x, const float* weight, float eps, float* out, Index n) {
    const float inverse = 1.0f / std::sqrt(dot(x, x, n) / n + eps);
#pragma omp simd
    for (Index i = 0; i < n; i++) out[i] = x[i] * inverse * weight[i];
    return inverse;
}

// silu(gate) * up. rounded: the first is rounded to bfloat16, as autocast does.
SHARED void gate_row(const float* gate, const float* up, bool rounded, float* out, Index n) {
#pragma omp simd
    for (Index i = 0; i < n; i++) {
        // exp(88) and more would overflow, and the quotient is 0 there anyway.
        float g = gate[i], s = g / (1.0f + exponential(std::min(-g, 88.0f)));
        out[i] = (rounded ? as_half(s) : s) * up[i];
    }
}

// Scores become exponentials of their distance to the largest.
struct Sums {
    float inverse, log;  // 1 / their sum; log of the sum of exp of the scores
};

SHARED Sums exponentials(float* x, Index count) {
    float most = -INFINITY, sum = 0;
#pragma omp simd reduction(max : most)
    for (Index i = 0; i < count; i++) most = std::max(most, x[i]);
#pragma omp simd reduction(+ : sum)
    for (Index i = 0; i < count; i++) sum += x[i] = exponential(x[i] - most);
    return {1.0f / sum, most + std::log(sum)};
}

// exp of logits / temperature - most, and their sum.
SHARED float masses(const float* x, float temperature, float most, float* out, Index n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (Index i = 0; i < n; i++) sum += out[i] = exponential(x[i] / temperature - most);
    return sum;
}

// A row from a column on as float32: where it is, or in `space`.
inline const float* wide(const void* from, bool half, Index at, Index n, float* space) {
    if (!half) return static_cast<const float*>(from) + at;
    const Half* x = static_cast<const Half*>(from) + at;
    for (Index i = 0; i < n; i++) space[i] = to_float(x[i]);
    return space;
}

// x cos + (x, halves exchanged) times low and high, the sines of the two halves with their signs.
SHARED void rotate(const float* x, const float* cos, const float* low, const float* high, float* out, Index d) {
    const Index half = d / 2;
#pragma omp simd
    for (Index i = 0; i < half; i++) {
        out[i] = x[i] * cos[i] + x[i + half] * low[i];
        out[i + half] = x[i + half] * cos[i + half] + x[i] * high[i];
    }
}

// Keys lie in blocks of 16 tokens, (block, d, 16), so that the products with 16 of them need no sum across a register.
constexpr Index LANES = 16, MOST = 4;  // of a register; queries that read a block together
typedef float Lane __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline const Lane& lane(const float* x) { return *reinterpret_cast<const Lane*>(x); }

// Products of Q queries (Q, d) with `count` keys into out (Q, span); up to 15 numbers behind them are written too.
template <int Q>
void score(const float* query, Index d, const float* keys, Index count, float* out, Index span) {
    for (Index t = 0; t < count; t += LANES, keys += d * LANES) {
        Lane sum[Q][4] = {};
        for (Index i = 0; i < d; i += 4)
            for (int j = 0; j < 4; j++)
                for (int q = 0; q < Q; q++) sum[q][j] += query[q * d + i + j] * lane(keys + (i + j) * LANES);
        for (int q = 0; q < Q; q++)
            *reinterpret_cast<Lane*>(out + q * span + t) = (sum[q][0] + sum[q][1]) + (sum[q][2] + sum[q][3]);
    }
}

// Of J registers of channels from c on: adds to out (Q, d) the sum of `count` values (count, d) by weights (Q, span).
template <int Q, int J>
void add_values_of(const float* weights, Index span, const float* values, Index count, Index d, float* out, Index c) {
    Lane sum[Q][J];
    for (int q = 0; q < Q; q++)
        for (int j = 0; j < J; j++) sum[q][j] = lane(out + q * d + c + j * LANES);
    for (Index t = 0; t < count; t++)
        for (int j = 0; j < J; j++)
            for (int q = 0; q < Q; q++) sum[q][j] += weights[q * span + t] * lane(values + t * d + c + j * LANES);
    for (int q = 0; q < Q; q++)
        for (int j = 0; j < J; j++) *reinterpret_cast<Lane*>(out + q * d + c + j * LANES) = sum[q][j];
}

template <int Q>
void add_values(const float* weights, Index span, const float* values, Index count, Index d, float* out) {
    Index c = 0;
    for (; c + 4 * LANES <= d; c += 4 * LANES) add_values_of<Q, 4>(weights, span, values, count, d, out, c);
    for (; c + 2 * LANES <= d; c += 2 * LANES) add_values_of<Q, 2>(weights, span, values, count, d, out, c);
    for (; c + LANES <= d; c += LANES) add_values_of<Q, 1>(weights, span, values, count, d, out, c);
    if (c == d) return;
    for (int q = 0; q < Q; q++)
        for (Index t = 0; t < count; t++)
            for (Index i = c; i < d; i++) out[q * d + i] += weights[q * span + t] * values[t * d + i];
}

using Score = void (*)(const float*, Index, const float*, Index, float*, Index);
using AddValues = void (*)(const float*, Index, const float*, Index, Index, float*);
const Score SCORE[] = {nullptr, score<1>, score<2>, score<3>, score<4>};
const AddValues ADD_VALUES[] = {nullptr, add_values<1>, add_values<2>, add_values<3>, add_values<4>};
