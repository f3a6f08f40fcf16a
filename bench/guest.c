/* SPDX-License-Identifier: Apache-2.0
 *
 * The first process of a guest that measures reads (bench/guest_reads.py). It is not the reference UVM: of that it has
 * the start and the verity targets, but mounts disks that no policy names, too.
 *
 * The policy's arguments: "bench", the number of rounds, a script for Python or "", and what is to be compared, each
 *   NAME,FILESYSTEM,DEVICE[,DEVICE]    the second one is that of EROFS's option device=
 *   DEVICE: SERIAL[+verity][+loop]     verity: by the policy's layer of that name
 *
 * Says one line for each measurement: ROUND NAME MEASURE NANOSECONDS COUNT CHECK, with a tab in between. COUNT and CHECK
 * are the same for all that show the same tree.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/dm-ioctl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "machine.h"
#include "report.h"
#include "verity.h"

enum { PIECE_BYTES = 1 << 20, SMALL_BYTES = 4096, SMALL_READS = 1024, DEVICES_MAX = 2 };

#define MOUNTED "/mounted"
#define BIG_FILE MOUNTED "/data/big"

static const char *script;
static char piece[PIECE_BYTES];

struct seen {
    uint64_t count, check;
};

struct device {
    char path[64];
    struct disk disk;
    const struct layer *layer; /* NULL without verity */
    int loop;
};

static void see(struct seen *seen, uint64_t value)
{
    seen->check = (seen->check ^ value) * 1099511628211U;
}

/* A few bytes of each read: all that shows that it is the same data, without the time of a digest. */
static void see_piece(struct seen *seen, size_t size)
{
    uint64_t first = 0;
    memcpy(&first, piece, size < sizeof first ? size : sizeof first);
    seen->count += size;
    see(seen, first);
}

static void sequential(struct seen *seen)
{
    ssize_t size = -1;
    int fd = open(BIG_FILE, O_RDONLY | O_CLOEXEC);
    while (fd >= 0 && (size = read(fd, piece, sizeof piece)) > 0)
        see_piece(seen, (size_t)size);
    if (size)
        refuse_errno(BIG_FILE);
    close(fd);
}

static void at_random(struct seen *seen)
{
    struct stat status;
    uint64_t state = 88172645463325252U;
    int fd = open(BIG_FILE, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &status) || posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM))
        refuse_errno(BIG_FILE);
    for (int i = 0; i < SMALL_READS; i++) {
        state ^= state << 13; /* xorshift64: the same places each time */
        state ^= state >> 7;
        state ^= state << 17;
        off_t at = (off_t)(state % (uint64_t)(status.st_size / SMALL_BYTES)) * SMALL_BYTES;
        if (pread(fd, piece, SMALL_BYTES, at) != SMALL_BYTES)
            refuse_errno(BIG_FILE);
        see_piece(seen, SMALL_BYTES);
    }
    close(fd);
}

/* Each with its stat. The sum is of all, since each file system has an order of its own. */
static void walk(const char *path, struct seen *seen)
{
    DIR *directory = opendir(path);
    struct dirent *entry;
    if (!directory)
        refuse_errno("%s", path);
    while ((entry = readdir(directory))) {
        struct stat status;
        char below[4096];
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0 ||
            strcmp(entry->d_name, "lost+found") == 0) /* ext4's own */
            continue;
        snprintf(below, sizeof below, "%s/%s", path, entry->d_name);
        if (lstat(below, &status))
            refuse_errno("%s", below);
        seen->count += 1;
        seen->check += status.st_mode + (S_ISDIR(status.st_mode) ? 0 : (uint64_t)status.st_size);
        if (S_ISDIR(status.st_mode))
            walk(below, seen);
    }
    closedir(directory);
}

static void find(struct seen *seen)
{
    walk(MOUNTED, seen);
}

static void start_python(struct seen *seen)
{
    int status;
    pid_t child = fork();
    if (child < 0)
        refuse_errno("fork");
    if (!child) {
        if (chroot(MOUNTED) == 0 && chdir("/") == 0)
            execle("/usr/bin/python3", "python3", "-c", script, NULL, (char *[]){"PATH=/usr/bin", NULL});
        _exit(127);
    }
    if (waitpid(child, &status, 0) != child || status)
        refuse("python3 ended with the wait status %d", status);
    seen->count = 1;
}

static const struct {
    const char *name;
    void (*run)(struct seen *seen);
} measures[] = {
    {"sequential", sequential}, {"random", at_random}, {"find", find}, {"python", start_python},
};

static void find_disk(const char *serial, struct disk *disk)
{
    DIR *block = opendir("/sys/block");
    struct dirent *entry;
    while (block && (entry = readdir(block))) {
        char path[400], text[64];
        snprintf(path, sizeof path, "/sys/block/%s/serial", entry->d_name);
        if (read_text(path, text, sizeof text) < 0 || strcmp(text, serial) != 0)
            continue;
        snprintf(path, sizeof path, "/sys/block/%s/dev", entry->d_name);
        if (strlen(entry->d_name) < sizeof disk->name && read_text(path, disk->device, sizeof disk->device) > 0) {
            strcpy(disk->name, entry->d_name);
            closedir(block);
            return;
        }
    }
    refuse("no disk has the serial %s", serial);
}

