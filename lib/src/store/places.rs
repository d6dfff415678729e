//! Staging, publishing, superseding and removing sets.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crxfer_proto::v1;
use prost::Message as _;
use rustix::fs::{CWD, RenameFlags};

use super::error::{StoreError, Tried};
use super::record::write_atomically;
use super::{Index, Record, Store, directory_id};
use crate::delta::FileMeta;
use crate::digest::Digest;
use crate::page::PageSize;
use crate::wire::Layout;

/// A place where a set is put together before it is published.
#[derive(Debug)]
pub struct Stage {
    place: PathBuf,
}

impl Stage {
    pub(super) fn at(place: &Path) -> Self {
        Self {
            place: place.to_owned(),
        }
    }

    /// The directory that will be published.
    pub fn files(&self) -> PathBuf {
        self.place.join("files")
    }
}

/// What publishing needs to know of a set.
#[derive(Debug)]
pub struct NewSet {
    /// Its name, or `None` for an ancestor that is taken along.
    pub name: Option<String>,
    /// Fingerprint of the key that sent it.
    pub peer: [u8; 32],
    /// Only the peer that sent the name's set before may send the next.
    pub names_are_owned: bool,
    /// Root digest that the source stated.
    pub root: Digest,
    /// How it is laid out.
    pub layout: Layout,
    /// Page size of the host that dumped it.
    pub page_size: PageSize,
    /// Whether CRIU could restore it, in a word.
    pub completeness: String,
    /// The set that it builds on.
    pub base: Option<u64>,
    /// Link text to keep if it leads to the base as it is.
    pub keep_link: Option<String>,
    /// Size of the source's files.
    pub image_bytes: u64,
    /// The set that must still have the name, where this one takes over what that holds.
    pub succeeds: Option<u64>,
    /// It holds the dump that the kernel tracks changes from: see [`Store::is_tracked`].
    pub tracked: bool,
}

/// A set that is visible now.
#[derive(Debug)]
pub struct PublishedSet {
    /// What is remembered of it.
    pub record: Record,
    /// Name or number of the set it builds on.
    pub base: Option<String>,
    /// What the operator should know.
    pub notes: Vec<String>,
}

impl Store {
    /// Opens a stage for a transfer of the set `name` from `peer`.
    pub fn stage(
        &self,
        peer: &[u8; 32],
        name: &str,
        page_size: PageSize,
    ) -> Result<Stage, StoreError> {
        let about = v1::PartialRecord {
            peer: peer.to_vec(),
            name: name.to_owned(),
            page_size: page_size.bytes(),
        };
        self.new_stage(Some(&about))
    }

    /// Opens a stage of which nothing is kept where it is not published: what was dumped into it is
    /// dumped anew.
    pub fn stage_unkept(&self) -> Result<Stage, StoreError> {
        self.new_stage(None)
    }

