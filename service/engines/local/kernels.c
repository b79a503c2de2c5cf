/* The arithmetic of a decoder's step on the processor, in bf16 or fp32. ops.py and linear.py say what each does.

   However work is cut into tasks, every sum has one order, which its own row alone decides: results depend neither on
   the number of threads nor on who else is in the batch. Every output of a matrix product is one chain of multiply-adds
   over K, however many rows go through the weights together.

   `wide` is 1 for fp32 and 0 for bf16. Products and sums may be fused, save where transformers rounds between them. */

#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define X86 1
#include <immintrin.h>
#define FOR_512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define FOR_256 __attribute__((target("avx2,fma")))
#define FOR_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")))
#define WIDE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define X86 0
#define WIDE
#endif
#define INLINE static inline __attribute__((always_inline))

#define PAGE 16
#define WIDEST 256 /* elements of a head */
#define CHUNK 128 /* tokens of a context that make a task of attention */
#define ROOM (1 << 22) /* floats that attention keeps between its two passes */
#define MOST 1024 /* rows that it takes between them */
#define ROWS 16 /* of a sequence that go through its keys and values together, at most */
#define GROUP 4   /* query heads that go through the keys together */
#define PANEL 32  /* outputs of a matrix product that make a panel of weights */
#define TILE 12   /* rows that go through a panel together, at most */
#define FEW 4     /* rows for which quantised weights are not unpacked first */
#define SPAN 32    /* inputs that share a scale in int4 */
#define AHEAD 4096 /* bytes of weights that are fetched before their turn */
#define BLOCK 240 /* rows whose inputs stay in the cache while the weights pass */

typedef float F16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));

INLINE float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

/* To nearest, ties to even. */
INLINE uint16_t to_bf16(float value) {
    uint32_t bits = to_bits(value);
    return value != value ? 0x7FC0 : (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

INLINE float from_bf16(uint16_t bits) { return from_bits((uint32_t)bits << 16); }

INLINE float get(const void *values, int64_t i, int wide) {
    return wide ? ((const float *)values)[i] : from_bf16(((const uint16_t *)values)[i]);
}

INLINE void put(void *values, int64_t i, float value, int wide) {
    if (wide)
        ((float *)values)[i] = value;
    else
        ((uint16_t *)values)[i] = to_bf16(value);
}

INLINE float rounded(float value, int wide) { return wide ? value : from_bf16(to_bf16(value)); }

INLINE void *at(const void *values, int64_t i, int wide) { return (char *)values + i * (wide ? 4 : 2); }

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Threads. They do one job at a time. Workers that come too late for a job are not waited for. */

typedef void (*Work)(const void *job, int64_t task);

#define SPINS 3000
#define WORKERS 255

static struct {
    pthread_mutex_t one, lock;
    pthread_cond_t begun, ended;
    atomic_int_fast64_t number, next;
    atomic_int open, busy;
    int asleep, started, wanted;
    Work work;
    const void *job;
    int64_t tasks;
} pool = {.one = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER,
          .begun = PTHREAD_COND_INITIALIZER, .ended = PTHREAD_COND_INITIALIZER};

INLINE void relax(void) {
#if X86
    _mm_pause();
#endif
}

static void take(Work work, const void *job, int64_t tasks) {
    for (int64_t task; (task = atomic_fetch_add(&pool.next, 1)) < tasks;) work(job, task);
}

static void *serve(void *argument) {
    int own = (int)(intptr_t)argument;
    int_fast64_t seen = 0;
    for (;;) {
        for (int spin = 0; spin < SPINS && atomic_load(&pool.number) == seen; spin++) relax();
        pthread_mutex_lock(&pool.lock);
        while (atomic_load(&pool.number) == seen) {
            pool.asleep++;
            pthread_cond_wait(&pool.begun, &pool.lock);
            pool.asleep--;
        }
        seen = atomic_load(&pool.number);
        int joins = atomic_load(&pool.open) && own < pool.wanted;
        Work work = pool.work;
        const void *job = pool.job;
        int64_t tasks = pool.tasks;
        if (joins) atomic_fetch_add(&pool.busy, 1);
        pthread_mutex_unlock(&pool.lock);
        if (!joins) continue;
        take(work, job, tasks);
        pthread_mutex_lock(&pool.lock);
        if (atomic_fetch_sub(&pool.busy, 1) == 1) pthread_cond_signal(&pool.ended);
        pthread_mutex_unlock(&pool.lock);
    }
    return NULL;
}

/* In a forked child no worker lives. */
static void forget(void) {
    pthread_mutex_init(&pool.one, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.begun, NULL);
    pthread_cond_init(&pool.ended, NULL);
    atomic_store(&pool.open, 0);
    atomic_store(&pool.busy, 0);
    pool.asleep = pool.started = 0;
}

static void start(void) {
    static int registered = 0;
    if (!registered) registered = !pthread_atfork(NULL, NULL, forget);
    while (pool.started < pool.wanted) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, serve, (void *)(intptr_t)pool.started)) break;
        pthread_detach(thread);
        pool.started++;
    }
}

/* How many threads work, the caller among them. */
void set_threads(int count) {
    pthread_mutex_lock(&pool.one);
    pthread_mutex_lock(&pool.lock);
    pool.wanted = (int)least(count < 1 ? 0 : count - 1, WORKERS);
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.one);
}

static void loop(Work work, const void *job, int64_t tasks) {
    for (int64_t task = 0; task < tasks; task++) work(job, task);
}

/* With pool.one held, which it gives back. */
static void share(Work work, const void *job, int64_t tasks) {
    if (pool.started < pool.wanted) start();
    pthread_mutex_lock(&pool.lock);
    pool.work = work;
    pool.job = job;
    pool.tasks = tasks;
    atomic_store(&pool.next, 0);
    atomic_store(&pool.open, 1);
    atomic_fetch_add(&pool.number, 1);
    if (pool.asleep) pthread_cond_broadcast(&pool.begun);
    pthread_mutex_unlock(&pool.lock);
    take(work, job, tasks);
    pthread_mutex_lock(&pool.lock);
    atomic_store(&pool.open, 0);
    pthread_mutex_unlock(&pool.lock);
    for (int spin = 0; spin < SPINS && atomic_load(&pool.busy); spin++) relax();
    pthread_mutex_lock(&pool.lock);
    while (atomic_load(&pool.busy)) pthread_cond_wait(&pool.ended, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.one);
}

/* With all threads, when they are free: a long job has them sooner by waiting than it would be done alone. */
static void run(Work work, const void *job, int64_t tasks) {
    if (tasks < 2 || !pool.wanted) {
        loop(work, job, tasks);
        return;
    }
    pthread_mutex_lock(&pool.one);
    share(work, job, tasks);
}

/* With all threads, if they are free now: for short jobs, whose callers keep the interpreter's lock. */
static void run_now(Work work, const void *job, int64_t tasks) {
    if (tasks < 2 || !pool.wanted || pthread_mutex_trylock(&pool.one))
        loop(work, job, tasks);
    else
        share(work, job, tasks);
}

/* How many of `count` rows make a task, where each does `each` steps: all, when there is little to do. */
static int64_t grain(int64_t count, int64_t each) {
    return count * each < 65536 ? (count ? count : 1) : each < 8192 ? (8192 + each - 1) / each : 1;
}

/* Elementwise. */

