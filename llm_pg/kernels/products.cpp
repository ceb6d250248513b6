// Products of bfloat16 rows and weights with sums in float32, of decoding and of the update alike: what both compute from
// one row and one weight is the same to the last bit. Called from Python with addresses and sizes (products.py).

#include "common.h"

namespace {

#if HAS_BF16
constexpr Index BLOCK = 64, TILE = 6;  // columns and rows of a tile: 24 sums in registers

// As it is; rounded to bfloat16; rounded and added to what is there; rounded, into bfloat16.
enum Result { FLOAT = 0, ROUNDED = 1, ADDED = 2, HALF = 3 };

template <int M>
void tile(const Half* x, Index ldx, const Half* w, Index pairs, const float* bias, void* out, Index ldo, Index columns,
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
            float* to = static_cast<float*>(out) + i * ldo + 16 * j;
            __m512 y = sum[i][j];
            if (bias) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, bias + 16 * j));
            if (result == HALF) {
                Half* half = static_cast<Half*>(out) + i * ldo + 16 * j;
                _mm256_mask_storeu_epi16(half, mask, (__m256i)_mm512_cvtneps_pbh(y));
                continue;
            }
            if (result != FLOAT) {
                __m512i wide = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(y));
                y = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
            }
            if (result == ADDED) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, to));
            _mm512_mask_storeu_ps(to, mask, y);
        }
}

using Tile = void (*)(const Half*, Index, const Half*, Index, const float*, void*, Index, Index, int);
const Tile TILES[] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};
#endif

}  // namespace

extern "C" {

int has_bf16() { return HAS_BF16; }

#if HAS_BF16
// A weight (n, k) of float32 or bfloat16 into blocks of 64 columns of the product, two of k together; `first`: where
// its rows begin among those of the layers of one input.
void pack(const void* weight, int is_half, uint32_t* to, Index first, Index n, Index k) {
    const Index pairs = (k + 1) / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (Index begin = 0; begin < n; begin += 16) {
        uint32_t square[16][16];  // rows, pairs of k
        const Index rows = std::min<Index>(16, n - begin), column = first + begin;
        for (Index p = 0; p < pairs; p += 16) {
            const __mmask32 there = k - 2 * p >= 32 ? ~0u : (1u << (k - 2 * p)) - 1;
            for (Index i = 0; i < rows; i++) {
                const Index at = (begin + i) * k + 2 * p;
                __m512i two;
                if (is_half) {
                    two = _mm512_maskz_loadu_epi16(there, static_cast<const Half*>(weight) + at);
                } else {
                    const float* x = static_cast<const float*>(weight) + at;
                    const __m512 low = _mm512_maskz_loadu_ps(__mmask16(there), x);
                    const __m512 high = _mm512_maskz_loadu_ps(__mmask16(there >> 16), x + 16);
                    two = (__m512i)_mm512_cvtne2ps_pbh(high, low);
                }
                _mm512_storeu_si512(square[i], two);
            }
            for (Index q = 0; q < std::min<Index>(16, pairs - p); q++)
                if (rows == 16 && column % 16 == 0) {
                    uint32_t* out = to + (column / BLOCK * pairs + p + q) * BLOCK + column % BLOCK;
                    for (Index i = 0; i < 16; i++) out[i] = square[i][q];
                } else {
                    for (Index i = 0; i < rows; i++)
                        to[((column + i) / BLOCK * pairs + p + q) * BLOCK + (column + i) % BLOCK] = square[i][q];
                }
        }
    }
}

// x (rows, k) times a packed weight of n columns, and a bias or null. A row of the result is a sum over k in order: the
// same whatever rows are beside it.
void product(const Half* x, Index ldx, const Half* w, const float* bias, void* out, Index rows, Index n, Index k,
             int result) {
    const Index pairs = (k + 1) / 2, blocks = (n + BLOCK - 1) / BLOCK, tiles = (rows + TILE - 1) / TILE;
    // Few columns and many threads: the rows are divided too.
    const Index parts = std::min<Index>(tiles, std::max<Index>(1, (2 * threads + blocks - 1) / blocks));
    const Index size = result == HALF ? sizeof(Half) : sizeof(float);
    const bool worth = threads > 1 && rows * n * k > 8 * WORTH;
#pragma omp parallel for num_threads(threads) schedule(static) if (worth)
    for (Index unit = 0; unit < blocks * parts; unit++) {
        const Index b = unit / parts, part = unit % parts;
        for (Index t = part * tiles / parts; t < (part + 1) * tiles / parts; t++) {
            const Index first = t * rows / tiles, end = (t + 1) * rows / tiles;
            TILES[end - first](x + first * ldx, ldx, w + b * pairs * BLOCK * 2, pairs, bias ? bias + b * BLOCK : nullptr,
                               static_cast<char*>(out) + (first * n + b * BLOCK) * size, n, n - b * BLOCK, result);
        }
    }
}
#endif

}  // extern "C"
