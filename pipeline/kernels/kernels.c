/* What a small decoder spends its time on beside matrix products, in float32, on flat batches of tokens.
 *
 * PyTorch's attention pads all sequences to one length and works in blocks that are made for long ones; with heads of 16
 * numbers and episodes of some hundred tokens most of its time is overhead. Here one block of queries of one head stays in
 * registers while it walks over its sequence, position codes are applied on the way, and nothing is padded. Vectors are
 * GCC's (Clang has them, too); head sizes and widths are multiples of 16.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define QUERIES 4 /* queries that share each key and value read */

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))
#define LOAD(p) (*(const vec *)(p))
#define STORE(p, x) (*(vec *)(p) = (x))

INLINE vec splat(float x) { return x - (vec){}; }
INLINE vec larger(vec a, vec b) {
    ivec first = a > b;
    return (vec)(((ivec)a & first) | ((ivec)b & ~first));
}
INLINE float total(vec x) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}
INLINE float largest(vec x) {
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
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

/* rows[r][t] = sum_d a[r][d] x[d][t] for t < end, r < QUERIES; x has one row of `width` per d. */
INLINE void products(float *rows, const float *a, const float *x, long end, long width, int size) {
    for (long t = 0; t < end; t += 2 * LANES) {
        vec sum[QUERIES][2] = {};
        for (int d = 0; d < size; d++) {
            vec first = LOAD(x + d * width + t), second = LOAD(x + d * width + t + LANES);
            for (int r = 0; r < QUERIES; r++) {
                sum[r][0] += a[r * size + d] * first;
                sum[r][1] += a[r * size + d] * second;
            }
        }
        for (int r = 0; r < QUERIES; r++) {
            STORE(rows + r * width + t, sum[r][0]);
            STORE(rows + r * width + t + LANES, sum[r][1]);
        }
    }
}

/* out[r][:] = sum_t rows[r][t] x[t][:] for t < end; consecutive t are `stride` apart in x. */
INLINE void mixture(float *out, const float *rows, const float *x, long end, long width, long stride, int size) {
    for (int d = 0; d < size; d += LANES) {
        vec sum[QUERIES] = {};
        for (long t = 0; t < end; t++) {
            vec value = LOAD(x + t * stride + d);
            for (int r = 0; r < QUERIES; r++) sum[r] += rows[r * width + t] * value;
        }
        for (int r = 0; r < QUERIES; r++) STORE(out + r * size + d, sum[r]);
    }
}

/* into[t][:] += sum_r rows[r][t] a[r][:] for t < end. */
INLINE void spread(float *into, const float *rows, const float *a, long end, long width, int size) {
    for (int d = 0; d < size; d += LANES) {
        vec part[QUERIES];
        for (int r = 0; r < QUERIES; r++) part[r] = LOAD(a + r * size + d);
        for (long t = 0; t < end; t++) {
            vec sum = LOAD(into + t * size + d);
            for (int r = 0; r < QUERIES; r++) sum += rows[r * width + t] * part[r];
            STORE(into + t * size + d, sum);
        }
    }
}

/* x[d][t] of the tokens' x[t][d]; the columns behind the last token are zero. */
INLINE void turn(float *out, const float *x, long tokens, long width, long stride, int size) {
    for (int d = 0; d < size; d++) {
        for (long t = 0; t < tokens; t++) out[d * width + t] = x[t * stride + d];
        for (long t = tokens; t < width; t++) out[d * width + t] = 0;
    }
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

/* Queries may be those of some tokens only: `where` gives their numbers within their sequence, `starts` where each
 * sequence's queries begin. */
INLINE void forward(const float *query, const float *key, const float *value, const float *cosine, const float *sine,
                    const int64_t *offsets, const int64_t *starts, const int64_t *where, long sequences, int heads,
                    int groups, int size, float scale, float *out, float *logsum) {
    long longest = 0, q_stride = (long)heads * size, k_stride = (long)groups * size;
    for (long e = 0; e < sequences; e++)
        if (offsets[e + 1] - offsets[e] > longest) longest = offsets[e + 1] - offsets[e];
    long widest = whole(longest);
    float *keys = scratch(size * widest), *rows = scratch(QUERIES * widest), *q = scratch(2 * QUERIES * size);
    float *mixed = q + QUERIES * size, *turned = scratch(size * widest);
    for (long e = 0; e < sequences; e++) {
        long begin = offsets[e], tokens = offsets[e + 1] - begin, width = whole(tokens);
        const float *c = cosine ? cosine + begin * size : 0, *s = sine + begin * size;
        const int64_t *at = where + starts[e];
        long first = starts[e], asked = starts[e + 1] - first;
        for (int h = 0; h < heads; h++) {
            int g = h * groups / heads;
            const float *v = value + begin * k_stride + g * size;
            if (h * groups % heads == 0) {
                gather(turned, key + begin * k_stride + g * size, c, s, 0, 0, tokens, tokens, k_stride, size, 1);
                turn(keys, turned, tokens, width, size, size);
            }
            for (long i = 0; i < asked; i += QUERIES) {
                long seen = at[i + QUERIES < asked ? i + QUERIES - 1 : asked - 1] + 1, end = whole(seen);
                gather(q, query + first * q_stride + h * size, c, s, at, i, QUERIES, asked, q_stride, size, scale);
                products(rows, q, keys, end, width, size);
                float share[QUERIES];
                for (int r = 0; r < QUERIES; r++) {
                    float *row = rows + r * width;
                    for (long t = i + r < asked ? at[i + r] + 1 : 1; t < end; t++) row[t] = -1e30f;
                    vec most = LOAD(row);
                    for (long t = LANES; t < end; t += LANES) most = larger(most, LOAD(row + t));
                    float peak = largest(most);
                    vec sum = {};
                    for (long t = 0; t < end; t += LANES) {
                        vec p = exponential(LOAD(row + t) - peak);
                        sum += p;
                        STORE(row + t, p);
                    }
                    float mass = total(sum);
                    share[r] = 1 / mass;
                    if (i + r < asked) logsum[(first + i + r) * heads + h] = peak + logf(mass);
                }
                mixture(mixed, rows, v, seen, width, k_stride, size);
                for (int r = 0; r < QUERIES && i + r < asked; r++)
                    for (int d = 0; d < size; d++)
                        out[(first + i + r) * q_stride + h * size + d] = mixed[r * size + d] * share[r];
            }
        }
    }
    free(keys), free(rows), free(q), free(turned);
}

INLINE void backward(const float *query, const float *key, const float *value, const float *cosine, const float *sine,
                     const int64_t *offsets, const int64_t *starts, const int64_t *where, long sequences, int heads,
                     int groups, int size, float scale, const float *out, const float *logsum, const float *to_out,
                     float *to_query, float *to_key, float *to_value) {
    long longest = 0, q_stride = (long)heads * size, k_stride = (long)groups * size;
    for (long e = 0; e < sequences; e++)
        if (offsets[e + 1] - offsets[e] > longest) longest = offsets[e + 1] - offsets[e];
    long widest = whole(longest);
    float *keys = scratch(size * widest), *values = scratch(size * widest);
    float *key_sums = scratch(size * widest), *value_sums = scratch(size * widest);
    float *rows = scratch(QUERIES * widest), *slopes = scratch(QUERIES * widest);
    float *q = scratch(3 * QUERIES * size), *upper = q + QUERIES * size, *mixed = upper + QUERIES * size;
    float *turned = scratch(size * widest);
    for (long e = 0; e < sequences; e++) {
        long begin = offsets[e], tokens = offsets[e + 1] - begin, width = whole(tokens);
        const float *c = cosine ? cosine + begin * size : 0, *s = sine + begin * size;
        const int64_t *at = where + starts[e];
        long first = starts[e], asked = starts[e + 1] - first;
        for (int h = 0; h < heads; h++) {
            int g = h * groups / heads;
            if (h * groups % heads == 0) {
                gather(turned, key + begin * k_stride + g * size, c, s, 0, 0, tokens, tokens, k_stride, size, 1);
                turn(keys, turned, tokens, width, size, size);
                turn(values, value + begin * k_stride + g * size, tokens, width, k_stride, size);
                memset(key_sums, 0, size * width * sizeof(float));
                memset(value_sums, 0, size * width * sizeof(float));
            }
            for (long i = 0; i < asked; i += QUERIES) {
                long seen = at[i + QUERIES < asked ? i + QUERIES - 1 : asked - 1] + 1, end = whole(seen);
                long from = first * q_stride + h * size;
                gather(q, query + from, c, s, at, i, QUERIES, asked, q_stride, size, scale);
                gather(upper, to_out + from, 0, 0, at, i, QUERIES, asked, q_stride, size, 1);
                products(rows, q, keys, end, width, size);
                products(slopes, upper, values, end, width, size);
                for (int r = 0; r < QUERIES; r++) {
                    float *row = rows + r * width, *slope = slopes + r * width, mean = 0, mass = 0;
                    if (i + r < asked) {
                        mass = logsum[(first + i + r) * heads + h];
                        for (int d = 0; d < size; d++) mean += upper[r * size + d] * out[from + (i + r) * q_stride + d];
                    }
                    for (long t = i + r < asked ? at[i + r] + 1 : 0; t < end; t++) row[t] = -1e30f;
                    for (long t = 0; t < end; t += LANES) {
                        vec p = exponential(LOAD(row + t) - mass);
                        STORE(row + t, p);
                        STORE(slope + t, p * (LOAD(slope + t) - mean));
                    }
                }
                spread(value_sums, rows, upper, seen, width, size);
                spread(key_sums, slopes, q, seen, width, size);
                mixture(mixed, slopes, turned, seen, width, size, size);
                for (int r = 0; r < QUERIES && i + r < asked; r++)
                    rotate(to_query + from + (i + r) * q_stride, mixed + r * size, c ? c + at[i + r] * size : 0,
                           s + at[i + r] * size, size, scale, 1);
            }
            if ((h + 1) * groups % heads == 0)
                for (long t = 0; t < tokens; t++) {
                    long to = (begin + t) * k_stride + g * size;
                    rotate(to_key + to, key_sums + t * size, c ? c + t * size : 0, s + t * size, size, 1, 1);
                    memcpy(to_value + to, value_sums + t * size, size * sizeof(float));
                }
        }
    }
    free(keys), free(values), free(key_sums), free(value_sums), free(rows), free(slopes), free(q), free(turned);
}

/* One query of one head over the first `length` tokens of a slot: keys in tiles [length / 16][size][16], values as
 * [length][size]. */
INLINE void attend_slot(const float *q, const float *keys, const float *values, float *rows, long length, int size,
                        float *out) {
    long end = (length + LANES - 1) / LANES * LANES;
    vec most = splat(-1e30f);
    for (long t = 0; t < end; t += LANES) {
        vec even = {}, odd = {};
        const float *tile = keys + t * size;
        for (int d = 0; d < size; d += 2) {
            even += q[d] * LOAD(tile + d * LANES);
            odd += q[d + 1] * LOAD(tile + (d + 1) * LANES);
        }
        vec score = even + odd;
        if (t + LANES > length)
            for (int i = (int)(length - t); i < LANES; i++) score[i] = -1e30f;
        most = larger(most, score);
        STORE(rows + t, score);
    }
    float peak = largest(most);
    vec sum = {};
    for (long t = 0; t < end; t += LANES) {
        vec p = exponential(LOAD(rows + t) - peak);
        sum += p;
        STORE(rows + t, p);
    }
    float share = 1 / total(sum);
    for (int d = 0; d < size; d += LANES) {
        vec part[4] = {};
        long t = 0;
        for (; t + 4 <= length; t += 4)
            for (int j = 0; j < 4; j++) part[j] += rows[t + j] * LOAD(values + (t + j) * size + d);
        for (; t < length; t++) part[0] += rows[t] * LOAD(values + t * size + d);
        STORE(out + d, ((part[0] + part[1]) + (part[2] + part[3])) * share);
    }
}

/* Store new tokens' keys and values in their slots, then attend from those that ask (`asking` gives their numbers among
 * the new tokens) to their slot up to themselves. */
INLINE void cached(const float *query, const float *key, const float *value, const float *cosine, const float *sine,
                   float *keys, float *values, const int64_t *slots, const int64_t *positions, long tokens,
                   const int64_t *asking, long queries, long capacity, int heads, int groups, int size, float scale,
                   float *out) {
    long slab = capacity * size;
    float turned[size];
    for (long i = 0; i < tokens; i++)
        for (int g = 0; g < groups; g++) {
            long position = positions[i], at = (slots[i] * groups + g) * slab;
            float *tile = keys + at + position / LANES * LANES * size + position % LANES;
            gather(turned, key + g * size, cosine, sine, 0, i, 1, tokens, (long)groups * size, size, 1);
            for (int d = 0; d < size; d++) tile[d * LANES] = turned[d];
            memcpy(values + at + position * size, value + (i * groups + g) * size, size * sizeof(float));
        }
    float *rows = scratch(capacity);
    for (long i = 0; i < queries; i++)
        for (int h = 0; h < heads; h++) {
            long at = (slots[asking[i]] * groups + h * groups / heads) * slab;
            gather(turned, query + h * size, cosine, sine, asking, i, 1, queries, (long)heads * size, size, scale);
            attend_slot(turned, keys + at, values + at, rows, positions[asking[i]] + 1, size,
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

void causal_forward(QKV, const int64_t *offsets, const int64_t *starts, const int64_t *where, long sequences, int heads,
                    int groups, int size, float scale, float *out, float *logsum) {
    FOR_SIZE(forward(query, key, value, cosine, sine, offsets, starts, where, sequences, heads, groups, SIZE, scale, out,
                     logsum))
}

void causal_backward(QKV, const int64_t *offsets, const int64_t *starts, const int64_t *where, long sequences, int heads,
                     int groups, int size, float scale, const float *out, const float *logsum, const float *to_out,
                     float *to_query, float *to_key, float *to_value) {
    FOR_SIZE(backward(query, key, value, cosine, sine, offsets, starts, where, sequences, heads, groups, SIZE, scale, out,
                      logsum, to_out, to_query, to_key, to_value))
}

void cached_forward(QKV, float *keys, float *values, const int64_t *slots, const int64_t *positions, long tokens,
                    const int64_t *asking, long queries, long capacity, int heads, int groups, int size, float scale,
                    float *out) {
    FOR_SIZE(cached(query, key, value, cosine, sine, keys, values, slots, positions, tokens, asking, queries, capacity,
                    heads, groups, SIZE, scale, out))
}

/* y = x / sqrt(mean x^2 + eps) * weight; `inverse` keeps 1 / sqrt(...) of each token. Width is a multiple of 16. */
void rms_norm_forward(const float *x, const float *weight, long tokens, long width, float eps, float *out,
                      float *inverse) {
    for (long i = 0; i < tokens; i++) {
        const float *row = x + i * width;
        vec sum = {};
        for (long d = 0; d < width; d += LANES) sum += LOAD(row + d) * LOAD(row + d);
        float factor = inverse[i] = 1 / sqrtf(total(sum) / width + eps);
        for (long d = 0; d < width; d += LANES) STORE(out + i * width + d, LOAD(row + d) * factor * LOAD(weight + d));
    }
}

/* With n = x * inverse and s = to_out * weight: to_x = inverse (s - n mean(s n)), to_weight = sum to_out n. */
void rms_norm_backward(const float *x, const float *weight, const float *inverse, const float *to_out, long tokens,
                       long width, float *to_x, float *to_weight) {
    for (long i = 0; i < tokens; i++) {
        const float *row = x + i * width, *upper = to_out + i * width;
        float factor = inverse[i];
        vec sum = {};
        for (long d = 0; d < width; d += LANES) {
            vec part = LOAD(upper + d) * LOAD(row + d) * factor;
            STORE(to_weight + d, LOAD(to_weight + d) + part);
            sum += part * LOAD(weight + d);
        }
        float mean = total(sum) / width * factor;
        for (long d = 0; d < width; d += LANES)
            STORE(to_x + i * width + d, (LOAD(upper + d) * LOAD(weight + d) - LOAD(row + d) * mean) * factor);
    }
}

INLINE vec logistic(vec x) { /* exponential() wants x <= 0 */
    vec small = exponential((vec)((ivec)x | ((ivec){} + INT32_MIN))), upper = 1 / (1 + small);
    ivec negative = x < 0;
    return (vec)(((ivec)(small * upper) & negative) | ((ivec)upper & ~negative));
}

/* SwiGLU (arXiv 2002.05202): out = gate / (1 + exp(-gate)) * up. Lengths are multiples of 16. */
void swiglu_forward(const float *gate, const float *up, long length, float *out) {
    for (long i = 0; i < length; i += LANES) {
        vec x = LOAD(gate + i);
        STORE(out + i, x * logistic(x) * LOAD(up + i));
    }
}

void swiglu_backward(const float *gate, const float *up, const float *to_out, long length, float *to_gate, float *to_up) {
    for (long i = 0; i < length; i += LANES) {
        vec x = LOAD(gate + i), upper = LOAD(to_out + i), open = logistic(x);
        STORE(to_up + i, upper * x * open);
        STORE(to_gate + i, upper * LOAD(up + i) * open * (1 + x * (1 - open)));
    }
}

/* The first `count` numbers at p, and a very small one in the lanes behind them. */
INLINE vec load_part(const float *p, long count) {
    if (count >= LANES) return LOAD(p);
    vec x = splat(-1e30f);
    for (long i = 0; i < count; i++) x[i] = p[i];
    return x;
}
INLINE void store_part(float *p, vec x, long count) {
    if (count >= LANES) STORE(p, x);
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
    for (long j = 0; j < length; j += LANES) most = larger(most, load_part(x + j, length - j));
    float peak = largest(most) * factor;
    double mass = 0, mean = 0;
    for (long block = 0; block < length; block += 64 * LANES) {
        vec sum = {}, weighted = {};
        for (long j = block; j < length && j < block + 64 * LANES; j += LANES) {
            vec below = larger(load_part(x + j, length - j) * factor - peak, splat(-200.0f)), p = exponential(below);
            if (length - j < LANES)
                for (long i = length - j; i < LANES; i++) p[i] = 0;
            p = (vec)((ivec)p & (below > -87.0f)); /* exponential() ends at 2^-126; nothing impossible is drawn */
            if (grown) STORE(grown + j, p);
            sum += p;
            weighted += p * below;
        }
        mass += total(sum);
        mean += total(weighted);
    }
    return (moments){peak, (float)mass, (float)(mean / mass)};
}

/* Per row of logits: log-partition of the raw and of the tempered logits, the token's log-probability, the entropy. */
void score_forward(const float *logits, const int64_t *tokens, long rows, long vocabulary, float factor, float *raw,
                   float *normaliser, float *logprob, float *entropy) {
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
void score_backward(float *logits, const int64_t *tokens, long rows, long vocabulary, float factor, const float *raw,
                    const float *normaliser, const float *entropy, const float *to_logprob, const float *to_entropy,
                    const float *to_raw) {
    for (long i = 0; i < rows; i++) {
        float *x = logits + i * vocabulary, by_logprob = to_logprob[i] * factor, by_entropy = to_entropy[i] * factor;
        for (long j = 0; j < vocabulary; j += LANES) {
            vec value = load_part(x + j, vocabulary - j), surprise = value * factor - normaliser[i];
            vec slope = -exponential(surprise) * (by_logprob + by_entropy * (surprise + entropy[i]));
            if (to_raw[i] != 0) slope += exponential(value - raw[i]) * to_raw[i];
            store_part(x + j, slope, vocabulary - j);
        }
        x[tokens[i]] += by_logprob;
    }
}

/* Invert each row's cumulative distribution at one uniform draw. */
void sample_forward(const float *logits, long rows, long vocabulary, float factor, const double *draws, int64_t *token,
                    float *logprob, float *entropy) {
    float *grown = scratch(vocabulary + LANES);
    for (long i = 0; i < rows; i++) {
        const float *x = logits + i * vocabulary;
        moments all = distribution(x, vocabulary, factor, grown);
        double mass = 0, below = 0;
        for (long j = 0; j < vocabulary; j += LANES) mass += total(LOAD(grown + j));
        long chosen = 0;
        for (double block; chosen + LANES < vocabulary; chosen += LANES, below += block)
            if (below + (block = total(LOAD(grown + chosen))) > draws[i] * mass) break;
        while (chosen < vocabulary - 1 && (below += grown[chosen]) <= draws[i] * mass) chosen++;
        token[i] = chosen;
        logprob[i] = x[chosen] * factor - all.peak - logf(all.mass);
        entropy[i] = logf(all.mass) - all.mean;
    }
    free(grown);
}