INLINE void rms(const void *x, const void *weight, float eps, void *out, int64_t count, int wide) {
    float lanes[64] = {0}, sum = 0;
    int64_t whole = count / 64 * 64;
    for (int64_t i = 0; i < whole; i += 64)
        for (int lane = 0; lane < 64; lane++) {
            float value = get(x, i + lane, wide);
            lanes[lane] += value * value;
        }
    for (int64_t i = whole; i < count; i++) lanes[i - whole] += get(x, i, wide) * get(x, i, wide);
    for (int half = 32; half; half /= 2)
        for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
    sum = lanes[0];
    float factor = 1.0f / sqrtf(sum / (float)count + eps);
    for (int64_t i = 0; i < count; i++)
        put(out, i, rounded(get(x, i, wide) * factor, wide) * get(weight, i, wide), wide);
}

typedef struct {
    void *hidden;
    const void *delta, *weight;
    void *out;
    int64_t rows, width, step;
    float eps;
} Norm;

INLINE void norm_rows(const Norm *job, int64_t task, int wide) {
    int64_t stop = least((task + 1) * job->step, job->rows);
    for (int64_t row = task * job->step; row < stop; row++) {
        void *hidden = at(job->hidden, row * job->width, wide);
        if (job->delta) {
            const void *delta = at(job->delta, row * job->width, wide);
            for (int64_t i = 0; i < job->width; i++) put(hidden, i, get(hidden, i, wide) + get(delta, i, wide), wide);
        }
        rms(hidden, job->weight, job->eps, at(job->out, row * job->width, wide), job->width, wide);
    }
}

WIDE static void norm_bf16(const void *job, int64_t task) { norm_rows(job, task, 0); }
WIDE static void norm_fp32(const void *job, int64_t task) { norm_rows(job, task, 1); }

/* hidden[rows][width] += delta unless NULL; out = RMSNorm of it. */
void norm(int wide, void *hidden, const void *delta, const void *weight, float eps, void *out, int64_t rows,
          int64_t width) {
    int64_t step = grain(rows, width);
    Norm job = {hidden, delta, weight, out, rows, width, step, eps};
    run_now(wide ? norm_fp32 : norm_bf16, &job, (rows + step - 1) / step);
}

typedef struct {
    void *qkv;
    const void *cos, *sin;
    void *memory;
    const int64_t *slots;
    int64_t rows, heads, kv_heads, width, layer, step;
    const void *q_norm, *k_norm;
    float eps;
} Place;

#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")

INLINE void turn(void *head, const void *cos, const void *sin, int64_t width, int wide) {
    int64_t half = width / 2;
    void *other = at(head, half, wide);
    const void *cos_2 = at(cos, half, wide), *sin_2 = at(sin, half, wide);
    for (int64_t i = 0; i < half; i++) {
        float a = get(head, i, wide), b = get(other, i, wide);
        float left = rounded(a * get(cos, i, wide), wide) + rounded(-b * get(sin, i, wide), wide);
        float right = rounded(b * get(cos_2, i, wide), wide) + rounded(a * get(sin_2, i, wide), wide);
        put(head, i, left, wide);
        put(other, i, right, wide);
    }
}

INLINE void place_rows(const Place *job, int64_t task, int wide) {
    int64_t width = job->width, turned = job->heads + job->kv_heads, all = turned + job->kv_heads;
    int64_t stop = least((task + 1) * job->step, job->rows);
    for (int64_t row = task * job->step; row < stop; row++) {
        const void *cos = at(job->cos, row * width, wide), *sin = at(job->sin, row * width, wide);
        int64_t slot = job->slots[row] + job->layer * 2 * job->kv_heads * PAGE * width;
        for (int64_t head = 0; head < all; head++) {
            void *own = at(job->qkv, (row * all + head) * width, wide);
            const void *norm = head < job->heads ? job->q_norm : job->k_norm;
            if (head < turned) {
                if (norm) rms(own, norm, job->eps, own, width, wide);
                turn(own, cos, sin, width, wide);
            }
            if (head >= job->heads) {
                memcpy(at(job->memory, slot, wide), own, (size_t)width * (wide ? 4 : 2));
                slot += PAGE * width;
            }
        }
    }
}

WIDE static void place_bf16(const void *job, int64_t task) { place_rows(job, task, 0); }
WIDE static void place_fp32(const void *job, int64_t task) { place_rows(job, task, 1); }

#pragma GCC pop_options

void place(int wide, void *qkv, const void *cos, const void *sin, void *memory, const int64_t *slots, int64_t rows,
           int64_t heads, int64_t kv_heads, int64_t width, int64_t layer, const void *q_norm, const void *k_norm,
           float eps) {
    int64_t step = grain(rows, (heads + 2 * kv_heads) * width);
    Place job = {qkv, cos, sin, memory, slots, rows, heads, kv_heads, width, layer, step, q_norm, k_norm, eps};
    run_now(wide ? place_fp32 : place_bf16, &job, (rows + step - 1) / step);
}

typedef struct {
    const void *memory;
    const int64_t *table;
    void *keys, *values;
    int64_t length, kv_heads, width, layer;
    size_t size;
} Gather;

static void gather_page(const void *argument, int64_t page) {
    const Gather *job = argument;
    size_t row = (size_t)job->width * job->size, block = row * PAGE;
    size_t bytes = row * (size_t)least(PAGE, job->length - page * PAGE);
    const char *from = (const char *)job->memory + (size_t)job->table[page] * job->size;
    from += (size_t)(job->layer * 2 * job->kv_heads) * block;
    for (int64_t head = 0; head < 2 * job->kv_heads; head++, from += block) {
        char *to = head < job->kv_heads ? job->keys : job->values;
        memcpy(to + (size_t)(head % job->kv_heads * job->length + page * PAGE) * row, from, bytes);
    }
}

void gather(int wide, const void *memory, const int64_t *table, int64_t length, int64_t kv_heads, int64_t width,
            int64_t layer, void *keys, void *values) {
    Gather job = {memory, table, keys, values, length, kv_heads, width, layer, wide ? 4 : 2};
    int64_t pages = (length + PAGE - 1) / PAGE;
    (length * kv_heads * width < 32768 ? loop : run)(gather_page, &job, pages);
}

/* e^x to about one unit in the last place; NaN stays. */
INLINE float exponential(float x) {
    x = x > 89.0f ? 89.0f : x;
    x = x < -87.3f ? -87.3f : x;
    float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * from_bits((to_bits(shifted) - 0x4B400000u + 127u) << 23);
}

typedef struct {
    const void *gate_up;
    void *out;
    int64_t rows, width, step;
} Silu;

INLINE void silu_rows(const Silu *job, int64_t task, int wide) {
    int64_t stop = least((task + 1) * job->step, job->rows), width = job->width;
    for (int64_t row = task * job->step; row < stop; row++) {
        const void *gate = at(job->gate_up, row * 2 * width, wide), *up = at(gate, width, wide);
        void *out = at(job->out, row * width, wide);
        for (int64_t i = 0; i < width; i++) {
            float value = get(gate, i, wide);
            put(out, i, rounded(value / (1.0f + exponential(-value)), wide) * get(up, i, wide), wide);
        }
    }
}

WIDE static void silu_bf16(const void *job, int64_t task) { silu_rows(job, task, 0); }
WIDE static void silu_fp32(const void *job, int64_t task) { silu_rows(job, task, 1); }

/* out[rows][width] = silu(gate) * up of gate_up[rows][2 width]. */
void silu_mul(int wide, const void *gate_up, void *out, int64_t rows, int64_t width) {
    int64_t step = grain(rows, width * 2);
    Silu job = {gate_up, out, rows, width, step};
    run_now(wide ? silu_fp32 : silu_bf16, &job, (rows + step - 1) / step);
}

/* Attention. A task is a chunk of tokens below one key-value head, for a row, or for some rows of one sequence; then the
   chunks of a row are put together in their order. */

