"""Programs that nobody tuned crxfer for. Each checks its own memory all the time and tells of it.

script.py KIND FILE: FILE gets "right ROUNDS" or "wrong: WHAT", written anew every round.
"""
import hashlib
import mmap
import os
import struct
import subprocess
import sys
import threading
import time

PAGE = 4096
MIB = 1 << 20


TOLD = {}


def tell(file, text):
    # In one go into a file that stays: one that comes and goes might be open when the tree is looked at.
    if file not in TOLD:
        TOLD[file] = os.open(file, os.O_WRONLY | os.O_CREAT, 0o600)
    os.pwrite(TOLD[file], text.ljust(200).encode(), 0)


def filled(number, round_, size=PAGE):
    """A page that says whose it is and when it was written."""
    head = struct.pack("<QQ", number, round_)
    body = hashlib.sha256(head).digest() * (size // 32 + 1)
    return (head + body)[:size]


class Pages:
    """Memory that is written page by page, and compared with what was written last."""

    def __init__(self, memory, numbers):
        self.memory = memory
        self.rounds = {number: 0 for number in numbers}
        for number in numbers:
            self.write(number, 0)

    def write(self, number, round_):
        self.memory[number * PAGE : (number + 1) * PAGE] = filled(number, round_)
        self.rounds[number] = round_

    def check(self, number):
        found = self.memory[number * PAGE : (number + 1) * PAGE]
        if bytes(found) != filled(number, self.rounds[number]):
            raise AssertionError(f"page {number} is not that of round {self.rounds[number]}")


def threads(file):
    counts = [0] * 6

    def work(which):
        if which % 2:
            memory = mmap.mmap(-1, 4 * MIB)
        else:
            path = f"{file}.map{which}"
            with open(path, "wb") as out:
                out.truncate(4 * MIB)
            with open(path, "r+b") as out:
                memory = mmap.mmap(out.fileno(), 4 * MIB)
        pages = Pages(memory, range(1024))
        while True:
            counts[which] += 1
            for number in range(counts[which] % 7, 1024, 7):
                pages.check(number)
                pages.write(number, counts[which])
            time.sleep(0.005)

    workers = [threading.Thread(target=work, args=(which,), daemon=True) for which in range(6)]
    for worker in workers:
        worker.start()
    while all(worker.is_alive() for worker in workers):
        tell(file, f"right {min(counts)}")
        time.sleep(0.02)
    tell(file, "wrong: a thread found another page than it wrote")


def sparse(file):
    private = mmap.mmap(-1, 2048 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    shared = mmap.mmap(-1, 2048 * MIB, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | 0x4000)
    numbers = range(0, 2048 * MIB // PAGE, 5 * MIB // PAGE)
    all_pages = [Pages(private, numbers), Pages(shared, numbers)]
    resident = lambda: int(open("/proc/self/statm").read().split()[1]) * PAGE // MIB
    rounds = 0
    while True:
        rounds += 1
        for pages in all_pages:
            for number in numbers[rounds % 5 :: 5]:
                pages.check(number)
                pages.write(number, rounds)
        if resident() > 200:
            raise AssertionError(f"holes were filled: {resident()} MiB are resident")
        tell(file, f"right {rounds}")
        time.sleep(0.02)


def prefork(file):
    common = bytearray(40 * MIB)
    for number in range(0, 40 * MIB // PAGE):
        common[number * PAGE : (number + 1) * PAGE] = filled(number, 0)
    digest = hashlib.sha256(common).digest()
    children = 5
    counts = mmap.mmap(-1, PAGE)
    for which in range(children):
        if os.fork() == 0:
            own = Pages(bytearray(MIB), range(256))
            rounds = 0
            while True:
                rounds += 1
                for number in range(256):
                    own.check(number)
                    own.write(number, rounds)
                right = rounds % 5 or hashlib.sha256(common).digest() == digest
                count = rounds if right else 0
                counts[which * 8 : which * 8 + 8] = struct.pack("<q", count)
                if not right:
                    os._exit(1)
                time.sleep(0.02)
    while True:
        found = struct.unpack(f"<{children}q", counts[: children * 8])
        tell(file, f"right {min(found)}")
        time.sleep(0.02)


def growing(file):
    chunks = []
    rounds = 0
    while True:
        rounds += 1
        if len(chunks) < 400:
            memory = mmap.mmap(-1, MIB)
            chunks.append(Pages(memory, range(256)))
        chunks[rounds * 7919 % len(chunks)].check(rounds % 256)
        tell(file, f"right {rounds}")
        time.sleep(0.005)


def forking(file):
    rounds = 0
    keep = Pages(bytearray(8 * MIB), range(2048))
    while True:
        rounds += 1
        short = [subprocess.Popen(["/bin/true"]) for _ in range(3)]
        pid = os.fork()
        if pid == 0:
            for number in range(rounds % 3, 2048, 3):
                keep.check(number)
            os._exit(0)
        for one in short:
            one.wait()
        if os.waitpid(pid, 0)[1]:
            raise AssertionError("a child found another page than was written")
        for number in range(rounds % 5, 2048, 5):
            keep.write(number, rounds)
        tell(file, f"right {rounds}")


def ending(file):
    keep = bytearray(os.urandom(200 * MIB))
    tell(file, "right 3")
    while not os.path.exists(f"{file}.end"):
        time.sleep(0.01)
    del keep


KINDS = {
    one.__name__: one for one in (threads, sparse, prefork, growing, forking, ending)
}

if __name__ == "__main__":
    kind, place = sys.argv[1:]
    try:
        KINDS[kind](place)
    except AssertionError as error:
        tell(place, f"wrong: {error}")
