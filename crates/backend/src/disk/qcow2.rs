//! qcow2 images, through `imago`.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::{
    FormatCreateBuilder, FormatDriverBuilder, PermissiveImplicitOpenGate, StorageOpenOptions,
    SyncFormatAccess,
};
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

type Storage = imago::file::File;

/// Zeros written by one call where the image's version knows no zero clusters.
const ZEROS: usize = 256 * 1024;

/// Reads and writes share the lock; what frees clusters has it alone, for it invalidates mappings that
/// others may be using.
pub(super) struct Qcow2 {
    access: RwLock<SyncFormatAccess<Storage>>,
    writable: bool,
}

impl Qcow2 {
    pub(super) fn open(file: File, path: &Path, writable: bool) -> io::Result<Qcow2> {
        // The absolute path, because the backing file's name is relative to it.
        let options = StorageOpenOptions::new().filename(std::path::absolute(path)?).write(writable);
        let storage = Storage::from_open_file(file, options)?;
        // Backing and data files that the image names are opened as it says: it is the user who chose it.
        let image = imago::qcow2::Qcow2::<Storage>::builder(storage)
            .write(writable)
            .open_sync(PermissiveImplicitOpenGate::default())?;
        Ok(Qcow2 { access: RwLock::new(SyncFormatAccess::new(image)?), writable })
    }

    /// Makes of the empty file `file` an image of `size` bytes that reads as `backing` does, until it is written.
    pub(super) fn create(file: File, path: &Path, size: u64, backing: (&str, &str)) -> io::Result<()> {
        let options = StorageOpenOptions::new().filename(std::path::absolute(path)?).write(true);
        let storage = Storage::from_open_file(file, options)?;
        let image = imago::qcow2::Qcow2::<Storage>::create_builder(storage)
            .size(size)
            .backing(backing.0.to_owned(), backing.1.to_owned());
        // As `open_sync` does it; imago has no such thing for images that are made.
        tokio::runtime::Builder::new_current_thread().build()?.block_on(image.create())
    }

    fn shared(&self) -> RwLockReadGuard<'_, SyncFormatAccess<Storage>> {
        self.access.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn alone(&self) -> RwLockWriteGuard<'_, SyncFormatAccess<Storage>> {
        self.access.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn size(&self) -> u64 {
        self.shared().size()
    }

    pub(super) fn read_at<B: BitmapSlice>(
        &self,
        offset: u64,
        into: &[VolatileSlice<'_, B>],
    ) -> io::Result<()> {
        // The guard tells the bitmaps when it goes, after the data is there.
        let (vector, _guard) = IoVectorMut::from_volatile_slice(into);
        self.shared().readv(vector, offset)
    }

    pub(super) fn write_at<B: BitmapSlice>(
        &self,
        offset: u64,
        from: &[VolatileSlice<'_, B>],
    ) -> io::Result<()> {
        let (vector, _guard) = IoVector::from_volatile_slice(from);
        self.shared().writev(vector, offset)
    }

    pub(super) fn flush(&self) -> io::Result<()> {
        if !self.writable {
            return Ok(());
        }
        let access = self.shared();
        access.flush()?;
        access.sync()
    }

    pub(super) fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.alone().discard_to_any(offset, len) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            result => result,
        }
    }

    pub(super) fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let result = if unmap {
            self.alone().discard_to_zero(offset, len)
        } else {
            self.shared().write_zeroes(offset, len)
        };
        match result {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
            result => return result,
        }
        let zeros = vec![0; ZEROS];
        let mut at = offset;
        while at < offset + len {
            let step = (offset + len - at).min(ZEROS as u64);
            self.shared().write(&zeros[..step as usize], at)?;
            at += step;
        }
        Ok(())
    }
}
