/* Blockwise 4-bit quantize and dequantize, and AdamW with 8-bit moments, for native.py: the same bits as the PyTorch definitions in
   quantization.py and optim.py, in one pass. */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

enum { LANES = 32, MAX_THREADS = 64, PIECES_A_THREAD = 16 };  /* every block is a multiple of LANES values */

typedef struct task {
    void (*run)(const struct task *);
    int64_t first, last;                /* the blocks of this piece */
    int member;                         /* the number of this thread in its team */
    int64_t blocksize, n;               /* n values in all */
    const void *x;                      /* quantize: (n,) */
    const float *bounds;                /* (15,) midpoints between neighbouring codes, ascending */
    const int32_t *steps;               /* (16,) symbol of the smallest code, then the difference to each next symbol */
    uint8_t *packed;                    /* (ceil(n / 2),) first value in the high nibble */
    float *scales;                      /* quantize: (blocks,) out */
    const void *absmax;                 /* dequantize: (blocks,) float, or bytes when doubly quantized */
    const float *code;                  /* (16,) */
    const float *nested_absmax, *nested_code;   /* (blocks / 256,) and (256,), or NULL */
    float offset;
    void *out;                          /* (n,) */
    const struct attention *attention;
    const struct adamw *adamw;
    const struct product *product;
    int dtype;                          /* of elementwise.c, whose operations have operands of their own */
    const void *operands;
    const struct vector_product *vector;
} task;

static inline float as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t as_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

static inline float load_fp32(float x) { return x; }
static inline float store_fp32(float x) { return x; }
static inline float load_bf16(uint16_t x) { return as_float((uint32_t)x << 16); }
static inline uint16_t store_bf16(float x) {    /* to nearest, ties to even; no NaN gets here */
    uint32_t bits = as_bits(x);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
#if defined(__FLT16_MAX__)
static inline float load_fp16(_Float16 x) { return (float)x; }
static inline _Float16 store_fp16(float x) { return (_Float16)x; }
#endif

/* 16 packed bytes -> 32 codes */
static inline void look_up(const uint8_t *packed, const float *code, float *values) {
#if defined(__AVX512F__)
    const __m512i pairs_low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i pairs_high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    __m512 table = _mm512_loadu_ps(code);
    __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)packed));
    __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table);
    __m512 low = _mm512_permutexvar_ps(bytes, table);    /* reads the lowest four bits only */
    _mm512_storeu_ps(values, _mm512_permutex2var_ps(high, pairs_low, low));
    _mm512_storeu_ps(values + 16, _mm512_permutex2var_ps(high, pairs_high, low));
#else
    for (int i = 0; i < LANES / 2; i++) {
        values[2 * i] = code[packed[i] >> 4];
        values[2 * i + 1] = code[packed[i] & 15];
    }
#endif
}

/* scaled values -> 16 packed bytes; a symbol is the sum of the steps over the bounds that lie below the value */
static inline void pack(const float *scaled, const float *bounds, const int32_t *steps, uint8_t *packed) {
    int32_t symbols[LANES];
    for (int i = 0; i < LANES; i++) {
        int32_t symbol = steps[0];
        for (int k = 0; k < 15; k++)
            symbol += scaled[i] > bounds[k] ? steps[k + 1] : 0;
        symbols[i] = symbol;
    }
    for (int i = 0; i < LANES / 2; i++)
        packed[i] = (uint8_t)(symbols[2 * i] << 4 | symbols[2 * i + 1]);
}

static inline float block_scale(const task *t, int64_t block) {
    if (!t->nested_absmax)
        return ((const float *)t->absmax)[block];
    float centred = t->nested_code[((const uint8_t *)t->absmax)[block]] * t->nested_absmax[block / 256];
    return centred + t->offset;
}

