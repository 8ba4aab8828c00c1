//! What a saved thing looks like: versioned records, the container that holds them, its reader.
//!
//! *Comes in*: the `State` structs that rooms keep beside their stateful things. *Goes out*: a [`Writer`]'s bytes,
//! and, from bytes that nobody vouches for, a [`Container`] whose records are taken out one by one.
//!
//! **A stateful thing** has, in a module `persist` beside it, a `State` struct that derives `Serialize` and
//! `Deserialize` and implements [`Record`], a `save(&self) -> State`, and a *constructor* `restore(args, &State)`
//! that returns [`Refused`] for a state that the thing cannot be in. Bytes go through [`hex`], 64-bit registers are
//! plain `u64`s; no `u128`, no floats, no maps with keys other than strings.
//!
//! **The container** is a header and records, all little-endian, every part a multiple of 8 bytes:
//!
//! ```text
//! header   "wardian\n"   u32 length of the whole header   u32 format version   u32 CRC-32   u32 zero
//!          a JSON object, filled up with blanks and a line end
//! record   "rec\n"   u16 version   u16 flags   u16 length of kind   u16 length of id   u32 CRC-32
//!          u64 length of payload   kind, id, payload, zeros up to a multiple of 8
//! ...
//! record   kind "end", payload {"records":n}
//! ```
//!
//! A CRC covers its whole header or record with itself as zero. Payloads are JSON: a few KiB for each device, so that
//! a saved machine can be read and compared with ordinary tools, and a new field does not shift the old ones.
//!
//! The header is for any later version to read: fields that it does not know are left alone. A record is not: what
//! was read must be exactly what would be written, so a field that this version does not know, or misses, refuses the
//! record, unless [`Record::upgrade`] knows the older version. Flag bit 0 says that a reader may skip the record.
//!
//! **Architecture Invariant:** saved types are never runtime types. **Architecture Invariant:** restore is a
//! constructor, so a half-restored device cannot exist. **Architecture Invariant:** unknown and left-over records are
//! errors that name them. **Architecture Invariant:** nothing in a file makes the reader panic, or allocate more than
//! a small multiple of the file.
//!
//! **API Boundary:** [`Record`], [`Refused`], [`check`], [`hex`], [`Header`], [`Writer`], [`Container`], [`StateError`].
#![forbid(unsafe_code)]

pub mod check;
mod container;
pub mod hex;
#[cfg(test)]
mod tests;

use serde::Serialize;
use serde::de::DeserializeOwned;

pub use container::{Container, Entry, FORMAT_VERSION, Header, MAX_LEN, StateError, Writer};
pub use serde_json::Value;

/// A saved state with its kind and version; unknown kinds and versions are errors, never guesses.
pub trait Record: Serialize + DeserializeOwned {
    /// What this is, such as `pit`: at most 64 letters, digits, `-` and `.`.
    const KIND: &'static str;
    /// Version of its layout. Whoever changes a field raises it, and teaches [`Record::upgrade`] the old one.
    const VERSION: u16;

    /// `old`, written as version `version`, in the shape of [`Record::VERSION`]; `None` if that version is not known
    /// any more or not yet.
    #[must_use]
    fn upgrade(version: u16, old: Value) -> Option<Value> {
        let _ = (version, old);
        None
    }
}

/// A saved state that the thing cannot be in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("The saved state of {kind} is not possible: {why}")]
pub struct Refused {
    /// Kind of the record.
    pub kind: &'static str,
    /// The rule that it breaks.
    pub why: String,
}

impl Refused {
    /// A refusal of an `R`.
    #[must_use]
    pub fn new<R: Record>(why: impl Into<String>) -> Refused {
        Refused { kind: R::KIND, why: why.into() }
    }

    /// An `R` is refused unless `right`.
    ///
    /// # Errors
    /// When it is not.
    pub fn unless<R: Record>(right: bool, why: &str) -> Result<(), Refused> {
        if right { Ok(()) } else { Err(Refused::new::<R>(why)) }
    }
}
