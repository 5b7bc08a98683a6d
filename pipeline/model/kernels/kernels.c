/* What a small decoder spends its time on beside matrix products, in float32, on flat batches of tokens.
 *
 * PyTorch's attention pads all sequences to one length and works in blocks that are made for long ones; with heads of 16
 * numbers and episodes of some hundred tokens most of its time is overhead. Here one block of queries of one head stays in
 * registers while it walks over its sequence, position codes are applied on the way, and nothing is padded. Vectors are
 * GCC's (Clang has them, too); head sizes and widths are multiples of 16.
 *
 * A vector is as long as the registers of the instruction set that this is compiled for; a longer one would be kept in
 * memory. Sums over lanes are taken in 16 parts whatever that length is, so that their order, and with fused
 * multiply-add their bytes, do not depend on it.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define VECTOR 16 /* numbers in a register */
#elif defined(__AVX__)
#define VECTOR 8
#else
#define VECTOR 4
#endif
#define LANES 16 /* numbers side by side: parts of a sum, and tokens in a tile of cached keys */
#define PARTS (LANES / VECTOR)
#define QUERIES 4 /* queries that share each key and value read */
/* Vectors that share each query's number read: their sums, for all queries, stay in registers. */
#if defined(__aarch64__)
#define ABREAST 4
#else
#define ABREAST 2
#endif
#define STEP (ABREAST * VECTOR)

typedef float vec __attribute__((vector_size(4 * VECTOR), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * VECTOR), aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))
#define LOAD(p) (*(const vec *)(p))
#define STORE(p, x) (*(vec *)(p) = (x))

INLINE vec splat(float x) { return x - (vec){}; }
INLINE vec larger(vec a, vec b) {
    ivec first = a > b;
    return (vec)(((ivec)a & first) | ((ivec)b & ~first));
}
INLINE float total(const vec *x) { /* of LANES numbers */
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i / VECTOR][i % VECTOR];
    return sum;
}
INLINE float largest(vec x) {
    float most = x[0];
    for (int i = 1; i < VECTOR; i++) most = x[i] > most ? x[i] : most;
    return most;
}

/* exp(x) for x <= 0: 2^k 2^f with k whole, made in the exponent's bits, and f in [-1/2, 1/2] by a polynomial whose
 * relative error is 2e-7. */
INLINE vec exponential(vec x) {
    x = larger(x * 1.4426950408889634f, splat(-126.0f));
    ivec k = __builtin_convertvector(x - 0.5f, ivec);
    vec f = x - __builtin_convertvector(k, vec);
    vec y = splat(1.5403530393381609954e-4f);
    y = y * f + 1.3333558146428443423e-3f;
    y = y * f + 9.6181291076284771619e-3f;
    y = y * f + 5.5504108664821579953e-2f;
    y = y * f + 2.4022650695910071233e-1f;
    y = y * f + 6.9314718055994530942e-1f;
    y = y * f + 1.0f;
    return y * (vec)((k + 127) << 23);
}

/* The largest of x[t] for t < end, a multiple of LANES. */
INLINE float peak_of(const float *x, long end) {
    vec most[PARTS];
    for (int i = 0; i < PARTS; i++) most[i] = LOAD(x + i * VECTOR);
    for (long t = LANES; t < end; t += LANES)
        for (int i = 0; i < PARTS; i++) most[i] = larger(most[i], LOAD(x + t + i * VECTOR));
    for (int i = 1; i < PARTS; i++) most[0] = larger(most[0], most[i]);
    return largest(most[0]);
}

/* x[t] = exp(x[t] - peak) for t < end, a multiple of LANES; returns their sum. */
INLINE float grow(float *x, long end, float peak) {
    vec sum[PARTS] = {};
    for (long t = 0; t < end; t += LANES)
        for (int i = 0; i < PARTS; i++) {
            vec p = exponential(LOAD(x + t + i * VECTOR) - peak);
            sum[i] += p;
            STORE(x + t + i * VECTOR, p);
        }
    return total(sum);
}

