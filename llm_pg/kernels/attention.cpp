// Attention of a packed row in training: groups of runs of tokens, of which the first is a prompt that the others read
// too; every run reads itself causally. Nothing is padded, and scores are never in memory beyond four queries: the
// backward pass makes them again. All arithmetic is in float32.

#include "common.h"

namespace {

inline Index blocks(Index n) { return (n + LANES - 1) / LANES * LANES; }

// Adds to out (count, d) the products of weights (Q, span) with rows (Q, d); J registers of channels from c on.
template <int Q, int J>
void add_outer_of(const float* weights, Index span, const float* rows, Index count, Index d, float* out, Index c) {
    Lane row[Q][J];
    for (int q = 0; q < Q; q++)
        for (int j = 0; j < J; j++) row[q][j] = lane(rows + q * d + c + j * LANES);
    for (Index t = 0; t < count; t++)
        for (int j = 0; j < J; j++) {
            float* to = out + t * d + c + j * LANES;
            Lane sum = lane(to);
            for (int q = 0; q < Q; q++) sum += weights[q * span + t] * row[q][j];
            *reinterpret_cast<Lane*>(to) = sum;
        }
}

template <int Q>
void add_outer(const float* weights, Index span, const float* rows, Index count, Index d, float* out) {
    Index c = 0;
    for (; c + 4 * LANES <= d; c += 4 * LANES) add_outer_of<Q, 4>(weights, span, rows, count, d, out, c);
    for (; c + 2 * LANES <= d; c += 2 * LANES) add_outer_of<Q, 2>(weights, span, rows, count, d, out, c);
    for (; c + LANES <= d; c += LANES) add_outer_of<Q, 1>(weights, span, rows, count, d, out, c);
    if (c == d) return;
    for (Index t = 0; t < count; t++)
        for (int q = 0; q < Q; q++)
            for (Index i = c; i < d; i++) out[t * d + i] += weights[q * span + t] * rows[q * d + i];
}

using AddOuter = void (*)(const float*, Index, const float*, Index, Index, float*);
const AddOuter ADD_OUTER[] = {nullptr, add_outer<1>, add_outer<2>, add_outer<3>, add_outer<4>};

// Rows of d numbers, one a token and head, `token` and `head` numbers apart.
struct Rows {
    void* at;
    Index token, head;
    Index place(Index t, Index h) const { return t * token + h * head; }
};

struct Shape {
    Index groups, heads, kv_heads, d;
    Index most;  // tokens of the largest group, each run rounded up to 16
};

// Runs of a group are begin[g] to begin[g + 1]; `follows`: whether a run reads the group's first one too.
struct Runs {
    const Index *begin, *start, *length, *follows;
};

// Keys and values of one group and key head, row by row and in blocks, and one query tile's numbers.
struct Space {
    std::vector<float> keys, values, key_blocks, value_blocks, d_keys, d_values;
    std::vector<float> query, slope, sum, scores, d_scores;
    Index span;

