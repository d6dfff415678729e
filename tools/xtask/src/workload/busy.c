/* A tree of processes that rewrites its memory all the time and knows what must be in it.
 *
 *   usage: busy DIRECTORY
 *
 * Each process owns a share of the pages of three areas: private memory, shared anonymous memory
 * and a memfd. Every 2 ms it rewrites some of them. A page says whose it is, where it is, how often
 * it was written, and carries a checksum; the count is remembered in other memory too, so that a page
 * of an earlier time is found out although its checksum is right. Areas come and go, and so do
 * short-lived children.
 *
 * SIGUSR2: check everything that this process owns; the answer is in the file DIRECTORY/busy-PID. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096L
#define WORDS (PAGE / 8)
#define PROCESSES 4
#define AREAS 3
#define PAGES 3072L
#define WRITES 12
#define PASSING_PAGES 64L

struct page {
	uint64_t owner, area, number, count;
	uint64_t body[WORDS - 5];
	uint64_t sum;
};

static struct page *areas[AREAS];
/* In private memory: what each page must say, 0 for one that was given back. */
static uint64_t counts[AREAS][PAGES];
static struct page *passing;
static uint64_t passing_count;
static const char *directory;
static uint64_t state, self, rounds;

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

static uint64_t sum(const struct page *page)
{
	const uint64_t *words = (const uint64_t *)page;
	uint64_t hash = 0xcbf29ce484222325u;
	for (long i = 0; i < WORDS - 1; i++)
		hash = (hash ^ words[i]) * 0x100000001b3u;
	return hash;
}

static void put(struct page *page, uint64_t area, uint64_t number, uint64_t count)
{
	page->owner = self;
	page->area = area;
	page->number = number;
	page->count = count;
	for (long i = 0; i < WORDS - 5; i++)
		page->body[i] = next();
	page->sum = sum(page);
}

static int is_right(const struct page *page, uint64_t area, uint64_t number, uint64_t count)
{
	return page->owner == self && page->area == area && page->number == number &&
	       page->count == count && page->sum == sum(page);
}

static int is_empty(const struct page *page)
{
	const uint64_t *words = (const uint64_t *)page;
	for (long i = 0; i < WORDS; i++)
		if (words[i])
			return 0;
	return 1;
}

/* Any page of this process: they take turns. */
static long any_page(void)
{
	return (long)(next() % (PAGES / PROCESSES)) * PROCESSES + self;
}

static void write_some(void)
{
	for (int i = 0; i < WRITES; i++) {
		uint64_t area = next() % AREAS;
		long number = any_page();
		put(&areas[area][number], area, number, ++counts[area][number]);
	}
	/* Private pages are given back now and then. */
	if (rounds % 16 == 0) {
		long number = any_page();
		madvise(&areas[0][number], PAGE, MADV_DONTNEED);
		counts[0][number] = 0;
	}
}

/* An area that is somewhere else a moment later. */
static void renew_passing(void)
{
	if (passing)
		munmap(passing, PASSING_PAGES * PAGE);
	passing = mmap(NULL, PASSING_PAGES * PAGE, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (passing == MAP_FAILED)
		die("mmap");
	passing_count++;
	for (long number = 0; number < PASSING_PAGES; number += 2)
		put(&passing[number], AREAS, number, passing_count);
}

/* A child that lives for some milliseconds. */
static void have_child(void)
{
	while (waitpid(-1, NULL, WNOHANG) > 0)
		;
	if (fork() == 0) {
		struct timespec time = { 0, 20000000 };
		nanosleep(&time, NULL);
		_exit(0);
	}
}

static long check(char *text, size_t size)
{
	long checked = 0;
	for (long area = 0; area < AREAS; area++)
		for (long number = self; number < PAGES; number += PROCESSES, checked++) {
			struct page *page = &areas[area][number];
			uint64_t count = counts[area][number];
			if (count ? is_right(page, area, number, count) : is_empty(page))
				continue;
			snprintf(text, size, "wrong area %ld page %ld: count %lu, wanted %lu, %s\n",
				 area, number, (unsigned long)page->count, (unsigned long)count,
				 page->sum == sum(page) ? "a page of another time" : "damaged");
			return -1;
		}
	for (long number = 0; number < PASSING_PAGES; number++, checked++) {
		if (number % 2 ? is_empty(&passing[number])
			       : is_right(&passing[number], AREAS, number, passing_count))
			continue;
		snprintf(text, size, "wrong passing page %ld\n", number);
		return -1;
	}
	return checked;
}

static void answer(void)
{
	char name[4096], final[4096], text[200];
	long checked = check(text, sizeof text);
	if (checked >= 0)
		snprintf(text, sizeof text, "right %ld %lu\n", checked, (unsigned long)rounds);
	snprintf(name, sizeof name, "%s/busy-%d.part", directory, getpid());
	snprintf(final, sizeof final, "%s/busy-%d", directory, getpid());
	FILE *file = fopen(name, "w");
	if (!file || fputs(text, file) < 0 || fclose(file) || rename(name, final))
		die(final);
}

static void serve(const sigset_t *signals)
{
	/* Own pages, in own memory: what the parent counted is the parent's. */
	memset(counts, 0, sizeof counts);
	madvise(areas[0], PAGES * PAGE, MADV_DONTNEED);
	passing = NULL;
	state = (state + self) * 0x9e3779b97f4a7c15u;
	for (long number = self; number < PAGES; number += PROCESSES * 2)
		for (long area = 0; area < AREAS; area++)
			put(&areas[area][number], area, number, ++counts[area][number]);
	renew_passing();
	for (;; rounds++) {
		struct timespec time = { 0, 2000000 };
		if (sigtimedwait(signals, NULL, &time) == SIGUSR2)
			answer();
		write_some();
		if (rounds % 25 == self)
			renew_passing();
		if (self == 0 && rounds % 50 == 0)
			have_child();
	}
}

static void *map(int flags, int fd)
{
	void *memory = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, flags, fd, 0);
	if (memory == MAP_FAILED)
		die("mmap");
	return memory;
}

int main(int count, char **arguments)
{
	if (count != 2)
		return 2;
	directory = arguments[1];
	state = 0x2545f4914f6cdd1du;

	sigset_t signals;
	sigemptyset(&signals);
	sigaddset(&signals, SIGUSR2);
	sigprocmask(SIG_BLOCK, &signals, NULL);

	int fd = memfd_create("busy", 0);
	if (fd < 0 || ftruncate(fd, PAGES * PAGE))
		die("memfd");
	areas[0] = map(MAP_PRIVATE | MAP_ANONYMOUS, -1);
	areas[1] = map(MAP_SHARED | MAP_ANONYMOUS, -1);
	areas[2] = map(MAP_SHARED, fd);
	for (self = PROCESSES - 1; self > 0; self--)
		if (fork() == 0)
			break;
	serve(&signals);
}
