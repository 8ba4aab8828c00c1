//! The processor at the kernel's door.

use wardian_cpu::bits::{cr0, cr4, efer};
use wardian_cpu::{Activity, CpuState, DescriptorTable, Segment};
use wardian_memory::{Gpa, GuestMemory};

use crate::BootError;
use crate::low::{GDT, PAGE_TABLES};

/// Selector of the code segment, Linux `__BOOT_CS`.
const CODE: u16 = 0x10;
/// Selector of the data segments, Linux `__BOOT_DS`.
const DATA: u16 = 0x18;
/// Selector of the task state segment.
const TASK: u16 = 0x20;

/// Access rights: execute/read code, accessed, present, 4 KiB granularity; 64-bit or 32-bit.
const RIGHTS_CODE64: u32 = 0xa09b;
const RIGHTS_CODE32: u32 = 0xc09b;
const RIGHTS_DATA: u32 = 0xc093;
/// Busy 32- or 64-bit task state segment, present.
const RIGHTS_TASK: u32 = 0x008b;

/// The GDT entry of a flat segment with `rights` (Intel SDM vol. 3A, 3.4.5).
fn descriptor(rights: u32) -> u64 {
    0xffff | (u64::from(rights & 0xf0ff) << 40) | (0xf << 48)
}

fn flat(mem: &GuestMemory, code_rights: u32) -> Result<CpuState, BootError> {
    // The last two entries are the TSS, which takes 16 bytes in long mode: base 0, limit 67h.
    let gdt = [0, 0, descriptor(code_rights), descriptor(RIGHTS_DATA), 0x0000_8b00_0000_0067, 0];
    let mut bytes = Vec::new();
    for entry in gdt {
        bytes.extend_from_slice(&u64::to_le_bytes(entry));
    }
    mem.write(Gpa(GDT), &bytes)?;
    let mut state = CpuState::reset();
    state.segments = [Segment { selector: DATA, base: 0, limit: u32::MAX, rights: RIGHTS_DATA }; 6];
    state.segments[CpuState::CS] = Segment { selector: CODE, base: 0, limit: u32::MAX, rights: code_rights };
    state.tr = Segment { selector: TASK, base: 0, limit: 0x67, rights: RIGHTS_TASK };
    state.ldtr = Segment { rights: Segment::UNUSABLE | 0x82, ..Segment::default() };
    state.gdtr = DescriptorTable { base: GDT, limit: (bytes.len() - 1) as u16 };
    state.idtr = DescriptorTable { base: 0, limit: 0 };
    state.gpr = [0; 16];
    state.rflags = 2;
    state.cr0 = cr0::PE | cr0::ET;
    state.activity = Activity::Running;
    Ok(state)
}

/// Flat 32-bit protected mode without paging, as PVH and multiboot want it.
pub(crate) fn protected(mem: &GuestMemory, entry: u32) -> Result<CpuState, BootError> {
    let mut state = flat(mem, RIGHTS_CODE32)?;
    state.rip = u64::from(entry);
    Ok(state)
}

/// 64-bit mode with the first 4 GiB mapped one to one, as Linux' 64-bit protocol wants it.
pub(crate) fn long(mem: &GuestMemory, entry: u64) -> Result<CpuState, BootError> {
    const PRESENT_WRITE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let pdpt = PAGE_TABLES + 0x1000;
    let first_directory = PAGE_TABLES + 0x2000;
    let mut tables = vec![0u64; 6 * 512];
    tables[0] = pdpt | PRESENT_WRITE;
    for i in 0..4 {
        tables[512 + i] = (first_directory + i as u64 * 0x1000) | PRESENT_WRITE;
    }
    for (i, entry) in tables[1024..].iter_mut().enumerate() {
        *entry = (i as u64) << 21 | PRESENT_WRITE | LARGE;
    }
    let bytes: Vec<u8> = tables.iter().flat_map(|e| e.to_le_bytes()).collect();
    mem.write(Gpa(PAGE_TABLES), &bytes)?;

    let mut state = flat(mem, RIGHTS_CODE64)?;
    state.cr0 |= cr0::PG;
    state.cr4 = cr4::PAE;
    state.cr3 = PAGE_TABLES;
    state.efer = efer::LME | efer::LMA;
    state.rip = entry;
    Ok(state)
}
