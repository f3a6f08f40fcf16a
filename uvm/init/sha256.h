/* SPDX-License-Identifier: Apache-2.0
 *
 * SHA-256 (FIPS 180-4), for the digest of the policy and for the checksum in a trailer: a few hundred bytes each.
 * Layers are hashed by the kernel.
 */
#ifndef UVM_SHA256_H
#define UVM_SHA256_H

#include <stddef.h>
#include <stdint.h>

enum { DIGEST_BYTES = 32 };

void sha256(const void *data, size_t size, uint8_t digest[DIGEST_BYTES]);

#endif