/* rows[r][t] = sum_d a[r][d] x[d][t] for t < end, r < QUERIES; x as `turn` makes it. */
INLINE void products(float *rows, const float *a, const float *x, long end, long width, int size) {
    for (long t = 0; t < end; t += STEP) {
        vec sum[QUERIES][ABREAST] = {};
        for (int d = 0; d < size; d++)
            for (int i = 0; i < ABREAST; i++) {
                vec column = LOAD(x + t * size + d * STEP + i * VECTOR);
                for (int r = 0; r < QUERIES; r++) sum[r][i] += a[r * size + d] * column;
            }
        for (int r = 0; r < QUERIES; r++)
            for (int i = 0; i < ABREAST; i++) STORE(rows + r * width + t + i * VECTOR, sum[r][i]);
    }
}

/* How many vectors of a head are taken at once: a head of 16 is one vector of AVX-512. */
#define ACROSS(size) (STEP > (size) ? (size) / VECTOR : ABREAST)

/* out[r][:] = sum_t rows[r][t] x[t][:] for t < end; consecutive t are `stride` apart in x. */
INLINE void mixture(float *out, const float *rows, const float *x, long end, long width, long stride, int size) {
    const int across = ACROSS(size);
    for (int d = 0; d < size; d += across * VECTOR) {
        vec sum[QUERIES][ABREAST] = {};
        for (long t = 0; t < end; t++)
            for (int i = 0; i < across; i++) {
                vec value = LOAD(x + t * stride + d + i * VECTOR);
                for (int r = 0; r < QUERIES; r++) sum[r][i] += rows[r * width + t] * value;
            }
        for (int r = 0; r < QUERIES; r++)
            for (int i = 0; i < across; i++) STORE(out + r * size + d + i * VECTOR, sum[r][i]);
    }
}

/* into[t][:] += sum_r rows[r][t] a[r][:] for t < end. */
INLINE void spread(float *into, const float *rows, const float *a, long end, long width, int size) {
    const int across = ACROSS(size);
    for (int d = 0; d < size; d += across * VECTOR) {
        vec part[QUERIES][ABREAST];
        for (int r = 0; r < QUERIES; r++)
            for (int i = 0; i < across; i++) part[r][i] = LOAD(a + r * size + d + i * VECTOR);
        for (long t = 0; t < end; t++)
            for (int i = 0; i < across; i++) {
                float *target = into + t * size + d + i * VECTOR;
                vec sum = LOAD(target);
                for (int r = 0; r < QUERIES; r++) sum += rows[r * width + t] * part[r][i];
                STORE(target, sum);
            }
    }
}

/* The tokens' x[t][d] with STEP tokens side by side, [width / STEP][size][STEP], so that `products` reads it front to
 * back; zero behind the last token. */
INLINE void turn(float *out, const float *x, long tokens, long width, long stride, int size) {
    for (long t = 0; t < width; t++)
        for (int d = 0; d < size; d++) out[(t / STEP * size + d) * STEP + t % STEP] = t < tokens ? x[t * stride + d] : 0;
}

/* Rotary position codes (arXiv 2104.09864), times a factor: x cos + rotate_half(x) sin; with `back` their transpose,
 * which takes gradients the other way. Without cos only the factor. */
INLINE void rotate(float *out, const float *x, const float *cosine, const float *sine, int size, float factor, int back) {
    int half = size / 2;
    for (int d = 0; d < half; d++) {
        float first = x[d] * factor, second = x[d + half] * factor;
        if (cosine && back) {
            out[d] = first * cosine[d] + second * sine[d + half];
            out[d + half] = second * cosine[d + half] - first * sine[d];
        } else if (cosine) {
            out[d] = first * cosine[d] - second * sine[d];
            out[d + half] = second * cosine[d + half] + first * sine[d + half];
        } else {
            out[d] = first;
            out[d + half] = second;
        }
    }
}

/* `count` rows from number `first` on, rotated by the codes of the tokens that they belong to (`where`, or their own
 * number) and times a factor; rows from `rows` on are zero. */
INLINE void gather(float *out, const float *x, const float *cosine, const float *sine, const int64_t *where, long first,
                   long count, long rows, long stride, int size, float factor) {
    for (long r = 0; r < count; r++) {
        long i = first + r;
        if (i < rows) {
            long t = where ? where[i] : i;
            rotate(out + r * size, x + i * stride, cosine ? cosine + t * size : 0, sine + t * size, size, factor, 0);
        } else {
            memset(out + r * size, 0, size * sizeof(float));
        }
    }
}

INLINE long whole(long n) { return (n + 2 * LANES - 1) / (2 * LANES) * (2 * LANES); }

