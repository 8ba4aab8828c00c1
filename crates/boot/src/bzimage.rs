//! Linux bzImage by the 64-bit boot protocol (Linux, Documentation/arch/x86/boot.rst).

use tracing::info;
use wardian_cpu::CpuState;
use wardian_memory::{Gpa, GuestMemory};

use crate::low::{LowHeap, ZERO_PAGE};
use crate::map::memory_map;
use crate::place::{self, Blob};
use crate::{BootError, BootRequest, Image, entry};

// The setup header, by offset in the file and in boot_params alike.
const SETUP_SECTS: u64 = 0x1f1;
const SYSSIZE: u64 = 0x1f4;
const VID_MODE: usize = 0x1fa;
const BOOT_FLAG: u64 = 0x1fe;
const JUMP_OFFSET: u64 = 0x201;
const HEADER: u64 = 0x202;
const VERSION: u64 = 0x206;
const TYPE_OF_LOADER: usize = 0x210;
const LOADFLAGS: u64 = 0x211;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const CMD_LINE_PTR: usize = 0x228;
const INITRD_ADDR_MAX: u64 = 0x22c;
const XLOADFLAGS: u64 = 0x236;
const CMDLINE_SIZE: u64 = 0x238;
const PREF_ADDRESS: u64 = 0x258;
const INIT_SIZE: u64 = 0x260;
// Only in boot_params.
const ACPI_RSDP: usize = 0x70;
const E820_ENTRIES: usize = 0x1e8;
const HEADER_END_MAX: u64 = 0x290;
const E820_TABLE: usize = 0x2d0;
const E820_MAX: usize = 128;

/// The first protocol whose header says how large a command line may be.
const OLDEST: u16 = 0x206;
/// The first protocol with `xloadflags`.
const WITH_XLOADFLAGS: u16 = 0x20c;
const XLF_KERNEL_64: u16 = 1;
const LOADED_HIGH: u8 = 1;
/// The 64-bit entry lies this far behind the start of the protected-mode code.
const ENTRY_64: u64 = 0x200;
/// "A loader without a number of its own".
const UNDEFINED_LOADER: u8 = 0xff;

/// Kernels of other machines that Linux builds as a flat image: magic at byte 38h.
fn other_machine(image: &Image) -> Option<&'static str> {
    match image.bytes.get(0x38..0x3c)? {
        b"ARM\x64" => Some("AArch64"),
        b"RSC\x05" => Some("RISC-V"),
        _ => None,
    }
}

