/* The library around the compiled kernels: files, handles, states. See edge_model.h.
 *
 * edge_model_graph.h is generated: sizes, tables and em_run, the kernel calls of one step.
 * Build: cc -std=c11 -O2 -fPIC -shared edge_model.c kernels.o -lm
 * -DEDGE_MODEL_THREADS (with -pthread): a step may use several threads.
 * -DEDGE_MODEL_NO_FILES: no edge_model_open, for systems without mmap.
 */
#define _POSIX_C_SOURCE 200809L
#include "edge_model.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#ifndef EDGE_MODEL_NO_FILES
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif
#ifdef EDGE_MODEL_THREADS
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#endif

#include "edge_model_graph.h"

/* Weight file, little-endian: magic (8), version u32, bytes before the data u32, bytes of the
 * file u64, tensors u32, zero u32, SHA-256 of the data (32), data. */
enum { EM_HEADER = 64, EM_FORMAT = 1, EM_ALIGNMENT = 64 };
static const char em_magic[8] = "EDGEWTS";

/* The head of the state block (64 bytes). */
typedef struct {
    int64_t position;
    uint64_t tag;
} em_state_header;

#ifdef EDGE_MODEL_THREADS
typedef struct em_pool em_pool;
static void em_pool_close(em_pool *pool);
#endif

struct edge_model {
    const unsigned char *file; /* header and data */
    size_t mapped;             /* bytes to unmap; 0: the caller's memory */
    unsigned char *memory;     /* state, then arena: one allocation */
    unsigned char *state;
    unsigned char *arena;
#ifdef EDGE_MODEL_THREADS
    em_pool *pool;
#endif
};

/* ---- what compiled kernels call --------------------------------------------------------------
 * LLVM code of TVM reaches these through pointers of fixed names, weak in kernels.o. */

typedef struct {
    void *sync;
    int32_t tasks;
} em_parallel_env;
typedef int (*em_task)(int task, em_parallel_env *env, void *data);

#ifdef EDGE_MODEL_THREADS
static _Thread_local em_pool *em_current;
static int em_pool_run(em_pool *pool, em_task task, void *data);
#endif

static int em_launch(em_task task, void *data, int tasks) {
    em_parallel_env env = {NULL, 1};
    (void)tasks; /* a wish: kernels divide their work by env.tasks */
#ifdef EDGE_MODEL_THREADS
    if (em_current) return em_pool_run(em_current, task, data);
#endif
    return task(0, &env, data);
}

static int em_barrier(int task, em_parallel_env *env) {
    (void)task;
    return env->tasks == 1 ? 0 : -1;
}

static void *em_aligned(size_t size) {
    void *memory = NULL;
    if (size > SIZE_MAX - EM_ALIGNMENT) return NULL;
    return posix_memalign(&memory, EM_ALIGNMENT, size ? size : 1) ? NULL : memory;
}

static void *em_workspace(int device_type, int device, uint64_t size, int code, int bits) {
    (void)device_type, (void)device, (void)code, (void)bits;
    return size > SIZE_MAX ? NULL : em_aligned((size_t)size);
}

static int em_free_workspace(int device_type, int device, void *memory) {
    (void)device_type, (void)device;
    free(memory);
    return 0;
}

static void em_raised(const char *kind, const char *message) { (void)kind, (void)message; }

static void em_raised_parts(const char *kind, const char **parts, int32_t count) {
    (void)kind, (void)parts, (void)count;
}

int (*__TVMBackendParallelLaunch)(em_task, void *, int) = em_launch;
int (*__TVMBackendParallelBarrier)(int, em_parallel_env *) = em_barrier;
void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = em_workspace;
int (*__TVMBackendFreeWorkspace)(int, int, void *) = em_free_workspace;
void (*__TVMFFIErrorSetRaisedFromCStr)(const char *, const char *) = em_raised;
/* Asserts call this one by its name. */
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
    em_raised_parts(kind, parts, count);
}

/* ---- open and close ------------------------------------------------------------------------ */

static uint64_t em_little(const unsigned char *at, int bytes) {
    uint64_t value = 0;
    for (int i = bytes - 1; i >= 0; --i) value = value << 8 | at[i];
    return value;
}

