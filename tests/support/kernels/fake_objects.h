/* The objects of fake_cusparselt.c and their checks, and the test's functions. */

#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "fake_numbers.h"

#ifndef MINOR
#define MINOR 8
#endif
#if MINOR >= 8
#define SIZE 512
#else
#define SIZE 1024
#endif

enum { SUCCESS, NOT_INITIALIZED, ALLOC_FAILED, INVALID, EXECUTION_FAILED = 6 };
enum { NOT_SUPPORTED = 10 };
enum { COLUMN_MAJOR = 1, ROW_MAJOR = 2 };
enum { COMPUTE_32I = 0, COMPUTE_32F = 2 };
enum { CONFIG_ID, CONFIG_MAX_ID, SEARCH_ITERATIONS, SPLIT_K, SPLIT_K_MODE, BUFFERS };
enum { ALGORITHMS = 4, SPLIT_WORKSPACE = 4096, SPARE_BYTES = 96 };

typedef enum { NOTHING, HANDLE, MATRIX, MATMUL, SELECTION, PLAN } Kind;

typedef struct Header {
    uint64_t magic;
    const void *where;
    Kind kind;
    struct Header *handle;
    int children; /* of a handle: objects created with it and not destroyed */
} Header;

typedef struct {
    Header header;
    int64_t rows, columns, leading;
    int type, order, structured;
} Matrix;

typedef struct {
    Header header;
    const Matrix *a, *b, *d;
    int alpha_is_a_vector;
} Matmul;

typedef struct {
    Header header;
    const Matmul *matmul;
    int values[6];
} Selection;

typedef struct {
    Header header;
    const Matmul *matmul;
    Selection *selection;
    int split_k;
} Plan;

static const uint64_t MAGIC = 0x5eed0f2004feedULL;

/* ---- for the test ---- */

static char calls[1 << 20];
static int major = 0, minor = MINOR, patch = MINOR == 8 ? 0 : 1, live, capturing;
static void *last_stream;
static struct {
    char function[64];
    int nth, status;
} failure;

const char *fake_calls(void) { return calls; }
int fake_live(void) { return live; }
/* stop counting what a destructor that was made to fail has left */
void fake_forget(void) { live = 0; }
void *fake_last_stream(void) { return last_stream; }
/* while set, only cusparseLtMatmul succeeds */
void fake_capture(int on) { capturing = on; }

void fake_version(int new_major, int new_minor, int new_patch) {
    major = new_major, minor = new_minor, patch = new_patch;
}

/* make the nth call of a function from now on fail */
void fake_fail(const char *function, int nth, int status) {
    strncpy(failure.function, function, sizeof failure.function - 1);
    failure.nth = nth, failure.status = status;
}

void fake_reset(void) {
    calls[0] = 0, capturing = 0, failure.nth = 0, last_stream = (void *)-1;
    fake_version(0, MINOR, MINOR == 8 ? 0 : 1);
}

static int enter(const char *function) {
    size_t used = strlen(calls);
    if (used + strlen(function) + 2 < sizeof calls) {
        strcpy(calls + used, function);
        strcat(calls + used, "\n");
    }
    if (failure.nth > 0 && !strcmp(failure.function, function) && !--failure.nth)
        return failure.status;
    return capturing && strcmp(function, "cusparseLtMatmul") ? EXECUTION_FAILED : 0;
}

#define ENTER()                              \
    do {                                     \
        int forced_ = enter(__func__);       \
        if (forced_) return forced_;         \
    } while (0)
#define NEED(condition, status)              \
    do {                                     \
        if (!(condition)) return status;     \
    } while (0)

/* ---- objects ---- */

static int aligned(const void *pointer) { return pointer && !((uintptr_t)pointer % 16); }

/* the whole object is written, so that memory that is too small is overrun */
static void *make(void *where, Kind kind, const void *handle) {
    Header *header = where;
    memset(where, 0xab, SIZE);
    *header = (Header){MAGIC, where, kind, (Header *)handle, 0};
    /* for a MATMUL there is no destructor, nor for a SELECTION before 0.8 */
    if (kind == MATMUL || (kind == SELECTION && MINOR < 8)) return where;
    live++;
    if (handle) header->handle->children++;
    return where;
}

static int is(const void *object, Kind kind) {
    const Header *header = object;
    const unsigned char *bytes = object;
    return aligned(object) && header->magic == MAGIC && header->where == object &&
           header->kind == kind && bytes[SIZE - 1] == 0xab;
}

static int destroy(void *object, Kind kind) {
    NEED(is(object, kind), INVALID);
    Header *handle = ((Header *)object)->handle;
    if (handle) {
        NEED(is(handle, HANDLE), INVALID); /* which must outlive it */
        handle->children--;
    }
    memset(object, 0, SIZE);
    live--;
    return SUCCESS;
}

static int valid_matmul(const Matmul *matmul) {
    return is(matmul, MATMUL) && is(matmul->a, MATRIX) && is(matmul->b, MATRIX) &&
           is(matmul->d, MATRIX);
}

static int valid_plan(const Plan *plan) {
    return is(plan, PLAN) && valid_matmul(plan->matmul) &&
           is(plan->selection, SELECTION) && plan->selection->matmul == plan->matmul;
}
