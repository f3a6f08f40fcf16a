/* SPDX-License-Identifier: Apache-2.0
 *
 * The system calls with which a process gives up its privileges and for which Python's standard library
 * has no function. What they are called with, the BPF program too, is decided in sandbox.py. Without this
 * module ctypes makes the same calls; but ctypes keeps a page that is writable and executable, which a
 * worker should not have.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Their numbers are the same on all architectures; older headers lack them. */
#ifndef __NR_landlock_create_ruleset
#define __NR_landlock_create_ruleset 444
#endif
#ifndef __NR_landlock_restrict_self
#define __NR_landlock_restrict_self 446
#endif

static PyObject *answer(long result)
{
    if (result < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    return PyLong_FromLong(result);
}

static PyObject *call_prctl(PyObject *self, PyObject *args)
{
    int option;
    unsigned long a = 0, b = 0, c = 0, d = 0;
    if (!PyArg_ParseTuple(args, "i|kkkk:prctl", &option, &a, &b, &c, &d))
        return NULL;
    return answer(prctl(option, a, b, c, d));
}

static PyObject *call_capset(PyObject *self, PyObject *args)
{
    Py_buffer header, data;
    if (!PyArg_ParseTuple(args, "y*y*:capset", &header, &data))
        return NULL;
    long result = -1;
    /* _LINUX_CAPABILITY_VERSION_3: two words, then two sets of three words (man 2 capset). */
    if (header.len == 8 && data.len == 24)
        result = syscall(__NR_capset, header.buf, data.buf);
    else
        errno = EINVAL;
    int error = errno;
    PyBuffer_Release(&header);
    PyBuffer_Release(&data);
    errno = error;
    return answer(result);
}

static PyObject *call_landlock_create_ruleset(PyObject *self, PyObject *args)
{
    Py_buffer attributes;
    unsigned int flags;
    if (!PyArg_ParseTuple(args, "z*I:landlock_create_ruleset", &attributes, &flags))
        return NULL;
    long result = syscall(__NR_landlock_create_ruleset, attributes.buf,
                          attributes.buf ? (size_t)attributes.len : (size_t)0, flags);
    int error = errno;
    PyBuffer_Release(&attributes);
    errno = error;
    return answer(result);
}

static PyObject *call_landlock_restrict_self(PyObject *self, PyObject *args)
{
    int ruleset;
    unsigned int flags;
    if (!PyArg_ParseTuple(args, "iI:landlock_restrict_self", &ruleset, &flags))
        return NULL;
    return answer(syscall(__NR_landlock_restrict_self, ruleset, flags));
}

static PyObject *call_seccomp_action_available(PyObject *self, PyObject *args)
{
    unsigned int action;
    if (!PyArg_ParseTuple(args, "I:seccomp_action_available", &action))
        return NULL;
    return answer(syscall(__NR_seccomp, SECCOMP_GET_ACTION_AVAIL, 0, &action));
}

static PyObject *call_seccomp_set_filter(PyObject *self, PyObject *args)
{
    Py_buffer program;
    unsigned int flags;
    if (!PyArg_ParseTuple(args, "y*I:seccomp_set_filter", &program, &flags))
        return NULL;
    long result = -1;
    if (program.len % sizeof(struct sock_filter) == 0 && program.len / sizeof(struct sock_filter) <= BPF_MAXINSNS) {
        struct sock_fprog fprog = {
            .len = (unsigned short)(program.len / sizeof(struct sock_filter)),
            .filter = program.buf,
        };
        result = syscall(__NR_seccomp, SECCOMP_SET_MODE_FILTER, flags, &fprog);
    } else {
        errno = EINVAL;
    }
    int error = errno;
    PyBuffer_Release(&program);
    errno = error;
    return answer(result);
}

static PyMethodDef methods[] = {
    {"prctl", call_prctl, METH_VARARGS, "prctl(option, *arguments) -> int"},
    {"capset", call_capset, METH_VARARGS, "capset(header, data) -> int"},
    {"landlock_create_ruleset", call_landlock_create_ruleset, METH_VARARGS,
     "landlock_create_ruleset(attributes or None, flags) -> int"},
    {"landlock_restrict_self", call_landlock_restrict_self, METH_VARARGS,
     "landlock_restrict_self(ruleset_fd, flags) -> int"},
    {"seccomp_action_available", call_seccomp_action_available, METH_VARARGS,
     "seccomp_action_available(action) -> int"},
    {"seccomp_set_filter", call_seccomp_set_filter, METH_VARARGS, "seccomp_set_filter(program, flags) -> int"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_sandbox", "System calls that take a process's privileges away.", -1, methods,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__sandbox(void) { return PyModule_Create(&module); }
