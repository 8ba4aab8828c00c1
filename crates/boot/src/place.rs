//! Where things go: limits of low RAM, files into memory, zeroing.

use std::io::Read;
use std::path::Path;

use wardian_memory::{Gpa, GuestMemory};

use crate::{BootError, Image, open};

/// Kernels lie at or above this; what the loader builds lies below.
pub(crate) const LOAD_FLOOR: u64 = 1 << 20;
const CHUNK: usize = 1 << 20;

/// End of the RAM that begins at 0.
pub(crate) fn low_end(mem: &GuestMemory) -> u64 {
    mem.ranges().first().map_or(0, |r| r.end)
}

/// Whether a kernel may occupy `from..to`.
pub(crate) fn check_span(image: &Image, from: u64, to: u64, low_end: u64) -> Result<(), BootError> {
    if from < LOAD_FLOOR {
        return Err(image.unsupported(format!("it wants to lie at {from:#x}, below 1 MiB")));
    }
    if to > low_end {
        return Err(BootError::MemoryTooSmall { need: to, have: low_end });
    }
    Ok(())
}

/// Writes `len` zero bytes at `at`.
pub(crate) fn zero(mem: &GuestMemory, at: u64, len: u64) -> Result<(), BootError> {
    let zeros = vec![0u8; CHUNK.min(len as usize)];
    let mut done = 0;
    while done < len {
        let step = (len - done).min(CHUNK as u64);
        mem.write(Gpa(at + done), &zeros[..step as usize])?;
        done += step;
    }
    Ok(())
}

/// A file that is to lie in guest memory.
pub(crate) struct Blob {
    path: std::path::PathBuf,
    file: std::fs::File,
    pub size: u64,
}

impl Blob {
    pub fn open(path: &Path) -> Result<Blob, BootError> {
        let (file, size) = open(path)?;
        Ok(Blob { path: path.to_path_buf(), file, size })
    }

    /// The highest page-aligned place for the file in `from..to`.
    pub fn place_high(&self, from: u64, to: u64) -> Result<u64, BootError> {
        let from = from.next_multiple_of(4096);
        let at = to.checked_sub(self.size).map(|at| at & !4095);
        match at {
            Some(at) if at >= from => Ok(at),
            _ => Err(self.too_large(to.saturating_sub(from))),
        }
    }

    /// The lowest page-aligned place for the file in `from..to`.
    pub fn place_low(&self, from: u64, to: u64) -> Result<u64, BootError> {
        let at = from.next_multiple_of(4096);
        match at.checked_add(self.size) {
            Some(end) if end <= to => Ok(at),
            _ => Err(self.too_large(to.saturating_sub(at))),
        }
    }

    fn too_large(&self, room: u64) -> BootError {
        BootError::InitrdTooLarge { path: self.path.clone(), size: self.size, room }
    }

    /// Copies the file to `at`.
    pub fn copy(mut self, mem: &GuestMemory, at: u64) -> Result<(), BootError> {
        let mut buffer = vec![0u8; CHUNK.min(self.size as usize)];
        let mut done = 0;
        while done < self.size {
            let want = (self.size - done).min(CHUNK as u64) as usize;
            let got = match self.file.read(&mut buffer[..want]) {
                Ok(0) => {
                    return Err(BootError::Truncated {
                        path: self.path,
                        what: "The file",
                        need: self.size,
                        have: done,
                    });
                }
                Ok(n) => n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(BootError::Read { path: self.path, source }),
            };
            mem.write(Gpa(at + done), &buffer[..got])?;
            done += got as u64;
        }
        Ok(())
    }
}
