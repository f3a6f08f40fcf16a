// SPDX-License-Identifier: Apache-2.0
// Preloaded into a daemon: counts its calls into the C library that are about files below one directory, and fails one.
//
// What is to fail, and what was counted, is in a page that the test maps too (faults.py has the same layout). Programs
// that the daemon starts get the shim as well, whatever environment it gives them; as they may soon make hardly any
// system call, what their descriptors are is looked up at their start.
#define _GNU_SOURCE
#include <alloca.h>
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define FUNCTIONS(X)                                                                                          \
    X(write) X(pwrite64) X(fsync) X(fdatasync) X(rename) X(renameat) X(link) X(linkat) X(open64) X(create)    \
    X(unlink) X(unlinkat) X(mkdir) X(mkdirat) X(rmdir) X(mount) X(umount2) X(mmap64) X(ftruncate64)           \
    X(fchmod) X(chmod) X(chown) X(lchown) X(read) X(pread64) X(opendir) X(fdopendir) X(statvfs64) X(stat64)   \
    X(lstat64) X(fstat64) X(memfd_create) X(pipe2) X(openat64)

enum function {
#define X(name) F_##name,
    FUNCTIONS(X)
#undef X
    FUNCTION_COUNT
};

enum { LOGGED = 8192, PATH_BYTES = 116, DESCRIPTORS = 256 };

struct control {
    uint32_t function, nth, error, lasting;  // nth counts from 1; 0: nothing fails
    uint32_t fired, total;
    uint32_t counts[64];
    struct {
        uint32_t function, worker, error;
        char path[PATH_BYTES];
    } log[LOGGED];
};

static struct control *control;
static char root[PATH_MAX];
static size_t root_bytes;
static int worker;
static char inherited[DESCRIPTORS][PATH_BYTES];
static char variables[4][PATH_MAX + 32];

static const char *below(const char *path) {
    if (!control || !path || strncmp(path, root, root_bytes)) return NULL;
    return path[root_bytes] == '/' ? path + root_bytes + 1 : path[root_bytes] ? NULL : path + root_bytes;
}

// The path of a descriptor, where it is below the root. `out` has PATH_MAX bytes.
static const char *of_fd(int fd, char *out) {
    if (!control || fd < 0) return NULL;
    if (worker) return fd < DESCRIPTORS && inherited[fd][0] ? inherited[fd] : NULL;
    int before = errno;
    char name[40];
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    ssize_t size = syscall(SYS_readlink, name, out, PATH_MAX - 1);
    errno = before;
    if (size < 0) return NULL;
    out[size] = 0;
    return below(out);
}

static const char *of_at(int dirfd, const char *path, char *out) {
    if (!control || worker || !path) return NULL;
    if (path[0] == '/') return below(path);
    if (dirfd == AT_FDCWD) return NULL;
    char top[PATH_MAX];
    if (!of_fd(dirfd, top)) return NULL;
    if (snprintf(out, PATH_MAX, "%s/%s", top, path) >= PATH_MAX) return NULL;
    return below(out);
}

// Whether the call takes space: these all fail once a full disk has been met.
static int takes_space(enum function function) {
    switch (function) {
    case F_write: case F_pwrite64: case F_fsync: case F_fdatasync: case F_ftruncate64: case F_create:
    case F_rename: case F_renameat: case F_link: case F_linkat: case F_mkdir: case F_mkdirat:
        return 1;
    default:
        return 0;
    }
}

// Whether this call is to fail; errno says how.
static int hit(enum function function, const char *path) {
    if (!control || !path) return 0;
    uint32_t n = __atomic_add_fetch(&control->counts[function], 1, __ATOMIC_SEQ_CST);
    uint32_t at = __atomic_fetch_add(&control->total, 1, __ATOMIC_SEQ_CST);
    uint32_t nth = control->nth;
    int fails = nth && control->function == (uint32_t)function && n == nth;
    if (nth && control->lasting && control->fired && takes_space(function)) fails = 1;
    if (at < LOGGED) {
        control->log[at].function = function;
        control->log[at].worker = worker;
        control->log[at].error = fails ? control->error : 0;
        strncpy(control->log[at].path, path, PATH_BYTES - 1);
    }
    if (!fails) return 0;
    __atomic_add_fetch(&control->fired, 1, __ATOMIC_SEQ_CST);
    errno = (int)control->error;
    return 1;
}

