/* One language model as a C library: no runtime, no dependency beyond libc and libm.
 *
 * Made by edge-mmllm. A model is a weight file, mapped read-only (so that its pages are shared
 * and can be dropped), and a handle with the state and a few buffers. Handles are independent of
 * each other; one handle is for one thread at a time.
 */
#ifndef EDGE_MODEL_H
#define EDGE_MODEL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct edge_model edge_model;

enum edge_model_status {
    EDGE_MODEL_OK = 0,
    EDGE_MODEL_BAD_ARGUMENT = -1,  /* a null pointer, or a number out of range */
    EDGE_MODEL_NO_FILE = -2,       /* the weight file cannot be opened or mapped; see errno */
    EDGE_MODEL_NOT_WEIGHTS = -3,   /* no weight file of this kind, or of another version */
    EDGE_MODEL_TRUNCATED = -4,     /* the file is shorter or longer than it says */
    EDGE_MODEL_OTHER_MODEL = -5,   /* weights of another model than this library's */
    EDGE_MODEL_DAMAGED = -6,       /* edge_model_verify: the content is not what was written */
    EDGE_MODEL_NO_MEMORY = -7,
    EDGE_MODEL_BAD_MACHINE = -8,   /* big-endian, or too small an address space */
    EDGE_MODEL_BAD_TOKEN = -9,     /* not in 0 .. vocabulary - 1 */
    EDGE_MODEL_BAD_STATE = -10,    /* what lies in the state block is not this model's */
    EDGE_MODEL_CONTEXT_FULL = -11,
    EDGE_MODEL_KERNEL = -12        /* a kernel refused; the state is undefined until reset */
};

/* Map the weight file and make a handle in the empty state. On an error `*model` is NULL. */
int edge_model_open(const char *path, edge_model **model);

/* The same for weights that are in memory already (flash), aligned to 64 bytes; they must stay. */
int edge_model_open_memory(const void *weights, size_t size, edge_model **model);

void edge_model_close(edge_model *model); /* NULL is fine */

/* Read one token. `logits`: float[vocabulary] to fill, or NULL: then edge_model_logits has them. */
int edge_model_step(edge_model *model, int32_t token, float *logits);

/* The logits of the last step; valid until the next step. */
const float *edge_model_logits(const edge_model *model);

/* The token of the largest logit of the last step; the lowest of equals. */
int32_t edge_model_greedy(const edge_model *model);

/* Forget all tokens. */
void edge_model_reset(edge_model *model);

/* The state: one block without pointers. Copy it away and back to save, branch and restore; in a
 * file it is good for this library, of this model, on machines of the same kind. */
void *edge_model_state(edge_model *model);
size_t edge_model_state_size(void);

/* Tokens that the state has read. */
int64_t edge_model_position(const edge_model *model);

/* Threads that a step uses, the caller's included (1 after open; stays 1 where the library was
 * built without EDGE_MODEL_THREADS). */
int edge_model_set_threads(edge_model *model, int threads);

/* Read the whole weight file and compare its SHA-256 with the one this library was built for. */
int edge_model_verify(const edge_model *model);

int32_t edge_model_vocabulary(void);
int32_t edge_model_context(void); /* tokens that fit the state; 0: no limit */
size_t edge_model_scratch_size(void); /* bytes of a handle beside state and weights */
const char *edge_model_name(void);    /* the architecture */
const char *edge_model_version(void); /* of edge-mmllm, which made this library */
const char *edge_model_error(int status);

#ifdef __cplusplus
}
#endif
#endif
