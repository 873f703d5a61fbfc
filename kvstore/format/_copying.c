/* Copies fragments and makes their XXH3-64 on the way.

   A hand-off is a gather or scatter, a copy and a checksum. One after the other they are three ways through the caches
   or the memory; here they are one, nearly as fast as a plain copy: the checksum is computed while memory is waited
   for. Every byte is read once. What is hashed is what is stored, whatever another process does to the source then.

   XXH3 as in the xxHash specification (github.com/Cyan4973/xxHash, doc/xxhash_spec.md), without a seed, for more than
   240 bytes. Knows nothing of fragments. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAS_AVX2 1
#endif

#define STRIPE_BYTES 64
#define SECRET_BYTES 192
#define STRIPES_PER_BLOCK ((SECRET_BYTES - STRIPE_BYTES) / 8)
#define MAX_SHORT_BYTES 240 /* up to there XXH3 is another function */
#define PREFETCH_BYTES 1024
#define MAX_DIMS 8
#define MAX_SUFFIX_BYTES 64

#define PRIME32_1 0x9E3779B1u
#define PRIME32_2 0x85EBCA77u
#define PRIME32_3 0xC2B2AE3Du
#define PRIME64_1 0x9E3779B185EBCA87u
#define PRIME64_2 0xC2B2AE3D27D4EB4Fu
#define PRIME64_3 0x165667B19E3779F9u
#define PRIME64_4 0x85EBCA77C2B2AE63u
#define PRIME64_5 0x27D4EB2F165667C5u

/* The specification's default secret. */
static const uint8_t SECRET[SECRET_BYTES] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};
static const uint8_t *const LAST_SECRET = SECRET + SECRET_BYTES - STRIPE_BYTES;

/* -- the digest of a stream whose length is known ahead */

typedef struct Digest Digest;

/* Copies `count` stripes and takes them into the digest; each byte of `from` is read once. */
typedef void TakeStripes(Digest *digest, uint8_t *to, const uint8_t *from, size_t count);

struct Digest {
    TakeStripes *take_stripes;
    uint64_t lanes[8];
    size_t num_in_block;     /* stripes since the last scramble */
    size_t num_stripes_left; /* all but the last, which finish() takes */
    size_t num_bytes;        /* of the whole stream */
    size_t num_carried;
    struct {
        uint8_t previous[STRIPE_BYTES]; /* the last stripe that was taken */
        uint8_t carried[STRIPE_BYTES];  /* the begin of the next, which is not whole yet */
    } window;
};

static inline uint64_t read64(const uint8_t *at) {
    uint64_t value;
    memcpy(&value, at, sizeof value);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    value = __builtin_bswap64(value);
#endif
    return value;
}

/* What was copied is read from the copy from here on: without this, a compiler may turn copies of a copy into copies of
   the source, which somebody else may have written to in between. */
#define READ_ONCE_BARRIER() __asm__ volatile("" ::: "memory")

static void mix(uint64_t *lanes, const uint8_t *stripe, const uint8_t *secret) {
    for (int i = 0; i < 8; i++) {
        uint64_t value = read64(stripe + 8 * i), keyed = value ^ read64(secret + 8 * i);
        lanes[i ^ 1] += value;
        lanes[i] += (keyed & 0xFFFFFFFFu) * (keyed >> 32);
    }
}

static void take_portably(Digest *digest, uint8_t *to, const uint8_t *from, size_t count) {
    for (; count; count--, to += STRIPE_BYTES, from += STRIPE_BYTES) {
        uint8_t *stripe = digest->window.previous;
        memcpy(stripe, from, STRIPE_BYTES);
        READ_ONCE_BARRIER();
        memcpy(to, stripe, STRIPE_BYTES);
        mix(digest->lanes, stripe, SECRET + 8 * digest->num_in_block);
        if (++digest->num_in_block < STRIPES_PER_BLOCK)
            continue;
        digest->num_in_block = 0;
        for (int i = 0; i < 8; i++) {
            uint64_t lane = digest->lanes[i] ^ (digest->lanes[i] >> 47) ^ read64(LAST_SECRET + 8 * i);
            digest->lanes[i] = lane * PRIME32_1;
        }
    }
}

#ifdef HAS_AVX2
#define AVX2 __attribute__((target("avx2")))

AVX2 static inline __m256i load(const void *at) { return _mm256_loadu_si256((const __m256i *)at); }

AVX2 static inline void store(void *at, __m256i value) { _mm256_storeu_si256((__m256i *)at, value); }

