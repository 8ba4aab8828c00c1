//! System instructions on a small machine: 8 MiB of RAM with descriptor tables, task-state segments and pages of
//! every kind.

mod control;
mod deliver;
mod descriptor;
mod state;
mod transfer;

use wardian_cpu::bits::{cr0, cr4, efer};
use wardian_cpu::{DescriptorTable, Segment};
use wardian_memory::{Gpa, GuestMemory};

use crate::core::{Core, seg};
use crate::trap::{Exception, Result, Trap};

pub(super) use crate::sys::legacy::harness::{once, peek, poke};

pub(super) const GDT: u64 = 0x1000;
pub(super) const IDT: u64 = 0x2000;
pub(super) const TSS: u64 = 0x4000;
pub(super) const LDT: u64 = 0x5000;
/// A second TSS, of 32 bits.
pub(super) const TASK: u64 = 0x6000;
pub(super) const CODE: u64 = 0x8000;
pub(super) const STACK: u64 = 0x9000;
pub(super) const RING0_STACK: u64 = 0xb000;
pub(super) const IST1: u64 = 0xd000;
pub(super) const HANDLER: u64 = 0x1_0000;
/// Linear and physical: user pages.
pub(super) const USER: u64 = 0x20_0000;
pub(super) const USER_STACK: u64 = 0x30_0000;
/// Not mapped when paging is on.
pub(super) const HOLE: u64 = 0x40_0000;
const TABLES: u64 = 0x10_0000;

pub(super) const KERNEL_CODE64: u16 = 0x08;
pub(super) const KERNEL_DATA: u16 = 0x10;
pub(super) const USER_CODE32: u16 = 0x18 | 3;
pub(super) const USER_DATA: u16 = 0x20 | 3;
pub(super) const USER_CODE64: u16 = 0x28 | 3;
pub(super) const TSS_SELECTOR: u16 = 0x30;
pub(super) const KERNEL_CODE32: u16 = 0x40;
pub(super) const CONFORMING: u16 = 0x48;
pub(super) const READ_ONLY: u16 = 0x50 | 3;
pub(super) const EXECUTE_ONLY: u16 = 0x58 | 3;
pub(super) const ABSENT: u16 = 0x60 | 3;
pub(super) const LDT_SELECTOR: u16 = 0x68;
pub(super) const GATE: u16 = 0x78;
pub(super) const TASK_SELECTOR: u16 = 0x88;
pub(super) const CODE16: u16 = 0x90;
pub(super) const UNTOUCHED: u16 = 0x98;
pub(super) const BOTH_SIZES: u16 = 0xa0;
pub(super) const BEYOND: u16 = 0xa8;

/// Writes GDT entry `selector`.
pub(super) fn set_descriptor(core: &Core, selector: u16, raw: u64) {
    poke(core, GDT + u64::from(selector & !7), &raw.to_le_bytes());
}

pub(super) fn descriptor_at(core: &Core, selector: u16) -> u64 {
    u64_at(core, GDT + u64::from(selector & !7))
}

pub(super) fn u64_at(core: &Core, at: u64) -> u64 {
    u64::from_le_bytes(peek(core, at, 8).try_into().expect("8 bytes"))
}

pub(super) fn u32_at(core: &Core, at: u64) -> u32 {
    u64_at(core, at) as u32
}

fn system(base: u64, limit: u64, kind: u64) -> u64 {
    limit | (base & 0xff_ffff) << 16 | kind << 40 | (base >> 24 & 0xff) << 56
}

/// A 32-bit gate.
pub(super) fn gate(selector: u16, offset: u64, rights: u64) -> u64 {
    (offset & 0xffff) | u64::from(selector) << 16 | rights << 40 | (offset & 0xffff_0000) << 32
}

/// Sets IDT entry `vector` for the mode of `core`.
pub(super) fn set_gate(core: &Core, vector: u64, selector: u16, offset: u64, rights: u64, ist: u64) {
    let raw = gate(selector, offset, rights) | ist << 32;
    if core.long_mode() {
        poke(core, IDT + vector * 16, &raw.to_le_bytes());
        poke(core, IDT + vector * 16 + 8, &(offset >> 32).to_le_bytes());
    } else {
        poke(core, IDT + vector * 8, &raw.to_le_bytes());
    }
}

