"""What a mount is asked to be: `MountConfig`, and how it is read from a command line.

Names, defaults and the rules for conflicting options are overlayfs's own (fs/overlayfs/params.c and
Documentation/filesystems/overlayfs.rst). In short:

* `LOWER[:LOWER...]`: the leftmost is on top. `\\:` is a colon that belongs to a name, `\\\\` a backslash. A
  layer after `::` is a data-only layer: it holds file content that metacopy files of the layers above point
  to, and no names of its own. Each data-only layer needs its own `::`, and no ordinary layer may follow
  one.
* `-o a,b=c`: comma-separated; `\\,` is a comma that belongs to a value. Later options win over earlier ones.
* A default that doesn't fit the other options adapts silently; two options that the user gave and that
  exclude each other are a `UsageError`. `MountConfig.explicit` keeps the names of the options that were
  given.

This module looks at nothing but its arguments and the names of paths; whether layers exist and fit together
is `preflight`'s business.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from unionfs.errors import UsageError
from unionfs.idmap import AS_STORED, IdMap, parse_id, parse_ranges

RedirectDir = Literal["on", "follow", "nofollow", "off"]
Xino = Literal["on", "auto", "off"]
Uuid = Literal["auto", "on", "null", "off"]
Whiteout = Literal["auto", "char", "xattr", "wh"]
Passthrough = Literal["auto", "on", "off"]
SlowLower = Literal["auto", "on", "off"]
Lower = Literal["unchanging", "watch"]
LogLevel = Literal["debug", "info", "warning", "error"]

# OVL_MAX_STACK in fs/overlayfs/params.h.
MAX_LOWERS = 500

DEFAULT_FSNAME = "unionfs"


@dataclass(frozen=True, slots=True)
class MountConfig:
    """One mount, complete. Paths are absolute `str` in the file-system encoding (surrogateescape).

    `lowers[0]` is the topmost lower. `upper` and `work` are None for a read-only union. `userxattr` is None
    until the layers have been looked at (see `with_userxattr`). `timeout` is in seconds: None means as long
    as correctness allows, 0 means that the kernel caches nothing. `mount_options` are the flags handed on
    to libfuse. `ids` says which owners are shown, `static_nlink` that directories show a link count of 1, `acl` whether
    there are POSIX ACLs. `auto_restart` has another daemon take over when one dies.
    """

    lowers: tuple[str, ...]
    mountpoint: str
    data_lowers: tuple[str, ...] = ()
    upper: str | None = None
    work: str | None = None
    redirect_dir: RedirectDir = "on"
    metacopy: bool = True
    index: bool = True
    xino: Xino = "on"
    volatile: bool = False
    userxattr: bool | None = None
    uuid: Uuid = "auto"
    whiteout: Whiteout = "auto"
    timeout: float | None = None
    read_only: bool = False
    allow_other: bool = False
    fsname: str = DEFAULT_FSNAME
    mount_options: tuple[str, ...] = ()
    native: bool = True
    passthrough: Passthrough = "auto"
    slow_lower: SlowLower = "auto"
    lower: Lower = "unchanging"
    ids: IdMap = AS_STORED
    static_nlink: bool = False
    acl: bool = True
    auto_restart: bool = False
    foreground: bool = False
    log_level: LogLevel = "warning"
    log_file: str | None = None
    explicit: frozenset[str] = frozenset()

    @property
    def shows_as_stored(self) -> bool:
        """Whether owners, link counts and ACLs are shown as the layers have them, so that descriptors tell them."""
        return self.acl and not self.static_nlink and not self.ids.needed

    def layer_names(self) -> list[tuple[str, str]]:
        """Return (option name, path) of every layer, top to bottom, work last; for checks and messages."""
        named = [("upper", self.upper)]
        named += [("lower", path) for path in self.lowers]
        named += [("data-only lower", path) for path in self.data_lowers]
        named += [("work", self.work)]
        return [(name, path) for name, path in named if path is not None]

    def with_userxattr(self, userxattr: bool) -> MountConfig:
        """Return this configuration with the xattr namespace decided.

        With `user.overlay.*` anyone who may write to a layer could forge redirects, so redirect_dir becomes
        nofollow and metacopy off, as in overlayfs (ovl_fs_params_verify).

        Raises UsageError where redirect_dir or metacopy were asked for by name.
        """
        if not userxattr:
            return dataclasses.replace(self, userxattr=False)
        why = "userxattr" if self.userxattr else "user.overlay.* attributes (trusted.* needs privilege here)"
        if "redirect_dir" in self.explicit and self.redirect_dir != "nofollow":
            raise UsageError(
                f"redirect_dir={self.redirect_dir} does not work with {why}: leave it out, or use nofollow"
            )
        if "metacopy" in self.explicit and self.metacopy:
            raise UsageError(f"metacopy=on does not work with {why}: leave it out")
        return dataclasses.replace(self, userxattr=True, redirect_dir="nofollow", metacopy=False)


def as_json(value: object) -> object:
    """Return an option's value in the form in which JSON gives it back."""
    if isinstance(value, IdMap):
        return {name: as_json(part) for name, part in dataclasses.asdict(value).items()}
    return [as_json(part) for part in value] if isinstance(value, tuple) else value