pub(crate) fn load(mem: &GuestMemory, request: &BootRequest, image: &Image) -> Result<CpuState, BootError> {
    if let Some(machine) = other_machine(image) {
        return Err(BootError::WrongMachine { path: image.path.clone(), machine: machine.to_owned() });
    }
    let have = image.bytes.len() as u64;
    let not_a_kernel = || BootError::NotAKernel { path: image.path.clone() };
    if have < HEADER + 4 {
        // Too short to tell: a file that begins like a bzImage is a cut one.
        return Err(if image.bytes.starts_with(b"MZ") {
            BootError::Truncated {
                path: image.path.clone(),
                what: "The setup header",
                need: HEADER_END_MAX,
                have,
            }
        } else {
            not_a_kernel()
        });
    }
    if image.u16(BOOT_FLAG, "")? != 0xaa55 || image.slice(HEADER, 4, "")? != b"HdrS" {
        return Err(not_a_kernel());
    }
    let version = image.u16(VERSION, "The setup header")?;
    if version < OLDEST {
        return Err(image.unsupported(format!("boot protocol {}.{:02}", version >> 8, version & 255)));
    }
    image.slice(0, INIT_SIZE + 4, "The setup header")?;
    let byte = |at: u64| image.bytes.get(at as usize).copied().unwrap_or(0);
    if byte(LOADFLAGS) & LOADED_HIGH == 0 {
        return Err(image.unsupported("it wants to lie below 1 MiB (zImage)"));
    }
    if version < WITH_XLOADFLAGS || image.u16(XLOADFLAGS, "")? & XLF_KERNEL_64 == 0 {
        return Err(image.unsupported("it has no 64-bit entry (a 32-bit kernel?)"));
    }
    if !request.modules.is_empty() {
        return Err(image.unsupported("a Linux kernel takes an initrd, no modules"));
    }

    let max = image.u32(CMDLINE_SIZE, "")?.min(0xffff) as usize;
    if request.cmdline.len() > max {
        return Err(BootError::CommandLineTooLong { len: request.cmdline.len(), max });
    }

    // The protected-mode code follows the setup sectors; syssize counts it in paragraphs.
    let sectors = match byte(SETUP_SECTS) {
        0 => 4,
        n => u64::from(n),
    };
    let start = (sectors + 1) * 512;
    let size = u64::from(image.u32(SYSSIZE, "")?) * 16;
    if size < ENTRY_64 + 16 {
        return Err(image.garbled(format!("{size} bytes of kernel")));
    }
    // The size is rounded up, so the file may lack up to 15 bytes of it.
    let code = image.slice(start, size.min(have.saturating_sub(start)).max(size - 15), "The kernel")?;

    // It unpacks itself into init_size bytes from pref_address.
    let preferred = image.slice(PREF_ADDRESS, 8, "").map(le64)?;
    let need = u64::from(image.u32(INIT_SIZE, "")?).max(size);
    let low_end = place::low_end(mem);
    let kernel_end = preferred
        .checked_add(need)
        .filter(|_| preferred.is_multiple_of(4096))
        .ok_or_else(|| image.garbled(format!("preferred address {preferred:#x}")))?;
    // Loading a relocatable kernel lower would not help: it unpacks at its preferred address at the lowest.
    let load_at = preferred;
    place::check_span(image, load_at, kernel_end, low_end)?;

    let initrd_top = u64::from(image.u32(INITRD_ADDR_MAX, "")?).saturating_add(1).min(low_end);
    let initrd = match &request.initrd {
        None => None,
        Some(path) => {
            let blob = Blob::open(path)?;
            let at = blob.place_high(kernel_end, initrd_top)?;
            Some((blob, at))
        }
    };

    // Nothing was written until here.
    let mut params = vec![0u8; 4096];
    let header_end = (HEADER + u64::from(byte(JUMP_OFFSET))).clamp(INIT_SIZE + 4, HEADER_END_MAX);
    let header = image.slice(SETUP_SECTS, header_end - SETUP_SECTS, "The setup header")?;
    params[SETUP_SECTS as usize..header_end as usize].copy_from_slice(header);
    let mut put = |at: usize, bytes: &[u8]| params[at..at + bytes.len()].copy_from_slice(bytes);
    put(VID_MODE, &0xffffu16.to_le_bytes());
    put(TYPE_OF_LOADER, &[UNDEFINED_LOADER]);
    let mut heap = LowHeap::new();
    let cmdline = heap.put_text(mem, &request.cmdline)?;
    put(CMD_LINE_PTR, &(cmdline as u32).to_le_bytes());
    if let Some((blob, at)) = initrd {
        put(RAMDISK_IMAGE, &(at as u32).to_le_bytes());
        put(RAMDISK_SIZE, &(blob.size as u32).to_le_bytes());
        blob.copy(mem, at)?;
    }
    if let Some(rsdp) = request.acpi_rsdp {
        put(ACPI_RSDP, &rsdp.to_le_bytes());
    }
    let mut map = memory_map(mem, &request.reserved);
    map.truncate(E820_MAX);
    put(E820_ENTRIES, &[map.len() as u8]);
    for (i, e) in map.iter().enumerate() {
        let at = E820_TABLE + i * 20;
        put(at, &e.range.start.to_le_bytes());
        put(at + 8, &(e.range.end - e.range.start).to_le_bytes());
        put(at + 16, &(e.kind as u32).to_le_bytes());
    }
    mem.write(Gpa(ZERO_PAGE), &params)?;
    mem.write(Gpa(load_at), code)?;

    let mut state = entry::long(mem, load_at + ENTRY_64)?;
    state.gpr[6] = ZERO_PAGE; // RSI
    info!(kernel = %image.path.display(), at = load_at, protocol = version, "bzImage loaded");
    Ok(state)
}

fn le64(b: &[u8]) -> u64 {
    b.try_into().map_or(0, u64::from_le_bytes)
}
