/* Generates tokens greedily with a library that edge-mmllm made.
 *
 *   cc -std=c11 -O2 generate.c -L. -ledge_model -Wl,-rpath,'$ORIGIN' -o generate
 *   ./generate model.weights 32 34 105 110
 *
 * or with everything in one program:
 *
 *   cc -std=c11 -O2 generate.c edge_model.c kernels.o -lm -o generate
 *
 * Prints the new token ids, and their bytes where the vocabulary is the 256 bytes. -t N: threads;
 * -m: what the process needs of memory (Linux). The prompt's ids come from the model's tokenizer.
 */
#include "edge_model.h"

#include <ctype.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int fail(const char *what, int status) {
    fprintf(stderr, "generate: %s: %s\n", what, edge_model_error(status));
    return 1;
}

static int number(const char *text, int least, int *value) {
    char *end;
    long parsed = strtol(text, &end, 10);
    if (!isdigit((unsigned char)*text) || *end || parsed < least || parsed > INT_MAX) {
        fprintf(stderr, "generate: expected a number from %d on, found '%s'\n", least, text);
        return 0;
    }
    *value = (int)parsed;
    return 1;
}

/* Resident memory as Linux counts it: anonymous pages are this process's own. */
static void show_memory(void) {
    char line[256];
    FILE *file = fopen("/proc/self/status", "r");
    if (!file) return;
    while (fgets(line, sizeof line, file))
        if (!strncmp(line, "VmRSS", 5) || !strncmp(line, "Rss", 3)) fputs(line, stderr);
    fclose(file);
    fprintf(stderr, "state %zu bytes, scratch %zu bytes\n", edge_model_state_size(),
            edge_model_scratch_size());
}

int main(int argc, char **argv) {
    int threads = 1, memory = 0, count, token, status, at = 1;
    while (at < argc && argv[at][0] == '-') {
        if (!strcmp(argv[at], "-m")) {
            memory = 1;
        } else if (!strcmp(argv[at], "-t") && at + 1 < argc) {
            if (!number(argv[++at], 1, &threads)) return 2;
        } else {
            break;
        }
        ++at;
    }
    if (argc - at < 3 || !number(argv[at + 1], 1, &count)) {
        fprintf(stderr, "usage: generate [-t THREADS] [-m] model.weights COUNT ID...\n");
        return 2;
    }

    edge_model *model;
    status = edge_model_open(argv[at], &model);
    if (status) return fail(argv[at], status);
    status = edge_model_set_threads(model, threads);
    if (status) return fail("threads", status);

    for (int i = at + 2; i < argc && !status; ++i) {
        if (!number(argv[i], 0, &token)) return 2;
        status = edge_model_step(model, token, NULL);
        if (status) return fail(argv[i], status);
    }
    for (int i = 0; i < count; ++i) {
        token = edge_model_greedy(model);
        printf(i ? " %d" : "%d", token);
        if (edge_model_vocabulary() == 256) printf(isprint(token) ? "'%c'" : "", token);
        fflush(stdout);
        if (i + 1 == count) break;
        status = edge_model_step(model, token, NULL);
        if (status) return fail("step", status);
    }
    printf("\n");
    if (memory) show_memory();
    edge_model_close(model);
    return 0;
}
