//! Machines in files: a folder with what was saved of a machine, written whole or not at all.
//!
//! *Comes in*: a paused machine's state and RAM. *Goes out*: a folder, and from a folder a machine that goes on.
//!
//! ```text
//! DIR/state    header and records, see `wardian_state`
//! DIR/memory   RAM, flat or packed, see `image`
//! DIR/diskN    the machine's disk N as it was, if it is kept with it
//! ```
//!
//! A snapshot is made in a folder beside it and gets its name when all of it is on the disk, so that who is
//! interrupted, whenever that is, leaves the earlier snapshot of that name as it was.
//!
//! **Architecture Invariant:** what is in a folder is checked before it is used. RAM that is read as it is needed is
//! the exception, and only where the user asks for it.
//!
//! **API Boundary:** [`image`], [`Folder`], [`Unfinished`], [`TransferError`].
#![forbid(unsafe_code)]

mod folder;
pub mod image;

use std::io;
use std::path::PathBuf;

pub use folder::{Folder, Unfinished};
pub use image::{Form, ImageState};

/// A snapshot that cannot be made or read.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// A part cannot be written.
    #[error("Could not write {}", path.display())]
    Write {
        /// The part.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A part cannot be read.
    #[error("Could not read {}", path.display())]
    Read {
        /// The part.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something is there that is not to be replaced.
    #[error("{} exists, and is no snapshot that could be replaced", .0.display())]
    Exists(PathBuf),
    /// RAM cannot be read.
    #[error("Could not read the saved memory")]
    ReadMemory(#[source] io::Error),
    /// RAM is not what was written.
    #[error("The saved memory is damaged in chunk {chunk}: {why}")]
    Damaged {
        /// Number of the MiB.
        chunk: u32,
        /// What is wrong.
        why: &'static str,
    },
    /// Only flat RAM can be mapped.
    #[error("The saved memory is packed: it cannot be read as it is needed")]
    NotFlat,
    /// No RAM for the guest.
    #[error("Could not get guest memory")]
    Memory(#[from] wardian_memory::MemoryError),
    /// A record that makes no sense.
    #[error(transparent)]
    Refused(#[from] wardian_state::Refused),
    /// The records.
    #[error(transparent)]
    State(#[from] wardian_state::StateError),
}
