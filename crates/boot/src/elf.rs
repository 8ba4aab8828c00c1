//! ELF files, as far as a loader needs them (System V ABI, "Object Files").

use wardian_memory::{Gpa, GuestMemory};

use crate::place::{self, LOAD_FLOOR};
use crate::{BootError, Image};

/// Program headers beyond this number are no kernel's.
const MAX_PROGRAM_HEADERS: u16 = 256;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// A program header.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    kind: u32,
    offset: u64,
    vaddr: u64,
    paddr: u64,
    filesz: u64,
    memsz: u64,
    align: u64,
}

/// An ELF file for x86.
pub(crate) struct Elf {
    entry: u64,
    segments: Vec<Segment>,
}

/// Names of `e_machine` values that somebody may try to boot.
fn machine_name(machine: u16) -> String {
    let name = match machine {
        8 => "MIPS",
        20 => "PowerPC",
        21 => "PowerPC 64",
        22 => "S/390",
        40 => "Arm",
        43 => "SPARC 64",
        50 => "Itanium",
        183 => "AArch64",
        243 => "RISC-V",
        258 => "LoongArch",
        other => return format!("machine number {other}"),
    };
    name.to_owned()
}

impl Elf {
    /// Parses `image` if it is ELF; `None` if it is something else.
    pub fn parse(image: &Image) -> Result<Option<Elf>, BootError> {
        if !image.bytes.starts_with(b"\x7fELF") {
            return Ok(None);
        }
        let ident = image.slice(0, 20, "The ELF header")?;
        let (class, order) = (ident[4], ident[5]);
        let wide = match class {
            1 => false,
            2 => true,
            other => return Err(image.garbled(format!("ELF class {other}"))),
        };
        if order != 1 {
            // Big-endian: e_machine is at 18 in that order.
            let machine = u16::from_be_bytes([ident[18], ident[19]]);
            return Err(BootError::WrongMachine { path: image.path.clone(), machine: machine_name(machine) });
        }
        let machine = u16::from_le_bytes([ident[18], ident[19]]);
        if machine != 62 && machine != 3 {
            return Err(BootError::WrongMachine { path: image.path.clone(), machine: machine_name(machine) });
        }
        let header = image.slice(0, if wide { 64 } else { 52 }, "The ELF header")?;
        let field = Fields(header);
        let (entry, table, entry_size, count) = if wide {
            (field.u64(24), field.u64(32), field.u16(54), field.u16(56))
        } else {
            (field.u32(24), field.u32(28), field.u16(42), field.u16(44))
        };
        if count > MAX_PROGRAM_HEADERS {
            return Err(image.garbled(format!("{count} program headers")));
        }
        let least = if wide { 56 } else { 32 };
        if count > 0 && entry_size < least {
            return Err(image.garbled(format!("program headers of {entry_size} bytes")));
        }
        let table_len = u64::from(count) * u64::from(entry_size);
        let table = image.slice(table, table_len, "The table of program headers")?;
        let segments = table
            .chunks_exact(usize::from(entry_size.max(1)))
            .map(|raw| {
                let f = Fields(raw);
                let kind = f.u32(0) as u32;
                if wide {
                    Segment {
                        kind,
                        offset: f.u64(8),
                        vaddr: f.u64(16),
                        paddr: f.u64(24),
                        filesz: f.u64(32),
                        memsz: f.u64(40),
                        align: f.u64(48),
                    }
                } else {
                    Segment {
                        kind,
                        offset: f.u32(4),
                        vaddr: f.u32(8),
                        paddr: f.u32(12),
                        filesz: f.u32(16),
                        memsz: f.u32(20),
                        align: f.u32(28),
                    }
                }
            })
            .collect();
        Ok(Some(Elf { entry, segments }))
    }

    /// Checks every loadable segment against the file and against RAM; returns the end of the highest.
    pub fn check(&self, image: &Image, low_end: u64) -> Result<u64, BootError> {
        let mut end = 0;
        let mut total: u64 = 0;
        for s in self.loadable() {
            image.slice(s.offset, s.filesz, "A segment")?;
            if s.filesz > s.memsz {
                return Err(image
                    .garbled(format!("a segment of {:#x} file and {:#x} memory bytes", s.filesz, s.memsz)));
            }
            let Some(top) = s.paddr.checked_add(s.memsz) else {
                return Err(image.garbled(format!("a segment of {:#x} bytes at {:#x}", s.memsz, s.paddr)));
            };
            place::check_span(image, s.paddr, top, low_end)?;
            end = end.max(top);
            total = total.saturating_add(s.memsz);
        }
        if end == 0 {
            return Err(image.garbled("no loadable segment".to_owned()));
        }
        // Segments over each other are nobody's honest file, and would make work without bound.
        if total > end - LOAD_FLOOR {
            return Err(image.garbled("loadable segments overlap".to_owned()));
        }
        Ok(end)
    }

    /// Copies the segments; [`Elf::check`] comes before.
    pub fn copy(&self, mem: &GuestMemory, image: &Image) -> Result<(), BootError> {
        for s in self.loadable() {
            mem.write(Gpa(s.paddr), image.slice(s.offset, s.filesz, "A segment")?)?;
            place::zero(mem, s.paddr + s.filesz, s.memsz - s.filesz)?;
        }
        Ok(())
    }

    /// The entry point as a physical address: by the segment whose virtual addresses hold it.
    pub fn entry(&self) -> u64 {
        self.loadable()
            .find(|s| self.entry >= s.vaddr && self.entry - s.vaddr < s.memsz)
            .map_or(self.entry, |s| s.paddr.wrapping_add(self.entry - s.vaddr))
    }

    /// The value of the note (`owner`, `kind`) if its descriptor is one little-endian word of 4 or 8 bytes.
    pub fn note(&self, image: &Image, owner: &[u8], kind: u32) -> Result<Option<u64>, BootError> {
        for s in self.segments.iter().filter(|s| s.kind == PT_NOTE) {
            let mut rest = image.slice(s.offset, s.filesz, "The notes")?;
            let align = if s.align == 8 { 8 } else { 4 };
            while rest.len() >= 12 {
                let f = Fields(rest);
                let (name_len, desc_len, this) = (f.u32(0) as usize, f.u32(4) as usize, f.u32(8) as u32);
                let desc_at = (12 + name_len).next_multiple_of(align);
                let next = (desc_at + desc_len).next_multiple_of(align);
                let (Some(name), Some(desc)) =
                    (rest.get(12..12 + name_len), rest.get(desc_at..desc_at + desc_len))
                else {
                    return Err(image.garbled(format!("a note of {name_len} and {desc_len} bytes")));
                };
                if this == kind && name.strip_suffix(b"\0").unwrap_or(name) == owner {
                    return match desc.len() {
                        4 => Ok(Some(Fields(desc).u32(0))),
                        8 => Ok(Some(Fields(desc).u64(0))),
                        other => Err(image.garbled(format!("note {kind} of {other} bytes"))),
                    };
                }
                rest = rest.get(next..).unwrap_or_default();
            }
        }
        Ok(None)
    }

    fn loadable(&self) -> impl Iterator<Item = &Segment> {
        self.segments.iter().filter(|s| s.kind == PT_LOAD && s.memsz > 0)
    }
}

/// Little-endian fields of a slice whose length was checked by the caller.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0.get(at..at + N).and_then(|b| b.try_into().ok()).unwrap_or([0; N])
    }
    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes(at))
    }
    fn u32(&self, at: usize) -> u64 {
        u64::from(u32::from_le_bytes(self.bytes(at)))
    }
    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes(at))
    }
}
