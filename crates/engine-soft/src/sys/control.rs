//! Control and debug registers, the flags that only the system may change, TLB and cache instructions, time.
//!
//! Source: Intel SDM vol. 2; vol. 3A, 2.5 (control registers), 5.10.4 (invalidation); vol. 3B, 19.2 (debug
//! registers).

use std::sync::atomic::Ordering;

use iced_x86::{Instruction, Register};
use wardian_cpu::bits::{cr0, cr4, efer, rflags};
use wardian_cpu::{Activity, Exit, Feature};
use wardian_memory::Gpa;

use super::stack::{self, Pops};
use super::{
    advance, canonical, descriptor, need_cpl0, plain_flag, register, set_register, store_word, word_operand,
};
use crate::access::segment_number;
use crate::core::{Core, Privilege, seg};
use crate::shared::RECHECK;
use crate::tlb::Flush;
use crate::trap::{Result, Trap};

const CR0_DEFINED: u64 = cr0::PE
    | cr0::MP
    | cr0::EM
    | cr0::TS
    | cr0::ET
    | cr0::NE
    | cr0::WP
    | cr0::AM
    | cr0::NW
    | cr0::CD
    | cr0::PG;

/// Bits of CR4 whose change forgets every translation.
const CR4_PAGING: u64 = cr4::PSE | cr4::PAE | cr4::PGE | cr4::PCIDE | cr4::SMEP | cr4::SMAP | cr4::LA57;

/// Bits of a PAE page-directory-pointer entry that must be zero (Intel SDM vol. 3A, 5.4.1).
fn pdpte_reserved(core: &Core) -> u64 {
    !((1u64 << core.model.physical_bits()) - 1) | 0x1e6
}

/// #GP(0) if a present PDPTE at `cr3` has reserved bits.
fn check_pdptes(core: &Core, cr3: u64) -> Result<()> {
    let mut bytes = [0u8; 32];
    if core.mem.read(Gpa(cr3 & 0xffff_ffe0), &mut bytes).is_err() {
        return Ok(()); // not RAM: reads as not present
    }
    let reserved = pdpte_reserved(core);
    for entry in bytes.chunks_exact(8) {
        let entry = entry.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
        if entry & 1 != 0 && entry & reserved != 0 {
            return Err(Trap::gp(0));
        }
    }
    Ok(())
}

/// Writes CR0.
///
/// # Errors
/// #GP(0) by the rules of Intel SDM vol. 2B, MOV CR, and vol. 3A, 11.8.5.
pub(crate) fn write_cr0(core: &mut Core, value: u64) -> Result<()> {
    if value >> 32 != 0 {
        return Err(Trap::gp(0));
    }
    let value = value & CR0_DEFINED | cr0::ET;
    let has = |bit: u64| value & bit != 0;
    if (has(cr0::PG) && !has(cr0::PE)) || (has(cr0::NW) && !has(cr0::CD)) {
        return Err(Trap::gp(0));
    }
    let old = core.sys.cr0;
    let changed = old ^ value;
    if changed & cr0::PG != 0 {
        if has(cr0::PG) {
            if core.sys.efer & efer::LME != 0 {
                let tr16 = core.sys.tr.kind() & 0b1101 == 1;
                if core.sys.cr4 & cr4::PAE == 0 || core.sys.segments[seg::CS].long() || tr16 {
                    return Err(Trap::gp(0));
                }
            } else if core.sys.cr4 & cr4::PAE != 0 {
                check_pdptes(core, core.sys.cr3)?;
            }
        } else if core.is_64bit() || core.sys.cr4 & cr4::PCIDE != 0 {
            return Err(Trap::gp(0));
        }
    }
    core.sys.cr0 = value;
    if changed & cr0::PG != 0 {
        core.sys.efer &= !efer::LMA;
        if has(cr0::PG) && core.sys.efer & efer::LME != 0 {
            core.sys.efer |= efer::LMA;
        }
    }
    if changed & cr0::PE != 0 {
        // Real mode and the first instructions of protected mode run at level 0.
        core.set_cpl(0);
    }
    if changed & (cr0::PG | cr0::PE | cr0::WP) != 0 {
        core.flush_tlb(Flush::All);
    }
    core.mode_dirty = true;
    Ok(())
}

