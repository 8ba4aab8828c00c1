//! Binaries of the guest's user space: names, and what unwinding needs.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use object::elf::{
    DT_GNU_HASH, DT_STRSZ, DT_STRTAB, DT_SYMTAB, DynamicTag, FileHeader64, PF_X, PT_DYNAMIC, PT_GNU_EH_FRAME,
    PT_LOAD, PT_NOTE, SHN_UNDEF, SHT_DYNSYM, SHT_SYMTAB, STT_FUNC, STT_GNU_IFUNC, STT_NOTYPE, Sym64,
};
use object::read::elf::{Dyn, FileHeader, ProgramHeader, SectionHeader, Sym};
use object::{LittleEndian, ReadRef};

use crate::Symbols;
use crate::pagecache::Sparse;

const LE: LittleEndian = LittleEndian;
const MAX_SYMBOLS: u64 = 1 << 20;
const MAX_EH_FRAME: u64 = 16 << 20;
const MAX_NAME: usize = 1024;
/// DW_CFA_hi_user: no instruction of an unwinding table.
const NO_INSTRUCTION: u8 = 0x3f;
/// Most binaries that are kept, and most bytes of them.
const MAX_BINARIES: usize = 512;
const MAX_BYTES: usize = 512 << 20;
const NT_GNU_BUILD_ID: u32 = 3;

/// `object` reads a file with holes: a hole is an error.
impl<'a> ReadRef<'a> for &'a Sparse {
    fn len(self) -> Result<u64, ()> {
        Ok(Sparse::len(self))
    }

    fn read_bytes_at(self, offset: u64, size: u64) -> Result<&'a [u8], ()> {
        self.get(offset, size).ok_or(())
    }

    fn read_bytes_at_until(self, range: Range<u64>, delimiter: u8) -> Result<&'a [u8], ()> {
        // A name is short: what is known of it up to the next page or two.
        let len = (range.end.saturating_sub(range.start)).min(MAX_NAME as u64);
        for len in [64, len] {
            if let Some(bytes) = self.get(range.start, len.min(range.end.saturating_sub(range.start)))
                && let Some(end) = bytes.iter().position(|byte| *byte == delimiter)
            {
                return Ok(&bytes[..end]);
            }
        }
        Err(())
    }
}

/// A section's address and bytes.
pub(crate) type Section = (Range<u64>, Arc<[u8]>);

/// What is kept of a binary.
#[derive(Clone, Debug, Default)]
pub(crate) struct Image {
    /// Names, by the addresses that the file has.
    pub(crate) symbols: Symbols,
    pub(crate) build_id: Vec<u8>,
    /// Offset in the file, bytes, address, executable.
    segments: Vec<(u64, u64, u64, bool)>,
    pub(crate) eh_frame: Option<Section>,
    pub(crate) eh_frame_hdr: Option<Section>,
}

impl Image {
    /// Takes an ELF file apart; `None` if it is none for x86-64.
    pub(crate) fn parse(file: &Sparse) -> Option<Image> {
        let header = FileHeader64::<LittleEndian>::parse(file).ok()?;
        if header.e_machine(LE) != object::elf::EM_X86_64 {
            return None;
        }
        let programs = header.program_headers(LE, file).ok()?;
        let mut image = Image::default();
        for program in programs.iter().take(64) {
            let place = (program.p_offset(LE), program.p_filesz(LE), program.p_vaddr(LE));
            match program.p_type(LE) {
                PT_LOAD => {
                    let (offset, size, address) = place;
                    image.segments.push((offset, size, address, program.p_flags(LE) & PF_X == PF_X));
                }
                PT_NOTE if image.build_id.is_empty() => {
                    let notes = file.get(place.0, place.1.min(4096)).and_then(build_id_of_notes);
                    image.build_id = notes.unwrap_or_default();
                }
                PT_GNU_EH_FRAME => image.read_eh_frame(file, place),
                _ => {}
            }
        }
        let mut whole = false;
        if let Ok(sections) = header.sections(LE, file) {
            for kind in [SHT_SYMTAB, SHT_DYNSYM] {
                if let Ok(table) = sections.symbols(LE, file, kind) {
                    let strings = table.strings();
                    image.add(table.iter(), kind == SHT_SYMTAB, |symbol| symbol.name(LE, strings).ok());
                    whole |= kind == SHT_DYNSYM || !table.is_empty();
                }
            }
            // Without PT_GNU_EH_FRAME the section says where it is.
            let named = |section: &&object::elf::SectionHeader64<LittleEndian>| {
                sections.section_name(LE, section) == Ok(b".eh_frame")
            };
            if let Some(section) = sections.iter().find(named).filter(|_| image.eh_frame.is_none()) {
                let (at, size) = (section.sh_addr(LE), section.sh_size(LE).min(MAX_EH_FRAME));
                let bytes = file.get(section.sh_offset(LE), size);
                image.eh_frame = bytes.map(|bytes| (at..at.saturating_add(size), bytes.into()));
            }
        }
        if !whole {
            let dynamic = programs.iter().find(|program| program.p_type(LE) == PT_DYNAMIC);
            dynamic.and_then(|program| image.add_dynamic(file, program.dynamic(LE, file).ok()??));
        }
        image.symbols.finish();
        Some(image)
    }

