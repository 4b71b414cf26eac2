/* Causal attention over the documents of one row, on a CPU with AMX, for cpu_attention.py:

       S = Q K^T / sqrt(K)     P = exp(S - lse)         Y = P V           lse = log(sum(exp(S))) of each row of S
       dV = P^T dY             dP = dY V^T              dS = P (dP - delta)           delta = sum(dY Y) of each row
       dQ = dS K / sqrt(K)     dK = dS^T Q / sqrt(K)

   q, y, dq: (N, H, K); k, v, dk, dv: (N, G, K), bfloat16. Query head h reads key/value head h / (H/G). A query sees itself and
   earlier keys of its document, `window` of them at most. Sums are float32; P and dS are rounded to bfloat16 for their products.

   What must move: for 512 tokens of 32 + 2 x 4 heads of 64 numbers 5 MB forward and 9 MB backward, 0.3 and 0.5 ms for a core that
   reads 20 bytes in a nanosecond. The floor is the arithmetic of the half below the diagonal: 1.1 and 2.7 GFLOP, 1 and 3 ms at
   1 TFLOP/s, and 4.2 million exponentials in each direction, of which 16 take some 10 cycles: 1 ms.

   Scores are computed transposed, S^T = K Q^T, one query in each lane of a vector. So the maximum and the sum over keys need no
   sum over lanes, and no product needs a transpose of scores:

       S^T = K Q^T     dP^T = V dY^T      C (32 keys, 32 queries)
       Y^T = V^T P^T   dQ^T = K^T dS^T    C (32 features, 32 queries)
       dV = P^T dY     dK = dS^T Q        C (32 keys, 32 features)

   A product takes A in rows and B in pairs of neighbouring rows, see amx.c. `pack_rows` writes a matrix in the orders that its
   products want. Scores are made in squares of 32 keys and 32 queries, and squares that no query sees are skipped. A document is
   packed from a square's edge on, so its numbers do not depend on its neighbours. One thread makes all sums of a number, in one
   order, so they do not depend on the number of threads. */

enum {
    SIDE = 32,                          /* of a square */
    SQUARE = SIDE * SIDE,               /* its numbers: two tiles of A or B */
    MAX_SIZE = 256,                     /* of a head */
    FORWARD_KEYS = 256,                 /* between two looks at the maximum */
    KEYS = 128, QUERIES = 128,          /* of a step of backward */
    HEADS = 4,                          /* query heads whose dK and dV are summed one after another, by one thread */
};

typedef struct document {
    int64_t first, length;              /* tokens */
    int64_t block;                      /* blocks of SIDE rows before it */
} document;

typedef struct attention {
    const uint16_t *q, *k, *v, *dy;
    uint16_t *y, *dq, *dk, *dv;
    float *lse;                         /* (H, N) */
    int64_t tokens, heads, groups, size, window;
    int64_t blocks, documents;
    document *document;                 /* (documents,) */
    uint16_t *key_rows, *key_columns;   /* K as A of K Q^T, and as A of K^T dS^T: (G, blocks, K / 32, SQUARE) */
    uint16_t *value_rows, *value_columns;
    float *sums;                        /* backward: dV, dK of each part: (parts, blocks, 2, SIDE, K) */
    float scale;                        /* 1 / sqrt(K) */
} attention;

/* ---- matrices in the order of tiles ------------------------------------------------------------------------------------- */

/* 32 rows of a matrix X, those beyond `count` zeros, in squares of 32 columns, two tiles each:

       transposed  in pairs
       no          no         A = X      rows 0-15, rows 16-31
       yes         no         B = X^T    the same, transposed: pairs of columns of X
       no          yes        B = X      pairs of rows: of even columns, of odd columns
       yes         yes        A = X^T    the same, transposed: even columns of X, odd columns of X */
