/* The product of decoding, a packed weight in 4 bits times one vector, for native.py:

       y = W x + b + B n           (out, in) x (in,) + (out, r) x (r,) -> (out,)

   x and y in float32, bfloat16 or float16; W, sums, bias, B and n in float32. y is rounded once. A symbol's value is multiplied
   with x first, the sum of 32 of them with their scale after that: one product less a weight than with the dequantized one.

   What must move is W, half a byte a weight and its scale, and with an adapter B, 4 r bytes a row. For 2048 x 5632 in blocks of
   64 with quantized scales that is 5.9 MB: 0.6 ms for a core that reads 10 GB a second. Dequantizing first would move 24 times
   as much as float32 (half a byte, 4 written, 4 read, and 4 more for memory that is fetched to be written), and in bfloat16 half
   of that.

   A byte holds two neighbours, weight 2i in its high nibble. Putting their values side by side would take a shuffle each. So x
   is parted instead, once: its even elements, then its odd ones. The high nibbles' values meet the former and the low ones' the
   latter. `lanes` is as many numbers as one instruction takes: 16 with AVX-512, 8 with AVX2, else 4.

   A row is one thread's work from its beginning to its end, so the number of threads changes no bit. */

enum {
    STEP_BYTES = 16,                    /* a step is 32 weights, of one block */
    STEPS = 64,                         /* steps whose scales are dequantized together */
};

typedef struct vector_product {
    int64_t steps;                      /* in / 32 */
    int shift;                          /* a block has 2 ** shift steps */
    const float *even, *odd;            /* (in / 2,) each, of x */
    const float *bias;                  /* (out,) or NULL */
    int64_t rank;                       /* 0: there is no update */
    const float *narrow, *update;       /* n (rank,) and B (out, rank) */
} vector_product;

#if defined(__AVX512F__)
enum { WIDTH = 16 };
typedef __m512 lanes, lane_table;
static inline lanes multiply_add(lanes a, lanes b, lanes c) { return _mm512_fmadd_ps(a, b, c); }
static inline lane_table load_table(const float *code) { return _mm512_loadu_ps(code); }

/* WIDTH packed bytes -> the values of their high nibbles and of their low ones */
static inline void look_up_nibbles(const uint8_t *packed, lane_table table, lanes *high, lanes *low) {
    __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)packed));
    *high = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table);
    *low = _mm512_permutexvar_ps(bytes, table);     /* reads the lowest four bits only */
}
#elif defined(__AVX2__) && defined(__FMA__)
enum { WIDTH = 8 };
typedef __m256 lanes;
typedef struct { __m256 lower, upper; } lane_table;
static inline lanes multiply_add(lanes a, lanes b, lanes c) { return _mm256_fmadd_ps(a, b, c); }
static inline lane_table load_table(const float *code) {
    return (lane_table){_mm256_loadu_ps(code), _mm256_loadu_ps(code + 8)};
}

/* the lowest three bits choose in both halves of the table, the fourth one between them */
static inline lanes look_up_lanes(__m256i symbols, lane_table table) {
    __m256 lower = _mm256_permutevar8x32_ps(table.lower, symbols), upper = _mm256_permutevar8x32_ps(table.upper, symbols);
    return _mm256_blendv_ps(lower, upper, _mm256_castsi256_ps(_mm256_slli_epi32(symbols, 28)));
}
static inline void look_up_nibbles(const uint8_t *packed, lane_table table, lanes *high, lanes *low) {
    __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)packed));
    *high = look_up_lanes(_mm256_srli_epi32(bytes, 4), table);
    *low = look_up_lanes(bytes, table);
}
#else
enum { WIDTH = 4 };
typedef float lanes __attribute__((vector_size(16)));
typedef const float *lane_table;
static inline lanes multiply_add(lanes a, lanes b, lanes c) { return a * b + c; }
static inline lane_table load_table(const float *code) { return code; }
static inline void look_up_nibbles(const uint8_t *packed, lane_table table, lanes *high, lanes *low) {
    for (int i = 0; i < WIDTH; i++) {
        (*high)[i] = table[packed[i] >> 4];
        (*low)[i] = table[packed[i] & 15];
    }
}
#endif

