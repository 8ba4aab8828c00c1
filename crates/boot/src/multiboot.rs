//! Multiboot kernels, version 1 (Multiboot Specification 0.6.96).

use tracing::{info, warn};
use wardian_cpu::CpuState;
use wardian_memory::{Gpa, GuestMemory};

use crate::elf::Elf;
use crate::low::{INFO, LowHeap};
use crate::map::{MapKind, memory_map};
use crate::place::{self, Blob};
use crate::{BootError, BootRequest, Image, entry};

/// The header lies in the first 8192 bytes, aligned to 4 (3.1).
const SEARCH: usize = 8192;
const HEADER_MAGIC: u32 = 0x1bad_b002;
/// In EAX at the entry (3.2).
const LOADER_MAGIC: u64 = 0x2bad_b002;
const FLAG_ADDRESSES: u32 = 1 << 16;
const FLAG_VIDEO: u32 = 1 << 2;
/// Page-aligned modules, memory information: both always given.
const FLAGS_GIVEN: u32 = 0b011;
const CMDLINE_MAX: usize = 4095;

/// What the information structure holds (3.3): memory sizes, command line, modules, map, loader's name.
const INFO_FLAGS: u32 = 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9;

/// A valid header.
pub(crate) struct Header {
    /// Where it lies in the file.
    at: u64,
    flags: u32,
    /// header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr, if the flags say so.
    addresses: Option<[u32; 5]>,
}

