//! Licences and origins of dependencies, from `cargo metadata`.

use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::run;

/// Licences that let anybody use crxfer under its own, Apache-2.0 or MIT.
const ALLOWED: [&str; 10] = [
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "MIT",
    "MIT-0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];
const CRATES_IO: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// Fails unless each dependency has an allowed licence and comes from crates.io or this workspace.
pub(crate) fn check() -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let words = ["metadata", "--format-version", "1", "--locked"];
    let text = run::quiet(
        Command::new(cargo)
            .args(words)
            .current_dir(run::workspace()),
    )?;
    let metadata: Value = serde_json::from_str(&text).context("output of cargo metadata")?;
    let packages = metadata["packages"]
        .as_array()
        .context("cargo metadata names no packages")?;
    let problems: Vec<String> = packages.iter().flat_map(problems).collect();
    if !problems.is_empty() {
        bail!(
            "{} problems with dependencies:\n{}",
            problems.len(),
            problems.join("\n")
        );
    }
    println!(
        "licences and origins of {} packages: all allowed",
        packages.len()
    );
    Ok(())
}

fn problems(package: &Value) -> Vec<String> {
    let text = |key: &str| package[key].as_str();
    let name = format!(
        "{} {}",
        text("name").unwrap_or("?"),
        text("version").unwrap_or("?")
    );
    let mut problems = Vec::new();
    match text("license") {
        None => problems.push(format!("{name} states no licence")),
        Some(licence) if !is_allowed(licence) => {
            problems.push(format!("{name} has the licence {licence}"))
        }
        Some(_) => {}
    }
    if let Some(source) = text("source").filter(|source| *source != CRATES_IO) {
        problems.push(format!("{name} comes from {source}"));
    }
    problems
}

/// Whether the licence expression (SPDX, or with the old `/` for OR) can be met by allowed licences.
fn is_allowed(expression: &str) -> bool {
    let spaced = expression
        .replace('/', " OR ")
        .replace('(', " ( ")
        .replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut parser = Parser { words: &words };
    parser.any_of() == Some(true) && parser.words.is_empty()
}

/// Evaluates an expression from left to right; `None` is an expression that it cannot read.
#[derive(Debug)]
struct Parser<'a> {
    words: &'a [&'a str],
}

impl Parser<'_> {
    fn any_of(&mut self) -> Option<bool> {
        let mut allowed = self.all_of()?;
        while self.take("OR") {
            allowed |= self.all_of()?;
        }
        Some(allowed)
    }

    fn all_of(&mut self) -> Option<bool> {
        let mut allowed = self.one()?;
        while self.take("AND") {
            allowed &= self.one()?;
        }
        Some(allowed)
    }

    fn one(&mut self) -> Option<bool> {
        if self.take("(") {
            let allowed = self.any_of()?;
            return self.take(")").then_some(allowed);
        }
        let licence = self.next()?;
        if self.take("WITH") {
            let exception = self.next()?;
            return Some(ALLOWED.contains(&format!("{licence} WITH {exception}").as_str()));
        }
        Some(ALLOWED.contains(&licence.as_str()))
    }

    fn take(&mut self, word: &str) -> bool {
        let found = self.words.first() == Some(&word);
        if found {
            self.words = &self.words[1..];
        }
        found
    }

    fn next(&mut self) -> Option<String> {
        let (first, rest) = self.words.split_first()?;
        self.words = rest;
        Some((*first).to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_evaluated() {
        for good in [
            "MIT",
            "MIT/Apache-2.0",
            "MIT OR GPL-3.0-only",
            "(MIT OR Apache-2.0) AND Unicode-3.0",
            "Apache-2.0 WITH LLVM-exception OR GPL-2.0-only",
            "GPL-2.0-only OR (ISC AND MIT)",
        ] {
            assert!(is_allowed(good), "{good}");
        }
        for bad in [
            "GPL-3.0-only",
            "MIT AND GPL-3.0-only",
            "(MIT OR ISC",
            "",
            "MIT MIT",
            "MIT WITH Foo",
            "MIT AND",
        ] {
            assert!(!is_allowed(bad), "{bad}");
        }
    }
}
