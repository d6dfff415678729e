//! The commonest causes of CRIU's failures, each with a sentence that says what to do.
//!
//! CRIU explains a failure in the words of its sources, in a log of many lines. The table maps
//! pieces of these messages (CRIU 3.17 to 4.2) to what an operator can change.

/// The sentence for the first of `lines` that has a known cause.
///
/// `lines` are error lines of the log in their order, or any other message of CRIU. The first known
/// one counts, because what follows a first error are mostly its consequences.
pub fn advice<'a>(lines: impl IntoIterator<Item = &'a str>) -> Option<&'static str> {
    lines.into_iter().find_map(|line| {
        let cause = CAUSES.iter().find(|cause| cause.matches(line));
        cause.map(|cause| cause.advice)
    })
}

/// A cause shows itself by all pieces of one of its patterns in one line.
struct Cause {
    patterns: &'static [&'static [&'static str]],
    advice: &'static str,
}

impl Cause {
    fn matches(&self, line: &str) -> bool {
        let all = |pieces: &&[&str]| pieces.iter().all(|piece| line.contains(piece));
        self.patterns.iter().any(all)
    }
}

// The special ones come before those whose pattern also fits them.
const CAUSES: &[Cause] = &[
    Cause {
        patterns: &[
            &["Connected TCP socket"],
            &["In-flight connection"],
            &["--tcp-close option"],
        ],
        advice: "the processes have open TCP connections; use --tcp-established to move them, or let \
                 the clients disconnect first",
    },
    Cause {
        patterns: &[
            &["External socket is used"],
            &["External socket found in image"],
            &["Can't dump half of stream unix connection"],
            &["unix socket", "with unreachable peer"],
            &["Unix socket", "unreachable peer"],
            &["name-less external socket"],
        ],
        advice: "a process is connected by a UNIX socket with one outside the tree (often a log or \
                 D-Bus socket); use --ext-unix-sk for datagram sockets, otherwise close it or move \
                 both ends together",
    },
    Cause {
        patterns: &[
            &["is not a session leader"],
            &["A session leader of"],
            &["Can't find a session leader"],
        ],
        advice: "the tree was started from a shell and is in that shell's session; use --shell-job, \
                 or start it with setsid",
    },
    Cause {
        patterns: &[
            &["dangling tty"],
            &["ctty inheritance"],
            &["tty to inherit"],
            &["Unable to find a tty driver"],
            &["Can't open slave tty"],
            &["Can't open tty"],
            &["Can't open master pty"],
        ],
        advice: "a process holds a terminal that is not part of the tree; use --shell-job with a \
                 terminal on the destination, or start it with input and output redirected",
    },
    Cause {
        patterns: &[
            &["Some file locks are hold"],
            &["file lock", "failed"],
            &["Unresolved lock"],
            &["Can not set flock"],
            &["Can not set posix lock"],
            &["Can not set ofd lock"],
            &["Can't set lease"],
        ],
        advice: "the processes hold file locks; use --file-locks if nobody outside the tree uses \
                 the locked files",
    },
    Cause {
        patterns: &[&["Can't dump ghost file"], &["increase limit"]],
        advice: "an open but deleted file is larger than CRIU puts into an image; raise the limit \
                 with ghost-limit SIZE in the file given with --criu-config",
    },
    Cause {
        patterns: &[&["link remap"], &["link-remap"]],
        advice: "a process has a deleted file open that still has another name; use --link-remap",
    },
    Cause {
        patterns: &[&["ghost", "File exists"], &["remap", "File exists"]],
        advice: "an earlier restore that was killed left a file ending in .cr.N.ghost behind; remove \
                 it and try again",
    },
    Cause {
        patterns: &[
            &["Unseizable non-zombie"],
            &["ptrace", "Operation not permitted"],
            &["SEIZE", "Operation not permitted"],
        ],
        advice: "a process cannot be traced: a debugger, strace or another checkpoint holds it \
                 already (see TracerPid in /proc/PID/status), or crxfer is not root here",
    },
    Cause {
        patterns: &[
            &["Can't fork for", "File exists"],
            &["Pid", "do not match expected"],
            &["Unable to fork", "File exists"],
        ],
        advice: "a process or thread on the destination has a pid that the tree needs; stop that \
                 one, or restore in a pid namespace of its own",
    },
    Cause {
        patterns: &[&["has bad size"], &["has bad mode"]],
        advice: "a file that the tree has open or mapped is not the same on the destination; copy \
                 programs, libraries and data files from the source",
    },
    Cause {
        patterns: &[&["build-ID"], &["Build-ID"]],
        advice: "a program or library on the destination is another build than on the source; \
                 install the same version",
    },
    Cause {
        patterns: &[
            &["on restore", "No such file or directory"],
            &["Can't open file", "No such file or directory"],
        ],
        advice: "a file that the tree has open or mapped does not exist on the destination; copy \
                 programs, libraries and data files from the source",
    },
    Cause {
        patterns: &[
            &["libnftables"],
            &["Locking network failed"],
            &["Locking connection failed"],
            &["Iptables configuration failed"],
            &["iptables", "No such file or directory"],
            &["Failed to lock TCP connection"],
        ],
        advice: "connections cannot be locked: CRIU needs nftables (built with libnftables, nf_tables \
                 in the kernel) or iptables with network-lock iptables in the CRIU configuration",
    },
    Cause {
        patterns: &[
            &["inet socket", "Cannot assign requested address"],
            &["inet socket", "Network is unreachable"],
        ],
        advice: "an address of the tree's sockets is not on the destination; add it before the \
                 restore, for instance as /32 on lo by an address-prepare hook",
    },
    Cause {
        patterns: &[&["inet socket", "Address already in use"]],
        advice: "another program on the destination uses a port of the tree; stop it",
    },
    Cause {
        patterns: &[
            &["Tracking memory is not available"],
            &["dirty_track"],
            &["soft-dirty"],
        ],
        advice: "this kernel has no soft-dirty tracking (CONFIG_MEM_SOFT_DIRTY), so CRIU cannot \
                 pre-dump; pre-copy must read memory live instead",
    },
    Cause {
        patterns: &[
            // SOL_SOCKET with SO_PASSCRED and SO_PASSSEC.
            &["Can't get 1:16 opt"],
            &["Can't get 1:34 opt"],
        ],
        advice: "this kernel refuses a socket option that CRIU before 4.2 asks for; use CRIU 4.2 or \
                 later on both hosts",
    },
    Cause {
        patterns: &[
            &["CPU", "do not match run time"],
            &["CPU Feature"],
            &["CPU xsave"],
            &["CPU xfeatures"],
            &["FPU feature"],
        ],
        advice: "the destination's CPU lacks features that the tree may use; choose a host with the \
                 same or a newer CPU, or start the workload restricted to common features",
    },
    Cause {
        patterns: &[&["io_uring"]],
        advice: "a process uses io_uring, which CRIU cannot dump; configure the program to use epoll",
    },
    Cause {
        patterns: &[&["Can't dump file", "of that type"], &["anon_inode:"]],
        advice: "a process has something open that CRIU cannot dump (a device, an unusual kernel \
                 object); the log names it. Close it before, or use --external if both hosts have it",
    },
    Cause {
        patterns: &[&["SUSPEND_SECCOMP"], &["suspend seccomp"], &["seccomp"]],
        advice: "a process is under a seccomp filter that CRIU could not suspend or restore; the \
                 kernel needs CONFIG_CHECKPOINT_RESTORE and PTRACE_O_SUSPEND_SECCOMP, and crxfer full root",
    },
    Cause {
        patterns: &[
            &["apparmor"],
            &["AA namespace"],
            &["selinux"],
            &["lsm"],
            &["LSM"],
        ],
        advice: "the security profile of a process is missing or refused; load the same AppArmor or \
                 SELinux policy on the destination, or name another with lsm-profile",
    },
    Cause {
        patterns: &[&["cgroup"], &["Cgroup"]],
        advice: "cgroups cannot be dumped or restored as asked; try another cgroup mode \
                 (--manage-cgroups soft), and see that both hosts use the same cgroup version",
    },
    Cause {
        patterns: &[
            &["enable-external-masters"],
            &["enable-external-sharing"],
            &["autodetected external mount"],
            &["not external"],
            &["No mapping for", "mountpoint"],
            &["unsupported id"],
            &["proper root mount"],
        ],
        advice: "a mount of the tree comes from outside its mount namespace or is of an unsupported \
                 file system; name it with --external mnt[PATH]:KEY on both hosts, or leave it out \
                 with skip-mnt",
    },
    Cause {
        patterns: &[
            &["Nested mount namespaces"],
            &["Can't lookup mount="],
            &["mount namespace"],
            &["The --root option is required"],
        ],
        advice: "the tree's mount namespace cannot be dumped or restored here; start the workload in \
                 crxfer's own mount namespace, or give its root file system with --root",
    },
    Cause {
        patterns: &[&["No space left on device"], &["Disk quota exceeded"]],
        advice: "the place for images or log is full; make room, or choose another directory",
    },
    Cause {
        patterns: &[&["Cannot allocate memory"], &["Out of memory"]],
        advice: "not enough memory; the destination needs room for the images and for the process at \
                 once, also within the memory cgroup of crxfer",
    },
    Cause {
        patterns: &[
            &["in parent pagemap"],
            &["Can't open parent path"],
            &["parent inventory"],
        ],
        advice: "the images build on a parent that is missing or not the right one; receive the \
                 whole chain again",
    },
    Cause {
        patterns: &[&["CAP_SYS_ADMIN"], &["CAP_CHECKPOINT_RESTORE"]],
        advice: "CRIU lacks privileges; run crxfer as root",
    },
    Cause {
        patterns: &[
            &["the process init"],
            &["outside of its pid namespace"],
            &["nested"],
        ],
        advice: "the tree is only part of a namespace; give the pid of the namespace's first process",
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    fn begins(line: &str, begin: &str) {
        let sentence = advice([line]).unwrap_or_else(|| panic!("nothing known about {line}"));
        assert!(sentence.starts_with(begin), "{line}\n{sentence}");
    }

    #[test]
    fn real_messages_meet_their_cause() {
        for (line, begin) in [
            (
                "Error (criu/sk-tcp.c:84): Connected TCP socket, consider using --tcp-established option.",
                "the processes have open TCP",
            ),
            (
                "Error (criu/sk-unix.c:861): unix: External socket is used. Consider using --ext-unix-sk option.",
                "a process is connected by a UNIX",
            ),
            (
                "Error (criu/cr-dump.c:1790): The root process 12 is not a session leader. Consider using --shell-job option",
                "the tree was started from a shell",
            ),
            (
                "Error (criu/file-lock.c:110): Some file locks are hold by dumping tasks! You can try --file-locks to dump them.",
                "the processes hold file locks",
            ),
            (
                "Error (criu/files-reg.c:900): Can't dump ghost file /tmp/x of 2097152 size, increase limit",
                "an open but deleted file is larger",
            ),
            (
                "Error (criu/files-reg.c:1200): Can't create link remap for /tmp/a. Use link-remap option.",
                "a process has a deleted file open",
            ),
            (
                "Error (compel/src/lib/infect.c:379): Unseizable non-zombie 77 found, state S, err -1/1",
                "a process cannot be traced",
            ),
            (
                "Error (criu/cr-restore.c:1380): Can't fork for 4: File exists",
                "a process or thread on the destination",
            ),
            (
                "Error (criu/files-reg.c:2000): File usr/bin/memcached has bad size 10 (expect 12)",
                "a file that the tree has open or mapped is not the same",
            ),
            (
                "Error (criu/files-reg.c:2100): File usr/lib/libc.so.6 has bad build-ID",
                "a program or library on the destination",
            ),
            (
                "Error (criu/files-reg.c:2300): Can't open file tmp/x on restore: No such file or directory",
                "a file that the tree has open or mapped does not exist",
            ),
            (
                "Error (criu/sk-inet.c:950): inet: Can't bind inet socket (id 3): Cannot assign requested address",
                "an address of the tree's sockets",
            ),
            (
                "Error (criu/config.c:900): CRIU was built without libnftables support",
                "connections cannot be locked",
            ),
            (
                "Error (criu/cr-dump.c:1): Tracking memory is not available. Consider omitting --track-mem option.",
                "this kernel has no soft-dirty",
            ),
            (
                "Error (criu/files.c:300): Can't dump file 5 of that type [600] (anon anon_inode:[io_uring])",
                "a process uses io_uring",
            ),
            (
                "Error (criu/mount.c:1092): mnt: Mount 5 /x (master_id: 1 shared_id: 0) has unreachable sharing. Try --enable-external-masters.",
                "a mount of the tree",
            ),
        ] {
            begins(line, begin);
        }
    }

    #[test]
    fn the_first_known_line_decides() {
        let lines = [
            "Error (criu/a.c:1): something else entirely",
            "Error (criu/files-reg.c:1): File x has bad size 1 (expect 2)",
            "Error (criu/cr-restore.c:1): Can't fork for 4: File exists",
        ];
        assert!(advice(lines).is_some_and(|advice| advice.starts_with("a file that")));
        assert_eq!(advice(lines.into_iter().take(1)), None);
    }
}