static void pack_rows(const uint16_t *x, int64_t stride, int64_t count, int64_t size, int in_pairs, int transposed,
                      uint16_t *tiles) {
    const __m512i low = _mm512_set1_epi32(0xffff);
    __m512i row[32], tile[2][16];
    for (int64_t column = 0; column < size; column += 32, tiles += SQUARE) {
        for (int i = 0; i < 32; i++)
            row[i] = i < count ? _mm512_loadu_si512(x + i * stride + column) : _mm512_setzero_si512();
        for (int i = 0; i < 16; i++) {
            __m512i a = row[2 * i], b = row[2 * i + 1];
            tile[0][i] = !in_pairs ? row[i] : _mm512_or_si512(_mm512_and_si512(low, a), _mm512_slli_epi32(b, 16));
            tile[1][i] = !in_pairs ? row[16 + i] : _mm512_or_si512(_mm512_srli_epi32(a, 16), _mm512_andnot_si512(low, b));
        }
        for (int half = 0; half < 2; half++) {
            if (transposed)
                transpose(tile[half]);
            for (int i = 0; i < 16; i++)
                _mm512_store_si512(tiles + half * TILE + 32 * i, tile[half][i]);
        }
    }
}

/* c (32, 32), its rows `stride` apart, = A B or c + A B. The next squares of A and of B are a_step and b_step numbers further. */
static inline void add_product(const uint16_t *a, int64_t a_step, const uint16_t *b, int64_t b_step, int64_t steps, float *c,
                               int64_t stride, int add) {
    __asm__ volatile("" ::: "memory");  /* GCC does not know that a tile's load reads memory */
    if (add) {
        _tile_loadd(0, c, 4 * stride);
        _tile_loadd(1, c + 16, 4 * stride);
        _tile_loadd(2, c + 16 * stride, 4 * stride);
        _tile_loadd(3, c + 16 * stride + 16, 4 * stride);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; step++, a += a_step, b += b_step) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + TILE, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 4 * stride);
    _tile_stored(1, c + 16, 4 * stride);
    _tile_stored(2, c + 16 * stride, 4 * stride);
    _tile_stored(3, c + 16 * stride + 16, 4 * stride);
}

/* c (K, queries), of every 32 rows the even and then the odd ones, times a factor of each of 32 queries -> 32 rows of y */
static void write_transposed(const float *c, int64_t queries, const __m512 factor[2], int64_t count, int64_t size, uint16_t *y,
                             int64_t stride) {
    __m512i even[16], odd[16];
    for (int64_t column = 0; column < size; column += 32, c += 32 * queries) {
        for (int half = 0; half < 2; half++) {
            for (int i = 0; i < 16; i++) {
                even[i] = (__m512i)_mm512_mul_ps(_mm512_load_ps(c + i * queries + 16 * half), factor[half]);
                odd[i] = (__m512i)_mm512_mul_ps(_mm512_load_ps(c + (16 + i) * queries + 16 * half), factor[half]);
            }
            transpose(even);
            transpose(odd);
            for (int i = 0; i < 16 && 16 * half + i < count; i++)
                _mm512_storeu_si512(y + (16 * half + i) * stride + column, pairs((__m512)even[i], (__m512)odd[i]));
        }
    }
}

/* ---- scores ------------------------------------------------------------------------------------------------------------- */

static const float LOG2_E = 1.44269504f;

/* 2^x with a relative error below 3e-6 = 2^-18: 2^floor(x) times a polynomial in the rest. 2^0 = 1 and 2^-infinity = 0. */
static inline __m512 exp2_16(__m512 x) {
    __m512 rest = _mm512_reduce_ps(x, 0x09);    /* x - floor(x) */
    __m512 y = _mm512_set1_ps(0.013426684272863362f);
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.05224247422083756f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.2412802047534526f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.6930448449025516f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, x);
}

static inline uint32_t first_lanes(int64_t n) {
    return n <= 0 ? 0 : n >= 32 ? ~0u : (1u << n) - 1;
}

/* s: (32 keys, 32 queries) -> -infinity where a query does not see a key. ahead: the first key's position minus the query's. */
static inline void hide(float *s, int64_t ahead, int64_t window) {
    const __m512 hidden = _mm512_set1_ps(-INFINITY);
    if (ahead <= -SIDE && ahead + window >= SIDE)
        return;
    for (int64_t key = 0; key < SIDE; key++, s += SIDE) {
        uint32_t seen = first_lanes(ahead + key + window) & ~first_lanes(ahead + key);
        _mm512_store_ps(s, _mm512_mask_mov_ps(hidden, (__mmask16)seen, _mm512_load_ps(s)));
        _mm512_store_ps(s + 16, _mm512_mask_mov_ps(hidden, (__mmask16)(seen >> 16), _mm512_load_ps(s + 16)));
    }
}