/* A page of keys, and two of keys or values that are wanted next. Of bf16, vectors take 32 elements apart: 16 even ones
   and 16 odd ones. Queries and weighted values lie as the vectors have them. */
typedef struct {
    const void *keys;
    const char *next, *after;
} Page;

/* scores[head][token] of a page for `count` queries, unscaled. */
typedef void (*Score)(const void *queries, const Page *page, int64_t width, float *scores, int64_t count);

typedef struct {
    const void *queries, *memory;
    const int64_t *tables, *lengths;
    const int64_t *blocks; /* where each block of rows that have one table begins, and where the last ends */
    void *out;
    float *parts; /* [rows][chunks][heads][width + 2]: weighted values, their weights' sum, the largest score */
    int64_t stride, chunks, pages, heads, kv_heads, width, layer, window;
    float scale;
    Score score;
} Attend;

/* What a row sees of a chunk: its tokens first .. last - 1, or none. */
INLINE int sees(const Attend *job, int64_t row, int64_t chunk, int64_t *first, int64_t *last) {
    int64_t start = chunk * CHUNK, length = job->lengths[row];
    *first = job->window && length - job->window > start ? length - job->window - start : 0;
    *last = least(length - start, CHUNK);
    return *first < *last;
}

/* Where the keys and values of those tokens are, by page. */
INLINE void find(const Attend *job, int64_t row, int64_t chunk, int64_t shared, int64_t first, int64_t last,
                 const void **keys, const void **values, int wide) {
    const int64_t *table = job->tables + row * job->pages + chunk * CHUNK / PAGE;
    int64_t inside = (job->layer * 2 * job->kv_heads + shared) * PAGE * job->width;
    for (int64_t page = first / PAGE; page * PAGE < last; page++) {
        keys[page] = at(job->memory, table[page] + inside, wide);
        values[page] = at(keys[page], job->kv_heads * PAGE * job->width, wide);
    }
}

INLINE F16 load_16(const float *values) {
    F16 lanes;
    memcpy(&lanes, values, 64);
    return lanes;
}

/* 32 elements. */
INLINE void load_32(const void *values, int64_t i, F16 *lanes, int wide) {
    U16 raw;
    if (wide) {
        lanes[0] = load_16((const float *)values + i);
        lanes[1] = load_16((const float *)values + i + 16);
    } else {
        memcpy(&raw, (const uint16_t *)values + i, 64);
        lanes[0] = (F16)(raw << 16);
        lanes[1] = (F16)(raw & 0xFFFF0000u);
    }
}

INLINE void score_page(const float *queries, const Page *page, int64_t width, float *scores, int64_t count, int wide) {
    for (int64_t head = 0; head < count; head++, queries += width, scores += CHUNK)
        for (int token = 0; token < PAGE; token++) {
            float lanes[16] = {0};
            for (int64_t d = 0; d < width; d += 32) {
                F16 key[2];
                load_32(page->keys, token * width + d, key, wide);
                key[0] = key[0] * load_16(queries + d) + key[1] * load_16(queries + d + 16);
                for (int i = 0; i < 16; i++) lanes[i] += key[0][i];
            }
            for (int half = 8; half; half /= 2)
                for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
            scores[token] = lanes[0];
        }
}

static void score_bf16(const void *queries, const Page *page, int64_t width, float *scores, int64_t count) {
    score_page(queries, page, width, scores, count, 0);
}
static void score_fp32(const void *queries, const Page *page, int64_t width, float *scores, int64_t count) {
    score_page(queries, page, width, scores, count, 1);
}

#if X86
FOR_256 static void score_bf16_256(const void *queries, const Page *page, int64_t width, float *scores, int64_t count) {
    score_page(queries, page, width, scores, count, 0);
}
FOR_256 static void score_fp32_256(const void *queries, const Page *page, int64_t width, float *scores, int64_t count) {
    score_page(queries, page, width, scores, count, 1);
}

/* The sums of four vectors' quarters, a, b, c, d in each. */
FOR_512 INLINE __m512 quarters(const __m512 *four) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(four[0], four[1]), _mm512_unpackhi_ps(four[0], four[1]));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(four[2], four[3]), _mm512_unpackhi_ps(four[2], four[3]));
    return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
}

/* Two vectors' quarters, each added to its neighbour. */
FOR_512 INLINE __m512 neighbours(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}

/* `lanes` += products of a query's and a key's 32 elements. */
FOR_512 INLINE __m512 products(const float *query, const F16 *key, __m512 lanes) {
    lanes = _mm512_fmadd_ps(_mm512_loadu_ps(query), (__m512)key[0], lanes);
    return _mm512_fmadd_ps(_mm512_loadu_ps(query + 16), (__m512)key[1], lanes);
}

FOR_512 INLINE void score_some(const float *queries, const Page *page, int64_t width, float *scores, int count,
                               int wide) {
    __m512 sums[GROUP][4];
#pragma GCC unroll 4
    for (int four = 0; four < 4; four++) {
        __m512 lanes[GROUP][4];
        int64_t start = four * 4 * width;
#pragma GCC unroll 4
        for (int head = 0; head < count; head++)
#pragma GCC unroll 4
            for (int token = 0; token < 4; token++) lanes[head][token] = _mm512_setzero_ps();
        for (int64_t d = 0; d < width; d += 32) {
#pragma GCC unroll 4
            for (int token = 0; token < 4; token++) {
                F16 key[2];
                load_32(page->keys, start + token * width + d, key, wide);
                __builtin_prefetch(at(page->next, start + token * width + d, wide));
                __builtin_prefetch(at(page->after, start + token * width + d, wide));
#pragma GCC unroll 4
                for (int head = 0; head < count; head++)
                    lanes[head][token] = products(queries + head * width + d, key, lanes[head][token]);
            }
        }
#pragma GCC unroll 4
        for (int head = 0; head < count; head++) sums[head][four] = quarters(lanes[head]);
    }
#pragma GCC unroll 4
    for (int head = 0; head < count; head++) {
        __m512 low = neighbours(sums[head][0], sums[head][1]), high = neighbours(sums[head][2], sums[head][3]);
        _mm512_storeu_ps(scores + head * CHUNK, neighbours(low, high));
    }
}

#define SCORE(name, wide)                                                                                              \
    FOR_512 static void name(const void *queries, const Page *page, int64_t width, float *scores, int64_t count) {     \
        switch (count) {                                                                                               \
        case 1: score_some(queries, page, width, scores, 1, wide); break;                                              \
        case 2: score_some(queries, page, width, scores, 2, wide); break;                                              \
        case 3: score_some(queries, page, width, scores, 3, wide); break;                                              \
        default: score_some(queries, page, width, scores, GROUP, wide);                                                \
        }                                                                                                              \
    }
SCORE(score_bf16_512, 0)
SCORE(score_fp32_512, 1)

static int has_512(void) {
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}

static int has_256(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

/* Scores become weights, e^(score - largest), in whole vectors; those before first and from last on become nothing. */
INLINE void weigh(float *scores, int64_t first, int64_t last, float scale, float *sum, float *largest) {
    int64_t begin = first / 16 * 16, end = (last + 15) / 16 * 16;
    float most[16], sums[16] = {0};
    for (int64_t token = begin; token < first; token++) scores[token] = -INFINITY;
    for (int64_t token = last; token < end; token++) scores[token] = -INFINITY;
    for (int i = 0; i < 16; i++) most[i] = -INFINITY;
    for (int64_t token = begin; token < end; token += 16)
        for (int i = 0; i < 16; i++) {
            scores[token + i] *= scale;
            most[i] = scores[token + i] > most[i] ? scores[token + i] : most[i];
        }
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) most[i] = most[i + half] > most[i] ? most[i + half] : most[i];
    for (int64_t token = begin; token < end; token += 16)
        for (int i = 0; i < 16; i++) {
            scores[token + i] = exponential(scores[token + i] - most[0]);
            sums[i] += scores[token + i];
        }
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) sums[i] += sums[i + half];
    *sum = sums[0];
    *largest = most[0];
}

