//! One machine's control socket, and whoever calls it.
//!
//! *Comes in*: HTTP/1.1 with JSON over a unix socket, from programs of the same user. *Goes out*: calls to the
//! machine's [`wardian_machine::Control`]; what it is, what it does, what happens to it.
//!
//! There is no daemon: each machine is a process, its socket is `NAME.sock` in the user's runtime directory
//! ([`Directory`]), mode 0600. `openapi.json` says what can be asked; a route is in the table of `router` and in that
//! document, or a test fails.
//!
//! **Architecture Invariant:** a vCPU's thread never waits for a client: what happens and what is printed goes into
//! bounded rings, and whoever reads too slowly loses some and is told so. **Architecture Invariant:** a client is as
//! hostile as a guest: header and body sizes, times, and the numbers of connections and streams are bounded, and what
//! is wrong is answered with what is wrong. **Architecture Invariant:** what may wait (a pause, a look at a vCPU) runs
//! beside the thread `control`, so that a stuck disk does not silence the socket. **Architecture Invariant:** a socket
//! is made and removed under the directory's lock, so nobody removes one that is alive.
//!
//! **API Boundary:** [`Desk`] and [`Server`] for the machine's process; [`Client`], [`Directory`] and [`attach`] for
//! the others.
#![forbid(unsafe_code)]

mod attach;
mod client;
mod console;
mod desk;
mod events;
mod io;
mod life;
mod look;
mod metrics;
mod place;
mod reply;
mod router;
mod server;
mod streams;
#[cfg(test)]
mod tests;

pub use attach::attach;
pub use client::{Client, ClientError};
pub use desk::Desk;
pub use place::{Directory, PlaceError};
pub use server::{Server, ServerError};

/// What can be asked, as an OpenAPI 3.1 document.
pub const OPENAPI: &str = include_str!("openapi.json");