/* the first key, at the edge of a square, that a query at this position sees */
static inline int64_t first_key(const attention *a, int64_t query) {
    int64_t key = query - a->window + 1;
    return key > 0 ? key / SIDE * SIDE : 0;
}

static inline uint16_t *square(const attention *a, uint16_t *tiles, int64_t group, int64_t block) {
    return tiles + (group * a->blocks + block) * SIDE * a->size;
}

static inline int64_t minimum(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* the last document that begins at or before a block: those without tokens come before it */
static inline const document *document_of(const attention *a, int64_t block) {
    int64_t low = 0, high = a->documents - 1;
    while (low < high) {
        int64_t middle = (low + high + 1) / 2;
        if (a->document[middle].block <= block)
            low = middle;
        else
            high = middle - 1;
    }
    return a->document + low;
}

/* a block is 32 tokens of one key/value head */
static void run_pack_keys(const task *t) {
    const attention *a = t->attention;
    for (int64_t i = t->first; i < t->last; i++) {
        int64_t group = i / a->blocks, block = i % a->blocks, stride = a->groups * a->size;
        const document *d = document_of(a, block);
        int64_t row = (block - d->block) * SIDE, count = d->length - row, first = (d->first + row) * stride + group * a->size;
        pack_rows(a->k + first, stride, count, a->size, 0, 0, square(a, a->key_rows, group, block));
        if (a->dy) {
            pack_rows(a->k + first, stride, count, a->size, 1, 1, square(a, a->key_columns, group, block));
            pack_rows(a->v + first, stride, count, a->size, 0, 0, square(a, a->value_rows, group, block));
        } else {
            pack_rows(a->v + first, stride, count, a->size, 1, 1, square(a, a->value_columns, group, block));
        }
    }
}

/* ---- forward ------------------------------------------------------------------------------------------------------------ */

typedef struct state {                  /* of 32 queries */
    __m512 most[2], total[2];           /* the largest score so far, and the sum of exp(score - most) */
    float y[MAX_SIZE * SIDE];           /* (K, 32) sum of exp(score - most) v */
    float scores[FORWARD_KEYS * SIDE];
    uint16_t q[MAX_SIZE * SIDE], p[FORWARD_KEYS * SIDE];
} state;

/* The largest of x and of one column of scores. Four are compared first: a chain of single ones would wait for each. */
static inline __m512 largest_score(__m512 x, const float *scores, int64_t keys) {
    for (int64_t key = 0; key < keys; key += 4, scores += 4 * SIDE) {
        __m512 a = _mm512_max_ps(_mm512_load_ps(scores), _mm512_load_ps(scores + SIDE));
        __m512 b = _mm512_max_ps(_mm512_load_ps(scores + 2 * SIDE), _mm512_load_ps(scores + 3 * SIDE));
        x = _mm512_max_ps(x, _mm512_max_ps(a, b));
    }
    return x;
}

/* scores of `keys` keys -> p, total; y and total are scaled down where the maximum rises */
static inline void add_exponentials(state *s, int64_t keys, int64_t size, float scale) {
    const __m512 to_2 = _mm512_set1_ps(scale * LOG2_E);
    for (int half = 0; half < 2; half++) {
        const float *scores = s->scores + 16 * half;
        __m512 most = largest_score(s->most[half], scores, keys), total = s->total[half], shift = _mm512_mul_ps(most, to_2);
        if (_mm512_cmp_ps_mask(most, s->most[half], _CMP_NEQ_UQ)) {
            __m512 factor = exp2_16(_mm512_fmsub_ps(s->most[half], to_2, shift));
            total = _mm512_mul_ps(total, factor);
            for (int64_t i = 0; i < size; i++) {
                float *y = s->y + i * SIDE + 16 * half;
                _mm512_store_ps(y, _mm512_mul_ps(_mm512_load_ps(y), factor));
            }
        }
        for (int64_t key = 0; key < keys; key += 2) {
            __m512 a = exp2_16(_mm512_fmsub_ps(_mm512_load_ps(scores + key * SIDE), to_2, shift));
            __m512 b = exp2_16(_mm512_fmsub_ps(_mm512_load_ps(scores + (key + 1) * SIDE), to_2, shift));
            total = _mm512_add_ps(total, _mm512_add_ps(a, b));
            _mm512_store_si512(s->p + (key / 32 * 2 + half) * TILE + key % 32 * 16, pairs(a, b));
        }
        s->most[half] = most;
        s->total[half] = total;
    }
}

/* 32 queries of one head, from position `query` of a document on */
static void attend(const attention *a, state *s, const document *d, int64_t head, int64_t query) {
    int64_t group = head * a->groups / a->heads, squares = a->size / SIDE, count = d->length - query;
    int64_t stride = a->heads * a->size, first = (d->first + query) * stride + head * a->size;
    const uint16_t *k = square(a, a->key_rows, group, d->block), *v = square(a, a->value_columns, group, d->block);
    pack_rows(a->q + first, stride, count, a->size, 0, 1, s->q);
    memset(s->y, 0, sizeof(float) * a->size * SIDE);
    for (int half = 0; half < 2; half++) {
        s->most[half] = _mm512_set1_ps(-1e38f);     /* finite, so that it has a difference to a hidden score */
        s->total[half] = _mm512_setzero_ps();
    }
    for (int64_t key = first_key(a, query), keys; key < query + SIDE; key += keys) {
        keys = minimum(FORWARD_KEYS, query + SIDE - key);
        for (int64_t i = 0; i < keys; i += SIDE) {
            add_product(k + (key + i) * a->size, SQUARE, s->q, SQUARE, squares, s->scores + i * SIDE, SIDE, 0);
            hide(s->scores + i * SIDE, key + i - query, a->window);
        }
        add_exponentials(s, keys, a->size, a->scale);
        for (int64_t f = 0; f < squares; f++)
            add_product(v + key * a->size + f * SQUARE, squares * SQUARE, s->p, SQUARE, keys / SIDE, s->y + f * SQUARE, SIDE, 1);
    }
    __m512 inverse[2];
    for (int half = 0; half < 2; half++)
        inverse[half] = _mm512_div_ps(_mm512_set1_ps(1.0f), s->total[half]);
    write_transposed(s->y, SIDE, inverse, count, a->size, a->y + first, stride);
    float most[SIDE], total[SIDE];
    memcpy(most, s->most, sizeof most);
    memcpy(total, s->total, sizeof total);
    for (int64_t i = 0; i < SIDE && i < count; i++)
        a->lse[head * a->tokens + d->first + query + i] = most[i] * a->scale + logf(total[i]);
}

/* a block is 32 queries of one head */
static void run_attention(const task *t) {
    const attention *a = t->attention;
    _Alignas(64) state s;
    use_tiles();
    for (int64_t i = t->first; i < t->last; i++) {
        const document *d = document_of(a, i % a->blocks);
        attend(a, &s, d, i / a->blocks, (i % a->blocks - d->block) * SIDE);
    }
    _tile_release();
}

/* ---- backward ----------------------------------------------------------------------------------------------------------- */

typedef struct step {                   /* QUERIES queries of one head, and KEYS keys */
    uint16_t q_columns[QUERIES * MAX_SIZE], q_pairs[QUERIES * MAX_SIZE];        /* Q^T and Q as B */
    uint16_t dy_columns[QUERIES * MAX_SIZE], dy_pairs[QUERIES * MAX_SIZE];
    float lse[QUERIES], delta[QUERIES]; /* lse in powers of 2; infinity beyond the document's end, where P is 0 */
    float dq[MAX_SIZE * QUERIES];       /* (K, QUERIES) */
    float scores[SQUARE], dp[SQUARE];
    uint16_t p[SIDE * QUERIES], ds[SIDE * QUERIES];     /* of 32 keys, as A */
    uint16_t ds_pairs[KEYS * QUERIES];  /* as B */
} step;

/* delta[i] = sum(dy[i] y[i]) of up to 32 rows */
static void sum_of_products(const uint16_t *dy, const uint16_t *y, int64_t stride, int64_t count, int64_t size, float *delta) {
    for (int half = 0; half < 2; half++) {
        __m512 sums[16], total = _mm512_setzero_ps();
        for (int64_t i = 0; i < 16; i++) {
            sums[i] = _mm512_setzero_ps();
            for (int64_t f = 0; f < size && 16 * half + i < count; f += 32) {
                int64_t at = (16 * half + i) * stride + f;
                sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)_mm512_loadu_si512(dy + at), (__m512bh)_mm512_loadu_si512(y + at));
            }
        }
        transpose((__m512i *)sums);
        for (int i = 0; i < 16; i++)
            total = _mm512_add_ps(total, sums[i]);
        _mm512_store_ps(delta + 16 * half, total);
    }
}