    // Without `about` it is removed by whoever finds it.
    fn new_stage(&self, about: Option<&v1::PartialRecord>) -> Result<Stage, StoreError> {
        let stages = self.state_path("stage");
        for number in 1u64.. {
            let place = stages.join(number.to_string());
            match fs::DirBuilder::new().mode(0o700).create(&place) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                other => other.tried("create", &place)?,
            }
            if let Some(about) = about {
                write_atomically(&place.join("about"), &about.encode_to_vec(), false)?;
            }
            let files = place.join("files");
            fs::DirBuilder::new()
                .mode(0o700)
                .create(&files)
                .tried("create", &files)?;
            return Ok(Stage { place });
        }
        unreachable!("some number is free")
    }

    /// Keeps what has arrived for the next attempt.
    pub fn abandon(&self, stage: Stage) -> Result<(), StoreError> {
        if !holds_bytes(&stage.files()) {
            return remove_tree(&stage.place);
        }
        remove_all_but(&stage.place, &["about", "files"])?;
        let partials = self.state_path("partial");
        for number in 1u64.. {
            let place = partials.join(number.to_string());
            match rustix::fs::renameat_with(CWD, &stage.place, CWD, &place, RenameFlags::NOREPLACE)
            {
                Err(rustix::io::Errno::EXIST) => {}
                other => return other.tried("rename", &stage.place),
            }
        }
        unreachable!("some number is free")
    }

    /// Lets the next attempt use what has arrived in stages of the same transfer that nobody has
    /// given up yet: a source that was killed is only missed after a while.
    ///
    /// The files become one more unfinished transfer by hard links. If its writer does live and
    /// writes on, its blocks are simply others than their digests say, which is found when they
    /// are copied.
    pub fn adopt_stages(&self, peer: &[u8; 32], name: &str) -> Result<(), StoreError> {
        let stages = self.state_path("stage");
        for entry in fs::read_dir(&stages).tried("list", &stages)? {
            let stage = Stage::at(&entry.tried("list", &stages)?.path());
            let about = fs::read(stage.place.join("about")).ok();
            let about = about.and_then(|bytes| v1::PartialRecord::decode(&*bytes).ok());
            let same = about.is_some_and(|about| about.peer == peer && about.name == name);
            if same && holds_bytes(&stage.files()) {
                let copy = self.stage(peer, name, PageSize::of_host())?;
                link_files(&stage, &copy)?;
                self.abandon(copy)?;
            }
        }
        Ok(())
    }

    /// Removes a stage with all that is in it.
    pub fn discard(&self, stage: Stage) -> Result<(), StoreError> {
        remove_tree(&stage.place)
    }

    /// Makes the staged files visible as a set, in one step.
    ///
    /// `files` and `digests` describe what lies in the stage, for the index. Everything is synced
    /// before the switch where the place is durable. After an error nothing is visible, and what
    /// arrived is kept for the next attempt, unless that would keep the disk full.
    pub fn publish(
        &self,
        stage: Stage,
        new: NewSet,
        files: &[FileMeta],
        digests: impl Iterator<Item = Digest>,
    ) -> Result<PublishedSet, StoreError> {
        let _lock = self.lock()?;
        let (published, old) = match self.switch(&stage, &new, files, digests) {
            Ok(switched) => switched,
            Err(error) => {
                if let Err(second) = self.recover_stage(&stage.place, !error.is_out_of_space()) {
                    tracing::warn!("{second}; what arrived will be sent again");
                }
                return Err(error);
            }
        };
        // The set is visible: whatever goes wrong from here on is made good by the next `serve`.
        if let Err(error) = self.put_away(&stage, old) {
            tracing::warn!("{error}; the set is published, the next `crxfer recv` tidies up");
        }
        Ok(published)
    }

    // Up to and with the step that makes the set visible; with the record that had the name.
    pub(super) fn switch(
        &self,
        stage: &Stage,
        new: &NewSet,
        files: &[FileMeta],
        digests: impl Iterator<Item = Digest>,
    ) -> Result<(PublishedSet, Option<Record>), StoreError> {
        let records = self.records()?;
        let current = match &new.name {
            Some(name) => self.check_name(name, &new.peer, new.names_are_owned, &records)?,
            None => None,
        };
        if let (Some(id), Some(name)) = (new.succeeds, &new.name)
            && current.as_ref().map(|record| record.id) != Some(id)
        {
            return Err(StoreError::Overtaken(name.clone()));
        }
        let mut notes = Vec::new();
        let base = new
            .base
            .map(|base| self.link_base(stage, new, base, &records, &mut notes))
            .transpose()?;
        self.sync_dir(&stage.files())?;

        let record = self.remember(stage, new, current.as_ref(), &records, files, digests)?;
        match (&new.name, &current) {
            (None, _) => self.move_in(&stage.files(), &self.base_path(record.id))?,
            (Some(name), None) => self.move_in(&stage.files(), &self.root.join(name))?,
            (Some(name), Some(old)) => {
                self.release_name(old, &mut notes)?;
                let place = self.root.join(name);
                rustix::fs::renameat_with(CWD, stage.files(), CWD, &place, RenameFlags::EXCHANGE)
                    .tried("switch", &place)?;
                self.sync_dir(&self.root)?;
            }
        }
        let published = PublishedSet {
            record,
            base,
            notes,
        };
        Ok((published, current))
    }

    fn put_away(&self, stage: &Stage, old: Option<Record>) -> Result<(), StoreError> {
        if let Some(old) = old {
            self.supersede(old, &stage.files())?;
        }
        remove_tree(&stage.place)
    }

    /// Whether a set of this peer may be published under that name. Asked before anything is sent,
    /// and again when it is published.
    pub fn check_may_publish(
        &self,
        name: &str,
        peer: &[u8; 32],
        names_are_owned: bool,
    ) -> Result<(), StoreError> {
        self.check_name(name, peer, names_are_owned, &self.records()?)
            .map(|_| ())
    }

    /// Removes what nothing needs any more: superseded generations of `name` beyond the newest
    /// `keep`, and what was there only for others to build on. Sets that a transfer reads from
    /// stay until the next time.
    pub fn tidy(&self, name: Option<&str>, keep: u64) -> Result<(), StoreError> {
        let _lock = self.lock()?;
        self.collect(name, keep)
    }

    /// Removes the set with this name; its generation stays, unnamed, while others build on it.
    pub fn remove(&self, name: &str) -> Result<(), StoreError> {
        let _lock = self.lock()?;
        let mut record = self
            .current(name)?
            .ok_or_else(|| StoreError::NoSuchSet(name.to_owned()))?;
        self.release_name(&record, &mut Vec::new())?;
        let stage = self.stage(&record.peer, name, record.page_size)?;
        let named = self.root.join(name);
        let displaced = stage.files();
        fs::remove_dir(&displaced).tried("remove", &displaced)?;
        // Said first: what lies in a stage and is superseded is no transfer that was cut short.
        record.superseded = true;
        self.save(&record)?;
        fs::rename(&named, &displaced).tried("rename", &named)?;
        self.sync_dir(&self.root)?;
        self.supersede(record, &displaced)?;
        remove_tree(&stage.place)?;
        self.collect(Some(name), 0)
    }

    fn check_name(
        &self,
        name: &str,
        peer: &[u8; 32],
        names_are_owned: bool,
        records: &[Record],
    ) -> Result<Option<Record>, StoreError> {
        let place = self.root.join(name);
        if fs::symlink_metadata(&place).is_err() {
            return Ok(None);
        }
        let found = records
            .iter()
            .find(|record| Some(record.directory_id) == directory_id(&place));
        let record = found.ok_or(StoreError::Foreign(place))?;
        if names_are_owned && record.peer != *peer {
            return Err(StoreError::NotYours(name.to_owned()));
        }
        Ok(Some(record.clone()))
    }

    // Gives the staged set its `parent`: the text it had where that is right, else the place of
    // the set that it builds on.
    pub(super) fn link_base(
        &self,
        stage: &Stage,
        new: &NewSet,
        base: u64,
        records: &[Record],
        notes: &mut Vec<String>,
    ) -> Result<String, StoreError> {
        let record = records.iter().find(|record| record.id == base);
        let record = record.ok_or_else(|| StoreError::NoSuchSet(format!("number {base}")))?;
        let named = if record.superseded {
            String::new()
        } else {
            record.name.clone()
        };
        let shown = if named.is_empty() {
            format!("#{base}")
        } else {
            named.clone()
        };
        let link = stage.files().join("parent");
        let own_name = new.name.as_deref() == Some(named.as_str());
        let is_right = !named.is_empty()
            && !own_name
            && directory_id(&self.root.join(&named)) == Some(record.directory_id);
        // Names are beside named sets only: an ancestor goes to a place of its own.
        if let (Some(text), Some(_), true) = (&new.keep_link, &new.name, is_right)
            && *text == format!("../{named}")
        {
            symlink(text, &link).tried("create", &link)?;
            return Ok(shown);
        }
        self.pin(record, records)?;
        let text = match new.name {
            Some(_) => format!("../{}", self.place_text(base)),
            None => format!("../{base}"),
        };
        if let Some(was) = &new.keep_link {
            notes.push(format!(
                "the link `parent` was {was} and is now {text}: that is where its parent lies here"
            ));
        }
        symlink(&text, &link).tried("create", &link)?;
        Ok(shown)
    }

    fn place_text(&self, id: u64) -> String {
        format!("{}/base/{id}", super::STATE)
    }

    /// Makes sure that the set lies at its own place under `base`, with all that it builds on.
    fn pin(&self, record: &Record, records: &[Record]) -> Result<(), StoreError> {
        // From the oldest on, so that each clone's link leads to something.
        let mut chain = vec![record];
        while let Some(base) = chain.last().and_then(|record| record.base) {
            let Some(next) = records.iter().find(|record| record.id == base) else {
                break;
            };
            if chain.len() > crate::wire::limits::CHAIN {
                break;
            }
            chain.push(next);
        }
        for record in chain.into_iter().rev() {
            let place = self.base_path(record.id);
            if !place.is_dir() {
                let from = self
                    .directory_of(record)
                    .ok_or_else(|| StoreError::NoSuchSet(record.name.clone()))?;
                self.clone_by_links(&from, &place, record.base)?;
            }
        }
        Ok(())
    }

    // The same files once more, without their bytes. A set is never written again, so sharing is safe.
    fn clone_by_links(&self, from: &Path, to: &Path, base: Option<u64>) -> Result<(), StoreError> {
        let building = to.with_extension("new");
        if building.exists() {
            remove_tree(&building)?;
        }
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&building)
            .tried("create", &building)?;
        for entry in fs::read_dir(from).tried("list", from)? {
            let entry = entry.tried("list", from)?;
            let target = building.join(entry.file_name());
            // What others left in the directory (a restore's sockets, a folder of logs) is no part
            // of the set.
            if entry.file_type().tried("examine", &entry.path())?.is_file() {
                fs::hard_link(entry.path(), &target).tried("link", &entry.path())?;
            }
        }
        if let Some(base) = base {
            let link = building.join("parent");
            symlink(format!("../{base}"), &link).tried("create", &link)?;
        }
        self.sync_dir(&building)?;
        self.move_in(&building, to)
    }

    pub(super) fn remember(
        &self,
        stage: &Stage,
        new: &NewSet,
        current: Option<&Record>,
        records: &[Record],
        files: &[FileMeta],
        digests: impl Iterator<Item = Digest>,
    ) -> Result<Record, StoreError> {
        let named = |record: &&Record| new.name.as_deref() == Some(record.name.as_str());
        let last = records
            .iter()
            .filter(named)
            .map(|record| record.generation)
            .max();
        debug_assert!(current.is_none_or(|current| Some(current.generation) <= last));
        let record = Record {
            id: self.next_id()?,
            name: new.name.clone().unwrap_or_default(),
            generation: last.unwrap_or(0) + 1,
            peer: new.peer,
            root: new.root,
            layout: new.layout,
            page_size: new.page_size,
            completeness: new.completeness.clone(),
            base: new.base,
            created_unix_s: unix_time_s(),
            directory_id: directory_id(&stage.files()).unwrap_or(0),
            image_bytes: new.image_bytes,
            superseded: false,
        };
        let place = self.set_path(record.id);
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&place)
            .tried("create", &place)?;
        let written = self.write_set(&record, new.tracked, files, digests);
        if written.is_err() {
            let _ = remove_tree(&place);
        }
        written.map(|()| record)
    }

    fn write_set(
        &self,
        record: &Record,
        tracked: bool,
        files: &[FileMeta],
        digests: impl Iterator<Item = Digest>,
    ) -> Result<(), StoreError> {
        let place = self.set_path(record.id);
        if tracked {
            self.track(record.id)?;
        }
        let index = place.join("index");
        Index::write(&index, files, digests, self.durable).tried("write", &index)?;
        self.save(record)?;
        self.sync_dir(&place)?;
        self.sync_dir(&self.state_path("sets"))
    }

    // A number that no set has had: links and records name sets by it, and what was removed may
    // have left some behind.
    fn next_id(&self) -> Result<u64, StoreError> {
        let path = self.state_path("last-id");
        let mut last = match fs::read_to_string(&path) {
            Ok(text) => text.trim().parse().unwrap_or(0),
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error).tried("read", &path),
        };
        for part in ["sets", "base"] {
            let part = self.state_path(part);
            for entry in fs::read_dir(&part).tried("list", &part)? {
                let name = entry.tried("list", &part)?.path();
                let number = name
                    .file_stem()
                    .and_then(|name| name.to_str()?.parse().ok());
                last = last.max(number.unwrap_or(0));
            }
        }
        write_atomically(&path, (last + 1).to_string().as_bytes(), self.durable)?;
        Ok(last + 1)
    }

    pub(super) fn save(&self, record: &Record) -> Result<(), StoreError> {
        record.save(&self.set_path(record.id).join("record"), self.durable)
    }

    fn move_in(&self, from: &Path, to: &Path) -> Result<(), StoreError> {
        rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE)
            .tried("rename", from)?;
        self.sync_dir(to.parent().unwrap_or(&self.root))
    }

    // Sets whose link leads to the name get a link to the place that stays.
    pub(super) fn release_name(
        &self,
        record: &Record,
        notes: &mut Vec<String>,
    ) -> Result<(), StoreError> {
        let records = self.records()?;
        for user in records
            .iter()
            .filter(|user| user.base == Some(record.id) && !user.superseded)
        {
            let Some(user_directory) = self.named_directory(user) else {
                continue;
            };
            let link = user_directory.join("parent");
            let by_name =
                fs::read_link(&link).is_ok_and(|text| text == Path::new("..").join(&record.name));
            if !by_name {
                continue;
            }
            self.pin(record, &records)?;
            let text = format!("../{}", self.place_text(record.id));
            let new = self.state_path("link.new");
            let _ = fs::remove_file(&new);
            symlink(&text, &new).tried("create", &new)?;
            fs::rename(&new, &link).tried("rename", &new)?;
            self.sync_dir(&user_directory)?;
            notes.push(format!(
                "{}/parent is now {text}: the set {} has a new generation",
                user.name, record.name
            ));
        }
        Ok(())
    }

    // The directory of a set that lost its name: kept under `base` until `collect` decides.
    pub(super) fn supersede(&self, mut record: Record, displaced: &Path) -> Result<(), StoreError> {
        if !record.superseded {
            record.superseded = true;
            self.save(&record)?;
        }
        let place = self.base_path(record.id);
        if place.is_dir() {
            return remove_tree(displaced);
        }
        let link = displaced.join("parent");
        if fs::symlink_metadata(&link).is_ok() {
            fs::remove_file(&link).tried("remove", &link)?;
        }
        // Even where there was none: this may have been cut short right here before.
        if let Some(base) = record.base {
            self.pin_base_of(&record)?;
            symlink(format!("../{base}"), &link).tried("create", &link)?;
        }
        self.move_in(displaced, &place)
    }

    fn pin_base_of(&self, record: &Record) -> Result<(), StoreError> {
        let records = self.records()?;
        match records.iter().find(|base| Some(base.id) == record.base) {
            Some(base) => self.pin(base, &records),
            None => Ok(()),
        }
    }

    // Removes what has no name, is not to be kept, and carries nothing.
    pub(super) fn collect(&self, name: Option<&str>, keep: u64) -> Result<(), StoreError> {
        loop {
            let records = self.records()?;
            let newest = records
                .iter()
                .filter(|r| Some(r.name.as_str()) == name)
                .map(|r| r.generation)
                .max()
                .unwrap_or(0);
            let is_kept = |record: &Record| {
                Some(record.name.as_str()) != name
                    || record.generation.saturating_add(keep) >= newest && keep > 0
            };
            let is_base = |id: u64| records.iter().any(|record| record.base == Some(id));
            let garbage = records.iter().find(|record| {
                let unnamed = record.superseded && !is_kept(record) || self.is_orphan(record);
                unnamed && !is_base(record.id) && !self.is_in_use(&self.set_path(record.id))
            });
            let Some(record) = garbage else { break };
            self.remove_base(record.id)?;
            remove_tree(&self.set_path(record.id))?;
        }
        self.unpin_unused()
    }

    // An ancestor that carries nothing (any more), or a set whose directory is gone.
    fn is_orphan(&self, record: &Record) -> bool {
        let fresh = unix_time_s().saturating_sub(record.created_unix_s) < 24 * 3600;
        record.name.is_empty() && !fresh || self.directory_of(record).is_none()
    }

    fn unpin_unused(&self) -> Result<(), StoreError> {
        let records = self.records()?;
        for record in records
            .iter()
            .filter(|record| !record.superseded && !record.name.is_empty())
        {
            let is_base = records.iter().any(|other| other.base == Some(record.id));
            let named = directory_id(&self.root.join(&record.name)) == Some(record.directory_id);
            if named && !is_base && !self.is_in_use(&self.set_path(record.id)) {
                self.remove_base(record.id)?;
            }
        }
        Ok(())
    }

    // In one step: half a directory there would pass for the set.
    fn remove_base(&self, id: u64) -> Result<(), StoreError> {
        let place = self.base_path(id);
        let going = place.with_extension("new");
        if going.exists() {
            remove_tree(&going)?;
        }
        if !place.exists() {
            return Ok(());
        }
        fs::rename(&place, &going).tried("rename", &place)?;
        remove_tree(&going)
    }

    /// Removes the unfinished transfers of `peer` under `name`, which have been made good, except
    /// those that another transfer reads from; that one removes them in its turn.
    pub fn drop_partials(&self, peer: &[u8; 32], name: &str) -> Result<(), StoreError> {
        let _lock = self.lock()?;
        for (place, about) in self.partials(peer)? {
            if about.name == *name && !self.is_in_use(&place) {
                remove_tree(&place)?;
            }
        }
        Ok(())
    }

    /// The unfinished transfers of this peer, newest first.
    pub(super) fn partials(
        &self,
        peer: &[u8; 32],
    ) -> Result<Vec<(PathBuf, v1::PartialRecord)>, StoreError> {
        let path = self.state_path("partial");
        let mut found = Vec::new();
        for entry in fs::read_dir(&path).tried("list", &path)? {
            let place = entry.tried("list", &path)?.path();
            match read_about(&place) {
                Some(about) if about.peer == peer => found.push((place, about)),
                _ => {}
            }
        }
        found.sort_by_key(|(place, _)| std::cmp::Reverse(modified(place)));
        Ok(found)
    }
}