/* The weighted sum of 32 * `blocks` elements of the values from d on, for `count` heads. */
INLINE void blend(const float *scores, const void *const *values, int64_t first, int64_t last, int64_t width, int64_t d,
                  float *part, int blocks, int count, int wide) {
    F16 sums[GROUP][4] = {{{0}}};
    for (int64_t token = first; token < last;) {
        const void *value = at(values[token / PAGE], token % PAGE * width + d, wide);
        int64_t end = least(last, (token / PAGE + 1) * PAGE);
        for (; token < end; token++, value = at(value, width, wide)) {
            F16 lanes[4];
            for (int block = 0; block < blocks; block++) load_32(value, 32 * block, lanes + 2 * block, wide);
#pragma GCC unroll 4
            for (int head = 0; head < count; head++)
#pragma GCC unroll 4
                for (int i = 0; i < 2 * blocks; i++) sums[head][i] += lanes[i] * scores[head * CHUNK + token];
        }
    }
#pragma GCC unroll 4
    for (int head = 0; head < count; head++)
        memcpy(part + head * (width + 2) + d, sums[head], (size_t)blocks * 128);
}

/* `count` query heads that share keys over the tokens first .. last - 1 of a chunk. */
INLINE void attend_heads(const Attend *job, const float *queries, const void *const *keys, const void *const *values,
                         int64_t first, int64_t last, float *part, int count, int wide, int roomy) {
    int64_t width = job->width;
    float scores[GROUP * CHUNK] __attribute__((aligned(64)));
    for (int64_t page = first / PAGE; page * PAGE < last; page++) {
        Page both = {keys[page], (page + 1) * PAGE < last ? keys[page + 1] : values[page], values[page]};
        job->score(queries, &both, width, scores + page * PAGE, count);
    }
    for (int head = 0; head < count; head++) {
        float *out = part + head * (width + 2) + width;
        weigh(scores + head * CHUNK, first, last, job->scale, out, out + 1);
    }
    int64_t d = 0;
    if (roomy || count < 3)
        for (; d + 64 <= width; d += 64) blend(scores, values, first, last, width, d, part, 2, count, wide);
    for (; d < width; d += 32) blend(scores, values, first, last, width, d, part, 1, count, wide);
}

/* roomy: there are registers for eight vectors' sums twice. */
INLINE void attend_chunk(const Attend *job, int64_t task, int wide, int roomy) {
    int64_t width = job->width, group = job->heads / job->kv_heads;
    int64_t chunk = task % job->chunks, shared = task / job->chunks % job->kv_heads;
    int64_t row = task / job->chunks / job->kv_heads, first, last;
    const void *keys[CHUNK / PAGE], *values[CHUNK / PAGE];
    if (!sees(job, row, chunk, &first, &last)) return;
    find(job, row, chunk, shared, first, last, keys, values, wide);
    float queries[GROUP * WIDEST] __attribute__((aligned(64)));
    for (int64_t head = shared * group; head < (shared + 1) * group;) {
        int64_t count = least((shared + 1) * group - head, GROUP);
        int64_t query = row * job->stride + head * width;
        for (int64_t i = 0; i < count * width; i += 32) {
            F16 lanes[2];
            load_32(job->queries, query + i, lanes, wide);
            memcpy(queries + i, lanes, sizeof lanes);
        }
        float *part = job->parts + ((row * job->chunks + chunk) * job->heads + head) * (width + 2);
        switch (count) {
        case 1: attend_heads(job, queries, keys, values, first, last, part, 1, wide, roomy); break;
        case 2: attend_heads(job, queries, keys, values, first, last, part, 2, wide, roomy); break;
        case 3: attend_heads(job, queries, keys, values, first, last, part, 3, wide, roomy); break;
        default: attend_heads(job, queries, keys, values, first, last, part, GROUP, wide, roomy);
        }
        head += count;
    }
}

#if X86
/* Where the processor multiplies bf16 itself, pairs of bf16 go by words: two elements of one key, or one element of two
   values. A page's keys are laid out once for a block of rows, with its 16 tokens side by side, and so are its values,
   in pairs of tokens: then a score is a sum in one lane, whichever rows are around. Weights are rounded to bf16, and
   divided by the sum of what they became. */

