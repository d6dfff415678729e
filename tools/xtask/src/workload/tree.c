/* A tree of four processes whose memory CRIU stores in every way that it has: private memory with
 * holes, memory shared by all (anonymous and memfd, the latter of an odd size), and pages that a
 * child has in common with its parent until one of them writes.
 *
 *   usage: tree DIRECTORY
 *
 * SIGUSR1: change some memory.  SIGUSR2: take a checksum of all memory.  Either is answered by the
 * file DIRECTORY/answer-PID. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096L
#define PRIVATE_PAGES 2048
#define SHARED_PAGES 1024
#define MEMFD_BYTES (600 * PAGE + 123)

static unsigned char *private_memory, *shared_memory, *memfd_memory;
static const char *directory;
static uint64_t state;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static uint64_t next(void)
{
	state ^= state << 13;
	state ^= state >> 7;
	return state ^= state << 17;
}

/* Fills every `step`-th page from `first` on; every eighth of these with zeros. */
static void fill(unsigned char *memory, long pages, long first, long step)
{
	for (long page = first; page < pages; page += step) {
		uint64_t *words = (uint64_t *)(memory + page * PAGE);
		int zero = next() % 8 == 0;
		for (long i = 0; i < PAGE / 8; i++)
			words[i] = zero ? 0 : next();
	}
}

static uint64_t sum(const unsigned char *memory, long bytes)
{
	uint64_t hash = 0xcbf29ce484222325u;
	for (long i = 0; i < bytes; i++)
		hash = (hash ^ memory[i]) * 0x100000001b3u;
	return hash;
}

static void answer(const char *text)
{
	char name[4096], final[4096];
	snprintf(name, sizeof name, "%s/answer-%d.part", directory, getpid());
	snprintf(final, sizeof final, "%s/answer-%d", directory, getpid());
	FILE *file = fopen(name, "w");
	if (!file || fputs(text, file) < 0 || fclose(file) || rename(name, final))
		die(final);
}

static void change(void)
{
	long first = next() % 64;
	fill(private_memory, PRIVATE_PAGES, first, 64);
	fill(shared_memory, SHARED_PAGES, first, 64);
	fill(memfd_memory, MEMFD_BYTES / PAGE, first, 64);
	memfd_memory[MEMFD_BYTES - 1] += 1;
	/* Pages go away, too. */
	madvise(private_memory + (first + 64) * PAGE, 4 * PAGE, MADV_DONTNEED);
	answer("changed\n");
}

static void report(void)
{
	char text[200];
	snprintf(text, sizeof text, "private %016lx shared %016lx memfd %016lx\n",
		 (unsigned long)sum(private_memory, PRIVATE_PAGES * PAGE),
		 (unsigned long)sum(shared_memory, SHARED_PAGES * PAGE),
		 (unsigned long)sum(memfd_memory, MEMFD_BYTES));
	answer(text);
}

static void serve(const sigset_t *signals)
{
	for (;;) {
		int signal;
		if (sigwait(signals, &signal))
			continue;
		if (signal == SIGUSR1)
			change();
		else
			report();
	}
}

static unsigned char *map(long bytes, int flags, int fd)
{
	void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
	if (memory == MAP_FAILED)
		die("mmap");
	return memory;
}

int main(int count, char **arguments)
{
	if (count != 2)
		return 2;
	directory = arguments[1];
	state = 0x9e3779b97f4a7c15u;

	sigset_t signals;
	sigemptyset(&signals);
	sigaddset(&signals, SIGUSR1);
	sigaddset(&signals, SIGUSR2);
	sigprocmask(SIG_BLOCK, &signals, NULL);

	int fd = memfd_create("tree", 0);
	if (fd < 0 || ftruncate(fd, MEMFD_BYTES))
		die("memfd");
	private_memory = map(PRIVATE_PAGES * PAGE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	shared_memory = map(SHARED_PAGES * PAGE, MAP_SHARED | MAP_ANONYMOUS, -1);
	memfd_memory = map(MEMFD_BYTES, MAP_SHARED, fd);
	fill(private_memory, PRIVATE_PAGES, 0, 2);
	fill(shared_memory, SHARED_PAGES, 0, 3);
	fill(memfd_memory, MEMFD_BYTES / PAGE, 0, 1);

	/* Two children, the second with a child of its own. */
	for (int child = 1; child <= 2; child++) {
		if (fork() == 0) {
			state += child;
			if (child == 2 && fork() == 0)
				state += 77;
			fill(private_memory, PRIVATE_PAGES, child, 32);
			serve(&signals);
		}
	}
	serve(&signals);
}
