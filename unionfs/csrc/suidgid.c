/*
 * The clearing of suid and sgid, which the kernel leaves to us (unionfs/fuse/native.py says who does it when).
 */
#include "native.h"

#include <stdlib.h>
#include <sys/stat.h>

/* Whether the caller's groups include one; his supplementary groups are in /proc only. */
static bool caller_in_group(fuse_req_t req, gid_t group)
{
	gid_t few[64], *groups = few;
	int count;
	bool found = fuse_req_ctx(req)->gid == group;

	if (found)
		return true;
	count = fuse_req_getgroups(req, 64, few);
	if (count > 64) {
		groups = malloc((size_t)count * sizeof(*groups));
		count = groups ? fuse_req_getgroups(req, count, groups) : 0;
	}
	for (int i = 0; i < count && !found; i++)
		found = groups[i] == group;
	if (groups != few)
		free(groups);
	return found;
}

/*
 * Clear suid, and sgid unless it means nothing (no group execution) and the caller is of the group: what
 * setattr_should_drop_suidgid() says of a caller without CAP_FSETID. The host kernel spares us because the daemon has
 * that capability; security.capability it removes itself. The kernel's copy of the mode is stale then, and exec trusts
 * it: drop it. (Only attributes: takes no lock that a request holds.)
 */
void remove_suidgid(fuse_req_t req, fuse_ino_t ino, int fd)
{
	struct stat st;
	mode_t drop;

	if (fstat(fd, &st) || !S_ISREG(st.st_mode) || !(st.st_mode & (S_ISUID | S_ISGID)))
		return;
	drop = st.st_mode & S_ISUID;
	if (st.st_mode & S_ISGID && (st.st_mode & S_IXGRP || !caller_in_group(req, st.st_gid)))
		drop |= S_ISGID;
	if (!drop || fchmod(fd, st.st_mode & 07777 & ~drop))
		return;
	counters[KILL_SUIDGID]++;
	fuse_lowlevel_notify_inval_inode(session, ino, -1, 0);
}

/* Requests that carry no flag of their own: spare only the user who has CAP_FSETID for certain. */
void remove_suidgid_unless_root(fuse_req_t req, fuse_ino_t ino, int fd)
{
	if (fuse_req_ctx(req)->uid != 0)
		remove_suidgid(req, ino, fd);
}
