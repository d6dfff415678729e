//! Making room for a set, and storing it when it has arrived.

use std::sync::Arc;

use super::Shared;
use super::serve::{Input, is_out_of_space};
use super::staged::Staged;
use crate::delta::FileMeta;
use crate::digest::Digest;
use crate::image::FileKind;
use crate::session::StoreJob;
use crate::store::{Held, NewSet, PAGES_STATE, Record};
use crate::transfer::TransferError;
use crate::transfer::assemble::Assembler;
use crate::transfer::event::Received;
use crate::wire::{BeginSet, Layout, Published};

// Removes what the set that was just stored has made superfluous.
fn tidy(shared: &Shared, peer: [u8; 32], begin: &BeginSet) {
    let name = begin.name.as_str();
    let mut tidied = shared.store.drop_partials(&peer, name);
    // An ancestor takes nobody's name; what can go is found when the last set has come.
    if !begin.ancestor {
        tidied = tidied.and_then(|()| shared.store.tidy(Some(name), shared.keep));
    }
    if let Err(error) = tidied {
        tracing::warn!("{error}; old generations stay");
    }
}

// Makes room, unless the set is there already.
pub(super) fn prepare_set(
    shared: &Shared,
    peer: [u8; 32],
    begin: &BeginSet,
    files: Vec<FileMeta>,
) -> Result<Input, TransferError> {
    if let Some(root) = begin.root
        && let Some(done) = unchanged(shared, peer, begin, root)?
    {
        return Ok(Input::Stored(Box::new(done)));
    }
    let (staged, held) = Staged::prepare(shared, &peer, begin, files)?;
    Ok(Input::Prepared {
        staged: Arc::new(staged),
        held: Arc::new(held),
    })
}

// Assembles and publishes. Runs on a thread of its own.
pub(super) fn store_set(
    shared: &Shared,
    peer: [u8; 32],
    job: &StoreJob,
    staged: Arc<Staged>,
    held: Arc<Held>,
) -> Result<(Published, Received), TransferError> {
    let begin = &job.begin;
    let root = job.manifest.root();
    let name = (!begin.ancestor).then(|| begin.name.to_string());
    if let Some(done) = unchanged(shared, peer, begin, root)? {
        staged.discard();
        drop(held);
        tidy(shared, peer, begin);
        return Ok(done);
    }
    // Ancestors of a flat set are only read from: keep them small.
    let layout = match shared.layout {
        Layout::Flat if begin.ancestor => Layout::Incremental,
        layout => layout,
    };
    let assembler = Assembler {
        store: &shared.store,
        held: &held,
        peer,
        job,
        layout,
        directory: staged.directory.clone(),
        pages: pages_to_complete(shared, peer, job)?,
    };
    let assembled = assembler.assemble().inspect_err(|error| {
        if is_out_of_space(error) {
            staged.discard();
        }
    })?;
    let completeness = assembled.completeness.word();
    let stage = staged.take_stage().ok_or(TransferError::Cancelled)?;
    // A page session that is open builds on what is there now, or has lost it.
    let order = shared.offers.lock();
    let is_tracked = |id| !order.has_any(begin.name.as_str()) && shared.store.is_tracked(id);
    let keep_link = job
        .manifest
        .parent
        .as_ref()
        .map(|parent| parent.link.clone());
    let new = NewSet {
        name: name.clone(),
        peer,
        names_are_owned: shared.pinned,
        root,
        layout,
        page_size: job.manifest.page_size,
        completeness: completeness.to_owned(),
        base: assembled.base,
        keep_link: keep_link
            .filter(|_| layout == Layout::Faithful && assembled.completes.is_none()),
        image_bytes: begin.total_bytes,
        succeeds: assembled.completes,
        tracked: assembled.completes.is_some_and(is_tracked),
    };
    let digests = assembled.all_digests(&job.recipe);
    let published = shared
        .store
        .publish(stage, new, &assembled.files, digests)?;
    drop(order);
    drop(held);
    tidy(shared, peer, begin);
    let path = shared
        .store
        .directory_of(&published.record)
        .unwrap_or_default();
    let mut received = Received {
        name: name.unwrap_or_default(),
        path: if begin.ancestor {
            path
        } else {
            shared.store.root().join(begin.name.as_str())
        },
        generation: published.record.generation,
        layout,
        base: published.base,
        completeness: completeness.to_owned(),
        unchanged: false,
        image_bytes: begin.total_bytes,
        notes: published.notes,
    };
    if let (Some(base), true) = (&begin.base_name, layout != Layout::Incremental) {
        let layout = layout.as_str();
        let note = format!("--base {base} has no effect: this destination stores {layout} sets");
        received.notes.push(note);
    }
    if let Some(note) = assembled.note {
        received.notes.push(note);
    }
    Ok((to_published(begin.set, &received), received))
}

// What arrives has no memory, and its name has nothing else yet: they are one dump.
fn pages_to_complete(
    shared: &Shared,
    peer: [u8; 32],
    job: &StoreJob,
) -> Result<Option<Record>, TransferError> {
    let is_memory = |meta: &FileMeta| {
        meta.is_pages() || matches!(FileKind::of(meta.name.as_str()), FileKind::Pagemap(_))
    };
    if job.begin.ancestor || job.recipe.files().any(is_memory) {
        return Ok(None);
    }
    let current = shared.store.current(job.begin.name.as_str())?;
    Ok(current.filter(|record| record.peer == peer && record.completeness == PAGES_STATE))
}

// The set with this root is there under this name already, in this layout.
fn unchanged(
    shared: &Shared,
    peer: [u8; 32],
    begin: &BeginSet,
    root: Digest,
) -> Result<Option<(Published, Received)>, TransferError> {
    let rebased = shared.layout == Layout::Incremental && begin.base_name.is_some();
    if begin.ancestor || rebased {
        return Ok(None);
    }
    let current = shared.store.current(begin.name.as_str())?;
    let records = shared.store.records()?;
    let same = current.filter(|record| {
        record.peer == peer
            && record.root == root
            && record.layout == shared.layout
            && shared.store.is_sound(record, &records)
    });
    let Some(record) = same else { return Ok(None) };
    let base = record.base.map(|id| shared.store.name_of(id)).transpose()?;
    let received = Received {
        name: record.name.clone(),
        path: shared.store.root().join(begin.name.as_str()),
        generation: record.generation,
        layout: record.layout,
        base,
        completeness: record.completeness,
        unchanged: true,
        image_bytes: record.image_bytes,
        notes: Vec::new(),
    };
    Ok(Some((to_published(begin.set, &received), received)))
}

fn to_published(set: u32, received: &Received) -> Published {
    Published {
        set,
        name: received.name.clone(),
        generation: received.generation,
        layout: received.layout,
        base: received.base.clone(),
        completeness: received.completeness.clone(),
        unchanged: received.unchanged,
        notes: received.notes.clone(),
    }
}