static int em_check(const unsigned char *file, uint64_t size) {
    const uint16_t one = 1;
    unsigned char first;
    memcpy(&first, &one, 1);
    if (!first) return EDGE_MODEL_BAD_MACHINE;
    if (size < EM_HEADER) {
        size_t seen = size < sizeof em_magic ? (size_t)size : sizeof em_magic;
        return memcmp(file, em_magic, seen) ? EDGE_MODEL_NOT_WEIGHTS : EDGE_MODEL_TRUNCATED;
    }
    if (memcmp(file, em_magic, sizeof em_magic)) return EDGE_MODEL_NOT_WEIGHTS;
    if (em_little(file + 8, 4) != EM_FORMAT || em_little(file + 12, 4) != EM_HEADER)
        return EDGE_MODEL_NOT_WEIGHTS;
    if (em_little(file + 16, 8) != size) return EDGE_MODEL_TRUNCATED;
    if (size != EM_HEADER + EM_WEIGHT_BYTES || memcmp(file + 32, em_hash, sizeof em_hash))
        return EDGE_MODEL_OTHER_MODEL;
    return EDGE_MODEL_OK;
}

static int em_make(const unsigned char *file, size_t size, edge_model **model) {
    int status = em_check(file, size);
    if (status) return status;
    edge_model *made = calloc(1, sizeof *made);
    if (!made) return EDGE_MODEL_NO_MEMORY;
    made->memory = em_aligned((size_t)EM_STATE_BYTES + EM_ARENA_BYTES);
    if (!made->memory) {
        free(made);
        return EDGE_MODEL_NO_MEMORY;
    }
    made->file = file;
    made->state = made->memory;
    made->arena = made->memory + EM_STATE_BYTES;
    memset(made->arena, 0, EM_ARENA_BYTES);
    edge_model_reset(made);
    *model = made;
    return EDGE_MODEL_OK;
}

int edge_model_open_memory(const void *weights, size_t size, edge_model **model) {
    if (!model) return EDGE_MODEL_BAD_ARGUMENT;
    *model = NULL;
    if (!weights || (uintptr_t)weights % EM_ALIGNMENT) return EDGE_MODEL_BAD_ARGUMENT;
    return em_make(weights, size, model);
}

#ifndef EDGE_MODEL_NO_FILES
int edge_model_open(const char *path, edge_model **model) {
    if (!model) return EDGE_MODEL_BAD_ARGUMENT;
    *model = NULL;
    if (!path) return EDGE_MODEL_BAD_ARGUMENT;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return EDGE_MODEL_NO_FILE;
    struct stat about;
    int status = EDGE_MODEL_NO_FILE;
    if (fstat(file, &about) || !S_ISREG(about.st_mode)) goto done;
    if (about.st_size <= 0) {
        status = EDGE_MODEL_TRUNCATED;
        goto done;
    }
    if ((uint64_t)about.st_size > SIZE_MAX / 2) {
        status = EDGE_MODEL_BAD_MACHINE;
        goto done;
    }
    size_t size = (size_t)about.st_size;
    void *mapped = mmap(NULL, size, PROT_READ, MAP_PRIVATE, file, 0);
    if (mapped == MAP_FAILED) goto done;
    status = em_make(mapped, size, model);
    if (status)
        munmap(mapped, size);
    else
        (*model)->mapped = size;
done:
    close(file);
    return status;
}
#endif

void edge_model_close(edge_model *model) {
    if (!model) return;
#ifdef EDGE_MODEL_THREADS
    em_pool_close(model->pool);
#endif
#ifndef EDGE_MODEL_NO_FILES
    if (model->mapped) munmap((void *)(uintptr_t)model->file, model->mapped);
#endif
    free(model->memory);
    free(model);
}

/* ---- steps and states ---------------------------------------------------------------------- */

void edge_model_reset(edge_model *model) {
    em_state_header header = {0, EM_TAG};
    memset(model->state, 0, EM_STATE_BYTES);
    memcpy(model->state, &header, sizeof header);
}

int edge_model_step(edge_model *model, int32_t token, float *logits) {
    em_state_header header;
    int64_t input = token;
    if (!model) return EDGE_MODEL_BAD_ARGUMENT;
    if (token < 0 || token >= EM_VOCABULARY) return EDGE_MODEL_BAD_TOKEN;
    memcpy(&header, model->state, sizeof header);
    if (header.tag != EM_TAG || header.position < 0) return EDGE_MODEL_BAD_STATE;
    if (EM_CONTEXT && header.position >= EM_CONTEXT) return EDGE_MODEL_CONTEXT_FULL;
    memcpy(model->arena + EM_TOKEN, &input, sizeof input);
#ifdef EDGE_MODEL_THREADS
    em_current = model->pool;
#endif
    int failed = em_run(model->arena, model->state, model->file + EM_HEADER);
#ifdef EDGE_MODEL_THREADS
    em_current = NULL;
#endif
    if (failed) return EDGE_MODEL_KERNEL;
    header.position += 1;
    memcpy(model->state, &header, sizeof header);
    if (logits) memcpy(logits, model->arena + EM_LOGITS, sizeof(float) * EM_VOCABULARY);
    return EDGE_MODEL_OK;
}

