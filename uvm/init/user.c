/* SPDX-License-Identifier: Apache-2.0 */
#include "user.h"

#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FILE_BYTES_MAX = 1 << 20, FIELDS = 7 };

/* The whole of a small regular file, with a NUL; an empty text where there is none. */
static char *contents(const char *path)
{
    char *text = calloc(1, FILE_BYTES_MAX + 1);
    struct stat status;
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (!text)
        abort();
    if (fd >= 0 && fstat(fd, &status) == 0 && S_ISREG(status.st_mode)) {
        ssize_t n;
        for (size_t used = 0; (n = read(fd, text + used, FILE_BYTES_MAX - used)) > 0;)
            used += (size_t)n;
    }
    if (fd >= 0)
        close(fd);
    return text;
}

/* The next line, cut at its colons; missing fields are empty. False at the end. */
static int next_line(char **at, char *fields[FIELDS])
{
    if (!**at)
        return 0;
    char *line = *at, *end = line + strcspn(line, "\n");
    *at = *end ? end + 1 : end;
    *end = 0;
    for (size_t i = 0; i < FIELDS; i++) {
        fields[i] = line;
        line += strcspn(line, ":");
        if (*line)
            *line++ = 0;
    }
    return 1;
}

/* A decimal id that fits into 31 bits. */
static int number(const char *text, uint32_t *value)
{
    size_t digits = strspn(text, "0123456789");
    if (!digits || text[digits] || digits > 10 || strtoull(text, NULL, 10) > INT32_MAX)
        return 0;
    *value = (uint32_t)strtoull(text, NULL, 10);
    return 1;
}

static int listed(const char *members, const char *name)
{
    size_t size = strlen(name);
    for (const char *at = members; *at; at += strcspn(at, ","), at += *at == ',')
        if (strcspn(at, ",") == size && strncmp(at, name, size) == 0)
            return 1;
    return 0;
}

const char *user_look_up(const char *user, struct identity *identity)
{
    static char error[300];
    char wanted[256], name[256] = "";
    const char *colon = strchr(user, ':'), *group = colon ? colon + 1 : "";
    int size = snprintf(wanted, sizeof wanted, "%.*s", colon ? (int)(colon - user) : (int)strlen(user), user);
    if (size < 0 || (size_t)size >= sizeof wanted)
        return "the user's name is too long";
    if (!*wanted)
        strcpy(wanted, "0");
    memset(identity, 0, sizeof *identity);
    strcpy(identity->home, "/");

    char *fields[FIELDS];
    uint32_t uid, gid;
    int numeric = number(wanted, &uid), found = 0;
    char *passwd = contents("/etc/passwd");
    for (char *at = passwd; !found && next_line(&at, fields);) {
        uint32_t line_uid;
        if (!number(fields[2], &line_uid) || !number(fields[3], &gid))
            continue;
        if (numeric ? line_uid == uid : strcmp(fields[0], wanted) == 0) {
            found = 1;
            identity->uid = line_uid;
            identity->gid = gid;
            snprintf(name, sizeof name, "%s", fields[0]);
            if (fields[5][0] == '/')
                snprintf(identity->home, sizeof identity->home, "%s", fields[5]);
        }
    }
    free(passwd);
    if (!found && !numeric) {
        snprintf(error, sizeof error, "user %s is not in the image's /etc/passwd", wanted);
        return error;
    }
    if (!found)
        identity->uid = uid;

    char *groups = contents("/etc/group");
    int group_found = !*group;
    if (*group && number(group, &gid)) {
        identity->gid = gid;
        group_found = 1;
    }
    for (char *at = groups; next_line(&at, fields);) {
        if (!number(fields[2], &gid))
            continue;
        if (!group_found && strcmp(fields[0], group) == 0) {
            identity->gid = gid;
            group_found = 1;
        }
        if (*name && listed(fields[3], name) && identity->group_count < GROUPS_MAX)
            identity->groups[identity->group_count++] = gid;
    }
    free(groups);
    if (!group_found) {
        snprintf(error, sizeof error, "group %s is not in the image's /etc/group", group);
        return error;
    }
    return NULL;
}