static float *scratch(long floats) { return aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64); }

/* A packed batch: tokens between `offsets` belong together. Queries may be those of some tokens only: `where` gives their
 * places within their sequence, `starts` where each sequence's queries begin. */
typedef struct {
    const float *query, *key, *value, *cosine, *sine;
    const int64_t *offsets, *starts, *where;
    long sequences;
    int heads, groups;
    float scale;
} batch;

/* One sequence of it: tokens from `begin`, queries from `first`, where these stand, its rotary codes. */
typedef struct {
    long begin, tokens, width, first, asked;
    const int64_t *at;
    const float *cosine, *sine;
} sequence;

INLINE sequence sequence_of(const batch *b, long e, int size) {
    long begin = b->offsets[e], tokens = b->offsets[e + 1] - begin, first = b->starts[e];
    return (sequence){begin, tokens, whole(tokens), first, b->starts[e + 1] - first, b->where + first,
                      b->cosine ? b->cosine + begin * size : 0, b->sine + begin * size};
}

INLINE long widest_of(const batch *b) {
    long longest = 0;
    for (long e = 0; e < b->sequences; e++)
        if (b->offsets[e + 1] - b->offsets[e] > longest) longest = b->offsets[e + 1] - b->offsets[e];
    return whole(longest);
}

/* Rotated keys of one head, as they are (`turned`) and for `products` (`keys`). */
INLINE void take_keys(const batch *b, sequence s, int g, int size, float *turned, float *keys) {
    const float *key = b->key + (s.begin * b->groups + g) * size;
    gather(turned, key, s.cosine, s.sine, 0, 0, s.tokens, s.tokens, (long)b->groups * size, size, 1);
    turn(keys, turned, s.tokens, s.width, size, size);
}

/* Scores of a block of queries from number i on, very small behind each query's own place; returns how many tokens the
 * block sees. */
INLINE long score_block(const batch *b, sequence s, int h, long i, int size, float *q, const float *keys, float *rows) {
    const float *query = b->query + (s.first * b->heads + h) * size;
    long seen = s.at[i + QUERIES < s.asked ? i + QUERIES - 1 : s.asked - 1] + 1, end = whole(seen);
    gather(q, query, s.cosine, s.sine, s.at, i, QUERIES, s.asked, (long)b->heads * size, size, b->scale);
    products(rows, q, keys, end, s.width, size);
    for (int r = 0; r < QUERIES; r++)
        for (long t = i + r < s.asked ? s.at[i + r] + 1 : 0; t < end; t++) rows[r * s.width + t] = -1e30f;
    return seen;
}

INLINE void forward(const batch *b, int size, float *out, float *logsum) {
    long widest = widest_of(b), stride = (long)b->heads * size;
    float *keys = scratch(size * widest), *turned = scratch(size * widest), *rows = scratch(QUERIES * widest);
    float *q = scratch(2 * QUERIES * size), *mixed = q + QUERIES * size;
    for (long e = 0; e < b->sequences; e++) {
        sequence s = sequence_of(b, e, size);
        for (int h = 0; h < b->heads; h++) {
            int g = h * b->groups / b->heads;
            if (h * b->groups % b->heads == 0) take_keys(b, s, g, size, turned, keys);
            for (long i = 0; i < s.asked; i += QUERIES) {
                long seen = score_block(b, s, h, i, size, q, keys, rows), end = whole(seen);
                float share[QUERIES];
                for (int r = 0; r < QUERIES; r++) {
                    float *row = rows + r * s.width;
                    float peak = peak_of(row, end), mass = grow(row, end, peak);
                    share[r] = 1 / mass;
                    if (i + r < s.asked) logsum[(s.first + i + r) * b->heads + h] = peak + logf(mass);
                }
                const float *value = b->value + (s.begin * b->groups + g) * size;
                mixture(mixed, rows, value, seen, s.width, (long)b->groups * size, size);
                for (int r = 0; r < QUERIES && i + r < s.asked; r++)
                    for (int d = 0; d < size; d++)
                        out[(s.first + i + r) * stride + h * size + d] = mixed[r * size + d] * share[r];
            }
        }
    }
    free(keys), free(turned), free(rows), free(q);
}