    Space(const Shape& s, bool back)
        : keys(s.most * s.d), values(s.most * s.d), key_blocks(s.most * s.d), value_blocks(back ? s.most * s.d : 0),
          d_keys(back ? s.most * s.d : 0), d_values(back ? s.most * s.d : 0), query(MOST * s.d), slope(MOST * s.d),
          sum(MOST * s.d), scores(MOST * (s.most + 2 * LANES)), d_scores(back ? MOST * (s.most + 2 * LANES) : 0),
          span(s.most + 2 * LANES) {}
};

inline void into_blocks(const float* row, Index slot, Index d, float* to) {
    to += slot / LANES * LANES * d + slot % LANES;
    for (Index i = 0; i < d; i++) to[i * LANES] = row[i];
}

// A group's runs, or one of them alone with the first, which it reads.
constexpr Index EVERY = -1;

void load(const Rows& keys, const Rows& values, bool half, const Shape& s, const Runs& runs, Index group, Index only,
          Index kv, Space& space, bool back) {
    const Index d = s.d, begin = runs.begin[group];
    std::vector<float> spare(d);
    for (Index run = begin, first = 0; run < runs.begin[group + 1]; first += blocks(runs.length[run++])) {
        if (only != EVERY && run != only && run != begin) continue;
        for (Index t = 0; t < runs.length[run]; t++) {
            const Index token = runs.start[run] + t, slot = first + t;
            const float* key = wide(keys.at, half, keys.place(token, kv), d, spare.data());
            std::memcpy(&space.keys[slot * d], key, d * sizeof(float));
            into_blocks(key, slot, d, space.key_blocks.data());
            const float* value = wide(values.at, half, values.place(token, kv), d, spare.data());
            std::memcpy(&space.values[slot * d], value, d * sizeof(float));
            if (back) into_blocks(value, slot, d, space.value_blocks.data());
        }
    }
}

// One query tile: `num` queries from number `first` on of a run (a token's heads beside each other), which read `before`
// tokens of the prompt and up to `own` of the run, whose slots begin at `slot`.
struct Tile {
    Index num, first, per_key, before, own, slot;
    Index token(Index q) const { return (first + q) / per_key; }
    Index head(Index q) const { return (first + q) % per_key; }
};

// Products of the tile's rows with keys or values in blocks, into (num, span).
void products(const Tile& t, const float* rows, const float* in_blocks, Index d, float* out, Index span) {
    SCORE[t.num](rows, d, in_blocks, t.before, out, span);
    SCORE[t.num](rows, d, in_blocks + t.slot * d, t.own, out + t.before, span);
}

// Sums of rows of keys or values by (num, span), into `out` (num, d).
void sums(const Tile& t, const float* weights, Index span, const float* rows, Index d, float* out) {
    std::fill_n(out, t.num * d, 0.0f);
    ADD_VALUES[t.num](weights, span, rows, t.before, d, out);
    ADD_VALUES[t.num](weights + t.before, span, rows + t.slot * d, t.own, d, out);
}

void outer(const Tile& t, const float* weights, Index span, const float* rows, Index d, float* out) {
    ADD_OUTER[t.num](weights, span, rows, t.before, d, out);
    ADD_OUTER[t.num](weights + t.before, span, rows, t.own, d, out + t.slot * d);
}

// The tile's rows of x, of the heads from `head` on, times `scale`.
void gather(const Tile& t, const Rows& x, bool half, Index start, Index head, Index d, float scale, float* out,
            std::vector<float>& spare) {
    for (Index q = 0; q < t.num; q++) {
        const float* row = wide(x.at, half, x.place(start + t.token(q), head + t.head(q)), d, spare.data());
        for (Index i = 0; i < d; i++) out[q * d + i] = row[i] * scale;
    }
}

// Rows of float32 times `scale` to where the tile's rows of x are.
void scatter(const Tile& t, float* rows, const float* scale, const Rows& x, bool half, Index start, Index head, Index d) {
    for (Index q = 0; q < t.num; q++) {
        float* row = rows + q * d;
        for (Index i = 0; i < d; i++) row[i] *= scale[q];
        put(x.at, half, 0, 0, x.place(start + t.token(q), head + t.head(q)), row, d);
    }
}

template <class Work>
void for_tiles(const Shape& s, const Runs& runs, Index group, Index only, Work work) {
    const Index first = runs.begin[group], per_key = s.heads / s.kv_heads;
    for (Index run = first, slot = 0; run < runs.begin[group + 1]; slot += blocks(runs.length[run++])) {
        if (only != EVERY && run != only) continue;
        const Index before = runs.follows[run] ? runs.length[first] : 0, queries = runs.length[run] * per_key;
        for (Index q = 0; q < queries; q += MOST) {
            const Index num = std::min(MOST, queries - q);
            work(Tile{num, q, per_key, before, (q + num - 1) / per_key + 1, slot}, runs.start[run]);
        }
    }
}

// What a thread takes: a group and key head, or, where these are few, one of its runs. The numbers are the same.
struct Units {
    std::vector<Index> group, run;

    Units(const Shape& s, const Runs& runs) {
        const bool few = s.groups * s.kv_heads < 2 * threads;
        for (Index g = 0; g < s.groups; g++)
            for (Index r = runs.begin[g]; r < (few ? runs.begin[g + 1] : runs.begin[g] + 1); r++)
                group.push_back(g), run.push_back(few ? r : EVERY);
    }
    Index size() const { return group.size(); }
};

}  // namespace

