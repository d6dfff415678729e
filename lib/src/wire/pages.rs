//! Messages of a page session: what CRIU sends to a page server becomes a set.

use crxfer_proto::v1;

use super::limits;
use super::message::{WireError, cut, text};
use crate::delta::SetName;
use crate::digest::Digest;
use crate::image::PagemapName;
use crate::page::PageSize;

/// A generation of a name, by its number and its root digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generation {
    /// Of the name, from 1.
    pub number: u64,
    /// Its root digest.
    pub root: Digest,
}

/// The memory of one dump would like to become the next generation of a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PagesOffer {
    /// Name of the set.
    pub name: SetName,
    /// Page size of the source.
    pub page_size: PageSize,
    /// The generation of which the source knows all digests.
    pub known: Option<Generation>,
}

/// What the destination holds under that name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagesOffered {
    /// The generation to build on.
    pub generation: Option<Generation>,
    /// Its pages are listed: the source does not know it.
    pub listed: bool,
    /// No dump for this name was lost since: CRIU may leave out what did not change.
    pub continues: bool,
}

/// Pages that follow one another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldRun {
    /// Number of the first page.
    pub first: u64,
    /// Of each page.
    pub digests: Vec<Digest>,
}

/// The next pages that the destination holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PagesHeld {
    /// Of which memory.
    pub memory: PagemapName,
    /// In ascending order.
    pub runs: Vec<HeldRun>,
    /// Nothing more is held.
    pub last: bool,
}

/// The dump is checked, stored and visible.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PagesStored {
    /// Generation of the name, from 1.
    pub generation: u64,
    /// Pages of the dump.
    pub pages: u64,
    /// Of these, pages that the generation before does not have at their place.
    pub fresh_pages: u64,
    /// Bytes of pages that were written for it.
    pub stored_bytes: u64,
    /// What the operator should know, a sentence each.
    pub notes: Vec<String>,
}

/// A step of a page session, on the control stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PagesStep {
    /// Source: a dump's memory would like to come.
    Offer(PagesOffer),
    /// Destination: what is held.
    Offered(PagesOffered),
    /// Destination: its pages, in as many messages as needed.
    Held(PagesHeld),
    /// Destination: all is stored.
    Stored(PagesStored),
}

impl PagesStep {
    pub(super) fn to_proto(&self) -> v1::Pages {
        use v1::pages::Step as Body;
        let step = match self {
            Self::Offer(offer) => {
                let (known_generation, known_root) = generation_out(offer.known);
                Body::Offer(v1::PagesOffer {
                    name: offer.name.to_string(),
                    page_size: offer.page_size.bytes(),
                    known_generation,
                    known_root,
                })
            }
            Self::Offered(offered) => {
                let (generation, root) = generation_out(offered.generation);
                Body::Offered(v1::PagesOffered {
                    generation,
                    root,
                    listed: offered.listed,
                    continues: offered.continues,
                })
            }
            Self::Held(held) => Body::Held(held.to_proto()),
            Self::Stored(stored) => Body::Stored(v1::PagesStored {
                generation: stored.generation,
                pages: stored.pages,
                fresh_pages: stored.fresh_pages,
                stored_bytes: stored.stored_bytes,
                notes: stored.notes.iter().map(|note| cut(note)).collect(),
            }),
        };
        v1::Pages { step: Some(step) }
    }

    pub(super) fn from_proto(pages: v1::Pages) -> Result<Self, WireError> {
        use v1::pages::Step as Body;
        Ok(match pages.step.ok_or(WireError::Unknown)? {
            Body::Offer(offer) => Self::Offer(PagesOffer {
                name: SetName::new(offer.name)?,
                page_size: PageSize::new(offer.page_size)?,
                known: generation_in(offer.known_generation, &offer.known_root)?,
            }),
            Body::Offered(offered) => Self::Offered(PagesOffered {
                generation: generation_in(offered.generation, &offered.root)?,
                listed: offered.listed,
                continues: offered.continues,
            }),
            Body::Held(held) => Self::Held(PagesHeld::from_proto(&held)?),
            Body::Stored(stored) => Self::Stored(PagesStored {
                generation: stored.generation,
                pages: stored.pages,
                fresh_pages: stored.fresh_pages,
                stored_bytes: stored.stored_bytes,
                notes: stored
                    .notes
                    .into_iter()
                    .take(limits::PHASES)
                    .map(text)
                    .collect::<Result<_, _>>()?,
            }),
        })
    }
}

const TASK: u32 = 1;
const SHMEM: u32 = 2;

impl PagesHeld {
    fn to_proto(&self) -> v1::PagesHeld {
        let (kind, id) = match self.memory {
            PagemapName::Task(pid) => (TASK, pid),
            PagemapName::Shmem(id) => (SHMEM, id),
        };
        let count = |run: &HeldRun| u32::try_from(run.digests.len());
        v1::PagesHeld {
            kind,
            id,
            first: self.runs.iter().map(|run| run.first).collect(),
            count: self
                .runs
                .iter()
                .map(|run| count(run).expect("made within a message's limit"))
                .collect(),
            digests: self
                .runs
                .iter()
                .flat_map(|run| &run.digests)
                .flat_map(|digest| digest.0)
                .collect(),
            last: self.last,
        }
    }