static void open_device(const struct policy *policy, char *text, struct device *device)
{
    char below[sizeof device->path], *rest = text, *serial = strsep(&rest, "+"), *step;
    *device = (struct device){.loop = -1};
    find_disk(serial, &device->disk);
    snprintf(device->path, sizeof device->path, "/dev/%s", device->disk.name);
    while ((step = strsep(&rest, "+"))) {
        size_t i = 0;
        while (i < policy->layer_count && strcmp(policy->layers[i].name, serial) != 0)
            i += 1;
        if (i == policy->layer_count)
            refuse("layer %s is not in the policy", serial);
        if (strcmp(step, "verity") == 0) {
            device->layer = &policy->layers[i];
            verity_open(device->layer, &device->disk, device->path, sizeof device->path);
        } else if (strcmp(step, "loop") == 0) {
            strcpy(below, device->path);
            device->loop = attach_loop(&policy->layers[i], below, device->path, sizeof device->path);
        } else {
            refuse("%s is no way to open a disk", step);
        }
    }
}

/* A target is made anew each time: what dm-verity has checked, it knows for as long as it is there. */
static void close_device(struct device *device)
{
    struct dm_ioctl request = {.version = {DM_VERSION_MAJOR}, .data_size = sizeof request};
    int control;
    if (device->loop >= 0)
        close(device->loop);
    if (!device->layer)
        return;
    verity_report(device->layer, &device->disk);
    strcpy(request.name, device->layer->name);
    if ((control = open("/dev/mapper/control", O_RDWR | O_CLOEXEC)) < 0)
        refuse_errno("device-mapper");
    /* The loop device lets go of it a little later. */
    for (int waited = 0; ioctl(control, DM_DEV_REMOVE, &request); waited += STEP_MS, pause_ms(STEP_MS))
        if (errno != EBUSY || waited >= WAIT_MS)
            refuse_errno("layer %s: it stays", device->layer->name);
    close(control);
}

static void drop_caches(void)
{
    int fd = open("/proc/sys/vm/drop_caches", O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, "3", 1) != 1)
        refuse_errno("drop_caches");
    close(fd);
}

static void measure(const struct policy *policy, unsigned long round, const char *variant, size_t which)
{
    char text[256], options[80] = "", *rest = text;
    struct device devices[DEVICES_MAX];
    struct timespec started, ended;
    struct seen seen = {0};
    size_t count = 0;
    if (strlen(variant) >= sizeof text)
        refuse("%s is too long", variant);
    strcpy(text, variant);
    const char *name = strsep(&rest, ","), *file_system = strsep(&rest, ",");
    for (char *device; count < DEVICES_MAX && (device = strsep(&rest, ",")); count++)
        open_device(policy, device, &devices[count]);
    if (!count || rest)
        refuse("%s does not say what to mount", variant);
    if (count > 1)
        snprintf(options, sizeof options, "device=%s", devices[1].path);
    if (mount(devices[0].path, MOUNTED, file_system, MS_RDONLY, options))
        refuse_errno("%s: mount", name);
    drop_caches();
    clock_gettime(CLOCK_MONOTONIC, &started);
    measures[which].run(&seen);
    clock_gettime(CLOCK_MONOTONIC, &ended);
    long long elapsed = (ended.tv_sec - started.tv_sec) * 1000000000LL + ended.tv_nsec - started.tv_nsec;
    char line[400];
    int size = snprintf(line, sizeof line, "%lu\t%s\t%s\t%lld\t%llu\t%llu\n", round, name, measures[which].name, elapsed,
                        (unsigned long long)seen.count, (unsigned long long)seen.check);
    report_frame(FRAME_STDOUT, line, (size_t)size);
    if (umount(MOUNTED))
        refuse_errno("%s: umount", name);
    while (count)
        close_device(&devices[--count]);
}

static void wait_for_disks(unsigned long expected)
{
    for (int waited = 0;; waited += STEP_MS, pause_ms(STEP_MS)) {
        unsigned long count = 0;
        DIR *block = opendir("/sys/block");
        struct dirent *entry;
        while (block && (entry = readdir(block)))
            count += strncmp(entry->d_name, "vd", 2) == 0;
        if (block)
            closedir(block);
        if (count >= expected)
            return;
        if (waited >= WAIT_MS)
            refuse("there are %lu disks of %lu", count, expected);
    }
}

int main(void)
{
    int port = start_machine();
    const struct policy *policy = take_policy();
    if (!policy->args[1] || !policy->args[2] || mkdir(MOUNTED, 0755))
        refuse("the arguments are rounds, script, and what to compare");
    char *const *variants = policy->args + 3;
    size_t variant_count = 0;
    while (variants[variant_count])
        variant_count += 1;
    wait_for_disks(disks_attached(port));
    script = policy->args[2];
    unsigned long rounds = strtoul(policy->args[1], NULL, 10);
    for (unsigned long round = 0; round < rounds; round++)
        for (size_t which = 0; which < sizeof measures / sizeof *measures - !*script; which++)
            for (size_t i = 0; i < variant_count; i++) /* by turns: whatever disturbs meets another one each time */
                measure(policy, round, variants[(i + round) % variant_count], which);
    report_text(FRAME_EXIT, "0");
    power_off();
}
