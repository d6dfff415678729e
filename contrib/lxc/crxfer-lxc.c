/*
 * crxfer-lxc: the dump and the restore of an LXC container, as `crxfer migrate --dump-with` and
 * `crxfer recv --restore-with` want them. lxc-checkpoint cannot do it: it has no option for CRIU's page
 * server. liblxc's migrate() has, and this program is little more than a call of it.
 *
 * liblxc runs the `criu` that it finds in PATH, with options of its own choice. Here it finds this
 * program, under that name, which changes a few of them and then becomes the real criu.
 */
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <lxc/lxccontainer.h>

/* Deleted files that are still open travel in the images; CRIU's own limit of 1 MB is soon reached. */
#define GHOST_LIMIT (64ULL << 20)
/* crxfer repeats the last three lines that a command printed. */
#define SHOWN_LINES 2
/* Longest option list that liblxc is believed to make. */
#define MAX_ARGUMENTS 500

/* Where the real criu is, for the criu that liblxc finds. */
#define REAL_CRIU "CRXFER_LXC_CRIU"

static const char usage[] =
	"usage: crxfer-lxc [-P LXCPATH] dump|restore|remove [NAME]\n"
	"\n"
	"  crxfer migrate --pid \"$(lxc-info -n NAME -pH)\" --container NAME --restore-as lxc \\\n"
	"                 --dump-with 'crxfer-lxc dump' ...\n"
	"  crxfer recv --allow-restore --restore-with lxc='crxfer-lxc restore' \\\n"
	"              --remove-with lxc='crxfer-lxc remove' ...\n"
	"\n"
	"The container is NAME, or the one of --container. The other host has its file system and its\n"
	"configuration under the same name.\n";

__attribute__((format(printf, 1, 2), noreturn)) static void fail(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	fputs("crxfer-lxc: ", stderr);
	vfprintf(stderr, format, arguments);
	fputc('\n', stderr);
	va_end(arguments);
	exit(1);
}

/* What crxfer says in its environment; it is a mistake to be run by anyone else. */
static const char *told(const char *name)
{
	const char *value = getenv(name);

	if (!value || !*value)
		fail("%s is not set: let crxfer run this, see --help", name);
	return value;
}

__attribute__((format(printf, 2, 3))) static void format_path(char path[PATH_MAX], const char *format, ...)
{
	va_list arguments;
	int length;

	va_start(arguments, format);
	length = vsnprintf(path, PATH_MAX, format, arguments);
	va_end(arguments);
	if (length < 0 || length >= PATH_MAX)
		fail("a path is too long: %.200s...", path);
}

/* ---- the criu that liblxc finds ---- */

struct list {
	char *items[MAX_ARGUMENTS + 8];
	int count;
};

static void add(struct list *list, const char *item)
{
	if (list->count >= MAX_ARGUMENTS)
		fail("liblxc gave criu more than %d options", MAX_ARGUMENTS);
	/* exec does not write to its arguments. */
	list->items[list->count++] = (char *)item;
}

static bool has(const struct list *list, const char *item)
{
	for (int i = 0; i < list->count; i++)
		if (!strcmp(list->items[i], item))
			return true;
	return false;
}

/* Adds what crxfer was asked for in CRIU's own words, and liblxc does not ask for by itself. */
static void add_options(struct list *list)
{
	const char *value = getenv("CRXFER_OPTIONS");
	char *words = strdup(value ? value : ""), *rest = words, *word;

	/* It stays: the list points into it. */
	while (words && (word = strsep(&rest, " ")))
		if (*word && !has(list, word))
			add(list, word);
}

/*
 * Adds the container's group in the hierarchy of cgroup version 2. liblxc names that hierarchy by a controller, CRIU by
 * nothing, so that CRIU would put a copy into the group that has the name of the source's, which on this host may be another
 * container's, and frozen. It is the last one that liblxc names.
 */
static void add_unified_root(struct list *list)
{
	for (int i = list->count - 2; i > 0; i--) {
		const char *path = strchr(list->items[i + 1], '/');

		if (strcmp(list->items[i], "--cgroup-root") || !path)
			continue;
		add(list, "--cgroup-root");
		add(list, path);
		return;
	}
}

