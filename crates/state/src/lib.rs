//! What a saved thing looks like: kinds and versions.
//!
//! *Comes in*: the `State` structs that rooms keep beside their stateful things. *Goes out*: versioned
//! records. The container and its reader come with the freezer; until then this room holds the contract.
//!
//! **Architecture Invariant:** saved types are never runtime types. **Architecture Invariant:** restore is a
//! constructor, so a half-restored device cannot exist.
//!
//! **API Boundary:** [`Record`].

use serde::Serialize;
use serde::de::DeserializeOwned;

/// A saved state with its kind and version; unknown kinds and versions are errors, never guesses.
pub trait Record: Serialize + DeserializeOwned {
    /// What this is, such as `pit`.
    const KIND: &'static str;
    /// Version of its layout.
    const VERSION: u16;
}
