/* SPDX-License-Identifier: Apache-2.0 */
#include "machine.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/loop.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "report.h"

void pause_ms(long ms)
{
    nanosleep(&(struct timespec){ms / 1000, ms % 1000 * 1000000}, NULL);
}

ssize_t read_text(const char *path, char *text, size_t size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    size_t used = 0;
    ssize_t n;
    while (used < size - 1 && (n = read(fd, text + used, size - 1 - used)) > 0)
        used += (size_t)n;
    close(fd);
    if (used && text[used - 1] == '\n')
        used -= 1;
    text[used] = 0;
    return (ssize_t)used;
}

static void mount_system(void)
{
    if (mount("proc", "/proc", "proc", 0, NULL) || mount("sysfs", "/sys", "sysfs", 0, NULL) ||
        mount("devtmpfs", "/dev", "devtmpfs", 0, NULL))
        refuse_errno("the guest's own mounts");
}

/* There may be no console, and then no standard stream; what is opened must not take their numbers. */
static void fill_standard_streams(void)
{
    int fd;
    while ((fd = open("/dev/null", O_RDWR | O_CLOEXEC)) >= 0 && fd <= 2)
        ;
    if (fd > 2)
        close(fd);
}

/* In the order of /modules/order, which the image's builder made. A name with a "?" is of a module that this
 * processor may not have a use for. */
static void load_modules(void)
{
    static char order[4096];
    char path[128];
    if (read_text("/modules/order", order, sizeof order) < 0)
        refuse_errno("list of kernel modules");
    for (char *name = strtok(order, "\n"); name; name = strtok(NULL, "\n")) {
        int optional = *name == '?';
        snprintf(path, sizeof path, "/modules/%s", name + optional);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST && !(optional && errno == ENODEV)))
            refuse_errno("kernel module %s", name);
        close(fd);
    }
}

/* The virtio-serial port called "tardev"; without it there is nobody to tell anything. */
static int open_port(void)
{
    for (int waited = 0; waited < WAIT_MS; waited += STEP_MS, pause_ms(STEP_MS)) {
        DIR *ports = opendir("/sys/class/virtio-ports");
        struct dirent *entry;
        while (ports && (entry = readdir(ports))) {
            char path[300], name[64];
            snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
            if (read_text(path, name, sizeof name) < 0 || strcmp(name, "tardev") != 0)
                continue;
            snprintf(path, sizeof path, "/dev/%s", entry->d_name);
            int fd = open(path, O_RDWR | O_CLOEXEC);
            if (fd >= 0) {
                closedir(ports);
                return fd;
            }
        }
        if (ports)
            closedir(ports);
    }
    power_off();
}

int start_machine(void)
{
    int restart, port;
    mount_system();
    fill_standard_streams();
    /* Should this process ever end, the machine ends too, and does not hang. */
    if ((restart = open("/proc/sys/kernel/panic", O_WRONLY | O_CLOEXEC)) >= 0) {
        if (write(restart, "-1", 2) != 2)
            refuse_errno("panic");
        close(restart);
    }
    port = open_port();
    report_open(port);
    report_phase("init");
    load_modules();
    return port;
}

struct policy *take_policy(void)
{
    static char cmdline[4096], text[POLICY_BYTES_MAX + 2];
    static struct policy policy;
    uint8_t named[DIGEST_BYTES], digest[DIGEST_BYTES];
    if (read_text("/proc/cmdline", cmdline, sizeof cmdline) < 0 || !policy_digest_named(cmdline, named))
        refuse("the kernel's command line is not tardev.policy=sha256: and 64 hexadecimal digits");
    int fd = open("/sys/firmware/qemu_fw_cfg/by_name/opt/tardev/policy/raw", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        refuse_errno("no policy");
    size_t size = 0;
    ssize_t n;
    while (size <= POLICY_BYTES_MAX && (n = read(fd, text + size, POLICY_BYTES_MAX + 1 - size)) > 0)
        size += (size_t)n;
    close(fd);
    if (size > POLICY_BYTES_MAX)
        refuse("the policy has over %d bytes", POLICY_BYTES_MAX);
    sha256(text, size, digest);
    if (memcmp(digest, named, DIGEST_BYTES) != 0)
        refuse("the policy has another digest than the kernel's command line names");
    const char *wrong = policy_parse(text, size, &policy);
    if (wrong)
        refuse("%s", wrong);
    return &policy;
}

unsigned long disks_attached(int port)
{
    char line[32];
    size_t used = 0;
    for (;;) {
        ssize_t n = read(port, line + used, sizeof line - 1 - used);
        if (n == 0 || (n < 0 && errno != EINTR))
            refuse("the host is gone");
        used += n > 0 ? (size_t)n : 0;
        line[used] = 0;
        if (strchr(line, '\n'))
            break;
        if (used == sizeof line - 1)
            refuse("the host says something else than the number of disks");
    }
    char *end = line;
    unsigned long count = 0;
    if (strncmp(line, "disks ", 6) == 0 && isdigit((unsigned char)line[6]))
        count = strtoul(line + 6, &end, 10);
    if (*end != '\n' || count > DISKS_MAX)
        refuse("the host says something else than the number of disks");
    return count;
}

int attach_loop(const struct layer *layer, const char *device, char *path, size_t path_size)
{
    int control = open("/dev/loop-control", O_RDWR | O_CLOEXEC), backing = open(device, O_RDONLY | O_CLOEXEC);
    int number = control < 0 ? -1 : ioctl(control, LOOP_CTL_GET_FREE);
    snprintf(path, path_size, "/dev/loop%d", number);
    int loop = number < 0 ? -1 : open(path, O_RDONLY | O_CLOEXEC);
    struct loop_config config = {
        .fd = (uint32_t)backing, .block_size = 512, .info.lo_flags = LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR};
    if (backing < 0 || loop < 0 || ioctl(loop, LOOP_CONFIGURE, &config))
        refuse_errno("layer %s: loop device", layer->name);
    close(control);
    close(backing);
    return loop;
}