static void load_queries(const attention *a, step *s, const document *d, int64_t head, int64_t query) {
    int64_t stride = a->heads * a->size;
    for (int64_t i = 0; i < QUERIES && query + i < d->length; i += SIDE) {
        int64_t token = d->first + query + i, first = token * stride + head * a->size, count = d->length - query - i;
        pack_rows(a->q + first, stride, count, a->size, 0, 1, s->q_columns + i * a->size);
        pack_rows(a->q + first, stride, count, a->size, 1, 0, s->q_pairs + i * a->size);
        pack_rows(a->dy + first, stride, count, a->size, 0, 1, s->dy_columns + i * a->size);
        pack_rows(a->dy + first, stride, count, a->size, 1, 0, s->dy_pairs + i * a->size);
        sum_of_products(a->dy + first, a->y + first, stride, count, a->size, s->delta + i);
        for (int64_t j = 0; j < SIDE; j++)
            s->lse[i + j] = j < count ? a->lse[head * a->tokens + token + j] * LOG2_E : INFINITY;
    }
    memset(s->dq, 0, sizeof(float) * a->size * QUERIES);
}

/* a square of scores and dp -> p and ds as A, ds as B */
static inline void differentiate(const step *s, int64_t query, float scale, uint16_t *p, uint16_t *ds, uint16_t *ds_pairs) {
    const __m512 to_2 = _mm512_set1_ps(scale * LOG2_E);
    for (int64_t key = 0; key < SIDE; key += 2) {
        __m512 weight[2][2], change[2][2];      /* [key][half of the queries] */
        for (int i = 0; i < 2; i++) {
            for (int half = 0; half < 2; half++) {
                int64_t at = (key + i) * SIDE + 16 * half;
                __m512 lse = _mm512_load_ps(s->lse + query + 16 * half), delta = _mm512_load_ps(s->delta + query + 16 * half);
                weight[i][half] = exp2_16(_mm512_fmsub_ps(_mm512_load_ps(s->scores + at), to_2, lse));
                change[i][half] = _mm512_mul_ps(weight[i][half], _mm512_sub_ps(_mm512_load_ps(s->dp + at), delta));
            }
            _mm512_store_si512(p + (key + i) * SIDE, (__m512i)_mm512_cvtne2ps_pbh(weight[i][1], weight[i][0]));
            _mm512_store_si512(ds + (key + i) * SIDE, (__m512i)_mm512_cvtne2ps_pbh(change[i][1], change[i][0]));
        }
        for (int half = 0; half < 2; half++)
            _mm512_store_si512(ds_pairs + half * TILE + key * 16, pairs(change[0][half], change[1][half]));
    }
}

