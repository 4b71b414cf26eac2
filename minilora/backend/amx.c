/* The two products of a frozen layer in 4 bits, on a CPU with AMX, for native.py:

       y  = x W^T + b + n B^T      (rows, in)  x (out, in) + (rows, r) x (out, r) -> (rows, out)
       dx = dx + dy W + g A        (rows, out) x (out, in) + (rows, r) x (r, in)  -> (rows, in)

   x, y, dy, dx in bfloat16, sums in float32, rounded once. W is dequantized to bfloat16 by the definition's arithmetic.

   A library that multiplies bfloat16 matrices must find W in memory: dequantize writes it, the library reads it, writes it
   again in the order that its kernel wants, and reads that. 8 bytes a weight pass through memory, of which one core reads some
   20 in a nanosecond. Here a chunk of W is made in the kernel's order, stays in the cache while all rows of x pass by, and is
   forgotten. What must move is half a byte a weight: for a layer of 2048 x 5632 and 512 rows 6 MB, with x and y 14 MB, 0.7 ms.
   The floor is the arithmetic, 11.8 GFLOP: 5 ms for one core.

   AMX (Intel 64 and IA-32 Architectures Optimization Reference Manual, chapter 20) has eight tiles of 16 rows of 64 bytes. One
   instruction adds A B to C in 16 cycles:

       C (16, 16) float32        A (16, 32) bfloat16        B (32, 16) bfloat16, stored as (16, 16) pairs of neighbouring rows

   Four sums C share two tiles of A and two of B: one load an instruction. Here a "tile" is such a kilobyte in memory. The
   32 numbers that are summed over are a "step". Tiles stand in pairs, matrix[pair][step][2][512], so that the kernel reads
   memory straight on.

   A low-rank update is r more columns to sum over: n stands behind x, and B behind W.

   Forward, A is W as it is packed, and B is x in pairs of columns, that is, 16 rows of x transposed; C is a piece of y^T.
   Backward, A is dy, B is W in pairs of rows; C is a piece of dx. */

#include <sys/syscall.h>
#include <unistd.h>

enum {
    TILE = 512,                         /* bfloat16 numbers in a tile of A or B */
    STEP = 32,                          /* numbers that one instruction sums over; also the features of two tiles */
    AHEAD = 2,                          /* steps that tiles are fetched ahead from the second level of the cache */
};

typedef struct product {
    int backward;
    int add;                            /* backward: whether dx adds to what is there */
    int64_t rows, features, steps;      /* of x or dy; of the result; summed over, by 32, the update's included */
    int64_t in;                         /* of W (out, in) */
    const uint16_t *x;                  /* (rows, summed over W): x or dy */
    const uint16_t *narrow;             /* (rows, rank): n or g */
    const uint16_t *update;             /* B (features, rank), or A (rank, features) */
    int64_t rank, narrow_stride;        /* rank 0: there is no update */
    const float *bias;                  /* (features,) or NULL */
    uint16_t *y;                        /* (rows, features): y or dx */
    uint16_t *x_tiles;                  /* (rows / 32, steps, 2, TILE), the last rows filled with zeros */
    uint16_t *w_tiles;                  /* of each thread (chunk / 32, steps, 2, TILE) */
    int64_t chunk;                      /* features for which W is dequantized at a time */
} product;

/* eight tiles of 16 rows of 64 bytes, for this thread, until _tile_release */
static inline void use_tiles(void) {
    struct { uint8_t palette, start, zero[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } tiles = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        tiles.row_bytes[i] = 64;
        tiles.rows[i] = 16;
    }
    __asm__ volatile("" ::: "memory");  /* GCC does not know that all of it is read */
    _tile_loadconfig(&tiles);
}

/* (16, 16) words of 32 bits, in place: halves of rows s apart change places, s = 1, 2, 4, 8. Unrolled, the rows stay in
   registers. */
static inline void transpose(__m512i row[16]) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma GCC unroll 4
    for (int s = 1; s < 16; s *= 2) {
        __mmask16 odd = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(s));
        __m512i to_first = _mm512_mask_add_epi32(lane, odd, lane, _mm512_set1_epi32(16 - s));
        __m512i to_second = _mm512_add_epi32(to_first, _mm512_set1_epi32(s));
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            if (i & s)
                continue;
            __m512i a = row[i], b = row[i + s];
            row[i] = _mm512_permutex2var_epi32(a, to_first, b);
            row[i + s] = _mm512_permutex2var_epi32(a, to_second, b);
        }
    }
}

/* two times 16 float32 -> 16 pairs of bfloat16: even[0] odd[0] even[1] odd[1] ... */
static inline __m512i pairs(__m512 even, __m512 odd) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

/* 32 weights of one row of W -> those in even and those in odd columns */
static inline void dequantize_32(const task *t, __m512 code, int64_t first, __m512 *even, __m512 *odd) {
    __m512 scale = _mm512_set1_ps(block_scale(t, first / t->blocksize));
    __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(t->packed + first / 2)));
    *even = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), code), scale);
    *odd = _mm512_mul_ps(_mm512_permutexvar_ps(bytes, code), scale);
}

