// Parts of a decoding step on a CPU: what torch computes in many small operations, or by way of whole arrays that nobody
// needs. Called from Python with addresses and sizes (decoding.py). Sums over the vocabulary are in float64.

#include "common.h"

namespace {

#if HAS_BF16
constexpr Index BLOCK = 64, TILE = 6;  // columns and rows of a tile: 24 sums in registers

enum Result { FLOAT = 0, ROUNDED = 1, ADDED = 2 };  // as it is; rounded to bfloat16; rounded and added to what is there

template <int M>
void tile(const Half* x, Index ldx, const Half* w, Index pairs, const float* bias, float* out, Index ldo, Index columns,
          int result) {
    __m512 sum[M][4];
    for (int i = 0; i < M; i++)
        for (int j = 0; j < 4; j++) sum[i][j] = _mm512_setzero_ps();
    for (Index k = 0; k < pairs; k++, w += 2 * BLOCK) {
        __m512bh b[4];
        for (int j = 0; j < 4; j++) b[j] = (__m512bh)_mm512_loadu_si512(w + 32 * j);
        for (int i = 0; i < M; i++) {
            int32_t two;
            std::memcpy(&two, x + i * ldx + 2 * k, 4);
            __m512bh a = (__m512bh)_mm512_set1_epi32(two);
            for (int j = 0; j < 4; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], a, b[j]);
        }
    }
    for (int i = 0; i < M; i++)
        for (int j = 0; j < 4; j++) {
            Index left = columns - 16 * j;
            if (left <= 0) break;
            __mmask16 mask = left >= 16 ? 0xffff : __mmask16((1 << left) - 1);
            float* to = out + i * ldo + 16 * j;
            __m512 y = sum[i][j];
            if (bias) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, bias + 16 * j));
            if (result != FLOAT) {
                __m512i wide = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(y));
                y = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
            }
            if (result == ADDED) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, to));
            _mm512_mask_storeu_ps(to, mask, y);
        }
}

using Tile = void (*)(const Half*, Index, const Half*, Index, const float*, float*, Index, Index, int);
const Tile TILES[] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};
#endif

}  // namespace