def fsname_option(source: str) -> str:
    """Return the option that has the kernel show any word as the source of the mount."""
    escaped = source.replace("\\", "\\\\").replace(",", "\\,")
    return f"fsname={escaped or 'none'}"


# --- layer lists ----------------------------------------------------------------------------------


def parse_lowers(text: str) -> tuple[list[str], list[str]]:
    """Split `A:B::DATA` into ordinary and data-only lowers, escapes undone (ovl_parse_param_lowerdir).

    Raises UsageError for an empty list, an empty name, or an ordinary layer after a data-only one.
    """
    parts = split_escaped(text, ":")
    lowers: list[str] = []
    data: list[str] = []
    is_data = False
    for position, part in enumerate(parts):
        if part:
            if is_data:
                data.append(part)
            elif data:
                raise UsageError(
                    f"ordinary lower {part!r} after a data-only one in {text!r}: "
                    "each data-only layer needs its own '::'"
                )
            else:
                lowers.append(part)
            is_data = False
        elif is_data or not lowers or position == len(parts) - 1:
            raise UsageError(f"empty lower name in {text!r} (write a colon inside a name as '\\:')")
        else:
            is_data = True
    return lowers, data


def escape_lower(path: str) -> str:
    """Return `path` as it must be written in a lower list."""
    return path.replace("\\", "\\\\").replace(":", "\\:")


def unescape(text: str) -> str:
    """Remove one level of backslash escapes (ovl_unescape)."""
    return "".join(split_escaped(text, None))


def split_escaped(text: str, separator: str | None) -> list[str]:
    """Split at unescaped separators and undo the escapes; a backslash at the very end stands for itself."""
    parts: list[list[str]] = [[]]
    chars = iter(text)
    for char in chars:
        if char == separator:
            parts.append([])
        elif char == "\\":
            parts[-1].append(next(chars, "\\"))
        else:
            parts[-1].append(char)
    return ["".join(part) for part in parts]


def split_options(text: str) -> list[str]:
    """Split an `-o` argument at commas not escaped by a backslash; the escapes stay (ovl_next_opt)."""
    options: list[str] = []
    current: list[str] = []
    chars = iter(text)
    for char in chars:
        if char == ",":
            options.append("".join(current))
            current = []
        elif char == "\\":
            current += [char, next(chars, "")]
        else:
            current.append(char)
    options.append("".join(current))
    return [option for option in options if option]


# --- -o options -----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Options:
    """What the -o options add up to, before the layers are known."""

    lowers: list[str] = dataclasses.field(default_factory=list)
    data_lowers: list[str] = dataclasses.field(default_factory=list)
    upper: str | None = None
    work: str | None = None
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    flags: dict[str, str] = dataclasses.field(default_factory=dict)  # group → flag, the last one wins
    allow_other: bool | None = None

    def put(self, field: str, value: Any) -> None:
        self.fields[field] = value

    @property
    def ids(self) -> IdMap:
        """What the options say of owners so far."""
        known = self.fields.get("ids", AS_STORED)
        assert isinstance(known, IdMap)
        return known

    def map_ids(self, **changes: Any) -> None:
        self.put("ids", dataclasses.replace(self.ids, **changes))


# Flags of mount(8) that libfuse hands on to the kernel; flags of a group replace one another.
_MOUNT_FLAGS: dict[str, str] = {
    "suid": "suid",
    "nosuid": "suid",
    "dev": "dev",
    "nodev": "dev",
    "exec": "exec",
    "noexec": "exec",
    "sync": "sync",
    "async": "sync",
    "dirsync": "dirsync",
    "atime": "atime",
    "noatime": "atime",
}