extern "C" {

// io: queries (tokens, heads, d), keys and values (tokens, kv_heads, d), and where the result goes, (tokens, heads, d),
// all of one type. log_sum (tokens, heads): log of the sum of exp of the scores, in float32.
void attend_packed(const Rows* io, int half, const Index* begin, const Index* start, const Index* length,
                   const Index* follows, const Shape* shape, float scale, float* log_sum) {
    const Shape s = *shape;
    const Runs runs{begin, start, length, follows};
    const Index d = s.d, per_key = s.heads / s.kv_heads;
    const Units units(s, runs);
#pragma omp parallel num_threads(threads)
    {
        Space space(s, false);
        std::vector<float> spare(d);
#pragma omp for schedule(dynamic)
        for (Index unit = 0; unit < units.size() * s.kv_heads; unit++) {
            const Index group = units.group[unit / s.kv_heads], only = units.run[unit / s.kv_heads];
            const Index kv = unit % s.kv_heads, head = kv * per_key;
            load(io[1], io[2], half, s, runs, group, only, kv, space, false);
            for_tiles(s, runs, group, only, [&](const Tile& t, Index first) {
                gather(t, io[0], half, first, head, d, scale, space.query.data(), spare);
                products(t, space.query.data(), space.key_blocks.data(), d, space.scores.data(), space.span);
                float inverse[MOST];
                for (Index q = 0; q < t.num; q++) {
                    const Index count = t.before + t.token(q) + 1;
                    float* x = &space.scores[q * space.span];
                    const Sums found = exponentials(x, count);
                    for (Index i = count; i < t.before + t.own; i++) x[i] = 0;
                    inverse[q] = found.inverse;
                    log_sum[(first + t.token(q)) * s.heads + head + t.head(q)] = found.log;
                }
                sums(t, space.scores.data(), space.span, space.values.data(), d, space.sum.data());
                scatter(t, space.sum.data(), inverse, io[3], half, first, head, d);
            });
        }
    }
}

// Its gradient. io: queries, keys, values, the gradient of the result; then where those of the first three go.
void attend_packed_slopes(const Rows* io, int half, const Index* begin, const Index* start, const Index* length,
                          const Index* follows, const Shape* shape, float scale, const float* log_sum) {
    const Shape s = *shape;
    const Runs runs{begin, start, length, follows};
    const Index d = s.d, per_key = s.heads / s.kv_heads;
    const float scales[MOST] = {scale, scale, scale, scale};
    const Units units(s, runs);
    const Index num = units.size() * s.kv_heads;
    // Of each unit what its runs add to the gradients of the group's first run.
    std::vector<std::vector<float>> d_first_keys(num), d_first_values(num);
    const auto write = [&](Index run, Index kv, const float* d_keys, const float* d_values) {
        for (Index t = 0; t < runs.length[run]; t++) {
            put(io[5].at, half, 0, 0, io[5].place(runs.start[run] + t, kv), d_keys + t * d, d);
            put(io[6].at, half, 0, 0, io[6].place(runs.start[run] + t, kv), d_values + t * d, d);
        }
    };
#pragma omp parallel num_threads(threads)
    {
        Space space(s, true);
        std::vector<float> spare(d);
#pragma omp for schedule(dynamic)
        for (Index unit = 0; unit < num; unit++) {
            const Index group = units.group[unit / s.kv_heads], only = units.run[unit / s.kv_heads];
            const Index kv = unit % s.kv_heads, head = kv * per_key, first_run = runs.begin[group];
            const Index size = runs.length[first_run] * d, span = space.span;
            load(io[1], io[2], half, s, runs, group, only, kv, space, true);
            d_first_keys[unit].assign(size, 0.0f);
            d_first_values[unit].assign(size, 0.0f);
            for (Index run = first_run, slot = 0; run < runs.begin[group + 1]; slot += blocks(runs.length[run++])) {
                if (only != EVERY && run != only) continue;
                const Index own = slot * d, own_size = runs.length[run] * d;
                for (auto* each : {&space.d_keys, &space.d_values}) {
                    std::fill_n(each->begin(), size, 0.0f);
                    std::fill_n(each->begin() + own, own_size, 0.0f);
                }
                for_tiles(s, runs, group, run, [&](const Tile& t, Index first) {
                    gather(t, io[0], half, first, head, d, scale, space.query.data(), spare);
                    gather(t, io[3], half, first, head, d, 1.0f, space.slope.data(), spare);
                    products(t, space.query.data(), space.key_blocks.data(), d, space.scores.data(), span);
                    products(t, space.slope.data(), space.value_blocks.data(), d, space.d_scores.data(), span);
                    for (Index q = 0; q < t.num; q++) {
                        const Index count = t.before + t.token(q) + 1;
                        const float log = log_sum[(first + t.token(q)) * s.heads + head + t.head(q)];
                        float *x = &space.scores[q * span], *slope = &space.d_scores[q * span], mean = 0;
#pragma omp simd reduction(+ : mean)
                        for (Index i = 0; i < count; i++) mean += (x[i] = exponential(x[i] - log)) * slope[i];
#pragma omp simd
                        for (Index i = 0; i < count; i++) slope[i] = x[i] * (slope[i] - mean);
                        for (Index i = count; i < t.before + t.own; i++) x[i] = slope[i] = 0;
                    }
                    outer(t, space.scores.data(), span, space.slope.data(), d, space.d_values.data());
                    outer(t, space.d_scores.data(), span, space.query.data(), d, space.d_keys.data());
                    sums(t, space.d_scores.data(), span, space.keys.data(), d, space.sum.data());
                    scatter(t, space.sum.data(), scales, io[4], half, first, head, d);
                });
                for (Index i = 0; i < size; i++) {
                    d_first_keys[unit][i] += space.d_keys[i];
                    d_first_values[unit][i] += space.d_values[i];
                }
                if (run != first_run) write(run, kv, &space.d_keys[own], &space.d_values[own]);
            }
        }
        // In the order of the runs, whoever computed them.
#pragma omp for schedule(dynamic)
        for (Index unit = 0; unit < num; unit++) {
            const Index place = unit / s.kv_heads, group = units.group[place];
            if (place > 0 && units.group[place - 1] == group) continue;
            std::vector<float>&d_keys = d_first_keys[unit], &d_values = d_first_values[unit];
            for (Index other = unit + s.kv_heads; other < num && units.group[other / s.kv_heads] == group;
                 other += s.kv_heads)
                for (Index i = 0; i < Index(d_keys.size()); i++) {
                    d_keys[i] += d_first_keys[other][i];
                    d_values[i] += d_first_values[other][i];
                }
            write(runs.begin[group], unit % s.kv_heads, d_keys.data(), d_values.data());
        }
    }
}

}  // extern "C"