extern "C" {

int has_bf16() { return HAS_BF16; }

void set_threads(int n) { threads = n; }

#if HAS_BF16
// A weight (n, k) of float32 or bfloat16 into blocks of 64 columns of the product, two of k together; `first`: where
// its rows begin among those of the layers of one input.
void pack(const void* weight, int is_half, Half* to, Index first, Index n, Index k) {
    const Index pairs = (k + 1) / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (Index part = 0; part < (n + 15) / 16; part++)
        for (Index p = 0; p < pairs; p++)
            for (Index row = part * 16; row < std::min(n, part * 16 + 16); row++) {
                const Index column = first + row;
                Half* out = to + ((column / BLOCK * pairs + p) * BLOCK + column % BLOCK) * 2;
                for (Index h = 0; h < 2; h++) {
                    const Index at = row * k + 2 * p + h;
                    out[h] = 2 * p + h >= k ? 0 : is_half ? static_cast<const Half*>(weight)[at]
                                                          : to_half(static_cast<const float*>(weight)[at]);
                }
            }
}

// x (rows, k) times a packed weight of n columns, and a bias or null.
void product(const Half* x, Index ldx, const Half* w, const float* bias, float* out, Index rows, Index n, Index k,
             int result) {
    const Index pairs = (k + 1) / 2, blocks = (n + BLOCK - 1) / BLOCK, tiles = (rows + TILE - 1) / TILE;
    // Few columns and many threads: the rows are divided too.
    const Index parts = std::min<Index>(tiles, std::max<Index>(1, (2 * threads + blocks - 1) / blocks));
    const bool worth = threads > 1 && rows * n * k > 8 * WORTH;
#pragma omp parallel for num_threads(threads) schedule(static) if (worth)
    for (Index unit = 0; unit < blocks * parts; unit++) {
        const Index b = unit / parts, part = unit % parts;
        for (Index t = part * tiles / parts; t < (part + 1) * tiles / parts; t++) {
            const Index first = t * rows / tiles, end = (t + 1) * rows / tiles;
            TILES[end - first](x + first * ldx, ldx, w + b * pairs * BLOCK * 2, pairs, bias ? bias + b * BLOCK : nullptr,
                               out + first * n + b * BLOCK, n, n - b * BLOCK, result);
        }
    }
}
#endif

// RMSNorm of each row.
void norm(const float* x, const float* weight, float eps, void* out, int half, Index stride, Index rows, Index n) {
#pragma omp parallel num_threads(threads) if (rows * n > WORTH)
    {
        std::vector<float> y(n);
#pragma omp for schedule(static)
        for (Index r = 0; r < rows; r++) {
            normalise(x + r * n, weight, eps, y.data(), n);
            put(out, half, r, stride, 0, y.data(), n);
        }
    }
}

// silu(gate) * up of rows (gate, up). rounded: the first is rounded to bfloat16, as autocast does.
void gated(const float* both, int rounded, void* out, int half, Index stride, Index rows, Index n) {
#pragma omp parallel num_threads(threads) if (rows * n > WORTH / 4)
    {
        std::vector<float> y(n);
#pragma omp for schedule(static)
        for (Index r = 0; r < rows; r++) {
            const float* gate = both + r * 2 * n;
            gate_row(gate, gate + n, rounded, y.data(), n);
            put(out, half, r, stride, 0, y.data(), n);
        }
    }
}

struct Heads {
    Index rows, heads, kv_heads, d;
    Index width, capacity;  // tokens allocated for a prompt and for a completion, multiples of 16
};

// Attention of one new token a row. qkv (rows, heads + 2 kv_heads, d); cos and sin (rows, d). The new key and value are
// written behind those of the row's slot. Of each slot or place and key head: keys (tokens / 16, d, 16), values
// (tokens, d). where (4, rows): slot, place, tokens of the prompt, tokens of the completion before this one.
void attend(const float* qkv, const float* cos, const float* sin, const float* query_norm, const float* key_norm,
            float eps, float scale, const float* prompt_keys, const float* prompt_values, float* own_keys,
            float* own_values, const Index* where, const Heads* shape, void* out, int half, Index stride) {
    constexpr Index TOGETHER = 8;  // neighbouring rows of one prompt, which read its keys together
    const Index rows = shape->rows, kv_heads = shape->kv_heads, d = shape->d, group = shape->heads / kv_heads;
    const Index *slot = where, *place = where + rows, *before = where + 2 * rows, *depth = where + 3 * rows;
    const Index prompt_size = shape->width * d, own_size = shape->capacity * d, all = shape->heads + 2 * kv_heads;
    const Index span = shape->width + shape->capacity + LANES;
    std::vector<Index> begins;
    for (Index r = 0; r < rows; r++)
        if (r == 0 || place[r] != place[r - 1] || r - begins.back() == TOGETHER) begins.push_back(r);
    const Index runs = begins.size();
    begins.push_back(rows);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scores(TOGETHER * group * span), queries(TOGETHER * group * d), reads(TOGETHER * group * d);
        std::vector<float> turned(d), normed(d);
#pragma omp for schedule(dynamic)
        for (Index unit = 0; unit < kv_heads * runs; unit++) {
            const Index kv = unit / runs, first = begins[unit % runs], end = begins[unit % runs + 1];
            const Index num = (end - first) * group, prompt = place[first] * kv_heads + kv, length = before[first];
            for (Index r = first; r < end; r++) {
                const float *row = qkv + r * all * d, *key = row + (shape->heads + kv) * d;
                const Index own = (slot[r] * kv_heads + kv) * own_size;
                if (key_norm) normalise(key, key_norm, eps, normed.data(), d), key = normed.data();
                rotate(key, cos + r * d, sin + r * d, 1.0f, turned.data(), d);
                float* to = own_keys + own + depth[r] / LANES * LANES * d + depth[r] % LANES;
                for (Index i = 0; i < d; i++) to[i * LANES] = turned[i];
                std::memcpy(own_values + own + depth[r] * d, row + (shape->heads + kv_heads + kv) * d, d * sizeof(float));
                for (Index h = 0; h < group; h++) {
                    const float* query = row + (kv * group + h) * d;
                    if (query_norm) normalise(query, query_norm, eps, normed.data(), d), query = normed.data();
                    rotate(query, cos + r * d, sin + r * d, scale, &queries[((r - first) * group + h) * d], d);
                }
            }
            for (Index q = 0; q < num; q += MOST)
                SCORE[std::min(MOST, num - q)](&queries[q * d], d, prompt_keys + prompt * prompt_size, length,
                                               &scores[q * span], span);
            std::fill_n(reads.begin(), num * d, 0.0f);
            for (Index q = 0; q < num; q++) {
                const Index r = first + q / group, after = depth[r] + 1, count = length + after;
                float *x = &scores[q * span], most = -INFINITY, sum = 0;
                SCORE[1](&queries[q * d], d, own_keys + (slot[r] * kv_heads + kv) * own_size, after, x + length, span);
#pragma omp simd reduction(max : most)
                for (Index t = 0; t < count; t++) most = std::max(most, x[t]);
#pragma omp simd reduction(+ : sum)
                for (Index t = 0; t < count; t++) sum += x[t] = exponential(x[t] - most);
                for (Index t = 0; t < count; t++) x[t] /= sum;
                const float* values = own_values + (slot[r] * kv_heads + kv) * own_size;
                ADD_VALUES[1](x + length, span, values, after, d, &reads[q * d]);
            }
            for (Index q = 0; q < num; q += MOST)
                ADD_VALUES[std::min(MOST, num - q)](&scores[q * span], span, prompt_values + prompt * prompt_size, length,
                                                    d, &reads[q * d]);
            for (Index q = 0; q < num; q++) {
                const Index column = (kv * group + q % group) * d;
                put(out, half, first + q / group, stride, column, &reads[q * d], d);
            }
        }
    }
}

