/* The decoder's operations between its matrix products, for elementwise.py: the numbers of the PyTorch definitions in
   ops.py, dropout.py and loss.py.

       h = x + y, n = w h / rms(h)       x cos + rotated(x) sin       silu(gate) up       softmax, its loss and gradient
       x where Philox keeps it

   What must move is each operand once and each result once. For 512 tokens in bfloat16, at 10 GB/s of one core:

       add_norm       width 2048                  x, y -> h, n                      8 MB    0.8 ms
       backward       width 2048                  h, dn, dh -> dx                   8 MB    0.8 ms
       rope           32 and 4 heads of 64        q, k -> q', k'                    5 MB    0.5 ms
       swiglu         width 5632                  gate, up -> y                    17 MB    1.7 ms
       backward       width 5632                  dy, gate, up -> dgate, dup       29 MB    2.9 ms
       cross-entropy  32000 logits, float32       z -> dz                         131 MB     13 ms
       dropout        width 2048                  x -> x'                           4 MB    0.4 ms

   PyTorch runs an operation at a time, and moves what lies between them, in float32. Here a row of a few kilobytes is
   read from memory once, and its second and third reading find it in the first level of the cache.

   Rounding. Numbers are float32 while they are computed with, and are rounded to the dtype wherever an operation of
   the definition ends. Sums alone are taken in another order: LANES sums side by side over SECTION numbers each, then
   added in double precision. So a sum of n numbers of one sign is off by at most

       (SECTION / LANES + log2 LANES + 1) units of 2^-24 = 38 2^-24,    whatever n is.

   No result depends on the number of threads: no sum is shared between them.

   The loops are written so that a compiler turns them into vector instructions of any width. `load`, `store` and
   `rounded` are told the dtype as a constant, once the compiler has put them in their place. */

enum { SECTION = 1024, SPAN = 4096 };   /* numbers that are summed in float32; and of a piece of swiglu */

#define INLINE static inline __attribute__((always_inline))

typedef enum dtype { FP32, BF16, FP16 } dtype;          /* as in elementwise.py */

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* to nearest, ties to even; a NaN, which is a quiet one after any arithmetic, is cut: rounding could end in a number */
INLINE uint16_t nearest_bf16(float x) {
    uint32_t bits = as_bits(x), is_nan = (bits & 0x7fffffff) > 0x7f800000;
    return (uint16_t)((bits + (is_nan ? 0 : 0x7fff + (bits >> 16 & 1))) >> 16);
}

INLINE float load(dtype d, const void *x, int64_t i) {
    switch (d) {
    case BF16: return load_bf16(((const uint16_t *)x)[i]);
#if defined(__FLT16_MAX__)
    case FP16: return load_fp16(((const _Float16 *)x)[i]);
#endif
    default: return ((const float *)x)[i];
    }
}

INLINE void store(dtype d, void *x, int64_t i, float value) {
    switch (d) {
    case BF16: ((uint16_t *)x)[i] = nearest_bf16(value); break;
#if defined(__FLT16_MAX__)
    case FP16: ((_Float16 *)x)[i] = store_fp16(value); break;
#endif
    default: ((float *)x)[i] = value;
    }
}

INLINE float rounded(dtype d, float x) {
    switch (d) {
    case BF16: return load_bf16(nearest_bf16(x));
#if defined(__FLT16_MAX__)
    case FP16: return load_fp16(store_fp16(x));
#endif
    default: return x;
    }
}

/* run_NAME, with the dtype as a constant in each of three copies of NAME */
#define FOR_EACH_DTYPE(NAME)                                    \
    static void run_##NAME(const task *t) {                     \
        switch (t->dtype) {                                     \
        case FP32: NAME(t, FP32); break;                        \
        case BF16: NAME(t, BF16); break;                        \
        default: NAME(t, FP16); break;                          \
        }                                                       \
    }

INLINE float sum_of_lanes(float *lanes) {
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            lanes[i] += lanes[i + half];
    return lanes[0];
}