INLINE void backward(const batch *b, int size, const float *out, const float *logsum, const float *to_out,
                     float *to_query, float *to_key, float *to_value) {
    long widest = widest_of(b), stride = (long)b->heads * size, k_stride = (long)b->groups * size;
    float *keys = scratch(size * widest), *turned = scratch(size * widest), *values = scratch(size * widest);
    float *key_sums = scratch(size * widest), *value_sums = scratch(size * widest);
    float *rows = scratch(QUERIES * widest), *slopes = scratch(QUERIES * widest);
    float *q = scratch(3 * QUERIES * size), *upper = q + QUERIES * size, *mixed = upper + QUERIES * size;
    for (long e = 0; e < b->sequences; e++) {
        sequence s = sequence_of(b, e, size);
        for (int h = 0; h < b->heads; h++) {
            int g = h * b->groups / b->heads;
            long at = s.first * stride + h * size;
            if (h * b->groups % b->heads == 0) {
                take_keys(b, s, g, size, turned, keys);
                turn(values, b->value + s.begin * k_stride + g * size, s.tokens, s.width, k_stride, size);
                memset(key_sums, 0, size * s.width * sizeof(float));
                memset(value_sums, 0, size * s.width * sizeof(float));
            }
            for (long i = 0; i < s.asked; i += QUERIES) {
                long seen = score_block(b, s, h, i, size, q, keys, rows), end = whole(seen);
                gather(upper, to_out + at, 0, 0, 0, i, QUERIES, s.asked, stride, size, 1);
                products(slopes, upper, values, end, s.width, size);
                for (int r = 0; r < QUERIES; r++) {
                    float *row = rows + r * s.width, *slope = slopes + r * s.width, mean = 0, mass = 0;
                    if (i + r < s.asked) {
                        mass = logsum[(s.first + i + r) * b->heads + h];
                        for (int d = 0; d < size; d++) mean += upper[r * size + d] * out[at + (i + r) * stride + d];
                    }
                    for (long t = 0; t < end; t += VECTOR) {
                        vec p = exponential(LOAD(row + t) - mass);
                        STORE(row + t, p);
                        STORE(slope + t, p * (LOAD(slope + t) - mean));
                    }
                }
                spread(value_sums, rows, upper, seen, s.width, size);
                spread(key_sums, slopes, q, seen, s.width, size);
                mixture(mixed, slopes, turned, seen, s.width, size, size);
                for (int r = 0; r < QUERIES && i + r < s.asked; r++) {
                    long t = s.at[i + r] * size;
                    rotate(to_query + at + (i + r) * stride, mixed + r * size, s.cosine ? s.cosine + t : 0, s.sine + t,
                           size, b->scale, 1);
                }
            }
            if ((h + 1) * b->groups % b->heads == 0)
                for (long t = 0; t < s.tokens; t++) {
                    long to = (s.begin + t) * k_stride + g * size;
                    rotate(to_key + to, key_sums + t * size, s.cosine ? s.cosine + t * size : 0, s.sine + t * size, size,
                           1, 1);
                    memcpy(to_value + to, value_sums + t * size, size * sizeof(float));
                }
        }
    }
    free(keys), free(turned), free(values), free(key_sums), free(value_sums), free(rows), free(slopes), free(q);
}

/* A layer's cached keys and values, in pages of `length` tokens, a multiple of LANES: `numbers` are those of each slot's
 * pages, `width` a slot, and `address` says where they begin. A page has all heads' keys in tiles [length / 16][size][16],
 * then all heads' values as [length][size]. */
typedef struct {
    float *const *address;
    const int64_t *numbers;
    long width, length;
} pages;

/* One query of one head over the first `length` tokens of a slot; `p` are the slot's pages, the head's keys are `keys`
 * numbers into each of them and its values `values`. */
