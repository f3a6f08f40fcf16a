/* SPDX-License-Identifier: Apache-2.0
 *
 * Frames to the host over a virtio-serial port: one byte of type, four of length (little-endian), the payload.
 * uvm/frames.py reads them; docs/uvm.md lists the types.
 */
#ifndef UVM_REPORT_H
#define UVM_REPORT_H

#include <stddef.h>

enum frame {
    FRAME_PHASE = 'P',    /* "NAME NANOSECONDS", since the kernel started */
    FRAME_LAYER = 'L',    /* "NAME DEVICE V|C TABLE": the kernel's own status and table of the verity target */
    FRAME_STDOUT = 'O',
    FRAME_STDERR = 'E',
    FRAME_EXIT = 'X',     /* "STATUS"; 128 and the number for a signal */
    FRAME_REFUSED = 'R',  /* why nothing was run */
    FRAME_KERNEL = 'K',   /* what the kernel logged with level warning and above */
    FRAME_DONE = 'D',     /* the last one: whoever has not seen it has not seen everything */
};

enum { FRAME_BYTES_MAX = 32 << 10 };

void report_open(int port);
void report_frame(enum frame type, const void *payload, size_t size);
void report_text(enum frame type, const char *text, ...) __attribute__((format(printf, 2, 3)));
void report_phase(const char *name);

/* Says why, and ends the machine. */
_Noreturn void refuse(const char *text, ...) __attribute__((format(printf, 1, 2)));
/* The same, with the text of errno at the end. */
_Noreturn void refuse_errno(const char *text, ...) __attribute__((format(printf, 1, 2)));
_Noreturn void power_off(void);

#endif