/* exp(x) for any x, within 1.03 units in the last place (found by trying all float32 numbers), and 0, infinity and NaN
   where they belong. With x = n ln 2 + r, |r| <= ln 2 / 2: exp(x) = 2^n exp(r), and exp(r) is a polynomial of degree 6
   whose own error is 2^-28. Its coefficients minimize the largest relative error. 2^n comes in two factors: n may be
   128, and it may be so small that the result is subnormal. */
INLINE float exponential(float x) {
    const float shift = 12582912.0f;            /* 1.5 2^23: a sum with it is rounded to a whole number */
    x = x < -104.0f ? -104.0f : x;              /* below it 0, above 89 infinity; NaN passes both */
    x = x > 89.0f ? 89.0f : x;
    float shifted = fmaf(x, 1.44269504f, shift), n = shifted - shift;
    float r = fmaf(n, -0x1.62e43p-1f, x);       /* ln 2 in two parts; the first product is subtracted without error */
    r = fmaf(n, 0x1.05c610p-29f, r);
    float p = fmaf(r, 0.0013814539f, 0.008368745f);
    p = fmaf(p, r, 0.04166839f);
    p = fmaf(p, r, 0.1666652f);
    p = fmaf(p, r, 0.49999994f);
    p = fmaf(p * r, r, r) + 1.0f;
    int32_t exponent = (int32_t)(as_bits(shifted) - as_bits(shift)), half = exponent >> 1;
    return p * as_float((uint32_t)(127 + half) << 23) * as_float((uint32_t)(127 + exponent - half) << 23);
}

/* ---- RMSNorm, with the sum before it -------------------------------------------------------------------------------- */

typedef struct norm {
    int64_t width;                      /* of a row, D */
    float eps;
    const void *x, *y, *weight;         /* (rows, D); (rows, D) or NULL; (D,) */
    void *h, *n;                        /* (rows, D): x + y, which is x without y; and its norm */
    float *inverse;                     /* (rows,): 1 / rms(h) */
    const void *dn, *dh;                /* backward: (rows, D); (rows, D) or NULL */
    void *dx;                           /* backward: (rows, D) */
} norm;

INLINE float sum_of_squares(const void *h, int64_t first, int64_t last, dtype d) {
    double sum = 0;
    while (first < last) {
        int64_t end = smaller(last, first + SECTION);
        float lanes[LANES] = {0};
        for (; first + LANES <= end; first += LANES)
            for (int i = 0; i < LANES; i++)
                lanes[i] += load(d, h, first + i) * load(d, h, first + i);
        for (int i = 0; first < end; first++, i++)
            lanes[i] += load(d, h, first) * load(d, h, first);
        sum += sum_of_lanes(lanes);
    }
    return (float)sum;
}

INLINE void add_norm_rows(const task *t, dtype d) {
    const norm o = *(const norm *)t->operands;
    for (int64_t row = t->first; row < t->last; row++) {
        int64_t first = row * o.width, last = first + o.width;
        if (o.y) {
#pragma GCC ivdep
            for (int64_t i = first; i < last; i++)
                store(d, o.h, i, load(d, o.x, i) + load(d, o.y, i));
        }
        const void *h = o.y ? o.h : o.x;
        float inverse = 1.0f / sqrtf(sum_of_squares(h, first, last, d) / (float)o.width + o.eps);
        o.inverse[row] = inverse;
#pragma GCC ivdep
        for (int64_t i = first; i < last; i++)
            store(d, o.n, i, load(d, o.weight, i - first) * rounded(d, load(d, h, i) * inverse));
    }
}
FOR_EACH_DTYPE(add_norm_rows)

/* with g = w dn and n = h / rms(h): g, n g, and (g - n mean(n g)) / rms(h), of element i in the row that begins at `start` */
INLINE float weighted(const norm *o, int64_t start, int64_t i, dtype d) {
    return load(d, o->dn, i) * load(d, o->weight, i - start);
}

INLINE float term_of_mean(const norm *o, int64_t start, int64_t i, float inverse, dtype d) {
    return load(d, o->x, i) * inverse * weighted(o, start, i, d);
}

INLINE float gradient(const norm *o, int64_t start, int64_t i, float inverse, float mean, dtype d) {
    return (weighted(o, start, i, d) - load(d, o->x, i) * inverse * mean) * inverse;
}

