/*
 * Attributes that a lower file lacks.
 *
 * Programs like ls ask each file for its ACL and its label. A file that was found without any attribute, in a lower layer
 * that has none of that name to offer, need not be asked (Union.getxattr_of_unchanging). That is told here from the same
 * facts, Python's nodes and its set of absent attributes, but without entering Python.
 */
#include "native.h"

#include <errno.h>

static PyObject *nodes; /* dict: node id -> Node; NULL: nothing is told here */
static PyObject *absent; /* set of (layer, name) */
static long mask, plain; /* of Node.flags, and what must be there */
static PyObject *flags_name, *layer_name;

/* Whether a node is plain, and its layer known to lack the attribute. With an exception set where that failed. */
static bool lacks(uint64_t id, const char *name)
{
	PyObject *key = PyLong_FromUnsignedLongLong(id), *flags = NULL, *layer = NULL, *pair = NULL;
	PyObject *node = key ? PyDict_GetItemWithError(nodes, key) : NULL;
	bool result = false;

	if (node && (flags = PyObject_GetAttr(node, flags_name)) && (PyLong_AsLong(flags) & mask) == plain &&
	    (layer = PyObject_GetAttr(node, layer_name)) && (pair = Py_BuildValue("(Os)", layer, name)))
		result = PySet_Contains(absent, pair) == 1;
	Py_XDECREF(key);
	Py_XDECREF(flags);
	Py_XDECREF(layer);
	Py_XDECREF(pair);
	return result;
}

/* Answer a GETXATTR of what isn't there; returns whether. */
bool lack_here(struct fuse_session *se, const struct fuse_buf *buf)
{
	const struct fuse_in_header *in = buf->mem;
	const struct fuse_getxattr_in *get = (const void *)(in + 1);
	const char *name = (const char *)(get + 1);

	if (!nodes || !is_whole(buf, sizeof(*get) + 1) || in->opcode != FUSE_GETXATTR)
		return false;
	if (((const char *)in)[in->len - 1] || !lacks(in->nodeid, name)) {
		PyErr_Clear(); /* Python will tell */
		return false;
	}
	reply_raw(se, in->unique, ENODATA, NULL, 0);
	counters[GETXATTR]++;
	return true;
}

static PyObject *py_tell_lacking(PyObject *self UNUSED, PyObject *args)
{
	PyObject *all, *set;

	if (!PyArg_ParseTuple(args, "O!O!ll", &PyDict_Type, &all, &PySet_Type, &set, &mask, &plain))
		return NULL;
	if (!flags_name && !(flags_name = PyUnicode_InternFromString("flags")))
		return NULL;
	if (!layer_name && !(layer_name = PyUnicode_InternFromString("layer")))
		return NULL;
	Py_XSETREF(nodes, Py_NewRef(all));
	Py_XSETREF(absent, Py_NewRef(set));
	Py_RETURN_NONE;
}

PyMethodDef lacking_methods[] = {
	{"tell_lacking", py_tell_lacking, METH_VARARGS,
	 "(nodes, absent, mask, plain): answer GETXATTR of the attributes in `absent`, (layer, name), of nodes of that layer with "
	 "`flags & mask == plain`."},
	{NULL, NULL, 0, NULL},
};