/*
 * Becomes the real criu.
 *
 * Log and statistics go to the work directory: nothing but images belongs among the images, and a received
 * set is never written to. No freezer cgroup: with version 1 CRIU looks again only after 100 ms whether
 * all are frozen, all of it downtime; it stops the tasks one by one as well. And the network is locked by nftables:
 * iptables, CRIU's choice, takes 40 ms for each connection.
 */
static int become_criu(int argc, char **argv)
{
	const char *criu = told(REAL_CRIU), *work = told("CRXFER_WORK");
	const char *action = argc > 1 ? argv[1] : "";
	bool dumps = !strcmp(action, "dump"), restores = !strcmp(action, "restore");
	struct list list = { .count = 0 };

	add(&list, criu);
	for (int i = 1; i < argc; i++) {
		bool more = i + 1 < argc;

		if ((dumps || restores) && more && !strcmp(argv[i], "-o")) {
			add(&list, argv[i++]);
			add(&list, basename(argv[i]));
		} else if (dumps && more && !strcmp(argv[i], "--freeze-cgroup")) {
			i++;
		} else {
			add(&list, argv[i]);
		}
	}
	if (dumps || restores) {
		add(&list, "--work-dir");
		add(&list, work);
		add_options(&list);
		add_unified_root(&list);
	}
	/* CRIU says from this level on that it has let a copy go: whoever finds the copy later must know. */
	if (restores)
		add(&list, "-v3");
	if (dumps) {
		add(&list, "--network-lock");
		add(&list, "nftables");
	}
	list.items[list.count] = NULL;
	execv(criu, list.items);
	fail("cannot run %s: %s", criu, strerror(errno));
}

/* The first criu of PATH, with its full path. */
static void find_criu(char found[PATH_MAX])
{
	char *places = strdup(told("PATH")), *rest = places, *place;

	while (places && (place = strsep(&rest, ":"))) {
		format_path(found, "%s/criu", *place ? place : ".");
		if (!access(found, X_OK)) {
			free(places);
			return;
		}
	}
	fail("there is no criu in PATH");
}

/* Has liblxc find this program where it looks for criu. */
static void stand_before_criu(const char *work)
{
	char criu[PATH_MAX], place[PATH_MAX], own[PATH_MAX], path[2 * PATH_MAX];
	ssize_t length = readlink("/proc/self/exe", own, sizeof(own) - 1);

	if (length < 0)
		fail("cannot find my own program: %s", strerror(errno));
	own[length] = 0;
	find_criu(criu);
	format_path(place, "%s/criu", work);
	if (symlink(own, place) && errno != EEXIST)
		fail("cannot make %s: %s", place, strerror(errno));
	if (snprintf(path, sizeof(path), "%s:%s", work, told("PATH")) >= (int)sizeof(path))
		fail("PATH is too long");
	if (setenv(REAL_CRIU, criu, 1) || setenv("PATH", path, 1))
		fail("cannot change the environment: %s", strerror(errno));
}

/* ---- dump and restore ---- */

/* Repeats the first lines of a log that tell what went wrong, which are not the last ones. Gives their number. */
static int show(const char *work, const char *name, const char *mark)
{
	char path[PATH_MAX], *line = NULL;
	size_t size = 0;
	int shown = 0;
	FILE *log;

	format_path(path, "%s/%s", work, name);
	log = fopen(path, "r");
	if (!log)
		return 0;
	while (shown < SHOWN_LINES && getline(&line, &size, log) > 0) {
		/* In containers CRIU may not raise its limit of open files. That is no failure. */
		if (!strstr(line, mark) || strstr(line, "rlimit:"))
			continue;
		fprintf(stderr, "%s: %s", name, line);
		shown++;
	}
	free(line);
	fclose(log);
	return shown;
}

static void open_log(const char *name, const char *lxcpath, const char *work)
{
	char path[PATH_MAX];
	struct lxc_log log = {
		.name = name,
		.lxcpath = lxcpath,
		.file = path,
		.level = "INFO",
		.prefix = "crxfer-lxc",
		.quiet = true,
	};

	format_path(path, "%s/lxc.log", work);
	/* Without a log it goes as well. */
	lxc_log_init(&log);
}

static struct lxc_container *find(const char *name, const char *lxcpath)
{
	struct lxc_container *container = lxc_container_new(name, lxcpath);

	if (!container)
		fail("liblxc gives no container %s", name);
	if (!container->is_defined(container))
		fail("there is no container %s in %s: its configuration must be on both hosts", name,
		     container->get_config_path(container));
	return container;
}

