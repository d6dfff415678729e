//! Runs the command as people and programs do.

mod directories;
mod migrations;
mod refusals;
mod sandbox;
mod stopping;
mod transfers;