# Accepted and ignored: defaults, what only mount(8) and its fstab care for, what is always in force here,
# and what has no meaning for a FUSE file system, which keeps no access times of its own.
_IGNORED_FLAGS = frozenset(
    (
        *("defaults", "rw", "default_permissions", "nonempty", "auto", "noauto", "user", "nouser", "users"),
        *("nousers", "owner", "group", "_netdev", "nofail", "relatime", "norelatime", "strictatime"),
        *("nostrictatime", "lazytime", "nolazytime", "diratime", "nodiratime", "silent", "loud", "nomand"),
        *("iversion", "noiversion"),
    )
)


def _flag(value: str | None, name: str) -> bool:
    if value in (None, "on"):
        return True
    if value == "off":
        return False
    raise UsageError(f"option {name}={value}: use {name}=on or {name}=off")


def _set_bool(field: str) -> Callable[[_Options, str, str | None], None]:
    def handle(options: _Options, name: str, value: str | None) -> None:
        options.put(field, _flag(value, name))

    return handle


def _set_choice(field: str, choices: Sequence[str]) -> Callable[[_Options, str, str | None], None]:
    def handle(options: _Options, name: str, value: str | None) -> None:
        if value not in choices:
            raise UsageError(f"option {name}={value or ''}: use one of {', '.join(choices)}")
        options.put(field, value)

    return handle


def _word(field: str, setting: bool) -> Callable[[_Options, str, str | None], None]:
    """Handle an option that takes no value."""

    def handle(options: _Options, name: str, value: str | None) -> None:
        _no_value(name, value)
        options.put(field, setting)

    return handle


def _refuse_unless(wanted: str, reason: str) -> Callable[[_Options, str, str | None], None]:
    def handle(options: _Options, name: str, value: str | None) -> None:
        if value != wanted:
            raise UsageError(f"option {name}={value or 'on'}: {reason}")

    return handle


def _no_value(name: str, value: str | None) -> None:
    if value is not None:
        raise UsageError(f"option {name} takes no value")


def _path(name: str, value: str | None) -> str:
    if not value:
        raise UsageError(f"option {name} needs a directory")
    return value


def _lowerdir(options: _Options, name: str, value: str | None) -> None:
    options.lowers, options.data_lowers = parse_lowers(_path(name, value))


def _lowerdir_append(options: _Options, name: str, value: str | None) -> None:
    """`lowerdir+=`: one more lower, taken as it is but for escapes; colons need none."""
    if options.data_lowers:
        raise UsageError(f"{name}={value}: ordinary lowers can't follow data-only ones")
    options.lowers.append(unescape(_path(name, value)))


def _datadir_append(options: _Options, name: str, value: str | None) -> None:
    if not options.lowers:
        raise UsageError(f"{name}={value}: a data-only lower needs an ordinary lower above it")
    options.data_lowers.append(unescape(_path(name, value)))


def _upperdir(options: _Options, name: str, value: str | None) -> None:
    options.upper = unescape(_path(name, value))


def _workdir(options: _Options, name: str, value: str | None) -> None:
    options.work = unescape(_path(name, value))


def _timeout(options: _Options, name: str, value: str | None) -> None:
    try:
        seconds = float(value or "")
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e9:  # also false for nan
        raise UsageError(f"option {name}={value or ''}: give a number of seconds, 0 or more")
    options.put("timeout", seconds)


def _fsname(options: _Options, name: str, value: str | None) -> None:
    fsname = unescape(value or "")
    if not fsname or not fsname.isascii() or not fsname.isprintable():
        raise UsageError(f"option {name} needs a name of printable ASCII characters")
    options.put("fsname", fsname)


def _mapping(field: str) -> Callable[[_Options, str, str | None], None]:
    def handle(options: _Options, name: str, value: str | None) -> None:
        options.map_ids(**{field: parse_ranges(name, value or "")})

    return handle


def _squash(*fields: str) -> Callable[[_Options, str, str | None], None]:
    def handle(options: _Options, name: str, value: str | None) -> None:
        options.map_ids(**dict.fromkeys(fields, parse_id(name, value)))

    return handle


def _squash_to_root(options: _Options, name: str, value: str | None) -> None:
    """Squash to 0 what isn't squashed to another id by an option of its own."""
    _no_value(name, value)
    ids = options.ids
    options.map_ids(squash_uid=ids.squash_uid or 0, squash_gid=ids.squash_gid or 0)


def _allow_other(options: _Options, name: str, value: str | None) -> None:
    _no_value(name, value)
    options.allow_other = name == "allow_other"