static inline lanes load_lanes(const float *x) { lanes v; memcpy(&v, x, sizeof v); return v; }
static inline lanes all_lanes(float x) { return (lanes){0} + x; }
static inline float added_lanes(lanes v) {
    for (int half = WIDTH / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            v[i] += v[i + half];
    return v[0];
}

/* the codes of 32 weights times the part of x that begins at even and odd */
static inline lanes product_of_step(const uint8_t *packed, lane_table table, const float *even, const float *odd) {
    lanes sums = {0}, high = {0}, low = {0};
    for (int i = 0; i < STEP_BYTES; i += WIDTH) {
        look_up_nibbles(packed + i, table, &high, &low);
        sums = multiply_add(high, load_lanes(even + i), sums);
        sums = multiply_add(low, load_lanes(odd + i), sums);
    }
    return sums;
}

/* one row of W times x. A block may begin within it */
static inline float product_of_row(const task *t, int64_t row, lane_table table) {
    const vector_product *p = t->vector;
    float scales[STEPS];
    lanes total = {0};
    for (int64_t step = 0; step < p->steps; step += STEPS) {
        int64_t count = p->steps - step < STEPS ? p->steps - step : STEPS, first = row * p->steps + step;
        int64_t block = first >> p->shift, blocks = ((first + count - 1) >> p->shift) - block + 1;
        for (int64_t i = 0; i < blocks; i++)
            scales[i] = block_scale(t, block + i);
        for (int64_t i = 0; i < count; i++) {
            const float *even = p->even + (step + i) * STEP_BYTES, *odd = p->odd + (step + i) * STEP_BYTES;
            lanes sums = product_of_step(t->packed + (first + i) * STEP_BYTES, table, even, odd);
            total = multiply_add(sums, all_lanes(scales[((first + i) >> p->shift) - block]), total);
        }
    }
    return added_lanes(total);
}

/* one row of B times n */
static inline float product_of_update(const vector_product *p, int64_t row) {
    const float *update = p->update + row * p->rank;
    lanes total = {0};
    int64_t k = 0;
    for (; k + WIDTH <= p->rank; k += WIDTH)
        total = multiply_add(load_lanes(update + k), load_lanes(p->narrow + k), total);
    float sum = added_lanes(total);
    for (; k < p->rank; k++)
        sum += update[k] * p->narrow[k];
    return sum;
}

static inline float element_of_product(const task *t, int64_t row, lane_table table) {
    float y = product_of_row(t, row, table);
    if (t->vector->rank)
        y += product_of_update(t->vector, row);
    return t->vector->bias ? y + t->vector->bias[row] : y;
}

static void run_gemv(const task *t) {
    lane_table table = load_table(t->code);
    for (int64_t row = t->first; row < t->last; row++)
        store((dtype)t->dtype, t->out, row, element_of_product(t, row, table));
}

/* in is a multiple of 32. parted: (2, in / 2), where x is written in two parts */
#define DEFINE_GEMV(NAME, D)                                                                                    \
void gemv_##NAME(int64_t out, int64_t in, const void *x, uint8_t *packed, const void *absmax, const float *code, \
                 int64_t blocksize, const float *nested_absmax, const float *nested_code, float offset,         \
                 const float *bias, int64_t rank, const float *narrow, const float *update, float *parted,      \
                 void *y, int threads) {                                                                        \
    float *odd = parted + in / 2;                                                                               \
    for (int64_t i = 0; i < in / 2; i++) {                                                                      \
        parted[i] = load(D, x, 2 * i);                                                                          \
        odd[i] = load(D, x, 2 * i + 1);                                                                         \
    }                                                                                                           \
    vector_product p = {.steps = in / 32, .shift = __builtin_ctzll(blocksize / 32), .even = parted, .odd = odd, \
                        .bias = bias, .rank = rank, .narrow = narrow, .update = update};                        \
    task t = {.run = run_gemv, .dtype = D, .blocksize = blocksize, .packed = packed, .absmax = absmax,          \
              .code = code, .nested_absmax = nested_absmax, .nested_code = nested_code, .offset = offset,       \
              .out = y, .vector = &p};                                                                          \
    share_blocks(t, out, threads);                                                                              \
}

DEFINE_GEMV(fp32, FP32)
DEFINE_GEMV(bf16, BF16)
#if defined(__FLT16_MAX__)
DEFINE_GEMV(fp16, FP16)
#endif
