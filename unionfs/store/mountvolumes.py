"""The volumes of one mount, from its start to its end.

    prepare      before the union is mounted: volumes are made and marked as used, host paths opened
    establish    once the mount answers: empty volumes are filled, mount points made in the union, and all bound one
                 after the other, outer targets first
    take_down    before the union goes: the kernel's binds are undone in reverse
    close        at the very end: the store learns that the mount is gone

What the kernel may do for this process it does (mode "kernel"); else the daemon serves the path (mode "fuse").

Each step of establishing is a request to this very daemon, so a process of its own makes it, the *usher*. A thread of
the daemon that waits for the daemon can't be killed: the kernel would have to end its request first, and does so when
the device is closed, which the waiting thread keeps open. The usher is forked before there is a device, and ends with
the daemon. For the same reason nobody waits for the usher's end before the session has ended, and a program of its own
undoes the binds, whose paths lead through the union.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unionfs.config import MountConfig
from unionfs.core import sysio
from unionfs.errors import EnvironmentUnfit, LayerError, MountFailed, UnionError, from_exit_code
from unionfs.host import control
from unionfs.host.kernelbind import Source, open_target
from unionfs.host.mountinfo import mount_id_of, place_of, read_mounts
from unionfs.volumespec import MountVolumes, VolumeSpec

if TYPE_CHECKING:
    from unionfs.core.bind import BindPoint
    from unionfs.store.volumes import Acquired, Store

log = logging.getLogger(__name__)

_MESSAGE_BYTES = 1 << 16

Attach = Callable[["BindPoint"], None]


@dataclass(slots=True)
class _Bind:
    """One volume of this mount on its way to being bound."""

    acquired: Acquired
    source: Source
    kernel: bool
    mount_id: int | None = None  # of the kernel's bind; its place may change, as parents are renamed

    @property
    def spec(self) -> VolumeSpec:
        return self.acquired.spec

    def shown(self) -> dict[str, object]:
        """Return what `inspect` shows, in Docker's words."""
        volume = self.acquired.volume
        named = {"Name": volume.name, "Driver": "local"} if volume is not None else {}
        return {
            "Type": self.spec.kind,
            **named,
            "Source": self.acquired.path,
            "Destination": self.spec.target,
            "Mode": "ro" if self.spec.read_only else "",
            "RW": not self.spec.read_only,
            "Propagation": self.spec.propagation if self.kernel else "",
            "BindMode": "kernel" if self.kernel else "fuse",
            "MountId": self.mount_id,
        }


