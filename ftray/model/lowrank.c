/* y += (x Aᵀ) B for tokens of many adapters at once, bf16 on CPUs: what reads the weights once and nothing twice.
 *
 * Adapters lie in pools, down [C, rank, in] and up [C, rank, out]. Entry g of `blocks` [groups] is the block of tokens
 * tokens[starts[g]] … tokens[starts[g + 1] - 1]. x [T, in] and y [T, out] are rows without gaps. `inner` is scratch for
 * rank floats of each entry of `tokens`. Sums are in fp32; y is rounded once, to nearest even.
 */
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;
enum { CHUNK = 256 };

static inline float widen(bf16 value) {
    uint32_t bits = (uint32_t)value << 16;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}

static inline bf16 round_to_even(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return (bf16)((bits >> 16) | 0x40); /* NaN stays NaN */
    return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

void ftray_low_rank(const bf16 *x, bf16 *y, const bf16 *down, const bf16 *up, const int32_t *blocks,
                    const int32_t *starts, const int32_t *tokens, float *inner, int64_t groups, int64_t rank,
                    int64_t in, int64_t out) {
    const int64_t chunks = (out + CHUNK - 1) / CHUNK;
#pragma omp parallel
    {
#pragma omp for collapse(2) schedule(static)
        for (int64_t g = 0; g < groups; g++)
            for (int64_t r = 0; r < rank; r++) {
                const bf16 *row = down + (blocks[g] * rank + r) * in;
                for (int64_t e = starts[g]; e < starts[g + 1]; e++) {
                    const bf16 *own = x + tokens[e] * in;
                    float sum = 0;
                    for (int64_t i = 0; i < in; i++) sum += widen(row[i]) * widen(own[i]);
                    inner[e * rank + r] = sum;
                }
            }
#pragma omp for collapse(2) schedule(static)
        for (int64_t g = 0; g < groups; g++)
            for (int64_t c = 0; c < chunks; c++) {
                const int64_t first = c * CHUNK, width = out - first < CHUNK ? out - first : CHUNK;
                for (int64_t e = starts[g]; e < starts[g + 1]; e++) {
                    bf16 *own = y + tokens[e] * out + first;
                    float sums[CHUNK];
                    for (int64_t o = 0; o < width; o++) sums[o] = widen(own[o]);
                    for (int64_t r = 0; r < rank; r++) {
                        const bf16 *row = up + (blocks[g] * rank + r) * out + first;
                        const float weight = inner[e * rank + r];
                        for (int64_t o = 0; o < width; o++) sums[o] += weight * widen(row[o]);
                    }
                    for (int64_t o = 0; o < width; o++) own[o] = round_to_even(sums[o]);
                }
            }
    }
}
