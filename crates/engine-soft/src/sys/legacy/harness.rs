//! A processor on a few megabytes of memory, for tests: 64-bit code with paging, 32-bit flat, 16-bit real mode.

use iced_x86::{Decoder, DecoderOptions};
use wardian_cpu::bits::{cr0, cr4, efer};
use wardian_cpu::{Exit, Segment};
use wardian_memory::{Gpa, GuestMemory};

use crate::core::{Core, seg};
use crate::tlb::Flush;
use crate::trap::{Exception, Result, Trap};

/// Where the page tables of `core64` lie.
const TABLES: u64 = 0x10_0000;
const RAM: u64 = 4 << 20;
/// A linear address whose page is a device.
pub(crate) const DEVICE: u64 = 0x1f_0000;
/// Where code runs.
pub(crate) const CODE: u64 = 0x1000;

fn flat(kind: u32, bits: u32, dpl: u32) -> Segment {
    Segment { selector: 0x10, base: 0, limit: 0xffff_ffff, rights: 0x8090 | kind | bits | dpl << 5 }
}

fn blank() -> Box<Core> {
    let mut core = Core::for_test(GuestMemory::new(RAM).expect("memory"));
    for n in 0..16 {
        core.set_gpr(n, 0);
    }
    core.set_rflags(2);
    core
}

fn segments(core: &mut Core, code: Segment, data: Segment) {
    for n in [seg::ES, seg::SS, seg::DS, seg::FS, seg::GS] {
        core.set_segment(n, data);
    }
    core.set_segment(seg::CS, code);
    core.set_rip(CODE);
    core.set_gpr(4, 0x8000);
}

/// 64-bit user code; linear equals physical up to 2 MiB, but [`DEVICE`] is no RAM.
pub(crate) fn core64() -> Box<Core> {
    let mut core = blank();
    let entry =
        |core: &Core, at: u64, value: u64| core.mem.write(Gpa(at), &value.to_le_bytes()).expect("RAM");
    for level in 0..3 {
        let table = TABLES + level * 0x1000;
        entry(&core, table, (table + 0x1000) | 7);
    }
    for page in 0..512 {
        entry(&core, TABLES + 0x3000 + page * 8, page << 12 | 7);
    }
    entry(&core, TABLES + 0x3000 + (DEVICE >> 12) * 8, 0x8000_0007);
    core.sys.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::NE;
    core.sys.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXSAVE;
    core.sys.cr3 = TABLES;
    core.sys.efer = efer::LME | efer::LMA;
    core.sys.xcr0 = 7;
    segments(&mut core, flat(0xb, 0x2000, 3), flat(3, 0x4000, 3));
    core.set_cpl(3);
    core
}

/// 32-bit protected mode, privilege level 0, no paging.
pub(crate) fn core32() -> Box<Core> {
    let mut core = blank();
    core.sys.cr0 = cr0::PE | cr0::NE;
    core.sys.cr4 = cr4::OSFXSR | cr4::OSXSAVE;
    core.sys.xcr0 = 7;
    segments(&mut core, flat(0xb, 0x4000, 0), flat(3, 0x4000, 0));
    core.set_cpl(0);
    core
}

/// Real mode, all bases zero.
pub(crate) fn core16() -> Box<Core> {
    let mut core = blank();
    core.sys.cr0 = 0;
    let data = Segment { selector: 0, base: 0, limit: 0xffff, rights: 0x93 };
    segments(&mut core, data, data);
    core.set_cpl(0);
    core
}

/// Changes the page-table entry of a page of `core64`: 0 not present, 5 read-only, 7 all.
pub(crate) fn protect(core: &mut Core, linear: u64, bits: u64) {
    let page = linear >> 12;
    core.mem.write(Gpa(TABLES + 0x3000 + page * 8), &(page << 12 | bits).to_le_bytes()).expect("RAM");
    core.flush_tlb(Flush::All);
}

/// Writes memory.
pub(crate) fn poke(core: &Core, at: u64, data: &[u8]) {
    core.mem.write(Gpa(at), data).expect("RAM");
}

/// Reads memory.
pub(crate) fn peek(core: &Core, at: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    core.mem.read(Gpa(at), &mut out).expect("RAM");
    out
}

/// Runs the instruction `bytes` at the current RIP once, as the run loop does.
pub(crate) fn once(core: &mut Core, bytes: &[u8]) -> Result<()> {
    let bits = if core.is_64bit() {
        64
    } else if core.sys.segments[seg::CS].big() {
        32
    } else {
        16
    };
    let insn = Decoder::with_ip(bits, bytes, core.rip(), DecoderOptions::NONE).decode();
    assert_eq!(insn.len(), bytes.len(), "{bytes:x?}: {:?}", insn.code());
    core.journal_used = 0;
    let result = crate::sys::interpret(core, &insn);
    if !matches!(result, Err(Trap::Exit(_))) {
        core.journal.clear();
    }
    core.journal_used = 0;
    result
}

/// Runs `bytes` from [`CODE`] until it is complete; ports and devices answer `read(exit)`, writes are collected.
pub(crate) fn complete(
    core: &mut Core,
    bytes: &[u8],
    mut read: impl FnMut(&Exit) -> u64,
) -> std::result::Result<Vec<Exit>, Exception> {
    let mut seen = Vec::new();
    core.set_rip(CODE);
    for _ in 0..100_000 {
        let result = once(core, bytes);
        seen.extend(core.out.drain(..));
        match result {
            Ok(()) if core.rip() != CODE => return Ok(seen),
            Ok(()) => {}
            Err(Trap::Exit(exit)) => {
                core.journal.push(read(&exit));
                seen.push(exit);
            }
            Err(Trap::Exception(exception)) => return Err(exception),
            Err(Trap::Alone) => core.begin_alone(),
            Err(Trap::TripleFault) => panic!("triple fault"),
        }
    }
    panic!("{bytes:x?} does not end");
}

/// Runs `bytes` from [`CODE`] to its end without the machine.
pub(crate) fn run(core: &mut Core, bytes: &[u8]) -> std::result::Result<(), Exception> {
    complete(core, bytes, |exit| panic!("asks {exit:?}")).map(|seen| assert_eq!(seen, []))
}

/// A page fault at `linear`.
pub(crate) fn page_fault(error: u32, linear: u64) -> std::result::Result<(), Exception> {
    match Trap::pf(error, linear) {
        Trap::Exception(exception) => Err(exception),
        _ => Ok(()),
    }
}

/// An exception with vector and error code.
pub(crate) fn exception(vector: u8, error: Option<u32>) -> std::result::Result<(), Exception> {
    Err(Exception { vector, error, payload: 0 })
}
