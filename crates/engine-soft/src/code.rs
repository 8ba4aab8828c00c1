//! Code memory: one memfd mapped twice, writable here and executable there; nothing is ever both.
//!
//! Offsets into the memory are `u32`; hot code grows from the start, cold stubs from [`COLD_START`].

use std::ptr;

use wardian_cpu::EngineError;

/// Bytes for hot code.
pub const COLD_START: u32 = 28 << 20;
/// Bytes in all.
pub const CODE_LEN: u32 = 72 << 20;
/// Room that must be left in each part before a superblock is translated.
pub const MARGIN: u32 = 64 << 10;

/// Bytes that get their host pages at once: one by one costs more.
const CHUNK: u32 = 256 << 10;

/// The double mapping of one vCPU's code.
pub struct CodeMemory {
    write: *mut u8,
    exec: *const u8,
    /// Up to where each part has its host pages.
    ready: [u32; 2],
}

// SAFETY: the mappings belong to this value; only the owning vCPU's thread writes and executes them.
unsafe impl Send for CodeMemory {}

impl CodeMemory {
    /// Maps fresh code memory.
    pub fn new() -> Result<CodeMemory, EngineError> {
        let host = |what: &str| EngineError::Host(format!("{what} ({})", std::io::Error::last_os_error()));
        // SAFETY: plain system calls; the results are checked before use, the descriptor is closed below.
        unsafe {
            let fd = libc::memfd_create(c"wardian-code".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(host("no memfd for translated code"));
            }
            if libc::ftruncate(fd, i64::from(CODE_LEN)) != 0 {
                let error = host("no memory for translated code");
                libc::close(fd);
                return Err(error);
            }
            let map = |prot| libc::mmap(ptr::null_mut(), CODE_LEN as usize, prot, libc::MAP_SHARED, fd, 0);
            let write = map(libc::PROT_READ | libc::PROT_WRITE);
            let exec = map(libc::PROT_READ | libc::PROT_EXEC);
            libc::close(fd);
            if write == libc::MAP_FAILED || exec == libc::MAP_FAILED {
                return Err(host("translated code cannot be mapped executable"));
            }
            Ok(CodeMemory { write: write.cast(), exec: exec.cast(), ready: [0, COLD_START] })
        }
    }

    /// A block will be written at `hot` and `cold`.
    #[inline]
    pub fn prepare(&mut self, hot: u32, cold: u32) {
        for (part, at) in [hot, cold].into_iter().enumerate() {
            while at + MARGIN / 4 > self.ready[part] && self.ready[part] + CHUNK <= CODE_LEN {
                let from = self.ready[part] as usize;
                // SAFETY: the range lies inside the writable mapping. (A host that cannot do it makes the pages one by
                // one.)
                unsafe {
                    libc::madvise(self.write.add(from).cast(), CHUNK as usize, libc::MADV_POPULATE_WRITE);
                }
                self.ready[part] += CHUNK;
            }
        }
    }

    /// Executable address of offset `at`.
    pub fn exec(&self, at: u32) -> u64 {
        self.exec as u64 + u64::from(at)
    }

    /// Offset of an executable address, if it lies here.
    pub fn offset_of(&self, address: u64) -> Option<u32> {
        let offset = address.wrapping_sub(self.exec as u64);
        (offset < u64::from(CODE_LEN)).then_some(offset as u32)
    }

    /// Writes `bytes` at offset `at`; outside the memory is a bug of the translator and ignored.
    #[inline]
    pub fn put(&mut self, at: u32, bytes: &[u8]) {
        debug_assert!(at as usize + bytes.len() <= CODE_LEN as usize);
        if at as usize + bytes.len() <= CODE_LEN as usize {
            // SAFETY: the range lies inside the writable mapping; x86 hosts keep instruction fetch coherent with
            // stores through another mapping of the same page once a jump was taken, and only this thread runs
            // the code.
            unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.write.add(at as usize), bytes.len()) };
        }
    }

    /// Writes the `len` bytes at `from` once more, at `at`.
    pub fn repeat(&mut self, from: u32, len: u32, at: u32) {
        let inside = |start: u32| start <= CODE_LEN && len <= CODE_LEN - start;
        debug_assert!(inside(from) && inside(at));
        if inside(from) && inside(at) {
            // SAFETY: both ranges lie inside the writable mapping; see `put`.
            unsafe {
                ptr::copy(self.write.add(from as usize), self.write.add(at as usize), len as usize);
            }
        }
    }

    /// The `len` bytes at `at`, for disassembly.
    pub fn bytes(&self, at: u32, len: u32) -> &[u8] {
        let end = at.saturating_add(len).min(CODE_LEN);
        // SAFETY: the range lies inside the mapping, which lives as long as self.
        unsafe { std::slice::from_raw_parts(self.exec.add(at as usize), (end - at) as usize) }
    }

    /// Points the 32-bit displacement at `site` to offset `target`.
    pub fn patch(&mut self, site: u32, target: u32) {
        let rel = target.wrapping_sub(site.wrapping_add(4));
        self.put(site, &rel.to_le_bytes());
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        // SAFETY: both mappings were made in `new` and are not used after this.
        unsafe {
            libc::munmap(self.write.cast(), CODE_LEN as usize);
            libc::munmap(self.exec.cast_mut().cast(), CODE_LEN as usize);
        }
    }
}
