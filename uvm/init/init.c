/* SPDX-License-Identifier: Apache-2.0
 *
 * The first process of the reference UVM. It runs one command on the layers that a policy names, and nothing else:
 * whatever the host shows that is not what the policy says ends the machine with the reason (docs/uvm.md).
 */
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include "container.h"
#include "machine.h"
#include "report.h"
#include "verity.h"

/* pivot_root(2) does not leave the initramfs; a tmpfs that lies over it can be left. */
static void leave_initramfs(void)
{
    if (mkdir("/top", 0755) || mount("tmpfs", "/top", "tmpfs", 0, "mode=755") || mkdir("/top/proc", 0755) ||
        mkdir("/top/sys", 0755) || mkdir("/top/dev", 0755) || mount("/proc", "/top/proc", NULL, MS_MOVE, NULL) ||
        mount("/sys", "/top/sys", NULL, MS_MOVE, NULL) || mount("/dev", "/top/dev", NULL, MS_MOVE, NULL) ||
        chdir("/top") || mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/") ||
        mkdir("/layers", 0755) || mkdir("/writable", 0755) || mkdir("/root", 0755))
        refuse_errno("the guest's own root");
}

static size_t list_disks(struct disk *disks)
{
    size_t count = 0;
    DIR *block = opendir("/sys/block");
    struct dirent *entry;
    while (block && (entry = readdir(block)))
        if (strncmp(entry->d_name, "vd", 2) == 0 && strlen(entry->d_name) < sizeof disks->name && count < DISKS_MAX)
            strcpy(disks[count++].name, entry->d_name);
    if (block)
        closedir(block);
    return count;
}

static int read_device(const char *path, struct disk *disk)
{
    return read_text(path, disk->device, sizeof disk->device) > 0;
}

/* In the order in which the host's disks are looked at: the serial of each, and that it can be used at all. */
static void identify(struct disk *disk, char *serial, size_t size)
{
    char path[80];
    snprintf(path, sizeof path, "/sys/block/%s/serial", disk->name);
    if (read_text(path, serial, size) < 0)
        refuse_errno("disk %s has no serial", disk->name);
    snprintf(path, sizeof path, "/sys/block/%s/dev", disk->name);
    if (!read_device(path, disk))
        refuse_errno("disk %s has no number", disk->name);
}

/* Which disk is which layer's: by its serial, which is the host's claim and proves nothing. Each disk is some
 * layer's, and each layer has one. */
static void match_disks(const struct policy *policy, struct disk *disks, size_t count, struct disk *of_layer)
{
    for (size_t i = 0; i < count; i++) {
        char serial[64];
        identify(&disks[i], serial, sizeof serial);
        size_t layer = 0;
        while (layer < policy->layer_count && strcmp(policy->layers[layer].name, serial) != 0)
            layer += 1;
        if (layer == policy->layer_count)
            refuse("disk %s has the serial '%s', which the policy does not name", disks[i].name, serial);
        if (of_layer[layer].name[0])
            refuse("layer %s: two disks have its serial", serial);
        of_layer[layer] = disks[i];
    }
    for (size_t i = 0; i < policy->layer_count; i++)
        if (!of_layer[i].name[0])
            refuse("layer %s: no disk has its serial", policy->layers[i].name);
}

/* Which partition is which layer's: by its number, which is as much the host's claim. There is no other disk, and no
 * other partition on it. */
static void match_partitions(const struct policy *policy, struct disk *disks, size_t count, struct disk *of_layer)
{
    char serial[64], path[80];
    for (size_t i = 0; i < count; i++) {
        identify(&disks[i], serial, sizeof serial);
        if (strcmp(serial, policy->disk) != 0)
            refuse("disk %s has the serial '%s', which the policy does not name", disks[i].name, serial);
    }
    if (count != 1)
        refuse("%s disk has the serial %s", count ? "more than one" : "no", policy->disk);
    /* Whoever opens a disk first waits until the kernel has looked for its partitions (Linux: block/bdev.c). */
    snprintf(path, sizeof path, "/dev/%s", disks->name);
    int fd = -1;
    for (int waited = 0; (fd = open(path, O_RDONLY | O_CLOEXEC)) < 0; waited += STEP_MS, pause_ms(STEP_MS))
        if (waited >= WAIT_MS)
            refuse_errno("disk %s", disks->name);
    close(fd);
    snprintf(path, sizeof path, "/sys/block/%s", disks->name);
    DIR *entries = opendir(path);
    struct dirent *entry;
    while (entries && (entry = readdir(entries))) {
        char text[16], file[400];
        snprintf(file, sizeof file, "/sys/block/%s/%s/partition", disks->name, entry->d_name);
        if (strlen(entry->d_name) >= sizeof of_layer->name || read_text(file, text, sizeof text) < 0)
            continue;
        unsigned long number = strtoul(text, NULL, 10);
        if (number < 1 || number > policy->layer_count)
            refuse("disk %s has a partition %s, which the policy does not name", disks->name, text);
        strcpy(of_layer[number - 1].name, entry->d_name);
        snprintf(file, sizeof file, "/sys/block/%s/%s/dev", disks->name, entry->d_name);
        if (!read_device(file, &of_layer[number - 1]))
            refuse_errno("partition %s has no number", entry->d_name);
    }
    if (entries)
        closedir(entries);
    for (size_t i = 0; i < policy->layer_count; i++)
        if (!of_layer[i].name[0])
            refuse("layer %s: disk %s has no partition %zu", policy->layers[i].name, disks->name, i + 1);
}