class MountedVolumes:
    """Owns the volumes of one mount; for a mount without any it does nothing."""

    def __init__(self, config: MountConfig, volumes: MountVolumes) -> None:
        self._config = config
        self._volumes = volumes
        self._store: Store | None = None
        self._mount_id = 0
        self._binds: list[_Bind] = []
        self._usher = 0
        self._socket: socket.socket | None = None
        self._ending = False

    def __bool__(self) -> bool:
        """Whether there are any volumes."""
        return bool(self._binds)

    @property
    def needs_fuse(self) -> bool:
        """Whether the daemon itself serves some volume."""
        return any(not bind.kernel for bind in self._binds)

    @property
    def store_root(self) -> str | None:
        """The store's directory, None where the mount has nothing to do with one."""
        return self._store.root if self._store is not None else None

    def shown(self) -> list[dict[str, object]]:
        """Return the volumes as `inspect` shows them."""
        return [bind.shown() for bind in self._binds]

    # -- before the union is mounted --

    def prepare(self) -> None:
        """Make the volumes that are missing, mark all as used by this process, and open what is to be bound.

        Raises a UnionError.
        """
        volumes = self._volumes
        if not volumes.specs and volumes.name is None:
            return
        from unionfs.store.volumes import Store

        self._store = Store.open(volumes.root)
        pid = os.getpid()
        self._mount_id, acquired = self._store.acquire(
            name=volumes.name,
            mountpoint=self._config.mountpoint,
            specs=volumes.specs,
            pid=pid,
            start=control.process_start(pid) or 0,
            pidns=control.pid_namespace(),
        )
        for one in sorted(acquired, key=lambda one: one.spec.target.count("/")):
            self._binds.append(self._open(one))
        if self._binds:
            self._fork_usher()

    def _fork_usher(self) -> None:
        """Start the process that will make the requests; nothing but this process may run in threads yet."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        self._usher = os.fork()
        if self._usher == 0:
            try:
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                    signal.signal(number, signal.SIG_IGN)  # a whole process group may get them: the daemon decides
                sysio.die_with_parent()
                if os.getppid() == parent:
                    self._be_usher(theirs)
            finally:
                os._exit(0)
        theirs.close()

    def _open(self, acquired: Acquired) -> _Bind:
        self._refuse_layers(acquired.path)
        source = Source(acquired.path)
        return _Bind(acquired, source, self._clone(source, acquired.spec))

    def _clone(self, source: Source, spec: VolumeSpec) -> bool:
        """Have the kernel's bind mount made ready; return whether there is one, or the daemon serves the volume."""
        done = False
        if self._volumes.bind_mode != "fuse":
            done = source.clone(read_only=spec.read_only, propagation=spec.propagation, recursive=spec.recursive)
        if not done and self._volumes.bind_mode == "kernel":
            raise EnvironmentUnfit("--bind-mode kernel needs root (CAP_SYS_ADMIN): use --bind-mode auto")
        if not done and not spec.recursive:
            source.leave_mounts_out()
        return done

    def _refuse_layers(self, path: str) -> None:
        """A volume inside upper or work would change it behind the union's back."""
        mounts = read_mounts()
        directory = path if os.path.isdir(path) else os.path.dirname(path)
        try:
            place = place_of(directory, mounts)
        except OSError:
            return  # whoever opens it says why
        for what, layer in (("upper", self._config.upper), ("work", self._config.work)):
            if layer is not None and place.is_within(place_of(layer, mounts)):
                raise LayerError(f"volume source {path} lies inside {what} {layer}: use a directory outside the layers")

    # -- while it is mounted --

    def establish(self, attach: Attach) -> None:
        """Have every volume bound; `attach` hands one to the daemon's own loop. Runs in a thread of the daemon.

        Raises a UnionError; what was bound until then is taken down by the caller.
        """
        if self._socket is None:
            return
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # no usher any more
            self._socket.send(b"go")
            while message := self._socket.recv(_MESSAGE_BYTES):
                self._heed(self._socket, attach, *json.loads(message))
        if any(bind.source.fd >= 0 for bind in self._binds):
            why = "the mount is being ended" if self._ending else "a process was killed"
            raise MountFailed(f"the volumes of {self._config.mountpoint} can't be bound: {why}")

    def _heed(self, usher: socket.socket, attach: Attach, word: str, number: int, value: Any) -> None:
        """Do what the usher's message is about; `number` is that of a bind, or with "error" an exit code."""
        if word == "error":
            raise from_exit_code(number, value)
        bind = self._binds[number]
        if word == "again":
            self._open_again(bind)
            return
        if word == "bound":
            bind.mount_id = value
        elif word == "attach":
            from unionfs.core.bind import BindPoint

            target, spec = self._components(value), bind.spec
            try:
                attach(BindPoint(target, bind.source.take_fd(), spec.read_only, cached=spec.cached))
            except OSError as error:
                raise MountFailed(self._cannot_bind(error)) from None
            usher.send(b"done")
        bind.source.close()

    def _cannot_bind(self, error: OSError) -> str:
        where = f" ({os.fsdecode(error.filename)})" if error.filename else ""
        return f"the volumes of {self._config.mountpoint} can't be bound: {error.strerror}{where}"

    def _dismiss_usher(self) -> None:
        """Have the usher end, and nobody wait for it; it may be in the middle of a request to this daemon."""
        if self._socket is not None:
            self._ending = True
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            os.kill(self._usher, signal.SIGKILL)  # where it has done its work it has ended, but is not reaped

    # -- in the usher --

    def _be_usher(self, daemon: socket.socket) -> None:
        """Wait until the mount answers, then bind. What isn't needed is closed, the daemon's pipes above all."""
        logging.disable()
        keep = {daemon.fileno(), *(fd for bind in self._binds for fd in (bind.source.fd, bind.source.tree))}
        for name in os.listdir("/proc/self/fd"):
            if int(name) > 2 and int(name) not in keep:
                with contextlib.suppress(OSError):
                    os.close(int(name))

        def tell(word: str, number: int, value: object) -> None:
            daemon.send(json.dumps([word, number, value]).encode())

        if daemon.recv(_MESSAGE_BYTES) != b"go":
            return
        try:
            self._bind_all(daemon, tell)
        except UnionError as error:
            tell("error", error.exit_code, str(error))
        except OSError as error:  # what a layer or a volume fails with
            tell("error", MountFailed.exit_code, self._cannot_bind(error))
        except BaseException as error:
            tell("error", 1, f"internal error: {type(error).__name__}: {error}")

    def _bind_all(self, daemon: socket.socket, tell: Callable[[str, int, object], None]) -> None:
        root_fd = os.open(self._config.mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # First the content of the union, as long as no volume covers it.
            filled = {self._fill(root_fd, bind) for bind in self._binds if bind.acquired.fill}
            for number, bind in enumerate(self._binds):
                if bind.acquired.volume is not None and bind.acquired.volume.id in filled:
                    self._open_again(bind)
                    tell("again", number, None)
                destination = self._establish(root_fd, bind)
                if bind.kernel:
                    tell("bound", number, bind.mount_id)
                else:
                    tell("attach", number, destination)
                    daemon.recv(_MESSAGE_BYTES)
        finally:
            os.close(root_fd)

    def _establish(self, root_fd: int, bind: _Bind) -> str:
        """Make the mount point of a volume and, if the kernel serves it, bind it there; return its real path."""
        spec = bind.spec
        may_make = self._config.upper is not None and not self._config.read_only
        target_fd = open_target(root_fd, spec.target, is_dir=bind.source.is_dir, make=may_make or self._nested(spec))
        try:
            destination = os.readlink(f"/proc/self/fd/{target_fd}")
            if bind.kernel:
                sysio.move_mount(bind.source.tree, target_fd)
                sysio.set_mount(
                    bind.source.tree,
                    read_only=spec.read_only,
                    propagation=spec.propagation.removeprefix("r"),
                    recursive=spec.recursive,
                )
                bind.mount_id = mount_id_of(bind.source.tree)
        except OSError as error:
            raise MountFailed(f"can't bind {bind.acquired.path} on {spec.target}: {error.strerror}") from None
        finally:
            os.close(target_fd)
        return destination

    def _nested(self, spec: VolumeSpec) -> bool:
        """Whether the target lies in another volume, which is a place of its own to make things in."""
        return any(spec.target.startswith(other.spec.target + "/") for other in self._binds)

    def _components(self, destination: str) -> tuple[bytes, ...]:
        inside = os.path.relpath(destination, self._config.mountpoint)
        return tuple(os.fsencode(inside).split(b"/"))

    def _fill(self, root_fd: int, bind: _Bind) -> int | None:
        """Give an empty volume what the union has at its target; return its number: it is another directory now."""
        from unionfs.archives.copytree import copy_tree

        assert self._store is not None
        volume = bind.acquired.volume
        assert volume is not None
        try:
            content = sysio.open_in_root(root_fd, os.fsencode(bind.spec.target), os.O_RDONLY | os.O_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise LayerError(
                f"volume {volume.name} can't be filled from {bind.spec.target}: {error.strerror}"
            ) from None
        try:
            stage = self._store.begin_fill(volume)
            if stage is not None:  # else another mount was faster
                copy_tree(content, stage)
                self._store.end_fill(volume)
        except OSError as error:
            raise LayerError(
                f"volume {volume.name} can't be filled from {bind.spec.target}: {error.strerror}: {error.filename}"
            ) from None
        finally:
            os.close(content)
            self._store.abort_fill(volume)
        return volume.id

    def _open_again(self, bind: _Bind) -> None:
        bind.source.close()
        bind.source = Source(bind.acquired.path)
        bind.kernel = self._clone(bind.source, bind.spec) if bind.kernel else False

    # -- before it goes --

    def take_down(self) -> None:
        """End what `establish` does, and undo the kernel's binds, the last first; one that is in use is detached.

        Runs in a thread.
        """
        self._dismiss_usher()
        places = {mount.mount_id: mount.mountpoint for mount in read_mounts()}
        bound = [places[bind.mount_id] for bind in reversed(self._binds) if bind.mount_id in places]
        if bound:
            import subprocess

            command = ["umount", "-i", "-c", "-l", "--", *bound]
            try:
                done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
            except FileNotFoundError:
                log.warning("no umount: volumes stay bound until the union goes")
            else:
                if done.returncode:
                    log.warning("%s", done.stderr.strip())

    def close(self) -> None:
        """Let go of all that is still open, and tell the store that the mount is gone."""
        if self._socket is not None:
            self._dismiss_usher()
            self._socket.close()
            self._socket = None
            os.waitpid(self._usher, 0)
        for bind in self._binds:
            bind.source.close()
        if self._store is not None:
            if self._mount_id:
                self._store.release(self._mount_id)
            self._store = None
