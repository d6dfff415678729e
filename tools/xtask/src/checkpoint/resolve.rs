//! The memory that an image directory stands for, with parents followed: slow and obvious.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use super::generate::PAGE_BYTES;

/// The content is in the parent directory.
pub(crate) const PARENT: u64 = 1;
/// The content is in the pages file.
pub(crate) const PRESENT: u64 = 4;
/// More parents than any set of the tests has.
const MAX_DEPTH: usize = 64;

type Digest = [u8; 32];
type Pages = BTreeMap<u64, Digest>;

/// Digest of every page, by pagemap and address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Memory(BTreeMap<String, Pages>);

impl FromIterator<(String, Pages)> for Memory {
    fn from_iter<T: IntoIterator<Item = (String, Pages)>>(iterator: T) -> Self {
        Self(iterator.into_iter().collect())
    }
}

impl Memory {
    /// How many pages there are.
    pub(crate) fn pages(&self) -> usize {
        self.0.values().map(BTreeMap::len).sum()
    }

    /// Fails with the first place where restored processes would see other memory. Pages of zeros
    /// may be left out of an image.
    pub(crate) fn ensure_same(&self, other: &Self) -> Result<()> {
        let (mine, theirs) = (self.without_zeros(), other.without_zeros());
        for (name, pages) in &mine {
            let found = theirs
                .get(name)
                .with_context(|| format!("{name} is missing"))?;
            for (address, digest) in pages {
                match found.get(address) {
                    Some(other) if other == digest => {}
                    Some(_) => bail!("{name}: page at {address:#x} differs"),
                    None => bail!("{name}: page at {address:#x} is missing"),
                }
            }
            if let Some(address) = found.keys().find(|address| !pages.contains_key(address)) {
                bail!("{name}: page at {address:#x} should not be there");
            }
        }
        ensure!(
            mine.len() == theirs.len(),
            "there are more pagemaps than there should be"
        );
        Ok(())
    }

    fn without_zeros(&self) -> BTreeMap<&str, Pages> {
        let zero = *blake3::hash(&[0; PAGE_BYTES]).as_bytes();
        let filled = |pages: &Pages| -> Pages {
            pages
                .iter()
                .filter(|(_, digest)| **digest != zero)
                .map(|(&at, &digest)| (at, digest))
                .collect()
        };
        self.0
            .iter()
            .map(|(name, pages)| (name.as_str(), filled(pages)))
            .collect()
    }
}

/// Reads all memory of `directory`.
pub(crate) fn resolve(directory: &Path) -> Result<Memory> {
    let mut memory = BTreeMap::new();
    for file in
        fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?
    {
        let name = file?.file_name().to_string_lossy().into_owned();
        if name.starts_with("pagemap-") && name.ends_with(".img") {
            let pages = pages_of(directory, &name, 0)?;
            memory.insert(name, pages);
        }
    }
    Ok(Memory(memory))
}

fn pages_of(directory: &Path, pagemap: &str, depth: usize) -> Result<Pages> {
    let file = directory.join(pagemap);
    let place = || file.display().to_string();
    ensure!(depth <= MAX_DEPTH, "{}: too many parents", place());
    let (pages_id, entries) = read_pagemap(&file).with_context(place)?;
    let parent = match entries.iter().any(|entry| entry.flags & PARENT != 0) {
        true => pages_of(&directory.join("parent"), pagemap, depth + 1)?,
        false => Pages::new(),
    };
    let data = directory.join(format!("pages-{pages_id}.img"));
    let mut data = BufReader::with_capacity(
        1 << 20,
        File::open(&data).with_context(|| data.display().to_string())?,
    );
    let mut pages = Pages::new();
    for entry in entries {
        for number in 0..entry.pages {
            let address = entry.address + number * PAGE_BYTES as u64;
            let digest = if entry.flags & PARENT != 0 {
                *parent
                    .get(&address)
                    .with_context(|| format!("{}: parent lacks page {address:#x}", place()))?
            } else {
                let mut page = [0; PAGE_BYTES];
                data.read_exact(&mut page)
                    .with_context(|| format!("{}: pages file is too short", place()))?;
                *blake3::hash(&page).as_bytes()
            };
            pages.insert(address, digest);
        }
    }
    Ok(pages)
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    address: u64,
    pages: u64,
    flags: u64,
}