INLINE void attend_slot(const float *q, const pages *p, const int64_t *numbers, long keys, long values, float *rows,
                        long length, int size, float *out) {
    long end = (length + LANES - 1) / LANES * LANES;
    for (long start = 0; start < end; start += p->length) {
        const float *page = p->address[numbers[start / p->length]] + keys;
        long count = end - start < p->length ? end - start : p->length;
        for (long t = 0; t < count; t += LANES) {
            vec even[PARTS] = {}, odd[PARTS] = {};
            for (int d = 0; d < size; d += 2)
                for (int i = 0; i < PARTS; i++) {
                    const float *tile = page + t * size + d * LANES + i * VECTOR;
                    even[i] += q[d] * LOAD(tile);
                    odd[i] += q[d + 1] * LOAD(tile + LANES);
                }
            for (int i = 0; i < PARTS; i++) STORE(rows + start + t + i * VECTOR, even[i] + odd[i]);
        }
    }
    for (long t = length; t < end; t++) rows[t] = -1e30f;
    float share = 1 / grow(rows, end, peak_of(rows, end));
    const int across = ACROSS(size);
    for (int d = 0; d < size; d += across * VECTOR) {
        vec part[4][ABREAST] = {};
        for (long start = 0; start < length; start += p->length) {
            const float *page = p->address[numbers[start / p->length]] + values + d, *row = rows + start;
            long t = 0, count = length - start < p->length ? length - start : p->length;
            for (; t + 4 <= count; t += 4)
                for (int j = 0; j < 4; j++)
                    for (int i = 0; i < across; i++) part[j][i] += row[t + j] * LOAD(page + (t + j) * size + i * VECTOR);
            for (; t < count; t++)
                for (int i = 0; i < across; i++) part[0][i] += row[t] * LOAD(page + t * size + i * VECTOR);
        }
        for (int i = 0; i < across; i++)
            STORE(out + d + i * VECTOR, ((part[0][i] + part[1][i]) + (part[2][i] + part[3][i])) * share);
    }
}

/* Store new tokens' keys and values in their slots' pages, then attend from those that ask (`asking` gives their numbers
 * among the new tokens) to their slot up to themselves. */
INLINE void cached(const float *query, const float *key, const float *value, const float *cosine, const float *sine,
                   const pages *p, const int64_t *slots, const int64_t *positions, long tokens, const int64_t *asking,
                   long queries, int heads, int groups, int size, float scale, float *out) {
    long slab = p->length * size, values = groups * slab;
    float turned[size];
    for (long i = 0; i < tokens; i++) {
        float *page = p->address[p->numbers[slots[i] * p->width + positions[i] / p->length]];
        long place = positions[i] % p->length;
        for (int g = 0; g < groups; g++) {
            float *tile = page + g * slab + place / LANES * LANES * size + place % LANES;
            gather(turned, key + g * size, cosine, sine, 0, i, 1, tokens, (long)groups * size, size, 1);
            for (int d = 0; d < size; d++) tile[d * LANES] = turned[d];
            memcpy(page + values + g * slab + place * size, value + (i * groups + g) * size, size * sizeof(float));
        }
    }
    float *rows = scratch(p->width * p->length);
    for (long i = 0; i < queries; i++)
        for (int h = 0; h < heads; h++) {
            const int64_t *numbers = p->numbers + slots[asking[i]] * p->width;
            long at = h * groups / heads * slab;
            gather(turned, query + h * size, cosine, sine, asking, i, 1, queries, (long)heads * size, size, scale);
            attend_slot(turned, p, numbers, at, values + at, rows, positions[asking[i]] + 1, size,
                        out + (i * heads + h) * (long)size);
        }
    free(rows);
}

/* With the head size known, loops over it are unrolled and their sums stay in registers. */
#define FOR_SIZE(call)                                                                                                 \
    switch (size) {                                                                                                    \
    case 16: { enum { SIZE = 16 }; call; break; }                                                                      \
    case 32: { enum { SIZE = 32 }; call; break; }                                                                      \
    case 64: { enum { SIZE = 64 }; call; break; }                                                                      \
    case 128: { enum { SIZE = 128 }; call; break; }                                                                    \
    }

#define QKV const float *query, const float *key, const float *value, const float *cosine, const float *sine

#define SEQUENCES const int64_t *offsets, const int64_t *starts, const int64_t *where, long sequences, int heads, int groups
#define BATCH                                                                                                          \
    (batch) { query, key, value, cosine, sine, offsets, starts, where, sequences, heads, groups, scale }

void causal_forward(QKV, SEQUENCES, int size, float scale, float *out, float *logsum) {
    batch b = BATCH;
    FOR_SIZE(forward(&b, SIZE, out, logsum))
}

void causal_backward(QKV, SEQUENCES, int size, float scale, const float *out, const float *logsum, const float *to_out,
                     float *to_query, float *to_key, float *to_value) {
    batch b = BATCH;
    FOR_SIZE(backward(&b, SIZE, out, logsum, to_out, to_query, to_key, to_value))
}

