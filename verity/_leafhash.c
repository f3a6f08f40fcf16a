/* SPDX-License-Identifier: Apache-2.0
 *
 * sha256(salt || block) of many equal blocks. The blocks are independent, so two of them go through the
 * SHA instructions side by side: one alone waits for their latency half of the time. The portable path
 * is FIPS 180-4 as it stands, for processors without the instructions.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#include <immintrin.h>
#define HAVE_SHA_NI 1
#endif

#define MESSAGE_BLOCK 64
#define DIGEST 32
#define SALT_MAX 63

static const uint32_t K[64] __attribute__((aligned(16))) = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static const uint32_t INITIAL[8] = {
    0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
};

/* Compress `count` message blocks of two messages into their states. */
typedef void (*compress_two)(uint32_t a[8], uint32_t b[8], const uint8_t *x, const uint8_t *y, size_t count);

static inline uint32_t rotate(uint32_t value, int by) { return (value >> by) | (value << (32 - by)); }

static void compress_portable(uint32_t state[8], const uint8_t *in, size_t count)
{
    uint32_t w[64];
    for (; count; count--, in += MESSAGE_BLOCK) {
        for (int i = 0; i < 16; i++)
            w[i] = (uint32_t)in[4 * i] << 24 | (uint32_t)in[4 * i + 1] << 16 | (uint32_t)in[4 * i + 2] << 8 |
                   in[4 * i + 3];
        for (int i = 16; i < 64; i++) {
            uint32_t s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ (w[i - 15] >> 3);
            uint32_t s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ (w[i - 2] >> 10);
            w[i] = w[i - 16] + s0 + w[i - 7] + s1;
        }
        uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
        uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
        for (int i = 0; i < 64; i++) {
            uint32_t t1 = h + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + ((e & f) ^ (~e & g)) + K[i] + w[i];
            uint32_t t2 = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
            h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
        }
        state[0] += a, state[1] += b, state[2] += c, state[3] += d;
        state[4] += e, state[5] += f, state[6] += g, state[7] += h;
    }
}

static void compress_two_portable(uint32_t a[8], uint32_t b[8], const uint8_t *x, const uint8_t *y, size_t count)
{
    compress_portable(a, x, count);
    compress_portable(b, y, count);
}

#ifdef HAVE_SHA_NI
/* The instructions want the state as ABEF and CDGH. */
#define LOAD_STATE(state, s0, s1)                                                                          \
    do {                                                                                                   \
        __m128i cdab = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)(state)), 0xB1);                 \
        __m128i efgh = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)((state) + 4)), 0x1B);           \
        s0 = _mm_alignr_epi8(cdab, efgh, 8);                                                               \
        s1 = _mm_blend_epi16(efgh, cdab, 0xF0);                                                            \
    } while (0)

#define STORE_STATE(state, s0, s1)                                                                         \
    do {                                                                                                   \
        __m128i feba = _mm_shuffle_epi32(s0, 0x1B);                                                        \
        __m128i dchg = _mm_shuffle_epi32(s1, 0xB1);                                                        \
        _mm_storeu_si128((__m128i *)(state), _mm_blend_epi16(feba, dchg, 0xF0));                           \
        _mm_storeu_si128((__m128i *)((state) + 4), _mm_alignr_epi8(dchg, feba, 8));                        \
    } while (0)

/* Four rounds of one lane; `w` is a ring of the last sixteen schedule words. */
#define ROUNDS(i, w, s0, s1)                                                                               \
    do {                                                                                                   \
        if ((i) >= 4) {                                                                                    \
            __m128i sum = _mm_add_epi32(_mm_sha256msg1_epu32(w[(i) & 3], w[((i) + 1) & 3]),                \
                                        _mm_alignr_epi8(w[((i) + 3) & 3], w[((i) + 2) & 3], 4));           \
            w[(i) & 3] = _mm_sha256msg2_epu32(sum, w[((i) + 3) & 3]);                                      \
        }                                                                                                  \
        __m128i wk = _mm_add_epi32(w[(i) & 3], _mm_load_si128((const __m128i *)&K[4 * (i)]));              \
        s1 = _mm_sha256rnds2_epu32(s1, s0, wk);                                                            \
        s0 = _mm_sha256rnds2_epu32(s0, s1, _mm_shuffle_epi32(wk, 0x0E));                                   \
    } while (0)

__attribute__((target("sha,sse4.1,ssse3"))) static void compress_two_sha_ni(uint32_t a[8], uint32_t b[8],
                                                                           const uint8_t *x, const uint8_t *y,
                                                                           size_t count)
{
    const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0bULL, 0x0405060700010203ULL);
    __m128i a0, a1, b0, b1, wa[4], wb[4];
    LOAD_STATE(a, a0, a1);
    LOAD_STATE(b, b0, b1);
    for (; count; count--, x += MESSAGE_BLOCK, y += MESSAGE_BLOCK) {
        const __m128i a0_before = a0, a1_before = a1, b0_before = b0, b1_before = b1;
        for (int i = 0; i < 4; i++) {
            wa[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(x + 16 * i)), swap);
            wb[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(y + 16 * i)), swap);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            ROUNDS(i, wa, a0, a1);
            ROUNDS(i, wb, b0, b1);
        }
        a0 = _mm_add_epi32(a0, a0_before), a1 = _mm_add_epi32(a1, a1_before);
        b0 = _mm_add_epi32(b0, b0_before), b1 = _mm_add_epi32(b1, b1_before);
    }
    STORE_STATE(a, a0, a1);
    STORE_STATE(b, b0, b1);
}

