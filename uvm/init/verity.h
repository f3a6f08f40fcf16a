/* SPDX-License-Identifier: Apache-2.0
 *
 * A layer's dm-verity target, made from the policy alone (Linux: Documentation/admin-guide/device-mapper/verity.rst,
 * include/uapi/linux/dm-ioctl.h), and the trailer that the policy gives.
 */
#ifndef UVM_VERITY_H
#define UVM_VERITY_H

#include "policy.h"

struct disk { /* or a partition of one */
    char name[32];   /* "vda", "vda1" */
    char device[24]; /* "254:0" */
};

/* Makes /dev/dm-N over `disk`, whose size and trailer must be what the policy gives; its path is put into `path`.
 * Refuses otherwise. */
void verity_open(const struct layer *layer, const struct disk *disk, char *path, size_t path_size);

/* The kernel's word on a layer, as a frame: V, or C if it has met a block that is not the policy's. */
void verity_report(const struct layer *layer, const struct disk *disk);

#endif