/* the gradients of all pairs of up to KEYS keys and the step's queries */
static void add_gradients(const attention *a, step *s, int64_t group, const document *d, float *sums, int64_t query, int64_t key) {
    int64_t squares = a->size / SIDE, row = squares * SQUARE;    /* numbers of 32 packed rows */
    int64_t queries = minimum(QUERIES, (d->length - query + SIDE - 1) / SIDE * SIDE);
    int64_t keys = minimum(KEYS, query + queries - key);
    for (int64_t i = 0; i < keys; i += SIDE) {
        int64_t block = d->block + (key + i) / SIDE, ahead = key + i - query;
        const uint16_t *k = square(a, a->key_rows, group, block), *v = square(a, a->value_rows, group, block);
        int64_t from = ahead > 0 ? ahead : 0, to = from;
        for (; to < queries && first_key(a, query + to) <= key + i; to += SIDE) {
            add_product(k, SQUARE, s->q_columns + to * a->size, SQUARE, squares, s->scores, SIDE, 0);
            add_product(v, SQUARE, s->dy_columns + to * a->size, SQUARE, squares, s->dp, SIDE, 0);
            hide(s->scores, ahead - to, a->window);
            differentiate(s, to, a->scale, s->p + to * SIDE, s->ds + to * SIDE, s->ds_pairs + i * QUERIES + to * SIDE);
        }
        float *dv = sums + (key + i) * 2 * a->size, *dk = dv + SIDE * a->size;
        for (int64_t f = 0; f < squares && to > from; f++) {
            const uint16_t *dy = s->dy_pairs + from * a->size + f * SQUARE, *q = s->q_pairs + from * a->size + f * SQUARE;
            add_product(s->p + from * SIDE, SQUARE, dy, row, (to - from) / SIDE, dv + f * SIDE, a->size, 1);
            add_product(s->ds + from * SIDE, SQUARE, q, row, (to - from) / SIDE, dk + f * SIDE, a->size, 1);
        }
    }
    for (int64_t i = 0; i < queries; i += SIDE) {
        int64_t from = first_key(a, query + i) - key, to = minimum(query + i + SIDE - key, keys);
        from = from > 0 ? from : 0;
        const uint16_t *k = square(a, a->key_columns, group, d->block + (key + from) / SIDE);
        for (int64_t f = 0; f < squares && to > from; f++)
            add_product(k + f * SQUARE, row, s->ds_pairs + from * QUERIES + i * SIDE, QUERIES * SIDE, (to - from) / SIDE,
                        s->dq + f * SIDE * QUERIES + i, QUERIES, 1);
    }
}