/// Writes CR3.
///
/// # Errors
/// #GP(0): reserved bits.
pub(crate) fn write_cr3(core: &mut Core, value: u64) -> Result<()> {
    let pcid = core.sys.cr4 & cr4::PCIDE != 0;
    if !core.long_mode() {
        let value = value & 0xffff_ffff;
        if core.sys.cr0 & cr0::PG != 0 && core.sys.cr4 & cr4::PAE != 0 {
            check_pdptes(core, value)?;
        }
        core.sys.cr3 = value;
        core.switch_space(false);
        return Ok(());
    }
    let keep = pcid && value >> 63 != 0;
    let value = if pcid { value & !(1 << 63) } else { value };
    if value >> core.model.physical_bits() != 0 {
        return Err(Trap::gp(0));
    }
    core.sys.cr3 = value;
    core.switch_space(keep);
    Ok(())
}

/// Writes CR4.
///
/// # Errors
/// #GP(0): bits that the model does not have, PAE cleared in IA-32e mode, PCIDE where it cannot be set.
pub(crate) fn write_cr4(core: &mut Core, value: u64) -> Result<()> {
    let old = core.sys.cr4;
    let changed = old ^ value;
    if value & !core.model.cr4_mask() != 0 {
        return Err(Trap::gp(0));
    }
    if core.long_mode() && value & cr4::PAE == 0 {
        return Err(Trap::gp(0));
    }
    if changed & value & cr4::PCIDE != 0 && (!core.long_mode() || core.sys.cr3 & 0xfff != 0) {
        return Err(Trap::gp(0));
    }
    if changed & cr4::LA57 != 0 && core.long_mode() {
        return Err(Trap::gp(0));
    }
    let paging = core.sys.cr0 & cr0::PG != 0 && !core.long_mode();
    if paging && value & cr4::PAE != 0 && changed & (cr4::PAE | cr4::PSE | cr4::PGE | cr4::SMEP) != 0 {
        check_pdptes(core, core.sys.cr3)?;
    }
    core.sys.cr4 = value;
    if changed & CR4_PAGING != 0 {
        core.flush_tlb(Flush::All);
    }
    core.mode_dirty = true;
    Ok(())
}

/// MOV to and from CR0, CR2, CR3, CR4, CR8.
pub(crate) fn mov_control(core: &mut Core, insn: &Instruction) -> Result<()> {
    let to = insn.op0_register().is_cr();
    let number = if to { insn.op0_register() } else { insn.op1_register() }.number();
    if !matches!(number, 0 | 2 | 3 | 4 | 8) || (number == 8 && !core.is_64bit()) {
        return Err(Trap::ud());
    }
    need_cpl0(core)?;
    if !to {
        let value = match number {
            0 => core.sys.cr0,
            2 => core.sys.cr2,
            3 => core.sys.cr3,
            4 => core.sys.cr4,
            _ => u64::from(core.irq.cr8()),
        };
        set_register(core, insn.op0_register(), value);
        advance(core, insn);
        return Ok(());
    }
    let value = register(core, insn.op1_register());
    match number {
        0 => write_cr0(core, value)?,
        2 => core.sys.cr2 = value,
        3 => write_cr3(core, value)?,
        4 => write_cr4(core, value)?,
        _ if value > 15 => return Err(Trap::gp(0)),
        _ => {
            core.irq.set_cr8(value as u8);
            // It may let an interrupt through.
            core.c().attention.fetch_or(RECHECK, Ordering::AcqRel);
        }
    }
    advance(core, insn);
    Ok(())
}

/// CLTS.
pub(crate) fn clts(core: &mut Core, insn: &Instruction) -> Result<()> {
    need_cpl0(core)?;
    if core.sys.cr0 & cr0::TS != 0 {
        core.sys.cr0 &= !cr0::TS;
        core.mode_dirty = true;
    }
    advance(core, insn);
    Ok(())
}