    fn add<'d>(
        &mut self,
        symbols: impl Iterator<Item = &'d Sym64<LittleEndian>>,
        all: bool,
        name: impl Fn(&'d Sym64<LittleEndian>) -> Option<&'d [u8]>,
    ) {
        for symbol in symbols.take(MAX_SYMBOLS as usize) {
            let kind = symbol.st_type();
            let code = matches!(kind, STT_FUNC | STT_GNU_IFUNC) || all && kind == STT_NOTYPE;
            // In a file whose local names are gone, a name without a size says nothing about what follows it.
            if !code || symbol.st_shndx(LE) == SHN_UNDEF || symbol.st_size(LE) == 0 && !all {
                continue;
            }
            if !self.executable(symbol.st_value(LE)) {
                continue;
            }
            let Some(name) = name(symbol).filter(|name| !name.is_empty() && name.len() <= MAX_NAME) else {
                continue;
            };
            self.symbols.add_sized(
                symbol.st_value(LE),
                symbol.st_size(LE),
                b't',
                &String::from_utf8_lossy(name),
            );
        }
    }

    /// Bytes of host memory, about.
    fn bytes(&self) -> usize {
        let section = |section: &Option<Section>| section.as_ref().map_or(0, |(_, bytes)| bytes.len());
        section(&self.eh_frame) + section(&self.eh_frame_hdr) + self.symbols.len() * 64
    }

    fn executable(&self, address: u64) -> bool {
        self.segments.iter().any(|(_, size, at, code)| *code && address.wrapping_sub(*at) < *size)
    }

    /// Where an address of the file lies in it.
    fn offset_of(&self, address: u64) -> Option<u64> {
        let held = self.segments.iter().find(|(_, size, at, _)| address.wrapping_sub(*at) < *size)?;
        Some(address - held.2 + held.0)
    }

    /// The names that the dynamic linker uses, found as it finds them.
    fn add_dynamic(&mut self, file: &Sparse, entries: &[object::elf::Dyn64<LittleEndian>]) -> Option<()> {
        let value = |tag: DynamicTag| {
            entries.iter().find(|entry| entry.d_tag(LE) == tag).map(|entry| entry.d_val(LE))
        };
        let (table, strings) = (self.offset_of(value(DT_SYMTAB)?)?, self.offset_of(value(DT_STRTAB)?)?);
        let strings = file.get(strings, value(DT_STRSZ)?)?;
        let count = gnu_hash_count(file, self.offset_of(value(DT_GNU_HASH)?)?)?;
        let symbols: &[Sym64<LittleEndian>] = file.read_slice_at(table, count as usize).ok()?;
        self.add(symbols.iter(), false, |symbol| {
            let rest = strings.get(symbol.st_name(LE) as usize..)?;
            Some(&rest[..rest.iter().position(|byte| *byte == 0)?])
        });
        Some(())
    }

