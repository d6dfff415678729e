//! The moments at which CRIU asks whether to go on.

use std::fmt;

/// What the caller answers at a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// CRIU goes on.
    GoOn,
    /// CRIU fails this stage; what becomes of the processes is said at each [`Stage`].
    Refuse,
}

/// A moment in a dump or restore at which CRIU waits for the caller.
///
/// The caller may take as long as it likes; everything stays as described until it answers. If the
/// caller dies instead, CRIU takes that for a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Dump: the tree still runs. Refused: nothing was touched.
    PreDump,
    /// Frozen, only for a tree with its own network namespace; CRIU locks the network after the
    /// answer. Refused: the tree resumes.
    NetworkLock,
    /// Frozen; CRIU asks which external files there are. Refused: the tree resumes.
    QueryExtFiles,
    /// Frozen; all images are written and closed, and all memory went to the page server. Going on
    /// kills the tree (or leaves it, as asked for). Refused: the tree resumes.
    PostDump,
    /// Frozen; CRIU listens for a client that fetches lazy pages.
    StatusReady,
    /// Restore: nothing is created yet. Refused: nothing is left.
    PreRestore,
    /// The root task exists in its new namespaces; comes with its pid. Refused: it is killed.
    SetupNamespaces,
    /// The namespaces are filled. Refused: what was created is killed.
    PostSetupNamespaces,
    /// All tasks and their memory are there, but none has run and the network is locked; comes with
    /// the pid of the root task. Refused: the copy is killed.
    PostRestore,
    /// Only for a tree with its own network namespace: its connections are about to open.
    NetworkUnlock,
    /// Past the point of no return: CRIU ignores a refusal.
    PreResume,
    /// The copy runs: CRIU ignores a refusal.
    PostResume,
    /// A stage that this version of crxfer does not know.
    Unknown,
}

impl Stage {
    const NAMES: [(Self, &str); 12] = [
        (Self::PreDump, "pre-dump"),
        (Self::NetworkLock, "network-lock"),
        (Self::QueryExtFiles, "query-ext-files"),
        (Self::PostDump, "post-dump"),
        (Self::StatusReady, "status-ready"),
        (Self::PreRestore, "pre-restore"),
        (Self::SetupNamespaces, "setup-namespaces"),
        (Self::PostSetupNamespaces, "post-setup-namespaces"),
        (Self::PostRestore, "post-restore"),
        (Self::NetworkUnlock, "network-unlock"),
        (Self::PreResume, "pre-resume"),
        (Self::PostResume, "post-resume"),
    ];

    /// The stage that CRIU calls `script`.
    pub(crate) fn named(script: &str) -> Self {
        Self::NAMES
            .iter()
            .find(|(_, name)| *name == script)
            .map_or(Self::Unknown, |(stage, _)| *stage)
    }

    /// Whether going on here decides the operation: the tree is given up, or the copy is kept.
    pub fn is_decisive(self) -> bool {
        matches!(self, Self::PostDump | Self::PostRestore)
    }
}

/// CRIU's own name.
impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = Self::NAMES.iter().find(|(stage, _)| stage == self);
        f.write_str(known.map_or("unknown stage", |(_, name)| name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_read_back_by_the_names_that_criu_gives_them() {
        for (stage, name) in Stage::NAMES {
            assert_eq!(Stage::named(name), stage);
            assert_eq!(stage.to_string(), name);
        }
        assert_eq!(Stage::named("post-dump "), Stage::Unknown);
    }
}
