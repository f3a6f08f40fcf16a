/* SPDX-License-Identifier: Apache-2.0
 *
 * Runs in the guest and says all that a program can see of the tree: one line for each path below the directory
 * given, but for what is mounted there. Fields are separated by blanks; bytes are hexadecimal; an empty field is "-".
 *
 *   PATH MODE UID GID SECONDS NANOSECONDS SIZE NLINK DEVICE:INODE MAJOR MINOR SHA256 LINK XATTR=VALUE,...
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "sha256.h"

static char bytes[64 << 20];

static void hex(const char *at, size_t size)
{
    for (size_t i = 0; i < size; i++)
        printf("%02x", (unsigned char)at[i]);
}

static void content(const char *path)
{
    uint8_t digest[DIGEST_BYTES];
    size_t used = 0;
    ssize_t n = -1;
    int fd = open(path, O_RDONLY);
    while (fd >= 0 && used < sizeof bytes && (n = read(fd, bytes + used, sizeof bytes - used)) > 0)
        used += (size_t)n;
    if (fd < 0 || n < 0) {
        printf(" error:%d", errno);
    } else {
        sha256(bytes, used, digest);
        printf(" ");
        hex((const char *)digest, sizeof digest);
    }
    if (fd >= 0)
        close(fd);
}

static void xattrs(const char *path)
{
    static char names[64 << 10], value[64 << 10];
    ssize_t size = llistxattr(path, names, sizeof names);
    printf(size > 0 ? " " : size ? " error" : " -");
    for (ssize_t at = 0; at < size; at += (ssize_t)strlen(names + at) + 1) {
        ssize_t length = lgetxattr(path, names + at, value, sizeof value);
        hex(names + at, strlen(names + at));
        printf("=");
        hex(value, length < 0 ? 0 : (size_t)length);
        printf(",");
    }
}

static void list(const char *path, size_t top, dev_t device)
{
    struct stat status;
    if (lstat(path, &status)) {
        hex(path + top, strlen(path + top));
        printf(" ghost\n");
        return;
    }
    if (status.st_dev != device && S_ISDIR(status.st_mode))
        return;
    if (strlen(path) > top) {
        char target[4097];
        ssize_t length = S_ISLNK(status.st_mode) ? readlink(path, target, sizeof target) : 0;
        hex(path + top, strlen(path + top));
        printf(" %o %u %u %lld %ld %lld %lu %lx:%lu %u %u", status.st_mode, status.st_uid, status.st_gid,
               (long long)status.st_mtim.tv_sec, status.st_mtim.tv_nsec, (long long)status.st_size,
               (unsigned long)status.st_nlink, (unsigned long)status.st_dev, (unsigned long)status.st_ino,
               major(status.st_rdev), minor(status.st_rdev));
        if (S_ISREG(status.st_mode))
            content(path);
        else
            printf(" -");
        printf(length > 0 ? " " : " -");
        hex(target, length > 0 ? (size_t)length : 0);
        xattrs(path);
        printf("\n");
    }
    if (!S_ISDIR(status.st_mode))
        return;
    struct dirent **entries;
    int count = scandir(path, &entries, NULL, NULL);
    if (count < 0) {
        hex(path + top, strlen(path + top));
        printf(" unreadable:%d\n", errno);
    }
    for (int i = 0; i < count; i++) {
        const char *name = entries[i]->d_name;
        if (strcmp(name, ".") != 0 && strcmp(name, "..") != 0) {
            char *child = malloc(strlen(path) + strlen(name) + 2);
            if (!child)
                abort();
            sprintf(child, "%s/%s", path, name);
            list(child, top, device);
            free(child);
        }
        free(entries[i]);
    }
    if (count >= 0)
        free(entries);
}

int main(int argc, char **argv)
{
    struct stat status;
    if (argc != 2 || stat(argv[1], &status))
        return 2;
    const char *path = strcmp(argv[1], "/") == 0 ? "" : argv[1];
    /* The top is "/", whose children are "/name": a path is shown without its first slash. */
    struct dirent **entries;
    int count = scandir(argv[1], &entries, NULL, NULL);
    for (int i = 0; i < count; i++) {
        const char *name = entries[i]->d_name;
        if (strcmp(name, ".") == 0 || strcmp(name, "..") == 0)
            continue;
        char *child = malloc(strlen(path) + strlen(name) + 2);
        if (!child)
            abort();
        sprintf(child, "%s/%s", path, name);
        list(child, strlen(path) + 1, status.st_dev);
    }
    return count < 0;
}