// A token of each row of logits (rows, n) / temperature, and its log-probability. uniforms: in [0, 1), of the inverse of
// the distribution function; null = the most probable token. The function is summed in blocks, then within one block.
void draw(const float* logits, float temperature, const double* uniforms, Index* token, float* logp, Index rows,
          Index n) {
    constexpr Index SPAN = 256;
#pragma omp parallel num_threads(threads) if (rows * n > WORTH / 4)
    {
        std::vector<float> mass(n);
        std::vector<double> until(n / SPAN + 1);
#pragma omp for schedule(static)
        for (Index r = 0; r < rows; r++) {
            const float* x = logits + r * n;
            float most = -INFINITY;
#pragma omp simd reduction(max : most)
            for (Index i = 0; i < n; i++) most = std::max(most, x[i]);
            most /= temperature;
            double total = 0;
            for (Index begin = 0; begin < n; begin += SPAN) {
                const Index end = std::min(n, begin + SPAN);
                double sum = 0;
#pragma omp simd reduction(+ : sum)
                for (Index i = begin; i < end; i++) sum += mass[i] = exponential(x[i] / temperature - most);
                until[begin / SPAN] = total += sum;
            }
            Index at = 0;
            if (uniforms) {
                // Rounding must not lead behind the last token with any mass, in all or in the block.
                const double target = std::min(uniforms[r] * total, std::nextafter(total, 0.0));
                const Index blocks = (n + SPAN - 1) / SPAN;
                const Index block = std::upper_bound(until.begin(), until.begin() + blocks, target) - until.begin();
                double sum = block ? until[block - 1] : 0;
                Index last = n - 1;  // of logits that are no numbers
                for (at = block * SPAN; at < std::min(n, (block + 1) * SPAN); at++) {
                    if (mass[at] > 0) last = at;
                    if ((sum += mass[at]) > target) break;
                }
                at = last;
            } else {
                while (at < n - 1 && !(x[at] / temperature >= most)) at++;
            }
            token[r] = at;
            logp[r] = x[at] / temperature - most - float(std::log(total));
        }
    }
}

}  // extern "C"