static inline int64_t weight_steps(const product *p) { return p->steps - (p->rank + STEP - 1) / STEP; }

/* 32 numbers of a row of n, B or A, from a column on; zeros from `count` on */
static inline __m512i load_columns(const uint16_t *row, int64_t column, int64_t count) {
    int64_t left = count - column;
    return _mm512_maskz_loadu_epi16(left >= STEP ? ~(__mmask32)0 : ((__mmask32)1 << left) - 1, row + column);
}

/* x, then n -> x_tiles; a block is 16 rows */
static void run_pack(const task *t) {
    const product *p = t->product;
    int64_t of_weight = weight_steps(p);
    __m512i row[16];
    for (int64_t block = t->first; block < t->last; block++) {
        for (int64_t step = 0; step < p->steps; step++) {
            for (int i = 0; i < 16; i++) {
                int64_t r = 16 * block + i;
                if (r >= p->rows)
                    row[i] = _mm512_setzero_si512();
                else if (step < of_weight)
                    row[i] = _mm512_loadu_si512(p->x + (r * of_weight + step) * STEP);
                else
                    row[i] = load_columns(p->narrow + r * p->narrow_stride, (step - of_weight) * STEP, p->rank);
            }
            if (!p->backward)
                transpose(row);
            uint16_t *tile = p->x_tiles + ((block / 2 * p->steps + step) * 2 + block % 2) * TILE;
            for (int i = 0; i < 16; i++)
                _mm512_store_si512(tile + 32 * i, row[i]);
        }
    }
}

/* forward: `count` rows of W, from `first` on, in their order */
static void fill_with_rows(const task *t, int64_t first, int64_t count, uint16_t *w_tiles) {
    const product *p = t->product;
    __m512 code = _mm512_loadu_ps(t->code), even, odd;
    int64_t of_weight = weight_steps(p);
    for (int64_t i = 0; i < count; i++) {
        uint16_t *line = w_tiles + (i / 32 * p->steps * 2 + i / 16 % 2) * TILE + i % 16 * 32;
        for (int64_t step = 0; step < of_weight; step++) {
            dequantize_32(t, code, (first + i) * p->in + step * STEP, &even, &odd);
            _mm512_store_si512(line + step * 2 * TILE, pairs(even, odd));
        }
        for (int64_t step = of_weight; step < p->steps; step++) {
            const uint16_t *row = p->update + (first + i) * p->rank;
            _mm512_store_si512(line + step * 2 * TILE, load_columns(row, (step - of_weight) * STEP, p->rank));
        }
    }
}

/* backward: `count` columns of W, from `first` on; the even ones of 32 in one tile, the odd ones in the next */
static void fill_with_columns(const task *t, int64_t first, int64_t count, uint16_t *w_tiles) {
    const product *p = t->product;
    __m512 code = _mm512_loadu_ps(t->code), even[2], odd[2];
    int64_t of_weight = weight_steps(p) * STEP;
    for (int64_t row = 0; row < of_weight; row += 2) {
        for (int64_t i = 0; i < count; i += 32) {
            for (int r = 0; r < 2; r++)
                dequantize_32(t, code, (row + r) * p->in + first + i, &even[r], &odd[r]);
            uint16_t *tile = w_tiles + (i / 32 * p->steps + row / STEP) * 2 * TILE + row % STEP / 2 * 32;
            _mm512_store_si512(tile, pairs(even[0], even[1]));
            _mm512_store_si512(tile + TILE, pairs(odd[0], odd[1]));
        }
    }
    for (int64_t row = 0; row < p->steps * STEP - of_weight; row += 2) {
        for (int64_t i = 0; i < count; i += 32) {
            __m512i two[2];             /* rows of A; beyond the last one zeros */
            for (int r = 0; r < 2; r++) {
                const uint16_t *at = p->update + (row + r) * p->features + first + i;
                two[r] = row + r < p->rank ? _mm512_loadu_si512(at) : _mm512_setzero_si512();
            }
            uint16_t *tile = w_tiles + (i / 32 * p->steps + (of_weight + row) / STEP) * 2 * TILE + row % STEP / 2 * 32;
            _mm512_store_si512(tile, _mm512_mask_blend_epi16(0xaaaaaaaa, two[0], _mm512_slli_epi32(two[1], 16)));
            _mm512_store_si512(tile + TILE, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(two[0], 16), two[1]));
        }
    }
}

static inline void fetch_tile(const uint16_t *tile) {
    for (int i = 0; i < 16; i++)
        _mm_prefetch((const char *)(tile + 32 * i), _MM_HINT_T0);
}