INLINE float mean_of_products(const norm *o, int64_t start, float inverse, dtype d) {
    int64_t first = start, last = start + o->width;
    double sum = 0;
    while (first < last) {
        int64_t end = smaller(last, first + SECTION);
        float lanes[LANES] = {0};
        for (; first + LANES <= end; first += LANES)
            for (int i = 0; i < LANES; i++)
                lanes[i] += term_of_mean(o, start, first + i, inverse, d);
        for (int i = 0; first < end; first++, i++)
            lanes[i] += term_of_mean(o, start, first, inverse, d);
        sum += sum_of_lanes(lanes);
    }
    return (float)sum / (float)o->width;
}

INLINE void add_norm_backward_rows(const task *t, dtype d) {
    const norm o = *(const norm *)t->operands;
    for (int64_t row = t->first; row < t->last; row++) {
        int64_t first = row * o.width, last = first + o.width;
        float inverse = o.inverse[row], mean = mean_of_products(&o, first, inverse, d);
        if (o.dh) {
#pragma GCC ivdep
            for (int64_t i = first; i < last; i++)
                store(d, o.dx, i, gradient(&o, first, i, inverse, mean, d) + load(d, o.dh, i));
        } else {
#pragma GCC ivdep
            for (int64_t i = first; i < last; i++)
                store(d, o.dx, i, gradient(&o, first, i, inverse, mean, d));
        }
    }
}
FOR_EACH_DTYPE(add_norm_backward_rows)

void add_norm(int dtype, int64_t rows, int64_t width, const void *x, const void *y, const void *weight, float eps, void *h,
              void *n, float *inverse, int threads) {
    norm o = {.width = width, .eps = eps, .x = x, .y = y, .weight = weight, .h = h, .n = n, .inverse = inverse};
    share_blocks((task){.run = run_add_norm_rows, .dtype = dtype, .operands = &o}, rows, threads);
}

void add_norm_backward(int dtype, int64_t rows, int64_t width, const void *h, const void *weight, float *inverse,
                       const void *dn, const void *dh, void *dx, int threads) {
    norm o = {.width = width, .x = h, .weight = weight, .inverse = inverse, .dn = dn, .dh = dh, .dx = dx};
    share_blocks((task){.run = run_add_norm_backward_rows, .dtype = dtype, .operands = &o}, rows, threads);
}

/* ---- RoPE ----------------------------------------------------------------------------------------------------------- */

typedef struct heads {
    const void *x;                      /* (Bt, T, heads, K), with these strides and 1 */
    int64_t heads, batch_stride, token_stride, head_stride;
    void *out;                          /* (Bt, T, heads, K) */
} heads;

typedef struct rotation {
    heads q, k;
    int64_t tokens, width;              /* T, K */
    const void *cos, *sin;              /* (Bt or 1, T, K) */
    int64_t angle_stride;               /* from one example's angles to the next one's: T K, or 0 */
    float sign;                         /* -1: the opposite angles */
} rotation;

/* one half of a head: x cos + turned sin, where `turned` is the other half, and for the left half its negative */
INLINE void rotate_half(const void *x, int64_t to, int64_t from, float sign, const rotation *o, int64_t angle, void *out,
                        int64_t at, dtype d) {
#pragma GCC ivdep
    for (int64_t i = 0; i < o->width / 2; i++) {
        float straight = rounded(d, load(d, x, to + i) * load(d, o->cos, angle + i));
        float turned = rounded(d, load(d, x, from + i) * (sign * load(d, o->sin, angle + i)));
        store(d, out, at + i, straight + turned);
    }
}

INLINE void rotate_heads(const heads *x, const rotation *o, int64_t batch, int64_t token, dtype d) {
    int64_t half = o->width / 2, angle = batch * o->angle_stride + token * o->width;
    int64_t from = batch * x->batch_stride + token * x->token_stride;
    int64_t at = (batch * o->tokens + token) * x->heads * o->width;
    for (int64_t head = 0; head < x->heads; head++, from += x->head_stride, at += o->width) {
        rotate_half(x->x, from, from + half, -o->sign, o, angle, x->out, at, d);
        rotate_half(x->x, from + half, from, o->sign, o, angle + half, x->out, at + half, d);
    }
}

