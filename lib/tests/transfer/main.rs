//! Whole transfers over loopback, seen from outside: what is sent, and what then lies in the
//! receiving directory.

mod bad_input;
mod hostile_destination;
mod hostile_source;
mod images;
mod interrupted;
mod layouts;
mod meeting;
mod pages;
mod pages_criu;
mod peers;
mod remembered;
mod support;