/* The 16 x 16 words of `rows`, mirrored. */
FOR_BF16 INLINE void mirror(__m512i *rows) {
    __m512i twos[16], fours[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        twos[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        twos[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        fours[i] = _mm512_unpacklo_epi64(twos[i], twos[i + 2]);
        fours[i + 1] = _mm512_unpackhi_epi64(twos[i], twos[i + 2]);
        fours[i + 2] = _mm512_unpacklo_epi64(twos[i + 1], twos[i + 3]);
        fours[i + 3] = _mm512_unpackhi_epi64(twos[i + 1], twos[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512i a = _mm512_shuffle_i32x4(fours[i], fours[i + 4], 0x88);
        __m512i b = _mm512_shuffle_i32x4(fours[i], fours[i + 4], 0xDD);
        __m512i c = _mm512_shuffle_i32x4(fours[i + 8], fours[i + 12], 0x88);
        __m512i d = _mm512_shuffle_i32x4(fours[i + 8], fours[i + 12], 0xDD);
        rows[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        rows[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(a, c, 0xDD);
        rows[i + 12] = _mm512_shuffle_i32x4(b, d, 0xDD);
    }
}

/* [width / 2][16 tokens] words of a page's keys; `next` is wanted soon. */
FOR_BF16 INLINE void lay_keys(const char *keys, const char *next, int64_t width, uint32_t *laid) {
    for (int64_t d = 0; d < width; d += 32) {
        __m512i rows[16];
#pragma GCC unroll 16
        for (int token = 0; token < 16; token++) {
            rows[token] = _mm512_loadu_si512(keys + (token * width + d) * 2);
            __builtin_prefetch(next + (token * width + d) * 2);
        }
        mirror(rows);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) _mm512_store_si512(laid + (d / 2 + i) * 16, rows[i]);
    }
}

/* [8 pairs of tokens][width] words of a page's values, nothing for tokens that are not first .. last - 1, which may be
   anything, even NaN. Of 32 elements, 0-3, 8-11, 16-19 and 24-27 come before the others. */
FOR_BF16 INLINE void lay_values(const char *values, const char *next, int64_t width, int64_t first, int64_t last,
                                uint32_t *laid) {
    for (int64_t token = 0; token < PAGE; token += 2)
        for (int64_t d = 0; d < width; d += 32, laid += 32) {
            const char *from = values + (token * width + d) * 2;
            __m512i one = _mm512_setzero_si512(), two = one;
            if (token >= first && token < last) one = _mm512_loadu_si512(from);
            if (token + 1 >= first && token + 1 < last) two = _mm512_loadu_si512(from + width * 2);
            __builtin_prefetch(next + (token * width + d) * 2);
            __builtin_prefetch(next + ((token + 1) * width + d) * 2);
            _mm512_store_si512(laid, _mm512_unpacklo_epi16(one, two));
            _mm512_store_si512(laid + 16, _mm512_unpackhi_epi16(one, two));
        }
}

/* scores[head][16 * pages] of pages that lie one after the other. */
FOR_BF16 INLINE void score_laid(const uint16_t *queries, const uint32_t *keys, int64_t width, float *scores, int count,
                                int pages) {
    __m512 sums[GROUP][4];
#pragma GCC unroll 4
    for (int head = 0; head < count; head++)
#pragma GCC unroll 4
        for (int page = 0; page < pages; page++) sums[head][page] = _mm512_setzero_ps();
    for (int64_t d = 0; d < width; d += 2) {
        __m512bh words[4];
#pragma GCC unroll 4
        for (int page = 0; page < pages; page++)
            words[page] = (__m512bh)_mm512_load_si512(keys + page * width * 8 + d * 8);
#pragma GCC unroll 4
        for (int head = 0; head < count; head++) {
            int32_t both;
            memcpy(&both, queries + head * width + d, 4);
            __m512bh query = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 4
            for (int page = 0; page < pages; page++)
                sums[head][page] = _mm512_dpbf16_ps(sums[head][page], words[page], query);
        }
    }
#pragma GCC unroll 4
    for (int head = 0; head < count; head++)
#pragma GCC unroll 4
        for (int page = 0; page < pages; page++) _mm512_storeu_ps(scores + head * CHUNK + page * PAGE, sums[head][page]);
}

/* e^x for x up to 0, to about one unit in the last place; NaN stays. */
FOR_BF16 INLINE __m512 exponentials(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

/* Which of 16 tokens from `token` on are first .. last - 1. */
FOR_BF16 INLINE __mmask16 seen(int64_t first, int64_t last, int64_t token) {
    int64_t begin = first > token ? first - token : 0, end = least(last - token, 16);
    return (__mmask16)((0xFFFFu >> (16 - end)) & (0xFFFFu << begin));
}

/* The weights of tokens first .. last - 1, e^(score - largest), in bf16, and nothing for those around; their sum. */
FOR_BF16 INLINE void weigh_laid(const float *scores, int64_t first, int64_t last, float scale, uint16_t *weights,
                                float *sum, float *largest) {
    __m512 most = _mm512_set1_ps(-INFINITY), sums = _mm512_setzero_ps(), factor = _mm512_set1_ps(scale);
    int64_t begin = first / 16 * 16;
    for (int64_t token = begin; token < last; token += 16) {
        __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(scores + token), factor);
        most = _mm512_mask_max_ps(most, seen(first, last, token), scaled, most);
    }
    *largest = _mm512_reduce_max_ps(most);
    most = _mm512_set1_ps(*largest);
    for (int64_t token = begin; token < last; token += 16) {
        __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(scores + token), factor);
        __m512 weight = _mm512_maskz_mov_ps(seen(first, last, token), exponentials(_mm512_sub_ps(scaled, most)));
        __m256i rounded = (__m256i)_mm512_cvtneps_pbh(weight);
        _mm256_storeu_si256((__m256i *)(weights + token), rounded);
        sums = _mm512_add_ps(sums, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16)));
    }
    *sum = _mm512_reduce_add_ps(sums);
}

/* The weighted sum of 32 * `blocks` elements from d on, for `count` heads. */
FOR_BF16 INLINE void blend_laid(const uint16_t *weights, const uint32_t *values, int64_t first, int64_t last,
                                int64_t width, int64_t d, float *part, int count, int blocks) {
    /* Where of 32 elements, as lay_values has them, the even ones are; the odd ones come next. */
    const __m512i even = _mm512_set_epi32(30, 28, 14, 12, 26, 24, 10, 8, 22, 20, 6, 4, 18, 16, 2, 0);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    __m512 sums[GROUP][4];
#pragma GCC unroll 4
    for (int head = 0; head < count; head++)
#pragma GCC unroll 4
        for (int i = 0; i < 2 * blocks; i++) sums[head][i] = _mm512_setzero_ps();
    for (int64_t token = first / 2 * 2; token < last; token += 2) {
        __m512bh words[4];
#pragma GCC unroll 4
        for (int i = 0; i < 2 * blocks; i++)
            words[i] = (__m512bh)_mm512_load_si512(values + token / 2 * width + d + 16 * i);
#pragma GCC unroll 4
        for (int head = 0; head < count; head++) {
            int32_t both;
            memcpy(&both, weights + head * CHUNK + token, 4);
            __m512bh weight = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 4
            for (int i = 0; i < 2 * blocks; i++) sums[head][i] = _mm512_dpbf16_ps(sums[head][i], words[i], weight);
        }
    }
#pragma GCC unroll 4
    for (int head = 0; head < count; head++)
#pragma GCC unroll 2
        for (int block = 0; block < blocks; block++) {
            float *out = part + head * (width + 2) + d + 32 * block;
            __m512 low = sums[head][2 * block], high = sums[head][2 * block + 1];
            _mm512_storeu_ps(out, _mm512_permutex2var_ps(low, even, high));
            _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(low, odd, high));
        }
}

/* `count` query heads over the tokens first .. last - 1 of a chunk. */
FOR_BF16 INLINE void attend_laid(const Attend *job, const uint16_t *queries, const uint32_t *keys,
                                 const uint32_t *values, int64_t first, int64_t last, float *part, int count) {
    int64_t width = job->width, page = first / PAGE, pages = (last + PAGE - 1) / PAGE, d = 0;
    float scores[GROUP * CHUNK] __attribute__((aligned(64)));
    uint16_t weights[GROUP * CHUNK] __attribute__((aligned(64)));
    for (; page + 4 <= pages; page += 4)
        score_laid(queries, keys + page * width * 8, width, scores + page * PAGE, count, 4);
    for (; page < pages; page++)
        score_laid(queries, keys + page * width * 8, width, scores + page * PAGE, count, 1);
    for (int head = 0; head < count; head++) {
        float *out = part + head * (width + 2) + width;
        weigh_laid(scores + head * CHUNK, first, last, job->scale, weights + head * CHUNK, out, out + 1);
    }
    for (; d + 64 <= width; d += 64) blend_laid(weights, values, first, last, width, d, part, count, 2);
    for (; d < width; d += 32) blend_laid(weights, values, first, last, width, d, part, count, 1);
}

FOR_BF16 static void attend_dots(const void *argument, int64_t task) {
    const Attend *job = argument;
    int64_t width = job->width, group = job->heads / job->kv_heads, first, last, low = CHUNK, high = 0;
    int64_t chunk = task % job->chunks, shared = task / job->chunks % job->kv_heads;
    int64_t block = task / job->chunks / job->kv_heads, begin = job->blocks[block], end = job->blocks[block + 1];
    for (int64_t row = begin; row < end; row++)
        if (sees(job, row, chunk, &first, &last)) low = least(low, first), high = last > high ? last : high;
    if (low >= high) return;
    const void *keys[CHUNK / PAGE], *values[CHUNK / PAGE];
    uint32_t laid_keys[CHUNK * WIDEST / 2] __attribute__((aligned(64)));
    uint32_t laid_values[CHUNK * WIDEST / 2] __attribute__((aligned(64)));
    find(job, begin, chunk, shared, low, high, keys, values, 0);
    for (int64_t page = low / PAGE; page * PAGE < high; page++) {
        int64_t next = (page + 1) * PAGE < high ? page + 1 : page;
        lay_keys(keys[page], keys[next], width, laid_keys + page * width * 8);
        lay_values(values[page], values[next], width, low - page * PAGE, high - page * PAGE,
                   laid_values + page * width * 8);
    }
    for (int64_t row = begin; row < end; row++) {
        if (!sees(job, row, chunk, &first, &last)) continue;
        for (int64_t head = shared * group, count; head < (shared + 1) * group; head += count) {
            const uint16_t *queries = (const uint16_t *)job->queries + row * job->stride + head * width;
            float *part = job->parts + ((row * job->chunks + chunk) * job->heads + head) * (width + 2);
            count = least((shared + 1) * group - head, GROUP);
            switch (count) {
            case 1: attend_laid(job, queries, laid_keys, laid_values, first, last, part, 1); break;
            case 2: attend_laid(job, queries, laid_keys, laid_values, first, last, part, 2); break;
            case 3: attend_laid(job, queries, laid_keys, laid_values, first, last, part, 3); break;
            default: attend_laid(job, queries, laid_keys, laid_values, first, last, part, GROUP);
            }
        }
    }
}

static int has_dots(void) { return has_512() && __builtin_cpu_supports("avx512bf16"); }
#endif

INLINE void join_chunks(const Attend *job, int64_t row, int wide) {
    int64_t width = job->width, length = job->lengths[row], chunks = (length + CHUNK - 1) / CHUNK;
    int64_t first = job->window && length > job->window ? (length - job->window) / CHUNK : 0;
    int64_t step = job->heads * (width + 2);
    for (int64_t head = 0; head < job->heads; head++) {
        const float *parts = job->parts + row * job->chunks * step + head * (width + 2);
        float sums[WIDEST] = {0}, weight = 0, largest = -INFINITY;
        void *out = at(job->out, (row * job->heads + head) * width, wide);
        for (int64_t chunk = first; chunk < chunks; chunk++)
            largest = parts[chunk * step + width + 1] > largest ? parts[chunk * step + width + 1] : largest;
        for (int64_t chunk = first; chunk < chunks; chunk++) {
            const float *part = parts + chunk * step;
            float factor = exponential(part[width + 1] - largest);
            weight += part[width] * factor;
            for (int64_t i = 0; i < width; i++) sums[i] += part[i] * factor;
        }
        for (int64_t d = 0; d < width; d += 32)
            for (int i = 0; i < 16; i++) {
                put(out, wide ? d + i : d + 2 * i, sums[d + i] / weight, wide);
                put(out, wide ? d + 16 + i : d + 2 * i + 1, sums[d + 16 + i] / weight, wide);
            }
    }
}

static void attend_bf16(const void *job, int64_t task) { attend_chunk(job, task, 0, 0); }
static void attend_fp32(const void *job, int64_t task) { attend_chunk(job, task, 1, 0); }
#if X86
FOR_256 static void attend_bf16_256(const void *job, int64_t task) { attend_chunk(job, task, 0, 0); }
FOR_256 static void attend_fp32_256(const void *job, int64_t task) { attend_chunk(job, task, 1, 0); }
FOR_512 static void attend_bf16_512(const void *job, int64_t task) { attend_chunk(job, task, 0, 1); }
FOR_512 static void attend_fp32_512(const void *job, int64_t task) { attend_chunk(job, task, 1, 1); }
#endif

WIDE static void join_bf16(const void *job, int64_t task) { join_chunks(job, task, 0); }
WIDE static void join_fp32(const void *job, int64_t task) { join_chunks(job, task, 1); }

/* The work of a task, and how it scores. */
static Work attention(int wide, Score *score) {
    *score = wide ? score_fp32 : score_bf16;
#if X86
    if (!wide && has_dots()) return attend_dots;
    if (has_512()) {
        *score = wide ? score_fp32_512 : score_bf16_512;
        return wide ? attend_fp32_512 : attend_bf16_512;
    }
    if (has_256()) {
        *score = wide ? score_fp32_256 : score_bf16_256;
        return wide ? attend_fp32_256 : attend_bf16_256;
    }
#endif
    return wide ? attend_fp32 : attend_bf16;
}

/* Whether a row has the pages of the one before it, as tokens of one sequence do. */
INLINE int follows(const Attend *job, int64_t row) {
    const int64_t *table = job->tables + row * job->pages, *lengths = job->lengths + row;
    int64_t length = lengths[0] > lengths[-1] ? lengths[0] : lengths[-1];
    return !memcmp(table - job->pages, table, (size_t)((length + PAGE - 1) / PAGE) * sizeof *table);
}

/* How many blocks of at most `most` rows of one sequence there are; where each begins, and where the last ends. */
static int64_t cut(const Attend *job, int64_t rows, int64_t most, int64_t *blocks) {
    int64_t count = 0;
    for (int64_t row = 0; row < rows; row++)
        if (!row || row - blocks[count - 1] == most || !follows(job, row)) blocks[count++] = row;
    blocks[count] = rows;
    return count;
}

/* out[rows][heads * width] of the queries that begin each row of `stride` elements; a row's table begins `pages` after
   the one before. width is a multiple of 32, at most WIDEST. window: 0 is none. 0: out of memory. */
int attend(int wide, const void *queries, int64_t stride, const void *memory, const int64_t *tables,
           const int64_t *lengths, void *out, int64_t rows, int64_t pages, int64_t heads, int64_t kv_heads,
           int64_t width, int64_t layer, int64_t window, float scale) {
    static _Thread_local float *parts = NULL;
    static _Thread_local int64_t room = 0;
    int64_t longest = 1;
    for (int64_t row = 0; row < rows; row++) longest = lengths[row] > longest ? lengths[row] : longest;
    int64_t chunks = (longest + CHUNK - 1) / CHUNK, each = chunks * heads * (width + 2);
    int64_t most = least(least(each < ROOM ? ROOM / each : 1, MOST), rows), blocks[MOST + 1];
    if (most * each > room) {
        free(parts);
        parts = malloc((size_t)(most * each) * sizeof *parts);
        room = parts ? most * each : 0;
        if (!parts) return 0;
    }
    Attend job = {.memory = memory, .blocks = blocks, .parts = parts, .stride = stride, .chunks = chunks,
                  .pages = pages, .heads = heads, .kv_heads = kv_heads, .width = width, .layer = layer,
                  .window = window, .scale = scale};
    Work work = attention(wide, &job.score), join = wide ? join_fp32 : join_bf16;
    int64_t together = work == attend_dots ? ROWS : 1;
    for (int64_t row = 0; row < rows; row += most) {
        int64_t count = least(most, rows - row), little = count * longest * heads * width < 32768;
        job.queries = at(queries, row * stride, wide);
        job.tables = tables + row * pages;
        job.lengths = lengths + row;
        job.out = at(out, row * heads * width, wide);
        int64_t tasks = cut(&job, count, together, blocks) * kv_heads * chunks;
        (little ? loop : run)(work, &job, tasks);
        (little || count * chunks < 16 ? loop : run)(join, &job, count);
    }
    return 1;
}

/* Matrix products. Weights lie in panels of PANEL outputs, zeros after the last: [K][PANEL] in fp32, [K / 2][PANEL][2]
   in bf16 and int8. int4 is level * scale + base, rounded to bf16; its bytes are [K / 2][2][16]: of each pair of k and
   each half of the panel's outputs, byte i has elements i and 16 + i of [16 outputs][2 k], the first in its lower half;
   its groups are [K / SPAN][PANEL][2], the scale and the base in bf16. */

enum { FP32, BF16, INT8, INT4 };

/* What a tile fetches into the cache meanwhile: so many bytes for each 128 of its panel. */
typedef struct {
    const char *from;
    int64_t pace;
} Ahead;

INLINE void tile_fp32(const void *inputs, int64_t stride, const void *panel, const void *groups, int64_t depth,
                      const Ahead *ahead, float *out, int rows) {
    (void)groups;
    const float *x = inputs, *w = panel;
    const char *next = ahead->from;
    F16 sums[TILE][2] = {{{0}}};
    for (int64_t k = 0; k < depth; k++, w += PANEL, next += ahead->pace) {
        F16 left = load_16(w), right = load_16(w + 16);
        __builtin_prefetch(next);
        __builtin_prefetch(next + 64);
#pragma GCC unroll 12
        for (int row = 0; row < rows; row++) {
            sums[row][0] += left * x[row * stride + k];
            sums[row][1] += right * x[row * stride + k];
        }
    }
    memcpy(out, sums, (size_t)rows * PANEL * sizeof *out);
}

INLINE void tile_pairs(const void *inputs, int64_t stride, const void *panel, const void *groups, int64_t depth,
                       const Ahead *ahead, float *out, int rows) {
    (void)groups;
    const uint16_t *x = inputs;
    const uint32_t *w = panel;
    const char *next = ahead->from;
    F16 sums[TILE][2] = {{{0}}};
    for (int64_t k = 0; k < depth; k += 2, w += PANEL, next += ahead->pace) {
        U16 left, right;
        memcpy(&left, w, 64);
        memcpy(&right, w + 16, 64);
        __builtin_prefetch(next);
        __builtin_prefetch(next + 64);
        F16 left_0 = (F16)(left << 16), left_1 = (F16)(left & 0xFFFF0000u);
        F16 right_0 = (F16)(right << 16), right_1 = (F16)(right & 0xFFFF0000u);
#pragma GCC unroll 12
        for (int row = 0; row < rows; row++) {
            float x_0 = from_bf16(x[row * stride + k]), x_1 = from_bf16(x[row * stride + k + 1]);
            sums[row][0] += left_0 * x_0;
            sums[row][1] += right_0 * x_0;
            sums[row][0] += left_1 * x_1;
            sums[row][1] += right_1 * x_1;
        }
    }
    memcpy(out, sums, (size_t)rows * PANEL * sizeof *out);
}

typedef void (*Tiles)(const void *x, int64_t stride, const void *panel, const void *groups, int64_t depth,
                      const Ahead *ahead, float *out, int rows);

#define CASE(tile, n)                                                                                                  \
    case n: tile(x, stride, panel, groups, depth, ahead, out, n); break;
#define THREE(tile) CASE(tile, 1) CASE(tile, 2) CASE(tile, 3)
#define FOUR(tile) THREE(tile) CASE(tile, 4)
#define TWELVE(tile)                                                                                                   \
    FOUR(tile)                                                                                                         \
    CASE(tile, 5) CASE(tile, 6) CASE(tile, 7) CASE(tile, 8) CASE(tile, 9) CASE(tile, 10) CASE(tile, 11) CASE(tile, 12)
#define TILES(name, cases)                                                                                             \
    static void name(const void *x, int64_t stride, const void *panel, const void *groups, int64_t depth,             \
                     const Ahead *ahead, float *out, int rows) {                                                       \
        switch (rows) { cases }                                                                                        \
    }

TILES(fp32_any, THREE(tile_fp32))
TILES(bf16_any, THREE(tile_pairs))

/* One panel of int8 as bf16, which holds them exactly. */
WIDE static void int8_any(const void *panel, const void *groups, int64_t depth, uint16_t *out) {
    (void)groups;
    const int8_t *from = panel;
    for (int64_t i = 0; i < depth * PANEL; i++) out[i] = (uint16_t)(to_bits((float)from[i]) >> 16);
}

/* One panel of int4 as bf16. */
WIDE static void int4_any(const void *panel, const void *groups, int64_t depth, uint16_t *out) {
    const uint8_t *from = panel;
    const uint16_t *pairs = groups;
    float scales[2 * PANEL], bases[2 * PANEL]; /* as the elements lie: each twice */
    for (int64_t k = 0; k < depth; k += 2) {
        if (k % SPAN == 0)
            for (int i = 0; i < 2 * PANEL; i++) {
                scales[i] = from_bf16(pairs[(k / SPAN * PANEL + i / 2) * 2]);
                bases[i] = from_bf16(pairs[(k / SPAN * PANEL + i / 2) * 2 + 1]);
            }
        for (int half = 0; half < 2 * PANEL; half += PANEL, from += 16, out += 32)
            for (int i = 0; i < 16; i++) {
                const float *scale = scales + half + i, *base = bases + half + i;
                out[i] = to_bf16((float)(from[i] & 15) * scale[0] + base[0]);
                out[16 + i] = to_bf16((float)(from[i] >> 4) * scale[16] + base[16]);
            }
    }
}

#if X86
FOR_256 TILES(fp32_256, THREE(tile_fp32))
FOR_256 TILES(bf16_256, THREE(tile_pairs))
FOR_512 TILES(fp32_512, TWELVE(tile_fp32))
FOR_512 TILES(bf16_512, TWELVE(tile_pairs))

/* Scales and bases of one group, as its elements lie. */
typedef struct {
    __m512 scales[4], bases[4];
} Group;

FOR_BF16 INLINE Group group_of(const uint32_t *pairs) {
    __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    Group group;
#pragma GCC unroll 4
    for (int quarter = 0; quarter < 4; quarter++) {
        __m256i eight = _mm256_loadu_si256((const void *)(pairs + quarter * 8));
        __m512i both = _mm512_permutexvar_epi32(twice, _mm512_castsi256_si512(eight));
        group.scales[quarter] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        group.bases[quarter] = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xFFFF0000)));
    }
    return group;
}

