//! The destination's side: pages become a set here.

use std::collections::VecDeque;
use std::time::Instant;

use super::super::{Liveness, SessionError};
use crate::wire::{
    Generation, Message, PagesHeld, PagesOffer, PagesOffered, PagesStep, PagesStored,
};

/// What the driver has to do.
#[derive(Debug)]
pub enum PagesDestinationCommand {
    /// Put this message on the control stream.
    Send(Message),
    /// Store and publish; answer with [`PagesDestination::stored`].
    Store,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    // What is held is looked for.
    Preparing,
    Receiving,
    Storing,
    Done,
}

/// State machine of the host that pages come to. It begins with the source's offer.
#[derive(Debug)]
pub struct PagesDestination {
    offer: PagesOffer,
    state: State,
    begun: bool,
    commands: VecDeque<PagesDestinationCommand>,
    liveness: Liveness,
}

impl PagesDestination {
    /// The offer has arrived.
    pub fn new(offer: PagesOffer, now: Instant) -> Self {
        Self {
            offer,
            state: State::Preparing,
            begun: false,
            commands: VecDeque::new(),
            liveness: Liveness::new(now),
        }
    }

    /// What is offered.
    pub fn offer(&self) -> &PagesOffer {
        &self.offer
    }

    /// What the driver has to do next.
    pub fn poll_command(&mut self) -> Option<PagesDestinationCommand> {
        self.commands.pop_front()
    }

    /// When `handle_timeout` wants to be called.
    pub fn poll_timeout(&self) -> Instant {
        self.liveness.next()
    }

    /// Whether the source may leave now: all is stored, or nothing was begun.
    pub fn is_over(&self) -> bool {
        self.state == State::Done || !self.begun && self.state == State::Receiving
    }

    /// The time that `poll_timeout` named has come.
    pub fn handle_timeout(&mut self, now: Instant) -> Result<(), SessionError> {
        if self.liveness.check(now)? {
            self.send(Message::Working);
        }
        Ok(())
    }

    /// Bytes arrived on the bulk stream.
    pub fn heard(&mut self, now: Instant) {
        self.liveness.heard = now;
    }

    /// A control message arrived.
    pub fn handle_message(&mut self, now: Instant, message: Message) -> Result<(), SessionError> {
        self.liveness.heard = now;
        match message {
            Message::Failure(failure) => Err(SessionError::Peer(failure)),
            Message::Working => Ok(()),
            _ => Err(SessionError::Protocol("a message out of order")),
        }
    }

    /// What is held was found: `generation`, of which no dump was lost since if it `continues`. The
    /// pages in `held` are listed where the source does not know them.
    pub fn prepared(
        &mut self,
        generation: Option<Generation>,
        continues: bool,
        held: impl IntoIterator<Item = PagesHeld>,
    ) {
        if self.state != State::Preparing {
            return;
        }
        self.state = State::Receiving;
        let listed = generation.is_some() && generation != self.offer.known;
        self.say(PagesStep::Offered(PagesOffered {
            generation,
            listed,
            continues: continues && generation.is_some(),
        }));
        if !listed {
            return;
        }
        let mut held = held.into_iter().peekable();
        while let Some(next) = held.next() {
            let last = held.peek().is_none();
            self.say(PagesStep::Held(PagesHeld { last, ..next }));
        }
    }

    /// The dump begins on the stream.
    pub fn dump_begun(&mut self) -> Result<(), SessionError> {
        if self.state != State::Receiving || self.begun {
            return Err(SessionError::Protocol("a dump out of order"));
        }
        self.begun = true;
        Ok(())
    }

    /// All of the dump has arrived and is what the source dumped.
    pub fn dump_complete(&mut self) -> Result<(), SessionError> {
        if self.state != State::Receiving || !self.begun {
            return Err(SessionError::Protocol("a dump out of order"));
        }
        self.state = State::Storing;
        self.commands.push_back(PagesDestinationCommand::Store);
        Ok(())
    }

    /// It is stored and visible, durable where its place is.
    pub fn stored(&mut self, stored: PagesStored) {
        if self.state == State::Storing {
            self.state = State::Done;
            self.say(PagesStep::Stored(stored));
        }
    }

    fn say(&mut self, step: PagesStep) {
        self.send(Message::Pages(step));
    }

    fn send(&mut self, message: Message) {
        self.commands
            .push_back(PagesDestinationCommand::Send(message));
    }
}
