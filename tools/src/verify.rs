//! `crxfer verify`.

use std::path::{Path, PathBuf};

use crxfer::image::{Chain, Completeness, ImageError};
use crxfer::store::{Record, Store, Verification, locate};
use serde_json::json;

use crate::args::VerifyArgs;
use crate::error::{Failed, with_causes};
use crate::inspect;
use crate::output;
use crate::size::{Bytes, grouped};

pub(crate) fn run(args: &VerifyArgs) -> Result<(), Failed> {
    let dir = &locate(&args.dir)?;
    if !dir.exists() {
        return Err(ImageError::NoDirectory(args.dir.clone()).into());
    }
    let mut reports = Vec::new();
    if let Ok(store) = Store::open_existing(dir) {
        for set in store.list()?.into_iter().filter(|set| set.is_current()) {
            let path = set
                .directory
                .unwrap_or_else(|| args.dir.join(&set.record.name));
            reports.push(check_set(&store, &set.record, path)?);
        }
    } else if let Some((store, record)) = Store::find_set(dir)? {
        reports.push(check_set(&store, &record, dir.clone())?);
    } else {
        reports.push(Report::new(dir.clone(), None));
    }
    for report in &reports {
        report.print(args.json)?;
    }
    let unsound: Vec<_> = reports.iter().filter(|report| !report.is_sound()).collect();
    match unsound.as_slice() {
        [] => Ok(()),
        [only] => Err(Failed::Unsound(only.complaint())),
        [first, rest @ ..] => Err(Failed::Unsound(format!(
            "{} (and {} more sets)",
            first.complaint(),
            rest.len()
        ))),
    }
}

/// What was found about one directory.
#[derive(Debug)]
struct Report {
    path: PathBuf,
    /// `None` where there are no digests to compare with.
    verification: Option<Verification>,
    completeness: Result<Completeness, String>,
}

fn check_set(store: &Store, record: &Record, path: PathBuf) -> Result<Report, Failed> {
    let verification = store.verify(record)?;
    if !verification.is_sound() && !store.records()?.contains(record) {
        let text = format!("{}: was removed while it was read", path.display());
        return Err(Failed::Unsound(text));
    }
    Ok(Report::new(path, Some(verification)))
}

impl Report {
    fn new(path: PathBuf, verification: Option<Verification>) -> Self {
        let completeness = completeness(&path).map_err(|error| with_causes(&error));
        Self {
            path,
            verification,
            completeness,
        }
    }

    fn is_sound(&self) -> bool {
        let incomplete = matches!(self.completeness, Err(_) | Ok(Completeness::Damaged(_)));
        let intact = self
            .verification
            .as_ref()
            .is_none_or(Verification::is_sound);
        intact && !incomplete
    }

    fn problems(&self) -> Vec<String> {
        let found = self.verification.iter().flat_map(|it| &it.problems);
        let mut problems: Vec<_> = found
            .map(|problem| format!("{}: {}", problem.path.display(), problem.what))
            .collect();
        match &self.completeness {
            Ok(damaged @ Completeness::Damaged(_)) => {
                problems.extend(inspect::problems(damaged));
            }
            Ok(_) => {}
            Err(error) => problems.push(error.clone()),
        }
        problems
    }

    fn complaint(&self) -> String {
        match self.problems().as_slice() {
            [first, rest @ ..] if !rest.is_empty() => {
                format!("{}: {first} (and {} more)", self.path.display(), rest.len())
            }
            problems => format!("{}: {}", self.path.display(), problems.join("")),
        }
    }

    fn print(&self, json: bool) -> Result<(), Failed> {
        if json {
            return output::json(&json!({
                "path": self.path.to_string_lossy(),
                "sound": self.is_sound(),
                "digests_compared": self.verification.is_some(),
                "completeness": self.completeness.as_ref().map_or("damaged", Completeness::word),
                "sets": self.verification.as_ref().map(|it| it.sets),
                "files": self.verification.as_ref().map(|it| it.files),
                "bytes": self.verification.as_ref().map(|it| it.bytes),
                "problems": self.problems(),
            }));
        }
        let path = self.path.display();
        if !self.is_sound() {
            output::line(&format!("{path}: NOT sound"))?;
            let problems = self.problems();
            return problems
                .iter()
                .try_for_each(|problem| output::line(&format!("  {problem}")));
        }
        let state = match &self.completeness {
            Ok(completeness) => completeness.to_string(),
            Err(error) => error.clone(),
        };
        output::line(&match &self.verification {
            Some(it) => format!(
                "{path}: sound, {} files and {} as stored{}; {state}",
                grouped(it.files),
                Bytes(it.bytes),
                match it.sets {
                    1 => String::new(),
                    sets => format!(" in {sets} sets"),
                }
            ),
            None => format!(
                "{path}: {state}; not a received set, so there are no digests to compare with"
            ),
        })
    }
}

fn completeness(path: &Path) -> Result<Completeness, ImageError> {
    Ok(Chain::open(path, None)?.completeness())
}
