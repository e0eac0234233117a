/* A stand-in for libcusparseLt.so.0 that computes on the CPU.

   It has the signatures, sizes and constants of cusparseLt.h 0.8 (0.7 with
   -DMINOR=7), those that the package uses. It is stricter than the library: every
   object knows where it was created and whether it was destroyed, and every shape, type
   and pointer is checked. Functions that begin with fake_ are for the test. */

#include "fake_objects.h"

/* ---- the library's functions ---- */

int cusparseLtGetProperty(int which, int *value) {
    ENTER();
    NEED(which >= 0 && which < 3 && value, INVALID);
    *value = which == 0 ? major : which == 1 ? minor : patch;
    return SUCCESS;
}

int cusparseLtInit(void *handle) {
    ENTER();
    NEED(aligned(handle), INVALID);
    make(handle, HANDLE, NULL);
    return SUCCESS;
}

int cusparseLtDestroy(void *handle) {
    ENTER();
    NEED(is(handle, HANDLE) && !((Header *)handle)->children, INVALID);
    return destroy(handle, HANDLE);
}

static int describe(const void *handle, void *matrix, int64_t rows, int64_t columns,
                    int64_t leading, uint32_t alignment, int type, int order,
                    int structured) {
    int64_t multiple = (structured ? 32 : 16) / (item_size(type) ? item_size(type) : 1);
    NEED(is(handle, HANDLE) && aligned(matrix) && item_size(type), INVALID);
    NEED(order == ROW_MAJOR || order == COLUMN_MAJOR, INVALID);
    NEED(leading == (order == ROW_MAJOR ? columns : rows), INVALID);
    NEED(alignment == 16, NOT_SUPPORTED);
    NEED(rows > 0 && rows % multiple == 0, NOT_SUPPORTED);
    NEED(columns > 0 && columns % multiple == 0, NOT_SUPPORTED);
    Matrix *made = make(matrix, MATRIX, handle);
    made->rows = rows, made->columns = columns, made->leading = leading;
    made->type = type, made->order = order, made->structured = structured;
    return SUCCESS;
}

int cusparseLtDenseDescriptorInit(const void *handle, void *matrix, int64_t rows,
                                  int64_t columns, int64_t leading, uint32_t alignment,
                                  int type, int order) {
    ENTER();
    return describe(handle, matrix, rows, columns, leading, alignment, type, order, 0);
}

int cusparseLtStructuredDescriptorInit(const void *handle, void *matrix, int64_t rows,
                                       int64_t columns, int64_t leading,
                                       uint32_t alignment, int type, int order,
                                       int sparsity) {
    ENTER();
    NEED(sparsity == 0, INVALID);
    return describe(handle, matrix, rows, columns, leading, alignment, type, order, 1);
}

int cusparseLtMatDescriptorDestroy(void *matrix) {
    ENTER();
    return destroy(matrix, MATRIX);
}

int cusparseLtMatmulDescriptorInit(const void *handle, void *matmul, int op_a, int op_b,
                                   const Matrix *a, const Matrix *b, const Matrix *c,
                                   const Matrix *d, int compute) {
    ENTER();
    NEED(is(handle, HANDLE) && aligned(matmul), INVALID);
    NEED(is(a, MATRIX) && is(b, MATRIX) && is(c, MATRIX) && is(d, MATRIX), INVALID);
    NEED(a->structured && !b->structured && !c->structured && !d->structured, INVALID);
    /* the one arrangement that all of its types have */
    NEED(op_a == 0 && op_b == 1, NOT_SUPPORTED);
    NEED(a->order == ROW_MAJOR && b->order == ROW_MAJOR, NOT_SUPPORTED);
    NEED(c->order == COLUMN_MAJOR && d->order == COLUMN_MAJOR, NOT_SUPPORTED);
    NEED(a->columns == b->columns && d->rows == a->rows, INVALID);
    NEED(d->columns == b->rows && c->rows == d->rows && c->columns == d->columns, 3);
    NEED(a->type == b->type && c->type == d->type, NOT_SUPPORTED);
    NEED(compute == (a->type == R_8I ? COMPUTE_32I : COMPUTE_32F), NOT_SUPPORTED);
    NEED(item_size(d->type) == 2, NOT_SUPPORTED);
    NEED(item_size(a->type) == 1 || d->type == a->type, NOT_SUPPORTED);
    Matmul *made = make(matmul, MATMUL, handle);
    made->a = a, made->b = b, made->d = d, made->alpha_is_a_vector = 0;
    return SUCCESS;
}