/*
 * Has liblxc do it, in a process of its own. A restore makes another one that stays, the container's
 * monitor. It must not hold what crxfer gave to this one, whose output would not end as long as the container runs,
 * nor be killed with a command that crxfer gives up.
 */
static bool migrate(struct lxc_container *container, unsigned int command, struct migrate_opts *options)
{
	int status;
	pid_t child = fork();

	if (child < 0)
		fail("cannot fork: %s", strerror(errno));
	if (child == 0) {
		int nothing = open("/dev/null", O_RDWR);

		if (command == MIGRATE_RESTORE)
			setsid();
		if (nothing < 0 || dup2(nothing, 0) < 0 || dup2(nothing, 1) < 0 || dup2(nothing, 2) < 0)
			_exit(1);
		_exit(container->migrate(container, command, options, sizeof(*options)) ? 1 : 0);
	}
	while (waitpid(child, &status, 0) < 0)
		if (errno != EINTR)
			fail("cannot wait for liblxc: %s", strerror(errno));
	return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

static bool dump(struct lxc_container *container, struct migrate_opts *options)
{
	const char *port = getenv("CRXFER_PAGE_SERVER_PORT");

	if (!container->is_running(container))
		fail("container %s does not run on this host", container->name);
	options->stop = true;
	if (port && *port) {
		options->pageserver_address = (char *)told("CRXFER_PAGE_SERVER_ADDRESS");
		options->pageserver_port = (char *)port;
	}
	return migrate(container, MIGRATE_DUMP, options);
}

static bool restore(struct lxc_container *container, struct migrate_opts *options)
{
	if (container->is_running(container))
		fail("container %s runs on this host already", container->name);
	return migrate(container, MIGRATE_RESTORE, options);
}

/* What a restore that was cut short has left: crxfer has killed CRIU and what CRIU made. */
static bool remove_rest(struct lxc_container *container)
{
	return !container->is_running(container) || container->stop(container);
}

/* What crxfer asks for, in the order of their names below. */
enum verb { DUMP, RESTORE, REMOVE, NO_VERB };
static const char *const verbs[] = { "dump", "restore", "remove" };
static const char *const failures[] = { "dumped", "restored", "removed" };

static enum verb verb_named(const char *name)
{
	int verb = DUMP;

	while (verb < NO_VERB && strcmp(name, verbs[verb]))
		verb++;
	return verb;
}

static bool run(enum verb verb, struct lxc_container *container)
{
	struct migrate_opts options = { .ghost_limit = GHOST_LIMIT };

	if (verb == REMOVE)
		return remove_rest(container);
	options.directory = (char *)told("CRXFER_IMAGES");
	/* Without it there is no vote, and in the end two containers or none. */
	options.action_script = (char *)told("CRXFER_ACTION_SCRIPT");
	return verb == DUMP ? dump(container, &options) : restore(container, &options);
}

int main(int argc, char **argv)
{
	const char *lxcpath = NULL, *name, *work;
	struct lxc_container *container;
	enum verb verb;
	bool succeeds;
	int option;

	if (argc > 0 && !strcmp(basename(argv[0]), "criu"))
		return become_criu(argc, argv);
	while ((option = getopt(argc, argv, "+P:h-:")) != -1) {
		if (option == 'P') {
			lxcpath = optarg;
		} else {
			fputs(usage, option == '?' ? stderr : stdout);
			return option == '?' ? 2 : 0;
		}
	}
	verb = verb_named(optind < argc ? argv[optind++] : "");
	if (verb == NO_VERB || argc - optind > 1) {
		fputs(usage, stderr);
		return 2;
	}
	name = optind < argc ? argv[optind] : told("CRXFER_CONTAINER");
	work = told("CRXFER_WORK");

	stand_before_criu(work);
	open_log(name, lxcpath, work);
	container = find(name, lxcpath);
	succeeds = run(verb, container);
	if (!succeeds) {
		fprintf(stderr, "crxfer-lxc: container %s could not be %s; the logs are in %s\n", name, failures[verb],
			work);
		if (verb == REMOVE || !show(work, verb == DUMP ? "dump.log" : "restore.log", "Error ("))
			show(work, "lxc.log", "ERROR");
	}
	lxc_container_put(container);
	return succeeds ? 0 : 1;
}