INLINE void rope_tokens(const task *t, dtype d) {
    const rotation o = *(const rotation *)t->operands;
    for (int64_t i = t->first; i < t->last; i++) {
        rotate_heads(&o.q, &o, i / o.tokens, i % o.tokens, d);
        rotate_heads(&o.k, &o, i / o.tokens, i % o.tokens, d);
    }
}
FOR_EACH_DTYPE(rope_tokens)

/* q_sizes, k_sizes: heads, and the strides of batch, token and head */
void rope(int dtype, int64_t batch, int64_t tokens, int64_t width, const void *q, const int64_t *q_sizes, const void *k,
          const int64_t *k_sizes, const void *cos, const void *sin, int64_t angle_stride, float sign, void *q_out,
          void *k_out, int threads) {
    rotation o = {.q = {q, q_sizes[0], q_sizes[1], q_sizes[2], q_sizes[3], q_out},
                  .k = {k, k_sizes[0], k_sizes[1], k_sizes[2], k_sizes[3], k_out}, .tokens = tokens, .width = width,
                  .cos = cos, .sin = sin, .angle_stride = angle_stride, .sign = sign};
    share_blocks((task){.run = run_rope_tokens, .dtype = dtype, .operands = &o}, batch * tokens, threads);
}

/* ---- SwiGLU --------------------------------------------------------------------------------------------------------- */

typedef struct gated {
    int64_t n;
    const void *gate, *up, *dy;         /* (n,) */
    void *y, *dgate, *dup;              /* (n,) */
} gated;

INLINE void swiglu_spans(const task *t, dtype d) {
    const gated o = *(const gated *)t->operands;
    int64_t last = smaller(o.n, t->last * SPAN);
#pragma GCC ivdep
    for (int64_t i = t->first * SPAN; i < last; i++) {
        float gate = load(d, o.gate, i), silu = gate / (1.0f + exponential(-gate));
        store(d, o.y, i, rounded(d, silu) * load(d, o.up, i));
    }
}
FOR_EACH_DTYPE(swiglu_spans)

INLINE void swiglu_backward_spans(const task *t, dtype d) {
    const gated o = *(const gated *)t->operands;
    int64_t last = smaller(o.n, t->last * SPAN);
#pragma GCC ivdep
    for (int64_t i = t->first * SPAN; i < last; i++) {
        float gate = load(d, o.gate, i), dy = load(d, o.dy, i);
        float divisor = 1.0f + exponential(-gate), s = 1.0f / divisor, silu = gate / divisor;
        float dsilu = rounded(d, dy * load(d, o.up, i));
        store(d, o.dgate, i, dsilu * s * (1.0f + gate * (1.0f - s)));
        store(d, o.dup, i, rounded(d, silu) * dy);
    }
}
FOR_EACH_DTYPE(swiglu_backward_spans)

void swiglu(int dtype, int64_t n, const void *gate, const void *up, void *y, int threads) {
    gated o = {.n = n, .gate = gate, .up = up, .y = y};
    share_blocks((task){.run = run_swiglu_spans, .dtype = dtype, .operands = &o}, (n + SPAN - 1) / SPAN, threads);
}

void swiglu_backward(int dtype, int64_t n, const void *dy, const void *gate, const void *up, void *dgate, void *dup,
                     int threads) {
    gated o = {.n = n, .gate = gate, .up = up, .dy = dy, .dgate = dgate, .dup = dup};
    share_blocks((task){.run = run_swiglu_backward_spans, .dtype = dtype, .operands = &o}, (n + SPAN - 1) / SPAN, threads);
}

/* ---- cross-entropy -------------------------------------------------------------------------------------------------- */

typedef struct predictions {
    int64_t width;                      /* of a row, V */
    float *logits;                      /* (rows, V), then their gradient */
    const int64_t *targets;             /* (rows,) */
    float *losses;                      /* (rows,) */
} predictions;