int cusparseLtMatmulDescSetAttribute(const void *handle, Matmul *matmul, int attribute,
                                     const int *data, size_t size) {
    ENTER();
    NEED(is(handle, HANDLE) && valid_matmul(matmul), INVALID);
    NEED(attribute == 5 && data && size == sizeof *data, INVALID);
    matmul->alpha_is_a_vector = *data;
    return SUCCESS;
}

int cusparseLtMatmulAlgSelectionInit(const void *handle, void *selection,
                                     const Matmul *matmul, int algorithm) {
    ENTER();
    NEED(is(handle, HANDLE) && aligned(selection) && valid_matmul(matmul), INVALID);
    NEED(algorithm == 0, INVALID);
    Selection *made = make(selection, SELECTION, handle);
    made->matmul = matmul;
    memcpy(made->values, (int[]){0, ALGORITHMS, 5, 1, 1, 0}, sizeof made->values);
    return SUCCESS;
}

#if MINOR >= 8
int cusparseLtMatmulAlgSelectionDestroy(void *selection) {
    ENTER();
    return destroy(selection, SELECTION);
}
#endif

int cusparseLtMatmulAlgSetAttribute(const void *handle, Selection *selection,
                                    int attribute, const int *data, size_t size) {
    ENTER();
    NEED(is(handle, HANDLE) && is(selection, SELECTION), INVALID);
    NEED(attribute >= CONFIG_ID && attribute <= BUFFERS, INVALID);
    NEED(attribute != CONFIG_MAX_ID && data && size == sizeof *data, INVALID);
    NEED(attribute != CONFIG_ID || (*data >= 0 && *data < ALGORITHMS), INVALID);
    NEED(attribute != SPLIT_K || *data >= 1, INVALID);
    NEED(attribute != SPLIT_K_MODE || *data == 1 || *data == 2, INVALID);
    selection->values[attribute] = *data;
    return SUCCESS;
}

int cusparseLtMatmulAlgGetAttribute(const void *handle, const Selection *selection,
                                    int attribute, int *data, size_t size) {
    ENTER();
    NEED(is(handle, HANDLE) && is(selection, SELECTION), INVALID);
    NEED(attribute >= CONFIG_ID && attribute <= BUFFERS, INVALID);
    NEED(data && size == sizeof *data, INVALID);
    *data = selection->values[attribute];
    return SUCCESS;
}

int cusparseLtMatmulPlanInit(const void *handle, void *plan, const Matmul *matmul,
                             Selection *selection) {
    ENTER();
    NEED(is(handle, HANDLE) && aligned(plan) && valid_matmul(matmul), INVALID);
    NEED(is(selection, SELECTION) && selection->matmul == matmul, INVALID);
    Plan *made = make(plan, PLAN, handle);
    made->matmul = matmul, made->selection = selection;
    made->split_k = selection->values[SPLIT_K];
    return SUCCESS;
}

int cusparseLtMatmulPlanDestroy(Plan *plan) {
    ENTER();
    NEED(valid_plan(plan), INVALID); /* before anything that it consists of */
    return destroy(plan, PLAN);
}

int cusparseLtMatmulGetWorkspace(const void *handle, const Plan *plan, size_t *size) {
    ENTER();
    NEED(is(handle, HANDLE) && valid_plan(plan) && size, INVALID);
    *size = plan->split_k > 1 ? SPLIT_WORKSPACE : 0;
    return SUCCESS;
}

/* ---- compression: kept values by rows, then four bits per group ---- */

static int64_t values_bytes(const Matrix *a) {
    return a->rows * a->columns / 2 * item_size(a->type);
}

int cusparseLtSpMMACompressedSize2(const void *handle, const Matrix *a, size_t *size,
                                   size_t *buffer_size) {
    ENTER();
    NEED(is(handle, HANDLE) && is(a, MATRIX) && a->structured, INVALID);
    NEED(size && buffer_size, INVALID);
    *size = values_bytes(a) + a->rows * a->columns / 8 + SPARE_BYTES;
    *buffer_size = a->rows;
    return SUCCESS;
}