const float *edge_model_logits(const edge_model *model) {
    return (const float *)(const void *)(model->arena + EM_LOGITS);
}

int32_t edge_model_greedy(const edge_model *model) {
    const float *logits = edge_model_logits(model);
    int32_t best = 0;
    for (int32_t i = 1; i < EM_VOCABULARY; ++i)
        if (logits[i] > logits[best]) best = i;
    return best;
}

int64_t edge_model_position(const edge_model *model) {
    em_state_header header;
    memcpy(&header, model->state, sizeof header);
    return header.position;
}

void *edge_model_state(edge_model *model) { return model->state; }
size_t edge_model_state_size(void) { return EM_STATE_BYTES; }
int32_t edge_model_vocabulary(void) { return EM_VOCABULARY; }
int32_t edge_model_context(void) { return EM_CONTEXT; }
size_t edge_model_scratch_size(void) { return EM_ARENA_BYTES + sizeof(edge_model); }
const char *edge_model_name(void) { return EM_NAME; }
const char *edge_model_version(void) { return EM_MAKER; }

const char *edge_model_error(int status) {
    switch (status) {
        case EDGE_MODEL_OK: return "no error";
        case EDGE_MODEL_BAD_ARGUMENT: return "a null pointer, an address that is not aligned to "
                                             "64 bytes, or a number out of range";
        case EDGE_MODEL_NO_FILE: return "the weight file cannot be opened or mapped";
        case EDGE_MODEL_NOT_WEIGHTS: return "not a weight file of this version";
        case EDGE_MODEL_TRUNCATED: return "the weight file is cut short, or longer than it says";
        case EDGE_MODEL_OTHER_MODEL: return "the weight file belongs to another model or target";
        case EDGE_MODEL_DAMAGED: return "the weight file is damaged";
        case EDGE_MODEL_NO_MEMORY: return "not enough memory";
        case EDGE_MODEL_BAD_MACHINE: return "this machine is big-endian or its address space is "
                                            "too small";
        case EDGE_MODEL_BAD_TOKEN: return "the token is not in the vocabulary";
        case EDGE_MODEL_BAD_STATE: return "the state is not one of this model";
        case EDGE_MODEL_CONTEXT_FULL: return "the context is full";
        case EDGE_MODEL_KERNEL: return "a kernel failed (memory); reset the state";
        default: return "no status of this library";
    }
}

/* ---- SHA-256 (FIPS 180-4) ------------------------------------------------------------------ */

static uint32_t em_turn(uint32_t x, int n) { return x >> n | x << (32 - n); }

static void em_sha_block(uint32_t h[8], const unsigned char *p) {
    static const uint32_t k[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4,
        0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe,
        0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f,
        0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7,
        0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc,
        0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b,
        0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116,
        0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7,
        0xc67178f2};
    uint32_t w[64], v[8];
    for (int i = 0; i < 16; ++i)
        w[i] = (uint32_t)p[4 * i] << 24 | (uint32_t)p[4 * i + 1] << 16 |
               (uint32_t)p[4 * i + 2] << 8 | p[4 * i + 3];
    for (int i = 16; i < 64; ++i)
        w[i] = w[i - 16] + w[i - 7] +
               (em_turn(w[i - 15], 7) ^ em_turn(w[i - 15], 18) ^ w[i - 15] >> 3) +
               (em_turn(w[i - 2], 17) ^ em_turn(w[i - 2], 19) ^ w[i - 2] >> 10);
    memcpy(v, h, sizeof v);
    for (int i = 0; i < 64; ++i) {
        uint32_t a = v[0], e = v[4];
        uint32_t s1 = em_turn(e, 6) ^ em_turn(e, 11) ^ em_turn(e, 25);
        uint32_t t1 = v[7] + s1 + ((e & v[5]) ^ (~e & v[6])) + k[i] + w[i];
        uint32_t s0 = em_turn(a, 2) ^ em_turn(a, 13) ^ em_turn(a, 22);
        uint32_t t2 = s0 + ((a & v[1]) ^ (a & v[2]) ^ (v[1] & v[2]));
        for (int j = 7; j > 0; --j) v[j] = v[j - 1];
        v[4] += t1;
        v[0] = t1 + t2;
    }
    for (int i = 0; i < 8; ++i) h[i] += v[i];
}

