//! ELF kernels by the PVH protocol (Xen, docs/misc/pvh.pandoc; public/arch-x86/hvm/start_info.h).

use tracing::info;
use wardian_cpu::CpuState;
use wardian_memory::{Gpa, GuestMemory};

use crate::elf::Elf;
use crate::low::{INFO, LowHeap};
use crate::map::memory_map;
use crate::place::{self, Blob};
use crate::{BootError, BootRequest, Image, entry};

/// Note "Xen", type 18: physical address of the 32-bit entry.
const PHYS32_ENTRY: u32 = 18;
/// "xEn3" with the top bit of the last letter set.
const MAGIC: u32 = 0x336e_c578;
/// The protocol has no limit; a page is more than any kernel keeps.
const CMDLINE_MAX: usize = 4095;
/// Initial RAM disks lie below this: Linux maps no more of memory when it looks for them.
const INITRD_TOP: u64 = 1 << 31;

pub(crate) fn load(
    mem: &GuestMemory,
    request: &BootRequest,
    image: &Image,
    elf: &Elf,
) -> Result<CpuState, BootError> {
    let Some(door) = elf.note(image, b"Xen", PHYS32_ENTRY)? else {
        return Err(image.unsupported("the ELF file has neither a PVH note nor a multiboot header"));
    };
    let low_end = place::low_end(mem);
    let kernel_end = elf.check(image, low_end)?;
    let door = u32::try_from(door)
        .ok()
        .filter(|d| u64::from(*d) < kernel_end)
        .ok_or_else(|| image.garbled(format!("PVH entry {door:#x}")))?;
    if request.cmdline.len() > CMDLINE_MAX {
        return Err(BootError::CommandLineTooLong { len: request.cmdline.len(), max: CMDLINE_MAX });
    }

    // Module 0 is the initial RAM disk by convention.
    let files =
        request.initrd.iter().map(|p| (p, "")).chain(request.modules.iter().map(|(p, t)| (p, t.as_str())));
    let mut top = low_end.min(INITRD_TOP);
    let mut placed = Vec::new();
    for (path, text) in files {
        let blob = Blob::open(path)?;
        top = blob.place_high(kernel_end, top)?;
        placed.push((blob, top, text));
    }

    let mut heap = LowHeap::new();
    let cmdline = heap.put_text(mem, &request.cmdline)?;
    let mut modules = Vec::new();
    for (blob, at, text) in &placed {
        let text_at = if text.is_empty() { 0 } else { heap.put_text(mem, text)? };
        for word in [*at, blob.size, text_at, 0] {
            modules.extend_from_slice(&word.to_le_bytes());
        }
    }
    let modules_at = if placed.is_empty() { 0 } else { heap.put(mem, &modules)? };
    let map = memory_map(mem, &request.reserved);
    let mut map_bytes = Vec::new();
    for e in &map {
        map_bytes.extend_from_slice(&e.range.start.to_le_bytes());
        map_bytes.extend_from_slice(&(e.range.end - e.range.start).to_le_bytes());
        map_bytes.extend_from_slice(&(e.kind as u32).to_le_bytes());
        map_bytes.extend_from_slice(&[0; 4]);
    }
    let map_at = heap.put(mem, &map_bytes)?;

    // struct hvm_start_info, version 1.
    let mut info = Vec::new();
    for word in [MAGIC, 1, 0, placed.len() as u32] {
        info.extend_from_slice(&word.to_le_bytes());
    }
    for word in [modules_at, cmdline, request.acpi_rsdp.unwrap_or(0), map_at] {
        info.extend_from_slice(&word.to_le_bytes());
    }
    info.extend_from_slice(&(map.len() as u32).to_le_bytes());
    info.extend_from_slice(&[0; 4]);
    mem.write(Gpa(INFO), &info)?;

    elf.copy(mem, image)?;
    for (blob, at, _) in placed {
        blob.copy(mem, at)?;
    }
    let mut state = entry::protected(mem, door)?;
    state.gpr[3] = INFO; // EBX
    info!(kernel = %image.path.display(), entry = door, "ELF kernel loaded by PVH");
    Ok(state)
}
