/* SPDX-License-Identifier: Apache-2.0
 *
 * An image's USER, looked up in the image's own /etc/passwd and /etc/group (man 5 passwd, group), by the rules of
 * containerd: a name must be there, a number need not; the group is that of the user, or 0.
 */
#ifndef UVM_USER_H
#define UVM_USER_H

#include <sys/types.h>

enum { GROUPS_MAX = 256 };

struct identity {
    uid_t uid;
    gid_t gid;
    gid_t groups[GROUPS_MAX];
    size_t group_count;
    char home[256]; /* "/" where nothing says so */
};

/* "", USER, or USER:GROUP, each a name or a number. NULL, or why not. To be called in the image's root directory. */
const char *user_look_up(const char *user, struct identity *identity);

#endif
