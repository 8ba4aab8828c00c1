//! Disk images: raw files and block devices, and qcow2.
//!
//! A disk is locked for as long as it is open (`flock`: exclusive if writable, else shared), so that two
//! machines never write the same image. Backing files of a qcow2 image are opened read-only and unlocked.

mod qcow2;
mod raw;
#[cfg(test)]
mod tests;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// The unit in which guests address disks.
pub const SECTOR_SIZE: u64 = 512;
/// How a qcow2 file begins.
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// How the bytes of a disk are kept in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// As they are.
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
}

impl FromStr for Format {
    type Err = DiskError;

    fn from_str(name: &str) -> Result<Format, DiskError> {
        match name {
            "raw" => Ok(Format::Raw),
            "qcow2" => Ok(Format::Qcow2),
            _ => Err(DiskError::UnknownFormat(name.to_owned())),
        }
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        })
    }
}

/// What to open and how.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// A file or a block device.
    pub path: PathBuf,
    /// Its format. `None`: qcow2 if it begins like one, else raw; the guest is then kept from writing a raw
    /// disk's first bytes so that it would be taken for qcow2 the next time.
    pub format: Option<Format>,
    /// Whether the guest may only read it.
    pub read_only: bool,
}

/// A disk that cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// No format of that name.
    #[error("Disk format {0:?} is not known: raw and qcow2 are")]
    UnknownFormat(String),
    /// The file cannot be opened or looked at.
    #[error("Could not open disk {}", path.display())]
    Open {
        /// Path of the disk.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A directory, a socket, a terminal.
    #[error("Disk {} is neither a file nor a block device", .0.display())]
    Kind(PathBuf),
    /// Someone has it open, another Wardian most likely, or this machine has it twice.
    #[error("Disk {} is in use: another process, or another disk of this machine, has it open", .0.display())]
    InUse(PathBuf),
    /// Less than one sector.
    #[error("Disk {} is empty: its {size} bytes are less than one sector", path.display())]
    Empty {
        /// Path of the disk.
        path: PathBuf,
        /// Its bytes.
        size: u64,
    },
    /// Not a qcow2 image, a damaged one, or one that asks for features that are not there.
    #[error("Could not open disk {} as qcow2", path.display())]
    Qcow2 {
        /// Path of the disk.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

enum Image {
    Raw(raw::Raw),
    Qcow2(qcow2::Qcow2),
}

/// An open disk. All calls may be made from several threads at once; none but [`Disk::size`] and the like
/// may be made from a vCPU thread. Dropping it writes back what is cached and gives up the lock.
pub struct Disk {
    image: Image,
    size: u64,
    format: Format,
    path: PathBuf,
    read_only: bool,
    guard_magic: bool,
    /// After `image`: what is written back while that goes is still under the lock.
    _lock: Lock,
}

impl Disk {
    /// Opens and locks a disk.
    ///
    /// # Errors
    /// See [`DiskError`]; nothing is changed then.
    pub fn open(options: &DiskOptions) -> Result<Disk, DiskError> {
        let path = options.path.clone();
        let open_error = |source| DiskError::Open { path: path.clone(), source };
        let kind = std::fs::metadata(&path).map_err(open_error)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::Kind(path));
        }
        let file = OpenOptions::new().read(true).write(!options.read_only).open(&path).map_err(open_error)?;
        let lock = Lock::new(file.try_clone().map_err(open_error)?, options.read_only, &path)?;
        let format = match options.format {
            Some(format) => format,
            None => probe(&file).map_err(open_error)?,
        };
        let image = match format {
            Format::Raw => Image::Raw(raw::Raw::new(file)),
            Format::Qcow2 => Image::Qcow2(
                qcow2::Qcow2::open(file, &path, !options.read_only)
                    .map_err(|source| DiskError::Qcow2 { path: path.clone(), source })?,
            ),
        };
        let bytes = match &image {
            Image::Raw(raw) => raw.size().map_err(open_error)?,
            Image::Qcow2(qcow2) => qcow2.size(),
        };
        let size = bytes - bytes % SECTOR_SIZE;
        if size == 0 {
            return Err(DiskError::Empty { path, size: bytes });
        }
        if size != bytes {
            tracing::warn!(
                "Disk {} has {bytes} bytes, which is no multiple of 512: the guest sees the first {size}",
                path.display()
            );
        }
        let guard_magic = options.format.is_none() && format == Format::Raw;
        Ok(Disk { image, size, format, path, read_only: options.read_only, guard_magic, _lock: lock })
    }

    /// Makes the file `path`, which must not exist, a qcow2 image that reads as this disk does until it is written. This
    /// one must not be written any more then.
    ///
    /// # Errors
    /// The host's; when this disk's path is not UTF-8.
    pub fn create_overlay(&self, path: &Path) -> io::Result<()> {
        let backing = std::path::absolute(&self.path)?;
        let backing = backing
            .to_str()
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "its path is not UTF-8"))?;
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        qcow2::Qcow2::create(file, path, self.size, (backing, &self.format.to_string()))
    }

    /// Bytes that the guest sees, a multiple of [`SECTOR_SIZE`].
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether writes are refused.
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Its format, as declared or as found.
    #[must_use]
    pub fn format(&self) -> Format {
        self.format
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        if offset.checked_add(len).is_none_or(|end| end > self.size) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "beyond the end of the disk"));
        }
        Ok(())
    }

    fn check_write(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        self.check(offset, len)
    }

    /// Fills `into`, one slice after the other, with the bytes from `offset` on. The slices' bitmaps are
    /// told that they were written.
    ///
    /// # Errors
    /// When the range leaves the disk or the host fails; the slices may have changed.
    pub fn read_at<B: BitmapSlice>(&self, offset: u64, into: &[VolatileSlice<'_, B>]) -> io::Result<()> {
        self.check(offset, total(into))?;
        match &self.image {
            Image::Raw(raw) => raw.read_at(offset, into),
            Image::Qcow2(qcow2) => qcow2.read_at(offset, into),
        }
    }

    /// Writes `from`, one slice after the other, at `offset`. Durable after the next [`Disk::flush`].
    ///
    /// # Errors
    /// When the disk is read-only, the range leaves it, or the host fails; a part may have been written.
    pub fn write_at<B: BitmapSlice>(&self, offset: u64, from: &[VolatileSlice<'_, B>]) -> io::Result<()> {
        self.check_write(offset, total(from))?;
        match &self.image {
            Image::Raw(raw) if self.guard_magic && offset < QCOW2_MAGIC.len() as u64 => {
                raw.write_guarded(offset, from)
            }
            Image::Raw(raw) => raw.write_at(offset, from),
            Image::Qcow2(qcow2) => qcow2.write_at(offset, from),
        }
    }

    /// Makes everything written so far durable.
    ///
    /// # Errors
    /// When the host fails.
    pub fn flush(&self) -> io::Result<()> {
        match &self.image {
            Image::Raw(raw) => raw.flush(),
            Image::Qcow2(qcow2) => qcow2.flush(),
        }
    }

    /// Gives the range back: punches a hole into a raw file; frees clusters of a qcow2 image, which later
    /// writes use again (the file itself does not shrink). What it reads as afterwards is unspecified. Does
    /// nothing where the host cannot.
    ///
    /// # Errors
    /// As for [`Disk::write_at`].
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_write(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        match &self.image {
            Image::Raw(raw) => raw.discard(offset, len),
            Image::Qcow2(qcow2) => qcow2.discard(offset, len),
        }
    }

    /// Makes the range read as zeros; gives its space back to the host if `unmap`.
    ///
    /// # Errors
    /// As for [`Disk::write_at`].
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.check_write(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        match &self.image {
            Image::Raw(raw) => raw.write_zeroes(offset, len, unmap),
            Image::Qcow2(qcow2) => qcow2.write_zeroes(offset, len, unmap),
        }
    }
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk")
            .field("path", &self.path)
            .field("format", &self.format)
            .field("size", &self.size)
            .field("read_only", &self.read_only)
            .finish_non_exhaustive()
    }
}

fn total<B: BitmapSlice>(slices: &[VolatileSlice<'_, B>]) -> u64 {
    slices.iter().map(|slice| slice.len() as u64).sum()
}

fn probe(file: &File) -> io::Result<Format> {
    let mut magic = [0; 4];
    match file.read_exact_at(&mut magic, 0) {
        Ok(()) if magic == QCOW2_MAGIC => Ok(Format::Qcow2),
        Ok(()) => Ok(Format::Raw),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(Format::Raw),
        Err(error) => Err(error),
    }
}

/// A held lock. It is given up by name, not only by closing: a child that is just being started may have the
/// descriptor for a moment longer.
struct Lock(File);

impl Lock {
    fn new(file: File, shared: bool, path: &Path) -> Result<Lock, DiskError> {
        let operation = if shared {
            FlockOperation::NonBlockingLockShared
        } else {
            FlockOperation::NonBlockingLockExclusive
        };
        match rustix::fs::flock(&file, operation) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(DiskError::InUse(path.to_owned())),
            Err(error) => {
                tracing::warn!("Disk {} cannot be locked on its file system: {error}", path.display());
            }
        }
        Ok(Lock(file))
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = rustix::fs::flock(&self.0, FlockOperation::Unlock);
    }
}
