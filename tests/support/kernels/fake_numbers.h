/* Numbers of the types that cuSPARSELt multiplies, by their cudaDataType. */

#pragma once

#include <stdint.h>
#include <string.h>

enum { R_16F = 2, R_8I = 3, R_16BF = 14, R_8F_E4M3 = 28 };

/* bytes; 0 of an unknown type */
static int item_size(int type) {
    return type == R_16F || type == R_16BF ? 2 : type == R_8I || type == R_8F_E4M3;
}

static float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static float read(const void *data, int64_t i, int type) {
    if (type == R_8I) return ((const int8_t *)data)[i];
    if (type == R_16F) return (float)((const _Float16 *)data)[i];
    if (type == R_16BF) return from_bits((uint32_t)((const uint16_t *)data)[i] << 16);
    uint8_t bits = ((const uint8_t *)data)[i];
    uint32_t sign = (uint32_t)(bits & 0x80) << 24, exponent = bits >> 3 & 15;
    if ((bits & 0x7f) == 0x7f) return from_bits(0x7fc00000);
    float size = exponent ? from_bits((exponent + 120) << 23 | (bits & 7u) << 20)
                          : (bits & 7) / 512.0f;
    return sign ? -size : size;
}

static void write(void *data, int64_t i, int type, float value) {
    if (type == R_16F) {
        ((_Float16 *)data)[i] = (_Float16)value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value == value) bits += 0x7fff + (bits >> 16 & 1); /* to the nearest, even */
    ((uint16_t *)data)[i] = bits >> 16;
}
