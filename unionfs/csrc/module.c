/*
 * The Python module, and what has no other home: the counters, and how libfuse's own functions are found.
 */
#include "native.h"

#include <dlfcn.h>

void *next_symbol(const char *name)
{
	void *symbol = dlsym(RTLD_NEXT, name);

	if (!symbol)
		Py_FatalError("unionfs._native: libfuse lacks a function that pyfuse3 uses");
	return symbol;
}

static const char *const counter_names[COUNTERS] = {
	"lookup", "read", "write", "lseek", "fallocate", "copy_file_range", "ioctl", "flush", "kill_suidgid", "passthrough",
	"getattr", "setattr", "getxattr", "fsync", "direct", "shared", "reopened", "open", "create",
};

uint64_t counters[COUNTERS];

static PyObject *py_counters(PyObject *self UNUSED, PyObject *args UNUSED)
{
	PyObject *result = PyDict_New();

	for (int i = 0; result && i < COUNTERS; i++) {
		PyObject *value = PyLong_FromUnsignedLongLong(counters[i]);

		if (!value || PyDict_SetItemString(result, counter_names[i], value))
			Py_CLEAR(result);
		Py_XDECREF(value);
	}
	return result;
}

PyMethodDef module_methods[] = {
	{"counters", py_counters, METH_NOARGS, "Requests served natively, by kind."},
	{NULL, NULL, 0, NULL},
};

static PyMethodDef *const tables[] = {
	session_methods, request_methods, ioctl_methods, owned_methods, bound_methods, bound_file_methods, reader_methods,
	direct_methods, packing_methods, receive_methods, reply_methods, lazy_methods, listed_methods, copied_methods,
	forking_methods, lister_methods, lacking_methods, module_methods,
};

static struct PyModuleDef module = {
	PyModuleDef_HEAD_INIT,
	.m_name = "_native",
	.m_doc = "Interposes libfuse functions between pyfuse3 and libfuse.",
	.m_size = -1, /* static state: one per process */
};

PyMODINIT_FUNC PyInit__native(void)
{
	PyObject *result = PyModule_Create(&module);

	for (size_t i = 0; result && i < sizeof(tables) / sizeof(*tables); i++) {
		if (PyModule_AddFunctions(result, tables[i]))
			Py_CLEAR(result);
	}
	return result;
}
