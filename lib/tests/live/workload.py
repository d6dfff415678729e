"""A process tree with every kind of memory that matters, for the tests of the live reader.

Usage: workload.py SCENARIO FACTS. Writes what it did to the file FACTS as JSON, then waits.
"""

import ctypes
import json
import mmap
import os
import platform
import signal
import struct
import sys

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
facts = {"page": PAGE}


def checked(result):
    if result in (-1, None):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def address(memory):
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def content(name, index):
    return f"{name}:{index};".encode().ljust(32, b".") * (PAGE // 32)


def put(memory, name, indexes):
    for index in indexes:
        memory[index * PAGE : (index + 1) * PAGE] = content(name, index)


def tell(name, **values):
    facts[name] = values


def anonymous(name, pages, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS):
    return mmap.mmap(-1, pages * PAGE, flags=flags)


def kinds(directory):
    plain = anonymous("plain", 600)
    put(plain, "plain", [i for i in range(600) if not 10 <= i < 20])
    plain[15 * PAGE]  # maps the zero page
    tell("plain", address=address(plain))

    closed = anonymous("closed", 4)
    put(closed, "closed", range(4))
    tell("closed", address=address(closed))
    none, pages = 0, ctypes.c_size_t(4 * PAGE)
    checked(libc.mprotect(ctypes.c_void_p(address(closed)), pages, none))

    shared = anonymous("shared", 4096, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    put(shared, "shared", [0, 1000, 1001, 4095])
    tell("shared", address=address(shared))

    odd = os.memfd_create("odd")
    os.ftruncate(odd, 2 * PAGE + 100)
    os.pwrite(odd, content("odd", 0) + content("odd", 1) + b"x" * 100, 0)
    mapped = mmap.mmap(odd, 2 * PAGE + 100)
    tell("odd", inode=os.fstat(odd).st_ino, address=address(mapped))

    idle = os.memfd_create("idle")
    os.ftruncate(idle, 100 * PAGE)
    os.pwrite(idle, content("idle", 3), 3 * PAGE)
    tell("idle", inode=os.fstat(idle).st_ino, fd=idle)

    path = os.path.join(directory, "file")
    with open(path, "wb") as file:
        file.write(b"f" * 8 * PAGE)
    file = open(path, "r+b")
    private = mmap.mmap(file.fileno(), 8 * PAGE, flags=mmap.MAP_PRIVATE)
    private[3 * PAGE]
    put(private, "private", [2])
    tell("private", address=address(private))
    ordinary = mmap.mmap(file.fileno(), 8 * PAGE, flags=mmap.MAP_SHARED)
    ordinary[7 * PAGE] = 103
    tell("ordinary", address=address(ordinary), inode=os.fstat(file.fileno()).st_ino)
    return plain, closed, shared, mapped, private, ordinary, file


def fork(memory, name, index):
    ready, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        put(memory, name, [index])
        os.write(done, b".")
        os.close(done)
        os.close(ready)
        while True:
            signal.pause()
    os.read(ready, 1)
    os.close(ready)
    os.close(done)
    return pid


def sysv():
    create, remove = 0o1600, 0
    segment = checked(libc.shmget(0, ctypes.c_size_t(64 * PAGE), create))
    libc.shmat.restype = ctypes.c_void_p
    at = checked(libc.shmat(segment, None, 0))
    ctypes.memmove(at + 9 * PAGE, content("sysv", 9), PAGE)
    checked(libc.shmctl(segment, remove, None))
    tell("sysv", id=segment, address=at)


def userfault():
    number = {"x86_64": 323, "aarch64": 282}[platform.machine()]
    memory = anonymous("fault", 64)
    put(memory, "fault", range(8))
    fd = checked(libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK))
    import fcntl

    api, register, missing = 0xC018AA3F, 0xC020AA00, 1
    fcntl.ioctl(fd, api, bytearray(struct.pack("QQQ", 0xAA, 0, 0)))
    start = address(memory)
    fcntl.ioctl(fd, register, bytearray(struct.pack("QQQQ", start, 64 * PAGE, missing, 0)))
    tell("fault", address=start)
    return memory, fd


def swapped():
    memory = anonymous("swapped", 512)
    put(memory, "swapped", range(512))
    pageout = 21
    start = address(memory)
    checked(libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(512 * PAGE), pageout))
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(start // PAGE * 8)
        entries = struct.unpack("512Q", pagemap.read(512 * 8))
    out = sum(1 for entry in entries if entry >> 62 == 1)
    tell("swapped", address=start, out=out)
    return memory


def sibling():
    """Another process in the same address space."""
    memory = anonymous("both", 16)
    put(memory, "both", range(16))
    stack = anonymous("stack", 16)
    clone_vm = 0x100
    top = ctypes.c_void_p(address(stack) + 16 * PAGE)
    pid = checked(libc.clone(libc.pause, top, clone_vm | signal.SIGCHLD, None))
    tell("both", address=address(memory), pid=pid)
    return memory, stack


def reserved():
    """Much address space and little memory, as Go and Java have it."""
    noreserve, size = 0x4000, 1 << 40
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | noreserve
    memory = mmap.mmap(-1, size, flags=flags, prot=mmap.PROT_READ)
    used = anonymous("used", 4)
    put(used, "used", range(4))
    tell("used", address=address(used))
    return memory, used


def guarded():
    """A guard region among written pages (Linux 6.13); CRIU keeps it without content."""
    memory = anonymous("guarded", 8)
    put(memory, "guarded", range(8))
    install = 102
    start = address(memory)
    result = libc.madvise(ctypes.c_void_p(start + 2 * PAGE), ctypes.c_size_t(PAGE), install)
    tell("guarded", address=start, installed=result == 0)
    return memory


def huge():
    """One private huge page and one shared, where some are reserved."""
    size = 2 << 20
    flags = mmap.MAP_ANONYMOUS | 0x40000
    private = mmap.mmap(-1, size, flags=flags | mmap.MAP_PRIVATE)
    put(private, "huge", range(512))
    shared = mmap.mmap(-1, size, flags=flags | mmap.MAP_SHARED)
    put(shared, "hugeshared", range(512))
    tell("huge", address=address(private), shared=address(shared))
    return private, shared


def churn():
    """Maps, writes and unmaps, forks and reaps, for ever."""
    start = anonymous("steady", 16)
    put(start, "steady", range(16))
    tell("steady", address=address(start))
    tell("pid", pid=os.getpid())
    publish()
    while True:
        memory = anonymous("churn", 300)
        put(memory, "churn", range(300))
        pid = os.fork()
        if pid == 0:
            put(memory, "other", range(300))
            os._exit(0)
        memory.close()
        os.waitpid(pid, 0)


def publish():
    partial = sys.argv[2] + ".part"
    with open(partial, "w") as file:
        json.dump(facts, file)
    os.rename(partial, sys.argv[2])


def main():
    os.setsid()
    os.closerange(3, 1024)
    directory = os.path.dirname(sys.argv[2])
    os.chdir("/")
    scenario = sys.argv[1]
    if scenario == "kinds":
        keep = kinds(directory), guarded()
        tell("child", pid=fork(keep[0][0], "child", 7))
    elif scenario == "sysv":
        keep = sysv()
    elif scenario == "userfault":
        keep = userfault()
    elif scenario == "swapped":
        keep = swapped()
    elif scenario == "huge":
        keep = huge()
    elif scenario == "sibling":
        keep = sibling()
    elif scenario == "reserved":
        keep = reserved()
    elif scenario == "churn":
        churn()
    publish()
    while True:
        signal.pause()


main()
