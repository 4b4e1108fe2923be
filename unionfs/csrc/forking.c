/*
 * A fork that shares the table of descriptors (unionfs/service/supervise.py).
 */
#include "native.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

/*
 * The C library has no such fork. What its own does beside the system call is for processes with several threads; the
 * caller has only one.
 */
static PyObject *py_fork_sharing_files(PyObject *self UNUSED, PyObject *args UNUSED)
{
	const unsigned long flags = CLONE_FILES | SIGCHLD;
	long pid;
	int error;

	PyOS_BeforeFork();
#if defined(__s390__) || defined(__CRIS__)
	pid = syscall(SYS_clone, NULL, flags, NULL, NULL, 0);
#else
	pid = syscall(SYS_clone, flags, NULL, NULL, NULL, 0);
#endif
	error = errno;
	if (pid == 0)
		PyOS_AfterFork_Child();
	else
		PyOS_AfterFork_Parent();
	errno = error;
	if (pid < 0)
		return PyErr_SetFromErrno(PyExc_OSError);
	return PyLong_FromLong(pid);
}

PyMethodDef forking_methods[] = {
	{"fork_sharing_files", py_fork_sharing_files, METH_NOARGS, "fork(2), but both share all descriptors."},
	{NULL, NULL, 0, NULL},
};
