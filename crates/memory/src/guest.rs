//! [`GuestMemory`].
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap};

use crate::{CodeListener, Gpa, HIGH_RAM_START, LOW_RAM_END, PAGE_SIZE, WriteTracker};

/// Guest RAM as `vm-memory` sees it: for virtqueues and loaders. Writes through it are tracked.
pub type Ram = GuestMemoryMmap<WriteTracker>;

/// What can go wrong with guest RAM.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size is no multiple of a page, zero, or too large for this host.
    #[error("Guest memory of {0} bytes is not possible: it must be a positive multiple of 4096")]
    Size(u64),
    /// The host has no memory, no memfd or no address space for it.
    #[error("Could not get {size} bytes of host memory for the guest")]
    Host {
        /// Bytes asked for.
        size: u64,
        /// Why the host refused.
        #[source]
        source: std::io::Error,
    },
    /// The region could not be mapped.
    #[error("Could not map guest memory: {0}")]
    Map(String),
    /// The access leaves RAM.
    #[error("No guest RAM for {len} bytes at {gpa}")]
    Outside {
        /// First address of the access.
        gpa: Gpa,
        /// Its length in bytes.
        len: usize,
    },
}

/// All RAM of one machine. Cheap to clone.
#[derive(Clone, Debug)]
pub struct GuestMemory {
    ram: Ram,
    tracker: WriteTracker,
    low: u64,
    high: u64,
    low_host: usize,
    high_host: usize,
    file: Arc<File>,
    /// The mappings are private: `file` is what RAM was at first, and is never written.
    private: bool,
}