/// LMSW: the low four bits of CR0, of which PE can only be set.
pub(crate) fn lmsw(core: &mut Core, insn: &Instruction) -> Result<()> {
    need_cpl0(core)?;
    let value = u64::from(word_operand(core, insn, 0)?);
    let old = core.sys.cr0;
    let value = (old & !0xe) | (value & 0xf) | (old & cr0::PE);
    write_cr0(core, value)?;
    advance(core, insn);
    Ok(())
}

/// SMSW.
pub(crate) fn smsw(core: &mut Core, insn: &Instruction) -> Result<()> {
    descriptor::check_umip(core)?;
    let value = core.sys.cr0;
    store_word(core, insn, value)?;
    advance(core, insn);
    Ok(())
}

fn need_osxsave(core: &Core) -> Result<()> {
    if core.sys.cr4 & cr4::OSXSAVE != 0 { Ok(()) } else { Err(Trap::ud()) }
}

/// Whether XCR0 may hold `value` (Intel SDM vol. 1, 13.3).
pub(crate) fn xcr0_allowed(core: &Core, value: u64) -> bool {
    const SSE: u64 = 2;
    const AVX: u64 = 4;
    const AVX512: u64 = 0xe0;
    let avx512 = value & AVX512;
    value & 1 != 0
        && value & !core.model.xcr0_mask() == 0
        && (value & AVX == 0 || value & SSE != 0)
        && (avx512 == 0 || (avx512 == AVX512 && value & AVX != 0))
}

fn edx_eax(core: &Core) -> u64 {
    (core.gpr(2) << 32) | (core.gpr(0) & 0xffff_ffff)
}

/// Sets EDX:EAX, clearing the upper halves.
pub(crate) fn set_edx_eax(core: &mut Core, value: u64) {
    core.set_gpr(0, value & 0xffff_ffff);
    core.set_gpr(2, value >> 32);
}

/// XSETBV.
pub(crate) fn xsetbv(core: &mut Core, insn: &Instruction) -> Result<()> {
    need_osxsave(core)?;
    need_cpl0(core)?;
    let value = edx_eax(core);
    if core.gpr(1) as u32 != 0 || !xcr0_allowed(core, value) {
        return Err(Trap::gp(0));
    }
    core.sys.xcr0 = value;
    crate::fpu::set_width(core);
    core.mode_dirty = true;
    advance(core, insn);
    Ok(())
}

/// XGETBV.
pub(crate) fn xgetbv(core: &mut Core, insn: &Instruction) -> Result<()> {
    need_osxsave(core)?;
    if core.gpr(1) as u32 != 0 {
        return Err(Trap::gp(0)); // index 1 needs XGETBV_ECX_1, which is not offered
    }
    let value = core.sys.xcr0;
    set_edx_eax(core, value);
    advance(core, insn);
    Ok(())
}

/// MOV to and from debug registers.
pub(crate) fn mov_debug(core: &mut Core, insn: &Instruction) -> Result<()> {
    let to = insn.op0_register().is_dr();
    let number = if to { insn.op0_register() } else { insn.op1_register() }.number();
    let number = match number {
        4 | 5 if core.sys.cr4 & cr4::DE != 0 => return Err(Trap::ud()),
        4 | 5 => number + 2,
        0..=7 => number,
        _ => return Err(Trap::ud()),
    };
    need_cpl0(core)?;
    if core.sys.dr7 & (1 << 13) != 0 {
        return Err(Trap::db(1 << 13));
    }
    if !to {
        let value = match number {
            6 => core.sys.dr6,
            7 => core.sys.dr7,
            n => core.sys.dr[n],
        };
        set_register(core, insn.op0_register(), value);
        advance(core, insn);
        return Ok(());
    }
    let value = register(core, insn.op1_register());
    match number {
        6 | 7 if value >> 32 != 0 => return Err(Trap::gp(0)),
        6 => core.sys.dr6 = dr6_value(value),
        7 => core.sys.dr7 = dr7_value(value),
        n => core.sys.dr[n] = value,
    }
    if number != 6 {
        update_watch(core);
    }
    advance(core, insn);
    Ok(())
}

/// DR6 with its fixed bits (no RTM, no bus-lock detection).
pub(crate) fn dr6_value(value: u64) -> u64 {
    (value & 0xe00f) | 0xffff_0ff0
}