fn read_pagemap(file: &Path) -> Result<(u64, Vec<Entry>)> {
    let mut input = BufReader::new(File::open(file)?);
    // Common magic and type magic.
    input.seek(SeekFrom::Start(8))?;
    let head = fields(&next_record(&mut input)?.context("no head")?)?;
    let mut entries = Vec::new();
    while let Some(record) = next_record(&mut input)? {
        let fields = fields(&record)?;
        let field = |number: u64| fields.get(&number).copied();
        let flags = field(4).unwrap_or(if field(3) == Some(1) { PARENT } else { PRESENT });
        entries.push(Entry {
            address: field(1).context("an entry without address")?,
            pages: field(5).or(field(2)).context("an entry without count")?,
            flags,
        });
    }
    Ok((head.get(&1).copied().context("no pages id")?, entries))
}

fn next_record(input: &mut impl Read) -> Result<Option<Vec<u8>>> {
    let mut size = [0; 4];
    if input.read(&mut size[..1])? == 0 {
        return Ok(None);
    }
    input.read_exact(&mut size[1..])?;
    let mut record = Vec::new();
    let wanted = u64::from(u32::from_le_bytes(size));
    let found = input.take(wanted).read_to_end(&mut record)?;
    ensure!(found as u64 == wanted, "a record is cut off");
    Ok(Some(record))
}

/// The integer fields of a message that has no others.
fn fields(mut bytes: &[u8]) -> Result<BTreeMap<u64, u64>> {
    let mut fields = BTreeMap::new();
    while !bytes.is_empty() {
        let tag = varint(&mut bytes)?;
        ensure!(tag & 7 == 0, "field {} is no integer", tag >> 3);
        let value = varint(&mut bytes)?;
        fields.insert(tag >> 3, value);
    }
    Ok(fields)
}

fn varint(bytes: &mut &[u8]) -> Result<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first().context("a number is cut off")?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Ok(value);
        }
    }
    bail!("a number has too many digits")
}

#[cfg(test)]
mod tests {
    use super::super::Synthetic;
    use super::*;
    use crate::scratch;

    #[test]
    fn generated_dump_has_the_memory_that_it_should() {
        let scratch = scratch::for_tests("resolve");
        let mut process = Synthetic::mixed(1000, 1);
        process.dump(&scratch.join("1")).expect("dump");
        let first = resolve(&scratch.join("1")).expect("resolve");
        assert_eq!(first, process.memory());
        assert_eq!(first.pages(), 1000);

        assert_eq!(process.change(3, 100), 10);
        process.dump(&scratch.join("2")).expect("dump");
        let second = resolve(&scratch.join("2")).expect("resolve");
        assert!(second.ensure_same(&first).is_err());
        second.ensure_same(&process.memory()).expect("same");
        fs::remove_dir_all(&scratch).expect("remove");
    }

    #[test]
    fn pages_in_parents_are_found() {
        let scratch = scratch::for_tests("chain");
        let first = Synthetic::mixed(500, 3);
        first.dump(&scratch.join("1")).expect("dump");
        let mut second = first.clone();
        second.change(1, 50);
        second
            .dump_onto(&scratch.join("2"), Some((&first, "1")))
            .expect("dump");
        let mut third = second.clone();
        third.change(2, 50);
        third
            .dump_onto(&scratch.join("3"), Some((&second, "2")))
            .expect("dump");
        assert_eq!(
            resolve(&scratch.join("3")).expect("resolve"),
            third.memory()
        );
        let private = fs::metadata(scratch.join("3/pages-2.img"))
            .expect("pages")
            .len();
        assert_eq!(
            private,
            9 * PAGE_BYTES as u64,
            "438 private pages, one in 50 written"
        );
        fs::remove_file(scratch.join("2/parent")).expect("remove");
        assert!(resolve(&scratch.join("3")).is_err());
        fs::remove_dir_all(&scratch).expect("remove");
    }

    #[test]
    fn short_pages_file_is_found() {
        let scratch = scratch::for_tests("short");
        Synthetic::mixed(200, 2).dump(&scratch).expect("dump");
        let file = File::options()
            .write(true)
            .open(scratch.join("pages-2.img"))
            .expect("open");
        file.set_len(4096).expect("cut");
        let error = resolve(&scratch).expect_err("the file is cut");
        assert!(format!("{error:#}").contains("too short"), "{error:#}");
        fs::remove_dir_all(&scratch).expect("remove");
    }
}
