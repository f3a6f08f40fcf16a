/* SPDX-License-Identifier: Apache-2.0 */
#include "verity.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/dm-ioctl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "report.h"

enum { SECTOR_BYTES = 512, HEAD_BYTES = 4096, DIFF_ID_OFFSET = 40, TRAILER_BYTES = 4096, RECORD_OFFSET = 3584 };

struct request {
    struct dm_ioctl head;
    struct dm_target_spec target;
    char parameters[1024];
};

static const char salt_hex[] = "0000000000000000000000000000000000000000000000000000000000000000";

static int control(unsigned long command, struct request *request, const char *name, uint32_t flags)
{
    static int fd = -1;
    if (fd < 0 && (fd = open("/dev/mapper/control", O_RDWR | O_CLOEXEC)) < 0)
        return -1;
    request->head.version[0] = DM_VERSION_MAJOR;
    request->head.data_size = sizeof *request;
    request->head.data_start = offsetof(struct request, target);
    request->head.flags = flags;
    strncpy(request->head.name, name, sizeof request->head.name - 1);
    return ioctl(fd, command, request);
}

/* The shape of the tree follows from the number of data blocks (docs/formats.md, "Verity"). */
static void tree_shape(const struct layer *layer, uint64_t *tree_size, uint64_t *levels)
{
    uint64_t digests = layer->format->hash_block / DIGEST_BYTES, blocks = layer->data_size / layer->format->data_block;
    for (*tree_size = *levels = 0; blocks > 1; *levels += 1) {
        blocks = (blocks + digests - 1) / digests;
        *tree_size += blocks * layer->format->hash_block;
    }
}

static void put(uint8_t *at, uint64_t value, size_t size)
{
    for (size_t i = 0; i < size; i++)
        at[i] = (uint8_t)(value >> 8 * i);
}

/* All 4096 bytes (docs/formats.md, "Trailer"). `diff_id` comes out of the verified data. */
static void expected_trailer(const struct layer *layer, const uint8_t *diff_id, uint8_t *trailer)
{
    const struct format *format = layer->format;
    uint64_t tree_size, levels, blocks = layer->data_size / format->data_block;
    tree_shape(layer, &tree_size, &levels);
    memset(trailer, 0, TRAILER_BYTES);
    if (format->magic) {
        memcpy(trailer, "TARIDXTR", 8);
        put(trailer + 8, 1, 4);
        put(trailer + 12, 1, 4);
        put(trailer + 16, format->data_block, 4);
        put(trailer + 20, format->hash_block, 4);
        put(trailer + 24, blocks, 8);
        put(trailer + 32, layer->data_size, 8);
        put(trailer + 40, tree_size, 8);
        put(trailer + 48, levels, 8);
        memcpy(trailer + 56, layer->root_hash, DIGEST_BYTES);
        memcpy(trailer + 88, diff_id, DIGEST_BYTES);
        sha256(trailer, 120, trailer + 120);
    }
    put(trailer + RECORD_OFFSET, format->data_block, 4);
    put(trailer + RECORD_OFFSET + 4, format->hash_block, 4);
    put(trailer + RECORD_OFFSET + 8, blocks, 8);
}

static void create(const struct layer *layer, const struct disk *disk, char *path, size_t path_size)
{
    const struct format *format = layer->format;
    struct request request = {0};
    if (control(DM_DEV_CREATE, &request, layer->name, 0))
        refuse_errno("layer %s: no device-mapper device", layer->name);
    uint64_t device = request.head.dev; /* huge_encode_dev */
    snprintf(path, path_size, "/dev/dm-%llu", (unsigned long long)((device & 0xff) | (device >> 12 & 0xfff00)));

    request = (struct request){0};
    request.head.target_count = 1;
    request.target.length = layer->data_size / SECTOR_BYTES;
    strcpy(request.target.target_type, "verity");
    snprintf(request.parameters, sizeof request.parameters, "1 %s %s %u %u %llu %llu sha256 %s %s", disk->device,
             disk->device, format->data_block, format->hash_block,
             (unsigned long long)(layer->data_size / format->data_block),
             (unsigned long long)(layer->data_size / format->hash_block), layer->root_hash_hex, salt_hex);
    if (control(DM_TABLE_LOAD, &request, layer->name, DM_READONLY_FLAG))
        refuse_errno("layer %s: dm-verity does not take its table", layer->name);
    request = (struct request){0};
    if (control(DM_DEV_SUSPEND, &request, layer->name, DM_READONLY_FLAG)) /* without DM_SUSPEND_FLAG: resume */
        refuse_errno("layer %s: dm-verity does not start", layer->name);
}

static int open_and_read(const char *path, uint8_t *bytes, size_t size, uint64_t offset)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    ssize_t got = pread(fd, bytes, size, (off_t)offset);
    int error = got < 0 ? errno : EIO;
    close(fd);
    errno = error;
    return got == (ssize_t)size ? 0 : -1;
}

void verity_open(const struct layer *layer, const struct disk *disk, char *path, size_t path_size)
{
    char disk_path[40];
    snprintf(disk_path, sizeof disk_path, "/dev/%s", disk->name);
    uint64_t size = 0, tree_size, levels;
    tree_shape(layer, &tree_size, &levels);
    uint64_t expected = layer->data_size + tree_size + TRAILER_BYTES;
    int fd = open(disk_path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || ioctl(fd, BLKGETSIZE64, &size))
        refuse_errno("layer %s: disk %s", layer->name, disk->name);
    close(fd);
    if (size != expected)
        refuse("layer %s: its disk has %llu bytes, the policy gives %llu", layer->name, (unsigned long long)size,
               (unsigned long long)expected);

    create(layer, disk, path, path_size);
    uint8_t head[HEAD_BYTES] = {0}, found[TRAILER_BYTES], wanted[TRAILER_BYTES];
    const char *magic = layer->format->magic;
    if (magic && open_and_read(path, head, sizeof head, 0))
        refuse_errno("layer %s: its head cannot be read", layer->name);
    if (magic && memcmp(head, magic, strlen(magic)) != 0)
        refuse("layer %s: it is not of format %s", layer->name, layer->format->name);
    if (open_and_read(disk_path, found, sizeof found, layer->data_size + tree_size))
        refuse_errno("layer %s: its trailer cannot be read", layer->name);
    expected_trailer(layer, head + DIFF_ID_OFFSET, wanted);
    for (size_t i = 0; i < TRAILER_BYTES; i++)
        if (found[i] != wanted[i])
            refuse("layer %s: its trailer is not what the policy gives, from byte %zu on", layer->name, i);
}

void verity_report(const struct layer *layer, const struct disk *disk)
{
    struct request status = {0}, table = {0};
    if (control(DM_TABLE_STATUS, &status, layer->name, 0) ||
        control(DM_TABLE_STATUS, &table, layer->name, DM_STATUS_TABLE_FLAG))
        refuse_errno("layer %s: no status", layer->name);
    report_text(FRAME_LAYER, "%s %s %s 0 %llu %s %s", layer->name, disk->name, status.parameters,
                (unsigned long long)table.target.length, table.target.target_type, table.parameters);
}
