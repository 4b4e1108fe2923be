/* Copies of files whose data follows after they were opened: lazy.c. */
#ifndef UNIONFS_LAZY_H
#define UNIONFS_LAZY_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#pragma GCC visibility push(hidden) /* the module is loaded with RTLD_GLOBAL */

struct lazy;

/*
 * The copy that is under way for a node, if a byte of the range is not there yet; else NULL. The caller gives it back
 * with lazy_put(). On the loop's thread, with the GIL.
 */
struct lazy *lazy_missing(uint64_t node, off_t off, size_t size);

/* Copy what is missing of the range, or wait until others have. Returns an errno. In any thread; may take long. */
int lazy_need(struct lazy *lazy, off_t off, size_t size);

void lazy_put(struct lazy *lazy);

/* A request is about to change the node's data. On the loop's thread, with the GIL. */
void lazy_wrote(uint64_t node);

/* The descriptor of the file that a node is copied from, or `fd` if it isn't. On the loop's thread, with the GIL. */
int lazy_source(uint64_t node, int fd);

/* What Python calls; a PyMethodDef array. */
extern struct PyMethodDef lazy_methods[];

#pragma GCC visibility pop

#endif