int edge_model_verify(const edge_model *model) {
    uint32_t h[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                     0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    const uint64_t size = EM_WEIGHT_BYTES, bits = size * 8; /* a multiple of 64 bytes */
    unsigned char last[64] = {0x80};
    if (!model) return EDGE_MODEL_BAD_ARGUMENT;
    for (uint64_t at = 0; at < size; at += 64)
        em_sha_block(h, model->file + EM_HEADER + (size_t)at);
    for (int i = 0; i < 8; ++i) last[63 - i] = (unsigned char)(bits >> (8 * i));
    em_sha_block(h, last);
    for (int i = 0; i < 32; ++i)
        if ((unsigned char)(h[i / 4] >> (24 - 8 * (i % 4))) != em_hash[i])
            return EDGE_MODEL_DAMAGED;
    return EDGE_MODEL_OK;
}

/* ---- threads ------------------------------------------------------------------------------- */

#ifndef EDGE_MODEL_THREADS
int edge_model_set_threads(edge_model *model, int threads) {
    return model && threads >= 1 ? EDGE_MODEL_OK : EDGE_MODEL_BAD_ARGUMENT;
}
#else
enum { EM_MOST_THREADS = 64, EM_SPINS = 4000 };

/* Workers look for the next launch a while, then sleep: a step makes hundreds of launches, a few
 * microseconds apart, and none between steps. */
struct em_pool {
    int count; /* tasks of a launch: workers and the caller */
    atomic_uint launches;
    atomic_int pending, failed, sleepers, stop;
    em_task task;
    void *data;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    struct em_worker {
        em_pool *pool;
        int index;
        pthread_t thread;
    } workers[EM_MOST_THREADS];
};

static void *em_work(void *given) {
    struct em_worker *worker = given;
    em_pool *pool = worker->pool;
    unsigned seen = 0;
    for (;;) {
        for (int i = 0; i < EM_SPINS && atomic_load(&pool->launches) == seen; ++i)
            if (i % 64 == 63) sched_yield();
        if (atomic_load(&pool->launches) == seen) {
            pthread_mutex_lock(&pool->mutex);
            atomic_fetch_add(&pool->sleepers, 1);
            while (atomic_load(&pool->launches) == seen)
                pthread_cond_wait(&pool->wake, &pool->mutex);
            atomic_fetch_sub(&pool->sleepers, 1);
            pthread_mutex_unlock(&pool->mutex);
        }
        seen = atomic_load(&pool->launches);
        if (atomic_load(&pool->stop)) return NULL;
        em_parallel_env env = {NULL, pool->count};
        if (pool->task(worker->index, &env, pool->data)) atomic_store(&pool->failed, 1);
        atomic_fetch_sub(&pool->pending, 1);
    }
}

static void em_announce(em_pool *pool) {
    atomic_fetch_add(&pool->launches, 1);
    if (atomic_load(&pool->sleepers)) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->mutex);
    }
}

static int em_pool_run(em_pool *pool, em_task task, void *data) {
    em_parallel_env env = {NULL, pool->count};
    pool->task = task;
    pool->data = data;
    atomic_store(&pool->failed, 0);
    atomic_store(&pool->pending, pool->count - 1);
    em_announce(pool);
    int failed = task(0, &env, data);
    for (int i = 0; atomic_load(&pool->pending); ++i)
        if (i % 64 == 63) sched_yield();
    return failed || atomic_load(&pool->failed) ? -1 : 0;
}

static void em_pool_close(em_pool *pool) {
    if (!pool) return;
    atomic_store(&pool->stop, 1);
    em_announce(pool);
    for (int i = 1; i < pool->count; ++i) pthread_join(pool->workers[i].thread, NULL);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->mutex);
    free(pool);
}

int edge_model_set_threads(edge_model *model, int threads) {
    if (!model || threads < 1 || threads > EM_MOST_THREADS) return EDGE_MODEL_BAD_ARGUMENT;
    em_pool_close(model->pool);
    model->pool = NULL;
    if (threads == 1) return EDGE_MODEL_OK;
    em_pool *pool = calloc(1, sizeof *pool);
    if (!pool) return EDGE_MODEL_NO_MEMORY;
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    for (pool->count = 1; pool->count < threads; ++pool->count) {
        struct em_worker *worker = &pool->workers[pool->count];
        worker->pool = pool;
        worker->index = pool->count;
        if (pthread_create(&worker->thread, NULL, em_work, worker)) {
            em_pool_close(pool);
            return EDGE_MODEL_NO_MEMORY;
        }
    }
    model->pool = pool;
    return EDGE_MODEL_OK;
}
#endif