fn base() -> Box<Core> {
    let mut core = Core::for_test(GuestMemory::new(8 << 20).expect("memory"));
    let plain = [
        (KERNEL_CODE64, 0x00af_9b00_0000_ffff_u64),
        (KERNEL_DATA, 0x00cf_9300_0000_ffff),
        (USER_CODE32, 0x00cf_fb00_0000_ffff),
        (USER_DATA, 0x00cf_f300_0000_ffff),
        (USER_CODE64, 0x00af_fb00_0000_ffff),
        (KERNEL_CODE32, 0x00cf_9b00_0000_ffff),
        (CONFORMING, 0x00cf_9f00_0000_ffff),
        (READ_ONLY, 0x00cf_f100_0000_ffff),
        (EXECUTE_ONLY, 0x00cf_f900_0000_ffff),
        (ABSENT, 0x00cf_7300_0000_ffff),
        (TSS_SELECTOR, system(TSS, 0x67, 0x8b)),
        (LDT_SELECTOR, system(LDT, 0xff, 0x82)),
        (TASK_SELECTOR, system(TASK, 0x67, 0x89)),
        (CODE16, 0x0000_9b00_0000_ffff),
        (UNTOUCHED, 0x00cf_f200_0000_ffff),
        (BOTH_SIZES, 0x00ef_9b00_0000_ffff),
    ];
    for (selector, raw) in plain {
        set_descriptor(&core, selector, raw);
    }
    core.sys.gdtr = DescriptorTable { base: GDT, limit: BEYOND - 1 };
    core.sys.idtr = DescriptorTable { base: IDT, limit: 0xfff };
    core.sys.tr = Segment { selector: TSS_SELECTOR, base: TSS, limit: 0x67, rights: 0x8b };
    core.sys.ldtr = Segment { rights: Segment::UNUSABLE, ..Segment::default() };
    core.set_rflags(2);
    for n in 0..16 {
        core.set_gpr(n, 0);
    }
    core
}

fn enter(core: &mut Core, cs: u16, ss: u16, rip: u64, rsp: u64) {
    for (index, selector) in
        [(seg::CS, cs), (seg::SS, ss), (seg::DS, ss), (seg::ES, ss), (seg::FS, ss), (seg::GS, ss)]
    {
        let raw = descriptor_at(core, selector);
        let mut segment = crate::sys::descriptor::Entry { raw, at: 0 }.segment(selector);
        if index == seg::CS && core.long_mode() && segment.long() {
            segment.base = 0;
        }
        core.set_segment(index, segment);
    }
    core.set_cpl((cs & 3) as u8);
    core.set_rip(rip);
    core.set_gpr(4, rsp);
}

/// IA-32e mode with paging, 64-bit code at privilege level 0 or 3.
pub(super) fn long(cpl: u8) -> Box<Core> {
    let mut core = base();
    for (at, value) in [
        (TABLES, (TABLES + 0x1000) | 7),
        (TABLES + 0x1000, (TABLES + 0x2000) | 7),
        (TABLES + 0x2000, 0x83),
        (TABLES + 0x2008, USER | 0x87),
    ] {
        core.mem.write(Gpa(at), &u64::to_le_bytes(value)).expect("RAM");
    }
    core.sys.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::NE | cr0::ET;
    core.sys.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXSAVE | cr4::FSGSBASE;
    core.sys.cr3 = TABLES;
    core.sys.efer = efer::LME | efer::LMA | efer::SCE;
    core.sys.xcr0 = 7;
    poke(&core, TSS + 4, &RING0_STACK.to_le_bytes());
    poke(&core, TSS + 0x24, &IST1.to_le_bytes());
    match cpl {
        3 => enter(&mut core, USER_CODE64, USER_DATA, USER, USER_STACK),
        _ => enter(&mut core, KERNEL_CODE64, KERNEL_DATA, CODE, STACK),
    }
    core
}

/// 32-bit protected mode without paging.
pub(super) fn legacy(cpl: u8) -> Box<Core> {
    let mut core = base();
    core.sys.cr0 = cr0::PE | cr0::NE | cr0::ET;
    poke(&core, TSS + 4, &(RING0_STACK as u32).to_le_bytes());
    poke(&core, TSS + 8, &u32::from(KERNEL_DATA).to_le_bytes());
    match cpl {
        3 => enter(&mut core, USER_CODE32, USER_DATA, USER, USER_STACK),
        _ => enter(&mut core, KERNEL_CODE32, KERNEL_DATA, CODE, STACK),
    }
    core
}

/// Real mode.
pub(super) fn real() -> Box<Core> {
    let mut core = base();
    core.sys.cr0 = cr0::ET;
    core.sys.idtr = DescriptorTable { base: 0, limit: 0x3ff };
    for index in 0..6 {
        core.set_segment(index, Segment { selector: 0, base: 0, limit: 0xffff, rights: 0x93 });
    }
    core.set_rip(CODE);
    core.set_gpr(4, STACK);
    core
}

/// Vector, error code of a result.
pub(super) fn fault(result: Result<()>) -> Option<(u8, Option<u32>)> {
    match result {
        Ok(()) => None,
        Err(Trap::Exception(Exception { vector, error, .. })) => Some((vector, error)),
        Err(other) => panic!("{other:?}"),
    }
}

pub(super) fn gp(code: u32) -> Option<(u8, Option<u32>)> {
    Some((13, Some(code)))
}

pub(super) const UD: Option<(u8, Option<u32>)> = Some((6, None));