#define DEFINE(NAME, T)                                                                                         \
static void run_quantize_##NAME(const task *t) {                                                                \
    float bounds[15], scaled[LANES];                                                                            \
    int32_t steps[16];                                                                                          \
    memcpy(bounds, t->bounds, sizeof bounds);                                                                   \
    memcpy(steps, t->steps, sizeof steps);                                                                      \
    for (int64_t block = t->first; block < t->last; block++) {                                                  \
        int64_t start = block * t->blocksize, left = t->n - start;                                              \
        int64_t whole = left < t->blocksize ? left : t->blocksize;                                              \
        const T *x = (const T *)t->x + start;                                                                   \
        uint8_t *packed = t->packed + start / 2;                                                                \
        uint32_t most = 0;      /* the order of magnitudes is the order of their bits; infinity and NaN on top */ \
        for (int64_t i = 0; i < whole; i++) {                                                                   \
            uint32_t bits = as_bits(load_##NAME(x[i])) & 0x7fffffff;                                            \
            most = bits > most ? bits : most;                                                                   \
        }                                                                                                       \
        float absmax = as_float(most), floored = absmax < 1e-38f ? 1e-38f : absmax;                             \
        if (whole == t->blocksize) {                                                                            \
            float inverse = 1.0f / floored;                                                                     \
            t->scales[block] = absmax;                                                                          \
            for (int64_t j = 0; j < whole; j += LANES) {                                                        \
                for (int i = 0; i < LANES; i++)                                                                 \
                    scaled[i] = load_##NAME(x[j + i]) * inverse;                                                \
                pack(scaled, bounds, steps, packed + j / 2);                                                    \
            }                                                                                                   \
        } else {                                                                                                \
            t->scales[block] = floored;                                                                         \
            for (int64_t j = 0; j < whole; j += LANES) {                                                        \
                int64_t count = whole - j < LANES ? whole - j : LANES;                                          \
                uint8_t bytes[LANES / 2];                                                                       \
                for (int i = 0; i < LANES; i++)                                                                 \
                    scaled[i] = i < count ? load_##NAME(x[j + i]) / floored : 0.0f;                             \
                pack(scaled, bounds, steps, bytes);                                                             \
                memcpy(packed + j / 2, bytes, (size_t)((count + 1) / 2));                                       \
            }                                                                                                   \
        }                                                                                                       \
    }                                                                                                           \
}                                                                                                               \
static void run_dequantize_##NAME(const task *t) {                                                              \
    float code[16], values[LANES];                                                                              \
    memcpy(code, t->code, sizeof code);                                                                         \
    for (int64_t block = t->first; block < t->last; block++) {                                                  \
        int64_t start = block * t->blocksize, left = t->n - start;                                              \
        int64_t whole = left < t->blocksize ? left : t->blocksize;                                              \
        const uint8_t *packed = t->packed + start / 2;                                                          \
        T *out = (T *)t->out + start;                                                                           \
        float scale = block_scale(t, block);                                                                    \
        int64_t j = 0;                                                                                          \
        for (; j + LANES <= whole; j += LANES) {                                                                \
            look_up(packed + j / 2, code, values);                                                              \
            for (int i = 0; i < LANES; i++)                                                                     \
                out[j + i] = store_##NAME(values[i] * scale);                                                   \
        }                                                                                                       \
        for (; j < whole; j++)                                                                                  \
            out[j] = store_##NAME(code[j % 2 ? packed[j / 2] & 15 : packed[j / 2] >> 4] * scale);               \
    }                                                                                                           \
}                                                                                                               \
void quantize_##NAME(const void *x, const float *bounds, const int32_t *steps, int64_t blocksize, int64_t n,    \
                     uint8_t *packed, float *scales, int threads) {                                             \
    task t = {.run = run_quantize_##NAME, .blocksize = blocksize, .n = n, .x = x, .bounds = bounds,             \
              .steps = steps, .packed = packed, .scales = scales};                                              \
    share(t, threads);                                                                                          \
}                                                                                                               \
void dequantize_##NAME(uint8_t *packed, const void *absmax, const float *code, int64_t blocksize,               \
                       const float *nested_absmax, const float *nested_code, float offset, int64_t n,           \
                       void *out, int threads) {                                                                \
    task t = {.run = run_dequantize_##NAME, .blocksize = blocksize, .n = n, .packed = packed, .absmax = absmax, \
              .code = code, .nested_absmax = nested_absmax, .nested_code = nested_code, .offset = offset,       \
              .out = out};                                                                                      \
    share(t, threads);                                                                                          \
}

/* A job in pieces of whole blocks. Every thread of the team takes the next piece until none is left, so that a core which
   is also busy with something else takes fewer of them. */
typedef struct team {
    task whole;
    int64_t blocks, pieces, next;
    int members;
} team;

static void join_team(void *argument) {
    team *t = argument;
    task mine = t->whole;
    mine.member = __atomic_fetch_add(&t->members, 1, __ATOMIC_RELAXED);
    for (int64_t piece; (piece = __atomic_fetch_add(&t->next, 1, __ATOMIC_RELAXED)) < t->pieces;) {
        mine.first = t->blocks * piece / t->pieces;
        mine.last = t->blocks * (piece + 1) / t->pieces;
        mine.run(&mine);
    }
}

static void *start(void *argument) {
    join_team(argument);
    return NULL;
}

/* GOMP_parallel of the OpenMP library that PyTorch loaded, or NULL. Its threads wait in a loop for a while after each of
   PyTorch's operations, and would keep a core from any other thread. */
static void (*openmp)(void (*)(void *), void *, unsigned, unsigned);

void use_openmp(void *gomp_parallel) {
    memcpy(&openmp, &gomp_parallel, sizeof openmp);
}

static void share_blocks(task whole, int64_t blocks, int threads) {
    int64_t most = PIECES_A_THREAD * (int64_t)threads;
    team t = {.whole = whole, .blocks = blocks, .pieces = blocks < most ? blocks : most};
    pthread_t thread[MAX_THREADS];
    int started = 0;
    threads = threads > MAX_THREADS ? MAX_THREADS : threads;
    if (openmp && threads > 1) {
        openmp(join_team, &t, (unsigned)threads, 0);
        return;
    }
    while (started < threads - 1 && pthread_create(&thread[started], NULL, start, &t) == 0)
        started++;
    join_team(&t);
    while (started)
        pthread_join(thread[--started], NULL);
}