/// DR7 with its fixed bits.
pub(crate) fn dr7_value(value: u64) -> u64 {
    (value & 0xffff_23ff) | 0x400
}

/// The data range that breakpoint `n` watches: (start, length, on read, on write). Instruction and I/O
/// breakpoints, and disabled ones, watch nothing.
pub(crate) fn data_breakpoint(core: &Core, n: usize) -> (u64, u64, bool, bool) {
    let dr7 = core.sys.dr7;
    let enabled = dr7 >> (2 * n) & 3 != 0;
    let control = dr7 >> (16 + 4 * n) & 15;
    let length = [1, 2, 8, 4][(control >> 2) as usize];
    match control & 3 {
        1 | 3 if enabled => (core.sys.dr[n] & !(length - 1), length, control & 3 == 3, true),
        _ => (0, 0, false, false),
    }
}

/// The address of instruction breakpoint `n`, if it is one.
pub(crate) fn code_breakpoint(core: &Core, n: usize) -> Option<u64> {
    let dr7 = core.sys.dr7;
    let enabled = dr7 >> (2 * n) & 3 != 0;
    (enabled && dr7 >> (16 + 4 * n) & 15 == 0).then(|| core.sys.dr[n])
}

/// DR6 bits of the I/O breakpoints that an access to `size` ports from `port` on meets (Intel SDM vol. 3B, 18.2.4,
/// 18.2.5). Without CR4.DE there are none.
pub(crate) fn io_breakpoints(core: &Core, port: u16, size: usize) -> u64 {
    let dr7 = core.sys.dr7;
    if dr7 & 0xff == 0 || core.sys.cr4 & cr4::DE == 0 {
        return 0;
    }
    let hit = |n: &usize| {
        let control = dr7 >> (16 + 4 * n) & 15;
        let length = [1, 2, 8, 4][(control >> 2) as usize];
        let start = core.sys.dr[*n] & !(length - 1);
        let (first, last) = (u64::from(port), u64::from(port) + size as u64 - 1);
        dr7 >> (2 * n) & 3 != 0 && control & 3 == 2 && start <= last && first < start.saturating_add(length)
    };
    (0..4).filter(hit).fold(0, |bits, n| bits | 1 << n)
}

/// Recomputes [`Core::watch`] from DR0-DR3 and DR7: its first four entries are theirs (empty ones watch nothing),
/// the debugger's follow.
pub(crate) fn update_watch(core: &mut Core) {
    let ranges: [_; 4] = std::array::from_fn(|n| data_breakpoint(core, n));
    let any = ranges.iter().any(|range| range.1 != 0);
    (core.mode_dirty, core.stops_dirty) = (true, true); // instruction breakpoints
    if core.watch.is_empty() && !any {
        return;
    }
    if core.watch.len() < 4 {
        core.watch.resize(4, (0, 0, false, false));
    }
    if core.watch[..4] != ranges {
        core.watch[..4].copy_from_slice(&ranges);
        core.flush_tlb(Flush::All);
    }
    if core.watch.len() == 4 && !any {
        core.watch.clear();
    }
}

/// INVLPG: no fault but #GP(0) for the level; a non-canonical address does nothing.
pub(crate) fn invlpg(core: &mut Core, insn: &Instruction) -> Result<()> {
    need_cpl0(core)?;
    let offset = core.operand_offset(insn);
    let segment = segment_number(insn.memory_segment());
    let linear = if core.is_64bit() {
        let base = if segment >= seg::FS { core.c().seg_base[segment] } else { 0 };
        base.wrapping_add(offset)
    } else {
        core.c().seg_base[segment].wrapping_add(offset) & 0xffff_ffff
    };
    if !core.is_64bit() || canonical(linear) {
        core.flush_tlb(Flush::Page(linear));
    }
    advance(core, insn);
    Ok(())
}