static int64_t parts_of_a_group(const attention *a) {
    return (a->heads / a->groups + HEADS - 1) / HEADS;
}

/* a block is up to HEADS query heads of one key/value head, in one document */
static void run_attention_backward(const task *t) {
    const attention *a = t->attention;
    int64_t parts = parts_of_a_group(a) * a->groups, stride = a->heads * a->size, heads = a->heads / a->groups;
    const __m512 scale[2] = {_mm512_set1_ps(a->scale), _mm512_set1_ps(a->scale)};
    _Alignas(64) step s;
    use_tiles();
    for (int64_t i = t->first; i < t->last; i++) {
        const document *d = a->document + i / parts;
        int64_t part = i % parts, group = part % a->groups, first = part / a->groups * HEADS;
        float *sums = a->sums + (part * a->blocks + d->block) * 2 * SIDE * a->size;
        memset(sums, 0, sizeof(float) * 2 * a->size * ((d->length + SIDE - 1) / SIDE * SIDE));
        for (int64_t head = group * heads + first; head < group * heads + minimum(first + HEADS, heads); head++) {
            for (int64_t query = 0; query < d->length; query += QUERIES) {
                load_queries(a, &s, d, head, query);
                for (int64_t key = first_key(a, query); key < minimum(query + QUERIES, d->length); key += KEYS)
                    add_gradients(a, &s, group, d, sums, query, key);
                for (int64_t j = 0; j < QUERIES && query + j < d->length; j += SIDE)
                    write_transposed(s.dq + j, QUERIES, scale, d->length - query - j, a->size,
                                     a->dq + (d->first + query + j) * stride + head * a->size, stride);
            }
        }
    }
    _tile_release();
}

