/* SPDX-License-Identifier: Apache-2.0
 *
 * What a guest does before it looks at a layer: its own mounts and modules, the port to the host, the policy. Whatever
 * fails ends the machine with the reason.
 */
#ifndef UVM_MACHINE_H
#define UVM_MACHINE_H

#include <sys/types.h>

#include "policy.h"

enum { DISKS_MAX = 256, WAIT_MS = 20000, STEP_MS = 10 };

void pause_ms(long ms);

/* The text of a small file, without the newline at its end; -1 if there is none. */
ssize_t read_text(const char *path, char *text, size_t size);

/* As the first process, from the initramfs. The port's descriptor; reports go there from now on. */
int start_machine(void);

/* The one that the kernel's command line names. */
struct policy *take_policy(void);

/* The host says "disks N\n" when it has attached all of them. It may lie: then they are not those of the policy. */
unsigned long disks_attached(int port);

/* EROFS reads a tar in pieces of 512 bytes, a verity target of 4096-byte blocks refuses them: in between is a loop
 * device, which reads through the page cache. It is there as long as the descriptor, or what is mounted from it; its
 * path is put into `path`. */
int attach_loop(const struct layer *layer, const char *device, char *path, size_t path_size);

#endif