/* Half `half` of the pairs at k, 16 outputs of two k, as bf16. */
FOR_BF16 INLINE __m512bh pairs_at(const void *panel, int64_t k, int half, const Group *group, int kind) {
    if (kind == BF16) return (__m512bh)_mm512_loadu_si512((const uint16_t *)panel + k * PANEL + half * 32);
    if (kind == INT8) {
        const int8_t *from = (const int8_t *)panel + k * PANEL + half * 32;
        __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)from)));
        __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(from + 16))));
        return _mm512_cvtne2ps_pbh(high, low);
    }
    const uint8_t *from = (const uint8_t *)panel + k * PANEL / 2 + half * 16;
    __m512 levels = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)from));
    __m512 low = _mm512_permutexvar_ps(both, levels), high = _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), levels);
    low = _mm512_fmadd_ps(low, group->scales[2 * half], group->bases[2 * half]);
    high = _mm512_fmadd_ps(high, group->scales[2 * half + 1], group->bases[2 * half + 1]);
    return _mm512_cvtne2ps_pbh(high, low);
}

FOR_BF16 INLINE void tile_dots(const void *inputs, int64_t stride, const void *panel, const uint32_t *groups,
                               int64_t depth, const Ahead *ahead, float *out, int rows, int kind) {
    const uint16_t *x = inputs;
    const char *next = ahead->from;
    int64_t span = kind == INT4 ? SPAN : depth;
    Group group;
    __m512 sums[TILE][2];
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++) sums[row][0] = sums[row][1] = _mm512_setzero_ps();
    for (int64_t first = 0; first < depth; first += span) {
        if (kind == INT4) group = group_of(groups + first * PANEL / SPAN);
        for (int64_t k = first; k < first + span; k += 2, next += ahead->pace) {
            __m512bh left = pairs_at(panel, k, 0, &group, kind), right = pairs_at(panel, k, 1, &group, kind);
            __builtin_prefetch(next);
            if (kind == BF16) __builtin_prefetch(next + 64);
#pragma GCC unroll 12
            for (int row = 0; row < rows; row++) {
                int32_t pair;
                memcpy(&pair, x + row * stride + k, 4);
                __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
                sums[row][0] = _mm512_dpbf16_ps(sums[row][0], left, both);
                sums[row][1] = _mm512_dpbf16_ps(sums[row][1], right, both);
            }
        }
    }
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++) {
        _mm512_storeu_ps(out + row * PANEL, sums[row][0]);
        _mm512_storeu_ps(out + row * PANEL + 16, sums[row][1]);
    }
}