static void find_layers(const struct policy *policy, size_t expected, struct disk *of_layer)
{
    static struct disk disks[DISKS_MAX];
    size_t count;
    for (int waited = 0; (count = list_disks(disks)) < expected; waited += STEP_MS, pause_ms(STEP_MS))
        if (waited >= WAIT_MS)
            refuse("the host says that it has attached %zu disks, there are %zu", expected, count);
    if (policy->disk[0])
        match_partitions(policy, disks, count, of_layer);
    else
        match_disks(policy, disks, count, of_layer);
}

static int is(const struct layer *layer, const char *format)
{
    return strcmp(layer->format->name, format) == 0;
}

static void mount_layers(const struct policy *policy, const struct disk *disks, size_t *mounted)
{
    char tar[64] = "", options[80] = "", path[64], target[64];
    for (size_t i = 0; i < policy->layer_count; i++) {
        const struct layer *layer = &policy->layers[i];
        if (is(layer, "tarfs") != (i + 1 < policy->layer_count && is(layer + 1, "tarfs-index")))
            refuse("layer %s: a tarfs layer and its index come together", layer->name);
    }
    for (size_t i = 0; i < policy->layer_count; i++) {
        const struct layer *layer = &policy->layers[i];
        verity_open(layer, &disks[i], path, sizeof path);
        if (is(layer, "tarfs")) {
            attach_loop(layer, path, tar, sizeof tar); /* there as long as the machine */
            continue; /* the index, which is next, mounts both */
        }
        snprintf(options, sizeof options, is(layer, "tarfs-index") ? "device=%s" : "", tar);
        snprintf(target, sizeof target, "/layers/%zu", *mounted);
        if (mkdir(target, 0755) || mount(path, target, "erofs", MS_RDONLY, options))
            refuse_errno("layer %s: mount as EROFS", layer->name);
        *mounted += 1;
    }
}

static void set_option(int fs, unsigned int command, const char *key, const char *value)
{
    if (fsconfig(fs, command, key, value, 0))
        refuse_errno("overlay, %s %s", key ? key : "create", value ? value : "");
}

/* Through fsconfig(2): an option string of mount(2) has no room for many layers. The layers are not trusted to
 * redirect a name or its content to another layer. */
static void stack_layers(size_t count)
{
    if (mount("tmpfs", "/writable", "tmpfs", 0, "mode=755") || mkdir("/writable/upper", 0755) ||
        mkdir("/writable/work", 0755))
        refuse_errno("overlay, upper directory");
    int fs = fsopen("overlay", FSOPEN_CLOEXEC);
    if (fs < 0)
        refuse_errno("overlay");
    for (size_t i = 0; i < count; i++) {
        char path[32];
        snprintf(path, sizeof path, "/layers/%zu", i);
        set_option(fs, FSCONFIG_SET_STRING, "lowerdir+", path);
    }
    set_option(fs, FSCONFIG_SET_STRING, "upperdir", "/writable/upper");
    set_option(fs, FSCONFIG_SET_STRING, "workdir", "/writable/work");
    set_option(fs, FSCONFIG_SET_STRING, "redirect_dir", "nofollow");
    set_option(fs, FSCONFIG_SET_STRING, "metacopy", "off");
    set_option(fs, FSCONFIG_CMD_CREATE, NULL, NULL);
    int mount = fsmount(fs, FSMOUNT_CLOEXEC, 0);
    if (mount < 0 || move_mount(mount, "", AT_FDCWD, "/root", MOVE_MOUNT_F_EMPTY_PATH))
        refuse_errno("overlay");
    close(mount);
    close(fs);
}

int main(void)
{
    static struct disk disks[LAYERS_MAX];
    int port = start_machine();
    leave_initramfs();
    const struct policy *policy = take_policy();
    report_phase("policy");
    find_layers(policy, disks_attached(port), disks);
    report_phase("disks");
    size_t mounted = 0;
    mount_layers(policy, disks, &mounted);
    stack_layers(mounted);
    report_phase("mounted");
    int status = container_run(policy, "/root");
    report_phase("exited");
    for (size_t i = 0; i < policy->layer_count; i++)
        verity_report(&policy->layers[i], &disks[i]);
    report_text(FRAME_EXIT, "%d", status);
    power_off();
}