/// The multiboot header of `image`, if it has one.
pub(crate) fn find(image: &Image) -> Option<Header> {
    let head = &image.bytes[..image.bytes.len().min(SEARCH)];
    for at in (0..head.len().saturating_sub(11)).step_by(4) {
        let word = |i: usize| {
            let b = head.get(at + i * 4..at + i * 4 + 4)?;
            Some(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        };
        let (magic, flags, checksum) = (word(0)?, word(1)?, word(2)?);
        if magic != HEADER_MAGIC || magic.wrapping_add(flags).wrapping_add(checksum) != 0 {
            continue;
        }
        let addresses = if flags & FLAG_ADDRESSES == 0 {
            None
        } else {
            Some([word(3)?, word(4)?, word(5)?, word(6)?, word(7)?])
        };
        return Some(Header { at: at as u64, flags, addresses });
    }
    None
}

/// How the kernel gets into memory: by the header's own addresses, which go before those of the ELF file.
enum Plan<'a> {
    Flat { at: u64, bytes: &'a [u8], bss: u64 },
    Elf(&'a Elf),
}

fn flat<'a>(image: &'a Image, at: u64, addresses: &[u32; 5]) -> Result<(Plan<'a>, u64, u32), BootError> {
    let [header, load, load_end, bss_end, door] = *addresses;
    // The header tells where the load address lies in the file.
    let offset = header
        .checked_sub(load)
        .and_then(|ahead| at.checked_sub(u64::from(ahead)))
        .ok_or_else(|| image.garbled(format!("multiboot load address {load:#x}, header at {header:#x}")))?;
    let len = match load_end {
        0 => (image.bytes.len() as u64).saturating_sub(offset),
        end => end
            .checked_sub(load)
            .map(u64::from)
            .ok_or_else(|| image.garbled(format!("multiboot load end {end:#x} before {load:#x}")))?,
    };
    let bytes = image.slice(offset, len, "The multiboot image")?;
    let load = u64::from(load);
    let end = (load + len).max(u64::from(bss_end));
    if !(load..end).contains(&u64::from(door)) {
        return Err(image.garbled(format!("multiboot entry {door:#x}")));
    }
    Ok((Plan::Flat { at: load, bytes, bss: end - load - len }, end, door))
}

pub(crate) fn load(
    mem: &GuestMemory,
    request: &BootRequest,
    image: &Image,
    header: &Header,
    elf: Option<&Elf>,
) -> Result<CpuState, BootError> {
    // Bits 0-15 are demands; a loader that does not know one must refuse.
    let unknown = header.flags & 0xffff & !(FLAGS_GIVEN | FLAG_VIDEO);
    if unknown != 0 {
        return Err(image.unsupported(format!("it demands multiboot features {unknown:#x}")));
    }
    if header.flags & FLAG_VIDEO != 0 {
        warn!(kernel = %image.path.display(), "The kernel asks for a video mode; there is no video here");
    }
    let low_end = place::low_end(mem);
    let (plan, kernel_end, door) = match (&header.addresses, elf) {
        (Some(addresses), _) => {
            let (plan, end, door) = flat(image, header.at, addresses)?;
            if let Plan::Flat { at, .. } = plan {
                place::check_span(image, at, end, low_end)?;
            }
            (plan, end, door)
        }
        (None, Some(elf)) => {
            let end = elf.check(image, low_end)?;
            let door = u32::try_from(elf.entry())
                .ok()
                .filter(|d| u64::from(*d) < end)
                .ok_or_else(|| image.garbled(format!("entry {:#x}", elf.entry())))?;
            (Plan::Elf(elf), end, door)
        }
        (None, None) => {
            return Err(image.unsupported("its multiboot header has no addresses and it is no ELF"));
        }
    };
    // By custom the first word of a command line is the name of its file.
    let named = |path: &std::path::Path, text: &str| {
        let name = path.display().to_string();
        if text.is_empty() { name } else { format!("{name} {text}") }
    };
    let cmdline = named(&request.kernel, &request.cmdline);
    if cmdline.len() > CMDLINE_MAX {
        return Err(BootError::CommandLineTooLong { len: cmdline.len(), max: CMDLINE_MAX });
    }

    let files =
        request.initrd.iter().map(|p| (p, "")).chain(request.modules.iter().map(|(p, t)| (p, t.as_str())));
    let mut next = kernel_end;
    let mut placed = Vec::new();
    for (path, text) in files {
        let blob = Blob::open(path)?;
        let at = blob.place_low(next, low_end)?;
        next = at + blob.size;
        placed.push((blob, at, named(path, text)));
    }

    let mut heap = LowHeap::new();
    let cmdline_at = heap.put_text(mem, &cmdline)?;
    let name_at = heap.put_text(mem, "Wardian")?;
    let mut modules = Vec::new();
    for (blob, at, text) in &placed {
        let text_at = heap.put_text(mem, text)?;
        for word in [*at, at + blob.size, text_at, 0] {
            modules.extend_from_slice(&(word as u32).to_le_bytes());
        }
    }
    let modules_at = if placed.is_empty() { 0 } else { heap.put(mem, &modules)? };
    let map = memory_map(mem, &request.reserved);
    let mut map_bytes = Vec::new();
    for e in &map {
        // The size of an entry does not count itself.
        map_bytes.extend_from_slice(&20u32.to_le_bytes());
        map_bytes.extend_from_slice(&e.range.start.to_le_bytes());
        map_bytes.extend_from_slice(&(e.range.end - e.range.start).to_le_bytes());
        map_bytes.extend_from_slice(&(e.kind as u32).to_le_bytes());
    }
    let map_at = heap.put(mem, &map_bytes)?;

    let lower = map.first().filter(|e| e.kind == MapKind::Ram).map_or(0, |e| e.range.end) >> 10;
    let upper = (low_end - (1 << 20)) >> 10;
    let mut info = [0u8; 116];
    let mut put = |at: usize, word: u64| info[at..at + 4].copy_from_slice(&(word as u32).to_le_bytes());
    put(0, u64::from(INFO_FLAGS));
    put(4, lower);
    put(8, upper);
    put(16, cmdline_at);
    put(20, placed.len() as u64);
    put(24, modules_at);
    put(44, map_bytes.len() as u64);
    put(48, map_at);
    put(64, name_at);
    mem.write(Gpa(INFO), &info)?;

    match plan {
        Plan::Flat { at, bytes, bss } => {
            mem.write(Gpa(at), bytes)?;
            place::zero(mem, at + bytes.len() as u64, bss)?;
        }
        Plan::Elf(elf) => elf.copy(mem, image)?,
    }
    for (blob, at, _) in placed {
        blob.copy(mem, at)?;
    }
    let mut state = entry::protected(mem, door)?;
    state.gpr[0] = LOADER_MAGIC; // EAX
    state.gpr[3] = INFO; // EBX
    info!(kernel = %image.path.display(), entry = door, "Multiboot kernel loaded");
    Ok(state)
}