fn memfd(size: u64) -> Result<File, MemoryError> {
    // SAFETY: the name is a NUL-terminated literal; the call returns a new descriptor or -1.
    let fd = unsafe { libc::memfd_create(c"wardian-guest".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(MemoryError::Host { size, source: std::io::Error::last_os_error() });
    }
    // SAFETY: fd was just created and is owned by nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size).map_err(|source| MemoryError::Host { size, source })?;
    Ok(file)
}

impl GuestMemory {
    /// `size` bytes of zeroed RAM.
    ///
    /// # Errors
    /// When `size` is no positive multiple of a page or the host cannot provide it.
    pub fn new(size: u64) -> Result<GuestMemory, MemoryError> {
        Self::check_size(size)?;
        Self::map(size, memfd(size)?, false)
    }

    /// `size` bytes of RAM that hold what `image` holds, which is read as it is needed and not written: RAM is a copy
    /// on write. Whoever changes the file changes RAM that was not touched yet, and whoever truncates it ends this
    /// process.
    ///
    /// # Errors
    /// As [`GuestMemory::new`]; when the file is shorter than `size`.
    pub fn of_image(size: u64, image: File) -> Result<GuestMemory, MemoryError> {
        Self::check_size(size)?;
        let host = |source| MemoryError::Host { size, source };
        if image.metadata().map_err(host)?.len() < size {
            return Err(MemoryError::Map("the image is shorter".to_owned()));
        }
        Self::map(size, image, true)
    }

    fn check_size(size: u64) -> Result<(), MemoryError> {
        if size == 0 || !size.is_multiple_of(PAGE_SIZE) || size > 1 << 40 {
            return Err(MemoryError::Size(size));
        }
        Ok(())
    }

    fn map(size: u64, file: File, private: bool) -> Result<GuestMemory, MemoryError> {
        let file = Arc::new(file);
        let sharing = if private { libc::MAP_PRIVATE } else { libc::MAP_SHARED };
        let low = size.min(LOW_RAM_END);
        let high = size - low;
        let tracker = WriteTracker::for_pages((size / PAGE_SIZE) as usize);
        let mut regions = vec![(0u64, low, 0u64)];
        if high > 0 {
            regions.push((HIGH_RAM_START, high, low));
        }
        let mut host = [0usize; 2];
        let mut built = Vec::new();
        for (slot, (base, len, offset)) in regions.into_iter().enumerate() {
            let map_error = |what: &dyn std::fmt::Display| MemoryError::Map(what.to_string());
            let map = MmapRegionBuilder::new_with_bitmap(
                len as usize,
                tracker.region((offset / PAGE_SIZE) as usize),
            )
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(sharing | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::from_arc(Arc::clone(&file), offset))
            .build()
            .map_err(|e| map_error(&e))?;
            host[slot] = map.as_ptr() as usize;
            // Large pages make a processor's nested walks and faults fewer, where the host gives them to shared memory.
            // SAFETY: advice on the mapping that was just made; a host that cannot follow it says so, which does no harm.
            unsafe { libc::madvise(map.as_ptr().cast(), len as usize, libc::MADV_HUGEPAGE) };
            built.push(
                GuestRegionMmap::new(map, GuestAddress(base))
                    .ok_or_else(|| map_error(&"address overflow"))?,
            );
        }
        let ram = Ram::from_regions(built).map_err(|e| MemoryError::Map(e.to_string()))?;
        Ok(GuestMemory { ram, tracker, low, high, low_host: host[0], high_host: host[1], file, private })
    }

    /// RAM as `vm-memory` sees it.
    #[must_use]
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// The memfd behind RAM, low region first, high region after it; of [`GuestMemory::of_image`] the image, which is
    /// not what RAM is now.
    #[must_use]
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Whether [`GuestMemory::file`] is an image and not what RAM is now.
    #[must_use]
    pub fn is_private(&self) -> bool {
        self.private
    }

    /// Spans of RAM pages that may hold something else than zeros, ascending; pages are numbered through the low and
    /// then the high region. Who asks has stopped whatever writes.
    ///
    /// # Errors
    /// The host's.
    pub fn used_pages(&self) -> std::io::Result<Vec<Range<u64>>> {
        let size = self.size();
        if self.private {
            // What was written since lies in private pages, of which the file knows nothing.
            return Ok(std::iter::once(0..size / PAGE_SIZE).collect());
        }
        let seek = |from: u64, whence: libc::c_int| {
            // SAFETY: lseek takes integers; the descriptor is ours, and nobody uses its position.
            let at = unsafe { libc::lseek(self.file.as_raw_fd(), from as libc::off_t, whence) };
            u64::try_from(at).map_err(|_| std::io::Error::last_os_error())
        };
        let mut all: Vec<Range<u64>> = Vec::new();
        let mut at = 0;
        while at < size {
            let begin = match seek(at, libc::SEEK_DATA) {
                Ok(begin) => begin,
                Err(error) if error.raw_os_error() == Some(libc::ENXIO) => break,
                Err(error) => return Err(error),
            };
            let end = seek(begin, libc::SEEK_HOLE)?.min(size);
            all.push(begin / PAGE_SIZE..end.div_ceil(PAGE_SIZE));
            at = end;
        }
        Ok(all)
    }

    /// Address of RAM page `page`, as [`GuestMemory::used_pages`] numbers them.
    #[must_use]
    pub fn page_address(&self, page: u64) -> Option<Gpa> {
        let at = page.checked_mul(PAGE_SIZE)?;
        if at < self.low {
            Some(Gpa(at))
        } else {
            (at - self.low < self.high).then(|| Gpa(HIGH_RAM_START + (at - self.low)))
        }
    }

    /// Bytes of RAM in all.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.low + self.high
    }

    /// The address ranges that are RAM, ascending.
    #[must_use]
    pub fn ranges(&self) -> Vec<Range<u64>> {
        let mut all = Vec::with_capacity(2);
        all.push(0..self.low);
        if self.high > 0 {
            all.push(HIGH_RAM_START..HIGH_RAM_START + self.high);
        }
        all
    }

    /// Reads `out.len()` bytes at `gpa`.
    ///
    /// # Errors
    /// [`MemoryError::Outside`] when any byte is not RAM.
    pub fn read(&self, gpa: Gpa, out: &mut [u8]) -> Result<(), MemoryError> {
        let len = out.len();
        self.ram.read_slice(out, GuestAddress(gpa.0)).map_err(|_| MemoryError::Outside { gpa, len })
    }

    /// Writes `data` at `gpa`; code caches are told if it was code.
    ///
    /// # Errors
    /// [`MemoryError::Outside`] when any byte is not RAM.
    pub fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), MemoryError> {
        let len = data.len();
        self.ram.write_slice(data, GuestAddress(gpa.0)).map_err(|_| MemoryError::Outside { gpa, len })
    }

    /// Whether the `len` bytes at `gpa` are all RAM.
    #[must_use]
    pub fn contains(&self, gpa: Gpa, len: u64) -> bool {
        self.ram.check_range(GuestAddress(gpa.0), len as usize)
    }

    /// For engines: (RAM page number, host address of the page) of the page that holds `gpa`. The host
    /// address is valid for 4096 bytes as long as any clone of `self` lives.
    #[must_use]
    #[inline]
    pub fn page(&self, gpa: Gpa) -> Option<(usize, usize)> {
        let at = gpa.0 & !(PAGE_SIZE - 1);
        if at < self.low {
            Some(((at / PAGE_SIZE) as usize, self.low_host + at as usize))
        } else if at >= HIGH_RAM_START && at - HIGH_RAM_START < self.high {
            let off = at - HIGH_RAM_START;
            Some((((self.low + off) / PAGE_SIZE) as usize, self.high_host + off as usize))
        } else {
            None
        }
    }

    /// For engines: marks bytes `range` (within the page) of RAM page `page` as translated. Returns the
    /// 64-byte marks that were set before.
    pub fn mark_code(&self, page: usize, range: Range<usize>) -> u64 {
        self.tracker.mark(page, range)
    }

    /// For engines: the 64-byte marks of RAM page `page`.
    #[must_use]
    pub fn code_marks(&self, page: usize) -> u64 {
        self.tracker.marked(page)
    }

    /// For engines: after a direct store of `len` bytes at `gpa`, tells the code caches if it hit code.
    pub fn stored(&self, gpa: Gpa, len: usize) {
        if let Some((page, _)) = self.page(gpa) {
            use vm_memory::bitmap::Bitmap;
            self.tracker.region(page).mark_dirty((gpa.0 % PAGE_SIZE) as usize, len);
        }
    }

    /// Who is told of writes to translated code; one listener per machine, the first call counts.
    pub fn set_code_listener(&self, listener: Arc<dyn CodeListener>) -> bool {
        self.tracker.set_listener(listener)
    }
}