AVX2 static inline __m256i mix_half(__m256i lanes, __m256i value, const uint8_t *secret) {
    __m256i keyed = _mm256_xor_si256(value, load(secret));
    __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
    __m256i swapped = _mm256_shuffle_epi32(value, _MM_SHUFFLE(1, 0, 3, 2));
    return _mm256_add_epi64(lanes, _mm256_add_epi64(swapped, product));
}

AVX2 static inline __m256i scramble_half(__m256i lanes, const uint8_t *secret) {
    const __m256i prime = _mm256_set1_epi64x(PRIME32_1);
    __m256i keyed = _mm256_xor_si256(_mm256_xor_si256(lanes, _mm256_srli_epi64(lanes, 47)), load(secret));
    __m256i low = _mm256_mul_epu32(keyed, prime), high = _mm256_mul_epu32(_mm256_srli_epi64(keyed, 32), prime);
    return _mm256_add_epi64(low, _mm256_slli_epi64(high, 32));
}

/* is_streamed: past the caches. A line that is written whole need not be read first, and others keep their place. */
AVX2 static inline __attribute__((always_inline)) void take_by_avx2_as(
    Digest *digest, uint8_t *to, const uint8_t *from, size_t count, int is_streamed) {
    __m256i lanes_0 = load(digest->lanes), lanes_1 = load(digest->lanes + 4);
    __m256i half_0 = load(digest->window.previous), half_1 = load(digest->window.previous + 32);
    while (count) {
        size_t now = STRIPES_PER_BLOCK - digest->num_in_block;
        now = now < count ? now : count;
        const uint8_t *secret = SECRET + 8 * digest->num_in_block;
        for (size_t n = 0; n < now; n++, to += STRIPE_BYTES, from += STRIPE_BYTES, secret += 8) {
            half_0 = load(from);
            half_1 = load(from + 32);
            if (is_streamed) {
                __builtin_prefetch(from + PREFETCH_BYTES, 0, 0); /* neither does what is read need to stay */
                _mm256_stream_si256((__m256i *)to, half_0);
                _mm256_stream_si256((__m256i *)(to + 32), half_1);
            } else {
                __builtin_prefetch(from + PREFETCH_BYTES, 0);
                /* Stores wait for their lines as loads do, and the processor foresees only loads. */
                __builtin_prefetch(to + PREFETCH_BYTES, 1);
                store(to, half_0);
                store(to + 32, half_1);
            }
            lanes_0 = mix_half(lanes_0, half_0, secret);
            lanes_1 = mix_half(lanes_1, half_1, secret + 32);
        }
        count -= now;
        digest->num_in_block += now;
        if (digest->num_in_block == STRIPES_PER_BLOCK) {
            digest->num_in_block = 0;
            lanes_0 = scramble_half(lanes_0, LAST_SECRET);
            lanes_1 = scramble_half(lanes_1, LAST_SECRET + 32);
        }
    }
    store(digest->lanes, lanes_0);
    store(digest->lanes + 4, lanes_1);
    store(digest->window.previous, half_0);
    store(digest->window.previous + 32, half_1);
}

AVX2 static void take_by_avx2(Digest *digest, uint8_t *to, const uint8_t *from, size_t count) {
    take_by_avx2_as(digest, to, from, count, 0);
}

AVX2 static void stream_by_avx2(Digest *digest, uint8_t *to, const uint8_t *from, size_t count) {
    if ((uintptr_t)to % STRIPE_BYTES)
        take_by_avx2_as(digest, to, from, count, 0);
    else
        take_by_avx2_as(digest, to, from, count, 1);
}
#endif

static TakeStripes *fastest = take_portably, *fastest_past_caches = take_portably;