#define TILE_BF16(x, stride, panel, groups, depth, ahead, out, rows)                                                   \
    tile_dots(x, stride, panel, groups, depth, ahead, out, rows, BF16)
#define TILE_INT8(x, stride, panel, groups, depth, ahead, out, rows)                                                   \
    tile_dots(x, stride, panel, groups, depth, ahead, out, rows, INT8)
#define TILE_INT4(x, stride, panel, groups, depth, ahead, out, rows)                                                   \
    tile_dots(x, stride, panel, groups, depth, ahead, out, rows, INT4)
FOR_BF16 TILES(bf16_dots, TWELVE(TILE_BF16))
FOR_BF16 TILES(int8_dots, FOUR(TILE_INT8))
FOR_BF16 TILES(int4_dots, FOUR(TILE_INT4))

FOR_BF16 INLINE void unpack_dots(const void *panel, const uint32_t *groups, int64_t depth, uint16_t *out, int kind) {
    Group group;
    for (int64_t k = 0; k < depth; k += 2, out += 2 * PANEL) {
        if (kind == INT4 && k % SPAN == 0) group = group_of(groups + k * PANEL / SPAN);
        _mm512_storeu_si512(out, (__m512i)pairs_at(panel, k, 0, &group, kind));
        _mm512_storeu_si512(out + PANEL, (__m512i)pairs_at(panel, k, 1, &group, kind));
    }
}