/* NaN is passed over, and comes back in the sum */
INLINE float largest(const float *z, int64_t n) {
    float lanes[LANES], most = -INFINITY;
    int64_t first = 0;
    for (int i = 0; i < LANES; i++)
        lanes[i] = -INFINITY;
    for (; first + LANES <= n; first += LANES)
        for (int i = 0; i < LANES; i++)
            lanes[i] = z[first + i] > lanes[i] ? z[first + i] : lanes[i];
    for (; first < n; first++)
        most = z[first] > most ? z[first] : most;
    for (int i = 0; i < LANES; i++)
        most = lanes[i] > most ? lanes[i] : most;
    return most;
}

/* z -> exp(z - most); returns their sum */
INLINE float exponentials(float *z, int64_t n, float most) {
    double sum = 0;
    for (int64_t first = 0; first < n;) {
        int64_t end = smaller(n, first + SECTION);
        float lanes[LANES] = {0};
        for (; first + LANES <= end; first += LANES)
            for (int i = 0; i < LANES; i++)
                lanes[i] += z[first + i] = exponential(z[first + i] - most);
        for (int i = 0; first < end; first++, i++)
            lanes[i] += z[first] = exponential(z[first] - most);
        sum += sum_of_lanes(lanes);
    }
    return (float)sum;
}

static void run_cross_entropy(const task *t) {
    const predictions o = *(const predictions *)t->operands;
    for (int64_t row = t->first; row < t->last; row++) {
        float *z = o.logits + row * o.width, most = largest(z, o.width);
        float picked = z[o.targets[row]] - most, sum = exponentials(z, o.width, most), inverse = 1.0f / sum;
        for (int64_t i = 0; i < o.width; i++)
            z[i] *= inverse;
        z[o.targets[row]] -= 1.0f;
        o.losses[row] = logf(sum) - picked;
    }
}

void cross_entropy(int64_t rows, int64_t width, float *logits, const int64_t *targets, float *losses, int threads) {
    predictions o = {.width = width, .logits = logits, .targets = targets, .losses = losses};
    share_blocks((task){.run = run_cross_entropy, .operands = &o}, rows, threads);
}

/* ---- dropout: see dropout.py ---------------------------------------------------------------------------------------- */

enum { COUNTERS = 16, DRAWS = 8 * COUNTERS };   /* of Philox at a time; 16 bits for each of so many columns */

typedef struct dropped {
    int64_t width;                      /* of a row */
    const void *x;                      /* (rows, width) */
    void *out;                          /* (rows, width) */
    uint64_t seed;
    uint32_t stream, threshold;
} dropped;

/* Philox-4x32-10 of the counters (group + i, row, stream, 0), i < COUNTERS -> their 128 bits each, in order */
#if defined(__AVX512F__)
INLINE void philox(uint64_t seed, uint32_t group, uint32_t row, uint32_t stream, uint32_t *words) {
    /* Eight counters in lanes of 64 bits. Their upper halves hold anything: a product reads the lower ones only. */
    const __m512i multiplier0 = _mm512_set1_epi64(0xd2511f53), multiplier1 = _mm512_set1_epi64(0xcd9e8d57);
    const __m512i lower = _mm512_set1_epi64(0xffffffff), eight = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), second = first + _mm512_set1_epi64(4);
    for (int i = 0; i < COUNTERS; i += 8) {
        __m512i c0 = _mm512_set1_epi64(group + (uint32_t)i) + eight, c1 = _mm512_set1_epi64(row);
        __m512i c2 = _mm512_set1_epi64(stream), c3 = _mm512_setzero_si512();
        uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
        for (int round = 0; round < 10; round++, k0 += 0x9e3779b9, k1 += 0xbb67ae85) {
            __m512i product0 = _mm512_mul_epu32(c0, multiplier0), product1 = _mm512_mul_epu32(c2, multiplier1);
            c0 = _mm512_srli_epi64(product1, 32) ^ c1 ^ _mm512_set1_epi64(k0);
            c2 = _mm512_srli_epi64(product0, 32) ^ c3 ^ _mm512_set1_epi64(k1);
            c1 = product1;
            c3 = product0;
        }
        c0 = _mm512_slli_epi64(c1, 32) | (c0 & lower);      /* words 0 and 1 of each counter; and 2 and 3 */
        c2 = _mm512_slli_epi64(c3, 32) | (c2 & lower);
        _mm512_storeu_si512(words + 4 * i, _mm512_permutex2var_epi64(c0, first, c2));
        _mm512_storeu_si512(words + 4 * i + 16, _mm512_permutex2var_epi64(c0, second, c2));
    }
}
#else
INLINE void philox(uint64_t seed, uint32_t group, uint32_t row, uint32_t stream, uint32_t *words) {
    for (int i = 0; i < COUNTERS; i++) {
        uint32_t c0 = group + (uint32_t)i, c1 = row, c2 = stream, c3 = 0;
        uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma GCC unroll 10
        for (int round = 0; round < 10; round++) {
            uint64_t product0 = (uint64_t)c0 * 0xd2511f53, product1 = (uint64_t)c2 * 0xcd9e8d57;
            c0 = (uint32_t)(product1 >> 32) ^ c1 ^ k0;
            c2 = (uint32_t)(product0 >> 32) ^ c3 ^ k1;
            c1 = (uint32_t)product1;
            c3 = (uint32_t)product0;
            k0 += 0x9e3779b9;
            k1 += 0xbb67ae85;
        }
        words[4 * i] = c0;
        words[4 * i + 1] = c1;
        words[4 * i + 2] = c2;
        words[4 * i + 3] = c3;
    }
}
#endif