/// INVPCID, all four types.
pub(crate) fn invpcid(core: &mut Core, insn: &Instruction) -> Result<()> {
    if !core.model.has(Feature::Invpcid) || (!core.protected()) {
        return Err(Trap::ud());
    }
    need_cpl0(core)?;
    let kind = register(core, insn.op0_register());
    let at = core.operand_address(insn, 16, false)?;
    let mut bytes = [0u8; 16];
    core.read(at, &mut bytes, Privilege::Current)?;
    let descriptor = u128::from_le_bytes(bytes);
    let (pcid, linear) = (descriptor as u64, (descriptor >> 64) as u64);
    let pcide = core.sys.cr4 & cr4::PCIDE != 0;
    let bad_pcid = pcid > 0xfff || (matches!(kind, 0 | 1) && pcid != 0 && !pcide);
    if kind > 3 || bad_pcid || (kind == 0 && !canonical(linear)) {
        return Err(Trap::gp(0));
    }
    core.flush_tlb(match kind {
        0 => Flush::PageOf(pcid as u16, linear),
        1 => Flush::Space(pcid as u16),
        2 => Flush::All,
        _ => Flush::NonGlobal,
    });
    advance(core, insn);
    Ok(())
}

/// WBINVD, WBNOINVD and INVD: guest memory is always coherent.
pub(crate) fn cache_flush(core: &mut Core, insn: &Instruction) -> Result<()> {
    need_cpl0(core)?;
    advance(core, insn);
    Ok(())
}

/// CLFLUSH and kin: only the address is checked.
pub(crate) fn cache_line(core: &mut Core, insn: &Instruction) -> Result<()> {
    core.operand_address(insn, 1, false)?;
    advance(core, insn);
    Ok(())
}

/// SERIALIZE.
pub(crate) fn serialize(core: &mut Core, insn: &Instruction) -> Result<()> {
    if !core.model.has(Feature::Serialize) {
        return Err(Trap::ud());
    }
    advance(core, insn);
    Ok(())
}

/// HLT.
pub(crate) fn hlt(core: &mut Core, insn: &Instruction) -> Result<()> {
    need_cpl0(core)?;
    advance(core, insn);
    core.sys.activity = Activity::Halted;
    let pending = core.irq.pending();
    let open = core.c().rflags & rflags::IF != 0;
    let wakes = (pending.interrupt && open)
        || (pending.nmi && !core.sys.nmi_blocked)
        || pending.init
        || pending.startup;
    if !wakes {
        core.push_exit(Exit::Halt);
    }
    Ok(())
}

/// Whether CLI and STI may be run: IOPL outside real mode.
fn may_mask(core: &Core) -> bool {
    let iopl = (core.c().rflags & rflags::IOPL) >> 12;
    !core.protected() || u64::from(core.cpl()) <= iopl
}

/// CLI.
pub(crate) fn cli(core: &mut Core, insn: &Instruction) -> Result<()> {
    if !may_mask(core) {
        return Err(Trap::gp(0));
    }
    plain_flag(core, rflags::IF, false);
    advance(core, insn);
    Ok(())
}

/// STI: interrupts stay off for one more instruction.
pub(crate) fn sti(core: &mut Core, insn: &Instruction) -> Result<()> {
    if !may_mask(core) {
        return Err(Trap::gp(0));
    }
    if core.c().rflags & rflags::IF == 0 {
        plain_flag(core, rflags::IF, true);
        core.sys.interrupt_shadow = true;
    }
    advance(core, insn);
    Ok(())
}

fn need_v86_iopl(core: &Core) -> Result<()> {
    let iopl = core.c().rflags & rflags::IOPL;
    if core.v86() && iopl != rflags::IOPL { Err(Trap::gp(0)) } else { Ok(()) }
}

/// PUSHF, PUSHFD, PUSHFQ.
pub(crate) fn pushf(core: &mut Core, insn: &Instruction, size: u8) -> Result<()> {
    need_v86_iopl(core)?;
    let value = core.rflags() & !(rflags::VM | rflags::RF);
    stack::push(core, value, size)?;
    advance(core, insn);
    Ok(())
}