/* sums[i][j] = A[i] B[j], (16, 16) each, over all steps; a and b: [step][2][TILE]. A fetch beyond the end is harmless. */
static inline void multiply(const uint16_t *a, const uint16_t *b, int64_t steps, float sums[2][2][256]) {
    __asm__ volatile("" ::: "memory");  /* GCC does not know that a tile's load reads memory */
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; step++, a += 2 * TILE, b += 2 * TILE) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        fetch_tile(a + AHEAD * 2 * TILE);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + TILE, 64);
        fetch_tile(b + AHEAD * 2 * TILE);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + TILE, 64);
        fetch_tile(a + AHEAD * 2 * TILE + TILE);
        _tile_dpbf16ps(2, 5, 6);
        fetch_tile(b + AHEAD * 2 * TILE + TILE);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums[0][0], 64);
    _tile_stored(1, sums[0][1], 64);
    _tile_stored(2, sums[1][0], 64);
    _tile_stored(3, sums[1][1], 64);
}

/* 16 rows and 32 features of the result, from two tiles of sums */
static inline void write_rows(const product *p, const float *left, const float *right, int64_t row, int64_t feature) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) {
        a[i] = _mm512_load_si512(left + 16 * i);
        b[i] = _mm512_load_si512(right + 16 * i);
    }
    if (!p->backward) {
        transpose(a);
        transpose(b);
    }
    for (int i = 0; i < 16 && row + i < p->rows; i++) {
        __m512 u = (__m512)a[i], v = (__m512)b[i];
        if (p->bias) {
            u = _mm512_add_ps(u, _mm512_loadu_ps(p->bias + feature));
            v = _mm512_add_ps(v, _mm512_loadu_ps(p->bias + feature + 16));
        }
        uint16_t *at = p->y + (row + i) * p->features + feature;
        if (p->add) {
            __m512i there = _mm512_loadu_si512(at);
            u = _mm512_add_ps(u, (__m512)_mm512_slli_epi32(there, 16));
            v = _mm512_add_ps(v, (__m512)_mm512_and_si512(there, _mm512_set1_epi32((int)0xffff0000)));
        }
        _mm512_storeu_si512(at, p->backward ? pairs(u, v) : (__m512i)_mm512_cvtne2ps_pbh(v, u));
    }
}

/* a block is a chunk of features */
static void run_product(const task *t) {
    const product *p = t->product;
    _Alignas(64) float sums[2][2][256];
    uint16_t *w_tiles = p->w_tiles + t->member * p->chunk * p->steps * STEP;
    use_tiles();
    for (int64_t first = t->first * p->chunk; first < t->last * p->chunk && first < p->features; first += p->chunk) {
        int64_t count = p->features - first < p->chunk ? p->features - first : p->chunk;
        (p->backward ? fill_with_columns : fill_with_rows)(t, first, count, w_tiles);
        for (int64_t row = 0; row < p->rows; row += 32) {
            for (int64_t i = 0; i < count; i += 32) {
                const uint16_t *x = p->x_tiles + row * p->steps * STEP, *w = w_tiles + i * p->steps * STEP;
                multiply(p->backward ? x : w, p->backward ? w : x, p->steps, sums);
                for (int half = 0; half < 2; half++) {
                    float *left = p->backward ? sums[half][0] : sums[0][half];
                    float *right = p->backward ? sums[half][1] : sums[1][half];
                    write_rows(p, left, right, row + 16 * half, first + i);
                }
            }
        }
    }
    _tile_release();
}

/* in, out, rows_at_once and chunk are multiples of 32. tiles, aligned to 64 bytes, holds rows_at_once rows of x, then `chunk`
   features of W for each thread, both with the update's columns. */
void matmul_bf16(int backward, int add, int64_t rows, int64_t out, int64_t in, const uint16_t *x, uint8_t *packed,
                 const void *absmax, const float *code, int64_t blocksize, const float *nested_absmax,
                 const float *nested_code, float offset, const float *bias, int64_t rank, int64_t narrow_stride,
                 const uint16_t *narrow, const uint16_t *update, uint16_t *y, uint16_t *tiles, int64_t rows_at_once,
                 int64_t chunk, int threads) {
    int64_t features = backward ? in : out, summed = backward ? out : in, steps = summed / STEP + (rank + STEP - 1) / STEP;
    product p = {.backward = backward, .add = add, .features = features, .steps = steps, .in = in, .bias = bias,
                 .chunk = chunk, .update = update, .rank = rank, .narrow_stride = narrow_stride,
                 .x_tiles = tiles, .w_tiles = tiles + rows_at_once * steps * STEP};
    task t = {.blocksize = blocksize, .packed = packed, .absmax = absmax, .code = code, .nested_absmax = nested_absmax,
              .nested_code = nested_code, .offset = offset, .product = &p};
    for (int64_t row = 0; row < rows; row += rows_at_once) {
        p.rows = rows - row < rows_at_once ? rows - row : rows_at_once;
        p.x = x + row * summed;
        p.narrow = narrow + row * narrow_stride;
        p.y = y + row * features;
        t.run = run_pack;
        share_blocks(t, (p.rows + 31) / 32 * 2, threads);
        t.run = run_product;
        share_blocks(t, (features + chunk - 1) / chunk, threads);
    }
}

/* Linux gives tiles only to a process that asks for them: 0 once they may be used */
int amx_permission(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return (int)syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}