_HANDLERS: dict[str, Callable[[_Options, str, str | None], None]] = {
    "lowerdir": _lowerdir,
    "lowerdir+": _lowerdir_append,
    "datadir+": _datadir_append,
    "upperdir": _upperdir,
    "workdir": _workdir,
    "redirect_dir": _set_choice("redirect_dir", get_args(RedirectDir)),
    "metacopy": _set_bool("metacopy"),
    "index": _set_bool("index"),
    "xino": _set_choice("xino", get_args(Xino)),
    "uuid": _set_choice("uuid", get_args(Uuid)),
    "whiteout": _set_choice("whiteout", get_args(Whiteout)),
    "native": _set_bool("native"),
    "passthrough": _set_choice("passthrough", get_args(Passthrough)),
    "slow_lower": _set_choice("slow_lower", get_args(SlowLower)),
    "lower": _set_choice("lower", get_args(Lower)),
    "volatile": _word("volatile", True),
    "userxattr": _word("userxattr", True),
    "nfs_export": _refuse_unless("off", "exporting over NFS is not supported"),
    "verity": _refuse_unless("off", "fs-verity checks are not supported"),
    "timeout": _timeout,
    "fsname": _fsname,
    "uidmapping": _mapping("uids"),
    "gidmapping": _mapping("gids"),
    "squash_to_root": _squash_to_root,
    "squash_to_uid": _squash("squash_uid"),
    "squash_to_gid": _squash("squash_gid"),
    "static_nlink": _word("static_nlink", True),
    "noacl": _word("acl", False),
    "ro": _word("read_only", True),
    "allow_other": _allow_other,
    "noallow_other": _allow_other,
}


# The same with a value.
_IGNORED_PREFIXES = ("x-", "X-", "comment", "user=", "uhelper=", "helper=")


def known_options() -> list[str]:
    """Return the names of every `-o` option that is accepted, sorted."""
    return sorted({*_HANDLERS, *_MOUNT_FLAGS, *_IGNORED_FLAGS})


def is_known(name: str) -> bool:
    """Whether an `-o` option of this name is accepted, be it to be ignored."""
    return name in known_options() or f"{name}=".startswith(_IGNORED_PREFIXES)


def given_settings(texts: Iterable[str], *, sloppy: bool = False) -> dict[str, Any]:
    """Return what `-o` options say by themselves, by the names of `MountConfig`; flags of the mount are left out.

    Raises UsageError.
    """
    options = _parse_options(texts, sloppy=sloppy)
    settings = dict(options.fields)
    if options.lowers:
        settings |= {"lowers": [absolute(path) for path in options.lowers]}
        settings |= {"data_lowers": [absolute(path) for path in options.data_lowers]}
    for name, path in (("upper", options.upper), ("work", options.work)):
        if path is not None:
            settings[name] = absolute(path)
    if options.allow_other is not None:
        settings["allow_other"] = options.allow_other
    return settings


def _parse_options(texts: Iterable[str], *, sloppy: bool = False) -> _Options:
    options = _Options()
    for text in texts:
        for option in split_options(text):
            name, equals, value = option.partition("=")
            _apply_option(options, name, value if equals else None, sloppy=sloppy)
    return options


def _apply_option(options: _Options, name: str, value: str | None, *, sloppy: bool) -> None:
    if name in _HANDLERS:
        _HANDLERS[name](options, name, value)
    elif name in _MOUNT_FLAGS:
        _no_value(name, value)
        options.flags[_MOUNT_FLAGS[name]] = name
    elif name == "rw":
        _no_value(name, value)
        options.fields.pop("read_only", None)
    elif not sloppy and not is_known(name):
        raise UsageError(f"unknown option {name!r}{_suggestion(name)}")


def _suggestion(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, known_options(), n=1)
    return f": did you mean {close[0]!r}?" if close else " ('unionfs mount --help' lists them)"


# --- the whole ------------------------------------------------------------------------------------


def absolute(path: str) -> str:
    """Return `path` absolute and free of symbolic links, so that it means the same after a chdir.

    Raises UsageError for an empty path.
    """
    if not path:
        raise UsageError("empty path")
    return os.path.realpath(path)


def default_work(upper: str) -> str:
    """Return the work directory for `upper` where none is given: its sibling `.NAME.unionfs-work`."""
    parent, name = os.path.split(upper)
    if not name:
        raise UsageError(f"upper {upper!r} has no sibling for the work directory: pass --work DIR")
    return os.path.join(parent, f".{name}.unionfs-work")