/// RFLAGS after POPF of `size` bytes (Intel SDM vol. 2B, POPF, table 4-21).
pub(crate) fn popped_flags(core: &Core, popped: u64, size: u8) -> u64 {
    let old = core.rflags();
    let mut mask = rflags::ARITH | rflags::TF | rflags::DF | rflags::NT;
    if size > 2 {
        mask |= rflags::AC | rflags::ID;
    }
    if may_mask(core) {
        mask |= rflags::IF;
    }
    if core.cpl() == 0 && !core.v86() {
        mask |= rflags::IOPL;
    }
    let cleared = if size > 2 && !core.v86() { rflags::VIP | rflags::VIF } else { 0 };
    (old & !mask & !cleared & !rflags::RF) | (popped & mask) | rflags::FIXED
}

/// POPF, POPFD, POPFQ.
pub(crate) fn popf(core: &mut Core, insn: &Instruction, size: u8) -> Result<()> {
    need_v86_iopl(core)?;
    let mut pops = Pops::new(core);
    let popped = pops.pop(core, size)?;
    let flags = popped_flags(core, popped, size);
    pops.commit(core);
    advance(core, insn);
    core.set_rflags(flags);
    Ok(())
}

/// CLAC and STAC.
pub(crate) fn alignment_flag(core: &mut Core, insn: &Instruction, value: bool) -> Result<()> {
    if !core.model.has(Feature::Smap) || core.cpl() != 0 {
        return Err(Trap::ud());
    }
    plain_flag(core, rflags::AC, value);
    core.mode_dirty = true;
    advance(core, insn);
    Ok(())
}

/// CLD and STD.
pub(crate) fn direction_flag(core: &mut Core, insn: &Instruction, value: bool) -> Result<()> {
    plain_flag(core, rflags::DF, value);
    advance(core, insn);
    Ok(())
}

fn need_tsc(core: &Core) -> Result<()> {
    let denied = core.sys.cr4 & cr4::TSD != 0 && core.protected() && core.cpl() > 0;
    if denied { Err(Trap::gp(0)) } else { Ok(()) }
}

fn wait_for_loads() {
    // SAFETY: LFENCE is there on every x86-64 processor and has no other effect.
    unsafe { core::arch::x86_64::_mm_lfence() }
}

/// RDTSC.
pub(crate) fn rdtsc(core: &mut Core, insn: &Instruction) -> Result<()> {
    need_tsc(core)?;
    let tsc = core.read_tsc();
    set_edx_eax(core, tsc);
    advance(core, insn);
    Ok(())
}

/// RDTSCP. It waits for the loads before it (Intel SDM vol. 2B): our reading may not be taken earlier than
/// theirs, or a clock that two vCPUs compare steps back.
pub(crate) fn rdtscp(core: &mut Core, insn: &Instruction) -> Result<()> {
    if !core.model.has(Feature::Rdtscp) {
        return Err(Trap::ud());
    }
    need_tsc(core)?;
    wait_for_loads();
    let tsc = core.read_tsc();
    set_edx_eax(core, tsc);
    core.set_gpr(1, core.sys.tsc_aux & 0xffff_ffff);
    advance(core, insn);
    Ok(())
}

/// RDPID.
pub(crate) fn rdpid(core: &mut Core, insn: &Instruction) -> Result<()> {
    if !core.model.has(Feature::Rdpid) {
        return Err(Trap::ud());
    }
    let aux = core.sys.tsc_aux & 0xffff_ffff;
    let full: Register = insn.op0_register().full_register();
    set_register(core, full, aux);
    advance(core, insn);
    Ok(())
}

/// RDPMC: there are no counters.
pub(crate) fn rdpmc(_core: &mut Core) -> Result<()> {
    Err(Trap::gp(0))
}

/// VMCALL and VMMCALL: from user mode KVM's ABI answers -EPERM, otherwise the machine answers.
pub(crate) fn hypercall(core: &mut Core, insn: &Instruction) -> Result<()> {
    let mask = if core.is_64bit() { u64::MAX } else { 0xffff_ffff };
    let answer = if core.cpl() > 0 {
        (-1i64) as u64
    } else {
        let args = [3, 1, 2, 6].map(|n| core.gpr(n) & mask);
        core.ask(Exit::Hypercall { number: core.gpr(0) & mask, args })?
    };
    core.set_gpr(0, answer & mask);
    advance(core, insn);
    Ok(())
}