FOR_BF16 static void int8_unpacked(const void *panel, const void *groups, int64_t depth, uint16_t *out) {
    unpack_dots(panel, groups, depth, out, INT8);
}
FOR_BF16 static void int4_unpacked(const void *panel, const void *groups, int64_t depth, uint16_t *out) {
    unpack_dots(panel, groups, depth, out, INT4);
}
#endif

/* What this processor does with a kind: through `direct` go few rows without unpacking, where there is such a way. */
typedef struct {
    Tiles tiles, direct;
    void (*unpack)(const void *panel, const void *groups, int64_t depth, uint16_t *out);
    int high;
} Way;

static Way way(int kind) {
    void (*const unpack[])(const void *, const void *, int64_t, uint16_t *) = {NULL, NULL, int8_any, int4_any};
#if X86
    if (has_512()) {
        if (kind == FP32) return (Way){fp32_512, NULL, NULL, TILE};
        if (!__builtin_cpu_supports("avx512bf16")) return (Way){bf16_512, NULL, unpack[kind], TILE};
        if (kind == INT8) return (Way){bf16_dots, int8_dots, int8_unpacked, TILE};
        if (kind == INT4) return (Way){bf16_dots, int4_dots, int4_unpacked, TILE};
        return (Way){bf16_dots, NULL, NULL, TILE};
    }
    if (has_256())
        return (Way){kind == FP32 ? fp32_256 : bf16_256, NULL, unpack[kind], 3};
#endif
    return (Way){kind == FP32 ? fp32_any : bf16_any, NULL, unpack[kind], 3};
}

typedef struct {
    const void *x, *weight, *groups;
    const float *scales, *bias;
    void *out;
    int64_t rows, depth, outputs, panels, step;
    int kind;
    Way way;
} Product;

WIDE static void finish(const Product *job, const float *sums, int64_t row, int64_t rows, int64_t panel) {
    int64_t first = panel * PANEL, count = least(job->outputs - first, PANEL);
    const float *scales = job->scales ? job->scales + first : NULL, *bias = job->bias ? job->bias + first : NULL;
    for (; rows--; row++, sums += PANEL) {
        float values[PANEL];
        for (int i = 0; i < PANEL; i++) values[i] = sums[i];
        if (scales)
            for (int64_t i = 0; i < count; i++) values[i] *= scales[i];
        if (bias)
            for (int64_t i = 0; i < count; i++) values[i] += bias[i];
        if (job->kind == FP32)
            memcpy((float *)job->out + row * job->outputs + first, values, (size_t)count * 4);
        else {
            uint16_t halves[PANEL];
            for (int i = 0; i < PANEL; i++) halves[i] = to_bf16(values[i]);
            memcpy((uint16_t *)job->out + row * job->outputs + first, halves, (size_t)count * 2);
        }
    }
}

/* Some panels for all rows. */
static void product_panels(const void *argument, int64_t task) {
    static _Thread_local uint16_t *unpacked = NULL;
    static _Thread_local int64_t room = 0;
    static const int64_t eighths[] = {[FP32] = 32, [BF16] = 16, [INT8] = 8, [INT4] = 4};
    const Product *job = argument;
    int64_t stop = least((task + 1) * job->step, job->panels), depth = job->depth;
    int64_t bytes = depth * PANEL * eighths[job->kind] / 8, steps = job->kind == FP32 ? depth : depth / 2;
    int unpacks = job->way.unpack && !(job->way.direct && job->rows <= FEW);
    Tiles through = unpacks || !job->way.direct ? job->way.tiles : job->way.direct;
    if (unpacks && room < depth) {
        free(unpacked);
        unpacked = aligned_alloc(64, (size_t)depth * PANEL * sizeof *unpacked);
        if (!unpacked) abort();
        room = depth;
    }
    for (int64_t block = 0; block < job->rows; block += BLOCK) {
        int64_t end = least(block + BLOCK, job->rows), tiles = (end - block + job->way.high - 1) / job->way.high;
        for (int64_t panel = task * job->step; panel < stop; panel++) {
            const char *stored = (const char *)job->weight + panel * bytes;
            const char *groups = (const char *)job->groups + panel * (depth / SPAN) * PANEL * 4;
            if (unpacks) job->way.unpack(stored, groups, depth, unpacked);
            for (int64_t tile = 0, row = block; tile < tiles; tile++) {
                float sums[TILE * PANEL] __attribute__((aligned(64)));
                int64_t next = block + (end - block) * (tile + 1) / tiles;
                const void *x = at(job->x, row * depth, job->kind == FP32);
                /* Tiles that find their panel in the cache fetch the next one, each its part. */
                int near = tiles > 1 || unpacks;
                Ahead ahead = {stored + (near ? bytes + bytes * tile / tiles : AHEAD), bytes / tiles / steps};
                through(x, depth, unpacks ? (void *)unpacked : stored, groups, depth, &ahead, sums, (int)(next - row));
                finish(job, sums, row, next - row, panel);
                row = next;
            }
        }
    }
}

/* out[rows][outputs] = x[rows][depth] times the weight's rows, times their scales, plus their bias; either may be NULL.
   x and out are fp32 for kind FP32, else bf16. depth is even, and for INT4 a multiple of 32. */
void product(int kind, const void *x, const void *weight, const void *groups, const float *scales, const float *bias,
             void *out, int64_t rows, int64_t depth, int64_t outputs) {
    int64_t panels = (outputs + PANEL - 1) / PANEL, threads = pool.wanted + 1;
    int64_t step = rows * depth * outputs < 65536 ? panels : (panels + threads * 4 - 1) / (threads * 4);
    Product job = {x, weight, groups, scales, bias, out, rows, depth, outputs, panels, step, kind, way(kind)};
    run(product_panels, &job, (panels + step - 1) / step);
}
