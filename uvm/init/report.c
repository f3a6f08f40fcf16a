/* SPDX-License-Identifier: Apache-2.0 */
#include "report.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/reboot.h>
#include <time.h>
#include <unistd.h>

static int port = -1;

void report_open(int fd)
{
    port = fd;
}

static void write_all(const void *bytes, size_t size)
{
    const char *at = bytes;
    while (size && port >= 0) {
        ssize_t n = write(port, at, size);
        if (n < 0 && errno != EINTR)
            port = -1; /* the host is gone, and with it whoever would have read */
        if (n > 0) {
            at += n;
            size -= (size_t)n;
        }
    }
}

void report_frame(enum frame type, const void *payload, size_t size)
{
    uint8_t frame[5 + FRAME_BYTES_MAX];
    if (size > FRAME_BYTES_MAX)
        size = FRAME_BYTES_MAX;
    frame[0] = (uint8_t)type;
    for (unsigned int i = 0; i < 4; i++)
        frame[1 + i] = (uint8_t)(size >> 8 * i);
    memcpy(frame + 5, payload, size);
    write_all(frame, 5 + size);
}

static void report_list(enum frame type, const char *text, va_list arguments, const char *after)
{
    char line[1024];
    int size = vsnprintf(line, sizeof line, text, arguments);
    size_t used = size < 0 ? 0 : (size_t)size < sizeof line ? (size_t)size : sizeof line - 1;
    size = snprintf(line + used, sizeof line - used, "%s", after);
    used += size < 0 ? 0 : (size_t)size < sizeof line - used ? (size_t)size : sizeof line - used - 1;
    report_frame(type, line, used);
}

void report_text(enum frame type, const char *text, ...)
{
    va_list arguments;
    va_start(arguments, text);
    report_list(type, text, arguments, "");
    va_end(arguments);
}

void report_phase(const char *name)
{
    struct timespec now;
    clock_gettime(CLOCK_BOOTTIME, &now);
    report_text(FRAME_PHASE, "%s %lld", name, (long long)now.tv_sec * 1000000000 + now.tv_nsec);
}

/* Lines of /dev/kmsg are "PRIORITY,SEQUENCE,TIME,FLAGS;TEXT\n", with continuation lines behind (Linux:
 * Documentation/ABI/testing/dev-kmsg). */
static void report_kernel_log(void)
{
    int log = open("/dev/kmsg", O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    char record[8192];
    while (log >= 0) {
        ssize_t size = read(log, record, sizeof record - 1);
        if (size < 0 && errno == EPIPE)
            continue; /* records were overwritten meanwhile: on with the oldest that is left */
        if (size <= 0)
            break;
        record[size] = 0;
        char *text = strchr(record, ';');
        if (text && (strtoul(record, NULL, 10) & 7) <= 4)
            report_text(FRAME_KERNEL, "%.*s", (int)strcspn(text + 1, "\n"), text + 1);
    }
    if (log >= 0)
        close(log);
}

_Noreturn void power_off(void)
{
    report_kernel_log();
    report_frame(FRAME_DONE, "", 0);
    sync();
    reboot(RB_POWER_OFF);
    for (;;)
        pause();
}

_Noreturn void refuse(const char *text, ...)
{
    va_list arguments;
    va_start(arguments, text);
    report_list(FRAME_REFUSED, text, arguments, "");
    va_end(arguments);
    power_off();
}

_Noreturn void refuse_errno(const char *text, ...)
{
    char after[128];
    snprintf(after, sizeof after, ": %s", strerror(errno));
    va_list arguments;
    va_start(arguments, text);
    report_list(FRAME_REFUSED, text, arguments, after);
    va_end(arguments);
    power_off();
}
