//! The guest's page tables (Intel SDM vol. 3A, 4.5), walked without side effects, and memory behind them.

use std::cell::RefCell;
use std::collections::HashMap;

use crate::Physical;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const FRAME: u64 = 0x000f_ffff_ffff_f000;
/// Most translations that are remembered.
const MAX_REMEMBERED: usize = 1 << 15;

/// Where a linear address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Guest physical address.
    pub gpa: u64,
    /// Size of the page: 4 KiB, 2 MiB or 1 GiB.
    pub size: u64,
    /// Writable at every level.
    pub writable: bool,
    /// For user mode at every level.
    pub user: bool,
    /// Executable at every level.
    pub executable: bool,
}

/// A stretch of mapped linear addresses with the same rights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// First address.
    pub start: u64,
    /// Address behind it.
    pub end: u64,
    /// May be written.
    pub writable: bool,
    /// May be executed.
    pub executable: bool,
}

/// One address space of the guest: physical memory behind a page table root. It remembers translations, so it is
/// made anew for each look.
pub struct Space<'m> {
    memory: &'m dyn Physical,
    root: u64,
    levels: u8,
    pages: RefCell<HashMap<u64, Option<u64>>>,
}

fn canonical(at: u64, levels: u8) -> bool {
    let unused = 64 - (12 + 9 * u32::from(levels));
    (at << unused).cast_signed() >> unused == at.cast_signed()
}

impl<'m> Space<'m> {
    /// The space of the page tables at `root` (CR3; flags and PCID are ignored) with 4 or 5 levels.
    #[must_use]
    pub fn new(memory: &'m dyn Physical, root: u64, levels: u8) -> Space<'m> {
        Space { memory, root: root & FRAME, levels: levels.clamp(4, 5), pages: RefCell::default() }
    }

    /// Another space of the same memory.
    #[must_use]
    pub fn with_root(&self, root: u64) -> Space<'m> {
        Space::new(self.memory, root, self.levels)
    }

