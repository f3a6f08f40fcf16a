/* SPDX-License-Identifier: Apache-2.0
 *
 * What the guest is to run, and on which layers. uvm/policy.py writes the same text; docs/uvm.md specifies it.
 */
#ifndef UVM_POLICY_H
#define UVM_POLICY_H

#include "sha256.h"

enum {
    POLICY_BYTES_MAX = 256 << 10,
    LAYERS_MAX = 128,
    SERIAL_BYTES_MAX = 20, /* VIRTIO_BLK_ID_BYTES */
    STRINGS_MAX = 1024,    /* of arguments, and of environment variables */
};

/* Fixed for ever by the format's name (docs/formats.md). All have 32 zero bytes of salt and sha256. */
struct format {
    const char *name;
    uint32_t data_block, hash_block; /* bytes */
    const char *magic;               /* of the identity record in front, which the trailer repeats; or NULL */
};

struct layer {
    char name[SERIAL_BYTES_MAX + 1]; /* also the serial of its virtio-blk device */
    const struct format *format;
    uint8_t root_hash[DIGEST_BYTES];
    char root_hash_hex[2 * DIGEST_BYTES + 1];
    uint64_t data_size; /* bytes; the hash tree follows */
};

struct policy {
    char disk[SERIAL_BYTES_MAX + 1]; /* serial of the one whose partition N is layers[N - 1]; "": each layer has a disk */
    size_t layer_count;
    struct layer layers[LAYERS_MAX]; /* top first */
    char *args[STRINGS_MAX + 1], *env[STRINGS_MAX + 1];
    const char *cwd, *user;
};

/* NULL, or why the text is no policy. The policy's strings stay in `text`, which is changed and has room for one
 * byte more than `size`. */
const char *policy_parse(char *text, size_t size, struct policy *policy);

/* The digest that `cmdline`, the whole command line of the kernel, names; false if that is not all that it has. */
int policy_digest_named(const char *cmdline, uint8_t digest[DIGEST_BYTES]);

#endif