/* the parts' sums -> dk, dv; a block is 32 tokens of one key/value head */
static void run_add_parts(const task *t) {
    const attention *a = t->attention;
    int64_t parts = parts_of_a_group(a), stride = a->groups * a->size;
    for (int64_t i = t->first; i < t->last; i++) {
        int64_t group = i / a->blocks, block = i % a->blocks;
        const document *d = document_of(a, block);
        int64_t row = (block - d->block) * SIDE, first = (d->first + row) * stride + group * a->size;
        for (int64_t j = 0; j < 2 * SIDE * a->size; j += 32) {
            __m512 even = _mm512_setzero_ps(), odd = even, factor = _mm512_set1_ps(j < SIDE * a->size ? 1.0f : a->scale);
            int64_t key = j / a->size % SIDE, column = j % a->size;
            for (int64_t part = group; part < parts * a->groups; part += a->groups) {
                const float *sums = a->sums + (part * a->blocks + block) * 2 * SIDE * a->size + j;
                even = _mm512_add_ps(even, _mm512_load_ps(sums));
                odd = _mm512_add_ps(odd, _mm512_load_ps(sums + 16));
            }
            uint16_t *out = (j < SIDE * a->size ? a->dv : a->dk) + first + key * stride + column;
            if (row + key < d->length)
                _mm512_storeu_si512(out, pairs(_mm512_mul_ps(even, factor), _mm512_mul_ps(odd, factor)));
        }
    }
}

/* ---- called from Python ------------------------------------------------------------------------------------------------- */

/* Fill the documents and count their blocks; return the token at which the last one ends. */
static int64_t find_documents(attention *a, const int64_t *ends) {
    int64_t first = 0;
    for (int64_t i = 0; i < a->documents; first = ends[i], i++) {
        a->document[i] = (document){.first = first, .length = ends[i] - first, .block = a->blocks};
        a->blocks += (ends[i] - first + SIDE - 1) / SIDE;
    }
    return first;
}

static void clear_rows(const attention *a, uint16_t *x, int64_t heads, int64_t first) {
    memset(x + first * heads * a->size, 0, sizeof(uint16_t) * (a->tokens - first) * heads * a->size);
}

void attention_bf16(const uint16_t *q, const uint16_t *k, const uint16_t *v, const int64_t *ends, int64_t documents,
                    int64_t tokens, int64_t heads, int64_t groups, int64_t size, int64_t window, uint16_t *y, float *lse,
                    void *document, uint16_t *tiles, int threads) {
    attention a = {.q = q, .k = k, .v = v, .y = y, .lse = lse, .tokens = tokens, .heads = heads, .groups = groups, .size = size,
                   .window = window, .documents = documents, .document = document, .scale = 1 / sqrtf((float)size)};
    int64_t end = find_documents(&a, ends), numbers = groups * a.blocks * SIDE * size;
    a.key_rows = tiles;
    a.value_columns = tiles + numbers;
    task t = {.run = run_pack_keys, .attention = &a};
    share_blocks(t, groups * a.blocks, threads);
    t.run = run_attention;
    share_blocks(t, heads * a.blocks, threads);
    clear_rows(&a, y, heads, end);
    for (int64_t head = 0; head < heads; head++)
        memset(lse + head * tokens + end, 0, sizeof(float) * (tokens - end));
}

void attention_backward_bf16(const uint16_t *dy, const uint16_t *q, const uint16_t *k, const uint16_t *v, uint16_t *y,
                             float *lse, const int64_t *ends, int64_t documents, int64_t tokens, int64_t heads, int64_t groups,
                             int64_t size, int64_t window, uint16_t *dq, uint16_t *dk, uint16_t *dv, void *document,
                             uint16_t *tiles, float *sums, int threads) {
    attention a = {.dy = dy, .q = q, .k = k, .v = v, .y = y, .lse = lse, .dq = dq, .dk = dk, .dv = dv, .tokens = tokens,
                   .heads = heads, .groups = groups, .size = size, .window = window, .documents = documents, .document = document,
                   .sums = sums, .scale = 1 / sqrtf((float)size)};
    int64_t end = find_documents(&a, ends), numbers = groups * a.blocks * SIDE * size;
    a.key_rows = tiles;
    a.key_columns = tiles + numbers;
    a.value_rows = tiles + 2 * numbers;
    task t = {.run = run_pack_keys, .attention = &a};
    share_blocks(t, groups * a.blocks, threads);
    t.run = run_attention_backward;
    share_blocks(t, a.documents * groups * parts_of_a_group(&a), threads);
    t.run = run_add_parts;
    share_blocks(t, groups * a.blocks, threads);
    clear_rows(&a, dq, heads, end);
    clear_rows(&a, dk, groups, end);
    clear_rows(&a, dv, groups, end);
}