pub(super) fn read_about(place: &Path) -> Option<v1::PartialRecord> {
    let bytes = fs::read(place.join("about")).ok()?;
    v1::PartialRecord::decode(&*bytes).ok()
}

// Staged files have their full length from the start: what counts is what was written.
fn holds_bytes(files: &Path) -> bool {
    let Ok(mut entries) = fs::read_dir(files) else {
        return false;
    };
    entries.any(|entry| {
        entry
            .and_then(|entry| entry.metadata())
            .is_ok_and(|meta| meta.is_file() && meta.blocks() > 0)
    })
}

// Pages that were being written anew when the transfer ended.
fn remove_all_but(place: &Path, kept: &[&str]) -> Result<(), StoreError> {
    for entry in fs::read_dir(place).tried("list", place)? {
        let entry = entry.tried("list", place)?;
        if !kept.iter().any(|kept| entry.file_name() == *kept) {
            fs::remove_file(entry.path()).tried("remove", &entry.path())?;
        }
    }
    Ok(())
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|meta| meta.modified()).ok()
}

#[expect(
    clippy::disallowed_methods,
    reason = "the time of publishing is recorded, nothing is decided by it"
)]
fn unix_time_s() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

pub(super) fn remove_tree(path: &Path) -> Result<(), StoreError> {
    fs::remove_dir_all(path).tried("remove", path)
}

fn link_files(from: &Stage, to: &Stage) -> Result<(), StoreError> {
    let about = from.place.join("about");
    fs::copy(&about, to.place.join("about")).tried("copy", &about)?;
    let files = from.files();
    for entry in fs::read_dir(&files).tried("list", &files)? {
        let entry = entry.tried("list", &files)?;
        let path = entry.path();
        fs::hard_link(&path, to.files().join(entry.file_name())).tried("link", &path)?;
    }
    Ok(())
}