static void share(task whole, int threads) {
    share_blocks(whole, (whole.n + whole.blocksize - 1) / whole.blocksize, threads);
}

DEFINE(fp32, float)
DEFINE(bf16, uint16_t)
#if defined(__FLT16_MAX__)
DEFINE(fp16, _Float16)
#endif

enum { MOMENT_BLOCK = 256, ADDRESSES = 7 };

typedef struct adamw {
    const int64_t *tensors;             /* (tensors, 7): addresses of parameter, gradient, and of indices, absmax of both moments; n */
    const float *code[2];               /* (256,) of the first moment, of the second */
    const uint8_t *nearest[2];          /* (65536,) index in the code that is nearest to each step from -1 to 1 */
    float beta1, rest1, beta2, rest2, correction2, eps, decay, rate;
} adamw;

/* values -> absmax, and the index of each in a code: quantization.quantize_dynamic */
static inline void requantize(const float *values, int64_t n, const uint8_t *nearest, uint8_t *indices, float *absmax) {
    int32_t steps[MOMENT_BLOCK];
    uint32_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = as_bits(values[i]) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    *absmax = as_float(most);
    if (most == 0) {
        memset(indices, 0, (size_t)n);
        return;
    }
    float inverse = 1.0f / *absmax;
    for (int64_t i = 0; i < n; i++) {
        float x = values[i] * inverse;
        x = x >= -1.0f ? x : -1.0f;     /* NaN too */
        x = x <= 1.0f ? x : 1.0f;
        steps[i] = (int32_t)fmaf((x + 1.0f) * 0.5f, 65535.0f, 0.5f);
    }
    for (int64_t i = 0; i < n; i++)
        indices[i] = nearest[steps[i]];
}

/* one block of one tensor: optim.adamw_8bit_definition between dequantizing and quantizing, with its roundings */
static inline void adamw_block(const adamw *settings, const int64_t *tensor, int64_t block) {
    const adamw a = *settings;
    int64_t start = block * MOMENT_BLOCK, left = tensor[6] - start;
    int64_t n = left < MOMENT_BLOCK ? left : MOMENT_BLOCK;
    float *restrict parameter = (float *)tensor[0] + start;
    const float *restrict gradient = (const float *)tensor[1] + start;
    uint8_t *restrict first = (uint8_t *)tensor[2] + start, *restrict second = (uint8_t *)tensor[4] + start;
    float *absmax1 = (float *)tensor[3] + block, *absmax2 = (float *)tensor[5] + block;
    float scale1 = *absmax1, scale2 = *absmax2, m[MOMENT_BLOCK], v[MOMENT_BLOCK];
    for (int64_t i = 0; i < n; i++) {
        m[i] = a.code[0][first[i]] * scale1;
        v[i] = a.code[1][second[i]] * scale2;
    }
    for (int64_t i = 0; i < n; i++) {
        float g = gradient[i];
        m[i] = fmaf(a.rest1, g, m[i] * a.beta1);
        v[i] = fmaf(a.rest2 * g, g, v[i] * a.beta2);
        parameter[i] = parameter[i] * a.decay + a.rate * m[i] / (sqrtf(v[i]) / a.correction2 + a.eps);
    }
    requantize(m, n, a.nearest[0], first, absmax1);
    requantize(v, n, a.nearest[1], second, absmax2);
}

static void run_adamw_8bit(const task *t) {
    const int64_t *tensor = t->adamw->tensors;
    int64_t block = t->first;           /* of the tensor, once those before it are passed */
    for (int64_t i = t->first; i < t->last; i++, block++) {
        int64_t blocks;
        while (block >= (blocks = (tensor[6] + MOMENT_BLOCK - 1) / MOMENT_BLOCK)) {
            block -= blocks;
            tensor += ADDRESSES;
        }
        adamw_block(t->adamw, tensor, block);
    }
}

void adamw_8bit(const int64_t *tensors, int64_t blocks, const float *code1, const float *code2, const uint8_t *nearest1,
                const uint8_t *nearest2, float beta1, float rest1, float beta2, float rest2, float correction2, float eps,
                float decay, float rate, int threads) {
    adamw a = {.tensors = tensors, .code = {code1, code2}, .nearest = {nearest1, nearest2}, .beta1 = beta1, .rest1 = rest1,
               .beta2 = beta2, .rest2 = rest2, .correction2 = correction2, .eps = eps, .decay = decay, .rate = rate};
    task t = {.run = run_adamw_8bit, .blocksize = MOMENT_BLOCK, .n = blocks * MOMENT_BLOCK, .adamw = &a};
    share(t, threads);
}

#include "elementwise.c"
#include "gemv.c"

#if defined(__linux__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include "amx.c"
#include "attention.c"
#endif
