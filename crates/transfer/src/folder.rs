//! The folder of a snapshot.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags};
use wardian_state::{Container, MAX_LEN};

use crate::TransferError;

const STATE: &str = "state";
const MEMORY: &str = "memory";

/// A snapshot that is being made. Dropping it takes it away.
#[derive(Debug)]
pub struct Unfinished {
    place: PathBuf,
    to: PathBuf,
    done: bool,
}

fn write_error(path: &Path) -> impl FnOnce(io::Error) -> TransferError {
    move |source| TransferError::Write { path: path.to_owned(), source }
}

fn read_error(path: &Path) -> impl FnOnce(io::Error) -> TransferError {
    move |source| TransferError::Read { path: path.to_owned(), source }
}

/// Makes durable what was written to a file or which names a folder has.
fn sync(path: &Path) -> Result<(), TransferError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(write_error(path))
}

/// A folder holds nothing, or a snapshot.
fn may_replace(path: &Path) -> bool {
    let is_snapshot = path.join(STATE).is_file();
    is_snapshot || fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none())
}

impl Unfinished {
    /// Begins a snapshot that is to be called `to`. What snapshots of that name left unfinished goes away.
    ///
    /// # Errors
    /// When something is there that is no snapshot, or the host does not let us.
    pub fn begin(to: &Path) -> Result<Unfinished, TransferError> {
        let to = std::path::absolute(to).map_err(write_error(to))?;
        if fs::symlink_metadata(&to).is_ok() && !may_replace(&to) {
            return Err(TransferError::Exists(to));
        }
        let (Some(parent), Some(name)) = (to.parent(), to.file_name()) else {
            return Err(TransferError::Exists(to));
        };
        fs::create_dir_all(parent).map_err(write_error(parent))?;
        let mut hidden = OsString::from(".");
        hidden.push(name);
        hidden.push(".unfinished");
        let place = parent.join(hidden);
        if fs::symlink_metadata(&place).is_ok() {
            fs::remove_dir_all(&place).map_err(write_error(&place))?;
        }
        fs::create_dir(&place).map_err(write_error(&place))?;
        Ok(Unfinished { place, to, done: false })
    }

    /// Where its parts are made.
    #[must_use]
    pub fn place(&self) -> &Path {
        &self.place
    }

    /// Where they will be.
    #[must_use]
    pub fn destination(&self) -> &Path {
        &self.to
    }

    /// Makes an empty part.
    ///
    /// # Errors
    /// The host's.
    pub fn create(&self, name: &str) -> Result<File, TransferError> {
        let path = self.place.join(name);
        File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(|source| TransferError::Write { path, source })
    }

    /// Makes the file of RAM.
    ///
    /// # Errors
    /// The host's.
    pub fn create_memory(&self) -> Result<File, TransferError> {
        self.create(MEMORY)
    }

    /// An error in writing the file of RAM, with its name.
    #[must_use]
    pub fn memory_error(&self, source: io::Error) -> TransferError {
        TransferError::Write { path: self.to.join(MEMORY), source }
    }

    /// Writes the state, makes everything durable, and gives the snapshot its name.
    ///
    /// # Errors
    /// The host's; then nothing has changed.
    pub fn finish(mut self, state: &[u8]) -> Result<(), TransferError> {
        let mut file = self.create(STATE)?;
        file.write_all(state).map_err(write_error(&self.to.join(STATE)))?;
        drop(file);
        for entry in fs::read_dir(&self.place).map_err(write_error(&self.place))? {
            sync(&entry.map_err(write_error(&self.place))?.path())?;
        }
        sync(&self.place)?;
        let parent = self.to.parent().unwrap_or(Path::new("/"));
        if fs::symlink_metadata(&self.to).is_ok() {
            // The old one and the new one change names in one step.
            rustix::fs::renameat_with(CWD, &self.place, CWD, &self.to, RenameFlags::EXCHANGE)
                .map_err(|error| write_error(&self.to)(error.into()))?;
            sync(parent)?;
            // What is called unfinished now is the old one; dropping takes it away.
            return Ok(());
        }
        fs::rename(&self.place, &self.to).map_err(write_error(&self.to))?;
        self.done = true;
        sync(parent)
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.done {
            let _ = fs::remove_dir_all(&self.place);
        }
    }
}

/// The folder of a snapshot that is there.
#[derive(Clone, Debug)]
pub struct Folder(PathBuf);

impl Folder {
    /// The folder at `path`; it may as well be the state file in it.
    #[must_use]
    pub fn at(path: &Path) -> Folder {
        let folder = if path.is_file() { path.parent().unwrap_or(Path::new("")) } else { path };
        let absolute = std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned());
        Folder(absolute)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Reads and checks the state.
    ///
    /// # Errors
    /// When it is not there, or not right.
    pub fn state(&self) -> Result<Container, TransferError> {
        let path = self.0.join(STATE);
        let file = File::open(&path).map_err(read_error(&path))?;
        let mut bytes = Vec::new();
        // One byte more than may be shows that it is too long.
        file.take(MAX_LEN as u64 + 1).read_to_end(&mut bytes).map_err(read_error(&path))?;
        Ok(Container::parse(&bytes)?)
    }

    /// Opens the file of RAM.
    ///
    /// # Errors
    /// The host's.
    pub fn memory(&self) -> Result<File, TransferError> {
        let path = self.0.join(MEMORY);
        File::open(&path).map_err(|source| TransferError::Read { path, source })
    }
}

#[cfg(test)]
mod tests {
    use super::{Folder, Unfinished};
    use crate::TransferError;
    use std::fs;
    use wardian_state::{Header, Writer};

    fn state(name: &str) -> Vec<u8> {
        Writer::new(&Header { name: name.to_owned(), ..Header::default() }).unwrap().finish()
    }

    fn name(path: &std::path::Path) -> String {
        Folder::at(path).state().unwrap().header().name.clone()
    }

    #[test]
    fn a_snapshot_is_there_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("deep/snap");
        let first = Unfinished::begin(&to).unwrap();
        first.create("disk0").unwrap();
        assert!(!to.exists());
        first.finish(&state("one")).unwrap();
        assert_eq!(name(&to), "one");
        assert_eq!(name(&to.join("state")), "one");

        // A second that is broken off, as by an error.
        let second = Unfinished::begin(&to).unwrap();
        second.create("disk0").unwrap();
        drop(second);
        assert_eq!(name(&to), "one");
        // A third that is broken off, as by a kill: nobody drops it.
        std::mem::forget(Unfinished::begin(&to).unwrap());
        assert_eq!(name(&to), "one");
        Unfinished::begin(&to).unwrap().finish(&state("two")).unwrap();
        assert_eq!(name(&to), "two");
        assert!(!to.join("disk0").exists());
        assert_eq!(fs::read_dir(to.parent().unwrap()).unwrap().count(), 1, "nothing is left over");
    }

    #[test]
    fn what_is_no_snapshot_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("letter"), "dear").unwrap();
        assert!(matches!(Unfinished::begin(dir.path()), Err(TransferError::Exists(_))));
        assert!(matches!(Unfinished::begin(&dir.path().join("letter")), Err(TransferError::Exists(_))));
        assert!(Folder::at(dir.path()).state().unwrap_err().to_string().starts_with("Could not read"));
    }
}
