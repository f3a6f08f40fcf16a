/* SPDX-License-Identifier: Apache-2.0
 *
 * sha256(salt || block) of many equal blocks, and sha256 of the stream that they are cut from.
 *
 * The blocks are independent, so three of them go through the SHA instructions side by side: one alone
 * waits for their latency more than half of the time. The stream cannot be cut, but a block beside it
 * costs next to nothing. The portable path is FIPS 180-4 as it stands, for processors without the
 * instructions.
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
#define BLOCK_MIN 128
#define BLOCK_MAX 4096
#define LANES 3 /* a fourth gains nothing: sixteen vector registers are full */
#define PIECES_MAX ((SALT_MAX + BLOCK_MAX + 9 + MESSAGE_BLOCK - 1) / MESSAGE_BLOCK)

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

/* A message, or a part of one, as the places of its 64-byte message blocks. */
typedef const uint8_t *pieces[PIECES_MAX];

/* Compress the first `count` pieces of `lanes` messages, 1 to LANES of them, into their states. */
typedef void (*compress_lanes)(uint32_t state[][8], pieces *message, size_t lanes, size_t count);

static inline uint32_t rotate(uint32_t value, int by) { return (value >> by) | (value << (32 - by)); }

static void compress_one(uint32_t state[8], const uint8_t *const *piece, size_t count)
{
    uint32_t w[64];
    for (; count; count--, piece++) {
        const uint8_t *in = *piece;
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

static void compress_portable(uint32_t state[][8], pieces *message, size_t lanes, size_t count)
{
    for (size_t lane = 0; lane < lanes; lane++)
        compress_one(state[lane], message[lane], count);
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

#define SHA_NI __attribute__((target("sha,sse4.1,ssse3")))

/* `lanes` is a constant where this is inlined, so that the lanes' rounds become one run of instructions. */
SHA_NI __attribute__((always_inline)) static inline void side_by_side(uint32_t state[][8], pieces *message,
                                                                      const int lanes, size_t count)
{
    const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0bULL, 0x0405060700010203ULL);
    __m128i s0[LANES], s1[LANES], w[LANES][4];
#pragma GCC unroll 3
    for (int lane = 0; lane < lanes; lane++)
        LOAD_STATE(state[lane], s0[lane], s1[lane]);
    for (size_t at = 0; at < count; at++) {
        __m128i s0_before[LANES], s1_before[LANES];
#pragma GCC unroll 3
        for (int lane = 0; lane < lanes; lane++) {
            const __m128i *in = (const __m128i *)message[lane][at];
            s0_before[lane] = s0[lane], s1_before[lane] = s1[lane];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
                w[lane][i] = _mm_shuffle_epi8(_mm_loadu_si128(in + i), swap);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
#pragma GCC unroll 3
            for (int lane = 0; lane < lanes; lane++)
                ROUNDS(i, w[lane], s0[lane], s1[lane]);
#pragma GCC unroll 3
        for (int lane = 0; lane < lanes; lane++) {
            s0[lane] = _mm_add_epi32(s0[lane], s0_before[lane]);
            s1[lane] = _mm_add_epi32(s1[lane], s1_before[lane]);
        }
    }
#pragma GCC unroll 3
    for (int lane = 0; lane < lanes; lane++)
        STORE_STATE(state[lane], s0[lane], s1[lane]);
}

SHA_NI static void compress_sha_ni(uint32_t state[][8], pieces *message, size_t lanes, size_t count)
{
    switch (lanes) {
    case 1: side_by_side(state, message, 1, count); break;
    case 2: side_by_side(state, message, 2, count); break;
    default: side_by_side(state, message, LANES, count);
    }
}

static int has_sha_ni; /* asked once: a hypervisor takes each cpuid for microseconds */

static int ask_cpu_for_sha_ni(void)
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
        const uint32_t word = state[i];
        out[4 * i] = word >> 24, out[4 * i + 1] = word >> 16, out[4 * i + 2] = word >> 8, out[4 * i + 3] = word;
    }
}

/* The messages salt || block || padding of some blocks. The first piece holds the salt and the head of
 * the block, those in the middle lie in the block as they are, the last one or two hold the rest. */
struct leaves {
    const uint8_t *next;
    size_t blocks, block_bytes, salt_bytes, count; /* `count`: pieces of each message */
    uint8_t *out;
    /* The salt, then room for the head. Room for the rest to end in, then the last pieces. Both copies are
     * of 64 bytes, whatever is needed of them, so that they are a few instructions and no loop. */
    uint8_t first[LANES][2 * MESSAGE_BLOCK], last[LANES][3 * MESSAGE_BLOCK];
};

static void leaves_start(struct leaves *self, const Py_buffer *data, size_t block_bytes, const Py_buffer *salt,
                         uint8_t *out)
{
    const size_t rest = (salt->len + block_bytes) % MESSAGE_BLOCK;
    const uint64_t bits = (uint64_t)(salt->len + block_bytes) * 8;

    memset(self, 0, sizeof *self);
    self->next = data->buf, self->blocks = data->len / block_bytes, self->block_bytes = block_bytes;
    self->salt_bytes = salt->len, self->out = out;
    self->count = (salt->len + block_bytes + 9 + MESSAGE_BLOCK - 1) / MESSAGE_BLOCK;
    const size_t last_bytes = rest + 9 <= MESSAGE_BLOCK ? MESSAGE_BLOCK : 2 * MESSAGE_BLOCK;
    for (int lane = 0; lane < LANES; lane++) {
        if (salt->len)
            memcpy(self->first[lane], salt->buf, salt->len);
        self->last[lane][MESSAGE_BLOCK + rest] = 0x80;
        for (int i = 0; i < 8; i++)
            self->last[lane][MESSAGE_BLOCK + last_bytes - 1 - i] = bits >> (8 * i);
    }
}

/* The next block's message, and the state that it starts from. */
static void leaf_place(struct leaves *self, size_t lane, pieces message, uint32_t state[8])
{
    const uint8_t *block = self->next;
    const size_t head = MESSAGE_BLOCK - self->salt_bytes;
    const size_t middle = (self->block_bytes - head) / MESSAGE_BLOCK;
    const size_t rest = (self->block_bytes - head) % MESSAGE_BLOCK;

    memcpy(state, INITIAL, sizeof INITIAL);
    memcpy(self->first[lane] + self->salt_bytes, block, MESSAGE_BLOCK);
    memcpy(self->last[lane] + rest, block + self->block_bytes - MESSAGE_BLOCK, MESSAGE_BLOCK);
    message[0] = self->first[lane];
    for (size_t i = 0; i < middle; i++)
        message[1 + i] = block + head + i * MESSAGE_BLOCK;
    for (size_t i = 1 + middle; i < self->count; i++)
        message[i] = self->last[lane] + (i - middle) * MESSAGE_BLOCK;
    self->next += self->block_bytes;
    self->blocks--;
}

static void leaf_done(struct leaves *self, const uint32_t state[8])
{
    put_digest(self->out, state);
    self->out += DIGEST;
}

static void hash_leaves(compress_lanes compress, struct leaves *leaves)
{
    uint32_t state[LANES][8];
    pieces message[LANES];

    while (leaves->blocks) {
        const size_t lanes = leaves->blocks < LANES ? leaves->blocks : LANES;
        for (size_t lane = 0; lane < lanes; lane++)
            leaf_place(leaves, lane, message[lane], state[lane]);
        compress(state, message, lanes, leaves->count);
        for (size_t lane = 0; lane < lanes; lane++)
            leaf_done(leaves, state[lane]);
    }
}

/* The stream: what of it does not fill a message block yet waits in `partial`. */
struct stream {
    compress_lanes compress;
    uint32_t state[8];
    uint64_t bytes;
    uint8_t partial[MESSAGE_BLOCK];
};

/* Take up to `count` whole message blocks off `*in`; as many as that. */
static size_t stream_place(pieces message, const uint8_t **in, size_t *in_bytes, size_t count)
{
    if (count > *in_bytes / MESSAGE_BLOCK)
        count = *in_bytes / MESSAGE_BLOCK;
    for (size_t i = 0; i < count; i++)
        message[i] = *in + i * MESSAGE_BLOCK;
    *in += count * MESSAGE_BLOCK, *in_bytes -= count * MESSAGE_BLOCK;
    return count;
}

/* The stream goes on by `in`, with one of the leaves beside it as long as both last; then the other leaves. */
static void stream_update(struct stream *self, const uint8_t *in, size_t in_bytes, struct leaves *leaves)
{
    uint32_t state[2][8];
    pieces message[2];
    size_t waiting = self->bytes % MESSAGE_BLOCK, count;

    self->bytes += in_bytes;
    memcpy(state[0], self->state, sizeof self->state);
    if (waiting) {
        const size_t take = in_bytes < MESSAGE_BLOCK - waiting ? in_bytes : MESSAGE_BLOCK - waiting;
        if (take)
            memcpy(self->partial + waiting, in, take);
        in += take, in_bytes -= take, waiting += take;
        if (waiting == MESSAGE_BLOCK) {
            message[0][0] = self->partial;
            self->compress(state, message, 1, 1);
            waiting = 0;
        }
    }
    while (leaves && leaves->blocks && in_bytes / MESSAGE_BLOCK >= leaves->count) {
        leaf_place(leaves, 0, message[1], state[1]);
        stream_place(message[0], &in, &in_bytes, leaves->count);
        self->compress(state, message, 2, leaves->count);
        leaf_done(leaves, state[1]);
    }
    while ((count = stream_place(message[0], &in, &in_bytes, PIECES_MAX)))
        self->compress(state, message, 1, count);
    memcpy(self->state, state[0], sizeof self->state);
    if (in_bytes)
        memcpy(self->partial + waiting, in, in_bytes);
    if (leaves)
        hash_leaves(self->compress, leaves);
}

static void stream_digest(const struct stream *self, uint8_t out[DIGEST])
{
    static const uint8_t padding[MESSAGE_BLOCK] = {0x80};
    struct stream end = *self;
    const size_t waiting = self->bytes % MESSAGE_BLOCK;
    uint8_t bits[8];

    for (int i = 0; i < 8; i++)
        bits[i] = (self->bytes * 8) >> (56 - 8 * i);
    stream_update(&end, padding, waiting < 56 ? 56 - waiting : 120 - waiting, NULL);
    stream_update(&end, bits, sizeof bits, NULL);
    put_digest(out, end.state);
}

/* NULL with ValueError set for a name that this processor knows nothing of. */
static compress_lanes named(const char *implementation)
{
#ifdef HAVE_SHA_NI
    if (!strcmp(implementation, "sha-ni") && has_sha_ni)
        return compress_sha_ni;
#endif
    if (!strcmp(implementation, "portable-c"))
        return compress_portable;
    PyErr_Format(PyExc_ValueError, "implementation %s is not to be had on this processor", implementation);
    return NULL;
}

/* Room for the digests of `data`; NULL with an error set where they cannot be had. */
static PyObject *room_for_digests(const Py_buffer *data, Py_ssize_t block_bytes, const Py_buffer *salt)
{
    if (block_bytes >= BLOCK_MIN && block_bytes <= BLOCK_MAX && !(data->len % block_bytes) && salt->len <= SALT_MAX)
        return PyBytes_FromStringAndSize(NULL, data->len / block_bytes * DIGEST);
    PyErr_SetString(PyExc_ValueError, "data must be whole blocks of 128 to 4096 bytes, the salt at most 63");
    return NULL;
}

static PyObject *digests(PyObject *module, PyObject *args)
{
    Py_buffer data, salt;
    Py_ssize_t block_bytes;
    const char *implementation;
    compress_lanes compress;
    PyObject *out = NULL;
    struct leaves leaves;

    (void)module;
    if (!PyArg_ParseTuple(args, "y*ny*s", &data, &block_bytes, &salt, &implementation))
        return NULL;
    if ((compress = named(implementation)) && (out = room_for_digests(&data, block_bytes, &salt))) {
        Py_BEGIN_ALLOW_THREADS;
        leaves_start(&leaves, &data, block_bytes, &salt, (uint8_t *)PyBytes_AS_STRING(out));
        hash_leaves(compress, &leaves);
        Py_END_ALLOW_THREADS;
    }
    PyBuffer_Release(&data);
    PyBuffer_Release(&salt);
    return out;
}

typedef struct {
    PyObject_HEAD
    struct stream stream;
    int busy; /* an update without the interpreter's lock is under way */
} Stream;

static PyTypeObject Stream_type;

/* Two threads cannot both be next: that is an error of the caller, and no race. */
static int stream_is_busy(const Stream *self)
{
    if (self->busy)
        PyErr_SetString(PyExc_RuntimeError, "another thread is updating this stream");
    return self->busy;
}

static PyObject *Stream_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    const char *implementation;
    compress_lanes compress;
    Stream *self;

    if (keywords && PyDict_GET_SIZE(keywords)) {
        PyErr_SetString(PyExc_TypeError, "Stream() takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "s", &implementation) || !(compress = named(implementation)))
        return NULL;
    if (!(self = (Stream *)type->tp_alloc(type, 0)))
        return NULL;
    self->stream.compress = compress;
    memcpy(self->stream.state, INITIAL, sizeof INITIAL);
    return (PyObject *)self;
}

static PyObject *Stream_update(PyObject *object, PyObject *argument)
{
    Stream *self = (Stream *)object;
    Py_buffer data;

    if (stream_is_busy(self) || PyObject_GetBuffer(argument, &data, PyBUF_SIMPLE) < 0)
        return NULL;
    self->busy = 1;
    Py_BEGIN_ALLOW_THREADS;
    stream_update(&self->stream, data.buf, data.len, NULL);
    Py_END_ALLOW_THREADS;
    self->busy = 0;
    PyBuffer_Release(&data);
    Py_RETURN_NONE;
}

static PyObject *Stream_update_with_leaves(PyObject *object, PyObject *args)
{
    Stream *self = (Stream *)object;
    Py_buffer data, blocks, salt;
    Py_ssize_t block_bytes;
    PyObject *out = NULL;
    struct leaves leaves;

    if (!PyArg_ParseTuple(args, "y*y*ny*", &data, &blocks, &block_bytes, &salt))
        return NULL;
    if (!stream_is_busy(self) && (out = room_for_digests(&blocks, block_bytes, &salt))) {
        self->busy = 1;
        Py_BEGIN_ALLOW_THREADS;
        leaves_start(&leaves, &blocks, block_bytes, &salt, (uint8_t *)PyBytes_AS_STRING(out));
        stream_update(&self->stream, data.buf, data.len, &leaves);
        Py_END_ALLOW_THREADS;
        self->busy = 0;
    }
    PyBuffer_Release(&data);
    PyBuffer_Release(&blocks);
    PyBuffer_Release(&salt);
    return out;
}

static PyObject *Stream_digest(PyObject *object, PyObject *none)
{
    uint8_t out[DIGEST];

    (void)none;
    if (stream_is_busy((Stream *)object))
        return NULL;
    stream_digest(&((Stream *)object)->stream, out);
    return PyBytes_FromStringAndSize((const char *)out, DIGEST);
}

static PyObject *Stream_copy(PyObject *object, PyObject *none)
{
    Stream *copy;

    (void)none;
    if (stream_is_busy((Stream *)object) || !(copy = (Stream *)Stream_type.tp_alloc(&Stream_type, 0)))
        return NULL;
    copy->stream = ((Stream *)object)->stream;
    return (PyObject *)copy;
}

static PyMethodDef Stream_methods[] = {
    {"update", Stream_update, METH_O, "update(data)"},
    {"update_with_leaves", Stream_update_with_leaves, METH_VARARGS,
     "update_with_leaves(data, blocks, block_bytes, salt) -> 32 bytes per block of `blocks`"},
    {"digest", Stream_digest, METH_NOARGS, "digest() -> sha256 of all data so far"},
    {"copy", Stream_copy, METH_NOARGS, "copy() -> another stream at the same place"},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject Stream_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "verity._leafhash.Stream",
    .tp_doc = "Stream(implementation): sha256 of one stream, leaf digests beside it",
    .tp_basicsize = sizeof(Stream),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = Stream_new,
    .tp_methods = Stream_methods,
};

static PyMethodDef methods[] = {
    {"digests", digests, METH_VARARGS, "digests(data, block_bytes, salt, implementation) -> 32 bytes per block"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "_leafhash", .m_size = 0, .m_methods = methods,
};

PyMODINIT_FUNC PyInit__leafhash(void)
{
    PyObject *self, *names;

    if (PyType_Ready(&Stream_type) < 0 || !(self = PyModule_Create(&module)))
        return NULL;
#ifdef HAVE_SHA_NI
    if ((has_sha_ni = ask_cpu_for_sha_ni()))
        names = Py_BuildValue("(ss)", "sha-ni", "portable-c");
    else
#endif
        names = Py_BuildValue("(s)", "portable-c");
    /* PyModule_AddObject takes the reference only when it succeeds. */
    Py_INCREF(&Stream_type);
    if (PyModule_AddObject(self, "Stream", (PyObject *)&Stream_type) < 0) {
        Py_DECREF(&Stream_type);
        Py_XDECREF(names);
        Py_DECREF(self);
        return NULL;
    }
    if (!names || PyModule_AddObject(self, "IMPLEMENTATIONS", names) < 0) {
        Py_XDECREF(names);
        Py_DECREF(self);
        return NULL;
    }
    return self;
}
