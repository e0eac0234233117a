// Names that all files of the kernel share.
#pragma once

using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using int64 = long long;

enum Kind { BF16, FP16, INT8, FP8 };         // of weights and tokens
enum Type { FLOAT, HALF, BFLOAT, NONE };     // of what a pointer points to

struct __align__(16) Pack { uint32 a, b, c, d; };