void cached_forward(QKV, float *const *address, const int64_t *numbers, long width, long length,
                    const int64_t *slots, const int64_t *positions, long tokens, const int64_t *asking, long queries,
                    int heads, int groups, int size, float scale, float *out) {
    pages p = {address, numbers, width, length};
    FOR_SIZE(cached(query, key, value, cosine, sine, &p, slots, positions, tokens, asking, queries, heads, groups, SIZE,
                    scale, out))
}

/* Kernels over rows: everything that has a row for each token comes first, then how many rows and how wide. */

/* y = x / sqrt(mean x^2 + eps) * weight; `inverse` keeps 1 / sqrt(...) of each token. Width is a multiple of 16. */
void rms_norm_forward(const float *x, float *out, float *inverse, long tokens, long width, const float *weight,
                      float eps) {
    for (long i = 0; i < tokens; i++) {
        const float *row = x + i * width;
        vec sum[PARTS] = {};
        for (long d = 0; d < width; d += LANES)
            for (int j = 0; j < PARTS; j++) sum[j] += LOAD(row + d + j * VECTOR) * LOAD(row + d + j * VECTOR);
        float factor = inverse[i] = 1 / sqrtf(total(sum) / width + eps);
        for (long d = 0; d < width; d += VECTOR) STORE(out + i * width + d, LOAD(row + d) * factor * LOAD(weight + d));
    }
}

/* With n = x * inverse and s = to_out * weight: to_x = inverse (s - n mean(s n)), to_weight = sum to_out n. */
void rms_norm_backward(const float *x, const float *inverse, const float *to_out, float *to_x, long tokens, long width,
                       const float *weight, float *to_weight) {
    for (long i = 0; i < tokens; i++) {
        const float *row = x + i * width, *upper = to_out + i * width;
        float factor = inverse[i];
        vec sum[PARTS] = {};
        for (long c = 0; c < width; c += LANES)
            for (int j = 0; j < PARTS; j++) {
                long d = c + j * VECTOR;
                vec part = LOAD(upper + d) * LOAD(row + d) * factor;
                STORE(to_weight + d, LOAD(to_weight + d) + part);
                sum[j] += part * LOAD(weight + d);
            }
        float mean = total(sum) / width * factor;
        for (long d = 0; d < width; d += VECTOR)
            STORE(to_x + i * width + d, (LOAD(upper + d) * LOAD(weight + d) - LOAD(row + d) * mean) * factor);
    }
}

INLINE vec logistic(vec x) { /* exponential() wants x <= 0 */
    vec small = exponential((vec)((ivec)x | ((ivec){} + INT32_MIN))), upper = 1 / (1 + small);
    ivec negative = x < 0;
    return (vec)(((ivec)(small * upper) & negative) | ((ivec)upper & ~negative));
}

/* SwiGLU (arXiv 2002.05202): out = gate / (1 + exp(-gate)) * up. */
void swiglu_forward(const float *gate, const float *up, float *out, long tokens, long width) {
    for (long i = 0; i < tokens * width; i += VECTOR) {
        vec x = LOAD(gate + i);
        STORE(out + i, x * logistic(x) * LOAD(up + i));
    }
}

void swiglu_backward(const float *gate, const float *up, const float *to_out, float *to_gate, float *to_up, long tokens,
                     long width) {
    for (long i = 0; i < tokens * width; i += VECTOR) {
        vec x = LOAD(gate + i), upper = LOAD(to_out + i), open = logistic(x);
        STORE(to_up + i, upper * x * open);
        STORE(to_gate + i, upper * LOAD(up + i) * open * (1 + x * (1 - open)));
    }
}

/* The first `count` numbers at p, and a very small one in the lanes behind them. */
INLINE vec load_part(const float *p, long count) {
    if (count >= VECTOR) return LOAD(p);
    vec x = splat(-1e30f);
    for (long i = 0; i < count; i++) x[i] = p[i];
    return x;
}
INLINE void store_part(float *p, vec x, long count) {
    if (count >= VECTOR) STORE(p, x);
    else
        for (long i = 0; i < count; i++) p[i] = x[i];
}

typedef struct {
    float peak, mass, mean; /* largest x; sum of exp(x - peak); mean of x - peak under the distribution */
} moments;