int cusparseLtSpMMACompress2(const void *handle, const Matrix *a, int is_a, int op,
                             const uint8_t *dense, uint8_t *compressed, void *buffer,
                             void *stream) {
    ENTER();
    NEED(is(handle, HANDLE) && is(a, MATRIX) && a->structured, INVALID);
    NEED(is_a && op == 0 && a->order == ROW_MAJOR, INVALID);
    NEED(aligned(dense) && aligned(compressed) && aligned(buffer), INVALID);
    last_stream = stream;
    int64_t size = item_size(a->type), groups = a->rows * a->columns / 4;
    uint8_t *indices = compressed + values_bytes(a);
    memset(indices, 0, groups / 2 + SPARE_BYTES);
    memset(buffer, 0, a->rows);
    for (int64_t g = 0; g < groups; g++) {
        int kept[2], found = 0;
        for (int j = 0; j < 4 && found < 2; j++)
            if (read(dense, 4 * g + j, a->type) != 0) kept[found++] = j;
        if (found == 0) kept[0] = 2, kept[1] = 3;
        if (found == 1) kept[1] = 3, kept[0] = kept[0] == 3 ? 2 : kept[0];
        for (int k = 0; k < 2; k++)
            memcpy(compressed + (2 * g + k) * size, dense + (4 * g + kept[k]) * size,
                   size);
        indices[g / 2] |= (kept[0] | kept[1] << 2) << 4 * (g & 1);
    }
    return SUCCESS;
}

static int multiply(const void *handle, const Plan *plan, const float *alpha,
                    const uint8_t *a, const void *b, const float *beta, const void *c,
                    void *d, void *workspace, void **streams, int32_t count) {
    NEED(is(handle, HANDLE) && valid_plan(plan) && alpha && beta, INVALID);
    NEED(aligned(a) && aligned(b) && aligned(c) && aligned(d), INVALID);
    NEED(*beta == 0 && streams && count == 1, INVALID);
    NEED(plan->split_k == 1 || aligned(workspace), INVALID);
    if (plan->split_k > 1) memset(workspace, 0xcd, SPLIT_WORKSPACE);
    last_stream = streams[0];
    const Matmul *matmul = plan->matmul;
    const Matrix *weight = matmul->a;
    const uint8_t *indices = a + values_bytes(weight);
    int64_t half = weight->columns / 2;
    for (int64_t token = 0; token < matmul->b->rows; token++)
        for (int64_t row = 0; row < weight->rows; row++) {
            double sum = 0;
            for (int64_t k = 0; k < half; k++) {
                int64_t at = row * half + k, group = at / 2;
                int pair = indices[group / 2] >> 4 * (group & 1) & 15;
                int64_t column = k / 2 * 4 + (k & 1 ? pair >> 2 : pair & 3);
                sum += (double)read(a, at, weight->type) *
                       read(b, token * weight->columns + column, weight->type);
            }
            float scale = alpha[matmul->alpha_is_a_vector ? row : 0];
            write(d, token * weight->rows + row, matmul->d->type, (float)sum * scale);
        }
    return SUCCESS;
}

int cusparseLtMatmul(const void *handle, const Plan *plan, const float *alpha,
                     const uint8_t *a, const void *b, const float *beta, const void *c,
                     void *d, void *workspace, void **streams, int32_t count) {
    ENTER();
    return multiply(handle, plan, alpha, a, b, beta, c, d, workspace, streams, count);
}

/* the winner splits K where tokens are few */
int cusparseLtMatmulSearch(const void *handle, Plan *plan, const float *alpha,
                           const uint8_t *a, const void *b, const float *beta,
                           const void *c, void *d, void *workspace, void **streams,
                           int32_t count) {
    ENTER();
    int status =
        multiply(handle, plan, alpha, a, b, beta, c, d, workspace, streams, count);
    NEED(status == SUCCESS, status);
    int few = plan->matmul->b->rows <= 128, *values = plan->selection->values;
    values[CONFIG_ID] = few ? 3 : 2;
    values[SPLIT_K] = few ? 4 : 1;
    values[SPLIT_K_MODE] = few ? 2 : 1;
    values[BUFFERS] = few ? 3 : 0;
    return SUCCESS;
}