    /// `.eh_frame_hdr` says where `.eh_frame` is (Linux Standard Base, Exception Frames).
    fn read_eh_frame(&mut self, file: &Sparse, (offset, size, address): (u64, u64, u64)) {
        let Some(head) = file.get(offset, size.min(8)) else { return };
        // Version 1, pointer relative to itself, of 4 bytes with a sign: what every linker writes.
        let [1, 0x1b, _, _, a, b, c, d] = *head else { return };
        let start = (address + 4).wrapping_add_signed(i64::from(i32::from_le_bytes([a, b, c, d])));
        let Some(segment) = self.segments.iter().find(|(_, size, at, _)| start.wrapping_sub(*at) < *size)
        else {
            return;
        };
        let (from, most) = (start - segment.2 + segment.0, segment.1 - (start - segment.2));
        // It goes on at most to the end of its segment; a zero length ends it. What is not in memory becomes what no
        // entry begins with and no instruction is, so that a walk that needs it ends.
        if let (Some(bytes), Some(hdr)) = (
            file.get_with_holes(from, most.min(MAX_EH_FRAME), NO_INSTRUCTION),
            file.get_with_holes(offset, size.min(MAX_EH_FRAME), NO_INSTRUCTION),
        ) {
            self.eh_frame = Some((start..start + bytes.len() as u64, bytes.into()));
            self.eh_frame_hdr = Some((address..address + hdr.len() as u64, hdr.into()));
        }
    }

    /// What to add to the file's addresses to get those of a mapping of `offset` at `start`.
    pub(crate) fn bias(&self, start: u64, offset: u64) -> Option<u64> {
        let holds = |(at, size, _, _): &&(u64, u64, u64, bool)| {
            offset.wrapping_sub(at & !0xfff) < size + (at & 0xfff)
        };
        let by_code = self.segments.iter().filter(|segment| segment.3).find(holds);
        let (at, _, address, _) = by_code.or_else(|| self.segments.iter().find(holds))?;
        Some(start.wrapping_sub(offset).wrapping_sub(address.wrapping_sub(*at)))
    }

    /// The code, by the file's addresses.
    pub(crate) fn text(&self) -> Option<Range<u64>> {
        let code = || self.segments.iter().filter(|segment| segment.3);
        Some(code().map(|s| s.2).min()?..code().map(|s| s.2.saturating_add(s.1)).max()?)
    }
}

/// Number of symbols by the GNU hash table at `at`.
fn gnu_hash_count(file: &Sparse, at: u64) -> Option<u64> {
    let word = |place: u64| Some(u32::from_le_bytes(file.get(place, 4)?.try_into().ok()?));
    let (buckets, first, bloom) = (u64::from(word(at)?), u64::from(word(at + 4)?), u64::from(word(at + 8)?));
    let chains = at.checked_add(16 + bloom * 8 + buckets * 4)?;
    let table = file.get(at + 16 + bloom * 8, buckets * 4)?;
    let last = table.as_chunks::<4>().0.iter().map(|bucket| u32::from_le_bytes(*bucket)).max()?;
    let mut last = u64::from(last);
    if last < first {
        return Some(first);
    }
    while last < MAX_SYMBOLS {
        if word(chains + (last - first) * 4)? & 1 == 1 {
            return Some(last + 1);
        }
        last += 1;
    }
    None
}

/// The build-id among ELF notes.
pub(crate) fn build_id_of_notes(mut notes: &[u8]) -> Option<Vec<u8>> {
    while notes.len() >= 12 {
        let word = |at: usize| u32::from_le_bytes([notes[at], notes[at + 1], notes[at + 2], notes[at + 3]]);
        let (name, size, kind) = (word(0) as usize, word(4) as usize, word(8));
        let start = 12 + name.checked_next_multiple_of(4)?;
        let end = start.checked_add(size)?;
        let data = notes.get(start..end)?;
        if kind == NT_GNU_BUILD_ID && notes.get(12..16) == Some(b"GNU\0") && size <= 32 {
            return Some(data.to_vec());
        }
        notes = notes.get(end.checked_next_multiple_of(4)?..)?;
    }
    None
}

/// Binaries that were read, for as long as the kernel is known.
#[derive(Default)]
pub(crate) struct Binaries(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    images: HashMap<String, Option<Arc<Image>>>,
    bytes: usize,
}

impl Binaries {
    /// What is known of `key`; nothing, if it was not looked at.
    pub(crate) fn find(&self, key: &str) -> Option<Option<Arc<Image>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).images.get(key).cloned()
    }

    pub(crate) fn keep(&self, key: String, image: Option<Image>) -> Option<Arc<Image>> {
        let image = image.map(Arc::new);
        let bytes = image.as_ref().map_or(0, |image| image.bytes());
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.images.len() >= MAX_BINARIES || kept.bytes.saturating_add(bytes) > MAX_BYTES {
            *kept = Kept::default();
        }
        kept.bytes += bytes;
        kept.images.insert(key, image.clone());
        image
    }
}