static void digest_begin(Digest *digest, TakeStripes *take_stripes, size_t num_bytes) {
    static const uint64_t FIRST[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3,
                                      PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    memset(digest, 0, sizeof *digest);
    digest->take_stripes = take_stripes;
    memcpy(digest->lanes, FIRST, sizeof FIRST);
    digest->num_stripes_left = (num_bytes - 1) / STRIPE_BYTES;
    digest->num_bytes = num_bytes;
}

static void carry(Digest *digest, uint8_t *to, const uint8_t *from, size_t count) {
    uint8_t *carried = digest->window.carried + digest->num_carried;
    memcpy(carried, from, count);
    READ_ONCE_BARRIER();
    memcpy(to, carried, count);
    digest->num_carried += count;
}

/* Copies what comes next in the stream and takes it into the digest. */
static void digest_copy(Digest *digest, uint8_t *to, const uint8_t *from, size_t count) {
    if (digest->num_carried) {
        size_t wanted = STRIPE_BYTES - digest->num_carried;
        wanted = wanted < count ? wanted : count;
        carry(digest, to, from, wanted);
        to += wanted;
        from += wanted;
        count -= wanted;
        if (digest->num_carried < STRIPE_BYTES || !digest->num_stripes_left)
            return; /* when only the last stripe is left, nothing comes behind it */
        _Alignas(STRIPE_BYTES) uint8_t nowhere[STRIPE_BYTES + 1]; /* + 1: where nothing is streamed to */
        digest->num_carried = 0;
        digest->num_stripes_left--;
        digest->take_stripes(digest, nowhere + 1, digest->window.carried, 1);
    }
    size_t num_whole = count / STRIPE_BYTES;
    num_whole = num_whole < digest->num_stripes_left ? num_whole : digest->num_stripes_left;
    digest->num_stripes_left -= num_whole;
    digest->take_stripes(digest, to, from, num_whole);
    carry(digest, to + num_whole * STRIPE_BYTES, from + num_whole * STRIPE_BYTES, count - num_whole * STRIPE_BYTES);
}

static uint64_t digest_finish(Digest *digest) {
    /* The last stripe is the last 64 bytes, has a place of its own in the secret, and no scramble behind it. */
    mix(digest->lanes, digest->window.previous + digest->num_carried, LAST_SECRET - 7);
    uint64_t hash = digest->num_bytes * PRIME64_1;
    for (int i = 0; i < 4; i++) {
        const uint8_t *secret = SECRET + 11 + 16 * i;
        unsigned __int128 product = (unsigned __int128)(digest->lanes[2 * i] ^ read64(secret)) *
                                    (digest->lanes[2 * i + 1] ^ read64(secret + 8));
        hash += (uint64_t)product ^ (uint64_t)(product >> 64);
    }
    hash ^= hash >> 37;
    hash *= 0x165667919E3779F9u;
    return hash ^ (hash >> 32);
}

/* -- a buffer as runs of bytes that lie in one piece, in C order */

typedef struct {
    uint8_t *at;
    size_t left;      /* in this run */
    size_t run_bytes; /* of each run */
    int num_outer;
    const Py_buffer *buffer;
    Py_ssize_t index[MAX_DIMS];
} Runs;

static void runs_begin(Runs *runs, const Py_buffer *buffer) {
    runs->buffer = buffer;
    runs->at = buffer->buf;
    runs->run_bytes = (size_t)buffer->itemsize;
    runs->num_outer = buffer->ndim;
    while (runs->num_outer > 0) {
        int last = runs->num_outer - 1;
        if (buffer->shape[last] != 1 && buffer->strides[last] != (Py_ssize_t)runs->run_bytes)
            break;
        runs->run_bytes *= (size_t)buffer->shape[last];
        runs->num_outer = last;
    }
    runs->left = runs->run_bytes;
    memset(runs->index, 0, sizeof runs->index);
}

static void runs_advance(Runs *runs, size_t count) {
    runs->at += count;
    runs->left -= count;
    if (runs->left)
        return;
    runs->at -= runs->run_bytes;
    runs->left = runs->run_bytes;
    for (int dim = runs->num_outer - 1; dim >= 0; dim--) {
        runs->at += runs->buffer->strides[dim];
        if (++runs->index[dim] < runs->buffer->shape[dim])
            return;
        runs->at -= runs->buffer->strides[dim] * runs->buffer->shape[dim];
        runs->index[dim] = 0;
    }
}

static uint64_t copy_and_digest(
    TakeStripes *take_stripes, const Py_buffer *target, const Py_buffer *source, const Py_buffer *suffix) {
    Digest digest;
    uint8_t nowhere[MAX_SUFFIX_BYTES];
    digest_begin(&digest, take_stripes, (size_t)(source->len + suffix->len));
    Runs to, from;
    runs_begin(&to, target);
    runs_begin(&from, source);
    for (size_t left = (size_t)source->len; left;) {
        size_t count = to.left < from.left ? to.left : from.left;
        digest_copy(&digest, to.at, from.at, count);
        runs_advance(&to, count);
        runs_advance(&from, count);
        left -= count;
    }
    digest_copy(&digest, nowhere, suffix->buf, (size_t)suffix->len);
    return digest_finish(&digest);
}

/* -- Python's side */

typedef struct {
    Py_buffer target, source, suffix;
    uint64_t digest;
} Copy;

static void copy_end(Copy *copy) {
    PyBuffer_Release(&copy->suffix);
    PyBuffer_Release(&copy->source);
    PyBuffer_Release(&copy->target);
}

/* Takes the buffers; on failure none is held, and an exception is set. */
static int copy_begin(Copy *copy, PyObject *target, PyObject *source, PyObject *suffix) {
    memset(copy, 0, sizeof *copy);
    if (PyObject_GetBuffer(target, &copy->target, PyBUF_STRIDED) == 0 &&
        PyObject_GetBuffer(source, &copy->source, PyBUF_STRIDED_RO) == 0 &&
        PyObject_GetBuffer(suffix, &copy->suffix, PyBUF_SIMPLE) == 0) {
        Py_ssize_t num_bytes = copy->source.len, suffix_bytes = copy->suffix.len;
        if (copy->target.len != num_bytes)
            PyErr_Format(PyExc_ValueError, "%zd bytes do not go into %zd", num_bytes, copy->target.len);
        else if (suffix_bytes > MAX_SUFFIX_BYTES || num_bytes + suffix_bytes <= MAX_SHORT_BYTES)
            PyErr_Format(PyExc_ValueError, "%zd bytes and %zd: too long a suffix, or too few in all", num_bytes,
                         suffix_bytes);
        else if (copy->target.ndim > MAX_DIMS || copy->source.ndim > MAX_DIMS)
            PyErr_Format(PyExc_ValueError, "more than %d dimensions", MAX_DIMS);
        else
            return 0;
    }
    copy_end(copy); /* does nothing to what was not taken */
    return -1;
}

static PyObject *copy_all(TakeStripes *take_stripes, TakeStripes *take_past_caches, PyObject *arguments) {
    PyObject *targets, *sources, *suffixes;
    int is_past_caches;
    if (!PyArg_ParseTuple(arguments, "O!O!O!p", &PyList_Type, &targets, &PyList_Type, &sources, &PyList_Type, &suffixes,
                          &is_past_caches))
        return NULL;
    if (is_past_caches)
        take_stripes = take_past_caches;
    Py_ssize_t count = PyList_GET_SIZE(targets), num_begun = 0;
    if (PyList_GET_SIZE(sources) != count || PyList_GET_SIZE(suffixes) != count) {
        PyErr_SetString(PyExc_ValueError, "as many targets as sources and suffixes are wanted");
        return NULL;
    }
    Copy *copies = PyMem_Calloc(count ? (size_t)count : 1, sizeof(Copy));
    if (copies == NULL)
        return PyErr_NoMemory();
    PyObject *digests = NULL;
    for (; num_begun < count; num_begun++) {
        Py_ssize_t i = num_begun;
        if (copy_begin(&copies[i], PyList_GET_ITEM(targets, i), PyList_GET_ITEM(sources, i),
                       PyList_GET_ITEM(suffixes, i)) < 0)
            goto end;
    }
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < count; i++)
        copies[i].digest = copy_and_digest(take_stripes, &copies[i].target, &copies[i].source, &copies[i].suffix);
#ifdef HAS_AVX2
    _mm_sfence(); /* what is written next, a header say, is seen after what was streamed */
#endif
    Py_END_ALLOW_THREADS
    digests = PyList_New(count);
    for (Py_ssize_t i = 0; digests != NULL && i < count; i++) {
        PyObject *digest = PyLong_FromUnsignedLongLong(copies[i].digest);
        if (digest == NULL)
            Py_CLEAR(digests);
        else
            PyList_SET_ITEM(digests, i, digest);
    }
end:
    while (num_begun > 0)
        copy_end(&copies[--num_begun]);
    PyMem_Free(copies);
    return digests;
}

