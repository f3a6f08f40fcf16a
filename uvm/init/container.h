/* SPDX-License-Identifier: Apache-2.0 */
#ifndef UVM_CONTAINER_H
#define UVM_CONTAINER_H

#include "policy.h"

/* Runs the policy's process in `root` to its end, its output in frames. The exit status as shells have it: 128 and
 * the number for a signal, 127 for a command that is not there, 126 for one that does not start. */
int container_run(const struct policy *policy, const char *root);

#endif
