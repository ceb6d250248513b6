// What lies between the matrix products of an update, forward and backward, each as one pass over memory. Called from
// Python with addresses and sizes (update.py). `half` says of an address that it is of bfloat16, else of float32. What is
// summed over rows is summed in chunks of them, so that no sum hangs on the number of threads.

#include "common.h"

namespace {

constexpr Index CHUNK = 64;

}  // namespace

extern "C" {

// total = x + delta (delta may be null; then total is not written), rate = 1 / rms, out = total * rate * weight.
void add_norm(const float* x, const void* delta, int delta_half, const float* weight, float eps, float* total,
              float* rate, void* out, int half, Index rows, Index n) {
#pragma omp parallel num_threads(threads) if (rows * n > WORTH)
    {
        std::vector<float> space(n), y(n);
#pragma omp for schedule(static)
        for (Index r = 0; r < rows; r++) {
            const float* row = x + r * n;
            if (delta) {
                const float* more = wide(delta, delta_half, r * n, n, space.data());
                float* sum = total + r * n;
#pragma omp simd
                for (Index i = 0; i < n; i++) sum[i] = row[i] + more[i];
                row = sum;
            }
            rate[r] = normalise(row, weight, eps, y.data(), n);
            put(out, half, r, n, 0, y.data(), n);
        }
    }
}

// The gradient of add_norm: d_x, in bfloat16 too where d_delta is not null; d_weight is summed where it is not null.
void add_norm_slopes(const float* total, const float* rate, const float* weight, const void* d_out, int half,
                     const float* d_total, float* d_x, Half* d_delta, float* d_weight, Index rows, Index n) {
    const Index chunks = (rows + CHUNK - 1) / CHUNK;
    std::vector<float> parts(d_weight ? chunks * n : 0);
#pragma omp parallel num_threads(threads) if (rows * n > WORTH)
    {
        std::vector<float> space(n);
#pragma omp for schedule(static)
        for (Index chunk = 0; chunk < chunks; chunk++)
            for (Index r = chunk * CHUNK; r < std::min(rows, (chunk + 1) * CHUNK); r++) {
                const float *row = total + r * n, *slope = wide(d_out, half, r * n, n, space.data());
                const float inverse = rate[r], *direct = d_total + r * n;
                float *to = d_x + r * n, share = 0;
#pragma omp simd reduction(+ : share)
                for (Index i = 0; i < n; i++) share += row[i] * inverse * slope[i] * weight[i];
                share /= -n;
#pragma omp simd
                for (Index i = 0; i < n; i++)
                    to[i] = (slope[i] * weight[i] + row[i] * inverse * share) * inverse + direct[i];
                if (d_weight) {
                    float* part = &parts[chunk * n];
#pragma omp simd
                    for (Index i = 0; i < n; i++) part[i] += row[i] * inverse * slope[i];
                }
                if (d_delta) put(d_delta, true, r, n, 0, to, n);
            }
    }
    if (!d_weight) return;
    std::fill_n(d_weight, n, 0.0f);
    for (Index chunk = 0; chunk < chunks; chunk++)
        for (Index i = 0; i < n; i++) d_weight[i] += parts[chunk * n + i];
}

// silu(gate) * up of rows (gate, up), each n wide.
void gate(const void* both, int half, void* out, Index rows, Index n) {
#pragma omp parallel num_threads(threads) if (rows * n > WORTH / 4)
    {
        std::vector<float> space(2 * n), y(n);
#pragma omp for schedule(static)
        for (Index r = 0; r < rows; r++) {
            const float* row = wide(both, half, r * 2 * n, 2 * n, space.data());
            gate_row(row, row + n, half, y.data(), n);
            put(out, half, r, n, 0, y.data(), n);
        }
    }
}

// Its gradient by (gate, up).
void gate_slopes(const void* both, const void* d_out, int half, void* d_both, Index rows, Index n) {
#pragma omp parallel num_threads(threads) if (rows * n > WORTH / 4)
    {
        std::vector<float> space(2 * n), spare(n), y(2 * n);
#pragma omp for schedule(static)
        for (Index r = 0; r < rows; r++) {
            const float* row = wide(both, half, r * 2 * n, 2 * n, space.data());
            const float* slope = wide(d_out, half, r * n, n, spare.data());
            float* to = y.data();
#pragma omp simd
            for (Index i = 0; i < n; i++) {
                const float g = row[i], open = 1.0f / (1.0f + exponential(std::min(-g, 88.0f)));
                to[i] = slope[i] * row[n + i] * open * (1.0f + g * (1.0f - open));
                to[n + i] = slope[i] * g * open;
            }
            put(d_both, half, r, 2 * n, 0, to, 2 * n);
        }
    }
}

// The first `heads` of rows (all, d) rotated, the others as they are: x cos + (x, halves exchanged) sin, where sin has the
// sign of each half. back: the gradient, which takes the other half's sine.
void rotate_heads(const void* x, int half, const float* cos, const float* sin, int back, void* out, Index rows,
                  Index heads, Index all, Index d) {
    const Index middle = d / 2;
#pragma omp parallel num_threads(threads) if (rows * all * d > WORTH)
    {
        std::vector<float> space(all * d), y(all * d);
#pragma omp for schedule(static)
        for (Index r = 0; r < rows; r++) {
            const float* row = wide(x, half, r * all * d, all * d, space.data());
            const float *c = cos + r * d, *s = sin + r * d, *low = s + (back ? middle : 0), *high = s + (back ? 0 : middle);
            for (Index h = 0; h < heads; h++) rotate(row + h * d, c, low, high, y.data() + h * d, d);
            std::memcpy(y.data() + heads * d, row + heads * d, (all - heads) * d * sizeof(float));
            put(out, half, r, all * d, 0, y.data(), all * d);
        }
    }
}

// Logits (rows, n) / temperature become probabilities, in place; the log-probability of each row's token, and the
// entropy where it is not null.
void softmax(float* logits, float temperature, const Index* token, float* logp, float* entropy, Index rows, Index n) {
    constexpr Index SPAN = 256;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * n > WORTH / 4)
    for (Index r = 0; r < rows; r++) {
        float *x = logits + r * n, most = -INFINITY;
#pragma omp simd reduction(max : most)
        for (Index i = 0; i < n; i++) most = std::max(most, x[i]);
        most /= temperature;
        const float own = x[token[r]] / temperature - most;
        double total = 0, weighed = 0;
        for (Index begin = 0; begin < n; begin += SPAN) {
            const Index size = std::min(n - begin, SPAN);
            float e[SPAN], *z = x + begin, heavy = 0;
            total += masses(z, temperature, most, e, size);
#pragma omp simd reduction(+ : heavy)
            for (Index i = 0; i < size; i++) {
                heavy += e[i] > 0 ? e[i] * (z[i] / temperature - most) : 0.0f;
                z[i] = e[i];
            }
            weighed += heavy;
        }
        logp[r] = own - float(std::log(total));
        if (entropy) entropy[r] = float(std::log(total) - weighed / total);
        const float share = float(1.0 / total);
#pragma omp simd
        for (Index i = 0; i < n; i++) x[i] *= share;
    }
}

// The gradient by the logits: slope (1[token] - p), slope already divided by the temperature.
void softmax_slopes(const float* p, const Index* token, const float* slope, void* out, int half, Index rows, Index n) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * n > WORTH / 4)
    for (Index r = 0; r < rows; r++) {
        const float *row = p + r * n, g = slope[r], own = g - g * row[token[r]];
        if (half) {
            Half* to = static_cast<Half*>(out) + r * n;
#pragma omp simd
            for (Index i = 0; i < n; i++) to[i] = to_half(-g * row[i]);
            to[token[r]] = to_half(own);
        } else {
            float* to = static_cast<float*>(out) + r * n;
#pragma omp simd
            for (Index i = 0; i < n; i++) to[i] = -g * row[i];
            to[token[r]] = own;
        }
    }
}

}  // extern "C"