    fn from_proto(held: &v1::PagesHeld) -> Result<Self, WireError> {
        let memory = match held.kind {
            TASK => PagemapName::Task(held.id),
            SHMEM => PagemapName::Shmem(held.id),
            _ => return Err(WireError::Field("kind of memory")),
        };
        let (digests, rest) = held.digests.as_chunks::<32>();
        let bad = WireError::Field("list of pages");
        // Every page has its 32 bytes in the message: more of them are not made than were sent.
        let pages: u64 = held.count.iter().map(|&count| u64::from(count)).sum();
        let whole = rest.is_empty() && pages == digests.len() as u64;
        if !whole || held.first.len() != held.count.len() || held.count.contains(&0) {
            return Err(bad);
        }
        let mut left = digests;
        let mut next = 0;
        let mut runs = Vec::with_capacity(held.first.len());
        for (&first, &count) in held.first.iter().zip(&held.count) {
            let end = first.checked_add(count.into());
            if first < next || end.is_none_or(|end| end > limits::PAGES) {
                return Err(bad);
            }
            next = first + u64::from(count);
            let (digests, behind) = left.split_at(count as usize);
            left = behind;
            let digests = digests.iter().map(|&digest| Digest(digest)).collect();
            runs.push(HeldRun { first, digests });
        }
        Ok(Self {
            memory,
            runs,
            last: held.last,
        })
    }
}

fn generation_out(generation: Option<Generation>) -> (u64, Vec<u8>) {
    generation.map_or_else(Default::default, |it| (it.number, it.root.0.to_vec()))
}

fn generation_in(number: u64, root: &[u8]) -> Result<Option<Generation>, WireError> {
    match (number, root) {
        (0, []) => Ok(None),
        (0, _) => Err(WireError::Field("generation")),
        (number, root) => {
            let root = root.try_into().map(Digest);
            let root = root.map_err(|_| WireError::Field("root digest"))?;
            Ok(Some(Generation { number, root }))
        }
    }
}

/// Splits the pages of one memory into messages. A memory without pages takes one, too.
pub fn held_messages(memory: PagemapName, runs: Vec<HeldRun>) -> Vec<PagesHeld> {
    let mut messages = Vec::new();
    let (mut now, mut pages) = (Vec::new(), 0);
    for mut run in runs {
        while !run.digests.is_empty() {
            let room = limits::HELD_PAGES_PER_MESSAGE - pages;
            let behind = run.digests.split_off(run.digests.len().min(room));
            let (first, count) = (run.first, run.digests.len());
            pages += count;
            now.push(std::mem::replace(
                &mut run,
                HeldRun {
                    first: first + count as u64,
                    digests: behind,
                },
            ));
            if pages == limits::HELD_PAGES_PER_MESSAGE {
                messages.push(std::mem::take(&mut now));
                pages = 0;
            }
        }
    }
    if !now.is_empty() || messages.is_empty() {
        messages.push(now);
    }
    let message = |runs| PagesHeld {
        memory,
        runs,
        last: false,
    };
    messages.into_iter().map(message).collect()
}

#[cfg(test)]
mod tests {
    use super::super::Message;
    use super::*;

    fn run(first: u64, pages: usize) -> HeldRun {
        let digests = (0..pages as u64).map(|page| Digest::of(&(first + page).to_le_bytes()));
        HeldRun {
            first,
            digests: digests.collect(),
        }
    }

    #[test]
    fn a_long_listing_is_cut_into_messages_that_fit() {
        let most = limits::HELD_PAGES_PER_MESSAGE;
        let single: Vec<_> = (0..most as u64 + 3).map(|page| run(page * 2, 1)).collect();
        for runs in [vec![], vec![run(5, 1), run(9, 3 * most)], single] {
            let pages: Vec<_> = runs.iter().flat_map(|run| run.digests.clone()).collect();
            let messages = held_messages(PagemapName::Shmem(3), runs);
            let mut got = Vec::new();
            for held in messages {
                let message = Message::Pages(PagesStep::Held(held.clone()));
                let bytes = message.encode();
                assert!(bytes.len() <= limits::CONTROL_MESSAGE);
                assert_eq!(Message::decode(&bytes), Ok(message));
                got.extend(held.runs.into_iter().flat_map(|run| run.digests));
            }
            assert!(got == pages);
        }
    }

    #[test]
    fn listings_that_contradict_themselves_are_refused() {
        let good = PagesHeld {
            memory: PagemapName::Task(7),
            runs: vec![run(4, 2), run(9, 1)],
            last: true,
        };
        let proto = || good.to_proto();
        assert_eq!(PagesHeld::from_proto(&proto()), Ok(good.clone()));
        let change: [fn(&mut v1::PagesHeld); 7] = [
            |held| held.kind = 3,
            |held| held.digests.truncate(95),
            |held| held.digests.truncate(64),
            |held| held.count[1] = 0,
            |held| held.first[1] = 5,
            |held| held.first[1] = u64::MAX,
            |held| held.first.truncate(1),
        ];
        for change in change {
            let mut held = proto();
            change(&mut held);
            assert!(PagesHeld::from_proto(&held).is_err(), "{held:?}");
        }
    }

    #[test]
    fn a_generation_has_a_root_and_none_has_none() {
        assert!(generation_in(0, &[1; 32]).is_err());
        assert!(generation_in(1, &[]).is_err());
        assert_eq!(generation_in(0, &[]), Ok(None));
    }
}