def parse_mount(
    positionals: Sequence[str],
    options: Iterable[str] = (),
    *,
    work: str | None = None,
    allow_other_default: bool = False,
    privileged: bool = False,
    sloppy: bool = False,
    foreground: bool = False,
    log_level: LogLevel = "warning",
    log_file: str | None = None,
) -> MountConfig:
    """Build a `MountConfig` from what stands on the command line of `mount`.

    `positionals` are `LOWER[:LOWER...] [UPPER] MOUNTPOINT`, or `MOUNTPOINT` alone with `-o lowerdir=...`;
    `options` are the texts of all `-o`; `work` is `--work`. `privileged` (effective user 0) gives a mount
    that honours suid programs and device files, as mount(8) does; libfuse by itself would not. With `sloppy`
    unknown options are left out.

    Raises UsageError for anything that makes no sense by itself.
    """
    opts = _parse_options(options, sloppy=sloppy)
    lowers, data_lowers, upper, mountpoint = _layers(positionals, opts)
    if len(lowers) + len(data_lowers) > MAX_LOWERS:
        raise UsageError(f"{len(lowers) + len(data_lowers)} lower layers: the limit is {MAX_LOWERS}")
    if work == "":
        raise UsageError("--work needs a directory")
    if work and opts.work and absolute(work) != absolute(opts.work):
        raise UsageError("--work and workdir= name different directories: give one of them")
    work = work or opts.work
    given = frozenset(opts.fields) | ({"work"} if work else frozenset())
    if upper is not None:
        upper = absolute(upper)
        work = absolute(work) if work else default_work(upper)
    config = MountConfig(
        lowers=tuple(map(absolute, lowers)),
        data_lowers=tuple(map(absolute, data_lowers)),
        upper=upper,
        work=work if upper is not None else None,
        mountpoint=absolute(mountpoint),
        allow_other=allow_other_default if opts.allow_other is None else opts.allow_other,
        mount_options=_mount_options(opts, privileged),
        foreground=foreground,
        log_level=log_level,
        log_file=absolute(log_file) if log_file else None,
        explicit=given,
        **opts.fields,
    )
    return _resolve_conflicts(config)


def _layers(positionals: Sequence[str], opts: _Options) -> tuple[list[str], list[str], str | None, str]:
    """Return (lowers, data-only lowers, upper, mount point) from positionals and options together."""
    if opts.lowers:
        if len(positionals) != 1:
            raise UsageError("with lowerdir= give the mount point and nothing else")
        return opts.lowers, opts.data_lowers, opts.upper, positionals[0]
    if not 2 <= len(positionals) <= 3:
        raise UsageError("give LOWER[:LOWER...] UPPER MOUNTPOINT, or LOWER[:LOWER...] MOUNTPOINT to read only")
    if opts.upper is not None and len(positionals) == 3:
        raise UsageError("upper is given twice: as an argument and as upperdir=")
    lowers, data_lowers = parse_lowers(positionals[0])
    upper = positionals[1] if len(positionals) == 3 else opts.upper
    return lowers, data_lowers, upper, positionals[-1]


def _mount_options(opts: _Options, privileged: bool) -> tuple[str, ...]:
    """Return the flags for libfuse. It sets nosuid and nodev by itself, which overlayfs doesn't."""
    flags = {"suid": "suid", "dev": "dev"} if privileged else {}
    flags |= opts.flags
    # Their opposites are what the kernel does anyway, and fusermount3 may not know them.
    return tuple(flag for flag in flags.values() if flag not in ("async", "exec", "atime"))


def _makes_redirects(config: MountConfig) -> bool:
    """Whether redirects are as good as on: without upper none are made, and following is all there is."""
    return config.redirect_dir == "on" or (config.upper is None and config.redirect_dir == "follow")


def _resolve_conflicts(config: MountConfig) -> MountConfig:
    """Adapt defaults to one another, refuse what excludes itself (ovl_fs_params_verify)."""
    given = config.explicit
    if config.upper is None:
        # Without upper nothing is created: index and volatile mean nothing, redirects are only followed.
        redirect = "follow" if config.redirect_dir == "on" else config.redirect_dir
        config = dataclasses.replace(config, read_only=True, index=False, volatile=False, redirect_dir=redirect)
    if config.metacopy and not _makes_redirects(config) and not config.userxattr:
        if {"metacopy", "redirect_dir"} <= given:
            raise UsageError(f"metacopy=on needs redirect_dir=on, not {config.redirect_dir}: change one of them")
        if "redirect_dir" in given:
            config = dataclasses.replace(config, metacopy=False)
    return config.with_userxattr(True) if config.userxattr else config