static int cpu_has_sha_ni(void)
{
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_SSE4_1) || !(c & bit_SSSE3))
        return 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & (1u << 29));
}
#endif

static void put_digest(uint8_t *out, const uint32_t state[8])
{
    for (int i = 0; i < 8; i++) {
        out[4 * i] = state[i] >> 24, out[4 * i + 1] = state[i] >> 16;
        out[4 * i + 2] = state[i] >> 8, out[4 * i + 3] = state[i];
    }
}

/* One message = salt || block || padding, cut into 64-byte pieces: the first holds the salt and the head
 * of the block, those in the middle lie in the block as they are, the last one or two hold the rest. */
static void hash_blocks(compress_two compress, const uint8_t *data, size_t blocks, size_t block_bytes,
                        const uint8_t *salt, size_t salt_bytes, uint8_t *out)
{
    const size_t head = MESSAGE_BLOCK - salt_bytes;
    const size_t middle = (block_bytes - head) / MESSAGE_BLOCK;
    const size_t rest = (block_bytes - head) % MESSAGE_BLOCK;
    const size_t tail = rest + 9 <= MESSAGE_BLOCK ? 1 : 2;
    const uint64_t bits = (uint64_t)(salt_bytes + block_bytes) * 8;
    uint8_t first[2][MESSAGE_BLOCK], last[2][2 * MESSAGE_BLOCK];
    uint32_t state[2][8];

    memset(last, 0, sizeof last);
    for (int lane = 0; lane < 2; lane++) {
        memcpy(first[lane], salt, salt_bytes);
        last[lane][rest] = 0x80;
        for (int i = 0; i < 8; i++)
            last[lane][tail * MESSAGE_BLOCK - 1 - i] = bits >> (8 * i);
    }
    for (size_t i = 0; i < blocks; i += 2) {
        const size_t lanes = blocks - i == 1 ? 1 : 2;
        const uint8_t *block[2] = {data + i * block_bytes, data + (i + lanes - 1) * block_bytes};
        for (int lane = 0; lane < 2; lane++) {
            memcpy(state[lane], INITIAL, sizeof INITIAL);
            memcpy(first[lane] + salt_bytes, block[lane], head);
            memcpy(last[lane], block[lane] + block_bytes - rest, rest);
        }
        compress(state[0], state[1], first[0], first[1], 1);
        compress(state[0], state[1], block[0] + head, block[1] + head, middle);
        compress(state[0], state[1], last[0], last[1], tail);
        for (size_t lane = 0; lane < lanes; lane++)
            put_digest(out + (i + lane) * DIGEST, state[lane]);
    }
}

static PyObject *digests(PyObject *self, PyObject *args)
{
    Py_buffer data, salt;
    Py_ssize_t block_bytes;
    const char *implementation;
    compress_two compress = NULL;
    PyObject *out = NULL;

    (void)self;
    if (!PyArg_ParseTuple(args, "y*ny*s", &data, &block_bytes, &salt, &implementation))
        return NULL;
#ifdef HAVE_SHA_NI
    if (!strcmp(implementation, "sha-ni") && cpu_has_sha_ni())
        compress = compress_two_sha_ni;
#endif
    if (!strcmp(implementation, "portable-c"))
        compress = compress_two_portable;
    if (!compress)
        PyErr_Format(PyExc_ValueError, "implementation %s is not to be had on this processor", implementation);
    else if (block_bytes < 2 * MESSAGE_BLOCK || data.len % block_bytes || salt.len > SALT_MAX)
        PyErr_SetString(PyExc_ValueError, "data must be whole blocks of 128 bytes or more, the salt at most 63");
    else if ((out = PyBytes_FromStringAndSize(NULL, data.len / block_bytes * DIGEST))) {
        Py_BEGIN_ALLOW_THREADS;
        hash_blocks(compress, data.buf, data.len / block_bytes, block_bytes, salt.buf, salt.len,
                    (uint8_t *)PyBytes_AS_STRING(out));
        Py_END_ALLOW_THREADS;
    }
    PyBuffer_Release(&data);
    PyBuffer_Release(&salt);
    return out;
}

static PyMethodDef methods[] = {
    {"digests", digests, METH_VARARGS, "digests(data, block_bytes, salt, implementation) -> 32 bytes per block"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "_leafhash", .m_size = 0, .m_methods = methods,
};

PyMODINIT_FUNC PyInit__leafhash(void)
{
    PyObject *self = PyModule_Create(&module), *names;
    if (!self)
        return NULL;
#ifdef HAVE_SHA_NI
    if (cpu_has_sha_ni())
        names = Py_BuildValue("(ss)", "sha-ni", "portable-c");
    else
#endif
        names = Py_BuildValue("(s)", "portable-c");
    if (!names || PyModule_AddObject(self, "IMPLEMENTATIONS", names) < 0) {
        Py_XDECREF(names);
        Py_DECREF(self);
        return NULL;
    }
    return self;
}
