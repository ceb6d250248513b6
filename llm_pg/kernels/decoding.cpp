// Parts of a decoding step on a CPU: what torch computes in many small operations, or by way of whole arrays that nobody
// needs. Called from Python with addresses and sizes (decoding.py). Sums over the vocabulary are in float64.

#include "common.h"

extern "C" {

void set_threads(int n) { threads = n; }

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

// Attention of one new token a row. qkv (rows, heads + 2 kv_heads, d); cos and sin (rows, d), sin with the sign of each
// half. rounded: queries and keys are rounded to bfloat16 where an update rounds them, after norm and rotation. The new
// key and value are written behind those of the row's slot. Of each slot or place and key head: keys (tokens / 16, d, 16),
// values (tokens, d). where (4, rows): slot, place, tokens of the prompt, tokens of the completion before this one.
void attend(const float* qkv, const float* cos, const float* sin, const float* query_norm, const float* key_norm,
            float eps, float scale, int rounded, const float* prompt_keys, const float* prompt_values, float* own_keys,
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
        std::vector<float> turned(d), normed(d), inverse(TOGETHER * group);
        const auto turn = [&](const float* x, const float* weight, Index r, float by, float* out) {
            if (weight) {
                normalise(x, weight, eps, normed.data(), d);
                if (rounded) round_row(normed.data(), d);
                x = normed.data();
            }
            rotate(x, cos + r * d, sin + r * d, sin + r * d + d / 2, out, d);
            if (rounded) round_row(out, d);
            for (Index i = 0; i < d; i++) out[i] *= by;
        };
#pragma omp for schedule(dynamic)
        for (Index unit = 0; unit < kv_heads * runs; unit++) {
            const Index kv = unit / runs, first = begins[unit % runs], end = begins[unit % runs + 1];
            const Index num = (end - first) * group, prompt = place[first] * kv_heads + kv, length = before[first];
            for (Index r = first; r < end; r++) {
                const float *row = qkv + r * all * d, *key = row + (shape->heads + kv) * d;
                const Index own = (slot[r] * kv_heads + kv) * own_size;
                turn(key, key_norm, r, 1.0f, turned.data());
                float* to = own_keys + own + depth[r] / LANES * LANES * d + depth[r] % LANES;
                for (Index i = 0; i < d; i++) to[i * LANES] = turned[i];
                std::memcpy(own_values + own + depth[r] * d, row + (shape->heads + kv_heads + kv) * d, d * sizeof(float));
                for (Index h = 0; h < group; h++) {
                    const Index column = (kv * group + h) * d;
                    turn(row + column, query_norm, r, scale, &queries[((r - first) * group + h) * d]);
                }
            }
            for (Index q = 0; q < num; q += MOST)
                SCORE[std::min(MOST, num - q)](&queries[q * d], d, prompt_keys + prompt * prompt_size, length,
                                               &scores[q * span], span);
            for (Index q = 0; q < num; q++) {
                const Index r = first + q / group, after = depth[r] + 1;
                float* x = &scores[q * span];
                SCORE[1](&queries[q * d], d, own_keys + (slot[r] * kv_heads + kv) * own_size, after, x + length, span);
                inverse[q] = exponentials(x, length + after).inverse;
            }
            std::fill_n(reads.begin(), num * d, 0.0f);
            for (Index q = 0; q < num; q += MOST)
                ADD_VALUES[std::min(MOST, num - q)](&scores[q * span], span, prompt_values + prompt * prompt_size, length,
                                                    d, &reads[q * d]);
            for (Index q = 0; q < num; q++) {
                const Index r = first + q / group, column = (kv * group + q % group) * d;
                const float* values = own_values + (slot[r] * kv_heads + kv) * own_size;
                ADD_VALUES[1](&scores[q * span + length], span, values, depth[r] + 1, d, &reads[q * d]);
                for (Index i = 0; i < d; i++) reads[q * d + i] *= inverse[q];
                put(out, half, r, stride, column, &reads[q * d], d);
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
                const Index size = std::min(n - begin, SPAN);
                until[begin / SPAN] = total += masses(x + begin, temperature, most, &mass[begin], size);
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