/* 1 for each of DRAWS columns that is kept, else 0: the lower half of a word is drawn for the column before */
INLINE void draw(const dropped *o, int64_t row, int64_t first, float *kept) {
    uint32_t words[DRAWS / 2];
    philox(o->seed, (uint32_t)(first / 8), (uint32_t)row, o->stream, words);
    for (int i = 0; i < DRAWS / 2; i++) {
        kept[2 * i] = (words[i] & 0xffff) >= o->threshold ? 1.0f : 0.0f;
        kept[2 * i + 1] = words[i] >> 16 >= o->threshold ? 1.0f : 0.0f;
    }
}

INLINE void dropout_rows(const task *t, dtype d) {
    const dropped o = *(const dropped *)t->operands;
    float kept[DRAWS];
    for (int64_t row = t->first; row < t->last; row++)
        for (int64_t first = 0; first < o.width; first += DRAWS) {
            int64_t at = row * o.width + first, count = smaller(DRAWS, o.width - first);
            draw(&o, row, first, kept);
#pragma GCC ivdep
            for (int64_t i = 0; i < count; i++)
                store(d, o.out, at + i, load(d, o.x, at + i) * kept[i]);
        }
}
FOR_EACH_DTYPE(dropout_rows)

INLINE void add_dropped_rows(const task *t, dtype d) {
    const dropped o = *(const dropped *)t->operands;
    float kept[DRAWS];
    for (int64_t row = t->first; row < t->last; row++)
        for (int64_t first = 0; first < o.width; first += DRAWS) {
            int64_t at = row * o.width + first, count = smaller(DRAWS, o.width - first);
            draw(&o, row, first, kept);
#pragma GCC ivdep
            for (int64_t i = 0; i < count; i++)
                store(d, o.out, at + i, load(d, o.out, at + i) + load(d, o.x, at + i) * kept[i]);
        }
}
FOR_EACH_DTYPE(add_dropped_rows)

void dropout(int dtype, int64_t rows, int64_t width, const void *x, uint64_t seed, uint32_t stream, uint32_t threshold,
             void *out, int threads) {
    dropped o = {.width = width, .x = x, .out = out, .seed = seed, .stream = stream, .threshold = threshold};
    share_blocks((task){.run = run_dropout_rows, .dtype = dtype, .operands = &o}, rows, threads);
}

/* x += dropout(y) */
void add_dropped(int dtype, int64_t rows, int64_t width, void *x, const void *y, uint64_t seed, uint32_t stream,
                 uint32_t threshold, int threads) {
    dropped o = {.width = width, .x = y, .out = x, .seed = seed, .stream = stream, .threshold = threshold};
    share_blocks((task){.run = run_add_dropped_rows, .dtype = dtype, .operands = &o}, rows, threads);
}
