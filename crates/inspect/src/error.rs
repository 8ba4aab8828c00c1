//! What can go wrong.

use std::path::{Path, PathBuf};

/// Why a guest cannot be looked into.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of a dump cannot be read.
    #[error("Could not read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file of a dump cannot be written.
    #[error("Could not write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// No vCPU runs a 64-bit kernel.
    #[error("No vCPU runs a 64-bit kernel yet")]
    NoKernel,
    /// The kernel is not one that can be read.
    #[error("The guest's kernel cannot be read: {0} was not found")]
    NotFound(&'static str),
}

impl Error {
    pub(crate) fn reading(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
        move |source| Error::Read { path: path.to_owned(), source }
    }
}