/* Of the distribution with logits x * factor. Sums are taken in blocks, so that their error does not grow with the
 * vocabulary. With `grown` not null, exp(x - peak) is kept there. */
INLINE moments distribution(const float *x, long length, float factor, float *grown) {
    vec most = splat(-1e30f);
    for (long j = 0; j < length; j += VECTOR) most = larger(most, load_part(x + j, length - j));
    float peak = largest(most) * factor;
    double mass = 0, mean = 0;
    for (long block = 0; block < length; block += 64 * LANES) {
        vec sum[PARTS] = {}, weighted[PARTS] = {};
        for (long tile = block; tile < length && tile < block + 64 * LANES; tile += LANES)
            for (int k = 0; k < PARTS; k++) {
                long j = tile + k * VECTOR, left = length - j;
                vec below = larger(load_part(x + j, left) * factor - peak, splat(-200.0f)), p = exponential(below);
                if (left < VECTOR)
                    for (long i = left > 0 ? left : 0; i < VECTOR; i++) p[i] = 0;
                p = (vec)((ivec)p & (below > -87.0f)); /* exponential() ends at 2^-126; nothing impossible is drawn */
                if (grown) STORE(grown + j, p);
                sum[k] += p;
                weighted[k] += p * below;
            }
        mass += total(sum);
        mean += total(weighted);
    }
    return (moments){peak, (float)mass, (float)(mean / mass)};
}

/* Per row of logits: log-partition of the raw and of the tempered logits, the token's log-probability, the entropy. */
void score_forward(const float *logits, const int64_t *tokens, float *raw, float *normaliser, float *logprob,
                   float *entropy, long rows, long vocabulary, float factor) {
    for (long i = 0; i < rows; i++) {
        const float *x = logits + i * vocabulary;
        moments tempered = distribution(x, vocabulary, factor, 0);
        float log_mass = logf(tempered.mass);
        normaliser[i] = tempered.peak + log_mass;
        logprob[i] = x[tokens[i]] * factor - tempered.peak - log_mass;
        entropy[i] = log_mass - tempered.mean;
        raw[i] = normaliser[i];
        if (factor != 1) {
            moments plain = distribution(x, vocabulary, 1, 0);
            raw[i] = plain.peak + logf(plain.mass);
        }
    }
}

/* Turns logits into the slope of a loss that has the given slopes by log-probability, entropy and raw log-partition. */
void score_backward(float *logits, const int64_t *tokens, const float *raw, const float *normaliser,
                    const float *entropy, const float *to_logprob, const float *to_entropy, const float *to_raw,
                    long rows, long vocabulary, float factor) {
    for (long i = 0; i < rows; i++) {
        float *x = logits + i * vocabulary, by_logprob = to_logprob[i] * factor, by_entropy = to_entropy[i] * factor;
        for (long j = 0; j < vocabulary; j += VECTOR) {
            vec value = load_part(x + j, vocabulary - j);
            vec surprise = larger(value * factor - normaliser[i], splat(-200.0f));
            vec slope = -exponential(surprise) * (by_logprob + by_entropy * (surprise + entropy[i]));
            if (to_raw[i] != 0) slope += exponential(value - raw[i]) * to_raw[i];
            store_part(x + j, slope, vocabulary - j);
        }
        x[tokens[i]] += by_logprob;
    }
}

/* Invert each row's cumulative distribution at one uniform draw. */
void sample_forward(const float *logits, const double *draws, int64_t *token, float *logprob, float *entropy, long rows,
                    long vocabulary, float factor) {
    float *grown = scratch(vocabulary + LANES);
    for (long i = 0; i < rows; i++) {
        const float *x = logits + i * vocabulary;
        moments all = distribution(x, vocabulary, factor, grown);
        double mass = 0, below = 0;
        for (long j = 0; j < vocabulary; j += LANES) mass += total((const vec *)(grown + j));
        long chosen = 0;
        for (double block; chosen + LANES < vocabulary; chosen += LANES, below += block)
            if (below + (block = total((const vec *)(grown + chosen))) > draws[i] * mass) break;
        while (chosen < vocabulary - 1 && (below += grown[chosen]) <= draws[i] * mass) chosen++;
        token[i] = chosen;
        logprob[i] = x[chosen] * factor - all.peak - logf(all.mass);
        entropy[i] = logf(all.mass) - all.mean;
    }
    free(grown);
}
