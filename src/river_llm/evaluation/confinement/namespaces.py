"""Namespaces: a program that sees no other processes, no network, and files of its own only."""

from __future__ import annotations

import os
from collections.abc import Sequence

from . import libc

# Flags that a mount has and that may not be taken from it in a namespace of one's own.
_KEPT_FLAGS = {
    os.ST_NOSUID: libc.MS_NOSUID,
    os.ST_NODEV: libc.MS_NODEV,
    os.ST_NOEXEC: libc.MS_NOEXEC,
    os.ST_NOATIME: libc.MS_NOATIME,
    os.ST_NODIRATIME: libc.MS_NODIRATIME,
    os.ST_RELATIME: libc.MS_RELATIME,
}


def enter_namespaces() -> bool:
    """Give this process an own network and IPC, and its children own process ids; as a user
    without privileges, in a user namespace of its own. False where the system doesn't allow it."""
    flags = libc.CLONE_NEWPID | libc.CLONE_NEWNET | libc.CLONE_NEWIPC
    user, group = os.getuid(), os.getgid()
    try:
        if user == 0:
            libc.unshare(flags)
            return True
        libc.unshare(flags | libc.CLONE_NEWUSER)
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{user} {user} 1")
        _write("/proc/self/gid_map", f"{group} {group} 1")
    except OSError:
        return False
    return True


def enter_root(root: str, readable: Sequence[str], devices: Sequence[str], size: int) -> None:
    """Make a file system in memory at `root`, show the files `readable` in it, read-only, and
    make it all that this process sees. Call it in the first child after `enter_namespaces`.

    Args:
        devices: files of /dev to show.
        size: bytes that all files written in it may take.

    Raises:
        OSError: the system doesn't allow it.
    """
    libc.unshare(libc.CLONE_NEWNS)
    libc.mount("none", "/", None, libc.MS_REC | libc.MS_PRIVATE)
    options = f"size={size},nr_inodes=4096,mode=755"
    libc.mount("tmpfs", root, "tmpfs", libc.MS_NOSUID | libc.MS_NODEV, options)
    for path in readable:
        _show(root, path, read_only=True)
    for path in devices:
        _show(root, path, read_only=False)
    os.chroot(root)
    os.chdir("/")


def _show(root: str, path: str, read_only: bool) -> None:
    target = root + path
    if os.path.lexists(target) or not os.path.lexists(path):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):  # as /lib is one to usr/lib
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    libc.mount(path, target, None, libc.MS_BIND | libc.MS_REC)
    if read_only:
        kept = os.statvfs(target).f_flag
        flags = sum(flag for bit, flag in _KEPT_FLAGS.items() if kept & bit)
        flags |= libc.MS_REMOUNT | libc.MS_BIND | libc.MS_RDONLY
        libc.mount("none", target, None, flags)


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
