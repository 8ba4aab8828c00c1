//! Low RAM, where the loader's own data lies: fixed places and a small heap for what varies.

use wardian_memory::{Gpa, GuestMemory};

use crate::BootError;

/// Descriptor table for the entry.
pub(crate) const GDT: u64 = 0x500;
/// Fixed-size boot information: PVH start info or multiboot information.
pub(crate) const INFO: u64 = 0x6000;
/// Linux `boot_params`, one page.
pub(crate) const ZERO_PAGE: u64 = 0x7000;
/// Page tables for the 64-bit entry: PML4, PDPT, four page directories.
pub(crate) const PAGE_TABLES: u64 = 0x8000;
const HEAP: std::ops::Range<u64> = 0x1_0000..0x9_0000;

/// Hands out low RAM for command lines, module lists and memory maps.
pub(crate) struct LowHeap {
    next: u64,
}

impl LowHeap {
    pub fn new() -> LowHeap {
        LowHeap { next: HEAP.start }
    }

    /// Writes `data` at a fresh 16-byte aligned place and returns it.
    pub fn put(&mut self, mem: &GuestMemory, data: &[u8]) -> Result<u64, BootError> {
        let at = self.next;
        let end = at + data.len() as u64;
        if end > HEAP.end {
            return Err(BootError::TooMuchInformation { need: data.len() as u64 });
        }
        mem.write(Gpa(at), data)?;
        self.next = end.next_multiple_of(16);
        Ok(at)
    }

    /// Like `put` for a string, with its NUL.
    pub fn put_text(&mut self, mem: &GuestMemory, text: &str) -> Result<u64, BootError> {
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        self.put(mem, &bytes)
    }
}
