//! The source's side: CRIU's memory leaves here.

use std::collections::VecDeque;
use std::time::Instant;

use super::super::{Liveness, SessionError, SourceConfig};
use crate::delta::Known;
use crate::image::PagemapName;
use crate::wire::{
    Generation, Hello, Message, PAGES_VERSION, PagesHeld, PagesOffer, PagesOffered, PagesStep,
    PagesStored, Welcome, limits,
};

/// What the destination holds, for the dump to build on.
#[derive(Debug)]
pub struct PagesBase {
    /// The generation; `None`: nothing is held.
    pub generation: Option<Generation>,
    /// No dump was lost since: CRIU may leave out what did not change.
    pub continues: bool,
    /// Its pages, where they were listed; `None`: those that the source knows.
    pub listed: Option<Known>,
}

/// What the driver has to do.
#[derive(Debug)]
pub enum PagesSourceCommand {
    /// Put this message on the control stream.
    Send(Message),
    /// Everything is known: the dump may begin. Say [`PagesSource::ended`] before its end.
    Begin(PagesBase),
    /// The destination has stored it; close.
    Stored(PagesStored),
}

#[derive(Debug)]
enum State {
    AwaitWelcome,
    AwaitOffered,
    Listing(Box<Listing>),
    Streaming,
    AwaitStored,
    Done,
}

#[derive(Debug)]
struct Listing {
    offered: PagesOffered,
    known: Known,
    pages: u64,
    // The memory that was listed last, and the first page behind what was listed of it.
    reached: Option<(PagemapName, u64)>,
}

/// State machine of the host whose CRIU dumps.
#[derive(Debug)]
pub struct PagesSource {
    config: SourceConfig,
    offer: PagesOffer,
    state: State,
    commands: VecDeque<PagesSourceCommand>,
    liveness: Liveness,
}

impl PagesSource {
    /// Offers a dump.
    pub fn new(config: SourceConfig, offer: PagesOffer, now: Instant) -> Self {
        let hello = Hello {
            versions: (PAGES_VERSION, PAGES_VERSION),
            software: config.software.clone(),
            ticket_proof: config.ticket_proof,
        };
        Self {
            config,
            offer,
            state: State::AwaitWelcome,
            commands: VecDeque::from([PagesSourceCommand::Send(Message::Hello(hello))]),
            liveness: Liveness::new(now),
        }
    }

    /// What the driver has to do next.
    pub fn poll_command(&mut self) -> Option<PagesSourceCommand> {
        self.commands.pop_front()
    }

    /// When `handle_timeout` wants to be called.
    pub fn poll_timeout(&self) -> Instant {
        self.liveness.next()
    }

    /// The time that `poll_timeout` named has come.
    pub fn handle_timeout(&mut self, now: Instant) -> Result<(), SessionError> {
        if self.liveness.check(now)? {
            self.send(Message::Working);
        }
        Ok(())
    }

    /// A control message arrived.
    pub fn handle_message(&mut self, now: Instant, message: Message) -> Result<(), SessionError> {
        self.liveness.heard = now;
        let state = std::mem::replace(&mut self.state, State::Done);
        self.state = match (state, message) {
            (_, Message::Failure(failure)) => return Err(SessionError::Peer(failure)),
            (state, Message::Working) => state,
            (State::AwaitWelcome, Message::Welcome(welcome)) => self.welcomed(&welcome)?,
            (State::AwaitOffered, Message::Pages(PagesStep::Offered(offered))) => {
                self.offered(offered)?
            }
            (State::Listing(listing), Message::Pages(PagesStep::Held(held))) => {
                self.listed(listing, &held)?
            }
            (State::AwaitStored, Message::Pages(PagesStep::Stored(stored))) => {
                self.commands.push_back(PagesSourceCommand::Stored(stored));
                State::Done
            }
            _ => return Err(SessionError::Protocol("a message out of order")),
        };
        Ok(())
    }

    /// All of the dump but its end is on the stream, and that follows now.
    pub fn ended(&mut self) {
        if matches!(self.state, State::Streaming) {
            self.state = State::AwaitStored;
        }
    }

    fn welcomed(&mut self, welcome: &Welcome) -> Result<State, SessionError> {
        if welcome.version != PAGES_VERSION {
            return Err(SessionError::Version {
                ours: PAGES_VERSION.to_string(),
                theirs: welcome.version.to_string(),
            });
        }
        if self.config.expected_proof.is_some()
            && welcome.ticket_proof != self.config.expected_proof
        {
            return Err(SessionError::Ticket);
        }
        let offer = PagesStep::Offer(self.offer.clone());
        self.send(Message::Pages(offer));
        Ok(State::AwaitOffered)
    }

    fn offered(&mut self, offered: PagesOffered) -> Result<State, SessionError> {
        let is_known = offered.generation == self.offer.known;
        match offered.generation {
            Some(_) if offered.listed => Ok(State::Listing(Box::new(Listing {
                offered,
                known: Known::new(self.offer.page_size),
                pages: 0,
                reached: None,
            }))),
            // What it holds must be known here, or be listed.
            Some(_) if !is_known => Err(SessionError::Protocol("pages that were not listed")),
            None if offered.listed || offered.continues => {
                Err(SessionError::Protocol("pages of no generation"))
            }
            generation => {
                let listed = generation
                    .is_none()
                    .then(|| Known::new(self.offer.page_size));
                Ok(self.begin(offered, listed))
            }
        }
    }

    fn listed(
        &mut self,
        mut listing: Box<Listing>,
        held: &PagesHeld,
    ) -> Result<State, SessionError> {
        let order = SessionError::Protocol("pages that are listed out of order");
        let mut next = match listing.reached {
            Some((memory, next)) if memory == held.memory => next,
            Some((memory, _)) if memory > held.memory => return Err(order),
            _ => 0,
        };
        let (object, is_new) = listing.known.object(held.memory);
        if is_new && object >= limits::OBJECTS {
            return Err(SessionError::Protocol("too many memories"));
        }
        for run in &held.runs {
            if run.first < next {
                return Err(order);
            }
            listing.known.hold(object, run.first, &run.digests);
            next = run.first + run.digests.len() as u64;
            listing.pages += run.digests.len() as u64;
        }
        if listing.pages > limits::HELD_PAGES {
            return Err(SessionError::Protocol("more pages than can be listed"));
        }
        listing.reached = Some((held.memory, next));
        if !held.last {
            return Ok(State::Listing(listing));
        }
        let Listing { offered, known, .. } = *listing;
        Ok(self.begin(offered, Some(known)))
    }

    fn begin(&mut self, offered: PagesOffered, listed: Option<Known>) -> State {
        self.commands
            .push_back(PagesSourceCommand::Begin(PagesBase {
                generation: offered.generation,
                continues: offered.continues,
                listed,
            }));
        State::Streaming
    }

    fn send(&mut self, message: Message) {
        self.commands.push_back(PagesSourceCommand::Send(message));
    }
}
