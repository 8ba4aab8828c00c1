//! Raw files and block devices: plain positional I/O.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{Bytes, VolatileSlice};

use super::QCOW2_MAGIC;
use crate::sys;

/// Zeros written by one host call where the file system cannot zero a range by itself.
const ZEROS: usize = 256 * 1024;

pub(super) struct Raw {
    file: File,
}

impl Raw {
    pub(super) fn new(file: File) -> Raw {
        Raw { file }
    }

    /// Bytes, of a block device too.
    pub(super) fn size(&self) -> io::Result<u64> {
        (&self.file).seek(SeekFrom::End(0))
    }

    pub(super) fn read_at<B: BitmapSlice>(
        &self,
        offset: u64,
        into: &[VolatileSlice<'_, B>],
    ) -> io::Result<()> {
        sys::read_at(self.file.as_fd(), into, offset)
    }

    pub(super) fn write_at<B: BitmapSlice>(
        &self,
        offset: u64,
        from: &[VolatileSlice<'_, B>],
    ) -> io::Result<()> {
        sys::write_at(self.file.as_fd(), from, offset)
    }

    /// Writes over the first bytes of a disk whose format was guessed: refuses what would make the next
    /// guess another one. The first bytes are copied before they are looked at, for the guest can change
    /// them meanwhile.
    pub(super) fn write_guarded<B: BitmapSlice>(
        &self,
        offset: u64,
        from: &[VolatileSlice<'_, B>],
    ) -> io::Result<()> {
        let mut head = [0; 512];
        let mut filled = 0;
        let mut rest = Vec::with_capacity(from.len());
        for slice in from {
            let step = slice.len().min(head.len() - filled);
            if step > 0 {
                slice.read_slice(&mut head[filled..filled + step], 0).map_err(io::Error::other)?;
                filled += step;
            }
            if step < slice.len() {
                rest.push(slice.offset(step).map_err(io::Error::other)?);
            }
        }
        let mut magic = [0; 4];
        self.file.read_exact_at(&mut magic, 0)?;
        for (to, from) in magic.iter_mut().skip(offset as usize).zip(&head[..filled]) {
            *to = *from;
        }
        if magic == QCOW2_MAGIC {
            tracing::warn!(
                "The guest tried to make its raw disk look like qcow2; say format=raw if it may do so"
            );
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        self.file.write_all_at(&head[..filled], offset)?;
        self.write_at(offset + filled as u64, &rest)
    }

    pub(super) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn allocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<bool> {
        loop {
            return match rustix::fs::fallocate(&self.file, flags | FallocateFlags::KEEP_SIZE, offset, len) {
                Ok(()) => Ok(true),
                Err(Errno::INTR) => continue,
                Err(Errno::OPNOTSUPP | Errno::NODEV | Errno::NOSYS) => Ok(false),
                Err(error) => Err(error.into()),
            };
        }
    }

    pub(super) fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.allocate(FallocateFlags::PUNCH_HOLE, offset, len).map(drop)
    }

    pub(super) fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if unmap && self.allocate(FallocateFlags::PUNCH_HOLE, offset, len)? {
            return Ok(());
        }
        if self.allocate(FallocateFlags::ZERO_RANGE, offset, len)? {
            return Ok(());
        }
        let zeros = vec![0; ZEROS];
        let mut at = offset;
        while at < offset + len {
            let step = (offset + len - at).min(ZEROS as u64);
            self.file.write_all_at(&zeros[..step as usize], at)?;
            at += step;
        }
        Ok(())
    }
}
