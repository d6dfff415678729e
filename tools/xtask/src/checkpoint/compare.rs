//! Whether two directories hold the same files.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

/// Fails unless `copy` has exactly the files of `original`, byte for byte and with their modes.
/// Links to parents are not compared: a copy may have its parent elsewhere.
pub(crate) fn same_files(original: &Path, copy: &Path) -> Result<()> {
    let (wanted, found) = (files(original)?, files(copy)?);
    let names = |files: &BTreeMap<String, u32>| files.keys().cloned().collect::<Vec<_>>();
    ensure!(
        names(&wanted) == names(&found),
        "{} has other files than {}: {:?} and {:?}",
        copy.display(),
        original.display(),
        names(&found),
        names(&wanted)
    );
    for (name, mode) in wanted {
        ensure!(
            found[&name] == mode,
            "{name} has mode {:o}, not {mode:o}",
            found[&name]
        );
        same_bytes(&original.join(&name), &copy.join(&name))
            .with_context(|| format!("copy of {name}"))?;
    }
    Ok(())
}

fn files(directory: &Path) -> Result<BTreeMap<String, u32>> {
    let mut files = BTreeMap::new();
    for entry in
        fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?
    {
        let entry = entry?;
        let meta = entry.metadata()?;
        if meta.is_file() {
            files.insert(
                entry.file_name().to_string_lossy().into_owned(),
                meta.permissions().mode() & 0o7777,
            );
        }
    }
    Ok(files)
}

fn same_bytes(one: &Path, other: &Path) -> Result<()> {
    let (mut one, mut other) = (File::open(one)?, File::open(other)?);
    ensure!(
        one.metadata()?.len() == other.metadata()?.len(),
        "sizes differ"
    );
    let (mut left, mut right) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut offset = 0;
    loop {
        let count = one.read(&mut left)?;
        if count == 0 {
            return Ok(());
        }
        other.read_exact(&mut right[..count])?;
        if left[..count] != right[..count] {
            bail!("bytes differ after offset {offset}");
        }
        offset += count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch;

    #[test]
    fn one_changed_byte_is_found() {
        let scratch = scratch::for_tests("compare");
        for name in ["a", "b"] {
            fs::create_dir_all(scratch.join(name)).expect("create");
            fs::write(scratch.join(name).join("x.img"), [7; 5000]).expect("write");
        }
        same_files(&scratch.join("a"), &scratch.join("b")).expect("equal");
        let mut bytes = [7; 5000];
        bytes[4999] = 8;
        fs::write(scratch.join("b/x.img"), bytes).expect("write");
        assert!(same_files(&scratch.join("a"), &scratch.join("b")).is_err());
        fs::remove_dir_all(&scratch).expect("remove");
    }
}
