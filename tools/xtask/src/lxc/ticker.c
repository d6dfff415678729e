/* Writes every millisecond what time it is and which host it is on, 16 bytes each, to the file argv[1].
 * Where it is in the file it knows only from its memory: a copy that begins anew would overwrite. */
#include <fcntl.h>
#include <stdint.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	int file = argc == 2 ? open(argv[1], O_WRONLY | O_CREAT | O_TRUNC, 0644) : -1;
	const struct timespec rest = { .tv_nsec = 1000000 };

	if (file < 0)
		return 1;
	for (off_t count = 0;; count++) {
		struct timespec now;
		struct stat network = { 0 };
		uint64_t record[2];

		/* The container has no network of its own. */
		stat("/proc/self/ns/net", &network);
		clock_gettime(CLOCK_REALTIME, &now);
		record[0] = now.tv_sec * 1000000000ULL + now.tv_nsec;
		record[1] = network.st_ino;
		if (pwrite(file, record, sizeof(record), count * sizeof(record)) != sizeof(record))
			return 1;
		nanosleep(&rest, 0);
	}
}