__attribute__((constructor)) static void begin(void) {
    const char *top = getenv("TARDEV_FAULT_ROOT"), *page = getenv("TARDEV_FAULT_CONTROL"), *self = getenv("LD_PRELOAD");
    if (!top || !page || !self) return;
    int fd = (int)syscall(SYS_openat, AT_FDCWD, page, O_RDWR | O_CLOEXEC, 0);
    if (fd < 0) return;
    void *mapped = (void *)syscall(SYS_mmap, NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    syscall(SYS_close, fd);
    if (mapped == MAP_FAILED) return;
    snprintf(root, sizeof root, "%s", top);
    root_bytes = strlen(root);
    control = mapped;
    if (getenv("TARDEV_FAULT_WORKER")) {
        for (int number = 3; number < DESCRIPTORS; number++) {
            char out[PATH_MAX];
            const char *path = of_fd(number, out);
            if (path) strncpy(inherited[number], path, PATH_BYTES - 1);
        }
        worker = 1;
    }
    snprintf(variables[0], sizeof variables[0], "TARDEV_FAULT_ROOT=%s", top);
    snprintf(variables[1], sizeof variables[1], "TARDEV_FAULT_CONTROL=%s", page);
    snprintf(variables[2], sizeof variables[2], "LD_PRELOAD=%s", self);
    snprintf(variables[3], sizeof variables[3], "TARDEV_FAULT_WORKER=1");
}

#define NEXT(name) ((__typeof__(&name))next(F_##name, #name))
static void *found[FUNCTION_COUNT + 2];
static void *next(int function, const char *name) {
    if (!found[function]) found[function] = dlsym(RTLD_NEXT, name);
    return found[function];
}

// Of a program that is started: a child that shares its parent's memory runs this, so nothing is allocated.
int execve(const char *path, char *const arguments[], char *const environment[]) {
    int (*real)(const char *, char *const[], char *const[]) = next(FUNCTION_COUNT, "execve");
    if (!control) return real(path, arguments, environment);
    size_t count = 0;
    while (environment && environment[count]) count++;
    char **more = alloca((count + 5) * sizeof *more);
    size_t kept = 0;
    for (size_t at = 0; at < count; at++)
        if (strncmp(environment[at], "LD_PRELOAD=", 11) && strncmp(environment[at], "TARDEV_FAULT_", 13))
            more[kept++] = environment[at];
    for (int at = 0; at < 4; at++) more[kept++] = variables[at];
    more[kept] = NULL;
    return real(path, arguments, more);
}

#define OF_FD(result, name, parameters, fd, ...)          \
    result name parameters {                              \
        char out[PATH_MAX];                               \
        if (hit(F_##name, of_fd(fd, out))) return -1;     \
        return NEXT(name)(__VA_ARGS__);                   \
    }
#define OF_PATH(name, parameters, path, ...)              \
    int name parameters {                                 \
        if (!worker && hit(F_##name, below(path))) return -1; \
        return NEXT(name)(__VA_ARGS__);                   \
    }
#define OF_AT(name, parameters, dirfd, path, ...)         \
    int name parameters {                                 \
        char out[PATH_MAX];                               \
        if (hit(F_##name, of_at(dirfd, path, out))) return -1; \
        return NEXT(name)(__VA_ARGS__);                   \
    }

int mount(const char *, const char *, const char *, unsigned long, const void *);
int umount2(const char *, int);
int memfd_create(const char *, unsigned int);

OF_FD(ssize_t, write, (int fd, const void *data, size_t size), fd, fd, data, size)
OF_FD(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), fd, fd, data, size, at)
OF_FD(ssize_t, read, (int fd, void *data, size_t size), fd, fd, data, size)
OF_FD(ssize_t, pread64, (int fd, void *data, size_t size, off64_t at), fd, fd, data, size, at)
OF_FD(int, fsync, (int fd), fd, fd)
OF_FD(int, fdatasync, (int fd), fd, fd)
OF_FD(int, ftruncate64, (int fd, off64_t size), fd, fd, size)
OF_FD(int, fchmod, (int fd, mode_t mode), fd, fd, mode)
OF_FD(int, fstat64, (int fd, struct stat64 *status), fd, fd, status)
OF_PATH(rename, (const char *from, const char *to), to, from, to)
OF_PATH(link, (const char *from, const char *to), to, from, to)
OF_PATH(unlink, (const char *path), path, path)
OF_PATH(mkdir, (const char *path, mode_t mode), path, path, mode)
OF_PATH(rmdir, (const char *path), path, path)
OF_PATH(chmod, (const char *path, mode_t mode), path, path, mode)
OF_PATH(chown, (const char *path, uid_t user, gid_t group), path, path, user, group)
OF_PATH(lchown, (const char *path, uid_t user, gid_t group), path, path, user, group)
OF_PATH(umount2, (const char *path, int flags), path, path, flags)
OF_PATH(stat64, (const char *path, struct stat64 *status), path, path, status)
OF_PATH(lstat64, (const char *path, struct stat64 *status), path, path, status)
OF_PATH(statvfs64, (const char *path, struct statvfs64 *status), path, path, status)
OF_PATH(mount, (const char *source, const char *target, const char *type, unsigned long flags, const void *data), target,
        source, target, type, flags, data)
OF_AT(renameat, (int from_fd, const char *from, int to_fd, const char *to), to_fd, to, from_fd, from, to_fd, to)
OF_AT(linkat, (int from_fd, const char *from, int to_fd, const char *to, int flags), to_fd, to, from_fd, from, to_fd, to,
      flags)
OF_AT(unlinkat, (int fd, const char *path, int flags), fd, path, fd, path, flags)
OF_AT(mkdirat, (int fd, const char *path, mode_t mode), fd, path, fd, path, mode)

void *mmap64(void *address, size_t size, int protection, int flags, int fd, off64_t at) {
    char out[PATH_MAX];
    if (hit(F_mmap64, of_fd(fd, out))) return MAP_FAILED;
    return NEXT(mmap64)(address, size, protection, flags, fd, at);
}

DIR *opendir(const char *path) {
    if (!worker && hit(F_opendir, below(path))) return NULL;
    return NEXT(opendir)(path);
}

DIR *fdopendir(int fd) {
    char out[PATH_MAX];
    if (hit(F_fdopendir, of_fd(fd, out))) return NULL;
    return NEXT(fdopendir)(fd);
}

static mode_t mode_of(int flags, va_list rest) {
    return flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
}

// Whether the call would make a file.
static int makes(int fd, const char *path, int flags) {
    if ((flags & O_TMPFILE) == O_TMPFILE) return 1;
    if (!(flags & O_CREAT)) return 0;
    int before = errno, there = syscall(SYS_faccessat, fd, path, F_OK) == 0;
    errno = before;
    return !there;
}

int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = mode_of(flags, rest);
    va_end(rest);
    if (!worker && hit(makes(AT_FDCWD, path, flags) ? F_create : F_open64, below(path))) return -1;
    return NEXT(open64)(path, flags, mode);
}

int openat64(int fd, const char *path, int flags, ...) {
    char out[PATH_MAX];
    va_list rest;
    va_start(rest, flags);
    mode_t mode = mode_of(flags, rest);
    va_end(rest);
    const char *where = of_at(fd, path, out);
    if (where && hit(makes(fd, path, flags) ? F_create : F_openat64, where)) return -1;
    return NEXT(openat64)(fd, path, flags, mode);
}

// About no file: what a build needs to start its processes.
int memfd_create(const char *name, unsigned int flags) {
    if (!worker && hit(F_memfd_create, name)) return -1;
    return NEXT(memfd_create)(name, flags);
}

int pipe2(int ends[2], int flags) {
    if (!worker && hit(F_pipe2, "pipe")) return -1;
    return NEXT(pipe2)(ends, flags);
}
