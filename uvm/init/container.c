/* SPDX-License-Identifier: Apache-2.0
 *
 * The process: as pid 1 of its own namespaces, in the merged root, with the mounts that runtimes give every container
 * and without the capabilities that would let it reach the guest's devices.
 */
#include "container.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <grp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

#include "report.h"
#include "user.h"

enum { STATUS_NOT_STARTED = 126, STATUS_NOT_FOUND = 127 };

/* containerd's default, but for CAP_MKNOD: there is no devices cgroup here. */
static const int capabilities[] = {
    CAP_CHOWN,  CAP_DAC_OVERRIDE,     CAP_FSETID,     CAP_FOWNER, CAP_NET_RAW,     CAP_SETGID, CAP_SETUID, CAP_SETFCAP,
    CAP_SETPCAP, CAP_NET_BIND_SERVICE, CAP_SYS_CHROOT, CAP_KILL,   CAP_AUDIT_WRITE,
};

/* In the child: its standard error is the process's. */
static _Noreturn void fail(int status, const char *what)
{
    dprintf(2, "uvm: %s: %s\n", what, strerror(errno));
    _exit(status);
}

static void mount_on(const char *type, const char *target, unsigned long flags, const char *options)
{
    if (mkdir(target, 0755) && errno != EEXIST)
        fail(STATUS_NOT_STARTED, target);
    if (mount(type, target, type, flags, options))
        fail(STATUS_NOT_STARTED, target);
}

static void make_devices(void)
{
    static const struct {
        const char *path;
        unsigned int minor;
    } nodes[] = {{"/dev/null", 3}, {"/dev/zero", 5}, {"/dev/full", 7}, {"/dev/random", 8}, {"/dev/urandom", 9}};
    for (size_t i = 0; i < sizeof nodes / sizeof *nodes; i++)
        if (mknod(nodes[i].path, S_IFCHR | 0666, makedev(1, nodes[i].minor)))
            fail(STATUS_NOT_STARTED, nodes[i].path);
    if (mknod("/dev/tty", S_IFCHR | 0666, makedev(5, 0)) || symlink("/proc/self/fd", "/dev/fd") ||
        symlink("/proc/self/fd/0", "/dev/stdin") || symlink("/proc/self/fd/1", "/dev/stdout") ||
        symlink("/proc/self/fd/2", "/dev/stderr") || symlink("pts/ptmx", "/dev/ptmx"))
        fail(STATUS_NOT_STARTED, "/dev");
}

static void enter_root(const char *root)
{
    if (unshare(CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) ||
        chdir(root) || syscall(SYS_pivot_root, ".", ".") || umount2(".", MNT_DETACH) || chdir("/"))
        fail(STATUS_NOT_STARTED, "the merged root");
    umask(0);
    mount_on("proc", "/proc", MS_NOSUID | MS_NOEXEC | MS_NODEV, NULL);
    mount_on("sysfs", "/sys", MS_NOSUID | MS_NOEXEC | MS_NODEV | MS_RDONLY, NULL);
    mount_on("tmpfs", "/dev", MS_NOSUID | MS_STRICTATIME, "mode=755,size=64k");
    make_devices();
    mount_on("devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5");
    mount_on("tmpfs", "/dev/shm", MS_NOSUID | MS_NOEXEC | MS_NODEV, "mode=1777");
    umask(022);
}

static void make_directories(const char *path)
{
    char part[4096];
    if (snprintf(part, sizeof part, "%s/", path) >= (int)sizeof part) {
        errno = ENAMETOOLONG;
        fail(STATUS_NOT_STARTED, "working directory");
    }
    for (char *at = part + 1; (at = strchr(at, '/')); *at++ = '/') {
        *at = 0;
        if (mkdir(part, 0755) && errno != EEXIST)
            fail(STATUS_NOT_STARTED, part);
    }
}

static void drop_capabilities(void)
{
    for (int cap = 0; prctl(PR_CAPBSET_READ, cap) >= 0; cap++) {
        int kept = 0;
        for (size_t i = 0; i < sizeof capabilities / sizeof *capabilities; i++)
            kept |= capabilities[i] == cap;
        if (!kept && prctl(PR_CAPBSET_DROP, cap))
            fail(STATUS_NOT_STARTED, "capabilities");
    }
}

static _Noreturn void run_process(const struct policy *policy, const char *root)
{
    static struct identity identity;
    enter_root(root);
    const char *wrong = user_look_up(policy->user, &identity);
    if (wrong) {
        dprintf(2, "uvm: %s\n", wrong);
        _exit(STATUS_NOT_STARTED);
    }
    make_directories(policy->cwd);
    drop_capabilities();
    if (setgroups(identity.group_count, identity.groups) || setgid(identity.gid) || setuid(identity.uid))
        fail(STATUS_NOT_STARTED, "user");
    if (chdir(policy->cwd))
        fail(STATUS_NOT_STARTED, policy->cwd);

    clearenv();
    for (char *const *at = policy->env; *at; at++)
        if (strchr(*at, '=') && putenv(*at))
            fail(STATUS_NOT_STARTED, "environment");
    if (!getenv("HOME")) /* as runc does */
        setenv("HOME", identity.home, 1);
    execvp(policy->args[0], policy->args);
    fail(errno == ENOENT ? STATUS_NOT_FOUND : STATUS_NOT_STARTED, policy->args[0]);
}

/* Until both ends of the process's output are closed, which the end of its pid namespace sees to. */
static void pass_on(int out, int error)
{
    static char buffer[FRAME_BYTES_MAX];
    struct pollfd ends[2] = {{.fd = out, .events = POLLIN}, {.fd = error, .events = POLLIN}};
    while (ends[0].fd >= 0 || ends[1].fd >= 0) {
        if (poll(ends, 2, -1) < 0 && errno != EINTR)
            return;
        for (size_t i = 0; i < 2; i++) {
            if (ends[i].fd < 0 || !ends[i].revents)
                continue;
            ssize_t n = read(ends[i].fd, buffer, sizeof buffer);
            if (n > 0)
                report_frame(i ? FRAME_STDERR : FRAME_STDOUT, buffer, (size_t)n);
            else if (n == 0 || errno != EINTR)
                ends[i].fd = -1;
        }
    }
}

int container_run(const struct policy *policy, const char *root)
{
    int out[2], error[2], status;
    if (pipe2(out, O_CLOEXEC) || pipe2(error, O_CLOEXEC) || unshare(CLONE_NEWPID))
        refuse_errno("process");
    pid_t child = fork();
    if (child < 0)
        refuse_errno("process");
    if (child == 0) {
        int null = open("/dev/null", O_RDONLY);
        if (null < 0 || dup2(null, 0) < 0 || dup2(out[1], 1) < 0 || dup2(error[1], 2) < 0 ||
            syscall(SYS_close_range, 3, ~0U, 0))
            _exit(STATUS_NOT_STARTED);
        run_process(policy, root);
    }
    close(out[1]);
    close(error[1]);
    pass_on(out[0], error[0]);
    while (waitpid(child, &status, 0) < 0 && errno == EINTR)
        ;
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}