    /// The memory.
    #[must_use]
    pub fn memory(&self) -> &'m dyn Physical {
        self.memory
    }

    /// The root.
    #[must_use]
    pub fn root(&self) -> u64 {
        self.root
    }

    /// The number of levels.
    #[must_use]
    pub fn levels(&self) -> u8 {
        self.levels
    }

    fn entry(&self, table: u64, index: u64) -> u64 {
        let mut bytes = [0; 8];
        if !self.memory.read(table + index * 8, &mut bytes) {
            return 0;
        }
        u64::from_le_bytes(bytes)
    }

    /// Walks the page tables.
    #[must_use]
    pub fn walk(&self, at: u64) -> Option<Leaf> {
        if !canonical(at, self.levels) {
            return None;
        }
        let (mut table, mut rights, mut no_execute) = (self.root, WRITABLE | USER, 0);
        for level in (0..self.levels).rev() {
            let shift = 12 + 9 * u32::from(level);
            let entry = self.entry(table, at >> shift & 511);
            if entry & PRESENT == 0 {
                return None;
            }
            rights &= entry;
            no_execute |= entry & NO_EXECUTE;
            if level == 0 || (level <= 2 && entry & LARGE != 0) {
                let size = 1u64 << shift;
                return Some(Leaf {
                    gpa: entry & FRAME & !(size - 1) | at & (size - 1),
                    size,
                    writable: rights & WRITABLE != 0,
                    user: rights & USER != 0,
                    executable: no_execute == 0,
                });
            }
            table = entry & FRAME;
        }
        None
    }

    /// The physical address of a linear one.
    #[must_use]
    pub fn translate(&self, at: u64) -> Option<u64> {
        let page = at >> 12;
        if let Some(known) = self.pages.borrow().get(&page) {
            return known.map(|gpa| gpa | at & 0xfff);
        }
        let gpa = self.walk(at).map(|leaf| leaf.gpa & !0xfff);
        let mut pages = self.pages.borrow_mut();
        if pages.len() >= MAX_REMEMBERED {
            pages.clear();
        }
        pages.insert(page, gpa);
        gpa.map(|gpa| gpa | at & 0xfff)
    }

    /// Reads bytes; `None` if any of them is not mapped to RAM.
    pub fn read(&self, at: u64, out: &mut [u8]) -> Option<()> {
        let mut done = 0;
        while done < out.len() {
            let here = at.checked_add(done as u64)?;
            let len = (out.len() - done).min(4096 - (here & 0xfff) as usize);
            if !self.memory.read(self.translate(here)?, &mut out[done..done + len]) {
                return None;
            }
            done += len;
        }
        Some(())
    }

    /// Reads `len` bytes, at most `most`.
    #[must_use]
    pub fn bytes(&self, at: u64, len: u64, most: usize) -> Option<Vec<u8>> {
        let len = usize::try_from(len).ok().filter(|len| *len <= most)?;
        // Before the buffer is made: is the start there at all?
        self.translate(at)?;
        let mut out = vec![0; len];
        self.read(at, &mut out)?;
        Some(out)
    }

    /// Reads a byte.
    #[must_use]
    pub fn u8(&self, at: u64) -> Option<u8> {
        let mut out = [0; 1];
        self.read(at, &mut out)?;
        Some(out[0])
    }

    /// Reads a little-endian word of 16 bits.
    #[must_use]
    pub fn u16(&self, at: u64) -> Option<u16> {
        let mut out = [0; 2];
        self.read(at, &mut out)?;
        Some(u16::from_le_bytes(out))
    }

    /// Reads a little-endian word of 32 bits.
    #[must_use]
    pub fn u32(&self, at: u64) -> Option<u32> {
        let mut out = [0; 4];
        self.read(at, &mut out)?;
        Some(u32::from_le_bytes(out))
    }

    /// Reads a little-endian word of 64 bits.
    #[must_use]
    pub fn u64(&self, at: u64) -> Option<u64> {
        let mut out = [0; 8];
        self.read(at, &mut out)?;
        Some(u64::from_le_bytes(out))
    }

    /// Reads text up to a NUL, at most `most` bytes; `None` if it is not mapped. Bytes that are no UTF-8 are replaced.
    #[must_use]
    pub fn text(&self, at: u64, most: usize) -> Option<String> {
        let mut out = Vec::new();
        while out.len() < most {
            let here = at.checked_add(out.len() as u64)?;
            let len = (4096 - (here & 0xfff) as usize).min(most - out.len()).min(64);
            let mut piece = [0; 64];
            self.read(here, &mut piece[..len])?;
            if let Some(end) = piece[..len].iter().position(|byte| *byte == 0) {
                out.extend_from_slice(&piece[..end]);
                break;
            }
            out.extend_from_slice(&piece[..len]);
        }
        Some(String::from_utf8_lossy(&out).into_owned())
    }

    /// What is mapped between `start` and `end` (of one half of the address space), coalesced, at most `most` stretches.
    #[must_use]
    pub fn mapped(&self, start: u64, end: u64, most: usize) -> Vec<Stretch> {
        let mut all: Vec<Stretch> = Vec::new();
        let mut at = start & !0xfff;
        // One table of each level is read for each 512 steps at most; lying tables cannot make it longer.
        let mut steps = 0;
        while at < end && all.len() < most && steps < 1 << 20 {
            steps += 1;
            let (leaf, next) = match self.walk(at) {
                Some(leaf) => (Some(leaf), (at & !(leaf.size - 1)).checked_add(leaf.size)),
                None => (None, self.next_present(at)),
            };
            let next = next.unwrap_or(u64::MAX).min(end);
            if let Some(leaf) = leaf {
                let (writable, executable) = (leaf.writable, leaf.executable);
                match all.last_mut() {
                    Some(last)
                        if last.end == at && last.writable == writable && last.executable == executable =>
                    {
                        last.end = next;
                    }
                    _ => all.push(Stretch { start: at, end: next, writable, executable }),
                }
            }
            at = next;
        }
        all
    }

    /// The next address behind `at`, which is not mapped, that may be: the end of what the missing entry would cover.
    fn next_present(&self, at: u64) -> Option<u64> {
        let mut table = self.root;
        for level in (0..self.levels).rev() {
            let shift = 12 + 9 * u32::from(level);
            let entry = self.entry(table, at >> shift & 511);
            if entry & PRESENT == 0 || level == 0 {
                return (at >> shift).checked_add(1).map(|n| n << shift).filter(|next| *next > at);
            }
            table = entry & FRAME;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::Space;
    use crate::Physical;

    fn set(memory: &mut [u8], at: u64, value: u64) {
        memory[at as usize..at as usize + 8].copy_from_slice(&value.to_le_bytes());
    }

    /// Tables at 1000h: 4 KiB at FFFF_FFFF_8000_0000h, 2 MiB at ..8020_0000h, 1 GiB at ..C000_0000h.
    fn tables() -> Vec<u8> {
        let mut memory = vec![0u8; 1 << 20];
        set(&mut memory, 0x1000 + 511 * 8, 0x2003);
        set(&mut memory, 0x2000 + 510 * 8, 0x3003);
        set(&mut memory, 0x2000 + 511 * 8, 0x4000_0083 | 1 << 63);
        set(&mut memory, 0x3000, 0x4003);
        set(&mut memory, 0x3008, 0x0020_0081);
        set(&mut memory, 0x4000, 0x5003 | 1 << 63);
        memory[0x5010] = 7;
        memory
    }

    #[test]
    fn pages_of_all_sizes() {
        let memory = tables();
        let space = Space::new(&memory, 0x1fff, 4);
        let leaf = space.walk(0xffff_ffff_8000_0010).unwrap();
        assert_eq!(
            (leaf.gpa, leaf.size, leaf.writable, leaf.user, leaf.executable),
            (0x5010, 4096, true, false, false)
        );
        assert_eq!(space.u8(0xffff_ffff_8000_0010), Some(7));
        let leaf = space.walk(0xffff_ffff_8030_0000).unwrap();
        assert_eq!((leaf.gpa, leaf.size, leaf.writable, leaf.executable), (0x30_0000, 2 << 20, false, true));
        assert_eq!(space.walk(0xffff_ffff_c000_1000).unwrap().gpa, 0x4000_1000);
        assert_eq!(space.u8(0xffff_ffff_c000_1000), None, "mapped, but there is no RAM");
        assert_eq!(space.walk(0x0000_ffff_8000_0000), None, "not canonical");
        assert_eq!(space.walk(0xffff_ffff_8000_1000), None);
        let mapped = space.mapped(0xffff_ffff_8000_0000, u64::MAX, 16);
        assert_eq!(mapped.len(), 3);
        assert_eq!((mapped[0].start, mapped[0].end), (0xffff_ffff_8000_0000, 0xffff_ffff_8000_1000));
        assert_eq!((mapped[1].start, mapped[1].end), (0xffff_ffff_8020_0000, 0xffff_ffff_8040_0000));
    }

    #[test]
    fn tables_that_lead_to_themselves_come_to_an_end() {
        let mut memory = vec![0u8; 1 << 16];
        for entry in 0..512 {
            set(&mut memory, 0x1000 + entry * 8, 0x1003);
        }
        let space = Space::new(&memory, 0x1000, 5);
        assert_eq!(space.translate(0x1234), Some(0x1234));
        let begin = std::time::Instant::now();
        let mapped = space.mapped(0, 1 << 56, 1 << 20);
        assert!(mapped.len() <= 1 << 20 && begin.elapsed().as_secs() < 20);
        assert_eq!(space.bytes(0x1000, u64::MAX, 4096), None);
        assert_eq!(space.text(0, 1 << 13).map(|text| text.len()), Some(2), "two bytes of an entry");
        let nowhere = Space::new(&memory, 0xff_ffff_f000, 4);
        assert_eq!(nowhere.walk(0), None);
        assert!(Physical::data(&memory)[0].end == 1 << 16);
    }
}