static PyObject *copy_digests(PyObject *module, PyObject *arguments) {
    (void)module;
    return copy_all(fastest, fastest_past_caches, arguments);
}

static PyObject *copy_digests_portably(PyObject *module, PyObject *arguments) {
    (void)module;
    return copy_all(take_portably, take_portably, arguments);
}

PyDoc_STRVAR(COPY_DIGESTS, "copy_digests(targets, sources, suffixes, past_caches)\n--\n\n"
                           "Copies each source to its target, both of any strides; XXH3-64 of each copy and suffix.\n"
                           "past_caches: what is written is not soon read by this processor.");
PyDoc_STRVAR(COPY_DIGESTS_PORTABLY, "copy_digests_portably(targets, sources, suffixes, past_caches)\n--\n\n"
                                    "The same without vector instructions: what other processors run.");

static PyMethodDef METHODS[] = {
    {"copy_digests", copy_digests, METH_VARARGS, COPY_DIGESTS},
    {"copy_digests_portably", copy_digests_portably, METH_VARARGS, COPY_DIGESTS_PORTABLY},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT,
    .m_name = "kvstore._copying",
    .m_size = 0,
    .m_methods = METHODS,
};

PyMODINIT_FUNC PyInit__copying(void) {
#ifdef HAS_AVX2
    if (__builtin_cpu_supports("avx2")) {
        fastest = take_by_avx2;
        fastest_past_caches = stream_by_avx2;
    }
#endif
    return PyModule_Create(&MODULE);
}
